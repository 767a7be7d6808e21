"""Rows that training can use: each text is there, or a user is told where it is not."""

import csv
import datetime
import logging
import os
from collections.abc import Iterable
from typing import Any

from datasets import Dataset, IterableDataset


logger = logging.getLogger(__name__)


class NoAnswersError(ValueError):
    """Rows without their answers, as in the test splits of public benchmarks."""


class IncompleteRowsError(ValueError):
    """Rows in which a text is missing."""


_ANSWERS = {"cop", "completion", "output", "answer", "Response", "long_answer", "final_decision"}
_MESSAGE_KEYS = {"role", "content", "name", "from", "value", "weight"}  # others carry something themselves
_SHOWN_ROWS = 10
_STREAM_ROWS = 100


def complete_rows(
    dataset: Dataset | IterableDataset, columns: Iterable[str], drop: bool = False, name: str = "the data set"
) -> Dataset | IterableDataset:
    """
    The data set if each of its `columns` holds text in every row, or with `drop` without those rows that do not. A stream is
    looked at as it is read.

    Raises:
        IncompleteRowsError: See [`to_prompt_completion`].
        NoAnswersError: The answers of all rows are missing, of a stream those of the first 100.
    """
    columns = sorted(columns)
    _check_answers(dataset, columns, name)
    if isinstance(dataset, IterableDataset):
        if drop:
            return dataset.filter(lambda row: _fault(row, columns) is None)

        def checked(row: dict, index: int) -> dict:
            if fault := _fault(row, columns):
                raise IncompleteRowsError(_incomplete(name, {index: fault}))
            return row

        return dataset.map(checked, with_indices=True, features=dataset.features) if columns else dataset
    faults = _faults(dataset, columns)
    if not faults:
        return dataset
    if not drop or len(faults) == len(dataset):
        raise IncompleteRowsError(_incomplete(name, faults, len(dataset)))
    logger.info("%d of %d rows of %s are incomplete and left out.", len(faults), len(dataset), name)
    return dataset.select([i for i in range(len(dataset)) if i not in faults])


