"""What an evaluation leaves behind: names of its files, and the answers in them, read and paired. Light: a report reads it too."""

from collections import defaultdict
from pathlib import Path

from ..files import read_jsonl


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
    for what, default, same in (
        ("metric", None, "Evaluate both with the same `metric`."),
        ("backend", BACKEND, "Evaluate both in one backend: the other's rounding alone changes answers."),
    ):
        kinds = [sorted({str(row.get(what, default)) for row in found.values()}) for found in rows]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"{before} and {after} cannot be compared: `{what}` is {', '.join(kinds[0])} there and {', '.join(kinds[1])} here. {same}"
            )
    return [r["score"] for r in ours.values()], [theirs[q]["score"] for q in ours], list(ours.values())
