"""The map: what each method gains and how far it drifts over all of its settings, at every scale of their adapters.

Gain is the fall of the held-out loss, drift KL(base ‖ model) as a mean over general texts; both are shares of the reference's.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .curves import LEVELS, Curve, choose, drift_at, follow, gain_at, hypervolume
from .plan import LEAST_SCALES
from .statistics import CLEARLY, interval, resampling_weights, share


# Where fronts are read: gains at these drifts, drifts at these gains.
DRIFTS = (0.1, 0.25)
GAINS = (0.9, 0.98)
# Of a row's sums: loss, tokens, drift.
_LOSS, _TOKENS, _DRIFT = range(3)
_HALVES = (0, 1)

# By seed and text the sums of each row: loss in nats, tokens, KL(base ‖ model) in nats.
Rows = dict[int, dict[str, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Setting:
    """
    One arm, used in one way, at every scale of its adapter that was measured.

    Args:
        arm, method (`str`): Whose student, teacher or interpolation.
        label (`str`): Of arm and role.
        rows (`dict`): By scale, the adapter's own being 1.
        scalable (`bool`): Whether other scales mean anything.
    """

    arm: str
    method: str
    label: str
    rows: dict[float, Rows]
    scalable: bool = True

    @property
    def own(self) -> float:
        """The adapter itself, or the largest scale that an interpolation has."""
        return 1.0 if 1.0 in self.rows else max(self.rows)

    @property
    def seeds(self) -> frozenset[int]:
        """Of the adapter itself."""
        return frozenset(self.rows[self.own])

    def scales(self, seeds: Sequence[int]) -> list[float]:
        """Those that were measured with all of these seeds, rising."""
        return sorted(scale for scale, rows in self.rows.items() if {*seeds} <= {*rows})


@dataclass(frozen=True, eq=False)
class _Amount:
    """Gain and drift in nats per token, each `(1 + resamples,)`."""

    gain: np.ndarray
    drift: np.ndarray


class _Sample:
    """
    Gain and drift over the rows of one half of every text, or of all, and over resamples of them: shared by all settings, which
    stay paired.
    """

    def __init__(
        self,
        base: dict[str, np.ndarray],
        reference: Setting,
        drift_on: list[str] | None,
        half: int | None,
        resamples: int,
    ):
        self.reference = reference
        self.rows = {
            name: np.arange(len(rows)) if half is None else np.arange(half, len(rows), 2) for name, rows in base.items()
        }
        self.weights = {
            name: resampling_weights(len(rows), resamples, seed=2 * i + (half or 0)).astype(np.float64)
            for i, (name, rows) in enumerate(self.rows.items())
        }
        self.texts = [name for name in base if name != "domain"]
        self.drift_on = drift_on or self.texts
        self.base_loss = self._mean("domain", base["domain"], _LOSS)
        self._found: dict[tuple[Setting, float, int], _Amount] = {}

    def _mean(self, name: str, rows: np.ndarray, column: int) -> np.ndarray:
        """Nats per token, `(1 + resamples,)`."""
        rows, weights = rows[self.rows[name]], self.weights[name]
        return (weights @ rows[:, column]) / (weights @ rows[:, _TOKENS])

    def of(self, setting: Setting, scale: float, seed: int) -> _Amount:
        """Of one run."""
        key = (setting, scale, seed)
        if key not in self._found:
            rows = setting.rows[scale][seed]
            drifts = [self._mean(name, rows[name], _DRIFT) for name in self.drift_on]
            self._found[key] = _Amount(
                self.base_loss - self._mean("domain", rows["domain"], _LOSS), np.mean(drifts, axis=0)
            )
        return self._found[key]

    def mean(self, setting: Setting, scale: float, seeds: Sequence[int]) -> _Amount:
        """Over seeds."""
        found = [self.of(setting, scale, seed) for seed in seeds]
        return _Amount(np.mean([x.gain for x in found], axis=0), np.mean([x.drift for x in found], axis=0))

    def curve(self, setting: Setting, scales: Sequence[float], seeds: Sequence[int]) -> Curve:
        """As shares of the reference's over the same seeds."""
        unit = self.mean(self.reference, self.reference.own, seeds)
        found = [self.mean(setting, scale, seeds) for scale in scales]
        gains, drifts = [share(x.gain, unit.gain) for x in found], [share(x.drift, unit.drift) for x in found]
        return Curve(np.array(gains), np.array(drifts), setting.scalable)

    def drift_by_text(self, setting: Setting, seeds: Sequence[int]) -> list[float]:
        """Of the adapter itself, as shares of the reference's over the same seeds."""

        def mean(of: Setting, name: str) -> float:
            return float(np.mean([self._mean(name, of.rows[of.own][seed][name], _DRIFT)[0] for seed in seeds]))

        return [float(share(mean(setting, name), mean(self.reference, name))) for name in self.texts]


