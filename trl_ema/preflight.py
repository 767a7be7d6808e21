"""The command `trl-ema check`: looks at what a training would do, and at all that it would refuse, without the weights of its model."""

import itertools
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from huggingface_hub import get_token
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import is_torch_xla_available
from trl import ModelConfig

from .adapters.fitness import base_changed_by
from .checkpointing.resuming import check_checkpoint
from .checks import check_best_metric, check_drift_is_watched, check_free_space, check_optimizer
from .config import MeanTeacherConfig
from .data import LoadedPart, as_chat, hub_errors, mixture, mixture_counts, tokenize_rows
from .evaluation.drift import general_rows
from .evaluation.runner import tasks_to_ask
from .files import check_output_dir, read_yaml
from .inputs import as_trained_with, load_parts, load_tokenizer, lora, quantization, training_sets, warn_of_other_lora
from .launch import (
    checks_of_launch,
    launch_of,
    launcher_settings,
    sees_one_device,
    take_accelerate_config,
    with_options_of_training,
)
from .measurement import DriftCallback, Measurement, TrainedDrift
from .options import changed
from .outlook import RowFigures, print_data, print_end, print_memory, print_mixture, print_run, total_steps
from .processes import Launch
from .refusals import Given, Refusals, as_far_as_it_goes, is_hollow
from .regularizers.own_texts import may_be_at_hand, sampling_of
from .regularizers.penalties import EWC
from .regularizers.rehearsal import Rehearsal
from .script import TrainingScriptArguments, option_names, parse, resume_from, sources, with_config_file
from .texts import check_sampling, load_texts
from .trainer import EMARegularizedSFTTrainer


# Rows that are looked at, at most: of the largest data set so many, of the others in proportion; and of a stream.
_ROWS = 5_000
_STREAM_ROWS = 1_000
# Without them transformers refuses to read, on a machine without a GPU, what one with a GPU can train.
_WITHOUT_GPU = ("--use_cpu", "true", "--tf32", "false")
# Options by which the rows are other ones; of some that are not, rows show nothing.
_OF_DATA = {f.name for f in fields(TrainingScriptArguments)} - {
    "adapter_name_or_path", "drift_steps", "eval_tasks", "eval_tasks_include_path", "eval_tasks_steps", "generations",
    "generation_tokens", "measure",
} | {"dataset_text_field"}  # fmt: skip


