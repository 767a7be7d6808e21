"""The map: what each method gains and how far it drifts over all of its settings, at every scale of their adapters.

Gain is the fall of the held-out loss, drift KL(base ‖ model) as a mean over general texts; both are shares of the reference's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .statistics import (
    CLEARLY,
    gain_at_loss,
    hypervolume,
    interval,
    loss_at_gain,
    pareto_front,
    resampling_weights,
    share,
)


# Where fronts are read: gains at these drifts, drifts at these gains.
DRIFTS = (0.1, 0.25)
GAINS = (0.9, 0.98)
# Rows of a text, to be parted in two.
LEAST_ROWS = 4
# Columns of a row's sums: its loss, its tokens, its drift.
_LOSS, _TOKENS, _DRIFT = range(3)
_HALVES = (0, 1)


@dataclass(frozen=True, eq=False)
class Place:
    """
    One arm, used in one way, at one scale of its adapter.

    Args:
        arm, role, method (`str`): Whose student, teacher or interpolation.
        label (`str`): Of arm and role.
        scale (`float`): Factor of the adapter's update.
        rows (`dict`): By seed and text the sums of each row: loss in nats, tokens, KL(base ‖ model) in nats.
    """

    arm: str
    role: str
    method: str
    label: str
    scale: float
    rows: dict[int, dict[str, np.ndarray]]

    @property
    def shown(self) -> str:
        """Label of arm, role and scale."""
        return self.label if self.scale == 1 else f"{self.label} × {self.scale:g}"


class _Sample:
    """
    Gain and drift over the rows of one half of every text, or of all, and over resamples of them: shared by all places, which
    stay paired.
    """

    def __init__(self, base: dict[str, np.ndarray], half: int | None, resamples: int):
        self.rows = {
            name: np.arange(len(rows)) if half is None else np.arange(half, len(rows), 2) for name, rows in base.items()
        }
        self.weights = {
            name: resampling_weights(len(rows), resamples, seed=2 * i + (half or 0)).astype(np.float64)
            for i, (name, rows) in enumerate(self.rows.items())
        }
        self.base_loss = self._mean("domain", base["domain"], _LOSS)
        self._found: dict[Place, tuple[dict, dict]] = {}

    def _mean(self, name: str, rows: np.ndarray, column: int) -> np.ndarray:
        """Nats per token, `(1 + resamples,)`."""
        rows, weights = rows[self.rows[name]], self.weights[name]
        return (weights @ rows[:, column]) / (weights @ rows[:, _TOKENS])

    def of(self, place: Place) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        """Gain and drift by seed, nats per token."""
        if place not in self._found:
            texts = [name for name in self.rows if name != "domain"]
            self._found[place] = (
                {
                    seed: self.base_loss - self._mean("domain", rows["domain"], _LOSS)
                    for seed, rows in place.rows.items()
                },
                {
                    seed: np.mean([self._mean(name, rows[name], _DRIFT) for name in texts], axis=0)
                    for seed, rows in place.rows.items()
                },
            )
        return self._found[place]

    def by_text(self, place: Place) -> list[float]:
        """Drift of each text, mean over seeds."""
        texts = [name for name in self.rows if name != "domain"]
        return [float(np.mean([self._mean(t, rows[t], _DRIFT)[0] for rows in place.rows.values()])) for t in texts]

    def means(self, place: Place, seeds: Sequence[int]) -> tuple[float, float]:
        """Gain and drift of the sample itself over these seeds."""
        gains, drifts = self.of(place)
        return float(np.mean([gains[seed][0] for seed in seeds])), float(np.mean([drifts[seed][0] for seed in seeds]))


@dataclass
class _Method:
    """
    The settings of one method that its front is drawn from: those with the most seeds, where some were trained with more than
    others.
    """

    name: str
    places: list[Place]

    @cached_property
    def finalists(self) -> list[Place]:
        most = max(len(place.rows) for place in self.places)
        return [place for place in self.places if len(place.rows) == most]

    @cached_property
    def seeds(self) -> list[int]:
        return sorted(set.intersection(*({*place.rows} for place in self.finalists)))

    def front(self, sample: _Sample, seeds: Sequence[int]) -> list[Place]:
        """Finalists that no other beats on this sample."""
        found = [sample.means(place, seeds) for place in self.finalists]
        return [self.finalists[i] for i in pareto_front(*zip(*found, strict=True)) if found[i][0] > 0]


class Fronts:
    """
    The fronts of all methods.

    Settings are chosen and measured on different rows: the front of each half of the rows is measured on the other half, and the
    two figures averaged. A front that is measured on the rows it was chosen on looks better than it is, the more so the more
    settings were tried.

    Args:
        places (`list[Place]`): Of all methods.
        base (`dict`): The base's rows, as those of a [`Place`].
        reference ([`Place`]): Its gain and drift are 1.
    """

    def __init__(self, places: list[Place], base: dict[str, np.ndarray], reference: Place, resamples: int = 2000):
        self.reference, self.texts = reference, [name for name in base if name != "domain"]
        self.methods = {
            name: _Method(name, [place for place in places if place.method == name])
            for name in dict.fromkeys(place.method for place in places)
        }
        self.whole = _Sample(base, None, 0)
        self.halves = [_Sample(base, half, resamples) for half in _HALVES]

    def obstacle(self) -> str | None:
        """Why there is no map."""
        for half in self.halves:
            for name, values in zip(("gain", "drift"), half.of(self.reference), strict=True):
                found = interval(lambda x: x, values)
                if not (found["low"] > 0 and found["low"] >= CLEARLY * found["mean"]):  # NaN too
                    return f"{self.reference.label}, the reference, has no clear {name} on one half of the rows"
        return None

    def common_seeds(self, *methods: str) -> list[int]:
        """Of these methods' finalists and of the reference."""
        return sorted({*self.reference.rows}.intersection(*(self.methods[name].seeds for name in methods)))

    def figure(
        self, statistic: Callable[..., Any], *methods: str, then: Callable[[Any], Any] = lambda mean: mean
    ) -> dict[str, Any]:
        """
        A statistic of the fronts of one or more methods, with its interval over rows and seeds: see [`interval`].

        Args:
            statistic (callable): Of each front in turn its gains and its drifts as shares, `(places, 1 + resamples)`.
            then (callable): Of the mean of the statistic over both halves.
        """
        seeds = self.common_seeds(*methods)
        if not seeds:
            return interval(statistic, {})
        fronts = [[self.methods[name].front(self.halves[1 - half], seeds) for name in methods] for half in _HALVES]
        quantities: list[dict[int, np.ndarray]] = []
        for half, chosen in zip(self.halves, fronts, strict=True):
            for place in [self.reference, *(place for front in chosen for place in front)]:
                quantities += [{seed: values[seed] for seed in seeds} for values in half.of(place)]

        def of(*values: np.ndarray) -> np.ndarray:
            rest, found = iter(values), []
            for chosen in fronts:
                gain, drift, shares = next(rest), next(rest), []
                for front in chosen:
                    pairs = [(share(next(rest), gain), share(next(rest), drift)) for _ in front]
                    shares += list(np.array(pairs).reshape(-1, 2, len(gain)).swapaxes(0, 1))
                found.append(statistic(*shares))
            return then(np.mean(found, axis=0))

        return interval(of, *quantities)

    def drift_at(self, gain: float, method: str) -> dict[str, Any]:
        """
        Drift at a gain, with its interval; NaN where it is not reached.

        The interval is that of the reciprocal, which is 0 where the gain is not reached: where some resamples do not reach it, the
        interval has no upper end.
        """
        found = self.figure(
            lambda gains, drifts: loss_at_gain(gains, drifts, gain), method, then=lambda drift: 1 / np.asarray(drift)
        )
        ends = {"mean": found["mean"], "low": found["high"], "high": found["low"]}
        turned = {name: 1 / value if value > 0 else math.nan for name, value in ends.items()}
        return found | turned | {"by_seed": [1 / value if value > 0 else math.nan for value in found["by_seed"]]}


