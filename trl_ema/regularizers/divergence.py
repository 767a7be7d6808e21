"""The divergence to a mean teacher: the method."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from peft import PeftModel

from ..adapters.names import TEACHER_NAME
from ..config import MeanTeacherConfig
from ..forward import Divergence, divergence_mask, num_sequences
from ..schedules import RampedWeight, half_life_to_decay, warmed_up_decay
from ..sharding import is_sharded, whole_shape
from .base import Gather, Inputs, Regularizer
from .micro_batch import TokenMean
from .teacher import MeanTeacher


logger = logging.getLogger(__name__)


class TeacherDivergence(Regularizer):
    r"""
    λ(step) · D(p_φ, p_θ) per token, with a [`MeanTeacher`] φ that follows the student θ, or stays where it is.

        after each optimizer step:   φ ← d·φ + (1 − d)·θ          d = 0.5^(1 / (half_life · total_steps)), or `ema_decay`

    Args:
        model (`PeftModel`): Its active adapter is the student.
        args ([`MeanTeacherConfig`]): `teacher`, and the options that begin with `ema_`, `teacher_`, `kl_` and `jsd_`.

    Source: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780.
    """

    name = "teacher"
    saves_student_alone = True

    def __init__(self, model: PeftModel, args: MeanTeacherConfig):
        self.args = args
        self.teacher = MeanTeacher(model, frozen=args.teacher == "frozen", anchor=args.teacher_anchor)
        self.folder = None if self.teacher.is_base else TEACHER_NAME
        self.total_steps = 0
        self.weight = make_weight(args, self.total_steps)
        self.kl_of_log, self.kl_of_step = TokenMean(), TokenMean()
        self._last_weight = args.kl_weight
        self._last_decay: float | None = None
        self._micro_batch = (0, -1)  # step, and which of its micro-batches
        self._num_kl: torch.Tensor | None = None  # tokens of the divergence in the accumulated, world-wide batch

    def before_step(self, batches: Sequence[Inputs], step: int, device: torch.device, gather: Gather | None) -> None:
        tokens = self.args.kl_tokens
        if tokens == "loss":  # TRL counts them
            return
        count = torch.as_tensor(sum(divergence_mask(tokens, **batch).sum() for batch in batches), device=device)
        self._num_kl = count if gather is None else gather(count).sum()

    def divergences(self, inputs: Inputs, step: int, num_items: torch.Tensor | None) -> list[Divergence]:
        args = self.args
        weight = self._last_weight = self.weight.value(step)
        if args.kl_tokens != "loss":
            # TRL divides by the labelled tokens, the divergence is a mean over its own.
            num_labels, num_kl = num_items, self._num_kl
            if num_labels is None or num_kl is None:  # then TRL divides by those of this batch alone
                num_labels = divergence_mask("loss", **inputs).sum()
                num_kl = divergence_mask(args.kl_tokens, **inputs).sum()
            # A number: FSDP2 casts tensors to its own precision on the way in.
            weight = float(weight * torch.as_tensor(num_labels).clamp(min=1) / num_kl.clamp(min=1))
        chosen, factor = self.choose_sequences(inputs, step)
        options = dict(direction=args.kl_direction, mixture=args.jsd_mixture, temperature=args.kl_temperature)
        return [Divergence(self.teacher, weight * factor, args.kl_tokens, chosen, options)]

    def choose_sequences(self, inputs: Inputs, step: int) -> tuple[list[int] | None, float]:
        """
        `kl_fraction` f of the sequences of this micro-batch, and what their divergence is multiplied by. Of S sequences
        ⌊f·S + u⌋ are drawn, u uniform in [0, 1): each with probability f, so that with the factor 1 / f the expectation of
        the loss is that of all. The draw depends on seed, step, micro-batch and rank alone, as a resumed run needs it.
        """
        fraction = self.args.kl_fraction
        if fraction == 1:
            return None, 1.0
        self._micro_batch = (step, self._micro_batch[1] + 1 if self._micro_batch[0] == step else 0)
        seed = [self.args.seed, *self._micro_batch]
        number = num_sequences(**inputs)
        count = int(fraction * number + np.random.default_rng(seed).random())
        if not count and is_sharded(next(self.teacher.model.parameters())):
            count, fraction = 1, float("inf")  # the ranks gather weights together, so each takes the teacher's pass
        order = np.random.default_rng([*seed, 1 + self.args.process_index]).permutation(number)
        return order[:count].tolist(), 1 / fraction

    def observe(self, sums: list[torch.Tensor]) -> None:
        for total, tokens in sums:
            self.kl_of_log.add(total, tokens)
            if self.weight.observes:
                self.kl_of_step.add(total, tokens)

    @property
    def schedule(self) -> dict[str, float | bool]:
        """What average and divergence follow over this run, whichever options and length it was given by."""
        args, decay = self.args, self.args.ema_decay
        if decay is None:
            if not self.total_steps or args.half_life is None:
                raise ValueError(
                    "`trainer.after_step()` or `schedule` before `train()`: the half-life is a fraction of the run, whose number of steps "
                    "is not known yet. Set `ema_decay`, or leave the updates to `train()`."
                )
            decay = half_life_to_decay(args.half_life, self.total_steps, args.ema_update_steps)
        return {
            "ema_decay": decay,
            "ema_warmup": args.ema_warmup,
            "ema_update_steps": args.ema_update_steps,
            "kl_weight": args.kl_weight,
            "kl_warmup_steps": args.kl_warmup_ratio * self.total_steps,
        }

    def begin(self, trainer: Any, state: dict | None = None) -> None:
        self.total_steps = trainer.state.max_steps
        self.weight = make_weight(self.args, self.total_steps)
        self.kl_of_log, self.kl_of_step = TokenMean(), TokenMean()
        if state is None:
            return
        self.weight.load(state["weight"])
        if state["schedule"] != self.schedule:
            logger.warning(
                "The checkpoint was made with %s, this run goes on with %s. Resume with the options and the number of "
                "steps it was started with to end as it would have ended.", state["schedule"], self.schedule,
            )  # fmt: skip

    def after_step(self, step: int, gather: Gather) -> None:
        args = self.args
        if self.weight.observes:
            self.weight.observe(self.kl_of_step.take(gather, args.device), step)
        if args.teacher != "ema" or step % args.ema_update_steps:
            return
        decay = float(self.schedule["ema_decay"])
        if args.ema_warmup:
            decay = warmed_up_decay(decay, self.teacher.num_updates)
        self.teacher.update(decay)
        self._last_decay = decay

    def metrics(self, gather: Gather) -> dict[str, float]:
        found = {"kl_loss": self.kl_of_log.take(gather, self.args.device), "kl_weight": self._last_weight}
        if self._last_decay is not None:
            found["ema_decay"] = self._last_decay
        if not self.teacher.is_base:
            found["teacher_distance"] = self.teacher.distance()
        return found

    def state(self) -> dict[str, Any]:
        return {"schedule": self.schedule, "weight": self.weight.state()}

    def save(self, directory: str, *, writes: bool = True, **origin: Any) -> None:
        self.teacher.save(directory, writes=writes, **origin)

    def check(self, directory: str, **origin: Any) -> None:
        self.teacher.check(directory, **origin)

    def load(self, directory: str) -> None:
        self.teacher.load(directory)

    def bytes_to_save(self) -> int:
        # The averages, in float32.
        return sum(4 * whole_shape(student).numel() for student in self.teacher.students())

    def remove(self) -> None:
        self.teacher.remove()


def make_weight(args: MeanTeacherConfig, total_steps: int) -> RampedWeight:
    """λ over a run of so many optimizer steps."""
    return RampedWeight(args.kl_weight, args.kl_warmup_ratio * total_steps)