@dataclass
class _Method:
    """
    The settings of one method that its front is drawn from: those with the most seeds, where some were trained with more than
    others.
    """

    name: str
    settings: list[Setting]
    seeds_of_reference: frozenset[int]

    @cached_property
    def seeds(self) -> list[int]:
        """The largest set of seeds, in common with the reference, that a setting has; of several the one that most settings have."""
        sets: list[frozenset[int]] = [setting.seeds & self.seeds_of_reference for setting in self.settings]

        def rank(seeds: frozenset[int]) -> tuple[int, int]:
            return len(seeds), sum(seeds <= setting.seeds for setting in self.settings)

        best: frozenset[int] = max(sets, key=rank)
        return sorted(best)

    @cached_property
    def finalists(self) -> list[Setting]:
        return [setting for setting in self.settings if {*self.seeds} <= setting.seeds]

    @cached_property
    def obstacle(self) -> str | None:
        """Why the front has no figures."""
        if not self.seeds:
            return "no seed in common with the reference"
        for setting in self.finalists:
            between = [scale for scale in setting.scales(self.seeds) if 0 < scale < 1]
            if setting.scalable and len(between) < LEAST_SCALES:
                scales = f"{len(between)} scale{'' if len(between) == 1 else 's'}"
                return f"{setting.label} is measured at {scales} between 0 and 1, fewer than {LEAST_SCALES}"
        return None


