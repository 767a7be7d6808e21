"""JSON files that are whole or not there: written under a temporary name, then renamed."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any


class OutputError(OSError):
    """A folder for results that cannot be written to, or is full."""


def check_output_dir(output_dir: str) -> None:
    """Raises [`OutputError`] unless files can be written to `output_dir`, which is made."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        with tempfile.TemporaryFile(dir=output_dir):
            pass
    except OSError as error:
        raise OutputError(
            f"Cannot write to `output_dir={output_dir!r}` ({error.strerror}). Choose another `--output_dir`, or change its "
            "permissions."
        ) from error


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path`, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_json(path: str | Path, value: Any) -> None:
    """Write `value` as indented JSON; what JSON has no form for becomes its string."""
    text = json.dumps(_without_nan(value), indent=2, ensure_ascii=False, default=str, allow_nan=False)
    write_text(path, text + "\n")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def replace_folder(source: str, target: str) -> None:
    """
    Rename the folder `source` to `target`; what is there is moved aside first and removed last. Without `source` it raises
    `FileNotFoundError` and leaves `target` alone. After a kill in between, [`finish_replacing`] does the rest.
    """
    new, old = _beside(target, "new"), _beside(target, "old")
    for scratch in (new, old):
        shutil.rmtree(scratch, ignore_errors=True)
    os.rename(source, new)
    if os.path.isdir(target):
        os.rename(target, old)
    os.rename(new, target)
    shutil.rmtree(old, ignore_errors=True)


def finish_replacing(folder: str) -> None:
    """Put every new folder in its place, in `folder`, whose replacement by [`replace_folder`] was interrupted."""
    for new in Path(folder).glob(".*.new"):
        target = new.with_name(new.name[1:].removesuffix(".new"))
        if not target.exists():
            new.rename(target)


def _beside(target: str, kind: str) -> str:
    """Hidden, and not by the name of a checkpoint."""
    folder, name = os.path.split(target)
    return os.path.join(folder, f".{name}.{kind}")


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises `ValueError`, naming it, if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and run what wrote it again.") from error


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
