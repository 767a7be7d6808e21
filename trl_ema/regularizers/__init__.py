"""What holds a student back. `docs/regularizers.md` shows how to add one."""

from collections.abc import Iterator
from typing import Any

from peft import PeftModel

from ..adapters.fitness import refuse_without_adapter
from ..adapters.starting_point import StartingPoint
from ..config import MeanTeacherConfig
from .base import Regularizer
from .divergence import TeacherDivergence
from .own_texts import OwnTexts
from .penalties import EWC, L2SP, L1Penalty
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
    if start is None:
        refuse_without_adapter(args, rehearsal_dataset)
    if args.teacher != "none":
        yield TeacherDivergence(model, args)
    written = args.rehearsal_weight and rehearsal_dataset is None and args.rehearsal_dataset is None
    own = OwnTexts(model, args, tokenizer, start) if start is not None and (written or args.ewc_weight) else None
    if args.rehearsal_weight:
        yield Rehearsal(args, tokenizer, start, own, rehearsal_dataset)
    if args.l1_weight:
        yield L1Penalty(model, args.l1_weight)
    if args.l2_weight:
        yield L2SP(model, args.l2_weight)
    if own is not None and args.ewc_weight:
        yield EWC(model, args.ewc_weight, own, args.ewc_num_texts)
