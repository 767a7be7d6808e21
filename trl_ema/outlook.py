"""
How `trl-ema check` tells what a training would take and refuse: rows as they are trained on, steps, disk, and memory by the formulas of
docs/scaling.md.
"""

import itertools
import math
import os
import shutil
import sys
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl import ModelConfig

from .adapters.names import TEACHER_NAME, base_of
from .checks import bytes_to_write
from .config import MeanTeacherConfig
from .data import LoadedPart
from .losses import IGNORE_INDEX
from .memory import NF4, Bytes, Sizes, memory
from .processes import Launch
from .refusals import Refusals
from .regularizers.rehearsal import OFTEN, Rehearsal
from .schedules import half_life_to_decay


_SHOWN_ROWS = 3
_SHOWN_CHARACTERS = 400  # of a stretch of one kind
_NOT_SEEN = (
    "Not looked at, since it takes the weights: whether the logits are hidden states times the head, whether a checkpoint's or "
    "written texts are this very model's, and whether activations fit in memory. Nor is the Hub asked, for `push_to_hub`, whether a "
    "login may write there."
)


@dataclass
class RowFigures:
    """
    What is found in the rows of a data set.

    Args:
        name (`str`): Of the data set.
        rows (`list`): Those that were looked at, as `(input_ids, labels)`, whole.
        size (`int`, *optional*): Training rows there are; of a stream `None`.
        cut (`slice`, *optional*): What of a row is trained on; `None` where rows are packed.
    """

    name: str
    rows: list[tuple[list[int], list[int]]]
    size: int | None
    cut: slice | None

    @property
    def kept(self) -> list[tuple[list[int], list[int]]]:
        """The rows as they are trained on: cut, and with a label."""
        cut = slice(None) if self.cut is None else self.cut
        rows = [(ids[cut], labels[cut]) for ids, labels in self.rows]
        return [row for row in rows if any(label != IGNORE_INDEX for label in row[1])]

    @property
    def truncated(self) -> float:
        """Share of the rows that are longer than what is trained on."""
        return sum(self.cut is not None and len(ids[self.cut]) < len(ids) for ids, _ in self.rows) / len(self.rows)

    @property
    def unlabelled(self) -> float:
        """Share of the rows in which no token carries a label, so that they are left out."""
        return 1 - len(self.kept) / len(self.rows)

    @property
    def trained(self) -> int:
        """Training rows that are left."""
        return len(self.rows) if self.size is None else round(self.size * (1 - self.unlabelled))


# Steps, disk, memory


