"""What cannot work is refused before any work: models, adapters, data, launches, disks."""

import itertools
import logging
import math
import shutil
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import Trainer, TrainerCallback, TrainingArguments, get_scheduler
from trl.trainer.utils import get_config_model_id

from .adapters.fitness import (
    check_adapter,
    check_repeatable,
    refuse_leftovers,
    refuse_without_adapter,
    student_name,
    targets_head,
)
from .config import MeanTeacherConfig
from .data import DataPart, check_columns, check_dataset, check_rows, trained_columns
from .data.loading import local_files
from .files import OutputError
from .losses import IGNORE_INDEX
from .options import changed
from .ownership import has_earlier_teacher
from .processes import Launch, parallel_sizes, refuse_parallelism
from .sharding import whole_shape
from .texts import load_texts


logger = logging.getLogger(__name__)


# What TRL's own forward does, with all that it takes.
_PLAIN = "`teacher='none'` without rehearsal and entropy weighting"

# Beside its loss, what an evaluation gives of each set, and of all of them: by `Trainer` and by TRL.
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
_OF_TRL = {f"eval_{name}" for name in ("aux_loss", "entropy", "mean_token_accuracy", "num_tokens")}

# Rows of a stream that are read, at most, in search of a label.
_STREAM_ROWS = 1000


