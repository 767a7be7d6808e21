"""The figures of a comparison: every way to use every arm, against the base, against plain SFT and against each other."""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product, takewhile
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.answers import CURVE, GENERATIONS, TEXT, paired_scores
from ..evaluation.settings import Suite
from ..files import read_json, read_jsonl
from .fronts import Fronts, Rows, Setting, summarize_map
from .plan import BASE, LEAST_ROWS, PLAN, Comparison, kept_comparison
from .statistics import (
    backward_transfer,
    forgetting,
    forward_transfer,
    interval,
    paired_test,
    pareto_front,
    ratio_interval,
    resampling_weights,
    retention,
    scores_by_resample,
    stage_forgetting,
)


# What is logged in training, with its unit.
CURVES = {
    "ce_loss": "cross-entropy, nats per token",
    "kl_loss": "KL to the teacher, nats per token",
    "kl_weight": "weight of the KL",
    "teacher_distance": "teacher distance, relative",
    "drift_domain": "drift, domain text, nats per token",
    "drift_general": "drift, general text, nats per token",
}
# Of a row's sums: loss, tokens, drift.
_COLUMNS = 3
# More points of a curve than a picture shows.
_CURVE_POINTS = 200
# The chance of a base that guesses to be taken for one that does not: the half outside a 95 % interval that lies above it.
_GUESSING = 0.025


@dataclass
class _Point:
    """
    One way to use one arm: its student, its teacher, or its adapter at a scale.

    Every figure is kept by seed for each resample of the questions (rows, for text): `(1 + resamples,)`.
    """

    arm: str
    role: str
    method: str
    is_control: bool  # plain SFT, whatever its learning rate or its scale, or the arm that is named as the reference
    folders: dict[int, Path] = field(default_factory=dict)
    scores: dict[str, dict[int, np.ndarray]] = field(default_factory=lambda: defaultdict(dict))
    pairs: dict[str, dict[int, tuple]] = field(default_factory=lambda: defaultdict(dict))
    losses: dict[int, np.ndarray] = field(default_factory=dict)
    texts: dict[int, dict] = field(default_factory=dict)
    unscalable: str | None = None
    curves: dict[int, dict] = field(
        default_factory=dict
    )  # by seed, of each scale what `texts` has of the adapter itself

    @property
    def label(self) -> str:
        if self.role == "student":
            return self.arm
        return f"{self.arm}, {self.role.replace('scale_', '× ')}"

    @property
    def scale(self) -> float | None:
        """Of an arm that interpolates."""
        return float(self.role.removeprefix("scale_")) if self.role.startswith("scale_") else None

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
        `dict`: `plan`, `reference`, `base`, `points` (an entry per arm and role), `map` (see [`summarize_map`]), `against` (their
        differences from the controls), `curves`, `provenance` and `missing`: figures alone, no question and no text. A figure is a dict of `mean`,
        `low` and `high` (95 %, see [`interval`]). Where there are stages, all these are of the last one, and `stages` has what was measured
        after each.

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
    by_stage, maps, lacks = zip(*(_read_points(stage, base) for stage in comparison.by_stage()), strict=True)
    points, mapped, missing = by_stage[-1], maps[-1], [part for parts in lacks for part in parts]
    chosen = _reference(mapped, base, comparison)
    # In the tables over the seeds that were evaluated whole.
    reference = next((point for point in points if chosen and point.label == chosen.label), chosen)
    entries = [_entry(point, base, reference) for point in points]
    front = _front(entries)
    return {
        "plan": read_json(root / PLAN),
        "reference": None if reference is None else reference.label,
        "base": base.entry | {"on_front": len(entries) in front},
        "points": [entry | {"on_front": i in front} for i, entry in enumerate(entries)],
        "map": _map(mapped, base, chosen, comparison),
        "against": _against_controls(points, base),
        "missing": missing,
        "curves": _curves(root, comparison),
        "provenance": _provenance(root, comparison),
        **({"stages": _stages(comparison, base, by_stage)} if comparison.stages else {}),
    }