def check_rows(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> None:
    """Raises [`IncompleteRowsError`] for the first row in which one of `columns` holds no text; of a stream few are read."""
    if faults := _faults(dataset, columns):
        raise IncompleteRowsError(
            _incomplete(name, faults, len(dataset) if isinstance(dataset, Dataset) else _STREAM_ROWS)
        )


def _check_answers(dataset: Dataset | IterableDataset, columns: list[str], name: str) -> None:
    fault = None
    for row in _rows_to_check(dataset, columns):
        fault = _fault(row, columns)
        if fault is None or fault[0] not in _ANSWERS or not fault[1].startswith(("is blank", "holds no answer")):
            return
    if fault:
        raise NoAnswersError(
            f"No row of {name} has an answer: column `{fault[0]}` {fault[1]}, as in every row that was read. The test splits of "
            "public benchmarks carry none: use `train` or `validation`."
        )


def _faults(dataset: Dataset | IterableDataset, columns: list[str]) -> dict[int, tuple[str, str]]:
    """By row, see [`_fault`]."""
    return {i: fault for i, row in enumerate(_rows_to_check(dataset, columns)) if (fault := _fault(row, columns))}


def _rows_to_check(dataset: Dataset | IterableDataset, columns: list[str]) -> Iterable[dict]:
    return rows_of(dataset, columns) if isinstance(dataset, Dataset) else dataset.take(_STREAM_ROWS)


def rows_of(dataset: Dataset, columns: list[str]) -> Iterable[dict]:
    """Rows with these columns alone."""
    if not columns:
        return
    if dataset.format["type"] != "custom":  # a transform of the user's takes the columns that it knows
        dataset = dataset.select_columns(columns)
    for batch in dataset.iter(1000):
        for values in zip(*(batch[c] for c in columns), strict=True):
            yield dict(zip(columns, values, strict=True))


def _fault(row: dict, columns: list[str]) -> tuple[str, str] | None:
    """The first of `columns` that holds no text, and what is wrong with it."""
    for column in columns:
        value = row[column]
        if column in ("prompt", "completion", "messages", "conversations") and isinstance(value, list):
            fault = _fault_of_messages(value, column)
        elif isinstance(value, (dict, list)):  # options, or paragraphs
            parts = value.values() if isinstance(value, dict) else value
            fault = f"is blank in part ({value!r})" if None in parts else None
        else:
            fault = _fault_of_text(value, column)
        if fault:
            return column, fault
    return None


def _fault_of_text(value: Any, column: str) -> str | None:
    if column == "cop":  # a number, and text in a CSV file
        return None if str(value) in ("0", "1", "2", "3") else f"holds no answer (`cop={value}`); expected 0 to 3"
    if value is None or (isinstance(value, str) and column in _ANSWERS and not value.strip()):
        return "is blank"
    if isinstance(value, str):
        return None
    if isinstance(value, datetime.date):
        return f"is no text but the date {value}, as a JSON file of dates alone is read; give it as CSV or Parquet"
    return f"is no text but {value!r} ({type(value).__name__}); write it as text, in the spelling to be learned"


def _fault_of_messages(messages: list, column: str) -> str | None:
    """
    A message may go without content where it carries something else: a tool call, or a thought. The last answer, which in a
    completion is the last message whoever's, must not be blank.
    """
    if not messages:
        return "has no message" if column != "prompt" else None
    blank_answer = None
    for number, message in enumerate(messages, 1):
        content = message.get("content", message.get("value"))
        said_otherwise = any(value for key, value in message.items() if key not in _MESSAGE_KEYS)
        if content is not None and not isinstance(content, (str, list)):
            return f"has no text in message {number} but {content!r} ({type(content).__name__}); write it as text"
        texts = _texts(content)
        if None in texts and not said_otherwise:
            return f"has no content in message {number}"
        if column == "completion" or (column != "prompt" and is_answer(message)):
            blank = all(isinstance(text, str) and not text.strip() for text in texts)
            blank_answer = number if blank and not said_otherwise else None
    return f"has a blank content in message {blank_answer}" if blank_answer else None


def _texts(content: str | list | None) -> list:
    """Of a message, part by part; of a picture the part itself."""
    parts = content if isinstance(content, list) else [content]
    return [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]


def is_answer(message: dict) -> bool:
    """Whether it is the assistant's; with `from` and `value` that is often `gpt`."""
    return (message.get("role") or message.get("from")) in ("assistant", "gpt")


def _incomplete(name: str, faults: dict[int, tuple[str, str]], rows: int | None = None) -> str:
    first, (column, fault) = next(iter(faults.items()))
    line = _file_line(name, first)
    where = f"Row {first + 1} of {name}" + (f" (line {line})" if line else "")
    others = ""
    if len(faults) > 1:
        numbers = ", ".join(str(i + 1) for i in list(faults)[:_SHOWN_ROWS])
        more = ", ..." if len(faults) > _SHOWN_ROWS else ""
        others = f" It is one of {len(faults)} such rows of {rows}: {numbers}{more}."
    mend = (
        "Mend them: without such rows none is left."
        if len(faults) == rows
        else "Mend it, or leave such rows out with `--drop_incomplete_rows true` (in Python "
        "`trl_ema.data.to_prompt_completion(dataset, drop_incomplete=True)`)."
    )
    return f"{where} is incomplete: column `{column}` {fault}.{others} {mend}"


def _file_line(path: str, row: int) -> int | None:
    """The line on which a row of a CSV or JSONL file begins, counted from 1; `None` for anything else."""
    suffix = os.path.splitext(path)[1].lower()
    if suffix not in (".csv", ".jsonl") or not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace", newline="") as file:
        if suffix == ".jsonl":
            lines = (number for number, line in enumerate(file, 1) if line.strip())
            return next((number for i, number in enumerate(lines) if i == row), None)
        reader, begin, seen = csv.reader(file), 1, -1  # the header is no row
        for cells in reader:
            if cells and seen == row:
                return begin
            seen, begin = seen + bool(cells), reader.line_num + 1
    return None


# Types that hold rows but are no data set, and what makes one of them.
_MADE_BY = {
    "DataFrame": "`Dataset.from_pandas(frame)` (or, of Polars, `Dataset.from_polars(frame)`)",
    "Table": "`Dataset(table)`",
    "list": "`Dataset.from_list(rows)`",
    "tuple": "`Dataset.from_list(list(rows))`",
    "generator": "`Dataset.from_generator(function)`",
    "str": "`load_dataset(name, split='train')`, or for a file `trl_ema.data.load_rows(path)`",
}


def check_dataset(dataset: Any, argument: str) -> None:
    """
    Raises for what TRL cannot take as a data set, saying what to pass instead of it.

    Raises:
        TypeError: It is no `Dataset` or `IterableDataset`.
        ValueError: It has no row.
    """
    if isinstance(dataset, (Dataset, IterableDataset)):
        if next(iter(dataset), None) is None:
            raise ValueError(f"`{argument}` has no row. Look at what loads and filters it.")
        return
    if isinstance(dataset, dict) and any(isinstance(value, (Dataset, IterableDataset)) for value in dataset.values()):
        got = f"a `{type(dataset).__name__}` of {list(dataset)}"
        mend = f"one of them: `{argument}=dataset[{next(iter(dataset))!r}]`"
    elif isinstance(dataset, dict):
        got, mend = f"a `dict` of {list(dataset)}", "`Dataset.from_dict(columns)`"
    else:
        got = f"`{type(dataset).__name__}`"
        mend = _MADE_BY.get(type(dataset).__name__, "`Dataset.from_list(list_of_dicts)`")
    raise TypeError(
        f"`{argument}` must be a `Dataset` or `IterableDataset` of the package `datasets`, got {got}. Pass {mend}."
    )
