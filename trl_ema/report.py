"""Markdown, one self-contained HTML page and pictures from a comparison's folder, or from its figures alone."""

import io
import logging
import math
import re
import textwrap
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from .comparison import BASE
from .extras import require
from .files import read_json, write_json, write_text
from .summary import sample_answers, summarize_comparison


logger = logging.getLogger(__name__)

FIGURES = "comparison.json"
_SAMPLES = "samples.html"
_CURVES = {
    "ce_loss": "cross-entropy, nats per token",
    "kl_loss": "KL to the teacher, nats per token",
    "kl_weight": "weight of the KL",
    "teacher_distance": "teacher distance, relative",
    "drift_domain": "drift, domain text, nats per token",
    "drift_general": "drift, general text, nats per token",
}


def _as_yaml(plan: dict) -> str:
    """The configuration as a user would write it."""
    suite = dict(plan["evaluation"])
    for group in ("retention_tasks", "domain_tasks"):
        suite[group] = {
            name: {key: value for key, value in options.items() if value is not None}
            for name, options in suite[group].items()
        }
    keys = [key for key in ("training", "arms", "reference", "seeds") if plan.get(key) is not None]
    return yaml.safe_dump({key: plan[key] for key in keys} | {"evaluation": suite}, sort_keys=False)


def write_report(folder: str) -> str:
    """
    Write `report.html`, `report.md`, the pictures and all their figures, `comparison.json`, into `folder`. Those are fit to be
    passed on: they hold no question and no text. Sample answers are on a page of their own, `samples.html`.

    In a folder without the comparison's evaluations the report is the same, from `comparison.json` alone. Missing parts of an
    unfinished comparison are named in the report and in the log.

    Returns:
        `str`: path of `report.html`.
    """
    require("report", "jinja2", "matplotlib", "scipy")
    environment, path = _templates(), Path(folder, FIGURES)
    if Path(folder, BASE).is_dir() or not path.is_file():
        write_json(path, _rounded(summarize_comparison(folder)))
        _write_samples(folder, read_json(path), environment)
    summary = read_json(path)
    for part in summary["missing"]:
        logger.warning("Missing: %s", part)
    pictures = _pictures(summary)
    for name in _CAPTIONS:
        path = Path(folder, f"{name}.png")
        if name in pictures:
            path.write_bytes(pictures[name].png)
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    values = {
        "summary": summary,
        "plan_yaml": _as_yaml(summary["plan"]),
        "pictures": {name: picture.svg for name, picture in pictures.items()},
        "captions": _CAPTIONS,
        "quality": [("base", summary["base"]["generation"])]
        + [(p["label"], p["generation"]) for p in summary["points"]],
    }
    write_text(Path(folder, "report.md"), environment.get_template("report.md.j2").render(**values))
    path = Path(folder, "report.html")
    write_text(path, environment.get_template("report.html.j2").render(**values))
    return str(path)


def _rounded(value: Any) -> Any:
    """More digits than any figure has a meaning for make the file a half larger."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.7g}") if isinstance(value, float) else value


def _write_samples(folder: str, summary: dict, environment) -> None:
    path, samples = Path(folder, _SAMPLES), sample_answers(folder, summary)
    if samples:
        write_text(path, environment.get_template("samples.html.j2").render(samples=samples))
    else:
        path.unlink(missing_ok=True)  # of an earlier report


def _templates():
    import jinja2

    loader = jinja2.FileSystemLoader(str(files(__package__) / "templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=jinja2.select_autoescape(["html.j2", "html"]), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["fixed"] = lambda value, digits=3: "–" if _absent(value) else f"{value:.{digits}f}"
    environment.filters["figure"] = _figure
    environment.filters["points"] = lambda found: _figure(found and found | _times_100(found), 1)
    environment.filters["share"] = lambda found: _figure(found, signed=False, percent=True) if found else "not shown"
    environment.filters["mcnemar"] = lambda tests: "; ".join(
        f"−{test['lost']} +{test['gained']}, p {_p_value(test['p_value'])}" for test in tests
    )
    return environment


_BOUNDS = ("mean", "low", "high")


# One seed: the interval is over questions alone.
_ONE_SEED = "†"


def _times_100(found: dict) -> dict:
    return {key: None if found[key] is None else 100 * found[key] for key in _BOUNDS}


def _figure(found: dict | None, digits: int = 3, signed: bool = True, percent: bool = False) -> str:
    """A figure with its interval, where it has one: `+0.100 (+0.050 to +0.150)`."""
    if found is None or _absent(found["mean"]):
        return "–"
    sign, factor, unit = ("+" if signed else ""), (100 if percent else 1), (" %" if percent else "")
    digits = 0 if percent else digits
    mean, low, high = (_absent(found[key]) or f"{factor * found[key]:{sign}.{digits}f}" for key in _BOUNDS)
    mark = f" {_ONE_SEED}" if len(found.get("seeds", ())) == 1 else ""
    return f"{mean}{unit}" if _absent(found["low"]) else f"{mean}{unit} ({low} to {high}{mark})"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _absent(value) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# Pictures

_CAPTIONS = {
    "tradeoff": "Domain gain against forgetting. Up and left is better; the base model is the origin. Bars: 95 % intervals, "
    "over questions and seeds (of one seed: over questions alone). The line is the Pareto front.",
    "tasks": "Change of each task's score against the base on the same questions, with 95 % intervals over questions and seeds (of one "
    "seed: over questions alone).",
    "subjects": "Change of the score by subject. Few questions each where the task was sampled.",
    "curves": "Training, mean over seeds.",
}
_COLORS = ("#d1495b", "#3b82c4", "#2a9d6f", "#8b6fc0", "#e08a1e", "#8a8f98", "#2aa5a0", "#d46a9f", "#a07855", "#6b8e23")
# Replaced by the page's own text colour, so that one picture serves light and dark.
_INK = "#010203"
_LONG = re.compile(r"-?\d+\.\d{3,}")


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
        return {name: _render(name, figure) for name, figure in figures.items() if figure is not None}


def _new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _title(text: str) -> str:
    """Over several lines, so that columns stand side by side."""
    return textwrap.fill(text.replace("_", " "), 11)


def _render(name: str, figure) -> _Picture:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=120, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # A page is passed on: hundredths of a point are more than a screen shows.
    text = re.sub(r'="[^"<>]*"', lambda found: _LONG.sub(lambda x: f"{float(x[0]):.2f}", found[0]), text)
    # Several pictures share a page: no name may occur twice.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return _Picture(text, _with_few_colors(png.getvalue()))


def _with_few_colors(png: bytes) -> bytes:
    """A third of the size, for flat colours."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


