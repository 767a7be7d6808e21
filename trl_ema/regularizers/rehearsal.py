"""Rehearsal: the student is held to the model before training, on texts that this has written itself, or that are given."""

import hashlib
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from transformers import TrainerControl

from ..adapters.starting_point import StartingPoint
from ..config import MeanTeacherConfig
from ..forward import Divergence, divergence_mask, num_sequences
from ..processes import Launch, refuse_start
from ..schedules import BudgetedWeight, RampedWeight, SmoothedMean
from ..texts import Texts
from .base import Gather, Inputs, Regularizer
from .given_texts import given_texts
from .joined_texts import may_join
from .known_states import bytes_of_states, states_before, to_device
from .micro_batch import TokenMean
from .own_texts import FILE, OwnTexts
from .text_rows import padded_length, with_documents, with_joined_rows, with_rows


logger = logging.getLogger(__name__)

_MUCH = 1.25  # a factor from what was asked for, of which a user is told
OFTEN = 20  # times that a text is seen, at most, in what was measured


class Rehearsal(Regularizer):
    r"""
    λ · KL(p_before ‖ p_θ), a mean over every token of the rehearsed texts of the accumulated, world-wide batch.

    In expectation over texts of the model before training this is the drift itself, KL(before ‖ student) over whole sequences,
    what a chat template writes among them (the same in each chat, so that they lower the mean); of a student without dropout or
    other noise. At the start of a training it is zero, and so is its gradient: no ramp is needed.

    With `rehearsal_loss="ce"` the texts are trained on as data instead: λ · CE(text; p_θ), a mean over the same tokens.

    The micro-batches of an optimizer step, of all ranks together, get so many texts as further rows that their share of a full
    batch is `rehearsal_fraction`, spread evenly over them, and one at least; as many on each rank, and one at least, where the
    weights are sharded and all must pass as often. All texts are taken once before any is taken again, in a seeded order that depends on
    nothing but how many were taken so far. Where a run takes more than there are, the model before training passes over each
    once, and not in every micro-batch, see [`states_before`].

    Args:
        args ([`MeanTeacherConfig`]): The options that begin with `rehearsal_`, and `drift_budget`.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        start ([`StartingPoint`], *optional*): The model before training; only one with an adapter has it.
        own ([`OwnTexts`], *optional*): Of the model; not needed with a dataset.
        dataset (`Dataset` or `IterableDataset`, *optional*): Rows to rehearse instead of self-written texts, see [`given_texts`].

    Raises:
        ValueError: The texts at hand are another model's or damaged, are fewer than a micro-batch takes, or one is longer than
            `max_length`; or there are none, and the model cannot write any.

    Sources: Marek et al. 2026, https://arxiv.org/abs/2605.26097 (self-written texts with KL; LoRA in TRL and the budget are
    ours); Zhang et al. 2025, https://arxiv.org/abs/2508.04676 (general texts replayed as data).
    """

    name = "rehearsal"

    def __init__(
        self,
        args: MeanTeacherConfig,
        tokenizer: Any,
        start: StartingPoint | None,
        own: OwnTexts | None,
        dataset: Any = None,
    ):
        given = args.rehearsal_dataset if dataset is None else dataset
        self.args, self.tokenizer, self.start = args, tokenizer, start
        self.taken = 0  # texts, by all ranks
        self._first = 0  # of this step, among all that are taken
        self._micro_batch, self._predicted = 0, 0.0
        self._counts: list[
            int
        ] = []  # of texts in this step: in the first micro-batch of each rank, in the second of each ...
        self._alike = False  # as many texts on each rank
        self.texts: Texts | None = None
        self.digest = ""  # of the texts
        self._rows = args.per_device_train_batch_size  # of a micro-batch's own
        self._known: list[torch.Tensor] | None = None  # of the model before training, for each text
        self._joins = False  # texts, to as few rows as hold them
        self._start_anew(0)
        self.own: OwnTexts | None = None
        if given is not None:
            self.use(given_texts(given, args, tokenizer))
            return
        assert own is not None
        self.own = own
        if self.own.at_hand is not None:
            self.use(self.own.at_hand)
        else:
            self.per_micro_batch = self._check(args.rehearsal_num_texts, float(args.rehearsal_num_tokens))

    def _start_anew(self, total_steps: int) -> None:
        self.weight, self.taken = make_weight(self.args, total_steps), 0
        self.loss_of_log, self.loss_of_step, self.smoothed = TokenMean(), TokenMean(), SmoothedMean()
        self._last_weight = self.weight.value(0)

    def use(self, texts: Texts) -> None:
        """From now on these texts are rehearsed."""
        lengths = [len(ids) for ids in texts.ids]
        if self.args.max_length is not None and max(lengths) > self.args.max_length:
            raise ValueError(
                f"A rehearsed text has {max(lengths)} tokens, `max_length` is {self.args.max_length}. Raise it, or write texts with a "
                "lower `rehearsal_num_tokens`."
            )
        self.per_micro_batch = self._check(len(lengths), sum(lengths) / len(lengths))
        self.texts, self.digest = texts, digest_of(texts)
        self._order = _Order(len(lengths), self.args.seed)

    def _check(self, number: int, mean_length: float) -> float:
        """How many texts of so many a micro-batch takes on average. Raises `ValueError` if there are not as many."""
        mean = _texts_of_micro_batch(self.args, self._rows, mean_length)
        (rows,) = _spread(mean, 1, 1)
        if rows > number:
            raise ValueError(
                f"{number} texts are fewer than the {rows} that a micro-batch rehearses. Give or write more "
                "(`rehearsal_num_texts`), or lower `rehearsal_fraction`."
            )
        return mean

    def begin(self, trainer: Any, state: dict | None = None) -> None:
        if self.own is not None or self.args.rehearsal_loss == "kl":
            is_base = getattr(self.start, "is_base", False)
            refuse_start(Launch.of_state(trainer.accelerator.state), is_base, rehearses=True)
        self.pad = self.tokenizer.pad_token_id
        self._alike = trainer.shards_weights
        self._rows = trainer._train_batch_size  # fewer than asked for where `auto_find_batch_size` looked for them
        texts = self.texts if self.own is None else self.own.get(trainer)
        assert texts is not None
        self.use(texts)
        if state is not None:
            self.check_state(state)
        if self.own is not None:
            self.own.keep_beside(trainer)
        self._start_anew(trainer.state.max_steps)
        self._control = trainer.control
        self._tell_texts(trainer.state.max_steps)
        self._tell_noise(trainer)
        self._joins = may_join(trainer, texts.ids)
        self._know_before(trainer)
        if state is not None:
            self._go_on(state)

    def _tell_texts(self, steps: int) -> None:
        """
        Warn where another share of rows is rehearsed than asked for, and of texts that are seen again: a limit or a budget is then
        measured on them, and more often than was ever measured they may hold little.
        """
        assert self.texts is not None
        ranks = self.args.world_size
        asked, found = self.per_micro_batch * self.args.gradient_accumulation_steps * ranks, self._taken_in(1)
        if not 1 / _MUCH <= found / asked <= _MUCH:
            logger.warning(
                "An optimizer step rehearses %d whole text%s on %d process%s, where `rehearsal_fraction=%g` of its rows would be %.2g. "
                "Give larger batches, more accumulation, or another share.",
                found, "" if found == 1 else "s", ranks, "" if ranks == 1 else "es", self.args.rehearsal_fraction, asked,
            )  # fmt: skip
        taken, there = self._taken_in(steps), len(self.texts.ids)
        watching = [name for name in ("drift_budget", "max_drift") if getattr(self.args, name) is not None]
        if taken > there and self._watches:
            logger.warning(
                "The run takes %d texts and there are %d. Of %s the measure is then the drift on texts that were trained on, which is "
                "another one than on new texts; with %s each is new.", taken, there,
                " and ".join(f"`{name}`" for name in watching), self._so_many(taken),
            )  # fmt: skip
        elif taken > OFTEN * there:
            logger.warning(
                "The run takes %d texts and there are %d, so that each is seen %.3g times. The more often, the less they hold: "
                "of 32 that were seen 19 times the drift on other texts was 2.4 times that of new ones, and more was not measured. Give "
                "at least %s.", taken, there, taken / there, self._so_many(math.ceil(taken / OFTEN)),
            )  # fmt: skip

    def _so_many(self, number: int) -> str:
        assert self.texts is not None
        if self.args.rehearsal_texts:
            return f"{number} texts in the file"
        if self.own is None and len(self.texts.ids) < self.args.rehearsal_num_texts:  # all of its rows are taken
            return f"{number} rows in `rehearsal_dataset`"
        return f"`rehearsal_num_texts={number}`"

    def times_seen(self, steps: int, ranks: int, alike: bool) -> float:
        """How often a run of so many optimizer steps takes each text, on average; `alike` where weights are sharded."""
        number = self.args.rehearsal_num_texts if self.texts is None else len(self.texts.ids)
        counts = _counts(self.per_micro_batch, self.args.gradient_accumulation_steps, ranks, alike)
        return steps * sum(counts) / number

    def _tell_noise(self, trainer: Any) -> None:
        """Warn where what is held or watched would be there without any training: the model before it passes in eval mode."""
        if self.args.drift_budget is None and not self.watches_drift:
            return
        noise = _noise_of(trainer)
        if noise:
            logger.warning(
                "With %s the student's pass is a random one, and `rehearsal_kl` more than the drift: so is what `drift_budget` holds "
                "and `max_drift` stops at. Set it to 0, or allow for more.", ", ".join(noise),
            )  # fmt: skip

    def _know_before(self, trainer: Any) -> None:
        self._known = None
        if self.args.rehearsal_loss == "kl":
            assert self.start is not None and self.texts is not None
            taken = self._taken_by_one(trainer.state.max_steps)
            self._known = states_before(trainer, self.start, self.texts.ids, self.pad, taken)

    def _taken_in(self, steps: int) -> int:
        """Texts that all ranks take in so many optimizer steps."""
        return steps * sum(self._counts_of(self.args.gradient_accumulation_steps))

    def _taken_by_one(self, steps: int) -> int:
        """Texts that a rank takes in so many optimizer steps, at most."""
        counts, ranks = self._counts_of(self.args.gradient_accumulation_steps), self.args.world_size
        return steps * max(sum(counts[rank::ranks]) for rank in range(ranks))

    def _counts_of(self, micro_batches: int) -> list[int]:
        return _counts(self.per_micro_batch, micro_batches, self.args.world_size, self._alike)

    def bytes_on_cpu(self, steps: int, sharded: bool) -> int:
        if self.args.rehearsal_loss != "kl" or self.start is None:
            return 0
        number, tokens = self.args.rehearsal_num_texts, self.args.rehearsal_num_texts * self.args.rehearsal_num_tokens
        if self.texts is not None:
            number, tokens = len(self.texts.ids), sum(map(len, self.texts.ids))
        return bytes_of_states(self.start.model, number, tokens, self._taken_by_one(steps), sharded)

    def _go_on(self, state: dict) -> None:
        self.taken = state["taken"]
        self.smoothed.load(state.get("smoothed", self.smoothed.state()))
        options = _options(self.args)
        saved = options | state.get("options", {})
        if saved != options:
            logger.warning(
                "The checkpoint was made with %s, this run goes on with %s. Resume with the options it was started with to end as "
                "it would have ended.", saved, options,
            )  # fmt: skip
        if state["weight"].keys() == self.weight.state().keys():  # else with or without a budget that was not there
            self.weight.load(state["weight"])

    def check_state(self, state: dict[str, Any]) -> None:
        # Texts that are still to be written are told by what decides them.
        asked = None if self.own is None else asdict(self.own.sampling)
        other = self.texts is None and state.get("sampling", asked) != asked
        if other or (self.texts is not None and state["texts"] != self.digest):
            mend = f"Give its own with `rehearsal_texts`; they lie beside the run, as {FILE}."
            if self.own is None:
                mend = (
                    "Give its own `rehearsal_dataset`, with the same `rehearsal_num_texts` and `rehearsal_num_tokens`."
                )
            raise ValueError(f"The checkpoint was made with other rehearsed texts than those of this run. {mend}")

    # Which texts

    def before_step(self, batches: Sequence[Inputs], step: int, device: torch.device, gather: Gather | None) -> None:
        self._first, self._micro_batch = self.taken, 0
        self.loss_of_step.clear()  # of what a skipped step has left
        self._counts = self._counts_of(len(batches))
        self.taken += sum(self._counts)
        # Predictions that the mean is over: those of all whose labelled tokens TRL counts together.
        ranks = [self.args.process_index] if gather is None else range(self.args.world_size)
        self._predicted = sum(
            _num_predicted(self._texts(self._chosen(i, rank))) for i in range(len(batches)) for rank in ranks
        )
        # Else each rank has a mean of its own, and DDP takes the mean of all, also of those that have none.
        if gather is None:
            world = self.args.world_size
            self._predicted *= sum(any(self._counts[rank::world]) for rank in range(world)) / world

    def _texts(self, numbers: list[int]) -> list[list[int]]:
        assert self.texts is not None
        return [self.texts.ids[number] for number in numbers]

    def _chosen(self, micro_batch: int, rank: int) -> list[int]:
        """Numbers of the texts of one rank in one micro-batch of this step."""
        of_them = micro_batch * self.args.world_size + rank
        first = self._first + sum(self._counts[:of_them])
        number = self._counts[of_them]
        return [self._order.number_at(position) for position in range(first, first + number)]

    # The loss

    def add_rows(self, inputs: Inputs, step: int, num_items: torch.Tensor | None) -> tuple[Inputs, list[Divergence]]:
        taken = self._chosen(self._micro_batch, self.args.process_index)
        texts = self._texts(taken)
        weight = self._last_weight = self.weight.value(step)
        self._micro_batch += 1
        packed = _is_packed(inputs)
        if not texts:
            return inputs, []
        own = num_sequences(**inputs)
        # TRL divides by the labelled tokens.
        num_labels = divergence_mask("loss", **inputs).sum() if num_items is None else num_items
        predicted: float = self._predicted
        if num_items is None:  # a mean of each micro-batch, of which `Trainer` takes the mean
            predicted = _num_predicted(texts) * sum(map(bool, self._counts)) / len(self._counts)
        times = torch.as_tensor(num_labels, dtype=torch.int64).clamp(
            min=1
        )  # not read here, where the host would wait for it
        joined, number = False, len(texts)
        multiple = int(self.args.pad_to_multiple_of or 1)
        if packed:
            batch = with_documents(inputs, texts, self.pad, multiple)
        elif joined := self._joins and "position_ids" not in inputs:
            batch, number = with_joined_rows(inputs, texts, self.pad, multiple)
        else:
            batch = with_rows(inputs, texts, self.pad, multiple)
        teacher = self.start if self.args.rehearsal_loss == "kl" else None
        chosen = list(range(own, own + number))
        length = None if packed or joined else padded_length(map(len, texts), multiple)
        hidden = None
        if self._known is not None:
            hidden = to_device(torch.cat([self._known[number] for number in taken]), inputs["input_ids"].device)
        term = Divergence(teacher, weight / predicted, "all", chosen, length=length, times=times, hidden=hidden)
        return batch, [term]

    @property
    def watches_drift(self) -> bool:
        """Whether training stops at a divergence of its own."""
        return self.args.max_drift is not None and self.args.rehearsal_loss == "kl"

    @property
    def _watches(self) -> bool:
        """Whether it must know the divergence of each step, which costs a message between the ranks."""
        return self.weight.observes or self.watches_drift

    def observe(self, sums: list[torch.Tensor]) -> None:
        for total, tokens in sums:
            self.loss_of_log.add(total, tokens)
            if self._watches:
                self.loss_of_step.add(total, tokens)

    def after_step(self, step: int, gather: Gather) -> None:
        if not self._watches:
            return
        found = self.loss_of_step.take(gather, self.args.device)
        self.weight.observe(found, step)
        if isinstance(self.weight, BudgetedWeight) and step == self.weight.total_steps:
            _tell_budget(self.weight)
        if self.watches_drift and math.isfinite(found):  # else it would stay in the mean for good
            stop_at_drift(self._control, self.smoothed.add(found), self.args.max_drift, "on rehearsed texts")

    def metrics(self, gather: Gather) -> dict[str, float]:
        return {
            f"rehearsal_{self.args.rehearsal_loss}": self.loss_of_log.take(gather, self.args.device),
            "rehearsal_weight": self._last_weight,
        }

    def state(self) -> dict[str, Any]:
        return {
            "taken": self.taken, "weight": self.weight.state(), "texts": self.digest, "smoothed": self.smoothed.state(),
            "options": _options(self.args), "sampling": None if self.texts is None else self.texts.about.get("sampling"),
        }  # fmt: skip


