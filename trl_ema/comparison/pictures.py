"""The pictures of a report, drawn from its figures."""

import collections
import io
import itertools
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import CURVES, in_points, is_absent
from .plan import expanded_arms


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTIONS = {
    "front": "Gain against drift, as shares of the reference's (the cross). Up and left is better. Thin, ending in a dot: settings over "
    "the scale of their adapters, of the methods in colour; an arrow where the adapter lies outside. Thick: the front of each method, "
    "flat beyond its last point; dashed: of a control. Hollow: what is measured of a method without a front. The "
    "drift axis is a square root. Fronts are drawn from the rows that their settings were chosen on, which flatters methods with many "
    "settings: the table does not.",
    "tradeoff": "Domain gain against forgetting. Up and left is better; the base model is the origin, which may lie outside. Bars: "
    "95 % intervals, over questions and seeds (of one seed: over questions alone), which go on where they end in an arrow. The dashed "
    "line is the Pareto front.",
    "drift": "Domain gain against drift, the distance from the base's predictions on general text. Up and left is better; the base "
    "model is the origin, which may lie outside. Bars: 95 % intervals, of drift over seeds alone.",
    "stages": "Before all stages and after each: held-out loss of the domain of each stage, and drift on general text, mean over seeds. "
    "Grey: the stage that learns the domain; what rises after it is forgotten. Dashed: averaged teachers; dotted: scaled adapters.",
    "tasks": "Change of each task's score against the base on the same questions, with 95 % intervals over questions and seeds (of one "
    "seed: over questions alone).",
    "subjects": "Change of the score by subject. Few questions each where the task was sampled.",
    "curves": "Training, mean over seeds.",
}
COLORS = ("#d1495b", "#3b82c4", "#2a9d6f", "#8b6fc0", "#e08a1e", "#8a8f98", "#2aa5a0", "#d46a9f", "#a07855", "#6b8e23")
# More arms than a picture or a table shows at a glance.
MANY_ARMS = 16
# With more methods than colours, so many of the best have one.
_COLORED = 8
_GREY = "#9aa0a8"
# Inches of most pictures: on a phone a point is then about a pixel.
_WIDTH = 4.6
# Of methods without a front, in turn.
_HOLLOW = "osD^vph"
# Replaced by the page's own text colour, so that one picture serves light and dark.
_INK = "#010203"
_STYLE: Any = {
    "font.size": 9, "font.family": "sans-serif", "svg.fonttype": "none", "text.color": _INK, "axes.edgecolor": _INK,
    "axes.labelcolor": _INK, "xtick.color": _INK, "ytick.color": _INK, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 9, "legend.frameon": False, "svg.hashsalt": "trl_ema",
}  # fmt: skip
_LONG = re.compile(r"-?\d+\.\d{3,}")


@dataclass(frozen=True)
class Picture:
    """One drawing, as text for a page, its width there in points, and as a file."""

    svg: str
    width: float
    png: bytes


def draw_pictures(summary: dict) -> dict[str, Picture]:
    """Those of [`CAPTIONS`] that there are figures for, from [`summarize_comparison`]'s."""
    import matplotlib

    colors = arm_colors(summary)
    with matplotlib.rc_context(_STYLE):
        figures = {
            "front": _fronts(summary, colors),
            "tradeoff": _tradeoff(summary, colors),
            "drift": _drift(summary, colors),
            "stages": _stage_lines(summary, colors),
            "tasks": _task_bars(summary, colors),
            "subjects": _subject_bars(summary, colors),
            "curves": _curve_grid(summary, colors),
        }
        return {name: _render(name, figure) for name, figure in figures.items() if figure is not None}


def method_of(summary: dict) -> dict[str, str]:
    """Method by arm."""
    arms = expanded_arms(summary["plan"]["arms"])
    return {arm: (options or {}).get("method", arm) for arm, options in arms.items()}


