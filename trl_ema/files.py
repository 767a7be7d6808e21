"""Files and folders that are whole or not there: written under a temporary name, then renamed."""

import contextlib
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml


def shipped(name: str) -> Path:
    """
    A folder that comes with the package, `recipes` or `accelerate_configs`: in it where it is installed, beside it in a source
    tree.

    Raises:
        FileNotFoundError: It is in neither place.
    """
    package = Path(__file__).parent
    for folder in (package / name, package.parent / name):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(
        f"There is no folder `{name}`, neither in {package}, where an installation has it, nor beside it, where a source tree does. "
        "Install the package anew: `pip install --force-reinstall --no-deps trl_ema`."
    )


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


def follow_umask(folder: str | Path) -> None:
    """
    Give the weights in `folder` the permissions that any other new file has there: safetensors writes for the owner alone,
    and on a shared machine nobody else could load them.
    """
    weights = list(Path(folder).glob("*.safetensors"))
    if not weights:
        return
    # Ask by example: a process cannot read its umask without changing it for a moment, for all of its threads.
    example = Path(folder, f".permissions.{os.getpid()}")
    example.touch()
    mode = stat.S_IMODE(example.stat().st_mode)
    example.unlink()
    for path in weights:
        with contextlib.suppress(PermissionError):  # some mounts know no permissions
            path.chmod(mode)


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


@contextlib.contextmanager
def new_folder(target: str) -> Iterator[str]:
    """
    Context with a folder to write to, beside `target`, which takes that name when it is left. After an error nothing is left of
    it; what a kill leaves, the next one for the same `target` removes.
    """
    scratch = _beside(os.path.normpath(target), "part")
    shutil.rmtree(scratch, ignore_errors=True)
    os.makedirs(scratch)
    try:
        yield scratch
        follow_umask(scratch)
        os.rename(scratch, target)  # over an empty folder too
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_folder(path: str) -> None:
    """Remove a folder, renamed first: a kill leaves no half of it under its name, and [`finish_replacing`] does the rest."""
    gone = _beside(path, "gone")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def finish_replacing(folder: str) -> None:
    """Finish, in `folder`, what a kill interrupted: a new folder takes its place, an old or removed one goes."""
    for new in Path(folder).glob(f"{_HIDDEN}*.new"):
        with contextlib.suppress(FileNotFoundError):  # another machine was faster
            if not _target_of(new).exists():
                new.rename(_target_of(new))
    for scratch in (*Path(folder).glob(f"{_HIDDEN}*.new"), *Path(folder).glob(f"{_HIDDEN}*.old")):
        if _target_of(scratch).exists():
            shutil.rmtree(scratch, ignore_errors=True)
    for gone in Path(folder).glob(f"{_HIDDEN}*.gone"):
        shutil.rmtree(gone, ignore_errors=True)


# Not the name of a checkpoint, and left out of pushes to the hub.
_HIDDEN = "_replacing-"


def _beside(target: str, kind: str) -> str:
    folder, name = os.path.split(target)
    return os.path.join(folder, f"{_HIDDEN}{name}.{kind}")


def _target_of(scratch: Path) -> Path:
    return scratch.with_name(scratch.stem.removeprefix(_HIDDEN))


def read_json(path: str | Path) -> Any:
    """The value in a JSON file. Raises `ValueError`, naming it, if it is damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and run what wrote it again.") from error


def read_jsonl(path: str | Path) -> list[dict]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line]


def read_yaml(path: str | Path) -> Any:
    """The value in a YAML file. Raises `ValueError`, naming it and where known the line, if it is none."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        told = getattr(error, "problem", None) or error
        raise ValueError(
            f"{path}{line}: no valid YAML ({told}). Look there and before it for a bracket or quotation mark that is not closed, a tab, or "
            "a value with `: ` that stands without quotation marks; the file is to be UTF-8."
        ) from error