def total_steps(trainer: Any, rows: int | None, ranks: int) -> int:
    """
    Optimizer steps of the run, as `Trainer` counts them.

    Raises:
        ValueError: Nobody says how long to train on a stream.
    """
    args = trainer.args
    if rows is None:
        return trainer.set_initial_training_values(args, trainer.get_train_dataloader())[-1]
    if args.max_steps > 0:
        return args.max_steps
    size = args.per_device_train_batch_size
    batches = rows // size if args.dataloader_drop_last else math.ceil(rows / size)
    per_epoch = max(1, math.ceil(math.ceil(batches / ranks) / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * per_epoch)


def checkpoints_kept(args: MeanTeacherConfig, steps: int) -> int:
    """How many checkpoints lie on the disk in the end; while one is written, one more."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        made = math.ceil(args.num_train_epochs) if args.max_steps <= 0 else 1
    else:
        every = args.save_steps if args.save_steps >= 1 else math.ceil(args.save_steps * steps)
        made = math.ceil(steps / every)
    return min(made, args.save_total_limit) if args.save_total_limit else made


def sizes_of(model: Any, ranks: int, padded: bool) -> Sizes:
    """
    Of a model with a fresh adapter, without a teacher.

    Args:
        padded (`bool`): Whether each matrix of n rows counts as ranks · ⌈n / ranks⌉ of them, as FSDP2 shards it.
    """
    base = base_of(model)
    outer = {"embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    owner = {id(layer.weight): kind for kind, layer in reversed(outer.items()) if layer is not None}
    found = dict.fromkeys(("layers", "embedding", "head", "adapter"), 0.0)
    for name, parameter in model.named_parameters():
        if f".{TEACHER_NAME}." in name:
            continue
        rows = max(1, parameter.shape[0]) if parameter.dim() else 1
        held = math.ceil(rows / ranks) * ranks / rows if padded else 1
        kind = "adapter" if parameter.requires_grad else owner.get(id(parameter), "layers")
        found[kind] += held * parameter.numel()
    return Sizes(**found, depth=getattr(model.config.get_text_config(), "num_hidden_layers", 1))


def bytes_of(trainer: Any, model_args: ModelConfig, launch: Launch) -> Bytes:
    """Of one element of each kind, as the launch and the precision of the run have it."""
    half = trainer.args.bf16 or trainer.args.fp16
    deepspeed = launch.mode.startswith("zero")
    kept = next(p for p in base_of(trainer.model).parameters() if not p.requires_grad).element_size()
    outer = 2 if deepspeed and half else kept
    layers = float(outer)
    if model_args.load_in_4bit:
        layers = NF4 if model_args.use_bnb_nested_quant else (4 + 32 / 64) / 8  # a float32 scale for 64 weights
    elif model_args.load_in_8bit:
        layers = 1.0
    trained = next(p for p in trainer.model.parameters() if p.requires_grad).element_size()
    student = 2 if deepspeed and half else trained
    # At stage 3 a float32 model is DeepSpeed's float32 copy itself.
    copied = deepspeed and (student == 2 or launch.mode == "zero2")
    sent = 2 if launch.mode == "fsdp2" and half else student
    return Bytes(layers, outer, student, copy=4 if copied else 0, sent=sent, teacher=4 if student == 4 else student + 4)


def memory_of(trainer: Any, model_args: ModelConfig, launch: Launch) -> dict[str, float]:
    """
    Bytes on each GPU that stay between steps, see [`memory`], and those of the regularizers; 4-bit weights stay whole under FSDP2.
    """
    sizes = sizes_of(trainer.model, launch.ranks, launch.mode == "fsdp2")
    # An adapter of its own also has a frozen teacher that is not the base: that of a run which goes on from an adapter.
    teacher = "none" if trainer.teacher is None or trainer.teacher.is_base else "ema"
    case = teacher, sizes, bytes_of(trainer, model_args, launch), launch.ranks
    found = memory(launch.mode, *case)
    if launch.mode == "fsdp2" and (model_args.load_in_4bit or model_args.load_in_8bit):
        found["base"] = memory("ddp", *case)["base"]
    penalties = sum(regularizer.bytes_on_device() for regularizer in trainer.regularizers)
    return found | {"penalties": float(penalties)} if penalties else found


def memory_of_machine(trainer: Any, launch: Launch, steps: int) -> dict[str, int]:
    """Bytes, at most, that each process keeps in the memory of the machine, by what they are of."""
    texts = sum(regularizer.bytes_on_cpu(steps, launch.shards_weights) for regularizer in trainer.regularizers)
    found = {"the adapter that it goes on from": trainer.starting_point.bytes_kept, "states of rehearsed texts": texts}
    return {what: number for what, number in found.items() if number}


# What is printed


def shown_row(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, colours: bool) -> str:
    """A row as text, special tokens and all, with what is trained on in green, or without colours between ⟦ and ⟧."""
    start, end = ("\033[32m", "\033[0m") if colours else ("⟦", "⟧")
    text = ""
    for trained, stretch in itertools.groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORE_INDEX):
        piece = _shortened(str(tokenizer.decode([token for token, _ in stretch])))
        text += f"{start}{piece}{end}" if trained else piece
    return text


def _shortened(text: str) -> str:
    left_out = len(text) - _SHOWN_CHARACTERS
    if left_out <= 0:
        return text
    half = _SHOWN_CHARACTERS // 2
    return f"{text[:half]} … {left_out:,} characters … {text[-half:]}"


def print_data(parts: list[LoadedPart], figures: list[RowFigures], tokenizer: PreTrainedTokenizerBase) -> None:
    """Of each data set its figures, and three rows of all of them."""
    if not figures:
        return
    print(
        f"\n{'rows':20}{'to train on':>13}{'held out':>10}{'looked at':>11}{'tokens':>15}{'truncated':>11}{'no label':>10}"
    )
    for part, found in zip(parts, figures, strict=True):
        size = "a stream" if found.size is None else f"{found.size:,}"
        lengths = sorted(len(ids) for ids, _ in found.rows)
        tokens = f"{lengths[len(lengths) // 2]}, max {lengths[-1]}"
        print(
            f"{part.name[:19]:20}{size:>13}{len(part.held_out):>10,}{len(found.rows):>11,}{tokens:>15}{100 * found.truncated:>9.1f} %"
            f"{100 * found.unlabelled:>8.1f} %"
        )
    print("(Tokens: the median, and the longest row. Rows without a label are left out.)")
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    how = "in green" if colours else "between ⟦ and ⟧"
    rows = [
        row for rows in itertools.zip_longest(*(found.kept[:_SHOWN_ROWS] for found in figures)) for row in rows if row
    ]
    print(f"\nAs the model sees them, what is trained on {how}:")
    for number, (ids, labels) in enumerate(rows[:_SHOWN_ROWS], 1):
        print(f"\n--- row {number}, {len(ids)} tokens\n{shown_row(ids, labels, tokenizer, colours)}")


def print_mixture(figures: list[RowFigures], counts: list[int]) -> None:
    """How many rows of each data set a mixture takes."""
    known = all(found.size == len(found.rows) for found in figures)
    print(f"\nThe mixture, shuffled{'' if known else ', as far as the rows that were looked at tell'}:")
    for found, count in zip(figures, counts, strict=True):
        print(f"  {found.name[:19]:20}{count:>11,} of {found.trained:,} rows, {100 * count / sum(counts):.4g} % of all")


def print_run(trainer: Any, rows: int | None, steps: int, launch: Launch) -> None:
    """Steps, what is told as a fraction of them, and files."""
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * launch.ranks
    epoch = "a stream" if rows is None else f"{rows:,} {'sequences' if args.packing else 'rows'} an epoch"
    print(f"\nSteps\n  {steps:,} optimizer steps of {per_step} rows on {launch.ranks} process(es); {epoch}")
    print(f"  learning rate {args.learning_rate:g}, {args.get_warmup_steps(steps)} steps of warmup")
    if args.teacher == "ema":
        print(f"  teacher: {_half_life(args, steps)}")
    if args.teacher != "none":
        ramp = (
            f", after a ramp of {args.kl_warmup_ratio * steps:.0f} steps"
            if args.kl_warmup_ratio
            else ", without a ramp"
        )
        print(f"  divergence: weight {args.kl_weight:g}{ramp}")
    for regularizer in trainer.regularizers:
        if isinstance(regularizer, Rehearsal):
            times = regularizer.times_seen(steps, launch.ranks, launch.shards_weights)
            found = "once" if times == 1 else f"{times:.2g} times" if times < 10 else f"{times:,.0f} times"
            print(f"  rehearsal: weight {args.rehearsal_weight:g}, each text is seen {found}")
            if times > OFTEN:
                print(
                    "  That is more often than was measured: give more texts (`rehearsal_num_texts`), or train for fewer steps."
                )
    one = bytes_to_write(trainer, checkpoint=True) * (2 if launch.writes_shards else 1)
    final, kept = bytes_to_write(trainer, checkpoint=False), checkpoints_kept(args, steps)
    free = shutil.disk_usage(args.output_dir).free
    peak = final + (kept + 1) * one if kept else final
    print(
        f"\nDisk\n  {kept} checkpoint(s) of {_size(one)} are kept, and the trained model, {_size(final)}: with one being written "
        f"{_size(peak)}, of {_size(free)} free in {args.output_dir}"
    )
    if peak > free:
        print("  That is more than is free: lower `save_total_limit`, save more rarely, or free some space.")


def _half_life(args: MeanTeacherConfig, steps: int) -> str:
    if args.half_life is not None:
        decay = half_life_to_decay(args.half_life, steps, args.ema_update_steps)
        return f"half of it is replaced in {args.half_life * steps:.4g} steps ({args.half_life:g} of the run), decay {decay:.6g}"
    decay = float(args.ema_decay or 0)
    if not 0 < decay < 1:
        return f"decay {decay:g}, which {'freezes it' if decay else 'copies the student'}"
    length = args.ema_update_steps * math.log(0.5) / math.log(decay)
    return f"decay {decay:g}, half of it is replaced in {length:.4g} steps"


def print_memory(trainer: Any, model_args: ModelConfig, launch: Launch, steps: int | None) -> None:
    """What each process holds; of a run whose `steps` are not known without what depends on them."""
    found = memory_of(trainer, model_args, launch)
    sizes = sizes_of(trainer.model, 1, False)
    total = sizes.layers + sizes.embedding + sizes.head
    print(
        f"\nMemory of each of {launch.ranks} process(es), {launch.mode}: {total / 1e6:,.1f}M weights, {sizes.adapter / 1e6:,.2f}M trained"
    )
    for what, number in found.items():
        print(f"  {what:12}{_size(number):>12}")
    print(
        f"  {'together':12}{_size(sum(found.values())):>12}  held between steps; gradients and activations come on top"
    )
    for what, size in memory_of_machine(trainer, launch, steps or 0).items():
        print(f"  {'not on a GPU':12}{_size(size):>12}  {what}, at most")


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def print_end(refusals: Refusals) -> None:
    """Whether the training would start, and all that keeps it from that."""
    print(f"\n{_NOT_SEEN}")
    for reason in refusals.unseen:
        print(f"Nor was the trainer looked at to its end: {reason}")
    for reason in refusals.of_machine:
        print(f"\nThis machine has no GPU: `trl-ema train` would refuse here. {reason}")
        print("On a machine with a GPU that is no reason, and all else was looked at as it would be there.")
    if not refusals.found:
        print(f"\n`trl-ema train` would start{' on a machine with a GPU' if refusals.of_machine else ''}.")
        return
    print(f"\n`trl-ema train` would refuse, for {len(refusals.found)} reason(s):")
    for reason in refusals.found:
        print(f"  - {reason}")
    if refusals.left_out:
        without = ", ".join(f"`{name}`" for name in refusals.left_out)
        print(f"The rest, as far as it can be told, was looked at without {without}.")
