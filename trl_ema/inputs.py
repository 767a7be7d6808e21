"""What a run loads: its rows and those that it holds out, its tokenizer, its quantization, and the adapter that it goes on from."""

import copy
import itertools
import logging
import os
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import CHAT_TEMPLATE_FILE
from trl import ModelConfig, get_peft_config, get_quantization_config
from trl.trainer.utils import create_model_from_path

from . import __version__, data, offline
from .config import MeanTeacherConfig
from .data import LoadedPart
from .evaluation import models
from .script import TrainingScriptArguments, check_adapter_folder, data_of, held_out_digest
from .versions import check_versions


logger = logging.getLogger(__name__)

# Figures on fewer held-out rows tell little.
FEW_ROWS = 16
# Share of the rows that is held out of what is not small, if no other is asked for.
_HELD_OUT_SHARE = 0.02

# Of the rows that data sets share, or the splits of one, by the key that an entry of [`without_held_out`] of that kind has.
_SHARED = {
    "also_trained": "%(rows)d of the %(of)d training rows of %(also_trained)r are training rows of %(trained)r too: with both in the "
    "mixture a model sees them twice.",
    "also_held_out": "%(rows)d of the %(of)d held-out rows of %(also_held_out)r are held out of %(held_out)r too, and measured in both.",
    "held_out": "%(rows)d of the %(of)d training rows of %(trained)r are left out: they are held out of %(held_out)r, or share a prompt "
    "with a row that is.",
}


def load_parts(
    args: TrainingScriptArguments, tokenizer: PreTrainedTokenizerBase, text_field: str = "text"
) -> list[LoadedPart]:
    """
    All that is trained on, by data set; each holds out its own rows, and none trains on what it or another one holds out.

    Raises:
        ValueError: Of one of them no row is left to train on, or to hold out.
    """
    parts = _load_parts(args, tokenizer, text_field)
    names, train, held_out = zip(*((part.name, part.train, part.held_out) for part in parts), strict=True)
    left, shared = data.without_held_out(names, train, held_out, text_field)
    for entry in itertools.chain(*shared):
        logger.warning(next(text for key, text in _SHARED.items() if key in entry), entry)
    for part in parts:
        if len(part.held_out) < min(FEW_ROWS, args.eval_samples):
            logger.warning(
                "Only %d rows are held out of %r: figures on so few tell little. Hold out more with a larger `--eval_fraction`, or name "
                "a larger split with `--dataset_test_split`.",
                len(part.held_out), part.name,
            )  # fmt: skip
    return [replace(part, train=rows, shared=own) for part, rows, own in zip(parts, left, shared, strict=True)]


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
        if held_out_digest(run) not in (None, data.rows_digest([rows], settings.dataset_text_field)):
            raise ValueError(
                "the data has changed since the training, and what would be held out now are other rows, some of which it may have been "
                "trained on."
            )
        return rows
    except (OSError, ValueError) as error:
        raise ValueError(
            f"The held-out rows of {run}, of {data_of(args)!r}, cannot be found again: {error} Give rows with `--dataset_name`."
        ) from error


def training_sets(
    parts: list[LoadedPart],
    general: Dataset,
    args: TrainingScriptArguments,
    tokenizer: PreTrainedTokenizerBase,
    settings: MeanTeacherConfig,
    all_rows: bool = False,
) -> tuple[Dataset | IterableDataset, dict[str, Dataset]]:
    """
    What the trainer trains on, and what it evaluates by name: `domain`, the held-out rows of all parts but the replayed one; `general`;
    and those of each part, where there are several.

    A single data set stays as it is. The rows of a mixture come as tokens with labels: a part of questions and answers is trained on
    its answers, one of plain text on all of it, as if each were alone; and rows without a label are gone before shares are counted.

    Args:
        all_rows (`bool`): Take all rows of the parts of a mixture: these are samples, which the shares need not fit.

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
    if all_rows:
        fractions, replay = [None] * len(parts), None
    train = data.mixed(rows, names, fractions, replay, args.max_train_samples, args.split_seed)
    held_out: dict[str, Any] = {part.name: data.rows_to_mix(part.held_out, tokenizer, settings) for part in parts}
    own = [part.name for part in parts if not part.replayed]
    domain = concatenate_datasets([held_out[name] for name in own])
    if len(own) == 1:
        del held_out[own[0]]  # which is the domain
    return train, {"domain": domain, "general": data.rows_to_mix(general, tokenizer, settings), **held_out}  # type: ignore[dict-item]


def as_trained_with(tokenizer: PreTrainedTokenizerBase, settings: Any) -> None:
    """
    Changes a base's tokenizer as `SFTTrainer` does before it tokenizes.

    Args:
        settings: With `eos_token` and `chat_template_path`, as [`MeanTeacherConfig`] has them.

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
    as_trained_with(changed, SimpleNamespace(eos_token=end, chat_template_path=template))
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
        rows, fraction = len(dataset), args.eval_fraction
        if fraction is None:
            fraction = max(_HELD_OUT_SHARE, min(FEW_ROWS / rows, 0.1))
        dataset, held_out = data.held_out_split(dataset, fraction, key, args.split_seed, text_field)
        if not len(held_out):
            raise ValueError(
                f"No row is held out: `eval_fraction={fraction}` of {rows} rows. Raise `--eval_fraction`, or name a split "
                "with `--dataset_test_split`."
            )
    return dataset.shuffle(seed=args.split_seed), held_out.shuffle(seed=args.split_seed)


def _part_stream(
    args: TrainingScriptArguments, dataset: IterableDataset, held_out: IterableDataset | None, text_field: str
) -> tuple[IterableDataset, Dataset]:
    if held_out is None:
        fraction = args.eval_fraction or _HELD_OUT_SHARE
        return data.held_out_of_stream(dataset, args.eval_samples, fraction, args.split_seed, text_field)
    return dataset, Dataset.from_list(list(held_out.take(args.eval_samples)))


def _load_split(args: TrainingScriptArguments, part: data.DataPart, option: str, split: str, text_field: str) -> Any:
    return data.load_part(part, option, split, args.dataset_streaming, text_field, args.drop_incomplete_rows)


def _load_held_out(args: TrainingScriptArguments, part: data.DataPart, option: str, text_field: str) -> Any:
    """
    The split for the figures, or `None` if there is none. The default `test`, named or not, need not be there, nor have answers; one that
    was named has to, but of rows to replay, which figures are not for.
    """
    asked, default = args.dataset_test_split, TrainingScriptArguments.dataset_test_split
    named = part.data_files or part.path
    if asked != default and option != "replay_dataset":
        return _load_split(args, part, option, asked, text_field)
    for split in dict.fromkeys((asked, default, "validation")):
        if split == part.split:
            continue  # which is trained on
        try:
            rows = _load_split(args, part, option, split, text_field)
        except (data.NoSplitError, data.NoAnswersError) as error:
            if isinstance(error, data.NoAnswersError):
                logger.info("The split %r of %s has no answers: it is not used.", split, named)
            continue
        logger.info("Figures are measured on the split %r of %s.", split, named)
        return rows
    logger.info("%s has no test split: some of its training rows are held out.", named)
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
