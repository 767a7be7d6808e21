"""`python -m trl_ema` is the command `trl-ema`; `accelerate launch -m trl_ema train` runs it in several processes."""

from .cli import main


if __name__ == "__main__":
    main()
