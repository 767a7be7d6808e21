"""Which adapters can be trained, averaged, scaled and measured."""

import itertools
import re
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, AuxiliaryTrainingWrapper, ModulesToSaveWrapper

from ..config import MeanTeacherConfig
from ..sharding import whole_weights
from .names import STUDENT_NAME, TEACHER_NAME


# Values of `init_lora_weights` with which an adapter begins beside the base, not as a part of it; and those that take the same from
# the same base again, whenever the adapter is loaded: no random numbers, and nothing that was computed before from data.
_KEEP_BASE = {"true", "false", "gaussian", "orthogonal", "eva", "mica"}
_REPEATABLE = _KEEP_BASE | {"pissa", "olora"}
_PLAIN = "Use a `LoraConfig`, or `teacher='none'`."
_LORA = "Use a `LoraConfig`."  # plain fine-tuning does not train them either
_ONE_BANK = (
    f"shares its trained tensors between all layers and writes them in another form than it trains them in. {_PLAIN}"
)
# Kinds of which no second adapter can be an average of the first: why, and what to do.
_UNAVERAGED = {
    "ADALORA": f"changes its rank while it trains, so no average fits. {_PLAIN}",
    "POLY": f"mixes its tensors by the task of each row, which fine-tuning does not name. {_LORA}",
    "SHADOW": f"carries a second model through the layers, which an average of the adapter does not have. {_LORA}",
    "TINYLORA": _ONE_BANK,
    "UNILORA": _ONE_BANK,
    "VBLORA": _ONE_BANK,
    "XLORA": f"mixes several finished adapters, so there is not one to average. {_LORA}",
}
NO_ADAPTER = (
    "The model has no PEFT adapter to average. Pass `peft_config=LoraConfig(...)` or a `PeftModel`, or use "
    "`teacher='none'`."
)


def refuse_without_adapter(args: MeanTeacherConfig, rehearsal_dataset: Any) -> None:
    """Raises `ValueError` where the options need a PEFT adapter, of which the model has none."""
    has_dataset = rehearsal_dataset is not None or args.rehearsal_dataset is not None
    if args.teacher != "none":
        raise ValueError(NO_ADAPTER)
    if args.rehearsal_weight and (args.rehearsal_loss == "kl" or not has_dataset):
        raise ValueError(
            "`rehearsal_weight` needs a model with a PEFT adapter, which is switched off to have the model before training. Pass "
            "`peft_config=LoraConfig(...)` or a `PeftModel`, or rehearse a `rehearsal_dataset` with `rehearsal_loss='ce'`."
        )
    if args.l1_weight or args.l2_weight or args.ewc_weight:
        raise ValueError(
            "`l1_weight`, `l2_weight` and `ewc_weight` hold the weights of a PEFT adapter, and the model has none. Pass "
            "`peft_config=LoraConfig(...)` or a `PeftModel`."
        )


def student_name(model: PeftModel, earlier_teacher: bool = False) -> str:
    """
    Name of the adapter that is trained. Raises `ValueError` if there is not just one, named as PEFT's default, or there is one
    of the teacher's name, unless that is an `earlier_teacher`, which will be removed.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(NO_ADAPTER)
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"The student must be one active adapter, got {active}. Choose one with `model.set_adapter`.")
    if TEACHER_NAME in model.peft_config and not earlier_teacher:
        raise ValueError(
            f"The model already has an adapter named {TEACHER_NAME!r}, the name of the mean teacher. Remove it with "
            f"`model.delete_adapter({TEACHER_NAME!r})`, or load the adapter you train as 'default'."
        )
    if active[0] != STUDENT_NAME:
        raise ValueError(
            f"The student's adapter is named {active[0]!r}; expected 'default', the one that PEFT saves at the root of a "
            "folder. Create or load it without an `adapter_name`."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"Adapter {active[0]!r} has no trainable parameter. Load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    return active[0]


def check_adapter(config: Any, anchor: float) -> None:
    """Raises `ValueError` if no second adapter of this kind can be an average of the first."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{kind} is prompt learning: its virtual tokens cannot be averaged beside the student's. Use a `LoraConfig` "
            "(or another adapter in the weights), or `teacher='none'`."
        )
    if kind in _UNAVERAGED:
        raise ValueError(f"{kind} {_UNAVERAGED[kind]}")
    check_repeatable(config, "Use `'pissa'` or `'olora'`, which do; or `teacher='none'`.")
    if getattr(config, "ensure_weight_tying", False) and _targets_embeddings(config):
        raise ValueError(
            "`ensure_weight_tying=True` puts the adapter of the embeddings on `lm_head` too, whose weight the loss multiplies by "
            "directly. Leave it out, or train both whole with `modules_to_save`."
        )
    if getattr(config, "bias", "none") not in ("none", None):
        raise ValueError(
            f"`bias={config.bias!r}` trains the base model's own biases, which a second adapter cannot have. Use "
            "`bias='none'`."
        )
    if anchor == 0:
        return
    if unscalable_by(config) is not None:
        raise ValueError(
            f"`teacher_anchor={anchor}` scales a LoRA update towards the base, which needs plain LoRA or rsLoRA: no DoRA, "
            "`modules_to_save`, `trainable_token_indices` or what changes the base (PiSSA, OLoRA, KaSA, `layer_replication`, ...). "
            "Use `teacher_anchor=0`."
        )