def _tradeoff(summary: dict, colors: dict[str, str]):
    points = [point for point in summary["points"] if point["forgetting"]]
    if not points:
        return None
    figure, axes = _new_figure(5.4, 4.6)
    ax = axes[0, 0]
    ax.axhline(0, color=_INK, alpha=0.25, linewidth=0.8)
    ax.axvline(0, color=_INK, alpha=0.25, linewidth=0.8)
    front = [(100 * p["forgetting"]["mean"], p["domain_gain"]["mean"]) for p in points if p["on_front"]]
    front += [(0.0, 0.0)] if summary["base"]["on_front"] else []
    ax.plot(*zip(*sorted(front), strict=True), color=_INK, alpha=0.5, linewidth=1, linestyle="--", zorder=1)
    ax.plot(0, 0, marker="*", markersize=12, color=_INK, linestyle="none", label="base")
    for point in points:
        x, y = 100 * point["forgetting"]["mean"], point["domain_gain"]["mean"]
        color, role = colors[point["arm"]], point["role"]
        marker = {"student": "o", "teacher": "D"}.get(role, "s")
        x_error, y_error = _bars(_times_100(point["forgetting"])), _bars(point["domain_gain"])
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


def _bars(found: dict) -> list[list[float]] | None:
    """An interval as matplotlib takes it."""
    return None if _absent(found["low"]) else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]


def _task_bars(summary: dict, colors: dict[str, str]):
    points = summary["points"]
    names = list(summary["base"]["tasks"])
    if not points or not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = _new_figure(5.4, (0.2 * len(points) + 0.7) * rows + 0.4, rows, columns, sharey=True)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        for i, point in enumerate(points):
            change = _times_100(point["tasks"][name]["change"])
            ax.barh(i, change["mean"], color=colors[point["arm"]], alpha=0.85)
            if not _absent(change["low"]):
                ax.plot([change["low"], change["high"]], [i, i], color=_INK, linewidth=1)
        ax.axvline(0, color=_INK, linewidth=0.8)
        base = summary["base"]["tasks"][name]
        ax.set_title(f"{name}\nbase {100 * base['score']:.1f} %\nchance {100 * base['chance']:.1f} %", fontsize=7.5)
    axes[0, 0].set_yticks(range(len(points)), [point["label"] for point in points])
    for ax in axes[:, 0]:
        ax.tick_params(axis="y", labelsize=8)
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
    width = max(5.4, 2.4 + 0.8 * len(points))  # a title of eleven letters on each
    figure, axes = _new_figure(width, 0.2 * len(subjects) + 1.2, 1, len(points), sharey=True, sharex=True)
    for ax, point in zip(axes[0], points, strict=True):
        changes = [100 * point["tasks"][group]["subtasks"].get(subject, math.nan) for group, subject in subjects]
        ax.barh(range(len(subjects)), changes, color=colors[point["arm"]], alpha=0.85)
        ax.axvline(0, color=_INK, linewidth=0.8)
        ax.set_title(_title(point["label"]), fontsize=8)
        ax.tick_params(axis="x", labelsize=7)
    for ax in axes[0, 1:]:
        ax.tick_params(axis="y", length=0)
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
        ax.set_title(_CURVES[name], fontsize=8)
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    axes[0, 0].legend(fontsize=8)
    return figure
