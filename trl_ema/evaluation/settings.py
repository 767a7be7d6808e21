"""What is to be measured of a model, read from a plan and checked. Light: a report reads it too."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..options import plain_bool, plain_count, plain_number, take_booleans
from .answers import CURVE, GENERATIONS, TEXT


# A metric of lm-eval, and behind the @ one of the task's filters.
_METRIC = r"[^\s@]+(@[^\s@]+)?"
# Options that came later than the first answers: without them these keep their key.
LATER = ("gen_kwargs",)
# What is asked together, by name; see `suite_tasks`.
SUITES = {
    "medical": ("multimedqa", "mmlu_general", "ifeval", "hellaswag"),
    "retention": ("mmlu_general", "hellaswag", "arc_challenge", "winogrande", "ifeval", "gsm8k"),
}
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
        metric (`str`, *optional*): What of lm-eval's figures of a question is its score, `metric` or `metric@filter`. By default
            `acc_norm` where there is one, else `acc`, else the task's first; of its first filter.
        gen_kwargs (`dict`, *optional*): How answers are generated, beside and instead of the task's own settings; a mapping, or the
            text `key=value,key=value` or one in JSON.
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    sample: int | None = None
    apply_chat_template: bool = False
    seed: int = 1234
    metric: str | None = None
    gen_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        take_booleans(self)
        if self.metric is not None and not re.fullmatch(_METRIC, str(self.metric)):
            raise ValueError(
                f"`metric` must be the name of a metric, or `metric@filter`, got {self.metric!r}. Try `acc`, or "
                "`exact_match@strict-match`, or leave it out for the task's own."
            )
        object.__setattr__(self, "gen_kwargs", _gen_kwargs(self.gen_kwargs))  # of a frozen dataclass
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
        suite (`str`, *optional*): One of [`SUITES`], whose tasks are asked too; those named above as they are there.
        include_path (`list[str]`): Folders with further tasks in lm-eval's YAML.
        offline (`bool`, *optional*): Questions from the package registry; by default if the hub does not answer.
        drift_data (`dict`): Name to a file or hub name of further general texts for loss and drift, beside the built-in `general`
            rows; or to an entry as of `datasets`.
        drift_on (`list[str]`, *optional*): Those of these texts, `general` among them, whose mean is the drift of the map. All of
            them by default.
        scales (`tuple`): Factors of each adapter's update at which loss and drift are measured too, beside 1.
        domain_samples (`int`): Held-out rows for loss, drift and generations.
        generation_tokens (`int`): Tokens per generated answer; 0 for no generations.
        max_length (`int`): Tokens per row of the loss and the drift.
        batch_size (`int`, *optional*): Found automatically by default.
        bf16 (`bool`): Loss and drift under bfloat16 autocast, as a training with `bf16` runs; the head's products as without it.
    """

    retention_tasks: dict[str, TaskSettings] = field(default_factory=dict)
    domain_tasks: dict[str, TaskSettings] = field(default_factory=dict)
    suite: str | None = None
    include_path: list[str] = field(default_factory=list)
    offline: bool | None = None
    drift_data: dict[str, str | dict] = field(default_factory=dict)
    drift_on: list[str] = field(default_factory=list)
    scales: tuple[float, ...] = ()
    domain_samples: int = 128
    generation_tokens: int = 48
    max_length: int = 1024
    batch_size: int | None = None
    bf16: bool = False

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
        if self.suite is not None and self.suite not in SUITES:
            raise ValueError(f"`suite` of the evaluation is {self.suite!r}; expected one of {list(SUITES)}.")
        object.__setattr__(self, "include_path", _folders(self.include_path))  # of a frozen dataclass
        if self.offline is not None:
            object.__setattr__(self, "offline", plain_bool("offline", self.offline))
        _take_counts(self, {"domain_samples": 1, "generation_tokens": 0, "max_length": 2, "batch_size": 1})
        object.__setattr__(self, "drift_data", _drift_data(self.drift_data or {}))
        object.__setattr__(self, "drift_on", _drift_on(self.drift_on, self.general_texts))
        object.__setattr__(self, "scales", _scales(self.scales or ()))
        if not isinstance(self.bf16, bool):
            raise ValueError(f"`bf16` of the evaluation is {self.bf16!r}; expected true or false.")

    @property
    def general_texts(self) -> list[str]:
        """Names of the texts that loss and drift away from the domain are measured on."""
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


