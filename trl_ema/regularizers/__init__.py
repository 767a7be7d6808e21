"""What holds a student back. `docs/regularizers.md` shows how to add one."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel

from ..adapters.starting_point import StartingPoint
from ..config import MeanTeacherConfig
from .base import Regularizer
from .divergence import TeacherDivergence
from .rehearsal import Rehearsal


def make_regularizers(
    model: PeftModel,
    args: MeanTeacherConfig,
    tokenizer: Any,
    start: StartingPoint | None,
    rehearsal_dataset: Any = None,
) -> Iterator[Regularizer]:
    """
    The regularizers that `args` asks for, one by one, attached to `model` before it is wrapped for training.

    Raises:
        ValueError: One of them does not fit the model; the text says why and what to change.
    """
    if args.teacher != "none":
        yield TeacherDivergence(model, args)
    if args.rehearsal_weight:
        yield Rehearsal(model, args, tokenizer, start, rehearsal_dataset)
