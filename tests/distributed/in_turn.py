"""
Runs a script once with each file of options, in the same processes: a launch imports for longer than it trains.

    accelerate launch --config_file CONFIG in_turn.py SCRIPT FIRST.yaml SECOND.yaml,OTHER_CONFIG.yaml ...

What the launcher tells its processes of a configuration is in their environment. A run with another one gets what the launcher itself
makes of that.
"""

import os
import runpy
import sys
from unittest import mock

from accelerate.commands.launch import launch_command, launch_command_parser
from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def take_environment_of(config: str) -> None:
    """Have what accelerate's launcher would give a process of this configuration, in place of what it has given this one."""
    found: dict[str, str] = {}
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]
    with mock.patch("torch.distributed.run.run", lambda _: found.update(os.environ)):
        launch_command(
            launch_command_parser().parse_args(["--config_file", config, "--main_process_port", "0", "script.py"])
        )
    assert found, config
    os.environ.update((name, value) for name, value in found.items() if name.startswith(("ACCELERATE_", "FSDP_")))


def main(script: str, *runs: str) -> None:
    environment = dict(os.environ)
    for run in runs:
        options, _, config = run.partition(",")
        if config:
            take_environment_of(config)
        sys.argv = [script, "--config", options]
        runpy.run_path(script, run_name="__main__")
        # Options of one run are not those of the next: some are kept in the environment, and DeepSpeed's in a global.
        os.environ.clear()
        os.environ.update(environment)
        unset_hf_deepspeed_config()


if __name__ == "__main__":
    main(*sys.argv[1:])
