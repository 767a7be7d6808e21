"""Try the installed package with its core alone, in an environment without any extra: `make package` runs this."""

import re
import subprocess
import sys
from importlib.metadata import distributions, metadata
from pathlib import Path

import trl_ema


installed = Path(trl_ema.__file__).parent
assert installed.is_relative_to(sys.prefix), f"trl_ema was imported from {installed}, not from the wheel"
extras = {"deepspeed", "lm-eval", "matplotlib", "pytest", "scipy"}
extras &= {found.name.lower().replace("_", "-") for found in distributions()}
assert not extras, f"the environment is not empty: it has {extras}"

assert "torch" not in sys.modules
from trl import SFTTrainer  # noqa: E402

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig  # noqa: E402


assert issubclass(EMARegularizedSFTTrainer, SFTTrainer)
assert MeanTeacherConfig("out", use_cpu=True, bf16=False).teacher == "ema"

shipped = ("py.typed", "accelerate_configs/cpu.yaml", "recipes/medical_ema.py", "recipes/configs/qwen2_1.5b_qlora.yaml")
missing = [name for name in shipped if not (installed / name).is_file()]
assert not missing, f"the wheel lacks {missing}"
assert not (installed / "recipes" / "results").exists(), "the wheel has results in it"


page = metadata("trl_ema").get_payload()
assert "mean teacher" in page, "the wheel has no page for an index"
links = re.findall(r"\]\((?!https?://)([^)]*)\)", page)
assert not links, f"the page for an index has links to files that are not beside it: {links}"


def trl_ema_says(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([Path(sys.prefix, "bin", "trl-ema"), *arguments], capture_output=True, text=True, check=False)


for arguments in (
    ["--help"],
    ["--version"],
    *([name, "--help"] for name in ("train", "evaluate", "compare", "report")),
):
    done = trl_ema_says(*arguments)
    assert done.returncode == 0 and done.stdout, f"{arguments} failed:\n{done.stderr}"
from trl_ema.launch import accelerate_config_file  # noqa: E402


launches = sorted(path.stem for path in (installed / "accelerate_configs").glob("*.yaml"))
assert {"cpu", "multi_gpu", "zero3", "fsdp2"} <= set(launches), (
    f"the wheel lacks launch configurations: it has {launches}"
)
for name in launches:
    found = Path(accelerate_config_file(name))
    assert found.is_relative_to(sys.prefix), f"the launch {name} is that of {found}, not the wheel's"
names = trl_ema_says("train", "--accelerate_config", "none").stderr
assert f"one of {', '.join(launches)}." in names, f"the launch configurations are not named:\n{names}"
print(f"{trl_ema.__version__} works from its wheel")