def _gen_kwargs(given: Any) -> dict[str, Any] | None:
    """The settings of generation as a mapping; none for an empty one."""
    found = given
    if isinstance(given, str):
        try:
            found = json.loads(given)
        except ValueError:
            pairs = [part.strip().partition("=") for part in given.split(",") if part.strip()]
            found = {name: _value(value) for name, sign, value in pairs if name and sign}
            found = found if len(found) == len(pairs) else given
    if not isinstance(found, dict | None):
        raise ValueError(
            f"`gen_kwargs` is {given!r}; expected `key=value,key=value`, such as `max_gen_toks=64,temperature=0.5`, or a mapping."
        )
    return found or None


def _value(text: str) -> Any:
    """A number or a boolean where the text is one."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False}.get(text, text)


def parse_tasks(name: str, entries: Sequence[str]) -> dict[str, TaskSettings]:
    """
    Tasks written as `TASK` (all its questions) or `TASK:N` (N of them, drawn with the seed).

    Args:
        name (`str`): Of the option, for the message.

    Raises:
        ValueError: An entry is neither, or a task stands there twice.
    """
    found: dict[str, TaskSettings] = {}
    for entry in entries:
        task, colon, count = str(entry).partition(":")
        if not task or (colon and not re.fullmatch(r"[1-9]\d*", count)):
            raise ValueError(
                f"`{name}` has {entry!r}; expected a task, or `TASK:N` for N of its questions, such as `hellaswag:100`."
            )
        if task in found:
            raise ValueError(f"`{name}` names the task {task!r} twice. Name each once.")
        found[task] = TaskSettings(sample=int(count) if colon else None)
    return found


def _take_counts(settings: TaskSettings | Suite, least: dict[str, int]) -> None:
    """Those fields of a frozen dataclass become whole numbers of at least so much, see [`plain_count`]; optional ones may be `None`."""
    optional = {f.name for f in fields(settings) if f.default is None}
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is not None or name not in optional:
            object.__setattr__(settings, name, plain_count(name, value, smallest))


def _folders(given: Any) -> list[str]:
    found = [given] if isinstance(given, str) else given or []
    if not isinstance(found, list | tuple) or not all(isinstance(path, str) for path in found):
        raise ValueError(
            f"`include_path` is {given!r}; expected a list of folders with tasks in lm-eval's YAML, such as `[my_tasks]`."
        )
    return list(found)


def _drift_data(files: Any) -> dict[str, str | dict]:
    if not isinstance(files, dict) or not all(isinstance(path, str | dict) for path in files.values()):
        raise ValueError(
            f"`drift_data` is {files!r}; expected files by name, such as `{{encyclopaedia: articles.jsonl}}`."
        )
    for name in files:
        if not re.fullmatch(r"[\w.-]+", str(name)) or name in _RESERVED:
            raise ValueError(
                f"`drift_data` has a text named {name!r}; use letters, digits, `_`, `-` and `.`, and none of {_RESERVED}."
            )
    return {str(name): path for name, path in files.items()}


def _drift_on(names: Any, texts: list[str]) -> list[str]:
    if names is not None and (not isinstance(names, list | tuple) or len(set(map(str, names))) < len(names)):
        raise ValueError(f"`drift_on` is {names!r}; expected a list of different texts, such as {texts}.")
    unknown = [name for name in names or () if name not in texts]
    if unknown:
        raise ValueError(f"`drift_on` names {unknown}; expected some of {texts}, `general` and those of `drift_data`.")
    return list(names or texts)


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
