"""The figures of a comparison: every way to use every arm, against the base, against plain SFT and against each other."""

import math
import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import numpy as np

from .comparison import BASE, PLAN, Arm, Comparison, kept_comparison
from .evaluation.runner import paired_scores
from .evaluation.suite import GENERATIONS, TEXT, Suite
from .files import read_json, read_jsonl
from .forgetting import (
    forgetting,
    interval,
    mcnemar,
    mean_interval,
    pareto_front,
    resampling_weights,
    retention,
    scores_by_resample,
    share,
)


CURVES = ("ce_loss", "kl_loss", "kl_weight", "teacher_distance", "drift_domain", "drift_general")


@dataclass
class _Point:
    """
    One way to use one arm: its student, its teacher, or its adapter at a scale.

    Every figure is kept by seed for each resample of the questions (rows, for text): `(1 + resamples,)`.
    """

    arm: str
    role: str
    is_control: bool  # without a teacher: plain SFT, whatever its learning rate or its scale
    folders: dict[int, Path] = field(default_factory=dict)
    scores: dict[str, dict[int, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))
    pairs: dict[str, dict[int, tuple]] = field(default_factory=lambda: defaultdict(dict))
    losses: dict[int, np.ndarray] = field(default_factory=dict)
    texts: dict[int, dict] = field(default_factory=dict)

    @property
    def label(self) -> str:
        if self.role == "student":
            return self.arm
        return f"{self.arm}, {self.role.replace('scale_', '× ')}"

    def drift(self, text: str, direction: str) -> dict[int, np.ndarray]:
        """By seed; the same in every resample: its rows are not resampled."""
        return {seed: np.full(2, found[text][direction]) for seed, found in self.texts.items()}


def summarize_comparison(folder: str) -> dict:
    """
    Every figure of a comparison, as far as it was run.

    An evaluation that lacks a part of the plan is left out whole and named under `missing`: a mean over other tasks would
    not compare.

    Args:
        folder (`str`): `output_dir` of [`run_comparison`].

    Returns:
        `dict`: `plan`, `base`, `points` (an entry per arm and role), `against` (their differences from the controls),
        `curves`, `provenance` and `missing`. A figure is a dict of `mean`, `low` and `high` (95 %, see [`interval`]).

    Raises:
        FileNotFoundError: There is no comparison in `folder`, or its base is not evaluated whole.
        ValueError: Two evaluations answered different questions, or a file is damaged.
    """
    root, comparison = Path(folder), kept_comparison(folder)
    lacking = comparison.suite.missing_files(root / BASE)
    if lacking:
        raise FileNotFoundError(
            f"The base model of {folder} is not evaluated whole: {lacking[0]} is missing. Run `trl-ema compare` again; it goes "
            "on where it stopped."
        )
    base = _Base(root / BASE, comparison.suite)
    points, missing = _read_points(comparison, base)
    reference = next((point for point in points if point.is_control and point.role == "student"), None)
    entries = [_entry(point, base, reference) for point in points]
    front = _front(entries)
    return {
        "plan": read_json(root / PLAN),
        "reference": None if reference is None else reference.label,
        "base": base.entry | {"on_front": len(entries) in front},
        "points": [entry | {"on_front": i in front} for i, entry in enumerate(entries)],
        "against": _against_controls(points, base),
        "missing": missing,
        "curves": _curves(root, comparison),
        "provenance": _provenance(root),
    }


class _Base:
    """The base model's answers, and the resamples that every point shares with them."""

    def __init__(self, folder: Path, suite: Suite):
        self.folder, self.retention_tasks = folder, list(suite.retention_tasks)
        self.tasks = {name: read_json(folder / f"{name}.json") for name in suite.tasks}
        self.text = read_json(folder / TEXT)
        rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in self.tasks}
        self.weights = {name: resampling_weights(len(found), seed=i) for i, (name, found) in enumerate(rows.items())}
        self.scores = {
            name: scores_by_resample([row["score"] for row in found], self.weights[name])
            for name, found in rows.items()
        }
        self.losses = self.mean_loss(self.text)
        intervals = {name: mean_interval([row["score"] for row in found]) for name, found in rows.items()}
        # On a task on which it may be guessing the base has nothing to retain.
        self.above_chance = [
            name for name in self.retention_tasks if intervals[name]["low"] > self.tasks[name]["chance"]
        ]
        kept = ("metric", "score", "chance", "n", "subtasks", "settings")
        self.entry = {
            "domain_loss": self.text["domain"]["loss"],
            "general_loss": self.text["general"]["loss"],
            "generation": self.text.get("generation"),
            "retention_leaves_out": [name for name in self.retention_tasks if name not in self.above_chance],
            "tasks": {name: {key: task[key] for key in kept} | intervals[name] for name, task in self.tasks.items()},
        }

    def mean_loss(self, text: dict) -> np.ndarray:
        """Domain loss of each resample of the held-out rows, nats per token."""
        sums, tokens = np.array(text["domain"]["rows"]).T
        weights = resampling_weights(len(tokens), seed=len(self.tasks))
        return (weights @ sums) / (weights @ tokens)


