"""Markdown, one self-contained HTML page and pictures from a comparison's folder."""

import io
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from .comparison import BASE, evaluated_folders, read_evaluation
from .evaluation.runner import paired_scores
from .files import read_json, read_jsonl, write_json, write_text
from .forgetting import (
    bootstrap_mean,
    change,
    forgetting,
    mcnemar,
    paired_bootstrap,
    pareto_front,
    retention,
    seed_interval,
    share,
)


logger = logging.getLogger(__name__)

REFERENCE_ARM = "sft"
_CURVES = {
    "ce_loss": "cross-entropy, nats per token",
    "kl_loss": "KL to the teacher, nats per token",
    "kl_weight": "weight of the KL",
    "teacher_distance": "teacher distance, relative",
    "drift_domain": "drift on domain text, nats per token",
    "drift_general": "drift on general text, nats per token",
}


@dataclass(frozen=True)
class _Point:
    """One way to use one arm: its student, its teacher, or its adapter at a scale; `folders` by seed."""

    arm: str
    role: str
    folders: dict[int, str]

    @property
    def label(self) -> str:
        if self.role == "student":
            return self.arm
        return f"{self.arm}, {self.role.replace('scale_', '× ')}"


def summarize_comparison(folder: str) -> dict:
    """
    Every figure of a comparison: each arm against the base on the same questions, and against plain SFT.

    Args:
        folder (`str`): `output_dir` of [`run_comparison`].

    Returns:
        `dict`: `base`, `points` (an entry per arm and role), `missing` (parts that are not there yet) and the plan.

    Raises:
        FileNotFoundError: There is no comparison in `folder`, or its base is not evaluated yet.
        ValueError: Two evaluations answered different questions.
    """
    plan_path, base_path = Path(folder, "plan.json"), Path(folder, BASE)
    if not plan_path.is_file():
        raise FileNotFoundError(f"{folder} holds no comparison: {plan_path} is missing. Run `trl-ema compare` first.")
    base = read_evaluation(str(base_path))
    if base["text"] is None:
        raise FileNotFoundError(
            f"The base model of {folder} is not evaluated: {base_path / 'text.json'} is missing. Run `trl-ema compare` again; "
            "it goes on where it stopped."
        )
    plan = read_json(plan_path)
    suite = plan["evaluation"]
    grouped: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    for arm, role, seed, path in evaluated_folders(folder):
        if arm in plan["arms"] and read_evaluation(path)["text"] is not None:
            grouped[arm, role][seed] = path
    order = list(plan["arms"])
    points = [_Point(arm, role, seeds) for (arm, role), seeds in grouped.items()]
    points.sort(key=lambda point: (order.index(point.arm), point.role))
    summary = {
        "plan": plan,
        "plan_yaml": _as_yaml(plan),
        "base": _base_entry(base_path, base),
        "points": [_entry(point, base_path, base, suite) for point in points],
        "missing": _missing(plan, folder, grouped),
        "curves": _curves(plan, folder),
    }
    _relate_to_reference(summary["points"])
    _mark_front(summary["points"])
    return summary


def _as_yaml(plan: dict) -> str:
    """The configuration as a user would write it."""
    suite = dict(plan["evaluation"])
    for group in ("retention_tasks", "domain_tasks"):
        suite[group] = {
            name: {key: value for key, value in options.items() if value is not None}
            for name, options in suite[group].items()
        }
    parts = {key: plan[key] for key in ("training", "arms", "seeds")} | {"evaluation": suite}
    return yaml.safe_dump(parts, sort_keys=False)


def _base_entry(path: Path, base: dict) -> dict:
    tasks = {}
    for name, result in base["tasks"].items():
        scores = [row["score"] for row in read_jsonl(path / f"{name}.jsonl")]
        kept = {key: result[key] for key in ("metric", "score", "chance", "n", "subtasks", "settings")}
        tasks[name] = kept | bootstrap_mean(scores)
    generation = base["text"].get("generation")
    return {"domain_loss": base["text"]["domain"]["loss"], "tasks": tasks, "generation": generation}


