"""Markdown and one self-contained HTML page from a comparison's folder, or from its figures alone."""

import html
import logging
import math
import re
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..extras import require
from ..files import read_json, write_json, write_text
from .figures import in_points, is_absent, sample_answers, summarize_comparison
from .pictures import CAPTIONS, MANY_ARMS, draw_pictures, method_of
from .plan import BASE, expanded_arms
from .statistics import detectable_share, discoveries


if TYPE_CHECKING:
    from jinja2 import Environment

logger = logging.getLogger(__name__)

FIGURES = "comparison.json"
_SAMPLES = "samples.html"
# One seed: the interval is over questions alone.
_ONE_SEED = "†"
# A test that counts among all of its table.
_DISCOVERY = "‡"

# What the figures of stages are.
_STAGES = (
    "Each arm learns the domains one after the other and goes on from its adapter of the stage before; after each stage the held-out "
    "text of every domain is measured, and drift, KL(base ‖ model), from the model before all stages. With R_ij the negative loss on "
    "the domain of stage j after stage i, of T stages: backward transfer is the mean of R_Tj − R_jj over j < T, below 0 where later "
    "stages made an earlier domain worse (Lopez-Paz & Ranzato 2017); forgetting the mean of the largest R_lj with l < T, less R_Tj, "
    "above 0 where the best was lost (Chaudhry et al. 2018); forward transfer the mean of R_(j−1)j − R_0j over j > 1, above 0 where "
    "earlier stages made a later domain easier. All in nats per token. Of an arm that is not through all stages there is what was "
    "measured so far. Everything else in this report is of the models after the last "
    "stage, and domain is that of the last stage."
)


def _as_yaml(plan: dict) -> str:
    """The configuration as a user would write it."""
    suite = dict(plan["evaluation"])
    for group in ("retention_tasks", "domain_tasks"):
        suite[group] = {
            name: {key: value for key, value in options.items() if value is not None}
            for name, options in suite[group].items()
        }
    known = ("training", "stages", "arms", "reference", "controls", "seeds")
    keys = [key for key in known if plan.get(key) is not None]
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
    missing = _missing(summary)
    for part in _in_short(missing):
        logger.warning("Missing: %s", part)
    pictures = draw_pictures(summary)
    for name in CAPTIONS:
        path = Path(folder, f"{name}.png")
        if name in pictures:
            path.write_bytes(pictures[name].png)
        else:
            path.unlink(missing_ok=True)  # of an earlier report
    _judge_tests(summary)
    found = summary.get("map") or {}
    drawn = [point["scale"] for m in found.get("methods", ()) for way in m["ways"] for point in way["points"]]
    values = {
        "summary": summary,
        "texts": list(summary["points"][0]["drift"]) if summary["points"] else ["domain", "general"],
        "fold": len(summary["points"]) > MANY_ARMS,
        "scales": [f"{scale:g}" for scale in sorted(set(drawn))],
        "map_text": _map_text(found) if drawn else "",
        "stages_text": _STAGES,
        "missing": missing,
        "measured": _measured(summary),
        "plan_yaml": _as_yaml(summary["plan"]),
        "pictures": pictures,
        "captions": CAPTIONS,
        "quality": [("base", summary["base"]["generation"])]
        + [(p["label"], p["generation"]) for p in summary["points"]],
    }
    write_text(Path(folder, "report.md"), environment.get_template("report.md.j2").render(**values))
    path = Path(folder, "report.html")
    write_text(path, environment.get_template("report.html.j2").render(**values))
    return str(path)


def _judge_tests(summary: dict) -> None:
    """Adds to each test whether it counts among all of them, and where an earlier version kept none, the change it could show."""
    tests = []
    for point in summary["points"]:
        for name, found in point["tasks"].items():
            tests += found["mcnemar"]
            for test in found["mcnemar"]:
                questions, changed = summary["base"]["tasks"][name]["n"], test["lost"] + test["gained"]
                test.setdefault("detectable", detectable_share(questions, changed))
    for test, mark in zip(tests, discoveries([test["p_value"] for test in tests]), strict=True):
        test["discovery"] = mark


def _test(test: dict) -> str:
    """As a cell: `−5 +1, p 0.031‡, ≥ 0.021`."""
    mark = _DISCOVERY if test["discovery"] else ""
    shown = "" if is_absent(test["detectable"]) else f", ≥ {test['detectable']:.3f}"
    return f"−{test['lost']} +{test['gained']}, p {_p_value(test['p_value'])}{mark}{shown}"


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
    environment.filters["points"] = lambda found, signed=True: _figure(found and found | in_points(found), 1, signed)
    environment.filters["share"] = lambda found: _figure(found, signed=False, percent=True) if found else "not shown"
    environment.filters["level"] = lambda share: f"{100 * float(share):g}"
    environment.filters["obstacles"] = _obstacles
    environment.filters["subscripts"] = _subscripts
    environment.filters["percent"] = lambda found: _figure(_in_percent(found), 1, signed=False)
    environment.filters["reached"] = _reached
    environment.filters["settings"] = _settings
    environment.filters["at_scales"] = _at_scales
    environment.filters["by_text"] = lambda way: [f"{100 * share:.1f}" for share in way["by_text"]]
    environment.filters["mcnemar"] = lambda tests: list(map(_test, tests))
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


