"""Another adapter, or none, for a while: attributes of layers, set and restored. PEFT's own ways take up to a hundred times longer."""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias, cast

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel

from .names import TEACHER_NAME, tuner_layers


# They compute the same in both modes, and are most of an adapter's modules.
_WITHOUT_MODE = {torch.nn.Identity, torch.nn.Linear, torch.nn.Embedding, torch.nn.ModuleDict, torch.nn.ParameterDict}
# (module, attribute, value)
Switch: TypeAlias = tuple[torch.nn.Module, str, object]
_MISSING = object()
_POWERS_OF_TWO = frozenset(2.0**n for n in range(-10, 11))


def teacher_switches(model: PeftModel, is_base: bool) -> list[Switch]:
    """
    All that tells the teacher's pass from the student's: its adapter, or with `is_base` none, and nothing random.

    The pass is deterministic. `model.eval()` would also switch 4-bit layers into a mode that repacks their weights on some
    CPUs, and cost a walk over every module.
    """
    adapter = ("_disable_adapters", True) if is_base else ("_active_adapter", [TEACHER_NAME])
    switches = _adapter_switches(model, *adapter) + nothing_random(model)
    if not is_base:
        plain = (module for module in model.modules() if _is_plain_lora(module))
        switches += [(layer, "forward", functools.partial(_add_update_in_place, layer)) for layer in plain]
    return switches


def evaluating(model: torch.nn.Module) -> list[Switch]:
    """What puts a whole model in evaluation mode, and back in whatever mode each of its modules was."""
    return [(module, "training", False) for module in model.modules()]


def nothing_random(model: torch.nn.Module) -> list[Switch]:
    """What makes a pass without gradients deterministic."""
    # Checkpointing saves memory for a backward pass that there is none of.
    checkpointing = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    stochastic = [*_stochastic_modules(model), *_adapter_modules(model)]
    switches: list[Switch] = [(module, "gradient_checkpointing", False) for module in checkpointing]
    return switches + [(module, "training", False) for module in stochastic]


def saved_alone(model: PeftModel, adapter_name: str) -> AbstractContextManager:
    """Within this context `model.save_pretrained` saves this adapter alone."""
    return switched(
        [(model, "save_pretrained", functools.partial(model.save_pretrained, selected_adapters=[adapter_name]))]
    )


def take_off(model: PeftModel) -> None:
    """Take all adapters off the base, which is then as it was, but that its parameters are frozen."""
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            vars(module)["_active_adapter"] = []  # of which `unload` would leave the trained copy
    base = model.get_base_model()
    model.unload()
    vars(base).pop("peft_config", None)


def without_adapter(model: torch.nn.Module) -> AbstractContextManager:
    """
    Context in which a `PeftModel` computes as its base, whichever adapter is active; nothing for another model.

    PEFT's `disable_adapter` does the same but flips `requires_grad`, which takes a hundred times longer and which FSDP2 does
    not bear.
    """
    return switched(base_switches(model))


def base_switches(model: torch.nn.Module) -> list[Switch]:
    """Each adapter off."""
    return _adapter_switches(model, "_disable_adapters", True)


def _adapter_switches(model: torch.nn.Module, key: str, value: object) -> list[Switch]:
    layers = (module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return [(layer, key, value) for layer in layers]


@contextmanager
def switched(switches: list[Switch]) -> Iterator[None]:
    """Sets each (module, attribute, value), and restores everything, also after an error."""
    saved = [(vars(module), key, vars(module).get(key, _MISSING)) for module, key, _ in switches]
    try:
        for module, key, value in switches:
            vars(module)[key] = value
        yield
    finally:
        for attributes, key, value in saved:
            if value is _MISSING:
                attributes.pop(key, None)
            else:
                attributes[key] = value


def _is_plain_lora(module: Any) -> bool:
    """Whether PEFT's forward of the teacher's adapter here is `base(x) + scale · B(A(x))` and nothing else."""
    return (
        type(module) in (lora.Linear, getattr(lora, "Linear4bit", None))
        and TEACHER_NAME in module.lora_A
        and TEACHER_NAME not in module.lora_variant
        and isinstance(module.lora_dropout[TEACHER_NAME], torch.nn.Identity)
    )


def _add_update_in_place(layer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """
    PEFT's forward of a plain LoRA layer, to the bit, without what a backward pass would need: under autocast PEFT casts the
    input to the adapter's float32, autocast casts it back, and scaling and adding make new tensors.
    """
    if layer.merged or args or kwargs or not torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x, *args, **kwargs)
    scale = layer.scaling[TEACHER_NAME]
    result = layer.base_layer(x)
    update = layer.lora_B[TEACHER_NAME](layer.lora_A[TEACHER_NAME](x))
    if scale in _POWERS_OF_TWO:  # nothing is rounded between the product and the sum
        return result.add_(update, alpha=scale)
    return result.add_(update.mul_(scale))


def _adapter_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """
    The layers of the adapters and what is in them, some of which sample in train mode (PVeRA, MonteCLoRA) or drop out; not the
    layers of the base that they wrap.
    """
    found, todo = [], [(layer, True) for layer in tuner_layers(model)]
    while todo:
        module, is_layer = todo.pop()
        if type(module) not in _WITHOUT_MODE:
            found.append(module)
        for name, child in module.named_children():
            if not isinstance(child, BaseTunerLayer) and not (is_layer and name == "base_layer"):
                todo.append((child, False))
    return found


def _stochastic_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that behave differently in train mode: dropout, jitter, and NEFTune's noise on the embeddings."""
    embeddings = cast(PreTrainedModel, model).get_input_embeddings()
    found = {id(embeddings): embeddings}
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        children = [c for c in module.children() if isinstance(c, torch.nn.Dropout) and c.p > 0]
        own = any(
            ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0
            for key, value in vars(module).items()
        )
        if own or children or (isinstance(module, torch.nn.Dropout) and module.p > 0):
            found[id(module)] = module
    return list(found.values())
