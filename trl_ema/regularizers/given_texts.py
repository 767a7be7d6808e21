"""Texts to rehearse that the user gives, instead of those that the model would write itself."""

import logging
from typing import Any

from datasets import Dataset, IterableDataset

from ..config import MeanTeacherConfig
from ..data import DataPart, as_chat, check_dataset, load_part, to_prompt_completion, tokenize_rows
from ..texts import Texts


logger = logging.getLogger(__name__)


def given_texts(rows: Dataset | IterableDataset | dict | str, args: MeanTeacherConfig, tokenizer: Any) -> Texts:
    """
    `rehearsal_num_texts` rows as texts, drawn at random, the same for every `seed`; of a stream the first ones. Each is a whole
    text, prompt and answer, cut to `rehearsal_num_tokens`, and to `max_length` where that is less.

    Args:
        rows (`Dataset`, `IterableDataset`, `dict` or `str`): In any of TRL's formats, or one that is known; or hub name or file, or an
            entry as of `datasets`, whose plain prompts become chats where there is a template, as those of a training.
        args ([`MeanTeacherConfig`]): Those options, and `dataset_text_field`.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.

    Raises:
        TypeError, ValueError: The rows cannot be read or tokenized, or none has two tokens.
    """
    if isinstance(rows, str | dict):
        part = DataPart.from_config(rows, "rehearsal_dataset")
        with args.main_process_first(local=False, desc="texts to rehearse"):
            loaded = load_part(part, "rehearsal_dataset", text_field=args.dataset_text_field)
            dataset: Any = as_chat(loaded, tokenizer)
    else:
        check_dataset(rows, "rehearsal_dataset")
        dataset = to_prompt_completion(rows, args.dataset_text_field, name="`rehearsal_dataset`")
    number, limit = (
        args.rehearsal_num_texts,
        min(args.rehearsal_num_tokens, args.max_length or args.rehearsal_num_tokens),
    )
    if isinstance(dataset, IterableDataset):
        dataset = Dataset.from_list(list(dataset.take(number)))
    elif len(dataset) > number:
        dataset = dataset.shuffle(seed=0).select(range(number))
    if (
        args.dataset_text_field != "text" and args.dataset_text_field in dataset.column_names
    ):  # as it is called by default
        dataset = dataset.select_columns(args.dataset_text_field).rename_column(args.dataset_text_field, "text")
    whole = [ids for ids in tokenize_rows(dataset, tokenizer)["input_ids"] if len(ids) > 1]
    if not whole:
        raise ValueError(
            f"None of the {len(dataset)} rows to rehearse has two tokens. Give others as `rehearsal_dataset`."
        )
    cut = sum(len(ids) > limit for ids in whole)
    logger.info("%d given texts are rehearsed; %d of them are cut to %d tokens.", len(whole), cut, limit)
    return Texts([list(ids[:limit]) for ids in whole], ["given"] * len(whole), {"dataset": str(rows)})
