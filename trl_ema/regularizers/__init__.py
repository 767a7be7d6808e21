"""What holds a student back. `docs/regularizers.md` shows how to add one."""

from peft import PeftModel

from ..config import MeanTeacherConfig
from .base import Regularizer
from .divergence import TeacherDivergence


def make_regularizers(model: PeftModel, args: MeanTeacherConfig) -> list[Regularizer]:
    """
    The regularizers that `args` asks for, attached to `model`: called once, before it is wrapped for training.

    Raises:
        ValueError: One of them does not fit the model; the text says why and what to change.
    """
    regularizers: list[Regularizer] = []
    if args.teacher != "none":
        regularizers.append(TeacherDivergence(model, args))
    return regularizers
