"""The command `trl-ema check`: what a training would do, and all that it would refuse, without the weights of its model."""

import itertools
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import get_token
from peft import PeftConfig
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from trl import ModelConfig

from .adapters.names import TEACHER_NAME, base_of
from .checkpointing.resuming import check_checkpoint
from .checks import bytes_to_write, check_best_metric, check_drift_is_watched, check_free_space
from .config import MeanTeacherConfig
from .data import LoadedPart, as_chat, hub_errors, mixture_counts, tokenize_rows
from .evaluation.drift import general_rows
from .evaluation.runner import tasks_to_ask
from .files import check_output_dir
from .inputs import as_trained_with, load_parts, load_tokenizer, lora, quantization, training_sets, warn_of_other_lora
from .launch import checks_of_launch, launch_of, launcher_settings, sees_one_device, take_accelerate_config
from .losses import IGNORE_INDEX
from .measurement import DriftCallback, Measurement, TrainedDrift
from .memory import NF4, Bytes, Sizes, memory
from .options import changed
from .processes import Launch
from .regularizers.base import Regularizer
from .regularizers.own_texts import may_be_at_hand, sampling_of
from .regularizers.penalties import EWC, L2SP, L1Penalty
from .regularizers.rehearsal import Rehearsal
from .schedules import half_life_to_decay
from .script import TrainingScriptArguments, parse, resume_from, sources
from .texts import check_sampling, load_texts
from .trainer import EMARegularizedSFTTrainer


# Rows that are looked at, at most: of the largest data set so many, of the others in proportion; and of a stream.
_ROWS = 5_000
_STREAM_ROWS = 1_000
_SHOWN_ROWS = 3
_SHOWN_CHARACTERS = 400  # of a stretch of one kind
_NOT_SEEN = (
    "Not looked at, since it takes the weights: whether the logits are hidden states times the head, whether a checkpoint's or "
    "written texts are this very model's, and whether activations fit in memory. Nor is the Hub asked, for `push_to_hub`, whether a "
    "login may write there."
)


@dataclass
class Refusals:
    """
    What a training would refuse, in the order in which it is found, each once.

    Args:
        found: The refusals.
        unseen: What could not be looked at, since an operation takes values that a model without weights does not have.
    """

    found: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """What is raised within this context is kept, and the context left."""
        try:
            yield
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            kept = self.unseen if _is_hollow(error) else self.found
            if str(error) not in kept:
                kept.append(str(error))


def _is_hollow(error: Exception) -> bool:
    """Whether it is of the missing weights, and none of a training."""
    return isinstance(error, RuntimeError) and "meta" in str(error)


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