def _obstacles(methods: list[dict]) -> str:
    """Why methods have no front; a method is named where the reason does not begin with it."""
    found = [(m["method"], m["obstacle"]) for m in methods if m.get("obstacle")]
    return "; ".join(why if why.startswith(f"{name} ") else f"{name}: {why}" for name, why in found)


def _subscripts(text: str) -> str:
    """HTML of a text with indices behind `_`."""
    return re.sub(r"R_(\([^)]*\)\w|\w+)", r"R<sub>\1</sub>", html.escape(text))


def _in_percent(found: dict) -> dict:
    return found | {key: None if is_absent(found[key]) else 100 * found[key] for key in ("mean", "low", "high")}


def _reached(found: dict) -> str:
    """A drift at a gain, which some resamples or all may not reach."""
    if is_absent(found["mean"]):
        return "not reached" if is_absent(found["low"]) else f"not reached (from {100 * found['low']:.1f})"
    if is_absent(found["high"]) and not is_absent(found["low"]):
        found = found | {"high": math.inf}
    return _figure(_in_percent(found), 1, signed=False).replace("inf", "∞")


def _missing(summary: dict) -> dict[str, list[str]]:
    """By method."""
    methods, found = method_of(summary), dict[str, list[str]]()
    for part in summary["missing"]:
        arm = part.split(", seed")[0]
        found.setdefault(methods.get(arm, arm), []).append(part)
    return found


def _in_short(missing: dict[str, list[str]]) -> list[str]:
    """The parts, or where they are more than a terminal shows at a glance, a line for each method."""
    if sum(map(len, missing.values())) <= MANY_ARMS:
        return [part for parts in missing.values() for part in parts]
    return [f"{method}, {len(parts)} parts, the first: {parts[0]}" for method, parts in missing.items()]


def _measured(summary: dict) -> tuple[int, int]:
    """Of the arms with each seed, those of which nothing is missing, and how many are planned."""
    planned = len(expanded_arms(summary["plan"]["arms"])) * len(summary["plan"]["seeds"])
    return planned - len({part.split(": ")[0] for part in summary["missing"]}), planned


def _settings(method: dict) -> str:
    """How many there are: measured, of the plan, and with the most seeds."""
    text = f"{method['settings']}"
    if method["planned"] > method["settings"]:
        text += f" of {method['planned']}"
    return text if method["finalists"] == method["settings"] else f"{text}; {method['finalists']} in the front"


def _at_scales(way: dict, scales: list[str]) -> list[str]:
    points = {f"{point['scale']:g}": point for point in way["points"]}
    return [
        f"{100 * points[scale]['gain']:.0f} / {100 * points[scale]['drift']:.1f}" if scale in points else "–"
        for scale in scales
    ]


def _map_text(found: dict) -> str:
    """What the figures of the map are."""
    reference, texts = found["reference"], " and ".join(found["drift_on"])
    several = any(len(method["hypervolume"]["seeds"]) > 1 for method in found["methods"])
    seeds = (
        "Where there are several seeds they are also chosen on the others than the one they are measured on. "
        if several
        else "With one seed they were chosen on the seed that they are reported on, which flatters methods with many settings. "
    )
    return (
        f"Gain: fall of the held-out loss. Drift: KL(base ‖ model) in nats per token on {texts} text"
        f"{', their mean' if len(found['drift_on']) > 1 else ''}. Both in % of those of {reference['label']} "
        f"({reference['gain']:.3f} and {reference['drift']:.3f} nats). A method's front is the largest gain that any of its settings "
        "has at each drift, along the setting's own scales (straight in the root of drift), averaged teachers among them. Which "
        "setting is used at which drift is chosen on one half of the rows and measured on the other, and the other way round. "
        f"{seeds}Where some settings were trained with more seeds than others, a seed that picked them flatters them too. The "
        "reference is, unless the plan names it, the plain SFT that drifts least of those whose gain is not clearly below the "
        "largest. Hypervolume: the mean gain over all drifts up to the reference's. Ahead of a control: by how much its hypervolume "
        "is exceeded, on the same rows and seeds. Intervals are given the settings chosen, and too narrow where many settings are "
        "about equally good. Best setting: the one whose own curve "
        "has the largest hypervolume on all rows. Not reached (from x): not on average; the lower end of the interval is x. ∞: some "
        "resamples of the rows do not reach that gain. Of twenty comparisons with a control, one interval is expected to leave out "
        "0 by chance."
    )


def _p_value(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
