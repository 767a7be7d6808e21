"""The seam between the trainer and whatever holds its student back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..forward import Divergence


Inputs = dict[str, Any]
Gather = Callable[[torch.Tensor], torch.Tensor]


class Regularizer:
    """
    Something that holds a student back. [`EMARegularizedSFTTrainer`] keeps a list of them and asks each at the same moments.
    What is not overridden does nothing.

    Three doors lead to the loss, for whatever is computed from

    - the *outputs* (a teacher's divergence): [`divergences`],
    - the *weights* (L1, L2-SP, EWC): [`penalty`],
    - further *data* (rehearsal, replay): [`add_rows`].

    Their sum is, per optimizer step, loss = (Σ CE + Σ λ·D) / number of labelled tokens + Σ penalties.
    """

    name: str  # of its state in a checkpoint
    folder: str | None = None  # of an adapter of its own, below that of the student
    saves_student_alone: bool = False  # whether other adapters of the model are none of the user's

    # The loss, in this order

    def before_step(self, batches: Sequence[Inputs], step: int, device: torch.device, gather: Gather | None) -> None:
        """
        All micro-batches of the next optimizer step on this rank, after `step` steps; `gather` is `None` where the ranks count
        their tokens for themselves.
        """

    def divergences(self, inputs: Inputs, step: int, num_items: torch.Tensor | None) -> list[Divergence]:
        """
        Terms of the patched forward over the student's own rows of a micro-batch. `MeanTeacherConfig.needs_fused_forward` must
        be true where there are any.

        Args:
            num_items: Labelled tokens that the loss is divided by; `None` where these are the micro-batch's own.
        """
        return []

    def add_rows(self, inputs: Inputs, step: int, num_items: torch.Tensor | None) -> tuple[Inputs, list[Divergence]]:
        """
        The micro-batch with further rows behind, padded alike (of a packed one: further documents), and their own terms, whose
        `sequences` are those rows', and whose `length`, of padded ones, is that of the longest. The labels of these are −100: `num_items` does not count them.
        """
        return inputs, []

    def observe(self, sums: list[torch.Tensor]) -> None:
        """Σ D and its number of tokens, `(2,)`, of each of its terms of a micro-batch on this rank."""

    def penalty(self, step: int) -> torch.Tensor | None:
        """
        A 0-dim term of the loss from the weights alone. It is asked for once per optimizer step, in the first micro-batch that
        `Trainer` draws, on every rank; its gradient is averaged over the ranks.
        """
        return None

    # The life of a run

    def begin(self, trainer: Any, state: dict | None = None) -> None:
        """
        Training begins, or goes on from a checkpoint with this `state`, after [`load`]: the trainer's model is wrapped, its
        `state.max_steps` is known.
        """

    def after_step(self, step: int, gather: Gather) -> None:
        """The optimizer has taken its step number `step`. Called on all ranks."""

    def metrics(self, gather: Gather) -> dict[str, float]:
        """To be logged, of the steps since the last call; names that no other one has. Called on all ranks."""
        return {}

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON holds it."""
        return {}

    def save(self, directory: str, *, writes: bool = True, **origin: Any) -> None:
        """
        Write into `directory`, on the ranks that are told to; `origin` are run and step. Called on all ranks, for a checkpoint, and
        for a model alone where there is a `folder`.
        """

    def check(self, directory: str, **origin: Any) -> None:
        """Raises `ValueError`, before anything is changed, if [`load`] could not read what [`save`] wrote with this `origin`."""

    def check_state(self, state: dict[str, Any]) -> None:
        """Raises `ValueError`, before anything is changed, if a run cannot go on with this [`state`] of a checkpoint."""

    def load(self, directory: str) -> None:
        """Read back, exactly, what [`save`] wrote. Called on all ranks."""

    def bytes_to_save(self) -> int:
        """What [`save`] writes, all ranks together."""
        return 0

    def bytes_on_device(self) -> int:
        """What it keeps on the device of each rank while it trains, beside the model and its adapters."""
        return 0

    def bytes_on_cpu(self, steps: int, sharded: bool) -> int:
        """
        What it keeps at most in the memory of the machine, on each rank, in a run of so many optimizer steps; `sharded` where
        a rank has but a part of the model.
        """
        return 0

    def remove(self) -> None:
        """Take it off the model again."""