def _read_points(comparison: Comparison, base: _Base) -> tuple[list[_Point], list[str]]:
    points: dict[tuple[str, str], _Point] = {}
    missing = []
    for arm, seed in product(comparison.arms.values(), comparison.seeds):
        if arm.interpolate is None and not comparison.is_trained(arm.name, seed):
            missing.append(f"{arm.name}, seed {seed}: not trained ({comparison.folder(arm.name, seed)})")
            continue
        for role, (_, folder, _) in comparison.evaluations(arm, seed).items():
            lacking = comparison.suite.missing_files(folder)
            if lacking:
                names = ", ".join(path.name for path in lacking)
                what = f"not evaluated whole ({folder}: no {names})" if os.path.isdir(folder) else "not evaluated"
                missing.append(f"{arm.name}, seed {seed}: {role} {what}")
                continue
            new = _Point(arm.name, role, _is_control(comparison, arm, seed))
            _read_evaluation(points.setdefault((arm.name, role), new), seed, Path(folder), base)
    return list(points.values()), missing


def _is_control(comparison: Comparison, arm: Arm, seed: int) -> bool:
    source = comparison.arms[arm.interpolate or arm.name]
    return comparison.options(source, seed).get("teacher", "ema") == "none"


def _read_evaluation(point: _Point, seed: int, folder: Path, base: _Base) -> None:
    point.folders[seed], point.texts[seed] = folder, read_json(folder / TEXT)
    point.losses[seed] = base.mean_loss(point.texts[seed])
    for name in base.tasks:
        pair = paired_scores(base.folder / f"{name}.jsonl", folder / f"{name}.jsonl")
        point.pairs[name][seed] = pair
        point.scores[name][seed] = scores_by_resample(pair[1], base.weights[name])


def _gain(base_loss, loss):
    return base_loss - loss


def _mean_drop(*scores):
    """Over tasks: scores before, then scores after."""
    half = len(scores) // 2
    return (np.array(scores[:half]) - np.array(scores[half:])).mean(0)


def _retained(base: _Base, point: _Point, names: list[str]) -> list:
    return [base.scores[name] for name in names] + [point.scores[name] for name in names]


def _entry(point: _Point, base: _Base, reference: _Point | None) -> dict:
    """One row of the summary."""
    texts = list(point.texts.values())
    generation = [text["generation"] for text in texts if "generation" in text]
    return {
        "arm": point.arm,
        "role": point.role,
        "label": point.label,
        "seeds": sorted(point.folders),
        "is_control": point.is_control,
        "domain_loss": interval(lambda x: x, point.losses),
        "domain_gain": interval(_gain, base.losses, point.losses),
        "drift": {
            name: {
                direction: interval(lambda x: x, point.drift(name, direction))
                for direction in ("kl_base_model", "kl_model_base")
            }
            for name in ("domain", "general")
        },
        "general_loss": float(np.mean([text["general"]["loss"] for text in texts])),
        "generation": {key: float(np.mean([found[key] for found in generation])) for key in generation[0]}
        if generation
        else None,
        "generations": read_jsonl(next(iter(point.folders.values())) / GENERATIONS)[:5] if generation else [],
        "tasks": {name: _task_entry(name, point, base) for name in base.tasks},
        **_forgetting_entry(point, base),
        **_shares_of_reference(point, base, reference),
    }


def _forgetting_entry(point: _Point, base: _Base) -> dict:
    """Over the retention tasks: mean drop of the score (positive is forgetting), Luo et al.'s FG, retention."""
    names, chosen = base.retention_tasks, base.above_chance
    scores = _retained(base, point, names)
    half, above = len(names), len(chosen)
    chance = [base.tasks[name]["chance"] for name in chosen]
    return {
        "forgetting": interval(_mean_drop, *scores) if names else None,
        "fg_percent": interval(lambda *x: forgetting(x[:half], x[half:]), *scores)
        if names and all(base.scores[name].all() for name in names)
        else None,
        "retention": interval(lambda *x: retention(x[:above], x[above:], chance), *_retained(base, point, chosen))
        if chosen
        else None,
    }


