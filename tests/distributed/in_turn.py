"""
Runs a script once with each file of options, in the same processes: a launch imports for longer than it trains.

    accelerate launch --config_file CONFIG in_turn.py SCRIPT FIRST.yaml SECOND.yaml ...
"""

import os
import runpy
import sys

from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def main(script: str, *files: str) -> None:
    environment = dict(os.environ)
    for file in files:
        sys.argv = [script, "--config", file]
        runpy.run_path(script, run_name="__main__")
        # Options of one run are not those of the next: some are kept in the environment, and DeepSpeed's in a global.
        os.environ.clear()
        os.environ.update(environment)
        unset_hf_deepspeed_config()


if __name__ == "__main__":
    main(*sys.argv[1:])
