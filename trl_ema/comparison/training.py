"""The trainings of a comparison: each in a process of its own, one after the other or several at once, on one GPU or on all."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from itertools import takewhile
from pathlib import Path
from queue import SimpleQueue
from threading import Event

import torch
from tqdm import tqdm

from ..evaluation.models import adapter_fingerprint
from ..files import write_json
from ..launch import launch_of, launcher_settings, take_accelerate_config
from ..processes import Launch
from ..tracking import RUN_GROUP
from .plan import Arm, Comparison


logger = logging.getLogger(__name__)

LOG = "train.log"
# Beside a stage's run: fingerprint of the adapter that it went on from.
START = "went_on_from.json"


def check_jobs(comparison: Comparison, jobs: int) -> Launch:
    """
    How the plan launches its trainings. Raises `ValueError` if they cannot be started so, or so many at once.

    Raises:
        ImportError: The launch needs a package that is not there.
    """
    if jobs < 1:
        raise ValueError(f"`jobs` must be at least 1, got {jobs}. It counts trainings at once.")
    launch = Launch()
    if comparison.launch is not None:
        config, others = take_accelerate_config(_words(comparison))
        settings = launcher_settings(str(config), others)
        launch, of_training = launch_of(settings), settings.training_script_args[1:]
        if of_training:
            raise ValueError(
                f"`launch` in the plan has {' '.join(of_training)}, which is of the training and not of its launch. Give it under "
                "`training`, so that the evaluation knows of it too."
            )
        if jobs > 1:
            raise ValueError(
                f"`jobs={jobs}` gives each training one GPU, and `launch` in the plan gives it several. Leave out one of them."
            )
    devices = _devices()
    if jobs > 1 and devices and jobs > len(devices):
        raise ValueError(
            f"`jobs={jobs}` trainings have {len(devices)} GPUs. Give at most as many, or a plan with `launch` to train each on all."
        )
    return launch


def _words(comparison: Comparison) -> list[str]:
    """The `launch` of a plan as on a command line; what is true is a flag there."""
    words: list[str] = []
    for name, value in (comparison.launch or {}).items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def train(comparison: Comparison, arm: Arm, seed: int, log: Path | None = None, **environment: str) -> None:
    """
    Train one run, or go on with it.

    Args:
        log (`Path`, *optional*): Where what it says goes, behind what is there.

    Raises:
        ValueError: It failed; tells where what it said is.
    """
    logger.info("Training %s", comparison.run_name(arm.name, seed))
    folder = comparison.folder(arm.name, seed)
    if comparison.earlier is not None and not is_begun(folder):
        start = {"adapter": adapter_fingerprint(comparison.earlier.folder(arm.name, seed))}
        write_json(Path(folder, START), start)
    config = os.path.join(folder, "config.yaml")
    launch = _words(comparison)
    program = ["-m", "trl_ema", "train", *launch] if arm.script is None else [arm.script]
    command = [sys.executable, *program, "--config", config]
    # Weights & Biases takes these from nowhere else; the group is that of a run in trackio, too.
    groups = {"WANDB_PROJECT": comparison.project, RUN_GROUP: arm.name} | os.environ | environment
    if not (launch or environment) and len(_devices()) > 1:  # one process, which TRL refuses several GPUs
        groups |= _share(0, 1)
    try:
        if log is None:
            subprocess.run(command, check=True, env=groups)
            return
        with open(log, "ab") as file:
            subprocess.run(command, check=True, env=groups, stdout=file, stderr=subprocess.STDOUT)
    except subprocess.CalledProcessError as error:
        raise ValueError(
            f"The training of {comparison.run_name(arm.name, seed)}, failed; what it said is {'above' if log is None else f'in {log}'}. The "
            "others are kept: run `trl-ema compare` again once it is mended."
        ) from error


@cache
def options_of_script(script: str) -> frozenset[str]:
    """
    Names of the options that a training script takes, as its `--help` tells them.

    Raises:
        ValueError: It is not there, or does not tell them.
    """
    if not os.path.isfile(script):
        raise ValueError(f"`script` {script!r} is no file in {os.getcwd()}. Give its path from there, or a whole one.")
    told = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    names = frozenset(re.findall(r"--(\w+)", told.stdout))
    if told.returncode or "output_dir" not in names:
        said = (told.stderr.strip() or "no option `--output_dir`").splitlines()[-1]
        raise ValueError(
            f"`{script} --help` does not tell the options of a training script: {said}. Give a script that takes those of `trl-ema "
            "train`, such as recipes/subspaces.py."
        )
    return names


def is_begun(folder: str) -> bool:
    """Whether the run in `folder` has a checkpoint to go on from."""
    return any(Path(folder).glob("checkpoint-*"))


def train_together(
    comparison: Comparison,
    runs: Sequence[tuple[Arm, int]],
    jobs: int,
    stages: Sequence[Comparison] | None = None,
) -> None:
    """
    Train what of the `runs` is not done yet, so many at once; each says what it says in `train.log` in its folder. After one has
    failed, those that have begun are finished, and no other is begun; so after Ctrl-C.

    Args:
        stages (*optional*): Those of [`Comparison.by_stage`] that each run is now taken through, one after the other; all by default.

    Raises:
        ValueError: One failed.
    """
    stages = comparison.by_stage() if stages is None else stages

    todo = [(arm, seed) for arm, seed in runs if any(stage.is_to_be_trained(arm, seed) for stage in stages)]
    places: SimpleQueue[dict[str, str]] = SimpleQueue()
    for place in range(jobs):
        places.put(_share(place, jobs))

    stopped = Event()

    def run(arm: Arm, seed: int) -> None:
        share = places.get()
        try:
            for stage in stages:
                if stage.is_to_be_trained(arm, seed) and not stopped.is_set():
                    train(stage, arm, seed, Path(stage.folder(arm.name, seed), LOG), **share)
        except BaseException:
            stopped.set()
            raise
        finally:
            places.put(share)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run, *one) for one in todo]
        for future in tqdm(as_completed(futures), total=len(futures), desc="Trainings"):
            try:
                future.result()
            except ValueError:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
            except BaseException:  # such as Ctrl-C, which the trainings have had too
                stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def _devices() -> list[str]:
    """Of the GPUs that this process may use, as a process that is to use one of them must be told."""
    visible, number = os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()
    if visible is None:
        return [str(device) for device in range(number)]
    # CUDA reads up to the first that is none, such as -1.
    named = takewhile(lambda device: device not in ("", "-1"), (word.strip() for word in visible.split(",")))
    return list(named)[:number]


def _share(place: int, jobs: int) -> dict[str, str]:
    """The part of the machine that one of so many jobs gets: a GPU, or without any its share of the cores."""
    devices = _devices()
    if devices:
        return {"CUDA_VISIBLE_DEVICES": devices[place]}
    threads = max(1, len(os.sched_getaffinity(0)) // jobs)
    return {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}
