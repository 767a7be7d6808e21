"""Options that several commands have, as plain values, whatever they were written as. It knows no other library."""

import numbers
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import Any


# What the command line takes for a boolean: the words of transformers' parser.
_WORDS = {
    **dict.fromkeys(("yes", "true", "t", "y", "1"), True),
    **dict.fromkeys(("no", "false", "f", "n", "0"), False),
}


def plain_bool(name: str, value: Any) -> bool:
    """
    `value` as a `bool`: of text the words of the command line, of numbers 0 and 1.

    Raises:
        TypeError: It is neither.
    """
    try:
        found = _WORDS.get(value.lower()) if isinstance(value, str) else bool(value) if value in (0, 1) else None
    except (ValueError, TypeError):  # an array
        found = None
    if found is None:
        raise TypeError(f"`{name}` must be a boolean, got {value!r} ({type(value).__name__}). Use True or False.")
    return found


def take_booleans(config: Any) -> None:
    """Every field of a dataclass that is a boolean becomes one, see [`plain_bool`]: the text "false" would count as true."""
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type is bool or (f.type == bool | None and value is not None):
            object.__setattr__(config, f.name, plain_bool(f.name, value))  # a dataclass may be frozen


def plain_number(name: str, value: Any) -> int | float:
    """
    `value` as an `int` where it is whole of its type, else as a `float`.

    Raises:
        TypeError: It is no number; a boolean is none.
    """
    number = value
    if getattr(value, "shape", None) == ():  # of NumPy or PyTorch
        number = value.item()
    if isinstance(number, bool) or not isinstance(number, numbers.Real | Decimal):
        raise TypeError(f"`{name}` must be a number, got {value!r} ({type(value).__name__}).")
    return int(number) if isinstance(number, numbers.Integral) else float(number)


def plain_count(name: str, value: Any, least: int, hint: str = "") -> int:
    """
    `value` as an `int` of at least `least`; a whole number may be written with a point.

    Raises:
        TypeError: It is no number.
        ValueError: It is no whole number, or a smaller one; the text ends with `hint`.
    """
    number = plain_number(name, value)
    if number % 1 or number < least:
        raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}. {hint}".rstrip())
    return int(number)


@contextmanager
def changed(config: Any, **values: Any) -> Iterator[None]:
    """Within this context the config, or whatever has these attributes, has other values."""
    before = {name: getattr(config, name) for name in values}
    try:
        for name, value in values.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def warn_about_ignored(args: Any, unread: Iterable[str], given: str) -> None:
    """
    Warns of options that have another value than their default and are not read. To be called in `__post_init__`.

    Args:
        unread (`Iterable[str]`): Names of options of the dataclass `args` that are not read beside what is given.
        given (`str`): That, as the warning says it.
    """
    default = {f.name: f.default for f in fields(args)}
    ignored = [f"`{name}={getattr(args, name)!r}`" for name in unread if getattr(args, name) != default[name]]
    if ignored:
        warnings.warn(f"Ignored with {given}: {', '.join(ignored)}.", stacklevel=4)


@dataclass
class RowsArguments:
    """Rows of a data set to measure on, named and read as those of a training."""

    dataset_name: str | None = field(default=None, metadata={"help": "Rows (hub name or file) to measure on."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of `dataset_name` on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split of `dataset_name`; a single file is `train`."})
    dataset_columns: list[str] | None = field(
        default=None,
        metadata={
            "help": "Which column of `dataset_name` is which, where they are of no known format: `prompt=Question completion=Reply`; in "
            "YAML a mapping."
        },
    )
    dataset_samples: int = field(default=128, metadata={"help": "Rows of `dataset_name` at most, seeded."})
    drop_incomplete_rows: bool = field(
        default=False, metadata={"help": "Leave out rows of `dataset_name` in which a text is missing."}
    )
    seed: int = field(default=1234, metadata={"help": "Of the choice of rows."})


def take_columns(args: Any) -> None:
    """
    `dataset_columns` of a command line, `prompt=Question completion=Reply`, becomes a mapping, as YAML has it.

    Raises:
        ValueError: It is no such pairs, one of ours is given twice, or there is no `dataset_name` that it is of.
    """
    columns = args.dataset_columns
    if columns is None:
        return
    if args.dataset_name is None:
        raise ValueError(
            "`dataset_columns` is of a `dataset_name`, and none is given. Give that too; the rows that a run held out are read as the run "
            "was told, and an entry of `datasets` has `columns`."
        )
    if isinstance(columns, dict):
        return
    pairs = [str(pair).partition("=") for pair in columns]
    if not all(ours and theirs for ours, _, theirs in pairs):
        raise ValueError(
            f"`dataset_columns` is {columns}; expected pairs such as `prompt=Question completion=Reply`, our name first."
        )
    named = [ours for ours, _, _ in pairs]
    twice = [ours for ours in named if named.count(ours) > 1]
    if twice:
        raise ValueError(f"`dataset_columns` names two columns as {twice[0]!r}: {columns}. Give each of ours once.")
    args.dataset_columns = {ours: theirs for ours, _, theirs in pairs}
