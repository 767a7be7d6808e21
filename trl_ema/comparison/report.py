"""Markdown and one self-contained HTML page from a comparison's folder, or from its figures alone."""

import logging
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..extras import require
from ..files import read_json, write_json, write_text
from .figures import in_points, is_absent, sample_answers, summarize_comparison
from .pictures import CAPTIONS, draw_pictures
from .plan import BASE


if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

FIGURES = "comparison.json"
_SAMPLES = "samples.html"
# One seed: the interval is over questions alone.
_ONE_SEED = "†"


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
    pictures = draw_pictures(summary)
    for name in CAPTIONS:
        path = Path(folder, f"{name}.png")
        if name in pictures:
            path.write_bytes(pictures[name].png)
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    values = {
        "summary": summary,
        "plan_yaml": _as_yaml(summary["plan"]),
        "pictures": {name: picture.svg for name, picture in pictures.items()},
        "captions": CAPTIONS,
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


def _write_samples(folder: str, summary: dict, environment: "Environment") -> None:
    path, samples = Path(folder, _SAMPLES), sample_answers(folder, summary)
    if samples:
        write_text(path, environment.get_template("samples.html.j2").render(samples=samples))
    else:
        path.unlink(missing_ok=True)  # of an earlier report


def _templates() -> "Environment":
    import jinja2

    loader = jinja2.FileSystemLoader(str(files(__package__) / "templates"))
    environment = jinja2.Environment(
        loader=loader, autoescape=jinja2.select_autoescape(["html.j2", "html"]), trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["fixed"] = lambda value, digits=3: "–" if is_absent(value) else f"{value:.{digits}f}"
    environment.filters["figure"] = _figure
    environment.filters["points"] = lambda found: _figure(found and found | in_points(found), 1)
    environment.filters["share"] = lambda found: _figure(found, signed=False, percent=True) if found else "not shown"
    environment.filters["mcnemar"] = lambda tests: "; ".join(
        f"−{test['lost']} +{test['gained']}, p {_p_value(test['p_value'])}" for test in tests
    )
    return environment


def _figure(found: dict | None, digits: int = 3, signed: bool = True, percent: bool = False) -> str:
    """A figure with its interval, where it has one: `+0.100 (+0.050 to +0.150)`."""
    if found is None or is_absent(found["mean"]):
        return "–"
    sign, factor, unit = ("+" if signed else ""), (100 if percent else 1), (" %" if percent else "")
    digits = 0 if percent else digits
    mean, low, high = (
        is_absent(found[key]) or f"{factor * found[key]:{sign}.{digits}f}" for key in ("mean", "low", "high")
    )
    mark = f" {_ONE_SEED}" if len(found.get("seeds", ())) == 1 else ""
    return f"{mean}{unit}" if is_absent(found["low"]) else f"{mean}{unit} ({low} to {high}{mark})"


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