def summarize_map(fronts: Fronts, planned: dict[str, int], controls: Sequence[str]) -> dict[str, Any]:
    """
    The map as figures.

    The `ways` of a method are the curves of its arms, its `front` is that of all rows; figures with intervals are measured on other
    rows than those that the settings were chosen on.

    Args:
        planned (`dict`): Settings of each method in the plan.
        controls: Methods that each other is compared with.

    Returns:
        `dict`: `reference`, `texts`, `controls` and `methods` (by falling hypervolume; `ahead` is by how much their hypervolume
        exceeds each control's); or `absent`, why there is none.
    """
    obstacle = fronts.obstacle()
    if obstacle:
        return {"absent": obstacle}
    whole, seeds = fronts.whole, sorted(fronts.reference.rows)
    gain, drift = whole.means(fronts.reference, seeds)
    names = [name for name in controls if name in fronts.methods]
    methods = [
        _entry(fronts, name, gain, drift)
        | {
            "planned": planned[name],
            "is_control": name in names,
            "ahead": {control: fronts.figure(_ahead, name, control) for control in names if control != name},
        }
        for name in fronts.methods
    ]
    return {
        "reference": {"label": fronts.reference.label, "gain": gain, "drift": drift, "seeds": seeds},
        "texts": fronts.texts,
        "controls": names,
        "methods": sorted(methods, key=lambda entry: -np.nan_to_num(entry["hypervolume"]["mean"])),
    }


def _ahead(gains: np.ndarray, drifts: np.ndarray, gains_of_control: np.ndarray, drifts_of_control: np.ndarray) -> Any:
    return hypervolume(gains, drifts) - hypervolume(gains_of_control, drifts_of_control)


def _entry(fronts: Fronts, name: str, gain: float, drift: float) -> dict[str, Any]:
    method, whole = fronts.methods[name], fronts.whole
    ways: dict[str, list[Place]] = {}
    for place in sorted(method.places, key=lambda place: place.scale):
        ways.setdefault(place.label, []).append(place)
    reference = whole.by_text(fronts.reference)

    def shares(place: Place) -> dict[str, float]:
        found = whole.means(place, sorted(place.rows))
        return {"scale": place.scale, "gain": found[0] / gain, "drift": found[1] / drift}

    curves: list[dict[str, Any]] = []
    for label, places in ways.items():
        points = [shares(place) for place in places]
        own = float(hypervolume([point["gain"] for point in points], [point["drift"] for point in points]))
        itself = next(place for place in places if place.scale == 1)
        by_text = [float(share(*pair)) for pair in zip(whole.by_text(itself), reference, strict=True)]
        curves.append(
            {"label": label, "seeds": len(itself.rows), "points": points, "by_text": by_text, "hypervolume": own}
        )
    front = method.front(whole, method.seeds)
    return {
        "method": name,
        "settings": len({place.arm for place in method.places}),
        "finalists": len({place.arm for place in method.finalists}),
        "seeds": method.seeds,
        "best": max(curves, key=lambda curve: curve["hypervolume"])["label"],
        "ways": curves,
        "front": [{"label": place.shown} | shares(place) for place in front],
        "hypervolume": fronts.figure(hypervolume, name),
        "gain_at": {f"{level:g}": fronts.figure(lambda g, d, x=level: gain_at_loss(g, d, x), name) for level in DRIFTS},
        "drift_at": {f"{level:g}": fronts.drift_at(level, name) for level in GAINS},
    }