def as_mean_teacher_config(args: Any, model: Any) -> MeanTeacherConfig:
    """`args` as a [`MeanTeacherConfig`]; without any, the defaults and a folder named after the model."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return MeanTeacherConfig(f"{name.split('/')[-1]}-EMA-SFT")
    if isinstance(args, MeanTeacherConfig):
        return args
    if isinstance(args, TrainingArguments):  # as `SFTTrainer` takes them, with its own defaults for what they lack
        known = {f.name for f in fields(MeanTeacherConfig) if f.init}
        return MeanTeacherConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.name in known})
    raise TypeError(
        f"`args` must be a `MeanTeacherConfig`, got `{type(args).__name__}`. Pass `MeanTeacherConfig(output_dir, ...)`; an "
        "`SFTConfig` or `TrainingArguments` is read as one with the default teacher."
    )


def check_before_loading(
    model: Any,
    args: MeanTeacherConfig,
    peft_config: Any,
    train_dataset: Any,
    compute_loss_func: Any,
    rehearsal_dataset: Any = None,
) -> None:
    """Raises before the model is loaded, or a data set read, for what cannot work together with the teacher."""
    if rehearsal_dataset is not None:
        _check_rehearsal_dataset(rehearsal_dataset, args)
    else:
        check_length_to_write(args)
    _check_files(args)
    _check_peft_config(peft_config)
    given: Any = model.active_peft_config if isinstance(model, torch.nn.Module) and is_peft_model(model) else None
    adapter = peft_config if peft_config is not None else given
    if adapter is not None:
        _check_not_on_head(adapter)
    refuse_leftovers(model)
    if args.needs_fused_forward:
        _refuse_what_cannot_work(args, compute_loss_func, train_dataset)
        refuse_parallelism(Launch(**parallel_sizes(args.parallelism_config)))
        if args.teacher == "none" and adapter is not None and adapter.is_prompt_learning:  # with a teacher see below
            raise ValueError(
                f"{getattr(adapter.peft_type, 'value', adapter.peft_type)} is prompt learning: rehearsal and entropy weighting count the "
                "tokens of the rows, which its virtual tokens are none of. Use a `LoraConfig`, or leave both out."
            )
    if adapter is None:
        refuse_without_adapter(args, rehearsal_dataset)
    elif args.teacher != "none":
        if peft_config is None:
            student_name(model, earlier_teacher=has_earlier_teacher(model))
        check_adapter(adapter, args.teacher_anchor)
    elif peft_config is not None:
        _warn_of_what_cannot_be_loaded(peft_config)


def _check_rehearsal_dataset(dataset: Any, args: MeanTeacherConfig) -> None:
    if not args.rehearsal_weight:
        raise ValueError(
            "`rehearsal_dataset` is given, and `rehearsal_weight` is 0: it would not be rehearsed. Give a weight, such as 4, or no "
            "data set."
        )
    for option in ("rehearsal_texts", "rehearsal_dataset"):
        if getattr(args, option) is not None:
            raise ValueError(
                f"The trainer's `rehearsal_dataset` and the option `{option}={getattr(args, option)!r}` both say what is rehearsed. Give "
                "one of them."
            )
    check_dataset(dataset, "rehearsal_dataset")


def check_length_to_write(args: MeanTeacherConfig) -> None:
    """Raises `ValueError` where texts would be written that are longer than a row; for who has no data set to rehearse instead."""
    writes = bool(args.rehearsal_weight) and args.rehearsal_texts is None and args.rehearsal_dataset is None
    if writes and args.max_length is not None and args.rehearsal_num_tokens > args.max_length:
        raise ValueError(
            f"`rehearsal_num_tokens={args.rehearsal_num_tokens}` is more than `max_length={args.max_length}`, which no row may pass. "
            "Lower the one or raise the other."
        )


def _check_files(args: MeanTeacherConfig) -> None:
    """Whether there is what is to be rehearsed, or the Fisher information made of."""
    if args.rehearsal_texts is not None and (args.rehearsal_weight or args.ewc_weight):
        load_texts(args.rehearsal_texts)  # whose they are is told by the model's weights
    if args.rehearsal_dataset is not None and args.rehearsal_weight:
        part = DataPart.from_config(args.rehearsal_dataset, "rehearsal_dataset")
        local_files(part.path, part.data_dir, part.data_files)


def _refuse_what_cannot_work(args: MeanTeacherConfig, compute_loss_func: Any, train_dataset: Any) -> None:
    if compute_loss_func is not None:
        raise ValueError(
            f"`compute_loss_func` replaces the loss that the teacher is part of. Drop it, or use {_PLAIN}."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` is not supported with a teacher, whose "
            f"probabilities are soft targets already. Set it to 0, or use {_PLAIN}."
        )
    columns = _columns(train_dataset)
    if {"image", "images"} & columns:
        raise ValueError(
            f"The data set has images (columns {sorted(columns)}); the teacher supports text alone. Remove the images, "
            f"or use {_PLAIN}."
        )


def _check_peft_config(peft_config: Any) -> None:
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        hint = "Pass `LoraConfig(**peft_config)`." if isinstance(peft_config, dict) else "Pass `LoraConfig(...)`."
        raise TypeError(f"`peft_config` must be a config of PEFT, got `{type(peft_config).__name__}`. {hint}")


def _check_not_on_head(peft_config: Any) -> None:
    """`SFTTrainer` refuses it too, whatever its loss, but only once all rows are tokenized."""
    if targets_head(peft_config):
        targets = peft_config.target_modules
        raise ValueError(
            f"`target_modules={targets if isinstance(targets, str) else sorted(targets)!r}` has an adapter on `lm_head`, whose weight the "
            "loss multiplies by directly. Leave it out, or train the whole head with `modules_to_save=['lm_head']`."
        )


def _warn_of_what_cannot_be_loaded(peft_config: Any) -> None:
    try:
        check_repeatable(
            peft_config,
            "Save the adapter before the training too, and the trained one as a LoRA by PEFT's `save_pretrained(..., "
            "path_initial_model_for_weight_conversion=FOLDER_OF_THE_FIRST)`; or use `'pissa'` or `'olora'`.",
        )
    except ValueError as error:
        logger.warning("%s", error)


def _columns(dataset: Any) -> set[str]:
    return set(next(iter(dataset), {})) if isinstance(dataset, (Dataset, IterableDataset)) else set()


def check_datasets(
    train_dataset: Any, eval_dataset: Any, args: MeanTeacherConfig, formatting_func: Any, data_collator: Any
) -> None:
    """Before anything is loaded or tokenized: data sets, in a format that TRL knows, with a text in every row."""
    if train_dataset is not None:  # TRL says that it is required
        check_dataset(train_dataset, "train_dataset")
    options: Any = args.dataset_kwargs or {}
    if options.get("skip_prepare_dataset", False):
        return
    several = isinstance(eval_dataset, dict)
    evals = eval_dataset if several else {"eval": eval_dataset}
    evals = {name: dataset for name, dataset in evals.items() if dataset is not None}
    for name, dataset in evals.items():
        check_dataset(dataset, f"eval_dataset[{name!r}]" if several else "eval_dataset")
    if train_dataset is None or formatting_func is not None or data_collator is not None:
        return
    for name, dataset in {"train": train_dataset, **evals}.items():
        columns = _columns(dataset)
        check_columns(columns, name, args.dataset_text_field)
        check_rows(dataset, trained_columns(columns, args.dataset_text_field), f"the {name} data set")


def check_labels(train_dataset: Any, eval_dataset: Any, compute_metrics: Any) -> None:
    """Raises `ValueError` for tokenized data without a labelled token."""
    _check_labels(train_dataset)
    if compute_metrics is None:  # which may have a use for rows without a label
        evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name, dataset in evals.items():
            _check_labels(dataset, f"evaluation data set {name!r}")


def _check_labels(dataset: Any, what: str = "training data") -> None:
    """TRL drops rows without a labelled token; it does not say when none is left. Of a stream the first rows are read."""
    if isinstance(dataset, Dataset):
        rows = dataset.select_columns("labels") if "labels" in dataset.column_names else ()
        missing = len(rows) > 0 or len(dataset) == 0
    elif isinstance(dataset, IterableDataset):
        rows, missing = itertools.islice(dataset, _STREAM_ROWS), True
    else:
        return
    for row in rows:
        if "labels" not in row or any(label != IGNORE_INDEX for label in row["labels"]):
            return
    if missing:
        raise ValueError(
            f"No token of the {what} carries a label: every one is masked, or every prompt alone fills "
            "`max_length`. Raise `max_length`, shorten the prompts, or look at `completion_only_loss` and "
            "`assistant_only_loss`."
        )


def check_prompts(train_dataset: Any) -> None:
    """Raises `ValueError` for tokenized data without a prompt token that is predicted. Of a stream the first rows are read."""
    if isinstance(train_dataset, Dataset):
        rows = train_dataset.select_columns("labels") if "labels" in train_dataset.column_names else ()
    else:
        rows = itertools.islice(train_dataset, _STREAM_ROWS)
    # What a row begins with is predicted by nothing.
    if not any(IGNORE_INDEX in row.get("labels", ())[1:] for row in rows):
        raise ValueError(
            "`kl_tokens='prompt'` has no token in this training data: each carries a label, so the teacher would hold nothing. "
            "Give rows with a prompt and a completion (or `assistant_only_loss=True` for messages), or use `kl_tokens='all'`."
        )


def check_fused_forward(args: MeanTeacherConfig) -> None:
    """Raises `RuntimeError` where a regularizer has divergences and the trainer was not told to patch the forward for them."""
    if not args.needs_fused_forward:
        raise RuntimeError(
            "A regularizer gives divergences, but `MeanTeacherConfig.needs_fused_forward` is false, so TRL's own forward would "
            "leave them out. Let that property be true with the option that turns the regularizer on."
        )


def check_optimizer(args: MeanTeacherConfig) -> None:
    """
    Raises, before a model is loaded, for an optimizer or a schedule that `Trainer` could not make once it is.

    Raises:
        ImportError: The optimizer is of a package that is not installed.
        ValueError: Their arguments are not those that they take.
    """
    layer, targets = torch.nn.Linear(1, 1), args.optim_target_modules
    # Which layers of the model those are shows with the model; here it is one layer.
    with changed(args, optim_target_modules=None if targets is None else "all-linear"):
        try:
            Trainer.get_optimizer_cls_and_kwargs(args, torch.nn.ModuleList([layer]))  # type: ignore[arg-type]
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`optim={_value(args.optim)!r}` with `optim_args={args.optim_args!r}` makes no optimizer: {str(error).rstrip('.')}. "
                "Correct `optim_args`, such as `beta1=0.9,eps=1e-8`, or take another `optim`."
            ) from error
    optimizer = torch.optim.SGD(layer.parameters(), lr=args.learning_rate)
    steps = args.max_steps if args.max_steps > 0 else 1000  # no schedule refuses a number of them
    kind, warmup, options = args.lr_scheduler_type, args.get_warmup_steps(steps), args.lr_scheduler_kwargs
    try:
        get_scheduler(kind, optimizer, warmup, steps, options)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`lr_scheduler_type={_value(kind)!r}` with `lr_scheduler_kwargs={options!r}` makes no schedule: {str(error).rstrip('.')}. "
            "Give what this schedule takes, such as `{'min_lr_rate': 0.1}` for `cosine_with_min_lr`, or take another one."
        ) from error


def _value(choice: Any) -> Any:
    """Of an option that transformers makes an `Enum` of, as it is written."""
    return getattr(choice, "value", choice)


def check_drift_is_watched(trainer: Any) -> None:
    """Raises `ValueError` where training is to stop at, or to choose by, a drift that nothing measures."""
    watching = [*trainer.regularizers, *trainer.callback_handler.callbacks]
    if trainer.args.max_drift is not None and not any(getattr(one, "watches_drift", False) for one in watching):
        raise ValueError(
            f"`max_drift={trainer.args.max_drift}`, but nothing measures the drift during training. Rehearse "
            "(`rehearsal_weight`, with `rehearsal_loss='kl'`), give the script `--drift_steps`, or add "
            "`trl_ema.measurement.DriftCallback(trainer, steps)`."
        )
    best = str(trainer.args.metric_for_best_model)
    if best.endswith("drift") and trainer.measure_at_evaluation is None:
        raise ValueError(
            f"`metric_for_best_model={best!r}`, but no evaluation measures the drift. Make a `trl_ema.measurement.TrainedDrift(trainer)` "
            "before `train()`; `trl-ema train` makes one."
        )


def check_best_metric(trainer: Any) -> None:
    """Raises `ValueError` where training is to choose by what no evaluation gives: it would end after the first one."""
    args, sets = trainer.args, trainer.eval_dataset
    best = args.metric_for_best_model
    if best is None or args.eval_strategy == "no" or _others_add_metrics(trainer):
        return
    named = [f"eval_{name}" for name in sets] if isinstance(sets, dict) else ["eval"]
    kinds = ["loss"]
    if trainer.measure_at_evaluation is not None:
        kinds.append("drift")
    if args.teacher != "none" and args.eval_teacher:
        kinds.append("teacher_loss")
    known = [f"{name}_{kind}" for name in named for kind in kinds]
    of_libraries = {f"{name}_{kind}" for name in named for kind in _SPEEDS} | _OF_TRL
    if best.removeprefix("eval_") not in {name.removeprefix("eval_") for name in (*known, *of_libraries)}:
        raise ValueError(
            f"`metric_for_best_model={best!r}` is none of the metrics of an evaluation of this run: {', '.join(known)}. Give one of "
            "them, or the trainer a `compute_metrics` that makes it."
        )


def _others_add_metrics(trainer: Any) -> bool:
    """Whether something that is neither ours nor a library's may add metrics to an evaluation: their names are not known."""
    callbacks = [type(one) for one in trainer.callback_handler.callbacks]
    measuring = [one for one in callbacks if one.on_evaluate is not TrainerCallback.on_evaluate]
    adding = [type(trainer), *measuring]
    if trainer.measure_at_evaluation is not None:
        adding.append(trainer.measure_at_evaluation)
    known = ("transformers", "trl", __package__)
    return trainer.compute_metrics is not None or any(one.__module__.split(".")[0] not in known for one in adding)


