"""What is to be measured of a model, read from a plan and checked. Light: a report reads it too."""

import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..options import plain_count, plain_number, take_booleans
from .answers import CURVE, GENERATIONS, TEXT


METRICS = ("acc_norm", "acc")
# Entries of the file that loss and drift are kept in.
_RESERVED = ("answered", "domain", "general", "generation", "key", "provenance")


@dataclass(frozen=True)
class TaskSettings:
    """
    What decides the questions of a task and how they are asked.

    Args:
        num_fewshot (`int`, *optional*): Examples before each question; the task's own number by default.
        limit (`int` or `float`, *optional*): The first so many questions of each subtask, or below 1 that share of them, as in
            lm-eval.
        sample (`int`, *optional*): So many questions of the whole task, drawn with `seed`, every subtask in its share.
        apply_chat_template (`bool`): Ask as a chat.
        seed (`int`): Of the sample and of the few-shot examples.
        metric (`str`, *optional*): lm-eval's `acc` or `acc_norm` (by length); `acc_norm` by default where there is one.
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    sample: int | None = None
    apply_chat_template: bool = False
    seed: int = 1234
    metric: str | None = None

    def __post_init__(self) -> None:
        take_booleans(self)
        if self.metric not in (None, *METRICS):
            raise ValueError(
                f"`metric` must be one of {METRICS}, got {self.metric!r}. Leave it out for the task's own."
            )
        if self.limit is not None and self.sample is not None:
            raise ValueError(f"`limit={self.limit}` and `sample={self.sample}` both choose the questions. Give one.")
        if self.limit is not None:
            object.__setattr__(self, "limit", plain_number("limit", self.limit))  # of a frozen dataclass
        if self.sample is not None and plain_number("sample", self.sample) < 1:
            raise ValueError(f"`sample` must be at least 1, got {self.sample}. Leave it out for every question.")
        if self.limit is not None and not (0 < self.limit < 1 or (self.limit >= 1 and self.limit % 1 == 0)):
            raise ValueError(
                f"`limit` must be a number of questions, or a share of them below 1, got {self.limit}. Leave it out for every "
                "question."
            )
        _take_counts(self, {"num_fewshot": 0, "sample": 1, "seed": 0})


@dataclass(frozen=True)
class Suite:
    """
    What to measure.

    Args:
        retention_tasks (`dict`): lm-eval task or group to its [`TaskSettings`]: what must not be forgotten.
        domain_tasks (`dict`): The same for the domain.
        drift_data (`dict`): Name to a file (or hub name) of further general texts for loss and drift, beside the built-in
            `general` rows.
        scales (`tuple`): Factors of each adapter's update at which loss and drift are measured too, beside 1.
        domain_samples (`int`): Held-out rows for loss, drift and generations.
        generation_tokens (`int`): Tokens per generated answer; 0 for no generations.
        max_length (`int`): Tokens per row of the loss and the drift.
        batch_size (`int`, *optional*): Found automatically by default.
    """

    retention_tasks: dict[str, TaskSettings] = field(default_factory=dict)
    domain_tasks: dict[str, TaskSettings] = field(default_factory=dict)
    drift_data: dict[str, str] = field(default_factory=dict)
    scales: tuple[float, ...] = ()
    domain_samples: int = 128
    generation_tokens: int = 48
    max_length: int = 1024
    batch_size: int | None = None

    @classmethod
    def from_dict(cls, options: dict) -> "Suite":
        """From the `evaluation` part of a YAML file; tasks are mappings, or null for their defaults."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(options) - known)
        if unknown:
            raise ValueError(f"Unknown evaluation options {unknown}; expected some of {sorted(known)}.")
        options = dict(options)
        for name in ("retention_tasks", "domain_tasks"):
            options[name] = _tasks(name, options.get(name) or {})
        twice = set(options["retention_tasks"]) & set(options["domain_tasks"])
        if twice:
            raise ValueError(f"Tasks {sorted(twice)} are both retention and domain tasks. Name each once.")
        return cls(**options)

    def __post_init__(self) -> None:
        _take_counts(self, {"domain_samples": 1, "generation_tokens": 0, "max_length": 2, "batch_size": 1})
        object.__setattr__(self, "drift_data", _drift_data(self.drift_data or {}))
        object.__setattr__(self, "scales", _scales(self.scales or ()))

    @property
    def general_texts(self) -> list[str]:
        """Names of the texts that drift away from the domain is measured on."""
        return ["general", *self.drift_data]

    @property
    def tasks(self) -> dict[str, TaskSettings]:
        """Retention and domain tasks together."""
        return self.retention_tasks | self.domain_tasks

    def missing_files(self, folder: str | Path, curve: bool = False) -> list[Path]:
        """
        What [`evaluate_model`] has not written into `folder`; empty if the evaluation there is whole. With `curve` the file of
        the other scales is a part of it.
        """
        names = [TEXT] + [f"{task}.{ending}" for task in self.tasks for ending in ("json", "jsonl")]
        names += [GENERATIONS] if self.generation_tokens else []
        names += [CURVE] if curve and self.scales else []
        return [path for path in (Path(folder, name) for name in names) if not path.is_file()]


def _take_counts(settings: TaskSettings | Suite, least: dict[str, int]) -> None:
    """Those fields of a frozen dataclass become whole numbers of at least so much, see [`plain_count`]; optional ones may be `None`."""
    optional = {f.name for f in fields(settings) if f.default is None}
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None or name not in optional:
            object.__setattr__(settings, name, plain_count(name, value, smallest))


def _drift_data(files: Any) -> dict[str, str]:
    if not isinstance(files, dict) or not all(isinstance(path, str) for path in files.values()):
        raise ValueError(
            f"`drift_data` is {files!r}; expected files by name, such as `{{encyclopaedia: articles.jsonl}}`."
        )
    for name in files:
        if not re.fullmatch(r"[\w.-]+", str(name)) or name in _RESERVED:
            raise ValueError(
                f"`drift_data` has a text named {name!r}; use letters, digits, `_`, `-` and `.`, and none of {_RESERVED}."
            )
    return {str(name): path for name, path in files.items()}


def _scales(scales: Any) -> tuple[float, ...]:
    if not isinstance(scales, list | tuple):
        raise ValueError(f"`scales` is {scales!r}; expected a list of factors such as [0.25, 0.5, 0.75].")
    found = [float(plain_number("scales", scale)) for scale in scales]
    if any(scale <= 0 or scale == 1 for scale in found) or len(set(found)) < len(found):
        raise ValueError(
            f"`scales` must be different factors above 0, got {scales!r}. 0 is the base and 1 the adapter itself: both are "
            "measured anyway."
        )
    return tuple(sorted(found))


def _tasks(group: str, tasks: Any) -> dict[str, TaskSettings]:
    known = {f.name for f in fields(TaskSettings)}
    if not isinstance(tasks, dict) or not all(isinstance(given, dict | None) for given in tasks.values()):
        raise ValueError(
            f"`{group}` is {tasks!r}; expected tasks with their settings, such as `hellaswag: {{limit: 100}}`."
        )
    for task, given in tasks.items():
        unknown = sorted(set(given or {}) - known)
        if unknown:
            raise ValueError(f"Task {task!r} has unknown settings {unknown}; expected some of {sorted(known)}.")
    return {task: TaskSettings(**(given or {})) for task, given in tasks.items()}
