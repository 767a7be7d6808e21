"""Rehearsal: the student is held to the model before training, on texts that this has written itself."""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..adapters.starting_point import StartingPoint
from ..config import MeanTeacherConfig
from ..forward import Divergence, divergence_mask, num_sequences
from ..schedules import BudgetedWeight, RampedWeight
from ..texts import Texts
from .base import Gather, Inputs, Regularizer
from .micro_batch import TokenMean
from .own_texts import FILE, OwnTexts


class Rehearsal(Regularizer):
    r"""
    λ · KL(p_before ‖ p_θ), a mean over every token of the rehearsed texts of the accumulated, world-wide batch.

    In expectation over texts of the model before training this is the drift itself, KL(before ‖ student) over whole sequences.
    At the start of a training it is zero, and so is its gradient: no ramp is needed.

    Each micro-batch gets so many texts as further rows that their share is `rehearsal_fraction`. All texts are taken once before
    any is taken again, in a seeded order that depends on nothing but how many were taken so far.

    Args:
        model (`PeftModel`): Its adapter is about to be trained.
        args ([`MeanTeacherConfig`]): The options that begin with `rehearsal_`, and `drift_budget`.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        start ([`StartingPoint`], *optional*): The model before training; only one with an adapter has it.

    Raises:
        ValueError: The texts at hand are another model's or damaged, are fewer than a micro-batch takes, or one is longer than
            `max_length`; or there are none, and the launch is one under which the model cannot write any.

    Sources: Marek et al. 2026, https://arxiv.org/abs/2605.26097 (self-written texts with KL; LoRA in TRL and the budget are
    ours).
    """

    name = "rehearsal"

    def __init__(self, model: Any, args: MeanTeacherConfig, tokenizer: Any, start: StartingPoint | None):
        if start is None:
            raise ValueError(
                "`rehearsal_weight` needs a model with a PEFT adapter, which is switched off to have the model before training. Pass "
                "`peft_config=LoraConfig(...)` or a `PeftModel`."
            )
        self.args, self.tokenizer, self.start = args, tokenizer, start
        self.weight = make_weight(args)
        self.kl_of_log, self.kl_of_step = TokenMean(), TokenMean()
        self.taken = 0  # texts, by all ranks
        self._first = 0  # of this step, among all that are taken
        self._micro_batch = self._predicted = 0
        self._last_weight = self.weight.value(0)
        self.texts: Texts | None = None
        self.digest = ""  # of the texts
        self._pass, self._order = -1, np.empty(0, dtype=int)  # through all texts, and the order in it
        self.own = OwnTexts(model, args, tokenizer, start)
        if self.own.at_hand is not None:
            self.use(self.own.at_hand)

    def use(self, texts: Texts) -> None:
        """From now on these texts are rehearsed."""
        rows, longest = _rows_of_micro_batch(self.args, texts), max(map(len, texts.ids))
        if rows > len(texts.ids):
            raise ValueError(
                f"{len(texts.ids)} texts are fewer than the {rows} that a micro-batch rehearses. Write more "
                "(`rehearsal_num_texts`), or lower `rehearsal_fraction`."
            )
        if self.args.max_length is not None and longest > self.args.max_length:
            raise ValueError(
                f"A rehearsed text has {longest} tokens, `max_length` is {self.args.max_length}. Raise it, or write texts with a "
                "lower `rehearsal_num_tokens`."
            )
        self.texts, self.rows, self.digest = texts, rows, digest_of(texts)

    def begin(self, trainer: Any, state: dict | None = None) -> None:
        self.pad = self.tokenizer.pad_token_id
        self.use(self.own.get(trainer))
        self.weight, self.taken = make_weight(self.args), 0
        self.kl_of_log, self.kl_of_step = TokenMean(), TokenMean()
        if state is not None:
            self.weight.load(state["weight"])
            self.taken = state["taken"]
            if state["texts"] != self.digest:
                raise ValueError(
                    "The checkpoint was made with other rehearsed texts than those of this run. Give its own with "
                    f"`rehearsal_texts`; they lie beside the run, as {FILE}."
                )

    # Which texts

    def before_step(self, batches: Sequence[Inputs], step: int, device: torch.device, gather: Gather | None) -> None:
        self._first, self._micro_batch = self.taken, 0
        self.taken += len(batches) * self.args.world_size * self.rows
        # Predictions that the mean is over: those of all whose labelled tokens TRL counts together.
        ranks = [self.args.process_index] if gather is None else range(self.args.world_size)
        self._predicted = sum(_num_predicted(self._chosen(i, rank)) for i in range(len(batches)) for rank in ranks)

    def _chosen(self, micro_batch: int, rank: int) -> list[list[int]]:
        """Texts of one rank in one micro-batch of this step."""
        first = self._first + (micro_batch * self.args.world_size + rank) * self.rows
        return [self._text(position) for position in range(first, first + self.rows)]

    def _text(self, position: int) -> list[int]:
        """The text that is taken at this place, of all places of the run."""
        assert self.texts is not None
        number = len(self.texts.ids)
        if self._pass != position // number:
            self._pass = position // number
            self._order = np.random.default_rng([self.args.seed, self._pass]).permutation(number)
        return self.texts.ids[self._order[position % number]]

    # The loss

    def add_rows(self, inputs: Inputs, step: int, num_items: torch.Tensor | None) -> tuple[Inputs, list[Divergence]]:
        texts = self._chosen(self._micro_batch, self.args.process_index)
        own = num_sequences(**inputs)
        weight = self._last_weight = self.weight.value(step)
        # TRL divides by the labelled tokens.
        num_labels = divergence_mask("loss", **inputs).sum() if num_items is None else num_items
        predicted = _num_predicted(texts) if num_items is None else self._predicted
        factor = float(torch.as_tensor(num_labels).clamp(min=1)) / predicted
        self._micro_batch += 1
        packed = "attention_mask" not in inputs
        batch = _with_documents(inputs, texts) if packed else _with_rows(inputs, texts, self.pad)
        return batch, [Divergence(self.start, weight * factor, "all", list(range(own, own + len(texts))))]

    def observe(self, sums: list[torch.Tensor]) -> None:
        for total, tokens in sums:
            self.kl_of_log.add(total, tokens)
            if self.weight.observes:
                self.kl_of_step.add(total, tokens)

    def after_step(self, step: int, gather: Gather) -> None:
        if self.weight.observes:
            self.weight.observe(self.kl_of_step.take(gather, self.args.device))

    def metrics(self, gather: Gather) -> dict[str, float]:
        return {
            "rehearsal_kl": self.kl_of_log.take(gather, self.args.device),
            "rehearsal_weight": self._last_weight,
        }

    def state(self) -> dict[str, Any]:
        return {"taken": self.taken, "weight": self.weight.state(), "texts": self.digest}


