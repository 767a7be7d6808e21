"""A model object that is given to one trainer after another, as when a cell of a notebook runs again."""

from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTuner

from .adapters.fitness import base_changed_by
from .adapters.names import STUDENT_NAME, TEACHER_NAME, base_of
from .adapters.switching import take_off
from .regularizers.base import Regularizer


# On a base model object: the [`Claim`] of the trainer that has it.
_CLAIM = "_trl_ema_claim"


@dataclass
class Claim:
    """
    A trainer's claim on its model: what an undoing needs.

    Args:
        forward: The base model's own attribute before, `None` where it had its class's.
        trained: Parameters of the base that were to be trained before.
        model: What the trainer made of it.
        regularizers: What it put on it.
        given_on: Whether another trainer has it now.
    """

    forward: Any
    trained: list[torch.nn.Parameter]
    model: Any
    regularizers: list[Regularizer] = field(default_factory=list)
    given_on: bool = False


def claim_before(model: Any) -> Claim | None:
    """What a trainer will change on a model object; `None` for the name of a model, which nobody has a reference to."""
    if not isinstance(model, torch.nn.Module):
        return None
    base = base_of(model)
    return Claim(vars(base).get("forward"), [p for p in base.parameters() if p.requires_grad], model)


def claim(model: Any, before: Claim | None) -> Claim:
    """The claim of a new trainer on its `model`, of which it knew `before` what it was."""
    # A model that the trainer has loaded keeps TRL's forward.
    made = claim_before(base_of(model)) if before is None else before
    assert made is not None
    made.model = model
    vars(base_of(model))[_CLAIM] = made
    return made


def has_earlier_teacher(model: Any) -> bool:
    """Whether an adapter of the teacher's name is that of an earlier trainer, which goes when the new one begins."""
    earlier = vars(base_of(model)).get(_CLAIM)
    return earlier is not None and TEACHER_NAME in [regularizer.folder for regularizer in earlier.regularizers]


def undo_earlier_run(model: Any) -> None:
    """
    Takes off a model object what an earlier trainer has put on it: the forward, the regularizers and, unless the model is
    given together with it, the adapter. PEFT would put the new adapter among the old one's layers, where it is trained and
    saved with those that another `target_modules` leaves out.
    """
    before = vars(base_of(model)).get(_CLAIM) if isinstance(model, torch.nn.Module) else None
    if before is None:
        return
    base, earlier = base_of(model), before.model
    takes_off = not is_peft_model(model) and is_peft_model(earlier) and isinstance(earlier.base_model, BaseTuner)
    changed_by = base_changed_by(earlier.peft_config.get(STUDENT_NAME)) if takes_off else None
    if changed_by:
        raise ValueError(
            f"An earlier run with {changed_by} has changed the weights of this very model. Load the model again, and give that."
        )
    vars(base).pop(_CLAIM).given_on = True
    if before.forward is None:
        vars(base).pop("forward", None)
    else:
        base.forward = before.forward
    for regularizer in before.regularizers:
        regularizer.remove()
    if takes_off:
        take_off(earlier)
        for parameter in before.trained:
            parameter.requires_grad_(True)
