"""Where figures come from: versions, hardware, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from . import __version__


_PACKAGES = (
    "torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "deepspeed", "lm_eval", "sacrebleu",
    "rouge_score", "nltk", "sentence_transformers", "scipy",
)  # fmt: skip


def provenance() -> dict:
    """
    Versions of the packages, hardware, and the git commit of the source tree: `None` for an installed package, with `-dirty`
    where tracked files differ from it.
    """
    versions = {"trl_ema": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # an optional one
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": versions,
        "hardware": {
            "gpu": gpu,
            "cpu": _cpu_name(),
            "vectors": torch.backends.cpu.get_cpu_capability(),  # of one name there are many
            "cores": os.cpu_count(),
        },
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)
        return git("rev-parse", "HEAD") + (
            "-dirty" if git("status", "--porcelain", "--untracked-files=no", ".") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None