def main(arguments: list[str]) -> None:
    """Print what a training with these arguments would do. Exits with 1 where it would refuse."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    refusals = Refusals()
    launch, alone, arguments = _launched(arguments, refusals)
    parsed, deepspeed = _parsed(arguments, refusals)
    if parsed is not None:
        args, training_args, model_args = parsed
        whole = None
        with refusals.collected():
            whole = None if launch is None else with_options_of_training(launch, training_args, deepspeed)
        if alone and training_args.n_gpu > 1:
            training_args._n_gpu = 1  # as in the processes of the launch, of which this is none
        with _without_bars(), _left_alone(str(training_args.output_dir)):
            _check(args, training_args, model_args, whole, refusals)
    print_end(refusals)
    if refusals.found:
        sys.exit(1)


def _launched(arguments: list[str], refusals: Refusals) -> tuple[Launch | None, bool, list[str]]:
    """
    The launch that a command line asks for, `None` where it is refused; whether each of its processes sees one device; and the options
    of the training itself.
    """
    found = as_far_as_it_goes(lambda given: take_accelerate_config(given.arguments("")), Given.on(arguments), refusals)
    config, arguments = found or (None, arguments)
    if config is None:
        return (None if refusals.found else Launch()), False, arguments

    def made(config: str, given: Given) -> tuple[Launch, bool, list[str]]:
        settings = launcher_settings(config, given.arguments(""))
        return launch_of(settings), sees_one_device(settings), settings.training_script_args[1:]

    whole = as_far_as_it_goes(partial(made, config), Given.on(arguments), refusals)
    if whole is not None:
        return whole
    # Which options are whose can be told without it.
    whole = as_far_as_it_goes(partial(made, "multi_gpu"), Given.on(arguments), refusals)
    return None, True, [] if whole is None else whole[2]


def _parsed(arguments: list[str], refusals: Refusals) -> tuple[tuple[Any, ...] | None, Any]:
    """
    What [`parse`] makes of a command line but for its `deepspeed`, which would be started then, and that; `None` where it is refused as
    a whole.
    """
    with refusals.collected(), tempfile.TemporaryDirectory() as scratch:
        file, place = None, arguments.index("--config") + 1 if "--config" in arguments else len(arguments)
        if place < len(arguments):
            path = with_config_file(arguments)[place]
            file = path if isinstance(read_yaml(path), dict) else None  # else TRL's parser says so
        given = Given.on(arguments, file)
        deepspeed = given.value("deepspeed")
        given = given if deepspeed is None else given.without("deepspeed")
        return _parsed_here(given, scratch, refusals), deepspeed
    return None, None


def has_accelerator() -> bool:
    """Whether this machine has what weights are trained on elsewhere, of any kind."""
    return torch.accelerator.is_available() or is_torch_xla_available()


def _parsed_here(given: Given, scratch: str, refusals: Refusals) -> tuple[Any, ...] | None:
    """
    What [`parse`] makes of the options, also on a machine without a GPU, such as a login node: what the machine alone cannot do is kept
    apart in `refusals`, and the options are read as one with a GPU reads them.
    """

    def made(some: Given, *others: str) -> tuple[Any, ...]:
        return parse([*some.arguments(scratch), *others])

    if has_accelerator():
        return as_far_as_it_goes(made, given, refusals)
    parsed = as_far_as_it_goes(lambda some: made(some, *_WITHOUT_GPU), given, refusals)
    if parsed is None:
        return None
    for name in refusals.left_out:
        given = given.without(name)
    with warnings.catch_warnings(action="ignore"):  # said already
        try:
            made(given)
        except ValueError as error:
            refusals.of_machine.append(str(error))
    return parsed


def _check(
    args: TrainingScriptArguments,
    training_args: MeanTeacherConfig,
    model_args: ModelConfig,
    launch: Launch | None,
    refusals: Refusals,
) -> None:
    known, has_data = _is_known(args, model_args, refusals)
    with refusals.collected():
        if known and has_data:
            found = sources(args, model_args)
            print("Model and data\n  " + "\n  ".join(f"{name}: {what}" for name, what in found.items()))
    writable = _look_at_places(args, training_args, refusals)
    name = tokenizer = None
    parts: list[LoadedPart] = []
    with refusals.collected():
        if known:
            name, tokenizer = load_tokenizer(model_args, training_args.trust_remote_code, args.adapter_name_or_path)
        if tokenizer is not None and has_data:
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
    print_data(parts, figures, tokenizer)
    with refusals.collected():
        if len(figures) > 1 and all(found.size is not None for found in figures):
            print_mixture(figures, _counts(args, parts, [found.trained for found in figures]))
    _look_at_launch(launch, args, training_args, tokenizer, bool(checkpoint), refusals)
    trainer = None
    scratch = nullcontext(None) if writable else tempfile.TemporaryDirectory()
    with scratch as elsewhere, changed(training_args, output_dir=elsewhere or training_args.output_dir):
        with refusals.collected():
            used = samples if figures else []
            trainer = trainer_without_weights(args, training_args, model_args, name, tokenizer, used, samples is parts)
            _look_further(trainer, args, used, checkpoint)
        if launch is None:
            print("\nSteps, disk and memory are those of a launch, and this one is refused.")
        elif trainer is not None and figures:
            steps = None
            with refusals.collected():
                rows = training_rows(trainer, args, parts, figures)
                steps = total_steps(trainer, rows, launch.ranks)
                print_run(trainer, rows, steps, launch)
            print_memory(trainer, model_args, launch, steps)


def _look_at_places(args: TrainingScriptArguments, training_args: MeanTeacherConfig, refusals: Refusals) -> bool:
    """What a training writes to and asks beside its data. Returns whether it can write to its folder."""
    writable = False
    with refusals.collected():
        check_output_dir(str(training_args.output_dir))
        writable = True
    with refusals.collected():
        check_login(training_args)
    with refusals.collected():
        check_optimizer(training_args)
    with refusals.collected():
        if args.eval_tasks:
            tasks_to_ask(args.eval_tasks, tuple(args.eval_tasks_include_path or ()))
    return writable


def _is_known(args: TrainingScriptArguments, model_args: ModelConfig, refusals: Refusals) -> tuple[bool, bool]:
    """Whether model and data are those that are asked for: without an option that is left out they may be the demo's, or others."""
    options = option_names()
    misspelt = [name for name in refusals.left_out if name not in options]
    has_model = model_args.model_name_or_path is not None or args.adapter_name_or_path is not None
    has_data = args.dataset_name is not None or bool(args.datasets)
    of_data = _OF_DATA & {*refusals.left_out}
    return has_model or not misspelt, not of_data and (has_data or not misspelt)


