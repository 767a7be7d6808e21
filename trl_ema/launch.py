"""
The training job on several processes: accelerate's own launcher, with a packaged configuration or a file of the user's; and what
that training would refuse of its launch, known beforehand.
"""

import argparse
import os
from collections.abc import Callable
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command, launch_command_parser
from accelerate.utils import DeepSpeedPlugin, str_to_bool

from . import __version__
from .config import MeanTeacherConfig
from .extras import require
from .files import read_json, read_yaml, shipped
from .processes import (
    PARALLEL,
    Launch,
    refuse_fisher,
    refuse_lone_fsdp,
    refuse_parallelism,
    refuse_sharding,
    refuse_start,
    refuse_tasks,
    refuse_to_write,
    refuse_wrapping,
    zero_of,
)
from .script import TrainingScriptArguments, make_parser
from .versions import check_versions


def take_accelerate_config(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The value of `--accelerate_config` on a command line, `None` without it, and the other arguments."""
    parser = argparse.ArgumentParser(prog="trl-ema train", add_help=False, allow_abbrev=False)
    parser.add_argument("--accelerate_config")
    found, others = parser.parse_known_args(arguments)
    return found.accelerate_config, others


def accelerate_config_file(name: str) -> str:
    """
    Path of a configuration of accelerate: a file, or the name of a packaged one, such as `zero3`.

    Raises:
        ValueError: It is neither.
    """
    if os.path.isfile(name):
        return name
    folder = shipped("accelerate_configs")
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
        raise ValueError(
            f"`accelerate_config={name!r}` is neither a file nor a packaged configuration. Give the path of a file that "
            f"`accelerate config` wrote, or one of {known}."
        )
    return str(path)


def launcher_settings(config: str, arguments: list[str]) -> argparse.Namespace:
    """
    What accelerate's launcher makes of `trl-ema train` with an accelerate configuration; `training_script_args` are the job's own.

    Args:
        config (`str`): Name or path, see [`accelerate_config_file`].
        arguments (`list` of `str`): Options of the training job. Those that it does not have are the launcher's, such as
            `--num_processes`.

    Raises:
        ImportError: It asks for DeepSpeed, which is not installed, or of a version outside its range.
        ValueError: There is no such configuration, or an option that neither has.
    """
    file = accelerate_config_file(config)
    if _is_deepspeed(file):
        require("deepspeed", "deepspeed")
        check_versions(__version__, ("deepspeed",))
    parser = make_parser()
    parser.add_argument("--config")  # which TRL's parser takes before argparse sees it
    _, for_launcher = parser.parse_known_args(arguments)
    command = ["--config_file", file, *for_launcher, "--module", __package__, "train"]
    settings, unknown = launch_command_parser().parse_known_args([*command, *_without(arguments, for_launcher)])
    if unknown or settings.training_script != __package__:
        raise ValueError(
            f"Of {' '.join(for_launcher)} not everything is an option of `trl-ema train` or of `accelerate launch`. Their `--help` "
            "lists what they have."
        )
    return settings


def launch_training(config: str, arguments: list[str]) -> None:
    """Run `trl-ema train` in every process of an accelerate configuration, see [`launcher_settings`]."""
    settings = launcher_settings(config, arguments)
    settings.quiet = True  # the processes say themselves what went wrong
    launch_command(settings)


def launch_of(settings: argparse.Namespace) -> Launch:
    """
    What the launcher makes of its options and of the configuration behind them, see [`launcher_settings`].

    Raises:
        ValueError: It would not launch: the options contradict each other, or the configuration has what it does not know.
    """
    made, _, _ = _validate_launch_command(copy(settings))
    stage = offload = version = None
    if made.use_deepspeed and not made.cpu:  # which launches one plain process
        stage = 2 if made.zero_stage is None else made.zero_stage
        stage, offload = _zero(made.deepspeed_config_file, stage, made.offload_param_device)
    elif made.use_fsdp and not made.cpu:
        version = int(made.fsdp_version)
    sizes = {f"{name}_size": int(getattr(made, f"parallelism_config_{name}_size")) for name in PARALLEL}
    return Launch(
        ranks=int(made.num_processes),
        zero_stage=stage,
        offload_param=offload,
        fsdp_version=version,
        wraps_layers=version is not None and bool(str_to_bool(str(made.fsdp_activation_checkpointing))),
        compiles=str(made.dynamo_backend).lower() != "no",
        **(sizes if made.use_parallelism_config else {}),
    )


def _zero(own_file: str | None, stage: Any, offload: str | None) -> tuple[int, str | None]:
    """Stage, and where weights are kept, of DeepSpeed: by its own file where it has one."""
    if own_file is None:
        return int(stage), offload
    found = read_json(own_file).get("zero_optimization") or {}
    given = found.get("stage", 0)
    return int(stage if given == "auto" else given), (found.get("offload_param") or {}).get("device")


def sees_one_device(settings: argparse.Namespace) -> bool:
    """Whether each process has a GPU of its own, or none: a single one without a launch of several sees all that it is not denied."""
    file = _read(settings.config_file)
    several = settings.use_deepspeed or settings.use_fsdp or settings.multi_gpu or file.get("distributed_type") != "NO"
    gpus = str(settings.gpu_ids or file.get("gpu_ids") or "all")
    return bool(several or file.get("use_cpu") or (gpus != "all" and "," not in gpus))


def with_options_of_training(
    launch: Launch, settings: MeanTeacherConfig, deepspeed: dict | str | None = None
) -> Launch:
    """
    The launch as the options of the training change it: `deepspeed`, `fsdp` and `torch_compile`, which count before the launcher's.

    Args:
        deepspeed (`dict` or `str`, *optional*): That option, where `settings` were made without it: they would start DeepSpeed.

    Raises:
        ImportError: DeepSpeed is not installed, or of a version outside its range.
        ValueError: It is asked for with a configuration that is none.
    """
    deepspeed = settings.deepspeed if deepspeed is None else deepspeed
    launch = replace(launch, compiles=launch.compiles or settings.torch_compile)
    if settings.fsdp:
        plugin: Any = settings.fsdp_plugin_args
        wraps = bool(plugin.get("activation_checkpointing", launch.wraps_layers))
        launch = replace(launch, fsdp_version=int(plugin["fsdp_version"]), wraps_layers=wraps)
    if deepspeed:
        require("deepspeed", "deepspeed")
        check_versions(__version__, ("deepspeed",))
        launch = replace(launch, **zero_of(DeepSpeedPlugin(hf_ds_config=deepspeed)))
    return launch


def checks_of_launch(
    launch: Launch, args: TrainingScriptArguments, settings: MeanTeacherConfig, *, begun: bool, has_texts: bool
) -> list[Callable[[], None]]:
    """
    What a training would refuse of its launch, some of it when its processes run and have loaded a model: the functions that refuse it.

    Args:
        args, settings: Of the training.
        begun (`bool`): Whether it goes on from a checkpoint.
        has_texts (`bool`): Whether texts of the model before it may be at hand, see [`may_be_at_hand`].
    """
    goes_on = args.adapter_name_or_path is not None
    rehearses_own = bool(settings.rehearsal_weight) and settings.rehearsal_dataset is None
    launch = with_options_of_training(launch, settings)
    checks: list[Callable[[], None]] = [partial(refuse_wrapping, launch)]
    if settings.fsdp:
        checks.append(partial(refuse_lone_fsdp, launch))
    if settings.needs_fused_forward:
        checks += [partial(refuse_parallelism, launch), partial(refuse_sharding, launch)]
    if args.eval_tasks:
        checks.append(partial(refuse_tasks, launch))
    if settings.ewc_weight and not begun:  # else it is in the checkpoint
        checks.append(partial(refuse_fisher, launch.shards_weights))
    if rehearses_own and not has_texts:
        numbers = settings.rehearsal_num_texts, settings.rehearsal_num_tokens
        checks.append(partial(refuse_to_write, launch.shards_weights, *numbers))
    if args.measure or args.drift_steps or str(settings.metric_for_best_model).endswith("drift"):
        checks.append(partial(refuse_start, launch, not goes_on))
    if rehearses_own or (settings.rehearsal_weight and settings.rehearsal_loss == "kl"):
        checks.append(partial(refuse_start, launch, not goes_on, rehearses=True))
    return checks


def _is_deepspeed(file: str) -> bool:
    return _read(file).get("distributed_type") == "DEEPSPEED"


def _read(file: str) -> dict:
    config = read_yaml(file)
    return config if isinstance(config, dict) else {}


def _without(arguments: list[str], taken: list[str]) -> list[str]:
    """`arguments` without those of `taken`, which stand among them in the same order."""
    rest = iter(taken)
    following = next(rest, None)
    kept = []
    for argument in arguments:
        if argument == following:
            following = next(rest, None)
        else:
            kept.append(argument)
    return kept
