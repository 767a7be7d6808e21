"""The figures of a comparison: every way to use every arm, against the base, against plain SFT and against each other."""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .comparison import BASE
from .evaluation.runner import paired_scores
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
_TEXT = "text.json"
_GENERATIONS = "generations.jsonl"


@dataclass
class _Point:
    """
    One way to use one arm: its student, its teacher, or its adapter at a scale.

    Every figure is kept by seed for each resample of the questions (rows, for text): `(1 + resamples,)`.
    """

    arm: str
    role: str
    options: dict
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

    @property
    def is_control(self) -> bool:
        """Whether it has no teacher: plain SFT, whatever its learning rate or its scale."""
        return "interpolate" in self.options or self.options.get("teacher", "ema") == "none"


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
    root = Path(folder)
    if not (root / "plan.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no comparison: {root / 'plan.json'} is missing. Run `trl-ema compare` first."
        )
    plan = read_json(root / "plan.json")
    lacking = _lacking(root / BASE, plan)
    if lacking:
        raise FileNotFoundError(
            f"The base model of {folder} is not evaluated whole: {lacking[0]} is missing. Run `trl-ema compare` again; it goes "
            "on where it stopped."
        )
    base = _Base(root / BASE, plan)
    points, missing = _read_points(root, plan, base)
    reference = next((p for p in points if p.options.get("teacher") == "none" and p.role == "student"), None)
    entries = [_entry(point, base, reference) for point in points]
    front = _front(entries)
    return {
        "plan": plan,
        "reference": None if reference is None else reference.label,
        "base": base.entry | {"on_front": len(entries) in front},
        "points": [entry | {"on_front": i in front} for i, entry in enumerate(entries)],
        "against": _against_controls(points, base),
        "missing": missing,
        "curves": _curves(root, plan),
        "provenance": _provenance(root),
    }


class _Base:
    """The base model's answers, and the resamples that every point shares with them."""

    def __init__(self, folder: Path, plan: dict):
        self.folder, suite = folder, plan["evaluation"]
        self.retention_tasks = list(suite["retention_tasks"])
        self.tasks = {name: read_json(folder / f"{name}.json") for name in _tasks(plan)}
        self.text = read_json(folder / _TEXT)
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


def _tasks(plan: dict) -> list[str]:
    return [*plan["evaluation"]["retention_tasks"], *plan["evaluation"]["domain_tasks"]]


def _lacking(folder: Path, plan: dict) -> list[Path]:
    """Files of one evaluation that the plan asks for and that are not there."""
    names = [_TEXT] + [f"{name}.{ending}" for name in _tasks(plan) for ending in ("json", "jsonl")]
    names += [_GENERATIONS] if plan["evaluation"]["generation_tokens"] else []
    return [folder / name for name in names if not (folder / name).is_file()]


def _roles(options: dict) -> list[str]:
    if "interpolate" in options:
        return [f"scale_{scale:g}" for scale in options["scales"]]
    # A frozen teacher is the start, not a result.
    return ["student", "teacher"] if options.get("teacher", "ema") == "ema" else ["student"]


def _planned(root: Path, plan: dict) -> Iterator[tuple[str, str, int, Path]]:
    for arm, options in plan["arms"].items():
        for role in _roles(options):
            for seed in plan["seeds"]:
                yield arm, role, seed, root / arm / f"seed_{seed}" / "evaluation" / role


def _read_points(root: Path, plan: dict, base: _Base) -> tuple[list[_Point], list[str]]:
    points: dict[tuple[str, str], _Point] = {}
    missing = []
    for arm, role, seed, folder in _planned(root, plan):
        options = plan["arms"][arm]
        if "interpolate" not in options and not (folder.parents[1] / "metrics.json").is_file():
            part = f"{arm}, seed {seed}: not trained ({folder.parents[1] / 'metrics.json'})"
            missing += [part] if part not in missing else []
            continue
        lacking = _lacking(folder, plan)
        if lacking:
            names = ", ".join(path.name for path in lacking)
            missing.append(f"{arm}, seed {seed}: {role} not evaluated whole ({folder}: no {names})")
            continue
        point = points.setdefault((arm, role), _Point(arm, role, options))
        point.folders[seed], point.texts[seed] = folder, read_json(folder / _TEXT)
        point.losses[seed] = base.mean_loss(point.texts[seed])
        for name in base.tasks:
            pair = paired_scores(base.folder / f"{name}.jsonl", folder / f"{name}.jsonl")
            point.pairs[name][seed] = pair
            point.scores[name][seed] = scores_by_resample(pair[1], base.weights[name])
    return list(points.values()), missing


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
    names = base.retention_tasks
    retained = _retained(base, point, names)
    generation = [text["generation"] for text in texts if "generation" in text]
    entry: dict[str, Any] = {
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
        "generations": read_jsonl(next(iter(point.folders.values())) / _GENERATIONS)[:5] if generation else [],
        "tasks": {name: _task_entry(name, point, base) for name in base.tasks},
        # Mean drop of the score over the retention tasks; positive is forgetting.
        "forgetting": interval(_mean_drop, *retained) if names else None,
        "fg_percent": None,
        "retention": None,
        "gain_kept": None,
        "forgetting_avoided": None,
    }
    half = len(names)
    if names and all(base.scores[name].all() for name in names):
        entry["fg_percent"] = interval(lambda *x: forgetting(x[:half], x[half:]), *retained)
    if base.above_chance:
        chance = [base.tasks[name]["chance"] for name in base.above_chance]
        above = len(base.above_chance)
        entry["retention"] = interval(
            lambda *x: retention(x[:above], x[above:], chance), *_retained(base, point, base.above_chance)
        )
    if reference is not None:
        entry["gain_kept"] = interval(
            lambda b, ours, theirs: share(b - ours, b - theirs), base.losses, point.losses, reference.losses
        )
        if names:
            entry["forgetting_avoided"] = interval(
                lambda *x: 1 - share(_mean_drop(*x[: 2 * half]), _mean_drop(*x[:half], *x[2 * half :])),
                *retained,
                *(reference.scores[name] for name in names),
            )
    return entry


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


def _curves(root: Path, plan: dict) -> dict[str, dict[str, list[list[float]]]]:
    """For each logged quantity and arm: `[step, mean over seeds]` points."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for arm in plan["arms"]:
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
        [*root.glob("*/seed_*/metrics.json"), *root.glob(f"{BASE}/{_TEXT}"), *root.glob(f"*/seed_*/*/*/{_TEXT}")]
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