def is_absent(value: Any) -> bool:
    """Whether there is no number: a statistic gives NaN, which JSON keeps as null."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def in_points(figure: dict) -> dict:
    """`mean`, `low` and `high` of an accuracy as points, hundredths of it."""
    return {key: None if figure[key] is None else 100 * figure[key] for key in ("mean", "low", "high")}


def sample_answers(folder: str, summary: dict, rows: int = 5) -> list[dict]:
    """
    Held-out prompts with the reference and each arm's answer, side by side, of the first seed. They are texts of the data's
    owner, or imitate them, and no part of the summary.
    """
    comparison = kept_comparison(folder)
    answers = {}
    for point in summary["points"]:
        if point["generation"] and not point["role"].startswith("scale_"):
            evaluations = comparison.evaluations(comparison.arms[point["arm"]], point["seeds"][0])
            answers[point["label"]] = read_jsonl(Path(evaluations[point["role"]][1], GENERATIONS))[:rows]
    return [
        {"prompt": row["prompt"], "reference": row["reference"]}
        | {"answers": [(label, found[i]["answer"]) for label, found in answers.items()]}
        for i, row in enumerate(next(iter(answers.values()), []))
    ]


class _Base:
    """The base model's answers, and the resamples that every point shares with them."""

    def __init__(self, folder: Path, suite: Suite):
        self.folder, self.retention_tasks, self.texts = folder, list(suite.retention_tasks), suite.general_texts
        self.drift_on = suite.drift_on
        self.tasks = {name: read_json(folder / f"{name}.json") for name in suite.tasks}
        self.text = read_json(folder / TEXT)
        rows = {name: read_jsonl(folder / f"{name}.jsonl") for name in self.tasks}
        self.weights = {name: resampling_weights(len(found), seed=i) for i, (name, found) in enumerate(rows.items())}
        self.scores = {
            name: scores_by_resample([row["score"] for row in found], self.weights[name])
            for name, found in rows.items()
        }
        self.losses = self.mean_loss(self.text)
        intervals = {name: interval(lambda x: x, found) for name, found in self.scores.items()}
        # On a task on which it may be guessing the base has nothing to retain.
        self.above_chance = [
            name
            for name in self.retention_tasks
            if _guessing([row["score"] for row in rows[name]], self.tasks[name]["chance"]) < _GUESSING
        ]
        kept = ("metric", "score", "chance", "n", "subtasks", "settings")
        self.entry = {
            "domain_loss": self.text["domain"]["loss"],
            "general_loss": self.text["general"]["loss"],
            "generation": self.text.get("generation"),
            "retention_leaves_out": [name for name in self.retention_tasks if name not in self.above_chance],
            "tasks": {name: {key: task[key] for key in kept} | intervals[name] for name, task in self.tasks.items()},
        }

    def mean_loss(self, text: dict, name: str = "domain", number: int = 0) -> np.ndarray:
        """
        Loss of each resample of the held-out rows of the domain, nats per token; or of another text, which is resampled by its `number`.
        """
        sums, tokens = np.array(text[name]["rows"]).T[:2]
        weights = resampling_weights(len(tokens), seed=len(self.tasks) + number)
        return (weights @ sums) / (weights @ tokens)


def _guessing(scores: list[float], chance: float) -> float:
    """Probability that guessing alone gives as many hits; exact also where every question is hit."""
    from scipy.stats import binomtest

    if not chance:  # nothing to guess from: whatever has a score was not guessed
        return float(not any(scores))
    hits = sum(score > 0.5 for score in scores)
    return float(binomtest(hits, len(scores), chance, alternative="greater").pvalue)


