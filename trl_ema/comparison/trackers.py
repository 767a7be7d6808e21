"""What a comparison found, in the trackers that its runs log to."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from ..files import read_json
from .figures import is_absent
from .pictures import CAPTIONS
from .report import FIGURES


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


def log_report(folder: str, trackers: Sequence[str], project: str) -> None:
    """
    Log a comparison's report as one more run, named `report`: of every way to use every arm its gain, drift and forgetting, by
    the name of the figure and of the arm, and where the tracker takes them the pictures and the page in Markdown.

    Args:
        folder (`str`): With the report, see [`write_report`].
        trackers: Of accelerate's, such as `"trackio"`, `"tensorboard"` and `"wandb"`.
        project (`str`): That of the comparison's runs.
    """
    from matplotlib.image import imread

    summary = read_json(Path(folder, FIGURES))
    accelerator = Accelerator(log_with=list(trackers), project_dir=folder, cpu=True)
    # What these call a run's name; elsewhere the project is.
    accelerator.init_trackers(project, init_kwargs={name: {"name": "report"} for name in ("trackio", "wandb")})
    figures = {
        f"{name}/{label}": value for label, values in _figures(summary).items() for name, value in values.items()
    }
    accelerator.log(figures, step=0)
    pictures = {name: Path(folder, f"{name}.png") for name in CAPTIONS}
    for tracker in accelerator.trackers:
        shown = {name: imread(path)[None, ..., :3] for name, path in pictures.items() if path.is_file()}
        if tracker.name == "wandb":
            tracker.log_images(shown, step=0)
        if tracker.name == "tensorboard":
            tracker.log_images(shown, step=0, dataformats="NHWC")
            tracker.log(
                {"report": Path(folder, "report.md").read_text(encoding="utf-8")}, step=0
            )  # which it shows as Markdown
    accelerator.end_training()


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
