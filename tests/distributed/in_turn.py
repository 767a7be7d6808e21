"""
Runs a script once with each file of options, in the same processes: a launch imports for longer than it trains.

    accelerate launch --config_file CONFIG in_turn.py SCRIPT FIRST.yaml SECOND.yaml ...

With `--refused` before the script each run is to be refused on all ranks: what refuses it is written, and the next one follows.
"""

import os
import runpy
import sys
import traceback

from transformers.integrations.deepspeed import unset_hf_deepspeed_config


def main(script: str, *files: str, refused: bool = False) -> None:
    environment = dict(os.environ)
    for file in files:
        sys.argv = [script, "--config", file]
        try:
            runpy.run_path(script, run_name="__main__")
        except ValueError:
            if not refused:
                raise
            traceback.print_exc()
        else:
            assert not refused, file
        # Options of one run are not those of the next: some are kept in the environment, and DeepSpeed's in a global.
        os.environ.clear()
        os.environ.update(environment)
        unset_hf_deepspeed_config()


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(*(a for a in arguments if a != "--refused"), refused="--refused" in arguments)
