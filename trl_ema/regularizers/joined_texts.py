"""Whether several texts may stand in one row of a padded micro-batch."""

from typing import Any

import torch

from ..adapters.names import base_of
from ..adapters.switching import Switch, switched


# Those that make masks of positions for any number of rows.
_ATTENTION = ("sdpa", "eager")
_TOKENS = 32
# Of the states' norm: what rounding may differ by, in float32 and in half precision, where a text that sees another differs more.
_TOLERANCE, _TOLERANCE_OF_HALF = 1e-4, 2e-2


def may_join(trainer: Any, ids: list[list[int]]) -> bool:
    """
    Whether texts are joined to as few rows as hold them: on a GPU, which starts a pass over them alone in the time in which it does
    thousands of tokens, and where the model keeps them apart by their positions. The latter is tried with two of the texts.

    A CPU passes over them apart. Where weights are sharded all ranks would have to try it.
    """
    base = base_of(trainer.model)
    if not _works_ahead(trainer.args.device) or trainer.shards_weights or len(ids) < 2:
        return False
    return base.config.get_text_config()._attn_implementation in _ATTENTION and _are_kept_apart(trainer, base, ids[:2])


def _works_ahead(device: torch.device) -> bool:
    """Whether a device takes kernels from the host and works on them later."""
    return device.type != "cpu"


def _are_kept_apart(trainer: Any, base: Any, ids: list[list[int]]) -> bool:
    device = base.get_input_embeddings().weight.device
    texts = [torch.tensor(text[:_TOKENS], device=device) for text in ids]
    positions = torch.cat([torch.arange(len(text), device=device) for text in texts])[None]
    evaluating: list[Switch] = [(module, "training", False) for module in trainer.model.modules()]

    def states(text: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
        return base.base_model(input_ids=text[None], use_cache=False, **options).last_hidden_state[0].float()

    with torch.no_grad(), trainer.precision(), switched(evaluating):
        alone = torch.cat([states(text) for text in texts])
        joined = states(torch.cat(texts), position_ids=positions)
        half = torch.is_autocast_enabled(device.type) or base.dtype in (torch.float16, torch.bfloat16)
    return bool((joined - alone).norm() <= (_TOLERANCE_OF_HALF if half else _TOLERANCE) * alone.norm())