def _read_points(comparison: Comparison, base: _Base) -> tuple[list[_Point], list[_Point], list[str]]:
    """What was evaluated whole; what has at least loss and drift, which the map needs; and what is missing."""
    whole: dict[tuple[str, str], _Point] = {}
    mapped: dict[tuple[str, str], _Point] = {}
    controls, missing = {*(comparison.plain_sft or ()), comparison.reference}, []
    for arm, seed in product(comparison.arms.values(), comparison.seeds):
        after = f" after {comparison.stage.name}" if comparison.stage else ""
        if arm.interpolate is None and not comparison.is_trained(arm.name, seed):
            where = os.path.relpath(comparison.folder(arm.name, seed), comparison.output_dir)
            missing.append(f"{arm.name}, seed {seed}: not trained ({where})")
            continue
        for role, (_, folder, _) in comparison.evaluations(arm, seed).items():
            key, is_control = (arm.name, role), (arm.interpolate or arm.name) in controls
            lacking = comparison.suite.missing_files(folder)
            missing += _lacking(comparison, f"{arm.name}, seed {seed}: {role}{after}", folder, lacking)
            if Path(folder, TEXT) in lacking:
                continue
            point = mapped.setdefault(key, _Point(arm.name, role, arm.method, is_control))
            _read_text(point, seed, Path(folder), base)
            if comparison.is_traced(arm) and not _read_curve(point, seed, Path(folder, CURVE), comparison.suite):
                missing.append(f"{arm.name}, seed {seed}: {role} not measured at all other scales")
            if not lacking:
                full = whole.setdefault(key, _Point(arm.name, role, arm.method, is_control))
                for name in ("folders", "texts", "losses"):
                    getattr(full, name)[seed] = getattr(point, name)[seed]
                _read_tasks(full, base)
    return list(whole.values()), list(mapped.values()), missing


def _lacking(comparison: Comparison, what: str, folder: str, lacking: list[Path]) -> list[str]:
    """A line for the report, if anything is."""
    if not lacking:
        return []
    names = ", ".join(path.name for path in lacking)
    # Where in the comparison: a report may be read elsewhere.
    where = os.path.relpath(folder, comparison.output_dir)
    return [f"{what} not evaluated whole ({where}: no {names})" if os.path.isdir(folder) else f"{what} not evaluated"]


def _read_text(point: _Point, seed: int, folder: Path, base: _Base) -> None:
    """Loss and drift."""
    point.folders[seed], point.texts[seed] = folder, read_json(folder / TEXT)
    rows, base_rows = point.texts[seed]["key"][1], base.text["key"][1]
    if rows != base_rows:
        raise ValueError(
            f"{folder / TEXT} and {base.folder / TEXT} are of different rows, or of the same rows with other tokens or labels "
            f"({rows} and {base_rows}): their losses do not compare. Delete both and run `trl-ema compare` again."
        )
    point.losses[seed] = base.mean_loss(point.texts[seed])


def _read_tasks(point: _Point, base: _Base) -> None:
    """Of the seed that was read last."""
    seed, folder = list(point.folders.items())[-1]
    for name in base.tasks:
        pair = paired_scores(base.folder / f"{name}.jsonl", folder / f"{name}.jsonl")
        point.pairs[name][seed] = pair
        point.scores[name][seed] = scores_by_resample(pair[1], base.weights[name])


def _read_curve(point: _Point, seed: int, path: Path, suite: Suite) -> bool:
    """Whether loss and drift are there at each scale that the adapter has."""
    if not suite.scales:
        return True
    curve = read_json(path) if path.is_file() else {}
    if curve.get("key", [])[:2] != point.texts[seed]["key"][:2]:  # none, or of another model or other rows
        return False
    point.curves[seed] = curve["scales"]
    point.unscalable = point.unscalable or curve["unscalable"]
    return curve["unscalable"] is not None or all(f"{scale:g}" in curve["scales"] for scale in suite.scales)


def _reference(points: list[_Point], base: "_Base", comparison: Comparison) -> _Point | None:
    """
    The student of the arm that the plan names. Or else of plain SFT, of the settings with the most seeds and a gain that is not
    clearly below the largest, the one that drifts least: a reference that drifts more would make all others look better.
    """
    students = [point for point in points if point.role == "student"]
    if comparison.reference is not None:
        return next((point for point in students if point.arm == comparison.reference), None)
    plain = [point for point in students if point.arm in (comparison.plain_sft or ())]
    most = max((len(point.folders) for point in plain), default=0)
    plain = [point for point in plain if len(point.folders) == most]
    if not plain:
        return None
    best = min(plain, key=lambda point: np.mean([loss[0] for loss in point.losses.values()]))

    def is_near(point: _Point) -> bool:
        found = interval(_gain, point.losses, best.losses)  # on the same rows and seeds
        return point is best or not (found["mean"] > 0 if math.isnan(found["low"]) else found["low"] > 0)

    def drift(point: _Point) -> float:
        return float(np.mean([text[name]["kl_base_model"] for text in point.texts.values() for name in base.drift_on]))

    return min(filter(is_near, plain), key=drift)


