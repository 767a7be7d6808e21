"""Decay of the average and ramp of the divergence's weight: plain numbers in, numbers out."""

import math
from dataclasses import dataclass
from typing import ClassVar


# Of a weight that is controlled: how far it may go from where it began, as factors.
_LOWEST, _HIGHEST = 1e-3, 30.0
EARLY = 1.0  # what is allowed beyond a budget when a run begins, as a share of it
_PULLS = 20.0  # times its lowest: from there on a weight pulls, and its divergence falls with the learning rate
_LEAST = 1e-9  # of a ratio whose logarithm is taken


def half_life_to_decay(half_life: float, total_steps: int, update_steps: int = 1) -> float:
    r"""
    Decay per update after which half of the teacher is replaced every `half_life · total_steps` optimizer steps.

        d = 0.5^(update_steps / (half_life · total_steps))

    Args:
        half_life (`float`): Fraction of the run, above 0.
        total_steps (`int`): Optimizer steps of the whole run.
        update_steps (`int`): Optimizer steps between two updates.

    Returns:
        `float`: share of the old teacher kept per update, in (0, 1).
    """
    return 0.5 ** (update_steps / (half_life * total_steps))


def warmed_up_decay(decay: float, num_updates: int) -> float:
    """
    Early updates follow the student quickly: min(d, (1 + t) / (10 + t)) after `t = num_updates` updates.

    Source: TensorFlow's `ExponentialMovingAverage(num_updates=...)`.
    """
    return min(decay, (1 + num_updates) / (10 + num_updates))


def sigmoid_ramp(step: int, ramp_steps: float) -> float:
    """
    exp(−5·(1 − x)²) with x = step / ramp_steps, and 1 from `ramp_steps` on (or if there is no ramp).

    Source: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780, section 3.
    """
    if step >= ramp_steps:
        return 1.0
    return math.exp(-5.0 * (1.0 - step / ramp_steps) ** 2)


@dataclass
class RampedWeight:
    """
    The weight λ of a divergence at each optimizer step: `weight` times [`sigmoid_ramp`]. Who uses it knows no more of it than
    these methods and `observes`, so a weight that is controlled by what it observes can stand in its place.

    Args:
        weight (`float`): After the ramp.
        ramp_steps (`float`): Optimizer steps of the ramp; 0 for none.
    """

    weight: float
    ramp_steps: float = 0.0

    observes: ClassVar[bool] = False  # which costs a message between the ranks at each step

    def value(self, step: int) -> float:
        """λ after `step` optimizer steps."""
        return self.weight * sigmoid_ramp(step, self.ramp_steps)

    def observe(self, divergence: float, step: int) -> None:
        """After optimizer step `step`: D over its whole batch, nats per token, the same on all ranks. Of no use to a ramp."""

    def state(self) -> dict[str, float]:
        """What a resumed run must know, as JSON holds it; a ramp follows from the step."""
        return {}

    def load(self, state: dict[str, float]) -> None:
        """The reverse of [`state`]."""


@dataclass
class SmoothedMean:
    """
    An exponential mean of a number at each step, m ← β·m + (1 − β)·x, corrected for its start at 0.

    Args:
        memory (`float`): β.
    """

    memory: float = 0.9

    def __post_init__(self) -> None:
        self.mean, self.steps = 0.0, 0

    def add(self, value: float) -> float:
        """The mean, with the value of another step."""
        self.steps += 1
        self.mean = self.memory * self.mean + (1 - self.memory) * value
        return self.mean / (1 - self.memory**self.steps)

    def state(self) -> dict[str, float]:
        """What a resumed run must know, as JSON holds it."""
        return {"mean": self.mean, "steps": self.steps}

    def load(self, state: dict[str, float]) -> None:
        """The reverse of [`state`]."""
        self.mean, self.steps = state["mean"], int(state["steps"])


@dataclass
class BudgetedWeight:
    """
    A weight λ that brings a divergence to a budget by the end of a run, a proportional-integral controller of ln λ:

        b = budget · (1 + s·(1 − t/T))                m ← β·m + (1 − β)·D after each optimizer step t of T
        e = ln(m / b), held within ±1                 i ← i + η·e
        ln λ = i + κ·e                                s = ln(e^i / λ_min) / ln 20, at most 1

    with λ held between λ_min, a thousandth of where it began, and thirty times that. Above b it rises, below it falls. The integral alone
    would be late: a student takes some ten steps to follow its weight. It is pressed down in a few steps and rises again slowly,
    and a part of D is noise, which goes with the learning rate: so b begins above the budget. Held to the budget from the start,
    λ would rise to press that noise out, and the student would end far below. A weight near its lowest pulls nothing back: D
    stays what it is while the learning rate falls, and nothing is allowed beyond the budget.

    Args:
        weight (`float`): Where λ begins, above 0.
        budget (`float`): Of D at the end, nats per token.
        total_steps (`int`): T.
        rate (`float`): η.
        gain (`float`): κ.
        memory (`float`): β; the mean is corrected for its start at 0.
    """

    weight: float
    budget: float
    total_steps: int
    rate: float = 0.15
    gain: float = 2.0
    memory: float = 0.9

    observes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.begins, self.smoothed = self.weight, SmoothedMean(self.memory)
        self.center = self.weight  # e to the power of i
        self.found = math.nan  # m

    def value(self, step: int) -> float:
        """λ now, whichever step it is."""
        return self.weight

    def observe(self, divergence: float, step: int) -> None:
        """
        After optimizer step `step`: D over its whole batch, nats per token, the same on all ranks; what is not finite is left out.
        """
        if not math.isfinite(divergence):  # it would stay in the mean for good
            return
        self.found = self.smoothed.add(divergence)
        left = max(0.0, 1 - step / max(1, self.total_steps))
        pulls = math.log(self.center / (self.begins * _LOWEST)) / math.log(_PULLS)
        pulls = min(max(pulls, 0.0), 1.0)  # below where it goes on with a higher weight than it was begun with
        error = math.log(max(self.found / (self.budget * (1 + EARLY * pulls * left)), _LEAST))
        error = min(max(error, -1.0), 1.0)
        self.center = self._held(self.center * math.exp(self.rate * error))
        self.weight = self._held(self.center * math.exp(self.gain * error))

    def _held(self, weight: float) -> float:
        return min(max(weight, self.begins * _LOWEST), self.begins * _HIGHEST)

    def state(self) -> dict[str, float]:
        """What a resumed run must know, as JSON holds it."""
        return {"weight": self.weight, "center": self.center, **self.smoothed.state()}

    def load(self, state: dict[str, float]) -> None:
        """The reverse of [`state`]."""
        self.weight, self.center = state["weight"], state["center"]
        self.smoothed.load(state)
