"""LoRA adapters scaled and added: in a model, and as one adapter of their own."""

import copy
import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key

from .files import function_fields
from .names import tuner_layers
from .switching import Switch, switched, without_adapter


# An adapter as PEFT writes it: its config and its tensors by their keys.
Adapter = tuple[Any, Mapping[str, torch.Tensor]]
# They may differ between a student and its teacher: the anchor is in the first two, and a teacher has no dropout.
_MAY_DIFFER = {"lora_alpha", "alpha_pattern", "lora_dropout"}


def scale_config(config: Any, factor: float) -> None:
    """Multiply the update ΔW = lora_alpha / r · B·A of the adapter that `config` describes; with rsLoRA r is √r."""
    config.lora_alpha = config.lora_alpha * factor
    config.alpha_pattern = {name: alpha * factor for name, alpha in config.alpha_pattern.items()}


def blended(model: PeftModel, shares: Mapping[str, float]) -> AbstractContextManager:
    r"""
    Context in which a model of plain LoRA layers computes with W + Σ share · ΔW over the adapters named; with no share above
    zero as its base.

    Args:
        shares (`dict[str, float]`): By the adapter's name.
    """
    shares = {name: share for name, share in shares.items() if share}
    if not shares:
        return without_adapter(model)
    switches: list[Switch] = []
    for layer in tuner_layers(model):
        scaling = vars(layer)["scaling"]
        scaled = {name: share * scaling[name] for name, share in shares.items() if name in scaling}
        switches += [(layer, "_active_adapter", list(shares)), (layer, "scaling", scaling | scaled)]
    return switched(switches)


def variant_of(model: PeftModel) -> str | None:
    """Name of a kind of LoRA in the model whose forward is more than `base(x) + scale · B(A(x))`; `None` where there is none."""
    layers = (module for module in model.modules() if isinstance(module, LoraLayer))
    return next((type(variant).__name__ for layer in layers for variant in layer.lora_variant.values()), None)


def check_same_layers(student: Any, teacher: Any, folder: str) -> None:
    """Raises `ValueError` unless the adapter in `folder` is on the layers of the student's, in its rank and kind."""
    ours, theirs = (
        {name: value for name, value in function_fields(config.to_dict()).items() if name not in _MAY_DIFFER}
        for config in (student, teacher)
    )
    other = [name for name in ours if ours[name] != theirs.get(name)]
    if other:
        raise ValueError(
            f"The adapter in {folder} is no teacher of this student: `{other[0]}` is {theirs.get(other[0])!r} there and "
            f"{ours[other[0]]!r} in the student's. Give the folder of one training, or leave `teacher/` out of it."
        )


def scaled_adapter(adapter: Adapter, scale: float) -> Adapter:
    """The adapter with `scale · ΔW`: the same tensors, and another `lora_alpha`."""
    config, tensors = copy.deepcopy(adapter[0]), adapter[1]
    scale_config(config, scale)
    return config, tensors


def mixed_adapter(student: Adapter, teacher: Adapter, mixture: float, scale: float) -> Adapter:
    r"""
    One adapter of twice the rank with scale · ((1 − m)·ΔW_student + m·ΔW_teacher), exactly:

        A = [A_student; A_teacher],  B = [(1 − m)·B_student, m·c·B_teacher]

    in float32, with c the ratio of the two scalings in that layer: 1, or 1 − `teacher_anchor`, unless somebody set another.

    Args:
        student, teacher: See [`scaled_adapter`]. Plain LoRA on the same layers, see [`check_same_layers`].
        mixture (`float`): m, the teacher's share, in (0, 1).
    """
    config = copy.deepcopy(student[0])
    tensors = {}
    for key, tensor in student[1].items():
        ratio = _alpha(teacher[0], key) / _alpha(config, key)
        tensors[key] = _joined(key, (tensor.float(), teacher[1][key].float()), (1 - mixture, mixture * ratio))
    config.r *= 2
    config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
    scale_config(config, scale * (math.sqrt(2) if config.use_rslora else 2))  # as much as the rank takes away
    return config, tensors


def plain_adapter(adapter: Adapter) -> Adapter:
    r"""
    The same adapter for readers that know `r` and a whole `lora_alpha` alone, such as vLLM, llama.cpp and Ollama: no patterns,
    no rsLoRA, no fraction, no 0 (which llama.cpp takes for none). Where it has any of these, with s the scaling of a layer and r
    the largest rank of all,

        A' = [A; 0],  B' = [s·B, 0]  up to rank r,  lora_alpha = r

    in float32; else it is handed back as it is.

    Args:
        adapter: See [`scaled_adapter`]. Plain LoRA.
    """
    config, tensors = copy.deepcopy(adapter[0]), adapter[1]
    if getattr(config, "target_parameters", None):  # their factors are in another order
        return adapter
    whole = config.lora_alpha == int(config.lora_alpha) != 0
    if whole and not (config.use_rslora or config.alpha_pattern or config.rank_pattern):
        config.lora_alpha = int(config.lora_alpha)
        return config, tensors
    ranks = {_layer(key): tensor.shape[0] for key, tensor in tensors.items() if _is_a(key)}
    rank = max(ranks.values())
    plain = {}
    for key, tensor in tensors.items():
        own = ranks.get(_layer(key), rank)
        scaling = _alpha(config, key) / (math.sqrt(own) if config.use_rslora else own)
        if _is_a(key):
            tensor = _padded(tensor.float(), 0, rank)
        elif key.endswith("lora_B.bias"):
            tensor = scaling * tensor.float()
        elif _is_b(key):
            tensor = _padded(scaling * tensor.float(), 1, rank)
        plain[key] = tensor
    config.r = config.lora_alpha = rank
    config.use_rslora, config.alpha_pattern, config.rank_pattern = False, {}, {}
    return config, plain


def _padded(tensor: torch.Tensor, dim: int, size: int) -> torch.Tensor:
    """With zeros up to `size` along `dim`."""
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([tensor, tensor.new_zeros(shape)], dim)


def _layer(key: str) -> str:
    """Name, in the base, of the layer whose tensor has this key."""
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


def _alpha(config: Any, key: str) -> float:
    """The `lora_alpha` of the layer whose tensor has this key, as PEFT finds it."""
    return config.alpha_pattern.get(get_pattern_key(list(config.alpha_pattern), _layer(key)), config.lora_alpha)


def _is_a(key: str) -> bool:
    return "lora_A" in key or "lora_embedding_A" in key


def _is_b(key: str) -> bool:
    return "lora_B" in key or "lora_embedding_B" in key


def _joined(key: str, pair: tuple[torch.Tensor, torch.Tensor], shares: tuple[float, float]) -> torch.Tensor:
    """The tensor `key` of both adapters as one: A stacked, B side by side, what is no factor (the base's) as it is."""
    if _is_a(key):
        return torch.cat(pair)
    scaled = [tensor * share for tensor, share in zip(pair, shares, strict=True)]
    if key.endswith("lora_B.bias"):
        return scaled[0] + scaled[1]
    if _is_b(key):
        return torch.cat(scaled, dim=1)
    return pair[0]
