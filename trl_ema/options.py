"""Options of every command as plain numbers and booleans, whatever they were written as. It knows no other library."""

import numbers
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
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
