"""Rows as tokens, by TRL's own tokenization, without a trainer."""

from collections.abc import Iterator
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.chat_template_utils import get_training_chat_template, has_generation_markers


def tokenize_rows(
    rows: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None = None,
    settings: SFTConfig | None = None,
) -> Dataset:
    """
    Rows in any of TRL's formats as `input_ids`, with the `labels` that `SFTTrainer` gives them.

    Args:
        max_length (`int`, *optional*): Tokens per row at most. As in training, rows without a label within them are left out.
        settings (`SFTConfig`, *optional*): Those of the training, such as `completion_only_loss`; TRL's defaults otherwise.

    Raises:
        ValueError: A row cannot be tokenized; names it.
    """
    try:
        return _tokenized(rows, tokenizer, max_length, settings).select_columns(["input_ids", "labels"])
    except Exception as error:  # whatever a chat template or a tokenizer may raise
        if isinstance(rows, IterableDataset):
            raise
        number, cause = next(_failures(rows, tokenizer, max_length, settings), (None, error))
        which = "The rows" if number is None else f"Row {number}"
        shown = "" if number is None else f": {str(rows[number])[:200]}"
        raise ValueError(
            f"{which} cannot be tokenized ({type(cause).__name__}: {cause}){shown}. Mend it, or drop it."
        ) from error


# Whatever the rows were made from, so that one data set can be made of several.
_TOKENS = Features({"input_ids": List(Value("int64")), "labels": List(Value("int64"))})


def rows_to_mix(
    rows: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, settings: SFTConfig
) -> Dataset | IterableDataset:
    """
    Rows in any of TRL's formats as `input_ids` and `labels`, as a training with these settings makes them: within `max_length`, unless
    they are to be packed. `settings.completion_only_loss` must be told: TRL decides it by the first row of all.

    Raises:
        ValueError: A row cannot be tokenized; names it. Of a stream, when it is read, as whatever raised it.
    """
    found: Any = tokenize_rows(rows, tokenizer, None if settings.packing else settings.max_length, settings)  # type: ignore[arg-type]
    return found.cast(_TOKENS)


def _tokenized(rows: Dataset, tokenizer: Any, max_length: int | None, settings: SFTConfig | None) -> Dataset:
    defaults = {f.name: f.default for f in fields(SFTConfig)}
    options = defaults if settings is None else {name: getattr(settings, name) for name in defaults}
    args: Any = SimpleNamespace(
        **options | {"max_length": max_length, "shuffle_dataset": False, "dataset_num_proc": None}
    )
    # What its constructor makes of the settings.
    trainer: Any = SFTTrainer.__new__(SFTTrainer)
    trainer._tokenizer, trainer.chat_template = tokenizer, None
    if args.assistant_only_loss and not has_generation_markers(tokenizer.chat_template):
        trainer.chat_template = get_training_chat_template(tokenizer)
    trainer.completion_only_loss = args.completion_only_loss
    if args.completion_only_loss is None:
        trainer.completion_only_loss = {"prompt", "completion"} <= set(rows.column_names)
    return trainer._prepare_dataset(rows, tokenizer, args, packing=False, formatting_func=None, dataset_name="held-out")


def _failures(rows: Dataset, *args: Any) -> Iterator[tuple[int, Exception]]:
    for i in range(len(rows)):
        try:
            _tokenized(rows.select([i]), *args)
        except Exception as error:
            yield i, error