def _look_at_launch(
    launch: Launch | None,
    args: TrainingScriptArguments,
    training_args: MeanTeacherConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    begun: bool,
    refusals: Refusals,
) -> None:
    """What a training refuses of its launch, some of it when its processes run: this is none of them."""
    if launch is None:
        return
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
    check_optimizer(training_args)
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
            if not is_hollow(error):
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
        return replace(part, train=part.train.select(range(max(1, round(share * len(part.train))))))

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


class TrainerWithoutWeights(EMARegularizedSFTTrainer):
    """The trainer over a base that has shapes alone (torch's `meta` device): it checks all that it checks, and cannot train."""

    def _move_model_to_device(self, model: Any, device: Any) -> None:
        """There is nothing to move."""

    def attach_regularizers(self, rehearsal_dataset: Any) -> None:
        """All of them; those that know the model by its weights are made to look at their options alone."""
        args = self.args
        rehearses, fisher = args.rehearsal_weight, args.ewc_weight
        # The device of what they add: PEFT leaves it on the CPU.
        with changed(args, rehearsal_weight=0.0, ewc_weight=0.0), torch.device("meta"):
            super().attach_regularizers(None)
        own = self._own_texts() if fisher or (rehearses and args.rehearsal_dataset is None) else None
        if rehearses:
            self.regularizers.append(Rehearsal(args, self.processing_class, self.starting_point, own))
        if fisher:
            self.regularizers.append(EWC(self.model, fisher, own, args.ewc_num_texts))  # type: ignore[arg-type]

    def _own_texts(self) -> Any:
        """In the place of [`OwnTexts`], which know the model by its weights: texts that are given, or how they would be drawn."""
        args, sampling = self.args, sampling_of(self.args)
        texts = None if args.rehearsal_texts is None else load_texts(args.rehearsal_texts)
        if texts is None:
            check_sampling(self.model, self.processing_class, sampling)  # type: ignore[arg-type]
        return SimpleNamespace(at_hand=texts, sampling=sampling)


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


def with_trained_adapter(model: Any, folder: str) -> Any:
    """A model without weights, with an adapter of the shapes of the one in `folder`, as it is gone on from."""
    config: Any = PeftConfig.from_pretrained(folder)
    config.inference_mode = False
    if isinstance(config, LoraConfig) and base_changed_by(config) is None:
        config.init_lora_weights = False  # what was trained is no factor of zeros
    return get_peft_model(model, config)


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
        # Its log is of the rows that are looked at.
        with changed(args, max_train_samples=limit), changed(mixture.logger, disabled=True):
            made = training_sets(samples, general, args, tokenizer, training_args, all_rows=not whole)
            train, evals = made  # type: ignore[assignment]
    quantization(model_args, training_args)
    model = model_without_weights(name, model_args, training_args)
    peft_config: PeftConfig | None = lora(model_args)
    if args.adapter_name_or_path is not None:  # that of the adapter counts
        warn_of_other_lora(args.adapter_name_or_path, model_args)
        model, peft_config = with_trained_adapter(model, args.adapter_name_or_path), None
    options: dict[str, Any] = {"assistant_only_loss": False} if args.is_mixture else {}
    if training_args.metric_for_best_model in ("loss", "eval_loss"):  # as the recipe
        training_args.metric_for_best_model = "eval_domain_loss"
    options |= {"fsdp": None, "fsdp_plugin_args": None}  # nothing is sharded here, see [`checks_of_launch`]
    with changed(training_args, push_to_hub=False, model_init_kwargs=None, **options):
        return TrainerWithoutWeights(
            model,
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
