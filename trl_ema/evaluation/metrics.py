"""Which of lm-eval's figures of a question is its score: one number, of which the task's score is the mean."""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np


# Where a task has them.
_PREFERRED = ("acc_norm", "acc")
# Of a task that names no filter.
NO_FILTER = "none"


def check_metric(task: str, definition: dict, asked: str | None) -> None:
    """
    Raises `ValueError` if no question of the task has one number that `asked` (`metric` or `metric@filter`; by default the task's own)
    could mean. What only the task's own code knows is not judged here, but where the answers are: [`metric_of`].

    Args:
        definition (`dict`): lm-eval's, as in its YAML file.
    """
    offered, (metric, chosen) = _offered(definition), _parts(asked)
    filters = [str(one["name"]) for one in definition.get("filter_list") or ()] or [NO_FILTER]
    if not offered:  # a task that is written in Python
        return
    if metric is not None and metric not in offered:
        raise ValueError(_refusal(task, f"has no metric {metric!r}", offered))
    if metric is not None and offered[metric] is not None:
        raise ValueError(_refusal(task, f"is scored by {metric!r}, which {offered[metric]}", offered))
    if metric is None and not [name for name, obstacle in offered.items() if obstacle is None]:
        raise ValueError(_refusal(task, "has no number of each question", offered))
    if chosen is not None and chosen not in filters:
        raise ValueError(
            f"Task {task!r} has no filter {chosen!r}. It has {', '.join(filters)}: give one of them as `metric@filter`."
        )


def metric_of(task: str, definition: dict, samples: Sequence[dict], asked: str | None) -> tuple[str, str]:
    """
    Metric and filter whose number is the score of each of the task's `samples`, lm-eval's records of questions.

    Raises:
        ValueError: There is none; the text says which there are.
    """
    metric, chosen = _parts(asked)
    chosen = chosen or samples[0]["filter"]
    of_filter = [sample for sample in samples if sample["filter"] == chosen]
    if not of_filter:
        found = list(dict.fromkeys(sample["filter"] for sample in samples))
        raise ValueError(f"Task {task!r} has no filter {chosen!r}. It has {', '.join(found)}.")
    offered = _offered(definition)
    names = [name for name in of_filter[0]["metrics"] if all(_is_number(sample.get(name)) for sample in of_filter)]
    usable = [name for name in names if offered.get(name) is None]
    first = [name for name in (*_PREFERRED, *usable) if name in usable]
    if metric is None and first:
        return first[0], chosen
    if metric not in usable:
        raise ValueError(
            f"Task {task!r} is scored by {', '.join(of_filter[0]['metrics'])}; expected one number per question"
            f"{f' as `{metric}`' if metric else ''}, and "
            + (f"there is one as {', '.join(usable)}. Give that as `metric`" if usable else "there is none")
            + ". The answers are kept: they are not asked again."
        )
    return str(metric), chosen


def numbers_of(sample: dict) -> dict[str, float]:
    """All figures of a question that are one number."""
    return {name: float(sample[name]) for name in sample["metrics"] if _is_number(sample.get(name))}


def full_name(metric: str, chosen: str) -> str:
    """As it is given and kept: with its filter where the task has filters."""
    return metric if chosen == NO_FILTER else f"{metric}@{chosen}"


def chance_of(metric: str, sample: dict) -> float:
    """
    Score of guessing. lm-eval asks each option by itself, and for `acc_mutual_info` each once more without the question; a task with
    one request, or whose score is no accuracy, has no options to guess from.
    """
    choices = len(sample["arguments"]) // (2 if "acc_mutual_info" in sample["metrics"] else 1)
    return 1 / choices if choices > 1 and metric.startswith("acc") else 0.0


def _parts(asked: str | None) -> tuple[str | None, str | None]:
    metric, at, chosen = (asked or "").partition("@")
    return metric or None, chosen if at else None


def _offered(definition: dict) -> dict[str, str | None]:
    """The metrics that a task's definition names; why the mean of one is not of a number of each question, better if higher."""
    from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY

    entries = definition.get("metric_list")
    if entries is None:
        names = DEFAULT_METRIC_REGISTRY.get(definition.get("output_type"), ())
        entries = [{"metric": name} for name in names]
    return {_name(entry["metric"]): _obstacle(entry) for entry in entries}


def _obstacle(entry: dict) -> str | None:
    import lm_eval.api.metrics  # noqa: F401  fills the registries
    from lm_eval.api.registry import AGGREGATION_REGISTRY, HIGHER_IS_BETTER_REGISTRY, METRIC_AGGREGATION_REGISTRY

    name, how = _name(entry["metric"]), entry.get("aggregation")
    if how is None and name in METRIC_AGGREGATION_REGISTRY:
        known = METRIC_AGGREGATION_REGISTRY[name]
        how = next((key for key, function in AGGREGATION_REGISTRY.items() if function is known), None)
    # The path of a function says nothing: the numbers will.
    if isinstance(how, str) and "/" not in how and how != "mean":
        return "is of all answers together"
    higher = entry.get("higher_is_better", HIGHER_IS_BETTER_REGISTRY.get(name, None))
    return "is better when it is lower" if higher is False else None


def _name(metric: Any) -> str:
    """A function of the task's own stands in the definition as its path."""
    name = metric.__name__ if callable(metric) else str(metric)
    return name.rpartition(".")[2] if "/" in name else name


def _refusal(task: str, what: str, offered: dict[str, str | None]) -> str:
    usable = [name for name, obstacle in offered.items() if obstacle is None]
    others = f"Give one of {', '.join(usable)} as `metric`, or choose" if usable else "Choose"
    return (
        f"Task {task!r} {what}; expected one number per question, of which the score is the mean and more is better. It is scored by "
        f"{list(offered)}. {others} another task."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real | np.bool_) and math.isfinite(value)
