"""An adapter merged into its base, and compared with what it was beside it."""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.blending import blended
from ..adapters.names import STUDENT_NAME, TEACHER_NAME
from .drift import drift_of_rows, mean_drift, passes_of_base
from .models import add_adapter, with_adapter
from .scaling import teacher_of


_MERGED = "exported"


def merged_and_compared(
    base: PreTrainedModel,
    folder: str,
    tokenizer: PreTrainedTokenizerBase,
    batches: list[dict],
    run: str | None = None,
    mixture: float = 0.0,
    scale: float = 1.0,
) -> tuple[PreTrainedModel, dict[str, float]]:
    r"""
    The base with an adapter merged into it, W + ΔW rounded to the base's precision, by PEFT's `safe_merge`, and how far that is
    from the adapter beside the base.

    Args:
        base (`PreTrainedModel`): In 16 or 32 bits. Becomes the merged model.
        folder (`str`): Of the adapter to merge.
        tokenizer (`PreTrainedTokenizerBase`): The one that was trained with.
        batches (`list[dict]`): To compare on, see [`tokenized_batches`].
        run (`str`, *optional*): Of the run whose student and teacher the adapter was mixed and scaled from. Then it is compared with
            those, computed beside each other, not with what was written of them.
        mixture, scale (`float`): How, see [`adapter_at`].

    Returns:
        The model, and `kl_adapter_merged` = KL(adapter ‖ merged) and the merged model's `loss`, nats per token.

    Raises:
        ValueError: PEFT does not merge this adapter, or there would be a weight that is not finite.
    """
    if run is None:
        model, context = with_adapter(base, folder, tokenizer)[0], _as_it_is
    else:
        model, context = _as_trained(base, run, tokenizer, mixture, scale)
    passes = passes_of_base(model, batches, context)
    # The merge may change a head that is tied to the embeddings: the one of the adapter stays as it was.
    weight, bias = (None if x is None else x.detach().clone() for x in (passes[0].weight, passes[0].bias))
    passes = [replace(found, weight=weight, bias=bias) for found in passes]
    if run is not None:
        add_adapter(model, folder, _MERGED)
    try:
        merged: Any = model.merge_and_unload(safe_merge=True, adapter_names=None if run is None else [_MERGED])
    except RuntimeError as error:
        raise ValueError(f"PEFT cannot merge the adapter in {folder}: {error}") from error
    found = mean_drift(
        drift_of_rows(merged, batches, description="Merged", directions=("forward",), passes_before=passes)
    )
    kl = found["kl_base_model"]
    # Rounding may put it below zero; what is no number stays none.
    return merged, {"kl_adapter_merged": kl if math.isnan(kl) else max(0.0, kl), "loss": found["loss"]}


def _as_it_is() -> AbstractContextManager:
    return nullcontext()


def _as_trained(
    base: PreTrainedModel, run: str, tokenizer: PreTrainedTokenizerBase, mixture: float, scale: float
) -> tuple[PeftModel, Any]:
    """The base with student and, where it has a share, teacher of a run, and the context in which they compute as mixed and scaled."""
    model, _ = with_adapter(base, run, tokenizer)
    if mixture:
        add_adapter(model, str(teacher_of(run)), TEACHER_NAME)
    shares = {STUDENT_NAME: scale * (1 - mixture), TEACHER_NAME: scale * mixture}
    return model, partial(blended, model, shares)