def _map(points: list[_Point], base: "_Base", reference: _Point | None, comparison: Comparison) -> dict:
    """Of all methods, or why there is none."""
    if reference is None:
        return {"absent": "no arm is plain SFT, and the plan names no `reference`; or it is not measured yet"}
    texts = [base.text, *(text for point in points for text in point.texts.values())]
    names = ["domain", *base.texts]
    if any(len(text[name]["rows"][0]) < _COLUMNS for text in texts for name in names):
        return {
            "absent": "an earlier trl_ema measured some arms and kept no drift of single rows; run `trl-ema compare` again"
        }
    few = [name for name in names if len(base.text[name]["rows"]) < LEAST_ROWS]
    if few:
        return {"absent": f"{few[0]} has fewer than {LEAST_ROWS} rows, too few to choose settings on one half of them"}
    settings = _settings(points, names)
    own = next(x for x in settings if x.label == reference.label)
    sources = [(arm.method, arm.interpolate or arm.name) for arm in comparison.arms.values()]
    plain, controls = comparison.plain_sft or (), comparison.controls
    if controls is None:
        controls = tuple(
            name for name in comparison.methods if all(arm in plain for method, arm in sources if method == name)
        )
    planned = {name: sum(method == name for method, _ in sources) for name in comparison.methods}
    found = summarize_map(Fronts(settings, _rows(base.text, names), own, base.drift_on), planned, controls)
    return found | {"unscalable": {point.label: point.unscalable for point in points if point.unscalable}}


def _settings(points: list[_Point], names: list[str]) -> list[Setting]:
    """The curve of each student and teacher; the scales of an arm that interpolates are one."""
    found: dict[str, Setting] = {}
    for point in points:
        scale = point.scale
        label = point.label if scale is None else point.arm
        setting = found.setdefault(label, Setting(point.arm, point.method, label, {}, point.unscalable is None))
        setting.rows[1.0 if scale is None else scale] = _by_seed(point.texts, names)
        for seed, curve in point.curves.items():
            for other, text in curve.items():
                setting.rows.setdefault(float(other), {})[seed] = _rows(text, names)
    return list(found.values())


def _by_seed(texts: dict[int, dict], names: list[str]) -> Rows:
    return {seed: _rows(text, names) for seed, text in texts.items()}


def _rows(text: dict, names: list[str]) -> dict[str, np.ndarray]:
    return {name: np.array(text[name]["rows"], dtype=np.float64)[:, :_COLUMNS] for name in names}


def _gain(base_loss: np.ndarray, loss: np.ndarray) -> np.ndarray:
    return base_loss - loss


def _mean_drop(*scores: np.ndarray) -> np.ndarray:
    """Over tasks: scores before, then scores after."""
    half = len(scores) // 2
    return (np.array(scores[:half]) - np.array(scores[half:])).mean(0)


def _retained(base: _Base, point: _Point, names: list[str], seed: int | None = None) -> list:
    """Scores before, then scores after: by seed, or of one."""
    after = [point.scores[name] for name in names]
    return [base.scores[name] for name in names] + [scores if seed is None else scores[seed] for scores in after]


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
            for name in ("domain", *base.texts)
        },
        "general_loss": float(np.mean([text["general"]["loss"] for text in texts])),
        "generation": {key: float(np.mean([found[key] for found in generation])) for key in generation[0]}
        if generation
        else None,
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
    """
    Share of the reference's gain that is kept, and of its forgetting that is avoided; `None` where the reference did not
    clearly gain or forget.
    """
    if reference is None:
        return {"gain_kept": None, "forgetting_avoided": None}
    gain, reference_gain = (
        {seed: _gain(base.losses, losses) for seed, losses in p.losses.items()} for p in (point, reference)
    )
    return {
        "gain_kept": ratio_interval(gain, reference_gain),
        "forgetting_avoided": _avoided(point, base, reference) if base.retention_tasks else None,
    }


