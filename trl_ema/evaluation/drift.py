"""Held-out loss, and how far a model has drifted from the base it adapts, from one loaded model."""

import importlib.resources
import json
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl.models.utils import _ForwardRedirection
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..forward import logit_transform
from ..losses import IGNORE_INDEX, fused_linear_cross_entropy_kl
from ..sharding import whole_weights
from ..teacher import without_adapter


def general_rows() -> list[dict[str, str]]:
    """Short questions of general knowledge with their answers, for drift away from the domain: 48 rows of our own."""
    text = importlib.resources.files(__package__).joinpath("general_prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def tokenized_batches(rows: Dataset, tokenizer, max_length: int | None = None, batch_size: int = 16) -> list[dict]:
    """
    Batches of prompt/completion rows with the labels on the completion, tokenized as `SFTTrainer` does.

    Rows of about one length share a batch, so little is padding.
    """

    def token_ids(messages, **options):
        ids = tokenizer.apply_chat_template(messages, tokenize=True, **options)
        return ids["input_ids"] if not isinstance(ids, list) else ids

    examples = []
    for row in rows:
        if isinstance(row["prompt"], str):
            prompt = tokenizer(row["prompt"])["input_ids"]
            whole = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]
        else:
            prompt = token_ids(row["prompt"], add_generation_prompt=True)
            whole = token_ids(row["prompt"] + row["completion"])
        labels = [IGNORE_INDEX] * len(prompt) + whole[len(prompt) :]
        examples.append({"input_ids": whole[:max_length], "labels": labels[:max_length]})
    examples.sort(key=lambda example: len(example["input_ids"]))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    collate = DataCollatorForLanguageModeling(pad)
    return [collate(examples[i : i + batch_size]) for i in range(0, len(examples), batch_size)]


def measure_drift(model: PeftModel, batches: Iterable[dict], *args, **kwargs) -> dict[str, float]:
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
        raise ValueError(
            f"No token of the {len(rows)} rows carries a label, so there is no loss and no drift. Raise `max_length`, or give "
            "rows with a completion."
        )
    return {
        "loss": loss / tokens,
        "kl_base_model": forward / tokens,
        "kl_model_base": reverse / tokens,
        "tokens": int(tokens),
    }


@torch.no_grad()
def drift_of_rows(
    model: PeftModel,
    batches: Iterable[dict],
    adapter: Callable[[], AbstractContextManager] = nullcontext,
    description: str = "",
    wrapper: torch.nn.Module | None = None,
) -> torch.Tensor:
    r"""
    Loss and drift of each row, summed over its labelled tokens, with the active adapter on and off:

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

    Returns:
        `torch.Tensor` of shape `(rows, 4)`, float64: the three sums in nats, and the number of labelled tokens. The rows
        are in the order of the batches.

    Source: Shenfeld et al. 2025, https://arxiv.org/abs/2509.04259.
    """
    training = model.training
    model.eval()
    base = model.get_base_model() if is_peft_model(model) else model
    device = base.get_input_embeddings().weight.device

    def of_batch(labels, **inputs):
        return _loss_and_drift(base, labels[:, 1:], inputs, adapter, without_adapter(model))

    rows = []
    for batch in tqdm(batches, desc=description or "Drift", leave=False):
        batch = {key: value.to(device) if torch.is_tensor(value) else value for key, value in batch.items()}
        rows += of_batch(**batch) if wrapper is None else _ForwardRedirection()(wrapper, model, of_batch, **batch)
    model.train(training)
    return torch.stack(rows)


def _loss_and_drift(base, labels, inputs: dict, adapter, adapter_off) -> list[torch.Tensor]:
    """For each row of one batch the sums of the loss and of both divergences, and its labelled tokens."""
    head = base.get_output_embeddings()
    bias = getattr(head, "bias", None)
    with adapter():
        hidden, weight = base.base_model(**inputs).last_hidden_state[:, :-1], head.weight
    with adapter_off:
        base_hidden, base_weight = base.base_model(**inputs).last_hidden_state[:, :-1], head.weight
    rows = []
    with whole_weights(weight, base_weight, bias) as (weight, base_weight, bias):
        options = dict(teacher_weight=base_weight, bias=bias, transform=logit_transform(base.config.get_text_config()))
        for states, base_states, targets in zip(hidden, base_hidden, labels, strict=True):
            mask = targets != IGNORE_INDEX
            one, other = [
                fused_linear_cross_entropy_kl(
                    states[mask], base_states[mask], weight, targets[mask], 0.0, direction=direction, **options
                )
                for direction in ("forward", "reverse")
            ]
            rows.append(torch.stack([one.ce_loss, one.kl_loss, other.kl_loss, mask.sum()]).double().cpu())
    return rows


def trainer_batches(trainer, dataset: Dataset) -> list[dict]:
    """Batches of a trainer's tokenized `dataset`, rows of about one length together, the same on every rank."""
    columns = [
        name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names
    ]  # the last: packed
    rows = list(dataset.select_columns(columns))
    rows.sort(key=lambda row: len(row["input_ids"]))
    size = trainer.args.per_device_eval_batch_size
    return [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


class DriftCallback(TrainerCallback):
    """
    Logs KL(base ‖ student), in nats per token, during training: `drift_NAME` for each evaluation set of the trainer.

    Its cost is two forward passes over `rows` rows of each set every `steps` optimizer steps; `drift_time_share`, logged
    beside, is what it took of the time so far.

    Args:
        trainer ([`EMARegularizedSFTTrainer`]): With an `eval_dataset`, one or several by name.
        steps (`int`): Optimizer steps between two measurements.
        rows (`int`): Rows of each set.

    Source: Shenfeld et al. 2025, https://arxiv.org/abs/2509.04259: drift on the new task predicts forgetting.
    """

    def __init__(self, trainer, steps: int, rows: int = 16):
        if trainer.eval_dataset is None:
            raise ValueError("Drift is measured on the evaluation data, and there is none. Pass an `eval_dataset`.")
        if steps < 1:
            raise ValueError(
                f"`steps` must be at least 1, got {steps}. It counts optimizer steps between measurements."
            )
        self.trainer, self.steps, self.rows = trainer, steps, rows
        self._batches: dict[str, list[dict]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self._start, self._seconds = time.perf_counter(), 0.0
        sets = self.trainer.eval_dataset
        sets = sets if isinstance(sets, dict) else {"eval": sets}
        for name, dataset in sets.items():
            self._batches[name] = trainer_batches(self.trainer, dataset.select(range(min(self.rows, len(dataset)))))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.steps:
            return
        start = time.perf_counter()
        # Into TRL's own list: its next log takes them, as it does its other metrics.
        metrics = self.trainer._metrics["train"]
        for name, batches in self._batches.items():
            found = measure_drift(self.trainer.model, batches, wrapper=self.trainer.wrapper)
            metrics[f"drift_{name}"].append(found["kl_base_model"])
        self._seconds += time.perf_counter() - start
        metrics["drift_time_share"].append(self._seconds / (time.perf_counter() - self._start))