class Fronts:
    """
    The fronts of all methods: the upper envelope of their settings' own curves, see [`Curve`].

    Settings are chosen and measured on different rows, and on different seeds where there are several: which setting is used at
    each level of drift is fixed on one half of the rows and on the other seeds, and what it gains is read on the other half with
    the seed left out. A front that is measured on what it was chosen on looks better than it is, the more so the more settings
    were tried.

    Args:
        settings (`list[Setting]`): Of all methods.
        base (`dict`): Rows of the base, by text.
        reference ([`Setting`]): Its gain and drift are 1.
        drift_on (`list[str]`, *optional*): The texts whose mean is the drift; all but the domain's by default.
    """

    def __init__(
        self,
        settings: list[Setting],
        base: dict[str, np.ndarray],
        reference: Setting,
        drift_on: list[str] | None = None,
        resamples: int = 2000,
    ):
        self.reference = reference
        self.methods = {
            name: _Method(name, [setting for setting in settings if setting.method == name], reference.seeds)
            for name in dict.fromkeys(setting.method for setting in settings)
        }
        self.whole = _Sample(base, reference, drift_on, None, 0)
        self.halves = [_Sample(base, reference, drift_on, half, resamples) for half in _HALVES]
        self._measured: dict[tuple[str, tuple[int, ...]], dict[int, np.ndarray]] = {}

    def obstacle(self) -> str | None:
        """Why there is no map."""
        for half in self.halves:
            found = {seed: half.of(self.reference, self.reference.own, seed) for seed in self.reference.seeds}
            for name in ("gain", "drift"):
                values = {seed: getattr(amount, name) for seed, amount in found.items()}
                over = interval(lambda x: x, values)
                clear = over["low"] > 0 and over["low"] >= CLEARLY * over["mean"]  # not NaN
                if not clear or min(over["by_seed"]) <= 0:
                    return f"{self.reference.label}, the reference, has no clear {name} on one half of the rows"
        return None

    def common_seeds(self, *methods: str) -> list[int]:
        """Of these methods' finalists and of the reference."""
        return sorted(self.reference.seeds.intersection(*(self.methods[name].seeds for name in methods)))

    def measured(self, name: str, seeds: Sequence[int]) -> dict[int, np.ndarray]:
        """By seed the gains of a method at each level of drift, `(levels, 1 + resamples)`, mean over both halves of the rows."""
        key = (name, tuple(seeds))
        if key not in self._measured:
            self._measured[key] = {}
            for seed in seeds:
                others = [other for other in seeds if other != seed] or seeds
                halves = [self._on_half(name, half, others, seed, seeds) for half in _HALVES]
                self._measured[key][seed] = np.mean(halves, axis=0)
        return self._measured[key]

    def _on_half(self, name: str, half: int, others: Sequence[int], seed: int, seeds: Sequence[int]) -> np.ndarray:
        finalists = self.methods[name].finalists
        scales = [setting.scales(seeds) for setting in finalists]
        pairs = list(zip(finalists, scales, strict=True))
        chosen = choose([self.halves[1 - half].curve(*pair, others) for pair in pairs])
        return follow(chosen, [self.halves[half].curve(*pair, [seed]) for pair in pairs])

    def figure(self, statistic: Callable[..., Any], *methods: str) -> dict[str, Any]:
        """
        A statistic of the fronts of one or more methods, with its interval over rows and seeds, given the settings chosen: see
        [`interval`].

        Args:
            statistic (callable): Of each method's gains at [`LEVELS`], `(levels, 1 + resamples)`.
        """
        seeds = self.common_seeds(*methods)
        if not seeds or any(self.methods[name].obstacle for name in methods):
            return interval(statistic, {})
        return interval(statistic, *(self.measured(name, seeds) for name in methods))

    def drift_at(self, gain: float, method: str) -> dict[str, Any]:
        """
        Drift at a gain, with its interval; NaN where it is not reached.

        The interval is that of the reciprocal, which is 0 where the gain is not reached: where some resamples do not reach it, the
        interval has no upper end.
        """
        found = self.figure(lambda gains: 1 / drift_at(gains, gain), method)
        ends = {"mean": found["mean"], "low": found["high"], "high": found["low"]}
        turned = {name: 1 / value if value > 0 else math.nan for name, value in ends.items()}
        return found | turned | {"by_seed": [1 / value if value > 0 else math.nan for value in found["by_seed"]]}


def summarize_map(fronts: Fronts, planned: dict[str, int], controls: Sequence[str]) -> dict[str, Any]:
    """
    The map as figures.

    The `ways` of a method are the curves of its settings, its `front` is that of all rows; figures with intervals are measured on
    other rows than those that the settings were chosen on.

    Args:
        planned (`dict`): Settings of each method in the plan.
        controls: Methods that each other is compared with.

    Returns:
        `dict`: `reference`, `texts`, `controls` and `methods` (by falling hypervolume; `ahead` is by how much their hypervolume
        exceeds each control's; `obstacle` is why they have no figures); or `absent`, why there is none.
    """
    obstacle = fronts.obstacle()
    if obstacle:
        return {"absent": obstacle}
    seeds = sorted(fronts.reference.seeds)
    unit = fronts.whole.mean(fronts.reference, fronts.reference.own, seeds)
    names = [name for name in controls if name in fronts.methods]
    methods = [
        _entry(fronts, name)
        | {
            "planned": planned[name],
            "is_control": name in names,
            "ahead": {control: fronts.figure(_ahead, name, control) for control in names if control != name},
        }
        for name in fronts.methods
    ]
    return {
        "reference": {
            "label": fronts.reference.label, "gain": float(unit.gain[0]), "drift": float(unit.drift[0]), "seeds": seeds,
        },
        "texts": fronts.whole.texts,
        "drift_on": fronts.whole.drift_on,
        "controls": names,
        "methods": sorted(methods, key=lambda entry: -np.nan_to_num(entry["hypervolume"]["mean"])),
    }  # fmt: skip


