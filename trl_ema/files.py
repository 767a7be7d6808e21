"""JSON files that are whole or not there: written under a temporary name, then renamed."""

import json
import os
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
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: str | Path) -> Any:
    """The value in a JSON file."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]
