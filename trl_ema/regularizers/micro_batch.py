"""One micro-batch through all regularizers: their rows, their divergences, and what came of them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..forward import Parts, num_sequences
from .base import Gather, Inputs, Regularizer


class TokenMean:
    """A mean over the tokens of all micro-batches and ranks since it was last taken, such as of nats per token."""

    def __init__(self) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64)

    def add(self, total: torch.Tensor, tokens: torch.Tensor) -> None:
        """The sum over the tokens of a micro-batch on this rank, and their number: 0-dim. Nobody waits for a device here."""
        sums = torch.stack([total.double(), tokens.double()])
        self.sums = self.sums.to(sums.device) + sums

    def clear(self) -> None:
        """Forget what was added, where it is: nothing is sent to a device."""
        self.sums.zero_()

    def take(self, gather: Gather, device: torch.device) -> float:
        """The mean, 0 of no token. Called on all ranks."""
        total, tokens = gather(self.sums.to(device)).view(-1, 2).sum(0).tolist()
        self.clear()
        return total / max(tokens, 1)


class RegularizedForward:
    """
    The model as TRL's `compute_loss` calls it, for one micro-batch.

    TRL is given the student's own rows and counts their tokens; the model gets the further ones beside them. A teacher of the
    own rows does not see those.

    Args:
        inputs (`dict`): The student's own rows.
        step (`int`): Optimizer steps taken so far.
        num_items (`torch.Tensor`, *optional*): What TRL divides the loss by.
        observe_ce (callable): Called with Σ CE and the number of labelled tokens.
        fused (`bool`): Whether the forward is patched and computes the loss, with divergences or without.
        sharded (`bool`): Whether the model's weights are gathered for each pass over them, by all ranks together.
    """

    def __init__(
        self,
        model: Any,
        regularizers: Sequence[Regularizer],
        inputs: Inputs,
        step: int,
        num_items: torch.Tensor | None,
        observe_ce: Callable[[torch.Tensor, torch.Tensor], None],
        fused: bool,
        sharded: bool = False,
    ):
        self.model, self.observe_ce, self.fused = model, observe_ce, fused
        of_own_rows = [(regularizer, regularizer.divergences(inputs, step, num_items)) for regularizer in regularizers]
        batch, of_further_rows = inputs, []
        for regularizer in regularizers:
            batch, found = regularizer.add_rows(batch, step, num_items)
            of_further_rows.append((regularizer, found))
        self.changes = (
            {} if batch is inputs else {name: batch[name] for name in batch if batch[name] is not inputs.get(name)}
        )
        self.asked = [*of_own_rows, *of_further_rows]
        self.divergences = [divergence for _, found in self.asked for divergence in found]
        self.parts = None
        if self.changes:
            number, width = num_sequences(**inputs), inputs["input_ids"].shape[1]
            further = [divergence.length for _, found in of_further_rows for divergence in found]
            known = [length for length in further if length is not None]
            lengths = (width, max(known)) if known and len(known) == len(further) else None
            for divergence in (divergence for _, found in of_own_rows for divergence in found):
                divergence.sequences = list(range(number)) if divergence.sequences is None else divergence.sequences
                divergence.length = None if lengths is None else width
            self.parts = Parts(number, lengths, apart=not sharded)

    def __call__(self, **inputs: Any) -> Any:
        if not self.fused:
            return self.model(**(inputs | self.changes))
        outputs = self.model(**(inputs | self.changes), divergences=self.divergences, parts=self.parts)
        self.observe_ce(outputs.ce_loss, outputs.label_mask)
        sums = list(outputs.divergences)
        for regularizer, found in self.asked:
            mine, sums = sums[: len(found)], sums[len(found) :]
            if mine:
                regularizer.observe(mine)
        # TRL gathers the entropy of all ranks: it is not finite where a part of any loss is not, see `check_finite`.
        parts = [part.detach() for part in (outputs.log_probs, outputs.aux_loss) if part is not None]
        outputs.entropy = outputs.entropy + 0.0 * sum(parts)
        return outputs