# Options of a `LoraConfig` with which it is plain LoRA: base(x) + lora_alpha / r · B·A·x (rsLoRA: √r) in each of its layers, or which say
# nothing of what it computes. Of any other one, of a later PEFT too, a reader of plain LoRA would compute another model.
_PLAIN_LORA = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "kasa_config",
}  # fmt: skip
# With these the update is still a factor times one that stays the same: ranks and factors of single layers, biases that are scaled with
# it, weights that are no layer's own.
_SCALED_ALIKE = ("alpha_pattern", "rank_pattern", "lora_bias", "target_parameters")


def not_plain_by(config: Any, beside: Iterable[str] = ()) -> str | None:
    """
    What of this kind of adapter is not plain LoRA or rsLoRA beside its base; `None` where all of it is.

    Args:
        beside: Options that may be set too.
    """
    kind = getattr(config.peft_type, "value", config.peft_type)
    if kind != "LORA":
        return f"`peft_type={kind}`"
    for option in (field.name for field in fields(config) if field.name not in {*_PLAIN_LORA, *beside}):
        value = getattr(config, option)
        if value or (value is not None and option == "trainable_token_indices"):
            return f"`{option}={value!r}`"
    return base_changed_by(config)


def unscalable_by(config: Any) -> str | None:
    """
    What of this kind of adapter is no factor of its update, so that another scale is not another share of it; `None` for plain
    LoRA and rsLoRA.
    """
    return not_plain_by(config, beside=_SCALED_ALIKE)


def _targets_embeddings(config) -> bool:
    targets = config.target_modules
    return isinstance(targets, (list, set, tuple)) and any(
        name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in targets
    )


def targets_head(config: Any) -> bool:
    """Whether this adapter is on a layer named `lm_head`; a head of another name shows in the loaded model."""
    targets = getattr(config, "target_modules", None) or ()
    if isinstance(targets, str):
        return re.fullmatch(targets, "lm_head") is not None
    return any(name.rpartition(".")[2] == "lm_head" for name in targets)


def base_changed_by(config: Any) -> str | None:
    """
    The option by which this kind of adapter changes the base's own weights or layers, so that without the adapter the model is
    not the base; `None` where the base stays as it was.
    """
    if getattr(config, "kasa_config", None) is not None:
        return "`kasa_config`"  # cuts off the smallest singular values
    if getattr(config, "layer_replication", None):
        return f"`layer_replication={config.layer_replication}`"
    if getattr(config, "bias", "none") not in ("none", None):
        return f"`bias={config.bias!r}`"
    init = getattr(config, "init_lora_weights", True)
    return None if str(init).lower() in _KEEP_BASE else f"`init_lora_weights={init!r}`"


def check_repeatable(config: Any, advice: str) -> None:
    """Raises `ValueError` if the adapter takes from the base what it would not take again when it is loaded."""
    init = getattr(config, "init_lora_weights", True)
    if str(init).lower() not in _REPEATABLE:
        raise ValueError(
            f"`init_lora_weights={init!r}` takes a part of the base into the adapter and does not find the same part again when the "
            f"adapter is loaded: what is saved would compute something else than what was trained. {advice}"
        )


def adapter_changes_nothing(model: PeftModel, name: str) -> bool:
    """Whether the model with adapter `name` is exactly the base: LoRA with a zero factor everywhere."""
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias or base_changed_by(config):
        return False
    if any(p.is_meta for p in model.parameters()):  # shapes without values, as of `trl-ema check`: as PEFT makes it
        return config.init_lora_weights is not False
    return all(_changes_nothing(module, name) for module in model.modules())


def _changes_nothing(module: Any, name: str) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        ours, base = module.modules_to_save[name], module.original_module
        with whole_weights(*ours.parameters(), *base.parameters()):
            tensors = ours.state_dict()
            return all(torch.equal(tensors[key], tensor) for key, tensor in base.state_dict().items())
    if isinstance(module, LoraLayer):
        parts: tuple[Any, ...] = (module.lora_B, module.lora_embedding_A)
        zero_factor = [part[name] for part in parts if name in part]
        return not any(getattr(t, "weight", t).any() for t in zero_factor)
    return not isinstance(module, AuxiliaryTrainingWrapper)


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