def _ahead(gains: np.ndarray, gains_of_control: np.ndarray) -> np.ndarray:
    return hypervolume(gains) - hypervolume(gains_of_control)


def _entry(fronts: Fronts, name: str) -> dict[str, Any]:
    method = fronts.methods[name]
    ways = {setting: _way(fronts, setting) | {"finalist": setting in method.finalists} for setting in method.settings}
    best = max(method.finalists, key=lambda setting: ways[setting]["hypervolume"])
    return {
        "method": name,
        "settings": len({setting.arm for setting in method.settings}),
        "finalists": len({setting.arm for setting in method.finalists}),
        "seeds": method.seeds,
        "obstacle": method.obstacle,
        "best": best.label,
        "ways": list(ways.values()),
        "front": _drawn(fronts, method),
        "hypervolume": fronts.figure(hypervolume, name),
        "gain_at": {f"{level:g}": fronts.figure(lambda gains, x=level: gain_at(gains, x), name) for level in DRIFTS},
        "drift_at": {f"{level:g}": fronts.drift_at(level, name) for level in GAINS},
    }


def _way(fronts: Fronts, setting: Setting) -> dict[str, Any]:
    """One setting on all rows, as shares of the reference's over the same seeds, or over all of its own where they share none."""
    scales = sorted(setting.rows)
    found = np.array([_paired(fronts, setting, scale) for scale in scales])
    itself = Curve(found[:, :1], found[:, 1:], setting.scalable)
    points = zip(scales, itself.gains[:, 0], itself.drifts[:, 0], strict=True)
    common = sorted(setting.seeds & fronts.reference.seeds)
    return {
        "label": setting.label,
        "arm": setting.arm,
        "seeds": len(setting.seeds),
        "points": [{"scale": scale, "gain": float(gain), "drift": float(drift)} for scale, gain, drift in points],
        "by_text": fronts.whole.drift_by_text(setting, common) if common else [math.nan] * len(fronts.whole.texts),
        "hypervolume": float(hypervolume(follow(choose([itself]), [itself]))[0]),
    }


def _paired(fronts: Fronts, setting: Setting, scale: float) -> tuple[float, float]:
    whole, reference = fronts.whole, fronts.reference
    seeds = sorted(setting.rows[scale])
    common = [seed for seed in seeds if seed in reference.seeds]
    unit = whole.mean(reference, reference.own, common or sorted(reference.seeds))
    found = whole.mean(setting, scale, common or seeds)
    return float(share(found.gain, unit.gain)[0]), float(share(found.drift, unit.drift)[0])


def _drawn(fronts: Fronts, method: _Method) -> list[dict[str, Any]]:
    """The front of all rows up to a little beyond the reference's drift: where it bends in the root of drift."""
    if not method.seeds:
        return []
    curves = [fronts.whole.curve(setting, setting.scales(method.seeds), method.seeds) for setting in method.finalists]
    chosen = choose(curves)
    gains, roots = follow(chosen, curves)[:, 0], np.sqrt(LEVELS)
    slopes = np.diff(gains) / np.diff(roots)
    last = int((LEVELS <= 1.2).sum())
    bends = [i for i in range(1, last) if i == last - 1 or abs(slopes[i] - slopes[i - 1]) > 1e-6]
    return [
        {"label": method.finalists[chosen[0][i]].label, "gain": float(gains[i]), "drift": float(LEVELS[i])}
        for i in bends
        if chosen[0][i] >= 0
    ]