def check_finite(trainer: Any, loss: torch.Tensor, from_entropy: bool) -> None:
    """
    Raises `FloatingPointError`, on all ranks together, where the loss of any is NaN or infinite: before the backward pass, in
    which DeepSpeed takes its step.

    Args:
        from_entropy: Whether the entropy that TRL has gathered, and waited for, is not finite where any rank's loss is not.
    """
    if from_entropy and not trainer.accelerator.gradient_state.end_of_dataloader:
        # At the end of an epoch TRL may leave ranks out, and without labelled tokens it puts 0.
        entropy = trainer._metrics["train"]["entropy"][-1]
        if math.isfinite(entropy) and entropy != 0:
            return
    losses = trainer.accelerator.gather(loss.detach())
    if losses.isfinite().all():
        return
    bad = losses[~losses.isfinite()][0].item()  # on whichever rank
    last = trainer.last_good_checkpoint
    resume = f"The last good checkpoint is {last}" if last else "There is no good checkpoint of this run yet"
    raise FloatingPointError(
        f"The loss of step {trainer.state.global_step + 1} is {bad}; the model was not updated with it. "
        f"{resume}. Lower `learning_rate` or `kl_weight`, or look at the data of this step; "
        "`stop_on_nonfinite_loss=False` goes on regardless."
    )


