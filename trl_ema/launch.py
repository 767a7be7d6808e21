"""The training job on several processes: accelerate's own launcher, with a packaged configuration or a file of the user's."""

import argparse
import os

import yaml
from accelerate.commands.launch import launch_command, launch_command_parser

from . import __version__
from .extras import require
from .files import shipped
from .script import make_parser
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


def _is_deepspeed(file: str) -> bool:
    with open(file, encoding="utf-8") as opened:
        config = yaml.safe_load(opened)
    return isinstance(config, dict) and config.get("distributed_type") == "DEEPSPEED"


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