def main(arguments: list[str]) -> None:
    """Print what a training with these arguments would do. Exits with 1 where it would refuse."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    refusals, launch, settings = Refusals(), Launch(), None
    config, arguments = take_accelerate_config(arguments)
    if config is not None:
        settings = launcher_settings(config, arguments)
        launch, arguments = launch_of(settings), settings.training_script_args[1:]
    args, training_args, model_args = parse(arguments)
    if settings is not None and sees_one_device(settings) and training_args.n_gpu > 1:
        training_args._n_gpu = 1  # as in the processes of the launch, of which this is none
    with _without_bars(), _left_alone(str(training_args.output_dir)):
        _check(args, training_args, model_args, launch, refusals)
    _print_end(refusals)
    if refusals.found:
        sys.exit(1)


def _check(
    args: TrainingScriptArguments,
    training_args: MeanTeacherConfig,
    model_args: ModelConfig,
    launch: Launch,
    refusals: Refusals,
) -> None:
    with refusals.collected():
        found = sources(args, model_args)
        print("Model and data\n  " + "\n  ".join(f"{name}: {what}" for name, what in found.items()))
    writable = False
    with refusals.collected():
        check_output_dir(str(training_args.output_dir))
        writable = True
    with refusals.collected():
        check_login(training_args)
    with refusals.collected():
        if args.eval_tasks:
            tasks_to_ask(args.eval_tasks, tuple(args.eval_tasks_include_path or ()))
    name = tokenizer = None
    parts: list[LoadedPart] = []
    with refusals.collected():
        name, tokenizer = load_tokenizer(model_args, training_args.trust_remote_code, args.adapter_name_or_path)
        parts = load_parts(args, tokenizer, training_args.dataset_text_field)
    checkpoint = None
    with refusals.collected():
        checkpoint = resume_from(training_args) if writable else None
    if name is None or tokenizer is None:
        _look_at_launch(launch, args, training_args, None, bool(checkpoint), refusals)
        return
    samples, figures = sampled(parts), []
    with refusals.collected():
        if args.is_mixture or str(training_args.chat_template_path).endswith((".jinja", ".j2")):
            as_trained_with(tokenizer, training_args)  # as the trainer does later
        figures = [figures_of(*both, tokenizer, training_args) for both in zip(parts, samples, strict=True)]
    _print_data(parts, figures, tokenizer)
    _look_at_launch(launch, args, training_args, tokenizer, bool(checkpoint), refusals)
    trainer = None
    scratch = nullcontext(None) if writable else tempfile.TemporaryDirectory()
    with scratch as elsewhere, changed(training_args, output_dir=elsewhere or training_args.output_dir):
        with refusals.collected():
            used = samples if figures else []
            trainer = trainer_without_weights(args, training_args, model_args, name, tokenizer, used, samples is parts)
            _look_further(trainer, args, used, checkpoint)
        if trainer is not None and figures:
            with refusals.collected():
                rows = training_rows(trainer, args, parts, figures)
                _print_run(trainer, rows, launch)
            _print_memory(trainer, model_args, launch)


def _look_at_launch(
    launch: Launch,
    args: TrainingScriptArguments,
    training_args: MeanTeacherConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    begun: bool,
    refusals: Refusals,
) -> None:
    """What a training refuses of its launch, some of it when its processes run: this is none of them."""
    has_texts = launch.shards_weights and may_be_at_hand(training_args, tokenizer)  # else nobody asks
    for check in checks_of_launch(launch, args, training_args, begun=begun, has_texts=has_texts):
        with refusals.collected():
            check()


def check_login(args: MeanTeacherConfig) -> None:
    """Raises `ValueError` where the run is to be pushed to the Hub, which knows nobody."""
    if args.push_to_hub and not (args.hub_token or get_token()):
        raise ValueError(
            "`push_to_hub=True`, and there is no login to the Hub. Log in with `hf auth login`, set HF_TOKEN, or leave it out and "
            "upload the result later."
        )


def check_training(
    args: TrainingScriptArguments, training_args: MeanTeacherConfig, model_args: ModelConfig, parts: list[LoadedPart]
) -> None:
    """
    Raises the first of what a training would refuse once its data is loaded; of its launch and its checkpoints nothing is asked.

    Args:
        training_args ([`MeanTeacherConfig`]): Of one process; a trainer changes it.
        parts (`list`): What [`load_parts`] gives for these options.
    """
    if training_args.n_gpu > 1:
        training_args._n_gpu = 1  # as in that process
    name, tokenizer = load_tokenizer(model_args, training_args.trust_remote_code, args.adapter_name_or_path)
    samples = sampled(parts)
    if samples is not parts and all(isinstance(part.train, Dataset) for part in parts):
        _counts(args, parts, [len(part.train) for part in parts])  # type: ignore[arg-type]
    with _without_bars(), _left_alone(str(training_args.output_dir)):
        try:
            trainer = trainer_without_weights(
                args, training_args, model_args, name, tokenizer, samples, samples is parts
            )
            _look_further(trainer, args, samples, None)
        except RuntimeError as error:
            if not _is_hollow(error):
                raise


@contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of `datasets` within this context."""
    hidden = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            enable_progress_bars()


@contextmanager
def _left_alone(folder: str) -> Iterator[None]:
    """The folders of this path that are made within this context are gone after it."""
    path = Path(folder).absolute()
    missing = [one for one in (path, *path.parents) if not one.exists()]
    try:
        yield
    finally:
        for one in missing:
            with suppress(OSError):  # a training has begun there meanwhile
                one.rmdir()


# The data


def sampled(parts: list[LoadedPart]) -> list[LoadedPart]:
    """Of large data sets some rows, all of them in the same proportion; the parts are shuffled already. A stream stays one."""
    sizes = [len(part.train) for part in parts if isinstance(part.train, Dataset)]
    share = min(1.0, _ROWS / max(sizes, default=1))
    if share == 1:
        return parts

    def some(part: LoadedPart) -> LoadedPart:
        if not isinstance(part.train, Dataset):
            return part
        # Without shares, which these rows may not have exactly.
        rows = part.train.select(range(max(1, round(share * len(part.train)))))
        return replace(part, train=rows, fraction=None, replayed=False)

    return [some(part) for part in parts]