def _entry(point: _Point, base_path: Path, base: dict, suite: dict) -> dict:
    """One row of the summary: means over seeds, with intervals."""
    evaluations = {seed: read_evaluation(path) for seed, path in point.folders.items()}
    texts = [evaluation["text"] for evaluation in evaluations.values()]
    tasks, pairs = {}, {}
    for name in base["tasks"]:
        paths = [Path(path, f"{name}.jsonl") for path in point.folders.values()]
        if all(path.is_file() for path in paths):
            tasks[name], pairs[name] = _task_entry(base_path / f"{name}.jsonl", paths, base["tasks"][name])
    kept = [name for name in suite["retention_tasks"] if name in pairs]
    drop = {}
    if kept:
        interval = paired_bootstrap([pairs[name][0] for name in kept], [pairs[name][1] for name in kept])
        drop = {"mean": -interval["difference"], "low": -interval["high"], "high": -interval["low"]}
    before = [base["tasks"][name]["score"] for name in kept]
    shares = [tasks[name]["retention"] for name in kept if not math.isnan(tasks[name]["retention"])]
    loss = seed_interval([text["domain"]["loss"] for text in texts])
    base_loss = base["text"]["domain"]["loss"]
    generation = [text["generation"] for text in texts if "generation" in text]
    return {
        "arm": point.arm,
        "role": point.role,
        "label": point.label,
        "seeds": sorted(point.folders),
        "domain_loss": loss,
        "domain_gain": seed_interval([base_loss - text["domain"]["loss"] for text in texts]),
        "drift": {
            name: {
                direction: seed_interval([text[name][direction] for text in texts])
                for direction in ("kl_base_model", "kl_model_base")
            }
            for name in ("domain", "general")
        },
        "generation": {key: float(np.mean([found[key] for found in generation])) for key in generation[0]}
        if generation
        else None,
        "tasks": tasks,
        # Mean drop of the score over the retention tasks; positive is forgetting.
        "forgetting": drop or None,
        "fg_percent": forgetting(before, [tasks[name]["after"] for name in kept]) if kept and all(before) else None,
        "retention": float(np.mean(shares)) if shares else None,
        "generations": read_jsonl(Path(next(iter(point.folders.values())), "generations.jsonl"))[:5]
        if generation
        else [],
    }


def _task_entry(before_path: Path, after_paths: list[Path], base: dict) -> tuple[dict, tuple[np.ndarray, np.ndarray]]:
    pairs = [paired_scores(before_path, path) for path in after_paths]
    before = np.array(pairs[0][0])
    by_seed = np.array([pair[1] for pair in pairs])
    after = by_seed.mean(0)
    by_subtask: dict[str, list[float]] = defaultdict(list)
    for row, difference in zip(pairs[0][2], after - before, strict=True):
        by_subtask[row["task"]].append(difference)
    entry = change(float(before.mean()), float(after.mean())) | {
        "interval": paired_bootstrap([before], [after]),
        "mcnemar": [mcnemar(before, scores) for scores in by_seed],
        "retention": retention(float(before.mean()), float(after.mean()), base["chance"]),
        "by_seed": [float(scores.mean()) for scores in by_seed],
        "subtasks": {name: float(np.mean(differences)) for name, differences in by_subtask.items()},
    }
    return entry, (before, after)


def _relate_to_reference(points: list[dict]) -> None:
    """Each arm's share of plain SFT's gain, and of plain SFT's forgetting avoided."""
    reference = next((p for p in points if p["arm"] == REFERENCE_ARM and p["role"] == "student"), None)
    for point in points:
        if reference is None:
            point["gain_kept"] = point["forgetting_avoided"] = None
            continue
        point["gain_kept"] = share(point["domain_gain"]["mean"], reference["domain_gain"]["mean"])
        if point["forgetting"] and reference["forgetting"]:
            point["forgetting_avoided"] = 1 - share(point["forgetting"]["mean"], reference["forgetting"]["mean"])
        else:
            point["forgetting_avoided"] = None