def _avoided(point: _Point, base: _Base, reference: _Point) -> dict | None:
    """(drop of the reference − drop of ours) / drop of the reference; `None` too if the reference's tasks are not measured."""
    ours, theirs = (
        {seed: _mean_drop(*_retained(base, p, base.retention_tasks, seed)) for seed in p.pairs[base.retention_tasks[0]]}
        for p in (point, reference)
    )
    return ratio_interval({seed: theirs[seed] - ours[seed] for seed in set(ours) & set(theirs)}, theirs)


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
        "mcnemar": [paired_test(scores, after) for scores, after, _ in pairs],
        "subtasks": {subtask: float(np.mean(found)) for subtask, found in by_subtask.items()},
    }


def _front(entries: list[dict]) -> list[int]:
    """Which entries lie on the Pareto front of gain and mean drop; the base, a choice too, is the last index."""
    placed = [i for i, entry in enumerate(entries) if entry["forgetting"]]
    gains = [entries[i]["domain_gain"]["mean"] for i in placed]
    losses = [entries[i]["forgetting"]["mean"] for i in placed]
    return [[*placed, len(entries)][i] for i in pareto_front([*gains, 0.0], [*losses, 0.0])]


def _against_controls(points: list[_Point], base: _Base) -> list[dict]:
    """
    Each other point against each control: the same questions, rows and seeds, so their noise cancels. Of a control with many
    settings against the one that gains most.
    """
    names = base.retention_tasks
    controls = [
        max(
            (p for p in points if p.is_control and (p.method, p.role) == key),
            key=lambda p: -np.mean([x[0] for x in p.losses.values()]),
        )
        for key in dict.fromkeys((p.method, p.role) for p in points if p.is_control)
    ]
    return [
        {
            "label": ours.label,
            "control": theirs.label,
            "seeds": sorted(set(ours.folders) & set(theirs.folders)),
            "domain_gain": interval(_gain, theirs.losses, ours.losses),
            "forgetting": interval(_mean_drop, *(p.scores[name] for p in (theirs, ours) for name in names))
            if names
            else None,
            "drift_general": interval(np.subtract, *(p.drift("general", "kl_base_model") for p in (ours, theirs))),
        }
        for ours in points
        if not ours.is_control
        for theirs in controls
        if set(ours.folders) & set(theirs.folders)
    ]


def _stages(comparison: Comparison, base: _Base, by_stage: Sequence[list[_Point]]) -> dict:
    """
    What was measured before the first stage and after each, of the seeds that went through all of them; and of each way to use an
    arm backward transfer, forgetting, forward transfer and the mean loss at the end. R is the negative of the loss; where stages have
    tasks, all but the loss also with their mean accuracy.

    Of a way that is not through, what is there of the most stages that a seed went through, and no transfer.
    """
    before = np.array(_stage_losses(comparison, base, base.text))
    found = []
    for key in dict.fromkeys((p.arm, p.role) for points in reversed(by_stage) for p in points):
        after, seeds = _gone_through(by_stage, key)
        if not seeds:
            continue
        losses = {
            seed: np.array([before, *(_stage_losses(comparison, base, p.texts[seed]) for p in after)]) for seed in seeds
        }
        is_through = len(after) == len(by_stage)
        found.append(
            {
                "arm": after[-1].arm,
                "role": after[-1].role,
                "label": after[-1].label,
                "seeds": seeds,
                "after": [_after_stage(base, p, losses, i) for i, p in enumerate(after, 1)],
                **_transfers({seed: -loss for seed, loss in losses.items()} if is_through else None),
                "mean_loss": _of_seeds({seed: loss[-1].mean(0) for seed, loss in losses.items()})
                if is_through
                else None,
                "accuracy": _accuracy(comparison, base, after, seeds) if is_through else None,
            }
        )
    return {
        "names": list(comparison.domains),
        "tasks": {stage.name: list(stage.tasks) for stage in comparison.stages if stage.tasks},
        "before": {"loss": [_of_seeds(loss) for loss in before]},
        "ways": found,
    }


def _gone_through(by_stage: Sequence[list[_Point]], key: tuple[str, str]) -> tuple[list[_Point], list[int]]:
    """Of one way to use an arm, the points after each stage from the first on that some seeds went through, and those seeds."""
    found = (next((p for p in points if (p.arm, p.role) == key), None) for points in by_stage)
    after = [point for point in takewhile(lambda point: point is not None, found) if point is not None]
    while after:
        seeds = sorted(set.intersection(*({*point.folders} for point in after)))
        if seeds:
            return after, seeds
        after.pop()
    return [], []