class _Order:
    """Which of so many texts is taken at each place of a run: all once, in a seeded order, before any again in another."""

    def __init__(self, number: int, seed: int):
        self.number, self.seed = number, seed
        self._pass, self._order = -1, np.empty(0, dtype=int)

    def number_at(self, place: int) -> int:
        if self._pass != place // self.number:
            self._pass = place // self.number
            self._order = np.random.default_rng([self.seed, self._pass]).permutation(self.number)
        return int(self._order[place % self.number])


def stop_at_drift(control: TrainerControl, drift: float, limit: float | None, where: str) -> None:
    """Let a training save a checkpoint and stop, after this step, where `drift` is above the `limit`."""
    if limit is None or drift <= limit:
        return
    logger.warning("The drift %s is %.4g nats per token, above `max_drift=%g`: saved and stopped.", where, drift, limit)
    control.should_save = control.should_training_stop = True


def _tell_budget(weight: BudgetedWeight) -> None:
    """Warn where a run ends far from its budget."""
    if not 1 / _MUCH < weight.found / weight.budget < _MUCH:
        logger.warning(
            "The drift on rehearsed texts ends at %.3g nats per token, `drift_budget` is %g. Begin with `rehearsal_weight=%.2g`, which it "
            "came to, and at a lower learning rate if it is above; `trl-ema tune-scale` turns an adapter back to a drift.",
            weight.found, weight.budget, weight.center,
        )  # fmt: skip


