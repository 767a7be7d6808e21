"""Decay of the average and ramp of the divergence's weight: plain numbers in, numbers out."""

import math
from dataclasses import dataclass
from typing import ClassVar


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

    def observe(self, divergence: float) -> None:
        """After an optimizer step: D over its whole batch, nats per token, the same on all ranks. Of no use to a ramp."""

    def state(self) -> dict[str, float]:
        """What a resumed run must know, as JSON holds it; a ramp follows from the step."""
        return {}

    def load(self, state: dict[str, float]) -> None:
        """The reverse of [`state`]."""