def _shares_of_reference(point: _Point, base: _Base, reference: _Point | None) -> dict:
    """Share of plain SFT's gain that is kept, and of its forgetting that is avoided."""
    if reference is None:
        return {"gain_kept": None, "forgetting_avoided": None}
    names = base.retention_tasks
    half = len(names)
    return {
        "gain_kept": interval(
            lambda b, ours, theirs: share(b - ours, b - theirs), base.losses, point.losses, reference.losses
        ),
        "forgetting_avoided": interval(
            lambda *x: 1 - share(_mean_drop(*x[: 2 * half]), _mean_drop(*x[:half], *x[2 * half :])),
            *_retained(base, point, names),
            *(reference.scores[name] for name in names),
        )
        if names
        else None,
    }


def _task_entry(name: str, point: _Point, base: _Base) -> dict:
    before = base.scores[name]
    pairs = list(point.pairs[name].values())
    differences = np.mean([np.subtract(after, scores) for scores, after, _ in pairs], axis=0)
    by_subtask: dict[str, list[float]] = defaultdict(list)
    for row, difference in zip(pairs[0][2], differences, strict=True):
        by_subtask[row["task"]].append(difference)
    change = interval(np.subtract, point.scores[name], before)
    return {
        "after": interval(lambda x: x, point.scores[name]),
        "change": change,
        "relative": change["mean"] / before[0] if before[0] else math.nan,
        "mcnemar": [mcnemar(scores, after) for scores, after, _ in pairs],
        "subtasks": {subtask: float(np.mean(found)) for subtask, found in by_subtask.items()},
    }


def _front(entries: list[dict]) -> list[int]:
    """Which entries lie on the Pareto front of gain and mean drop; the base, a choice too, is the last index."""
    placed = [i for i, entry in enumerate(entries) if entry["forgetting"]]
    gains = [entries[i]["domain_gain"]["mean"] for i in placed]
    losses = [entries[i]["forgetting"]["mean"] for i in placed]
    return [[*placed, len(entries)][i] for i in pareto_front([*gains, 0.0], [*losses, 0.0])]


def _against_controls(points: list[_Point], base: _Base) -> list[dict]:
    """Each point with a teacher against each without: the same questions, rows and seeds, so their noise cancels."""
    names = base.retention_tasks
    return [
        {
            "label": ours.label,
            "control": theirs.label,
            "domain_gain": interval(_gain, theirs.losses, ours.losses),
            "forgetting": interval(_mean_drop, *(p.scores[name] for p in (theirs, ours) for name in names))
            if names
            else None,
            "drift_general": interval(np.subtract, *(p.drift("general", "kl_base_model") for p in (ours, theirs))),
        }
        for ours in points
        if not ours.is_control
        for theirs in points
        if theirs.is_control and set(ours.folders) & set(theirs.folders)
    ]


def _curves(root: Path, comparison: Comparison) -> dict[str, dict[str, list[list[float]]]]:
    """For each logged quantity and arm: `[step, mean over seeds]` points."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for arm in comparison.arms:
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for path in sorted((root / arm).glob("seed_*/metrics.json")):
            for entry in read_json(path)["log"]:
                # Plain SFT's loss is its cross-entropy.
                entry = {"ce_loss": entry["loss"], **entry} if "loss" in entry else entry
                for name in CURVES:
                    if name in entry:
                        values[name][entry["step"]].append(float(entry[name]))
        for name, steps in values.items():
            curves.setdefault(name, {})[arm] = [[step, float(np.mean(found))] for step, found in sorted(steps.items())]
    return curves


def _provenance(root: Path) -> dict[str, list[str]]:
    """Everything that the runs and the evaluations were made with; several values where they differ."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(
        [*root.glob("*/seed_*/metrics.json"), *root.glob(f"{BASE}/{TEXT}"), *root.glob(f"*/seed_*/*/*/{TEXT}")]
    ):
        made = read_json(path).get("provenance") or {}
        hardware = made.get("hardware", {})
        values = dict(made.get("versions", {}))
        values["hardware"] = (
            f"{hardware.get('gpu') or hardware.get('cpu')}, {hardware.get('cores')} cores" if hardware else None
        )
        values["commit"] = made["git_commit"] or "installed package" if "git_commit" in made else None
        values["questions"] = made.get("questions")
        for name, value in values.items():
            if value is not None and value not in found[name]:
                found[name].append(value)
    return {name: sorted(values) for name, values in found.items() if values}
