"""What two evaluations' folders say of a change, task by task: read, tested and written as a table. Light: it knows no model."""

import math
import os
from collections.abc import Iterable

from ..evaluation.answers import paired_scores
from .statistics import discoveries, forgetting, paired_interval, paired_test


def task_changes(before: str, after: str, tasks: Iterable[str]) -> list[dict]:
    """
    The change of each task's score on the same questions.

    Args:
        before, after (`str`): Folders of two evaluations.

    Returns:
        `list` of `dict`: `task`, `before`, `after`, `change` (see [`paired_interval`]), what [`paired_test`] finds, and `discovery`:
        whether it counts among so many tests (Benjamini-Hochberg).

    Raises:
        ValueError: The two were not asked the same questions, or not scored or run alike.
    """
    rows = []
    for task in tasks:
        one, other, _ = paired_scores(*(os.path.join(folder, f"{task}.jsonl") for folder in (before, after)))
        means = {"before": sum(one) / len(one), "after": sum(other) / len(other)}
        rows.append({"task": task, **means, "change": paired_interval(one, other), **paired_test(one, other)})
    marks = discoveries([row["p_value"] for row in rows])
    return [row | {"discovery": mark} for row, mark in zip(rows, marks, strict=True)]


def changes_table(before: str, after: str, tasks: Iterable[str]) -> str:
    """The same as text, with what its columns are, and Luo et al.'s FG over the tasks."""
    rows = task_changes(before, after, tasks)
    width = width_of(row["task"] for row in rows)
    lines = [
        f"{'task':{width}}{'before':>9}{'after':>9}{'change':>9}{'95 % interval':>20}{'shows':>8}{'lost':>6}{'gained':>8}{'p':>7}"
    ]
    for row in rows:
        shows = "–" if math.isnan(row["detectable"]) else f"{row['detectable']:.3f}"
        mark = ("*" if row["discovery"] else " ") + ("b" if row["test"] != "McNemar" else "")
        lines.append(
            f"{row['task']:{width}}{row['before']:9.4f}{row['after']:9.4f}{row['change']['mean']:+9.4f}{span(row['change'], '+.3f'):>20}"
            f"{shows:>8}{row['lost']:6d}{row['gained']:8d}{row['p_value']:7.3f} {mark}".rstrip()
        )
    bootstrap = (
        "; b: paired bootstrap, of scores other than 0 and 1" if any(r["test"] != "McNemar" for r in rows) else ""
    )
    lines.append(
        f"before: {before}; after: {after}; change, interval and shows in the unit of the score. "
        "shows: the smallest change that as many questions would show in 80 of 100 cases. p: McNemar's exact test"
        f"{bootstrap}. *: below 0.05 also among {len(rows)} tests (Benjamini-Hochberg)."
    )
    scores = [(row["before"], row["after"]) for row in rows if row["before"]]
    if scores:
        lines.append(f"Mean relative drop (FG, Luo et al. 2023): {forgetting(*zip(*scores, strict=True)):.1f} %")
    return "\n".join(lines)


def width_of(names: Iterable[str], least: int = 24) -> int:
    """Of a first column that holds them all, with a space behind."""
    return max([least, *(len(name) + 1 for name in names)])


def span(found: dict, form: str) -> str:
    """An interval; a dash where there is none, as of a score that every question has."""
    return "–" if math.isnan(found["low"]) else f"{found['low']:{form}} to {found['high']:{form}}"
