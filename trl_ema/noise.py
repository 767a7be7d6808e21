"""Lines that other libraries write for each other, and that tell whoever starts a command nothing."""

import logging
import os
import warnings


def hide_lines(logger: str, start: str) -> None:
    """Drop the messages of a logger that begin so, and no others."""
    logging.getLogger(logger).addFilter(lambda record: not str(record.msg).startswith(start))


def hide_noise() -> None:
    """For a command, which has the process to itself; as a library this package leaves the others' messages alone."""
    for name in ("httpx", "httpx2", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":  # imported only because it is installed
        hide_lines("DeepSpeed", "Setting accelerator to CPU")
    # PEFT and TRL still read what transformers 5.23 has renamed.
    old_names = r"`(is_)?gradient_checkpointing\w*` is deprecated"
    warnings.filterwarnings("ignore", old_names, FutureWarning)
    warnings.filterwarnings("ignore", "'pin_memory' argument is set as true but no accelerator", UserWarning)
