"""A second adapter on a `PeftModel`, a copy of the one that is trained: what a mean teacher averages into."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel

from ..sharding import is_sharded
from .blending import scale_config
from .files import file_keys
from .names import TEACHER_NAME, names_of, trained_names, tuner_layers, twin_name


@dataclass(frozen=True)
class Twin:
    """
    A trained parameter of the student and the teacher's beside it. Modules, not parameters: sharding replaces those.

    Args:
        student, teacher: Module, and name of its attribute.
        names: All names of the teacher's in the model: more than one where layers share it (LILY).
        key: Its name in a PEFT file.
    """

    student: tuple[torch.nn.Module, str]
    teacher: tuple[torch.nn.Module, str]
    names: list[str]
    key: str


def add_twin(model: PeftModel, student: str, anchor: float = 0.0) -> list[Twin]:
    """
    Add a frozen copy of the adapter `student`, without dropout, scaled by 1 − `anchor`, and return each trained parameter
    with its twin.

    Raises:
        ValueError: A trained parameter can have no twin, or PEFT would not write it as it is.
    """
    trained = trained_names(model)
    _add_adapter(model, student, anchor)
    if trained != trained_names(model):
        raise RuntimeError("Adding the teacher changed which parameters are trained: this needs peft>=0.21.")
    slots = [_slot(model, name, student) for name in trained]
    names = _tie(model, trained, student)
    keys = file_keys(model, TEACHER_NAME)
    lost = [first for first, *_ in names if first not in keys]
    if lost:
        kind = getattr(model.peft_config[student].peft_type, "value", None)
        raise ValueError(
            f"{kind} writes its trained tensor {lost[0]!r} in another form, so a teacher could not be read back. Use a "
            "`LoraConfig`, or `teacher='none'`."
        )
    _start_as_copy(model, student)
    return [Twin(*slot, aliases, keys[aliases[0]]) for slot, aliases in zip(slots, names, strict=True)]


def _add_adapter(model: PeftModel, student: str, anchor: float) -> None:
    config: Any = _config_of_twin(model.peft_config[student], anchor)
    # What PEFT does to the base for an adapter (PiSSA, OLoRA, replicated layers, ...) it has done for the student. The
    # initial weights are overwritten below: leave the random state, and so the run, as without a teacher.
    done = {name: getattr(config, name) for name in ("init_lora_weights", "layer_replication") if hasattr(config, name)}
    neutral = {"init_lora_weights": True, "layer_replication": None}
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices), _base_kept(model):
        for name in done:
            setattr(config, name, neutral[name])
        model.add_adapter(TEACHER_NAME, config)
    # It must do so again for whoever loads the teacher alone, however it was saved.
    for name, value in done.items():
        setattr(model.peft_config[TEACHER_NAME], name, value)
    model.set_requires_grad(TEACHER_NAME, False)


def _config_of_twin(student_config: Any, anchor: float) -> Any:
    """A copy for the teacher: no dropout, no samples, and the anchor as its scale."""
    config = copy.deepcopy(student_config)
    config.inference_mode = True
    for f in fields(config) if is_dataclass(config) else ():
        if "dropout" in f.name and isinstance(getattr(config, f.name), (int, float)):
            setattr(config, f.name, 0.0)
    if hasattr(config, "sample_at_inference"):  # PVeRA
        config.sample_at_inference = False
    if isinstance(config, LoraConfig) and anchor > 0:
        scale_config(config, 1 - anchor)
    return config


@contextmanager
def _base_kept(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model's parameters can be replaced (KaSA does so at each adapter) and are put back."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if not is_sharded(parameter)]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


def _slot(model: PeftModel, name: str, student: str) -> tuple[tuple[torch.nn.Module, str], tuple[torch.nn.Module, str]]:
    """(module, attribute) of a student parameter and of its twin in the teacher."""
    twin = twin_name(name, student)
    (module, _, own), (twins_module, _, twins_own) = name.rpartition("."), twin.rpartition(".")
    try:
        if name == twin:
            raise AttributeError
        slot = (model.get_submodule(module), own), (model.get_submodule(twins_module), twins_own)
        getattr(*slot[1])
    except AttributeError:
        raise ValueError(
            f"Parameter {name!r} is trained but belongs to no adapter, so the teacher cannot have its own copy. "
            "Train an adapter alone: put whole modules into `modules_to_save`, use `bias='none'` and leave the base "
            "frozen; or use `teacher='none'`."
        ) from None
    return slot


def _tie(model: PeftModel, trained: list[str], student: str) -> list[list[str]]:
    """
    The names of each of the teacher's tensors. Where the student has one tensor under several names the teacher gets one
    too: PEFT ties those of the first adapter alone.
    """
    shared = names_of(model)
    names = [[twin_name(alias, student) for alias in shared[name]] for name in trained]
    for first, *others in names:
        for other in others:
            module, _, own = other.rpartition(".")
            setattr(model.get_submodule(module), own, model.get_parameter(first))
    return names


@torch.no_grad()
def _start_as_copy(model: PeftModel, student: str) -> None:
    """All that is the student's own, trained or not: MICA has a frozen factor, others have masks and buffers."""
    named: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named |= dict(model.named_buffers(remove_duplicate=False))
    for name, tensor in named.items():
        twin = twin_name(name, student)
        if twin != name and twin in named:
            named[twin].copy_(tensor)
    for layer in tuner_layers(model):
        for value in vars(layer).values():  # SHIRA's indices
            if isinstance(value, dict) and torch.is_tensor(value.get(student)):
                value[TEACHER_NAME] = value[student].clone()