def arm_colors(summary: dict) -> dict[str, str]:
    """One for each method; where there are more than colours, for the controls and the best, and grey for the others."""
    by_arm = method_of(summary)
    methods = list(dict.fromkeys(by_arm.values()))
    found = (summary.get("map") or {}).get("methods")
    if len(methods) > len(COLORS) and found:
        best = [entry["method"] for entry in found if not entry["is_control"]][:_COLORED]
        controls = [entry["method"] for entry in found if entry["is_control"]]
        colors = dict(zip([*best, *controls], COLORS, strict=False))
    else:
        colors = {method: COLORS[i % len(COLORS)] for i, method in enumerate(methods)}
    return {arm: colors.get(method, _GREY) for arm, method in by_arm.items()}


def _points_shown(summary: dict) -> list[dict]:
    """
    Of many arms, those of each method with the most seeds, and the controls with them; where these are still many, the best
    setting of each method on the map, and the reference.
    """
    points = summary["points"]
    if len({point["arm"] for point in points}) <= MANY_ARMS:
        return points
    methods, most = method_of(summary), collections.Counter[str]()
    for point in points:
        most[methods[point["arm"]]] = max(most[methods[point["arm"]]], len(point["seeds"]))
    shown = [point for point in points if len(point["seeds"]) == most[methods[point["arm"]]]]
    found = (summary.get("map") or {}).get("methods")
    if found and len({point["arm"] for point in shown}) > MANY_ARMS:
        best = {entry["best"] for entry in found} | {summary["reference"]}
        shown = [point for point in shown if {point["label"], point["arm"]} & best]
    return shown


def draw_scales(curves: dict[str, list[dict]], suggested: dict | None, max_drift: float | None) -> Picture:
    """
    Gain against drift over the scales of each curve, and both against the scale.

    Args:
        curves: By name, points with `scale`, `gain`, `loss` and `drift` in the order of their scales.
        suggested (`dict`, *optional*): One of the points.
        max_drift (`float`, *optional*): The budget, nats per token.
    """
    import matplotlib

    first = next(iter(curves.values()))  # one curve with its scales; on all they would lie over each other
    with matplotlib.rc_context(_STYLE):
        figure, axes = _new_figure(10.5, 3.8, 1, 3)
        against = (("drift", "gain"), ("scale", "loss"), ("scale", "drift"))
        labels = {
            "drift": "drift from the base, nats per token", "gain": "gain, share of the largest", "scale": "scale of the update",
            "loss": "held-out loss, nats per token",
        }  # fmt: skip
        for ax, (x, y) in zip(axes[0], against, strict=True):
            for color, (name, points) in zip(itertools.cycle(COLORS), curves.items(), strict=False):
                at = [[point[key] for point in points] for key in (x, y)]
                ax.plot(*at, color=color, marker="o", markersize=4, linewidth=1.4, label=name)
                if x == "drift" and points is first:
                    _annotate_scales(ax, points, color)
            if suggested is not None:
                ax.plot(
                    suggested[x],
                    suggested[y],
                    marker="*",
                    markersize=14,
                    color=_INK,
                    linestyle="none",
                    label="suggested",
                )
            if max_drift is not None and "drift" in (x, y):
                line = ax.axvline if x == "drift" else ax.axhline
                line(max_drift, color=_INK, alpha=0.5, linewidth=1, linestyle="--", label="budget")
            ax.set_xlabel(labels[x])
            ax.set_ylabel(labels[y])
        handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=8)
        return _render("scales", figure)


def _annotate_scales(ax: Any, points: list[dict], color: str) -> None:
    for point in points:
        if point["scale"]:
            ax.annotate(
                f"{point['scale']:.3g}", (point["drift"], point["gain"]), xytext=(3, -9), textcoords="offset points",
                fontsize=6.5, color=color,
            )  # fmt: skip


def _new_figure(
    width: float, height: float, rows: int = 1, columns: int = 1, **options: Any
) -> "tuple[Figure, np.ndarray]":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def _title(text: str) -> str:
    """Over several lines, so that columns stand side by side."""
    return textwrap.fill(text.replace("_", " "), 11)