def figures_of(
    part: LoadedPart, sample: LoadedPart, tokenizer: PreTrainedTokenizerBase, settings: MeanTeacherConfig
) -> RowFigures:
    """Of the rows of one data set, by TRL's own tokenization."""
    rows, stream = sample.train, isinstance(sample.train, IterableDataset)
    if stream:
        rows = Dataset.from_list(list(itertools.islice(rows, _STREAM_ROWS)))
    tokens = tokenize_rows(rows, tokenizer, None, settings)  # type: ignore[arg-type]
    cut = None
    if settings.max_length is not None and not settings.packing:
        keeps_end = settings.truncation_mode == "keep_end"
        cut = slice(-settings.max_length, None) if keeps_end else slice(settings.max_length)
    size = None if stream else len(part.train)  # type: ignore[arg-type]
    return RowFigures(part.name, [(row["input_ids"], row["labels"]) for row in tokens], size, cut)  # type: ignore[index]


def training_rows(
    trainer: Any, args: TrainingScriptArguments, parts: list[LoadedPart], figures: list[RowFigures]
) -> int | None:
    """
    Rows, or packed sequences, of an epoch; `None` of a stream. Exact where all rows were looked at.

    Raises:
        ValueError: The fractions of the mixture take more rows than there are.
    """
    if any(found.size is None for found in figures):
        return None
    here = len(trainer.train_dataset)
    if all(found.size == len(found.rows) for found in figures):
        return here
    counts = _counts(args, parts, [found.trained for found in figures])
    return round(here * sum(counts) / sum(len(found.kept) for found in figures))


def _counts(args: TrainingScriptArguments, parts: list[LoadedPart], sizes: list[int]) -> list[int]:
    """How many rows of each data set are trained on, if it has so many; raises `ValueError` if that is too few."""
    if len(parts) == 1:
        return sizes
    fractions = [part.fraction for part in parts if not part.replayed]
    replay = args.replay_fraction if parts[-1].replayed else None
    return mixture_counts([part.name for part in parts], sizes, fractions, replay, args.max_train_samples)


# The trainer


class _Penalties(Regularizer):
    """In the place of penalties: what they save, `copies` in float32 of all that is trained."""

    def __init__(self, model: Any, copies: int):
        self.name = "penalties"
        self.bytes = 4 * copies * sum(p.numel() for p in model.parameters() if p.requires_grad)

    def bytes_to_save(self) -> int:
        return self.bytes


class TrainerWithoutWeights(EMARegularizedSFTTrainer):
    """The trainer over a base that has shapes alone (torch's `meta` device): it checks all that it checks, and cannot train."""

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """There is nothing to move."""

    def attach_regularizers(self, rehearsal_dataset: Any) -> None:
        """All of them; those that know the model by its weights are made to look at their options alone."""
        args = self.args
        rehearses, fisher = args.rehearsal_weight, args.ewc_weight
        # The device of what they add: PEFT leaves it on the CPU.
        without = dict.fromkeys(("rehearsal_weight", "l1_weight", "l2_weight", "ewc_weight"), 0.0)
        penalties = [
            kind for kind, weight in ((L1Penalty, args.l1_weight), (L2SP, args.l2_weight), (EWC, fisher)) if weight
        ]
        with changed(args, **without), torch.device("meta"):
            super().attach_regularizers(None)
        if penalties:
            self.regularizers.append(_Penalties(self.model, sum(len(kind.kept) for kind in penalties)))
        if not rehearses and not fisher:
            return
        own = None
        if fisher or args.rehearsal_dataset is None:
            texts = None if args.rehearsal_texts is None else load_texts(args.rehearsal_texts)
            if texts is None:
                check_sampling(self.model, self.processing_class, sampling_of(args))  # type: ignore[arg-type]
            own: Any = SimpleNamespace(at_hand=texts)  # type: ignore[no-redef]
        if rehearses:
            Rehearsal(args, self.processing_class, self.starting_point, own)


def model_without_weights(name: str, model_args: ModelConfig, training_args: MeanTeacherConfig) -> Any:
    """
    The model that a training would load, as shapes.

    Raises:
        ConnectionError: The hub cannot be reached.
        ImportError, ValueError: It is no causal model, or needs a package that is not there.
    """
    trust = training_args.trust_remote_code
    with hub_errors("model", name):
        config = AutoConfig.from_pretrained(name, revision=model_args.model_revision, trust_remote_code=trust)
    dtype: Any = model_args.dtype
    if dtype in ("auto", None):
        dtype = config.dtype or torch.float32
    options: dict[str, Any] = {"dtype": getattr(torch, dtype) if isinstance(dtype, str) else dtype}
    if model_args.attn_implementation is not None:
        options["attn_implementation"] = model_args.attn_implementation
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust, **options)
    # By which TRL makes the adapter bfloat16; that of a float32 run stays float32 here.
    model.is_loaded_in_4bit = bool(model_args.load_in_4bit or model_args.load_in_8bit) and (
        training_args.bf16 or training_args.fp16
    )
    return model