def bytes_to_write(trainer: Any, *, checkpoint: bool) -> int:
    """
    Of one checkpoint, or of what `save_model` writes: the student, or without an adapter the whole model; what the regularizers save;
    and in a checkpoint, unless `save_only_model`, the optimizer's two moments. What DeepSpeed and FSDP write for themselves is as much
    again.
    """
    args, parameters = trainer.args, list(trainer.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    needed = sum(map(_bytes, trained if is_peft_model(trainer.model) else parameters))
    needed += sum(regularizer.bytes_to_save() for regularizer in trainer.regularizers)
    if checkpoint and not args.save_only_model:
        needed += 2 * sum(map(_bytes, trained))
    if checkpoint and (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):
        needed *= 2
    return needed


def check_free_space(trainer: Any, *, checkpoint: bool) -> None:
    """Raises [`OutputError`] unless there is room for one checkpoint, or for what `save_model` writes, see [`bytes_to_write`]."""
    needed = bytes_to_write(trainer, checkpoint=checkpoint)
    free = shutil.disk_usage(trainer.args.output_dir).free
    if free < needed:
        what = "one checkpoint" if checkpoint else "the trained model"
        raise OutputError(
            f"`output_dir={trainer.args.output_dir!r}` has {free / 2**20:.0f} MiB free; {what} needs {needed / 2**20:.0f} MiB. "
            "Free some space, or choose another `--output_dir`."
        )


def _bytes(parameter: Any) -> int:
    return whole_shape(parameter).numel() * parameter.element_size()