def _render(name: str, figure: "Figure") -> Picture:
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=120, facecolor="white")
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    # A page is passed on: hundredths of a point are more than a screen shows, and half of the rest is for other readers.
    text = re.sub(r'="[^"<>]*"', lambda found: _LONG.sub(lambda x: f"{float(x[0]):.2f}", found[0]), text)
    text = re.sub(r"\s*\n\s*", "\n", re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL))
    used = {*re.findall(r'(?:href="#|url\(#)([^")]*)', text)}
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", text)
    # Several pictures share a page: no name may occur twice.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return Picture(text, 72 * float(figure.get_size_inches()[0]), _with_few_colors(png.getvalue()))


def _with_few_colors(png: bytes) -> bytes:
    """A third of the size, for flat colours."""
    from PIL import Image

    small = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(small, "PNG", optimize=True)
    return small.getvalue()


def _tradeoff(summary: dict, colors: dict[str, str]) -> "Figure | None":
    points = [point for point in _points_shown(summary) if point["forgetting"]]
    if not points:
        return None
    figure, ax = _plane(summary, points, "forgetting", colors)
    front = [(100 * p["forgetting"]["mean"], p["domain_gain"]["mean"]) for p in summary["points"] if p["on_front"]]
    front += [(0.0, 0.0)] if summary["base"]["on_front"] else []
    ax.plot(*zip(*sorted(front), strict=True), color=_INK, alpha=0.5, linewidth=1, linestyle="--", zorder=1)
    ax.set_xlabel("forgetting: mean drop of the retention tasks, points")
    return figure


def _drift(summary: dict, colors: dict[str, str]) -> "Figure | None":
    """Beside the trade-off; without tasks a map shows it better."""
    points = _points_shown(summary)
    on_map = bool((summary.get("map") or {}).get("methods"))
    if not points or (on_map and not any(point["forgetting"] for point in points)):
        return None
    figure, ax = _plane(summary, points, "drift", colors)
    ax.set_xlabel("drift: KL(base ‖ model) on general text, nats per token")
    return figure


