"""A model object that is given to one trainer after another, as when a cell of a notebook runs again."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from .adapters.fitness import base_changed_by
from .adapters.names import STUDENT_NAME, TEACHER_NAME
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
    base = _base_of(model)
    return Claim(vars(base).get("forward"), [p for p in base.parameters() if p.requires_grad], model)


def claim(model: Any, before: Claim | None) -> Claim:
    """The claim of a new trainer on its `model`, of which it knew `before` what it was."""
    # A model that the trainer has loaded keeps TRL's forward.
    made = claim_before(_base_of(model)) if before is None else before
    assert made is not None
    made.model = model
    vars(_base_of(model))[_CLAIM] = made
    return made


def has_earlier_teacher(model: Any) -> bool:
    """Whether an adapter of the teacher's name is that of an earlier trainer, which goes when the new one begins."""
    earlier = vars(_base_of(model)).get(_CLAIM)
    return earlier is not None and TEACHER_NAME in [regularizer.folder for regularizer in earlier.regularizers]


def undo_earlier_run(model: Any) -> None:
    """
    Takes off a model object what an earlier trainer has put on it: the forward, the regularizers and, unless the model is
    given together with it, the adapter. PEFT would put the new adapter among the old one's layers, where it is trained and
    saved with those that another `target_modules` leaves out.
    """
    before = vars(_base_of(model)).get(_CLAIM) if isinstance(model, torch.nn.Module) else None
    if before is None:
        return
    base, earlier = _base_of(model), before.model
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
    if is_peft_model(model):
        for regularizer in before.regularizers:
            regularizer.remove()
    if takes_off:
        for module in earlier.modules():
            if isinstance(module, ModulesToSaveWrapper):
                module._active_adapter = []  # of which `unload` would leave the trained copy
        earlier.unload()
        vars(base).pop("peft_config", None)
        for parameter in before.trained:
            parameter.requires_grad_(True)


def _base_of(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def refuse_leftovers(model: Any) -> None:
    """
    PEFT puts an adapter among the layers of an earlier one that it finds on a base. Those that are not its own targets would
    be trained and saved with it.
    """
    tuner = model.base_model if isinstance(model, torch.nn.Module) and is_peft_model(model) else None
    if not isinstance(tuner, BaseTuner) or not tuner.targeted_module_names:
        return
    own = {*tuner.targeted_module_names, *(name.rpartition(".")[0] for name in tuner.targeted_parameter_names)}
    layers = {}
    for name, module in tuner.model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            own.add(name)
        elif isinstance(module, BaseTunerLayer) and set(model.active_adapters) & set(module._get_available_adapters()):
            layers[name] = {*itertools.accumulate(name.split("."), "{}.{}".format)}  # with those it lies in
    left = [name for name, path in layers.items() if own.isdisjoint(path)]
    if left:
        raise ValueError(
            f"The model still carries an earlier adapter: {len(left)} of its layers, such as {left[0]!r}, are no targets of the new "
            "one, and would be trained and saved with it. Load the base model again, or take the earlier adapter off before the "
            "new one is made: `base = earlier_model.unload()`."
        )
