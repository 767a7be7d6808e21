"""The seam between the trainer and whatever holds its student back."""

from collections.abc import Callable, Sequence
from typing import Any

import torch


Inputs = dict[str, Any]
Gather = Callable[[torch.Tensor], torch.Tensor]


class Regularizer:
    """
    Something that holds a student back. [`EMARegularizedSFTTrainer`] keeps a list of them and asks each at the same moments.
    What is not overridden does nothing.

    Three doors lead to the loss, for whatever is computed from

    - the *outputs* (a teacher's divergence): [`forward_options`] and [`observe`],
    - the *weights* (L1, L2-SP, EWC): [`penalty`],
    - further *data* (rehearsal, replay): [`add_rows`].

    Their sum is, per optimizer step, loss = Σ CE / number of labelled tokens + Σ (terms of the regularizers).
    """

    name: str  # of its state in a checkpoint
    folder: str | None = None  # of an adapter of its own, below that of the student

    # The loss, in this order

    def before_step(self, batches: Sequence[Inputs], device: torch.device, gather: Gather | None) -> None:
        """All micro-batches of the next optimizer step on this rank; `gather` is `None` where ranks count for themselves."""

    def add_rows(self, inputs: Inputs) -> Inputs:
        """The micro-batch with further rows, padded alike. A label of −100 is not learned."""
        return inputs

    def forward_options(self, inputs: Inputs, step: int, num_items: torch.Tensor | None) -> dict[str, Any]:
        """
        Keywords of the patched forward, which adds the divergence to the loss.

        Args:
            step: Optimizer steps taken so far.
            num_items: Labelled tokens that the loss is divided by; `None` where these are the micro-batch's own.
        """
        return {}

    def observe(self, outputs: Any) -> None:
        """What the forward returned for a micro-batch, see [`MeanTeacherOutput`]."""

    def penalty(self, step: int) -> torch.Tensor | None:
        """
        A 0-dim term of the loss from the weights alone. It is asked for once per optimizer step, on every rank; its gradient
        is averaged over the ranks.
        """
        return None

    # The life of a run

    def begin(self, total_steps: int, state: dict | None = None) -> None:
        """Training begins, or goes on from a checkpoint with this `state`, after [`load`]."""

    def after_step(self, step: int) -> None:
        """The optimizer has taken its step number `step`."""

    def metrics(self, gather: Gather) -> dict[str, float]:
        """To be logged, of the steps since the last call. Called on all ranks."""
        return {}

    # Checkpoints

    def state(self) -> dict[str, Any]:
        """What a resumed run must know, as JSON holds it."""
        return {}

    def save(self, directory: str, *, writes: bool = True, **origin: Any) -> None:
        """Write `directory/folder`, on the ranks that are told to; `origin` are run and step. Called on all ranks."""

    def check(self, directory: str, **origin: Any) -> None:
        """Raises `ValueError`, before anything is changed, if [`load`] could not read what [`save`] wrote with this `origin`."""

    def load(self, directory: str) -> None:
        """Read back, exactly, what [`save`] wrote. Called on all ranks."""

    def bytes_to_save(self) -> int:
        """What [`save`] writes, all ranks together."""
        return 0

    def remove(self) -> None:
        """Take it off the model again."""
