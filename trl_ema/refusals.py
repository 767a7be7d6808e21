"""What a training would refuse, all of it at once: also of its options, of which each is looked at without those that are refused."""

import argparse
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .files import read_yaml, write_text
from .options import changed


Made = TypeVar("Made")

_REFUSING = (ValueError, TypeError, OSError, ImportError, RuntimeError)
# How torch speaks of a tensor that has no values; "metadata" and the like are of others.
_OF_META = re.compile(r"\b[Mm]eta tensors?\b|device='?meta\b|device meta\b|'Meta' backend|register_meta function")
# Without them it would be another training that is looked at.
_KEPT = ("config", "model_name_or_path", "adapter_name_or_path")


@dataclass
class Refusals:
    """
    What a training would refuse, in the order in which it is found, each once.

    Args:
        found: The refusals.
        unseen: What could not be looked at, since an operation takes values that a model without weights does not have.
        left_out: Options that are refused, and without which the others are looked at.
        of_machine: What would be refused on this machine, which has no GPU, and on one with a GPU would not: no refusal of the options.
    """

    found: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    of_machine: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """What is raised within this context is kept, and the context left."""
        try:
            yield
        except _REFUSING as error:
            self.add(error)

    def add(self, error: Exception) -> None:
        kept = self.unseen if is_hollow(error) else self.found
        if str(error) not in kept:
            kept.append(str(error))


def is_hollow(error: Exception) -> bool:
    """Whether it is of the missing weights, and none of a training."""
    return isinstance(error, RuntimeError) and _OF_META.search(str(error)) is not None


@dataclass(frozen=True)
class Given:
    """
    Options as they are given, so that each can be left out.

    Args:
        words (`tuple`): Those of the command line, each with its values behind it.
        file (`str`, *optional*): The YAML file that has the others.
        unread (`frozenset`): Which of the file are left out.
    """

    words: tuple[tuple[str, ...], ...]
    file: str | None = None
    unread: frozenset[str] = frozenset()

    @classmethod
    def on(cls, arguments: list[str], file: str | None = None) -> "Given":
        """What is on a command line; with `file` it is read in the place of its `--config`."""
        words: list[tuple[str, ...]] = []
        for word in arguments:
            if word.startswith("--") or not words:
                words.append((word,))
            else:
                words[-1] += (word,)
        return cls(tuple(one for one in words if file is None or _name(one) != "config"), file)

    @property
    def names(self) -> list[str]:
        """Of the options that can be left out."""
        of_file = [] if self.file is None else [str(name) for name in read_yaml(self.file) if name not in self.unread]
        return [name for name in dict.fromkeys([*map(_name, self.words), *of_file]) if name not in _KEPT]

    def value(self, name: str) -> Any:
        """What an option is given as, on the command line as text; `None` where it is not given."""
        on_line = [one for one in self.words if _name(one) == name]
        if on_line:
            first, *values = on_line[-1]
            return first.partition("=")[2] or next(iter(values), None)
        return None if self.file is None or name in self.unread else read_yaml(self.file).get(name)

    def without(self, name: str) -> "Given":
        words = tuple(one for one in self.words if _name(one) != name)
        return replace(self, words=words, unread=self.unread | {name})

    def arguments(self, folder: str) -> list[str]:
        """The command line. In `folder` what is left of the file is written."""
        words = [word for option in self.words for word in option]
        if self.file is None:
            return words
        path, options = self.file, read_yaml(self.file)
        if self.unread & {*options}:
            path = str(Path(folder, "config.yaml"))
            left = {name: value for name, value in options.items() if name not in self.unread}
            write_text(Path(path), yaml.safe_dump(left))
        return ["--config", path, *words]


def _name(option: tuple[str, ...]) -> str:
    return option[0].split("=")[0].lstrip("-").replace("-", "_")


def as_far_as_it_goes(make: Callable[[Given], Made], given: Given, refusals: Refusals) -> Made | None:
    """
    What is made of the options; where some are refused that is collected, and it is made of the others.

    Whose fault a refusal is shows in what happens without an option: there is none, or another one. Options that the refusal
    speaks of are tried first. A refusal that speaks of one that is left out comes of that, and is not collected.

    Returns:
        `None` where something is refused that no single option can be blamed for.
    """
    made, error = _tried(make, given)
    while error is not None:
        if not any(_speaks_of(name, error) for name in refusals.left_out):
            refusals.add(error)
        with warnings.catch_warnings(action="ignore"):  # of what is left out
            fault = _fault(make, given, error)
            if fault is None:
                return None
            refusals.left_out.append(fault)
            given = given.without(fault)
            made, error = _tried(make, given)
    return made


def _tried(make: Callable[[Given], Made], given: Given) -> tuple[Made | None, Exception | None]:
    try:
        with changed(argparse.ArgumentParser, error=_raise):  # which would end the process
            return make(given), None
    except _REFUSING as error:
        return None, error


def _raise(parser: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(message)


def _fault(make: Callable[[Given], Any], given: Given, error: Exception) -> str | None:
    """The option without which there is no such error."""
    spoken_of = [name for name in given.names if _speaks_of(name, error)]
    words = {*re.findall(r"\w+", str(error))}
    mentioned = [name for name in given.names if name in words and name not in spoken_of]
    others = [name for name in given.names if name not in {*spoken_of, *mentioned}]
    for names in (spoken_of, mentioned, others):
        left = {name: _tried(make, given.without(name))[1] for name in names}
        found = next((name for name, then in left.items() if then is None), None)
        found = found or next((name for name, then in left.items() if str(then) != str(error)), None)
        if found is not None:
            return found
    return None


def _speaks_of(name: str, error: Exception) -> bool:
    return re.search(rf"(`|--){re.escape(name)}\b", str(error)) is not None