def _mark_front(points: list[dict]) -> None:
    placed = [point for point in points if point["forgetting"]]
    gains, losses = [p["domain_gain"]["mean"] for p in placed], [p["forgetting"]["mean"] for p in placed]
    front = pareto_front([*gains, 0.0], [*losses, 0.0])  # the base is a choice too
    for i, point in enumerate(placed):
        point["on_front"] = i in front


def _missing(plan: dict, folder: str, grouped: dict) -> list[str]:
    """What the plan asks for and the folder lacks."""
    missing = []
    for name, options in plan["arms"].items():
        for seed in plan["seeds"]:
            run = Path(folder, name, f"seed_{seed}")
            roles = [f"scale_{scale:g}" for scale in options.get("scales", ())]
            if not roles:
                if not (run / "metrics.json").is_file():
                    missing.append(f"{name}, seed {seed}: not trained ({run / 'metrics.json'})")
                    continue
                roles = ["student", "teacher"] if options.get("teacher", "ema") == "ema" else ["student"]
            for role in roles:
                if seed not in grouped.get((name, role), {}):
                    missing.append(f"{name}, seed {seed}: {role} not evaluated ({run / 'evaluation' / role})")
    return missing


def _curves(plan: dict, folder: str) -> dict[str, dict[str, list[list[float]]]]:
    """For each logged quantity and arm: `[step, mean over seeds]` points."""
    curves: dict[str, dict[str, list[list[float]]]] = {}
    for arm in plan["arms"]:
        values: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for path in Path(folder, arm).glob("seed_*/metrics.json"):
            for entry in read_json(path)["log"]:
                # Plain SFT's loss is its cross-entropy.
                entry = {"ce_loss": entry["loss"], **entry} if "loss" in entry else entry
                for name in _CURVES:
                    if name in entry:
                        values[name][entry["step"]].append(float(entry[name]))
        for name, steps in values.items():
            curves.setdefault(name, {})[arm] = [[step, float(np.mean(found))] for step, found in sorted(steps.items())]
    return curves


def write_report(folder: str) -> str:
    """
    Write `report.html`, `report.md`, `comparison.json` and the pictures into `folder`.

    Missing parts of an unfinished comparison are named in the report and in the log.

    Returns:
        `str`: path of `report.html`.
    """
    environment = _templates()
    summary = summarize_comparison(folder)
    for part in summary["missing"]:
        logger.warning("Missing: %s", part)
    write_json(Path(folder, "comparison.json"), summary)
    pictures = _pictures(summary)
    for name, picture in pictures.items():
        Path(folder, f"{name}.png").write_bytes(picture.png)
    values = {
        "summary": summary,
        "pictures": {name: picture.svg for name, picture in pictures.items()},
        "captions": _CAPTIONS,
        "quality": [("base", summary["base"]["generation"])]
        + [(p["label"], p["generation"]) for p in summary["points"]],
        "samples": _samples(summary["points"]),
    }
    write_text(Path(folder, "report.md"), environment.get_template("report.md.j2").render(**values))
    path = Path(folder, "report.html")
    write_text(path, environment.get_template("report.html.j2").render(**values))
    return str(path)


def _samples(points: list[dict]) -> list[dict]:
    """Held-out prompts with the reference and each arm's answer, side by side."""
    shown = [point for point in points if point["generations"] and not point["role"].startswith("scale_")]
    if not shown:
        return []
    return [
        {"prompt": row["prompt"], "reference": row["reference"]}
        | {"answers": [(point["label"], point["generations"][i]["answer"]) for point in shown]}
        for i, row in enumerate(shown[0]["generations"])
    ]


