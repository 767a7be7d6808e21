"""What an evaluation leaves behind: names of its files, and the answers in them, read and paired. Light: a report reads it too."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json, read_jsonl


TEXT = "text.json"
# Loss and drift of the adapter at other scales.
CURVE = "curve.json"
GENERATIONS = "generations.jsonl"
# What a model runs in unless its answers say otherwise.
BACKEND = "transformers"


def summarize(rows: list[dict]) -> dict:
    """Mean score, number of questions and chance level, in all and for each subtask."""
    by_task = defaultdict(list)
    for row in rows:
        by_task[row["task"]].append(row)

    def mean(rows: list[dict], name: str) -> float:
        return sum(row[name] for row in rows) / len(rows)

    return {
        # Of a group's tasks not always the same.
        "metric": ", ".join(dict.fromkeys(row["metric"] for row in rows)),
        "score": mean(rows, "score"),
        "chance": mean(rows, "chance"),
        "n": len(rows),
        "subtasks": {task: {"score": mean(part, "score"), "n": len(part)} for task, part in sorted(by_task.items())},
    }


def paired_scores(before: str | Path, after: str | Path) -> tuple[list[float], list[float], list[dict]]:
    """
    Scores of the same questions in two evaluations, in the same order, and the first one's rows.

    Args:
        before, after (`str`): The `TASK.jsonl` files of two evaluations.

    Raises:
        ValueError: The two were not asked the same questions in the same words, are scored by different metrics, or come from two
            backends, whose rounding alone changes answers.
    """
    rows = [{(r["task"], r["doc_id"], r["doc_hash"]): r for r in read_jsonl(path)} for path in (before, after)]
    ours, theirs = rows
    if ours.keys() != theirs.keys() or any(ours[q]["prompt_hash"] != theirs[q]["prompt_hash"] for q in ours):
        shared = sum(q in theirs and ours[q]["prompt_hash"] == theirs[q]["prompt_hash"] for q in ours)
        raise ValueError(
            f"{before} and {after} are answers to different questions ({len(ours)} and {len(theirs)}, {shared} in common "
            "with the same prompt), so they cannot be compared. Evaluate both with the same `limit`, `sample`, `seed` and "
            "`num_fewshot`."
        )
    kinds = [
        {
            what: ", ".join(sorted({str(row.get(what, default)) for row in found.values()}))
            for what, default in (("metric", None), ("backend", BACKEND))
        }
        for found in rows
    ]
    _check_alike(before, after, *kinds)
    return [r["score"] for r in ours.values()], [theirs[q]["score"] for q in ours], list(ours.values())


def check_against(before: str, after: str, task: str, settings: Mapping[str, Any], backend: str) -> None:
    """
    Before a model is loaded: whether its answers to a task can be paired with those of an earlier evaluation.

    Args:
        before, after (`str`): Folders of the two.
        settings (`dict`): How the task is to be asked, the fields of [`TaskSettings`].
        backend (`str`): See [`evaluate_tasks`].

    Raises:
        FileNotFoundError: There are no earlier ones.
        ValueError: They were asked otherwise, or in another backend.
    """
    answers, kept = Path(before, f"{task}.jsonl"), Path(before, f"{task}.json")
    if not answers.is_file():
        raise FileNotFoundError(
            f"`against={before!r}` has no answers to {task!r} ({answers.name}). Evaluate the model to compare with on it first, or leave "
            "the task out."
        )
    known = read_json(kept) if kept.is_file() else {}
    if "settings" in known:
        theirs = {"backend": known.get("backend", BACKEND), **known["settings"]}
        _check_alike(answers, Path(after, answers.name), theirs, {"backend": backend, **settings})


def _check_alike(before: str | Path, after: str | Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raises `ValueError` for the first of these in which two evaluations differ."""
    for what, value in ours.items():
        if theirs.get(what) == value:
            continue
        there, here = ("not given" if x is None else x for x in (theirs.get(what), value))
        mend = f"Evaluate both with the same `{what}`."
        if what == "backend":
            mend = "Evaluate both in one backend, of the same length: the other's rounding alone changes answers."
        raise ValueError(f"{before} and {after} cannot be compared: `{what}` is {there} there and {here} here. {mend}")