def _num_predicted(texts: list[list[int]]) -> int:
    return sum(len(ids) - 1 for ids in texts)


def _options(args: MeanTeacherConfig) -> dict[str, Any]:
    """What a resumed run should have as the first one had it."""
    names = (
        "rehearsal_weight",
        "rehearsal_fraction",
        "rehearsal_loss",
        "drift_budget",
        "seed",
    )  # which orders the texts
    return {name: getattr(args, name) for name in names}


def make_weight(args: MeanTeacherConfig, total_steps: int) -> RampedWeight | BudgetedWeight:
    """λ over a run."""
    if args.drift_budget is None:
        return RampedWeight(args.rehearsal_weight)
    return BudgetedWeight(args.rehearsal_weight, args.drift_budget, total_steps)


def _texts_of_micro_batch(args: MeanTeacherConfig, rows: int, mean_length: float) -> float:
    """How many texts beside so many rows have the share that is asked for: of the rows, or of their tokens where these are packed."""
    own = float(rows)
    if args.packing and args.max_length is not None:
        own *= args.max_length / mean_length
    return own * args.rehearsal_fraction / (1 - args.rehearsal_fraction)


def _counts(mean: float, micro_batches: int, ranks: int, alike: bool) -> list[int]:
    """As [`_spread`]; `alike`: as many on each rank."""
    if alike:
        return [count for count in _spread(mean, micro_batches, 1) for _ in range(ranks)]
    return _spread(mean, micro_batches, ranks)