def _templates():
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(f"A report needs `{error.name}`. Install it with `pip install 'trl_ema[report]'`.") from error
    loader = jinja2.FileSystemLoader(str(files(__package__) / "templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=jinja2.select_autoescape(["html.j2", "html"]), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["signed"] = lambda value, digits=3: "–" if _absent(value) else f"{value:+.{digits}f}"
    environment.filters["fixed"] = lambda value, digits=3: "–" if _absent(value) else f"{value:.{digits}f}"
    environment.filters["percent"] = lambda value: "–" if _absent(value) else f"{100 * value:.0f} %"
    environment.filters["span"] = lambda low, high, digits=3: (
        "" if _absent(low) else f"{low:+.{digits}f} to {high:+.{digits}f}"
    )
    return environment


def _absent(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# Pictures

_CAPTIONS = {
    "tradeoff": "Domain gain against forgetting. Up and left is better; the base model is the origin. Bars: 95 % intervals, "
    "over questions across, over seeds up. The line is the Pareto front.",
    "tasks": "Change of each task's score against the base on the same questions, with 95 % intervals over questions.",
    "subjects": "Change of the score by subject. Few questions each where the task was sampled.",
    "curves": "Training, mean over seeds.",
}
_COLORS = ("#d1495b", "#3b82c4", "#2a9d6f", "#8b6fc0", "#e08a1e", "#8a8f98", "#2aa5a0", "#d46a9f", "#a07855", "#6b8e23")
# Replaced by the page's own text colour, so that one picture serves light and dark.
_INK = "#010203"


@dataclass(frozen=True)
class _Picture:
    svg: str
    png: bytes


def _pictures(summary: dict) -> dict[str, _Picture]:
    import matplotlib

    style: Any = {
        "font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "text.color": _INK, "axes.edgecolor": _INK,
        "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
        "axes.spines.right": False, "axes.titlesize": 9, "legend.frameon": False, "svg.hashsalt": "trl_ema",
    }  # fmt: skip
    arms = list(summary["plan"]["arms"])
    colors = {arm: _COLORS[i % len(_COLORS)] for i, arm in enumerate(arms)}
    with matplotlib.rc_context(style):
        figures = {
            "tradeoff": _tradeoff(summary, colors),
            "tasks": _task_bars(summary, colors),
            "subjects": _subject_bars(summary, colors),
            "curves": _curve_grid(summary, colors),
        }
        return {name: _render(figure) for name, figure in figures.items() if figure is not None}


def _new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _render(figure) -> _Picture:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=150, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    return _Picture(text, png.getvalue())


def _tradeoff(summary: dict, colors: dict[str, str]):
    points = [point for point in summary["points"] if point["forgetting"]]
    if not points:
        return None
    figure, axes = _new_figure(5.4, 4.6)
    ax = axes[0, 0]
    ax.axhline(0, color=_INK, alpha=0.25, linewidth=0.8)
    ax.axvline(0, color=_INK, alpha=0.25, linewidth=0.8)
    front = [(0.0, 0.0)] + [
        (100 * p["forgetting"]["mean"], p["domain_gain"]["mean"]) for p in points if p.get("on_front")
    ]
    ax.plot(*zip(*sorted(front), strict=True), color=_INK, alpha=0.5, linewidth=1, linestyle="--", zorder=1)
    ax.plot(0, 0, marker="*", markersize=12, color=_INK, linestyle="none", label="base")
    for point in points:
        x, y = 100 * point["forgetting"]["mean"], point["domain_gain"]["mean"]
        color, role = colors[point["arm"]], point["role"]
        marker = {"student": "o", "teacher": "D"}.get(role, "s")
        x_error = [[x - 100 * point["forgetting"]["low"]], [100 * point["forgetting"]["high"] - x]]
        gain = point["domain_gain"]
        y_error = None if _absent(gain["low"]) else [[y - gain["low"]], [gain["high"] - y]]
        ax.errorbar(x, y, xerr=x_error, yerr=y_error, color=color, alpha=0.35, linewidth=1, capsize=0)
        shade = float(role.removeprefix("scale_")) if role.startswith("scale_") else 1.0
        ax.plot(
            x,
            y,
            marker=marker,
            markersize=7,
            color=color,
            alpha=0.4 + 0.6 * shade,
            linestyle="none",
            label=point["label"],
        )
    ax.set_xlabel("forgetting: mean drop over the retention tasks, points of accuracy")
    ax.set_ylabel("domain gain: held-out loss, nats per token")
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, handletextpad=0.3, columnspacing=1.2)
    return figure


def _task_bars(summary: dict, colors: dict[str, str]):
    points = [point for point in summary["points"] if point["tasks"]]
    names = list(summary["base"]["tasks"])
    if not points or not names:
        return None
    figure, axes = _new_figure(5.4, 0.24 * len(points) + 1.3, 1, len(names), sharey=True)
    for ax, name in zip(axes[0], names, strict=True):
        for i, point in enumerate(points):
            entry = point["tasks"].get(name)
            if entry is None:
                continue
            difference = 100 * entry["absolute"]
            low, high = 100 * entry["interval"]["low"], 100 * entry["interval"]["high"]
            ax.barh(i, difference, color=colors[point["arm"]], alpha=0.85)
            ax.plot([low, high], [i, i], color=_INK, linewidth=1)
        ax.axvline(0, color=_INK, linewidth=0.8)
        ax.set_title(f"{name}\nbase {100 * summary['base']['tasks'][name]['score']:.1f} %")
    axes[0, 0].set_yticks(range(len(points)), [point["label"] for point in points])
    axes[0, 0].invert_yaxis()
    figure.supxlabel("change, points of accuracy", color=_INK, fontsize=9)
    return figure


def _subject_bars(summary: dict, colors: dict[str, str]):
    """Students of the trained arms, on the group with the most subjects."""
    groups = {name: task for name, task in summary["base"]["tasks"].items() if len(task["subtasks"]) > 1}
    trained = {arm for arm, options in summary["plan"]["arms"].items() if "interpolate" not in options}
    points = [
        p for p in summary["points"] if p["role"] == "student" and p["arm"] in trained and set(groups) & set(p["tasks"])
    ]
    if not groups or not points:
        return None
    subjects = [(group, subject) for group, task in groups.items() for subject in task["subtasks"]]
    figure, axes = _new_figure(5.4, 0.2 * len(subjects) + 1.2, 1, len(points), sharey=True, sharex=True)
    for ax, point in zip(axes[0], points, strict=True):
        changes = [100 * point["tasks"][group]["subtasks"].get(subject, math.nan) for group, subject in subjects]
        ax.barh(range(len(subjects)), changes, color=colors[point["arm"]], alpha=0.85)
        ax.axvline(0, color=_INK, linewidth=0.8)
        ax.set_title(point["label"])
    labels = [subject.removeprefix("mmlu_").replace("_", " ") for _, subject in subjects]
    axes[0, 0].set_yticks(range(len(subjects)), labels, fontsize=7)
    axes[0, 0].invert_yaxis()
    axes[0, 0].margins(y=0.01)
    figure.supxlabel("change, points of accuracy", color=_INK, fontsize=9)
    return figure


def _curve_grid(summary: dict, colors: dict[str, str]):
    curves = {name: summary["curves"][name] for name in _CURVES if name in summary["curves"]}
    if not curves:
        return None
    columns = 2
    rows = -(-len(curves) // columns)
    figure, axes = _new_figure(5.4, 2.2 * rows + 0.4, rows, columns, sharex=True)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    for ax, (name, by_arm) in zip(axes.flat, curves.items(), strict=False):
        for arm, points in by_arm.items():
            ax.plot(*zip(*points, strict=True), color=colors[arm], label=arm, linewidth=1.4)
        ax.set_title(_CURVES[name])
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    axes[0, 0].legend(fontsize=8)
    return figure