def _plane(summary: dict, points: list[dict], against: str, colors: dict[str, str]) -> "tuple[Figure, Axes]":
    """Gain over forgetting or drift, as far as the points reach: of longer intervals an arrow shows that they go on."""
    # Of a method with several settings, of which some are shown, its name says enough.
    named = {} if points == summary["points"] else method_of(summary)
    names = [named.get(point["arm"], point["label"]) for point in points]
    columns = 2 if max(map(len, names)) < 30 else 1
    figure, axes = _new_figure(_WIDTH, 3.9 + 0.16 * (len({*names}) // columns + 1))
    ax = axes[0, 0]

    def across(point: dict) -> dict:
        return in_points(point["forgetting"]) if against == "forgetting" else point["drift"]["general"]["kl_base_model"]

    limits = [_limits(f["mean"] for f in found) for found in (map(across, points), (p["domain_gain"] for p in points))]
    ax.set(xlim=limits[0], ylim=limits[1])
    if all(low <= 0 <= high for low, high in limits):
        ax.plot(0, 0, marker="*", markersize=12, color=_INK, linestyle="none", label="base")
    ax.axhline(0, color=_INK, alpha=0.25, linewidth=0.8)
    ax.axvline(0, color=_INK, alpha=0.25, linewidth=0.8)
    for name, point in zip(names, points, strict=True):
        role, color = point["role"], colors[point["arm"]]
        _draw_point(ax, across(point), point["domain_gain"], limits, role, {"color": color, "label": name})
    ax.set_ylabel("domain gain: held-out loss, nats per token")
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=8, handletextpad=0.3)
    return figure, ax


def _draw_point(ax: Any, x: dict, y: dict, limits: list[tuple[float, float]], role: str, style: dict) -> None:
    """One way to use an arm, with its intervals: paler the less of an adapter it is."""
    bars: Any = {"color": style["color"], "alpha": 0.4}
    ax.errorbar(x["mean"], y["mean"], xerr=_bars(x), yerr=_bars(y), linewidth=1, capsize=0, **bars)
    for i, (found, (low, high)) in enumerate(zip((x, y), limits, strict=True)):
        for end, limit, marker in (("low", low, "<v"[i]), ("high", high, ">^"[i])):
            if not is_absent(found[end]) and not low <= found[end] <= high:
                at = (limit, y["mean"]) if i == 0 else (x["mean"], limit)
                ax.plot(*at, marker=marker, markersize=5, clip_on=False, **bars)
    shade = float(role.removeprefix("scale_")) if role.startswith("scale_") else 1.0
    marker = {"student": "o", "teacher": "D"}.get(role, "s")
    ax.plot(x["mean"], y["mean"], marker=marker, markersize=8, alpha=0.4 + 0.6 * shade, linestyle="none", **style)


def _limits(values: Iterable[float]) -> tuple[float, float]:
    """Of an axis that shows them all, with room around."""
    low, high = (found := sorted(values))[0], found[-1]
    room = 0.2 * (high - low) or 0.2 * abs(high) or 0.1
    return low - room, high + room


def _fronts(summary: dict, colors: dict[str, str]) -> "Figure | None":
    methods = (summary.get("map") or {}).get("methods")
    if not methods:
        return None
    by_method = {method: colors[arm] for arm, method in method_of(summary).items()}
    figure, axes = _new_figure(5.0, 4.4)
    ax = axes[0, 0]
    # Lines between points are straight in the root of drift, as curves are interpolated.
    ax.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    right = 110.0
    ends: list[tuple[float, str, str]] = []
    alone: dict[str, float] = {}
    for rank, entry in enumerate(methods):
        color = by_method[entry["method"]]
        style: Any = {"color": color, "zorder": 1 if color == _GREY else 4 - rank / len(methods)}
        if entry.get("obstacle"):
            highest = _draw_alone(ax, entry, right, _HOLLOW[len(alone) % len(_HOLLOW)], style)
            if highest is not None:
                alone[entry["method"]] = highest
            continue
        if color != _GREY:
            for way in entry["ways"]:
                _draw_way(ax, way, right, style)
        if entry["front"]:
            x, y = ([0.0, *(100 * p[key] for p in entry["front"])] for key in ("drift", "gain"))
            dash, width = "--" if entry["is_control"] else "-", 1.2 if color == _GREY else 2
            ax.plot([*x, max(right, x[-1])], [*y, y[-1]], linewidth=width, linestyle=dash, **style)
            ends.append((float(np.interp(right**0.5, np.sqrt(x), y)), entry["method"], color))
    ax.plot(100, 100, "x", color=_INK, markersize=8, zorder=5)
    ax.set_ylim(0, 1.03 * max([102.0, *(y for y, *_ in ends), *alone.values()]))
    ax.set_xlim(0, right)
    ticks = (1, 5, 10, 25, 50, 75, 100)
    ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    if alone:
        ax.legend(loc="lower right", fontsize=7.5, title="without a front", title_fontsize=7.5, handletextpad=0.2)
    _name_axes(ax, summary["map"], {*alone, *(method for _, method, _ in ends)})
    _label_ends(ax, ends, right)
    return figure


def _name_axes(ax: Any, found: dict, drawn: set[str]) -> None:
    """What the map shows, and of which methods it shows nothing."""
    label, texts = found["reference"]["label"], found["drift_on"]
    absent = [entry["method"] for entry in found["methods"] if entry["method"] not in drawn]
    note = "\n" + textwrap.fill(f"no gain within this drift: {', '.join(absent)}", 70) if absent else ""
    where = "on general text" if len(texts) == 1 else f"over {len(texts)} texts"
    ax.set_xlabel(f"drift, % of {label}'s: KL(base ‖ model) {where}{note}")
    ax.set_ylabel(f"gain, % of {label}'s: fall of the held-out loss")


def _draw_alone(ax: Any, entry: dict, right: float, marker: str, style: dict) -> float | None:
    """What was measured of a method without a front, whose line would be made up. Returns the largest gain, if any is in the picture."""
    found = [(100 * p["drift"], 100 * p["gain"]) for way in entry["ways"] for p in way["points"]]
    shown = [(x, y) for x, y in found if x <= right and y >= 0]
    if not shown:
        return None
    hollow: Any = {"markersize": 5, "markerfacecolor": "none", "label": entry["method"]}
    ax.plot(*zip(*shown, strict=True), linestyle="none", marker=marker, **hollow, **style)
    return max(y for _, y in shown)


def _draw_way(ax: Any, way: dict, right: float, style: dict) -> None:
    """One setting over its scales, and an arrow at the edge where its adapter lies outside."""
    points = sorted((100 * p["drift"], 100 * p["gain"]) for p in way["points"])
    line = [(0.0, 0.0), *points] if len(points) > 1 else points
    ax.plot(*zip(*line, strict=True), linewidth=0.6, alpha=0.35, **style)
    x, y = points[-1]
    if x <= right and y >= 0:
        ax.plot(x, y, "o", markersize=2.5, **style)
    else:
        height = float(np.interp(right**0.5, np.sqrt([x for x, _ in line]), [y for _, y in line])) if x > right else y
        ax.plot(min(x, right), max(height, 0), ">" if x > right else "v", markersize=4, clip_on=False, **style)


def _label_ends(ax: Any, ends: list[tuple[float, str, str]], right: float) -> None:
    """The name of each line beside its end, moved apart where they would lie on each other."""
    bottom, top = ax.get_ylim()
    gap, ends = (top - bottom) / 26, sorted(ends)
    heights = np.array([y for y, *_ in ends])
    for _ in range(200):
        for i in range(len(ends) - 1):
            lacking = gap - (heights[i + 1] - heights[i])
            if lacking > 0:
                heights[i : i + 2] += [-lacking / 2, lacking / 2]
        heights = np.clip(heights, bottom + gap * np.arange(len(ends)), top - gap * np.arange(len(ends))[::-1])
    for (y, label, color), height in zip(ends, heights, strict=True):
        ax.annotate(
            label, (right, max(y, bottom)), (24, height), xycoords="data", textcoords=("offset points", "data"), color=color,
            fontsize=8, va="center", annotation_clip=False, arrowprops={
                "arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _bars(found: dict) -> list[list[float]] | None:
    """An interval as matplotlib takes it."""
    return None if is_absent(found["low"]) else [[found["mean"] - found["low"]], [found["high"] - found["mean"]]]


def _stage_lines(summary: dict, colors: dict[str, str]) -> "Figure | None":
    stages = summary.get("stages") or {"ways": []}
    shown = {point["label"] for point in _points_shown(summary)}
    if len(stages["ways"]) <= MANY_ARMS:  # those that are not through too
        shown |= {way["label"] for way in stages["ways"]}
    ways = [way for way in stages["ways"] if way["label"] in shown]
    if not ways:
        return None
    names = stages["names"]
    columns = 2
    rows = -(-(len(names) + 1) // columns)
    figure, axes = _new_figure(_WIDTH, 2.3 * rows + 0.5, rows, columns)
    for ax in axes.flat[len(names) + 1 :]:
        ax.set_visible(False)
    for j, ax in enumerate(axes.flat[: len(names) + 1]):
        is_loss = j < len(names)
        for way in ways:
            figures = [after["loss"][j] if is_loss else after["drift"]["general"] for after in way["after"]]
            first = stages["before"]["loss"][j]["mean"] if is_loss else 0.0
            ax.plot(
                range(len(figures) + 1), [first, *(found["mean"] for found in figures)], color=colors[way["arm"]], marker="o",
                markersize=3, linewidth=1.4, linestyle={"student": "-", "teacher": "--"}.get(way["role"], ":"), label=way["label"],
            )  # fmt: skip
        if is_loss:
            ax.axvspan(j, j + 1, color=_GREY, alpha=0.15, linewidth=0)
        ax.set_title(f"loss, {names[j]}" if is_loss else "drift, general text", fontsize=8)
        ax.set_xticks(range(len(names) + 1), ["before", *names], rotation=30, ha="right", fontsize=7)
    axes[0, 0].set_ylabel("nats per token")
    handles = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=7.5)
    return figure


def _task_bars(summary: dict, colors: dict[str, str]) -> "Figure | None":
    points = _points_shown(summary)
    names = list(summary["base"]["tasks"])
    if not points or not names:
        return None
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, axes = _new_figure(_WIDTH, (0.2 * len(points) + 0.7) * rows + 0.4, rows, columns, sharey=True)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    for ax, name in zip(axes.flat, names, strict=False):
        for i, point in enumerate(points):
            change = in_points(point["tasks"][name]["change"])
            ax.barh(i, change["mean"], color=colors[point["arm"]], alpha=0.85)
            if not is_absent(change["low"]):
                ax.plot([change["low"], change["high"]], [i, i], color=_INK, linewidth=1)
        ax.axvline(0, color=_INK, linewidth=0.8)
        base = summary["base"]["tasks"][name]
        ax.set_title(f"{name}\nbase {100 * base['score']:.1f} %\nchance {100 * base['chance']:.1f} %", fontsize=7)
    axes[0, 0].set_yticks(range(len(points)), [point["label"] for point in points])
    for ax in axes[:, 0]:
        ax.tick_params(axis="y", labelsize=8)
    axes[0, 0].invert_yaxis()
    figure.supxlabel("change, points of accuracy", color=_INK, fontsize=9)
    return figure


def _subject_bars(summary: dict, colors: dict[str, str]) -> "Figure | None":
    """Students of the trained arms, on the group with the most subjects."""
    groups = {name: task for name, task in summary["base"]["tasks"].items() if len(task["subtasks"]) > 1}
    arms = expanded_arms(summary["plan"]["arms"])
    trained = {arm for arm, options in arms.items() if "interpolate" not in (options or {})}
    points = [
        p
        for p in _points_shown(summary)
        if p["role"] == "student" and p["arm"] in trained and set(groups) & set(p["tasks"])
    ]
    if not groups or not points:
        return None
    subjects = [(group, subject) for group, task in groups.items() for subject in task["subtasks"]]
    width = max(_WIDTH, 2.4 + 0.8 * len(points))  # a title of eleven letters on each
    figure, axes = _new_figure(width, 0.2 * len(subjects) + 1.2, 1, len(points), sharey=True, sharex=True)
    for ax, point in zip(axes[0], points, strict=True):
        changes = [100 * point["tasks"][group]["subtasks"].get(subject, 0) for group, subject in subjects]
        # Most are 0 where few questions each were asked: a bar that cannot be seen makes the page larger.
        places = [i for i, change in enumerate(changes) if change]
        ax.barh(places, [changes[i] for i in places], color=colors[point["arm"]], alpha=0.85)
        ax.axvline(0, color=_INK, linewidth=0.8)
        ax.set_title(_title(point["label"]), fontsize=8)
        ax.tick_params(axis="x", labelsize=7)
    for ax in axes[0, 1:]:
        ax.tick_params(axis="y", length=0)
    labels = [subject.removeprefix("mmlu_").replace("_", " ") for _, subject in subjects]
    axes[0, 0].set_yticks(range(len(subjects)), labels, fontsize=7)
    axes[0, 0].set_ylim(len(subjects) - 0.4, -0.6)
    figure.supxlabel("change, points of accuracy", color=_INK, fontsize=9)
    return figure


def _curve_grid(summary: dict, colors: dict[str, str]) -> "Figure | None":
    curves = {name: summary["curves"][name] for name in CURVES if name in summary["curves"]}
    if not curves:
        return None
    columns = 2
    rows = -(-len(curves) // columns)
    figure, axes = _new_figure(_WIDTH, 2.0 * rows + 0.4, rows, columns, sharex=True)
    for ax in axes.flat[len(curves) :]:
        ax.set_visible(False)
    methods = method_of(summary)
    width = 0.8 if len(set(methods.values())) < len(methods) else 1.4
    for ax, (name, by_arm) in zip(axes.flat, curves.items(), strict=False):
        shown: set[str] = set()
        for arm, points in by_arm.items():
            # Of a method with several settings the colour is named once.
            label = methods[arm] if methods[arm] not in shown else None
            shown.add(methods[arm])
            ax.plot(*zip(*points, strict=True), color=colors[arm], label=label, linewidth=width)
        ax.set_title(CURVES[name], fontsize=8)
        ax.set_ylim(bottom=0)
    for ax in axes[-1]:
        ax.set_xlabel("optimizer step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7.5)
    return figure
