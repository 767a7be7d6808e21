"""What holds a student back. `docs/regularizers.md` shows how to add one."""

from collections.abc import Iterator

from peft import PeftModel

from ..config import MeanTeacherConfig
from .base import Regularizer
from .divergence import TeacherDivergence


def make_regularizers(model: PeftModel, args: MeanTeacherConfig) -> Iterator[Regularizer]:
    """
    The regularizers that `args` asks for, one by one, attached to `model` before it is wrapped for training.

    Raises:
        ValueError: One of them does not fit the model; the text says why and what to change.
    """
    if args.teacher != "none":
        yield TeacherDivergence(model, args)