def _num_predicted(texts: list[list[int]]) -> int:
    return sum(len(ids) - 1 for ids in texts)


def make_weight(args: MeanTeacherConfig) -> RampedWeight | BudgetedWeight:
    """λ over a run."""
    if args.drift_budget is None:
        return RampedWeight(args.rehearsal_weight)
    return BudgetedWeight(args.rehearsal_weight, args.drift_budget)


def _rows_of_micro_batch(args: MeanTeacherConfig, texts: Texts) -> int:
    """How many texts beside a whole micro-batch have the share that is asked for: of its rows, or of its tokens where it is packed."""
    ratio, own = args.rehearsal_fraction / (1 - args.rehearsal_fraction), float(args.per_device_train_batch_size)
    if args.packing and args.max_length is not None:
        own *= args.max_length / (sum(map(len, texts.ids)) / len(texts.ids))
    return max(1, math.floor(ratio * own + 0.5))


def _with_rows(inputs: Inputs, texts: list[list[int]], pad: int) -> Inputs:
    """A padded micro-batch with the texts as further rows."""
    rows, length = inputs["input_ids"].shape
    longest = max(length, *map(len, texts))
    of_text = {"input_ids": pad, "attention_mask": 0, "labels": -100}
    batch = dict(inputs)
    for name, value in inputs.items():
        if not (torch.is_tensor(value) and value.shape == (rows, length)):
            continue
        more = torch.full((len(texts), longest), of_text.get(name, 0), dtype=value.dtype)
        for row, ids in zip(more, texts, strict=True):
            if name == "input_ids":
                row[: len(ids)] = torch.tensor(ids)
            elif name == "attention_mask":
                row[: len(ids)] = 1
        own = torch.nn.functional.pad(value, (0, longest - length), value=of_text.get(name, 0))
        batch[name] = torch.cat([own, more.to(value.device)])
    return batch


def _with_documents(inputs: Inputs, texts: list[list[int]]) -> Inputs:
    """A packed micro-batch with the texts as further documents."""
    device, batch = inputs["input_ids"].device, dict(inputs)
    ids = torch.tensor([token for text in texts for token in text])
    more = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    more["position_ids"] = torch.cat([torch.arange(len(text)) for text in texts])
    for name, value in more.items():
        if name in inputs:
            batch[name] = torch.cat([inputs[name], value[None].to(device, inputs[name].dtype)], 1)
    lengths = torch.tensor([len(text) for text in texts])
    for name in ("cu_seq_lens_q", "cu_seq_lens_k"):
        if name in inputs:
            bounds = inputs[name][-1] + lengths.cumsum(0).to(device, inputs[name].dtype)
            batch[name] = torch.cat([inputs[name], bounds])
    for name in ("max_length_q", "max_length_k"):
        if name in inputs:
            batch[name] = max(inputs[name], int(lengths.max()))
    return batch


def digest_of(texts: Texts) -> str:
    """Tells texts from others."""
    return hashlib.sha256(json.dumps(texts.ids).encode()).hexdigest()[:16]
