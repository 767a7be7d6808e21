"""What a comparison found, in the trackers that its runs log to."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, get_available_trackers
from accelerate.utils import LoggerType

from ..evaluation.answers import TEXT
from ..files import read_json, write_json
from .figures import is_absent
from .pictures import CAPTIONS
from .plan import Arm, Comparison, kept_comparison
from .report import FIGURES


# What each tracker was given.
TRACKED = "tracked.json"


def check_trackers(trackers: Sequence[str]) -> None:
    """
    Raises `ValueError` if the report cannot be logged to one of them, as accelerate has none of its name, and `ImportError` if its
    package is not installed. Trainings have some more than accelerate.
    """
    known = LoggerType.list()
    strange = [name for name in trackers if name not in known]
    if strange:
        raise ValueError(
            f"`report_to` under `training` names {strange}, to which a comparison's report cannot be logged; expected some of {known}. "
            "Leave them out."
        )
    missing = [name for name in trackers if name not in ("all", *map(str, get_available_trackers()))]
    if missing:
        raise ImportError(
            f"`report_to` under `training` names {missing[0]!r}, whose package is not installed. Install it with `pip install "
            f"{missing[0]}`, or leave it out."
        )


def log_comparison(folder: str) -> None:
    """
    Log what a comparison found to the trackers of its runs, see [`log_runs`] and [`log_report`]. Nothing is logged twice: what each
    tracker was given is kept in `tracked.json`.

    Args:
        folder (`str`): `output_dir` of [`run_comparison`], with its report, see [`write_report`].
    """
    comparison = kept_comparison(folder)
    log_runs(comparison)
    log_report(folder, comparison.trackers, comparison.project, _space(comparison.training))


def log_runs(comparison: Comparison) -> None:
    """
    Log of every run what was measured of its student, teacher and scaled adapters, to that run: `eval/student_domain_loss`,
    `eval/teacher_general_drift`, `eval/student_TASK`. In trackio and in TensorBoard alone: others find no run again by its name. An arm
    that interpolates, and so was not trained, gets a run for them.
    """
    ways = {"trackio": _to_trackio, "tensorboard": _to_tensorboard}
    for stage, arm, seed in product(comparison.by_stage(), comparison.arms.values(), comparison.seeds):
        figures = _measured(stage, arm, seed)
        if not figures:
            continue
        for tracker in ways.keys() & {*_by_name(comparison.trackers)}:
            name = stage.tracking(arm, seed)["run_name"]
            if _logged(comparison.output_dir).get(tracker, {}).get(name) != figures:
                ways[tracker](stage, arm, seed, figures)
                _note(comparison.output_dir, tracker, name, figures)


def _by_name(trackers: Sequence[str]) -> list[str]:
    """Without `all`, which means every one that is installed."""
    return [*map(str, get_available_trackers())] if "all" in trackers else list(trackers)


def _logged(folder: str) -> dict[str, dict[str, Any]]:
    """By tracker and by the name of a run, what it was given."""
    path = Path(folder, TRACKED)
    return read_json(path) if path.is_file() else {}


def _note(folder: str, tracker: str, run: str, given: Any) -> None:
    logged = _logged(folder)
    write_json(Path(folder, TRACKED), logged | {tracker: logged.get(tracker, {}) | {run: given}})


def _measured(stage: Comparison, arm: Arm, seed: int) -> dict[str, float]:
    """As far as it was."""
    found: dict[str, Any] = {}
    for role, (_, folder, _) in stage.evaluations(arm, seed).items():
        text = read_json(path) if (path := Path(folder, TEXT)).is_file() else {}
        for name, values in text.items():
            if isinstance(values, dict) and "loss" in values:
                found[f"{role}_{name}_loss"] = values["loss"]
                found[f"{role}_{name}_drift"] = values.get("kl_base_model")
        found |= {f"{role}_{name}": value for name, value in (text.get("generation") or {}).items()}
        answered = {name: Path(folder, f"{name}.json") for name in stage.suite.tasks}
        found |= {f"{role}_{name}": read_json(path)["score"] for name, path in answered.items() if path.is_file()}
    return {f"eval/{name}": value for name, value in found.items() if not is_absent(value)}


def _to_trackio(stage: Comparison, arm: Arm, seed: int, figures: dict[str, float]) -> None:
    import trackio

    options, made = stage.options(arm, seed), _provenance(stage, arm, seed)
    project, name = options["project"], options["run_name"]
    try:
        runs = [run for run in trackio.Api().runs(project) if run.name == name]
    except ValueError:  # no such project on this machine
        runs = []
    # Whoever goes on with a run gives its configuration anew.
    kept = (runs[-1].config if runs else made.get("arguments")) or {}
    trackio.init(
        project=project,
        name=name,
        group=kept.get("_Group") or arm.name,
        resume="allow",
        config={key: value for key, value in kept.items() if not key.startswith("_")},  # those are trackio's own
        **_space(options),
    )
    trackio.log(figures | {"train/global_step": made.get("steps", 0)})
    trackio.finish()


def _to_tensorboard(stage: Comparison, arm: Arm, seed: int, figures: dict[str, float]) -> None:
    """Into the newest folder that the training logged to; `runs/evaluation` where it logged elsewhere."""
    root = Path(stage.folder(arm.name, seed), "runs")
    own = [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    folder = max(own, key=lambda path: path.stat().st_mtime, default=root / "evaluation")
    tracker = TensorBoardTracker(folder.name, str(root))
    tracker.start()
    tracker.log(figures, step=_provenance(stage, arm, seed).get("steps", 0))
    tracker.finish()


def _provenance(stage: Comparison, arm: Arm, seed: int) -> dict[str, Any]:
    """Of a training; empty where there was none."""
    path = Path(stage.folder(arm.name, seed), "metrics.json")
    return read_json(path).get("provenance", {}) if path.is_file() else {}


def _space(training: Mapping[str, Any]) -> dict[str, Any]:
    """Where trackio's runs are, as transformers tells it by the options of a training; by default in a folder on this machine."""
    names = {"space_id": "trackio_space_id", "bucket_id": "trackio_bucket_id", "private": "hub_private_repo"}
    return {name: training.get(option) for name, option in names.items()}