def _spread(mean: float, micro_batches: int, ranks: int) -> list[int]:
    """
    How many texts each micro-batch takes, the first of each rank, the second of each and so on, that take so many on average: one at
    least, of all of them, and as many on each rank but for those left over, which are in one micro-batch of all. For the ranks wait
    for each other in each.
    """
    if not micro_batches:  # a stream has ended
        return []
    total = max(1, math.floor(round(mean * micro_batches * ranks, 6) + 0.5))
    each, left = divmod(total, ranks)
    alike = _evenly(each, micro_batches)
    fewest = alike.index(min(alike))
    counts = [count for count in alike for _ in range(ranks)]
    for rank, more in enumerate(_evenly(left, ranks)):
        counts[fewest * ranks + rank] += more
    return counts


def _evenly(total: int, parts: int) -> list[int]:
    return [total * (i + 1) // parts - total * i // parts for i in range(parts)]


def _is_packed(inputs: Inputs) -> bool:
    """Raises `ValueError` for rows of which it does not show which tokens are padding."""
    if "attention_mask" in inputs:
        return False
    rows, length = inputs["input_ids"].shape
    if rows == 1 and "position_ids" in inputs:
        return True
    raise ValueError(
        f"The data collator gave {rows} rows of {length} tokens as {sorted(inputs)}: texts are rehearsed beside rows with an "
        "`attention_mask`, or one row with `position_ids` for packed ones. Let the collator give one of them, or use TRL's own."
    )


def _noise_of(trainer: Any) -> list[str]:
    """What makes a pass in train mode another one each time: options of the training, its adapter and its model, with their values."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    adapter = getattr(model, "active_peft_config", None)
    of_model = model.config.get_text_config()
    heads = ("classifier", "summary")  # that a causal language model has not
    found = {
        name: value
        for config in (adapter, of_model)
        if config is not None
        for name, value in vars(config).items()
        if "drop" in name and not name.startswith(heads) and isinstance(value, float) and value > 0
    }
    found |= {"neftune_noise_alpha": trainer.args.neftune_noise_alpha} if trainer.args.neftune_noise_alpha else {}
    return [f"`{name}={value:g}`" for name, value in found.items()]


def digest_of(texts: Texts) -> str:
    """Tells texts from others."""
    return hashlib.sha256(json.dumps(texts.ids).encode()).hexdigest()[:16]