def trainer_without_weights(
    args: TrainingScriptArguments,
    training_args: MeanTeacherConfig,
    model_args: ModelConfig,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    samples: list[LoadedPart],
    whole: bool,
) -> TrainerWithoutWeights:
    """The trainer as `recipes/medical_ema.py` makes it; without data, which is refused already, on the general questions."""
    general = as_chat(Dataset.from_list(general_rows()), tokenizer)
    limit = args.max_train_samples if whole else None
    train, evals = general, {"domain": general, "general": general}
    if samples:
        with changed(args, max_train_samples=limit):
            train, evals = training_sets(samples, general, args, tokenizer, training_args)  # type: ignore[assignment]
    quantization(model_args, training_args)
    peft_config = lora(model_args)
    if args.adapter_name_or_path is not None:  # that of the adapter counts
        warn_of_other_lora(args.adapter_name_or_path, model_args)
        peft_config = PeftConfig.from_pretrained(args.adapter_name_or_path)
        peft_config.inference_mode = False
    made: dict[str, Any] = {"assistant_only_loss": False} if args.is_mixture else {}
    if training_args.metric_for_best_model in ("loss", "eval_loss"):  # as the recipe
        training_args.metric_for_best_model = "eval_domain_loss"
    with changed(training_args, push_to_hub=False, model_init_kwargs=None, **made):
        return TrainerWithoutWeights(
            model_without_weights(name, model_args, training_args),
            args=training_args,
            train_dataset=train,
            eval_dataset=evals,
            processing_class=tokenizer,
            peft_config=peft_config,
        )


def _look_further(
    trainer: TrainerWithoutWeights, args: TrainingScriptArguments, samples: list[LoadedPart], checkpoint: str | None
) -> None:
    """What a training refuses once its trainer is made."""
    if args.drift_steps:
        trainer.add_callback(DriftCallback(trainer, args.drift_steps))
    elif str(trainer.args.metric_for_best_model).endswith("drift"):
        TrainedDrift(trainer)
    check_free_space(trainer, checkpoint=False)
    if samples:
        questions = samples[0].held_out
        has_prompts = {"prompt", "completion"} <= set(questions.column_names)
        count = min(args.generations, len(questions)) if has_prompts else 0
        if args.measure:
            Measurement(trainer, questions.select(range(count)), args.generation_tokens)
    check_drift_is_watched(trainer)
    check_best_metric(trainer)
    if checkpoint:
        check_checkpoint(trainer, checkpoint)


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
    """Bytes on each GPU that stay between steps, see [`memory`]; 4-bit weights stay whole under FSDP2."""
    sizes = sizes_of(trainer.model, launch.ranks, launch.mode == "fsdp2")
    case = trainer.args.teacher, sizes, bytes_of(trainer, model_args, launch), launch.ranks
    found = memory(launch.mode, *case)
    if launch.mode == "fsdp2" and (model_args.load_in_4bit or model_args.load_in_8bit):
        found["base"] = memory("ddp", *case)["base"]
    return found


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


def _print_data(parts: list[LoadedPart], figures: list[RowFigures], tokenizer: PreTrainedTokenizerBase) -> None:
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


def _print_run(trainer: Any, rows: int | None, launch: Launch) -> None:
    """Steps, what is told as a fraction of them, and files."""
    args = trainer.args
    steps = total_steps(trainer, rows, launch.ranks)
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


def _print_memory(trainer: Any, model_args: ModelConfig, launch: Launch) -> None:
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


def _size(number: float) -> str:
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def _print_end(refusals: Refusals) -> None:
    print(f"\n{_NOT_SEEN}")
    for reason in refusals.unseen:
        print(f"Nor was the trainer looked at to its end: {reason}")
    if not refusals.found:
        print("\n`trl-ema train` would start.")
        return
    print(f"\n`trl-ema train` would refuse, for {len(refusals.found)} reason(s):")
    for reason in refusals.found:
        print(f"  - {reason}")
