"""Held-out loss, and how far a model has drifted from the base it adapts, from one loaded model."""

import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import repeat
from typing import Any, cast

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig
from trl.models.utils import _ForwardRedirection
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..adapters.fitness import base_changed_by, targets_head
from ..adapters.switching import without_adapter
from ..data import DataPart, as_chat, load_part, tokenize_rows
from ..forward import logit_transform
from ..losses import IGNORE_INDEX, fused_linear_cross_entropy_kl
from ..options import RowsArguments
from ..sharding import whole_weights
from .models import evaluating


_Context = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class Pass:
    """
    What a model computed for the labels of one batch.

    Args:
        hidden (`list[torch.Tensor]`): Of each row its hidden states for the labels, `(labels, H)`.
        weight, bias (`torch.Tensor`): Of the head that belongs to them.
    """

    hidden: list[torch.Tensor]
    weight: Any
    bias: Any


def general_rows() -> list[dict[str, str]]:
    """Short questions of general knowledge with their answers, for drift away from the domain: 48 rows of our own."""
    text = importlib.resources.files(__package__).joinpath("general_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def sampled_rows(args: RowsArguments, tokenizer: PreTrainedTokenizerBase, option: str = "dataset_name") -> Dataset:
    """
    At most `dataset_samples` rows to measure on, drawn with `seed`; plain prompts become chats.

    Args:
        option (`str`): The one that names them; another than `dataset_name` may hold an entry as of `datasets`,
            with a split of its own.
    """
    if option == "dataset_name":
        name, columns = str(args.dataset_name), args.dataset_columns
        part = DataPart(name, args.dataset_config, split=args.dataset_split, columns=columns)
    else:
        part = DataPart.from_config(getattr(args, option), option)
    rows = cast(Dataset, load_part(part, option, drop_incomplete=args.drop_incomplete_rows))
    rows = rows.shuffle(seed=args.seed).select(range(min(args.dataset_samples, len(rows))))
    return as_chat(rows, tokenizer)


def tokenized_batches(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    batch_size: int = 16,
    settings: SFTConfig | None = None,
) -> list[dict]:
    """
    Batches of rows in any of TRL's formats, with the labels that `SFTTrainer` gives them: its own tokenization, without a model.

    Rows of about one length share a batch, so little is padding.

    Args:
        max_length (`int`, *optional*): Tokens per row at most. As in training, rows without a label within them are left out.
        settings (`SFTConfig`, *optional*): Those of the training, such as `completion_only_loss`; TRL's defaults otherwise.

    Raises:
        ValueError: A row cannot be tokenized, has images, or no row has a label.
    """
    images = {"image", "images"} & set(rows.column_names)
    if images:
        raise ValueError(
            f"The rows have a column {images.pop()!r}; loss and drift are measured on text alone. Leave it out."
        )
    examples = list(tokenize_rows(rows, tokenizer, max_length, settings))
    if not examples:
        raise ValueError(_no_label(len(rows)))
    examples.sort(key=lambda example: len(example["input_ids"]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = DataCollatorForLanguageModeling(pad)
    return [collate(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def measure_drift(
    model: PeftModel | PreTrainedModel, batches: Iterable[dict], *args: Any, **kwargs: Any
) -> dict[str, float]:
    """
    Loss and drift over every labelled token together; the arguments are those of [`drift_of_rows`].

    Returns:
        `dict`: `loss`, `kl_base_model`, `kl_model_base` in nats per token, and `tokens`.

    Raises:
        ValueError: No token carries a label.
    """
    return mean_drift(drift_of_rows(model, batches, *args, **kwargs))


def mean_drift(rows: torch.Tensor) -> dict[str, float]:
    """What [`measure_drift`] returns, from the sums of [`drift_of_rows`]."""
    loss, forward, reverse, tokens = rows.sum(0).tolist()
    if not tokens:
        raise ValueError(_no_label(len(rows)))
    return {
        "loss": loss / tokens,
        "kl_base_model": forward / tokens,
        "kl_model_base": reverse / tokens,
        "tokens": int(tokens),
    }


def _no_label(number: int) -> str:
    return (
        f"No token of the {number} rows carries a label, so there is no loss and no drift. Give rows with a completion "
        "that begins within the tokens that are read (`max_length`; `trl-ema evaluate` reads 1024)."
    )


@torch.no_grad()
def drift_of_rows(
    model: PeftModel | PreTrainedModel,
    batches: Iterable[dict],
    adapter: _Context = nullcontext,
    description: str = "",
    wrapper: torch.nn.Module | None = None,
    reference: _Context | None = None,
    directions: Sequence[str] = ("forward", "reverse"),
    passes_before: Sequence[Pass] | None = None,
) -> torch.Tensor:
    r"""
    Loss and drift of each row, summed over its labelled tokens, from the model before its training:

        loss              Σ −log p_model(y)
        kl_base_model     Σ KL(p_base ‖ p_model) = Σ Σ_v p_base·log(p_base / p_model)
        kl_model_base     Σ KL(p_model ‖ p_base)

    KL from the base on the data that a model was tuned on predicts what it forgets elsewhere.

    Args:
        model (`PeftModel`): Its adapter and mode stay as they are. A plain model is its own base, with zero drift.
        batches: Dicts with `input_ids` and `labels` (and what else the forward takes), such as a dataloader.
        adapter (callable): Gives the context of the model's own pass, such as `MeanTeacher.activate`.
        description (`str`): Label of the progress bar.
        wrapper (`torch.nn.Module`, *optional*): What DDP, DeepSpeed or FSDP put around the model. Every rank measures every
            batch: the passes of a sharded model go in step, and the figures do not depend on the number of ranks.
        reference (callable, *optional*): Gives the context in which the model computes as it did before its training, such as
            `StartingPoint.activate`. By default its adapter is switched off, which is right for an adapter that began as a
            fresh LoRA.
        directions: Which of the two divergences to measure, `forward` from the base and `reverse`; the other is NaN. With none
            the base makes no pass.
        passes_before (`list[Pass]`, *optional*): Those of the same `reference` over the same batches, from [`passes_of_base`],
            where many models are measured from one base.

    Returns:
        `torch.Tensor` of shape `(rows, 4)`, float64: the three sums in nats, and the number of labelled tokens. The rows
        are in the order of the batches.

    Source: Shenfeld et al. 2025, https://arxiv.org/abs/2509.04259.
    """
    before = _before(model, reference)
    base, device = _base_and_device(model)

    def of_batch(passed: Pass | None, labels: torch.Tensor, **inputs: torch.Tensor) -> list[torch.Tensor]:
        labels = labels[:, 1:]
        if passed is None and directions:
            passed = _pass(base, labels, inputs, before)
        return _loss_and_drift(base, labels, inputs, adapter, passed, directions)

    rows: list[torch.Tensor] = []
    passes: Iterable[Pass | None] = repeat(None) if passes_before is None else passes_before
    with evaluating(model):
        shown = tqdm(batches, desc=description or "Drift", leave=False)
        for batch, passed in zip(shown, passes, strict=passes_before is not None):
            batch, measure = _on(device, batch), functools.partial(of_batch, passed)
            rows += measure(**batch) if wrapper is None else _ForwardRedirection()(wrapper, model, measure, **batch)
    return torch.stack(rows)


@torch.no_grad()
def passes_of_base(
    model: PeftModel | PreTrainedModel, batches: Iterable[dict], reference: _Context | None = None
) -> list[Pass]:
    """
    What the model before its training computes for each batch, for [`drift_of_rows`] of many models beside it. Hidden states
    are kept on the CPU: tokens with a label × their size.

    Args:
        model, batches, reference: As of [`drift_of_rows`].
    """
    before = _before(model, reference)
    base, device = _base_and_device(model)
    passes = []
    with evaluating(model):
        for batch in tqdm(batches, desc="Base", leave=False):
            inputs = _on(device, batch)
            found = _pass(base, inputs.pop("labels")[:, 1:], inputs, before)
            passes.append(Pass([states.cpu() for states in found.hidden], found.weight, found.bias))
    return passes


def _before(model: Any, reference: _Context | None) -> _Context:
    """The context in which the model computes as before its training. Raises `ValueError` where there is none."""
    check_model_measurable(model)
    if reference is None:
        _check_off_is_before(model)
    return reference or (lambda: without_adapter(model))


def _base_and_device(model: Any) -> tuple[Any, torch.device]:
    base: Any = cast(PeftModel, model).get_base_model() if is_peft_model(model) else model
    return base, base.get_input_embeddings().weight.device


def _on(device: torch.device, batch: dict) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}


_ON_THE_HEAD = (
    "Loss and drift of an adapter on the LM head are not measured: they multiply by the head's own weight, of which such an adapter "
    "is no part. Benchmark tasks are; for drift train without `lm_head` among the `target_modules`, or the whole head with "
    "`modules_to_save=['lm_head']`."
)
# Unlike PiSSA and others, whose adapter has at first what they take from the base.
_LEAVE_NO_BASE = ("`kasa_config`", "`layer_replication", "`init_lora_weights='loftq'")


def check_measurable(config: PeftConfig) -> None:
    """Raises `ValueError` if this kind of adapter is no part of the layers that drift is measured by, or leaves no base."""
    changed_by = base_changed_by(config)
    if changed_by and changed_by.startswith(_LEAVE_NO_BASE):
        raise ValueError(
            f"Drift is not measured with {changed_by}: it makes another model of the base for good, so the one before the training is "
            "not there any more. Benchmark tasks are measured; for drift train a `LoraConfig` without it."
        )
    if config.is_prompt_learning:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(
            f"Loss and drift of {kind} are not measured: its virtual tokens are no part of the layers that are looked at. "
            "Benchmark tasks are; for drift use a `LoraConfig` (or another adapter in the weights)."
        )
    if targets_head(config):
        raise ValueError(_ON_THE_HEAD)


def check_model_measurable(model: Any) -> None:
    """Raises `ValueError` if one of the model's adapters is none of [`check_measurable`], or lies on the head, whatever its name."""
    for config in adapter_configs(model):
        check_measurable(config)
    if is_peft_model(model) and isinstance(model.get_base_model().get_output_embeddings(), BaseTunerLayer):
        raise ValueError(_ON_THE_HEAD)


def adapter_configs(model: Any) -> list[PeftConfig]:
    """The configurations of a model's adapters; none of a plain model."""
    return list(model.peft_config.values()) if is_peft_model(model) else []


def _check_off_is_before(model: Any) -> None:
    """Raises `ValueError` if the adapter has changed the base's weights, so that switching it off does not show them."""
    for config in adapter_configs(model):
        changed_by = base_changed_by(config)
        if changed_by:
            raise ValueError(
                f"{changed_by} changes the base's weights, so with the adapter switched off the model is not what it was before its "
                "training. Give `reference`: `StartingPoint(model).activate`, made before the training, or "
                "what `with_adapter` returns beside the model."
            )


def _loss_and_drift(
    base: Any,
    labels: torch.Tensor,
    inputs: dict,
    adapter: _Context,
    before: Pass | None,
    directions: Sequence[str],
) -> list[torch.Tensor]:
    """For each row of one batch the sums of the loss and of both divergences, and its labelled tokens."""
    now = _pass(base, labels, inputs, adapter)
    before = before or Pass([states[:0] for states in now.hidden], now.weight, now.bias)  # nothing to compare with
    rows = []
    with whole_weights(now.weight, now.bias, before.weight, before.bias) as (weight, bias, weight_before, bias_before):
        options: dict[str, Any] = dict(weight=weight, bias=bias, kl_weight=0.0)
        options |= dict(teacher_weight=weight_before, teacher_bias=bias_before)
        options["transform"] = logit_transform(base.config.get_text_config())
        for states, states_before, targets in zip(now.hidden, before.hidden, labels, strict=True):
            targets, states_before = targets[targets != IGNORE_INDEX], states_before.to(states.device)
            found = {
                direction: fused_linear_cross_entropy_kl(
                    states, states_before, labels=targets, direction=direction, **options
                )
                for direction in directions or ("forward",)
            }
            loss = next(iter(found.values())).ce_loss
            divergences = [
                found[name].kl_loss if name in directions else loss.new_tensor(math.nan)
                for name in ("forward", "reverse")
            ]
            rows.append(torch.stack([loss, *divergences, loss.new_tensor(len(targets))]).double().cpu())
    return rows


def _pass(base: Any, labels: torch.Tensor, inputs: dict, context: _Context) -> Pass:
    """Hidden states for the labels, and weight and bias of the head that belongs to them."""
    with context():
        hidden = base.base_model(**inputs).last_hidden_state[:, :-1]
        head = base.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        if weight.requires_grad and context is not nullcontext:
            # A head that is trained, and that the context may take back: a copy stays.
            with whole_weights(weight, bias) as whole:
                weight, bias = (None if tensor is None else tensor.clone() for tensor in whole)
    states = [row[targets != IGNORE_INDEX] for row, targets in zip(hidden, labels, strict=True)]
    return Pass(states, weight, bias)