def _stage_losses(comparison: Comparison, base: _Base, text: dict) -> list[np.ndarray]:
    """On the held-out text of every stage. That of the last one is resampled as the domain is in all other figures."""
    names = enumerate(comparison.domains.values(), 1)
    return [base.mean_loss(text, name, 0 if name == "domain" else number) for number, name in names]


def _accuracy(comparison: Comparison, base: _Base, after: list[_Point], seeds: list[int]) -> dict | None:
    """Transfers in the mean accuracy on the tasks of each stage; `None` where stages have none."""
    if not all(stage.tasks for stage in comparison.stages):
        return None
    scores = {
        seed: np.array(
            [
                [np.mean([one[name] for name in stage.tasks], axis=0) for stage in comparison.stages]
                for one in [base.scores, *({name: p.scores[name][seed] for name in base.tasks} for p in after)]
            ]
        )
        for seed in seeds
    }
    return _transfers(scores) | {"mean": _of_seeds({seed: found[-1].mean(0) for seed, found in scores.items()})}


def _after_stage(base: _Base, point: _Point, losses: dict[int, np.ndarray], stage: int) -> dict:
    """What one way to use an arm is after so many stages."""
    scores = {name: {seed: point.scores[name][seed] for seed in losses} for name in base.tasks}
    drifts = {name: {s: d for s, d in point.drift(name, "kl_base_model").items() if s in losses} for name in base.texts}
    return {
        "loss": [
            _of_seeds({seed: loss[stage, j] for seed, loss in losses.items()})
            for j in range(next(iter(losses.values())).shape[1])
        ],
        "drift": {name: _of_seeds(drift) for name, drift in drifts.items()},
        "tasks": {name: _of_seeds(found) for name, found in scores.items()},
    }


def _transfers(scores: dict[int, np.ndarray] | None) -> dict[str, dict | None]:
    """Of each seed on its own, as its best stage may be another; of a way that is not through none."""
    measures: dict[str, Callable[[np.ndarray], Any]] = {
        "backward_transfer": backward_transfer,
        "forgetting": stage_forgetting,
        "forward_transfer": forward_transfer,
    }
    if scores is None:
        return dict.fromkeys(measures)
    return {
        name: _of_seeds({seed: measure(found) for seed, found in scores.items()}) for name, measure in measures.items()
    }


def _of_seeds(found: np.ndarray | dict[int, np.ndarray]) -> dict:
    """A quantity, by seed where there are some, with its interval."""
    return interval(lambda x: x, found)


def _places(comparison: Comparison) -> list[str]:
    """Where in the folder of an arm and seed its runs are, one after the other."""
    return [stage.name for stage in comparison.stages] or ["."]


def _curves(root: Path, comparison: Comparison) -> dict[str, dict[str, list[list[float]]]]:
    """For each logged quantity and arm: `[step, mean over seeds]` points, thinned where there are many; stages follow each other."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for arm in comparison.arms:
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for folder in sorted((root / arm).glob("seed_*")):
            begin = 0
            for path in [folder / place / "metrics.json" for place in _places(comparison)]:
                log = read_json(path)["log"] if path.is_file() else []
                for entry in log:
                    # Plain SFT's loss is its cross-entropy.
                    entry = {"ce_loss": entry["loss"], **entry} if "loss" in entry else entry
                    for name in CURVES:
                        if name in entry:
                            values[name][begin + entry["step"]].append(float(entry[name]))
                begin += max((entry.get("step", 0) for entry in log), default=0)
        for name, steps in values.items():
            points = [[step, float(np.mean(found))] for step, found in sorted(steps.items())]
            kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), _CURVE_POINTS)).round().astype(int))
            curves.setdefault(name, {})[arm] = [points[i] for i in kept]
    return curves


def _provenance(root: Path, comparison: Comparison) -> dict[str, list[str]]:
    """Everything that the runs and the evaluations were made with; several values where they differ."""
    found: dict[str, list[str]] = defaultdict(list)
    patterns = [f"{BASE}/{TEXT}"]
    for place in _places(comparison):
        patterns += [f"*/seed_*/{place}/metrics.json", f"*/seed_*/{place}/*/*/{TEXT}"]
    for path in sorted(path for pattern in patterns for path in root.glob(pattern)):
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