def log_report(folder: str, trackers: Sequence[str], project: str, space: Mapping[str, Any] | None = None) -> None:
    """
    Log a comparison's report as one more run, named `report`: of every way to use every arm its gain, drift and forgetting, by
    the name of the figure and of the arm, and in trackio, TensorBoard and Weights & Biases the pictures, in the first two the page in
    Markdown.

    A report that has changed is logged again: in trackio and Weights & Biases as one more step of that run, in TensorBoard in the place
    of the earlier one, elsewhere as another run.

    Args:
        folder (`str`): With the report, see [`write_report`].
        trackers: Of accelerate's, such as `"trackio"`, `"tensorboard"` and `"wandb"`.
        project (`str`): That of the comparison's runs.
        space (*optional*): Options of `trackio.init` that say where its runs are.
    """
    summary, page = Path(folder, FIGURES).read_bytes(), Path(folder, "report.md").read_text(encoding="utf-8")
    version = hashlib.sha256(summary + page.encode()).hexdigest()
    due = [name for name in _by_name(trackers) if _logged(folder).get(name, {}).get("report") != version]
    if not due:
        return
    accelerator = Accelerator(log_with=due, project_dir=folder, cpu=True)
    # What these call a run's name; elsewhere the project is.
    run = {"name": "report", "resume": "allow"}
    kwargs = {"trackio": run | {**(space or {})}, "wandb": run | {"id": "report"}, "tensorboard": {"purge_step": 0}}
    accelerator.init_trackers(project, init_kwargs=kwargs)
    figures = {
        f"{name}/{label}": value
        for label, values in _figures(read_json(Path(folder, FIGURES))).items()
        for name, value in values.items()
    }
    pictures = {name: path for name in CAPTIONS if (path := Path(folder, f"{name}.png")).is_file()}
    for tracker in accelerator.trackers:
        _log_to(tracker, figures, pictures, page)
    accelerator.end_training()
    for name in due:
        _note(folder, name, "report", version)


def _log_to(tracker: Any, figures: dict[str, float], pictures: dict[str, Path], page: str) -> None:
    """The report, as far as the tracker takes it."""
    from matplotlib.image import imread

    if tracker.name == "trackio":
        import trackio

        shown = {name: trackio.Image(path, caption=CAPTIONS[name]) for name, path in pictures.items()}
        tracker.log({**figures, **shown, "report": trackio.Markdown(page)})
        return
    step = None if tracker.name == "wandb" else 0  # which takes none twice
    tracker.log(figures, step=step)
    images = {name: imread(path)[None, ..., :3] for name, path in pictures.items()}
    if tracker.name == "wandb":
        tracker.log_images(images, step=step)
    if tracker.name == "tensorboard":
        tracker.log_images(images, step=step, dataformats="NHWC")
        tracker.log({"report": page}, step=step)  # which it shows as Markdown


def _figures(summary: dict) -> dict[str, dict[str, float]]:
    """By the label of a way to use an arm; what was not measured is left out."""
    found = {}
    for point in summary["points"]:
        values = {"gain": point["domain_gain"], "accuracy lost": point["forgetting"]}
        values |= {f"drift on {text} text": kinds["kl_base_model"] for text, kinds in point["drift"].items()}
        found[point["label"]] = {
            name: figure["mean"]
            for name, figure in values.items()
            if figure is not None and not is_absent(figure["mean"])
        }
    for way in summary.get("stages", {}).get("ways", ()):
        for name, key in (("backward transfer", "backward_transfer"), ("forgetting over stages", "forgetting")):
            if way[key] is not None:  # of a way that is through
                found.setdefault(way["label"], {})[name] = way[key]["mean"]
    return found
