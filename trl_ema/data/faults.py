"""What is wrong with a data file, and in which line: the libraries that read it say neither which file nor how to mend it."""

import codecs
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
from datasets.exceptions import DatasetGenerationError
from pyarrow import parquet


FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@contextmanager
def file_errors(name: str, files: Iterable[str]) -> Iterator[None]:
    """
    Within this context the many errors about a damaged file become a `ValueError` with its name and, where known, the line.

    Args:
        name (`str`): Of the data set, for an error of which the file is not found.
        files: Those that it is read from.
    """
    try:
        yield
    except (ValueError, DatasetGenerationError) as error:  # those of pandas, pyarrow and decoding are the former
        fault = next(filter(None, map(_fault, files)), None)
        if fault is None:
            cause = error.__cause__ or error if type(error) is DatasetGenerationError else error
            fault = f"{name} cannot be read ({type(cause).__name__}: {' '.join(str(cause).split())})."
        raise ValueError(fault) from error


def csv_columns(path: str) -> list[str]:
    """
    Columns of a CSV file.

    Raises:
        ValueError: It cannot be read, its cells are not parted by commas, its rows have more of them than its header, or two of its
            columns have one name.
    """
    with file_errors(path, [path]):
        head = pd.read_csv(path, nrows=1, dtype=str)
        header = pd.read_csv(path, nrows=1, dtype=str, header=None, keep_default_na=False).iloc[0]
    columns = list(head.columns)
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and mark in columns[0]:
            raise ValueError(
                f"{path} has one column, {columns[0]!r}: its cells are parted by {called}. Save it anew with commas between them."
            )
    if len(head) and not isinstance(head.index, pd.RangeIndex):  # pandas would take the first cells for names of rows
        raise ValueError(f"{path} has more cells in its first row than columns in its header. {_QUOTES}")
    twice = header[(header != "") & header.duplicated()]
    if len(twice):  # the second would be read under a name that nobody gave, and the first in its place
        raise ValueError(
            f"{path} has two columns of the name {twice.iloc[0]!r}. Rename one of them, or leave it out: nobody could tell which is meant."
        )
    return columns


_QUOTES = "A cell with a comma, a quotation mark or a line break in it has to stand between quotation marks."


def _fault(path: str) -> str | None:
    """What is wrong with a file, by reading it once more; `None` if nothing is found."""
    kind = FILE_FORMATS.get(os.path.splitext(path)[1].lower())
    try:
        if kind == "parquet":
            parquet.read_metadata(path)
        elif kind is not None:
            check_utf8(path)
        if kind == "json":
            _check_json(path)
        if kind == "csv":
            for _ in pd.read_csv(path, dtype=str, chunksize=10_000):
                pass
    except pd.errors.ParserError as error:
        return f"{path} cannot be read: {str(error).strip()}. {_QUOTES}"
    except ValueError as error:
        return f"{path} cannot be read: {error}"
    return None


def check_utf8(path: str) -> None:
    """Raises `ValueError`, naming the line, unless a file is UTF-8."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                # Western tables are of the former, which has all letters of Latin-1.
                is_utf16 = number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
                encoding = "utf-16" if is_utf16 else "windows-1252"
                raise ValueError(
                    f"line {number} is not UTF-8 (byte 0x{line[error.start]:02x}). Save it as UTF-8, in Excel as `CSV UTF-8`, or convert "
                    f"it: `iconv -f {encoding} -t utf-8 {path} > utf8{os.path.splitext(path)[1]}`."
                ) from error


def _check_json(path: str) -> None:
    """One object a line, or all in a list."""
    content = Path(path).read_bytes().removeprefix(codecs.BOM_UTF8)
    one_list = content.lstrip().startswith(b"[")
    for number, text in enumerate([content] if one_list else content.split(b"\n"), 1):
        try:
            if text.strip() and not isinstance(json.loads(text), list if one_list else dict):
                raise ValueError(f"line {number} is no JSON object. Write one a line, or all in a list.")
        except json.JSONDecodeError as error:
            line = error.lineno if one_list else number
            raise ValueError(
                f"line {line} is no JSON ({error.msg}, column {error.colno}). Write one whole object a line, or all in a list."
            ) from error
