"""
Compare ways to fine-tune on the same data, seeds and steps: train, evaluate, report.

    python recipes/compare.py                          nine arms on the offline demo, hours on 2 CPU cores
    python recipes/compare.py --config my_arms.yaml

The YAML has the options of `trl-ema train` that all arms share under `training`, those that differ under `arms`, and what is
measured under `evaluation`; `trl_ema/configs/compare_smollm2.yaml` is an example. `trl-ema compare` is the same.
"""

import sys

from trl_ema.cli import compare


if __name__ == "__main__":
    compare(sys.argv[1:])
