"""Whether several texts may stand in one row of a padded micro-batch."""

from typing import Any

import torch
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ..adapters.names import base_of
from ..adapters.switching import evaluating, switched


# Attention that makes its masks of positions for any number of rows, and layers that see no token but through it.
_ATTENTION = ("sdpa", "eager")
_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
# The trial: so many tokens of a text. Its states must not tell which other text is before it: nothing else differs there, not even
# by rounding; and they are those of the text alone, up to rounding in float32 or half precision. Parts of their norm.
_TOKENS = 512
_MOST_SEEN = 1e-3
_ROUNDING, _ROUNDING_OF_HALF = 1e-3, 2e-2


def may_join(trainer: Any, ids: list[list[int]]) -> bool:
    """
    Whether texts are joined to as few rows as hold them: on a GPU, which starts a pass over them alone in the time in which it does
    thousands of tokens, and where the model keeps them apart by their positions. The latter is tried with two of the texts.

    A CPU passes over them apart. Where weights are sharded all ranks would have to try it. TRL's own collator is known to fill rows
    behind their tokens, where no mask is needed; adapters that begin at a place in a row (aLoRA) have one place for each.
    """
    base = base_of(trainer.model)
    if not _works_ahead(trainer.args.device) or trainer.shards_weights or len(ids) < 2:
        return False
    if type(trainer.data_collator) is not DataCollatorForLanguageModeling:
        return False
    adapters = getattr(trainer.model, "peft_config", {})
    if any(getattr(config, "alora_invocation_tokens", None) for config in adapters.values()):
        return False
    config = base.config.get_text_config()
    if config._attn_implementation not in _ATTENTION or not set(getattr(config, "layer_types", None) or ()) <= _LAYERS:
        return False
    return _are_kept_apart(trainer, base, ids[:2])


def _works_ahead(device: torch.device) -> bool:
    """Whether a device takes kernels from the host and works on them later."""
    return device.type != "cpu"


def _are_kept_apart(trainer: Any, base: Any, ids: list[list[int]]) -> bool:
    embeddings = base.get_input_embeddings()
    device = embeddings.weight.device
    first, second = (torch.tensor(text[:_TOKENS], device=device) for text in ids)
    other = (first + 1) % embeddings.num_embeddings
    positions = torch.cat([torch.arange(len(text), device=device) for text in (first, second)])
    alone = torch.arange(len(positions), device=device)

    def states(*texts: torch.Tensor) -> torch.Tensor:
        """Of the second text behind another one, beside a row in which it stands alone; of both rows."""
        rows = torch.stack([torch.cat(texts), torch.cat([second, first])])
        found = base.base_model(input_ids=rows, position_ids=torch.stack([positions, alone]), use_cache=False)
        return torch.stack(
            [found.last_hidden_state[0, len(first) :], found.last_hidden_state[1, : len(second)]]
        ).float()

    with torch.no_grad(), trainer.precision(), switched(evaluating(trainer.model)):
        try:
            (joined, by_itself), (behind_other, _) = states(first, second), states(other, second)
        except TypeError:  # a model that is given no positions
            return False
        half = torch.is_autocast_enabled(device.type) or base.dtype in (torch.float16, torch.bfloat16)
    seen = ((joined - behind_other).norm(dim=-1) / joined.norm(dim=-1).clamp(min=1e-20)).max()
    differs = (joined - by_itself).norm() / by_itself.norm()
    return bool(seen <= _MOST_SEEN) and bool(differs <= (_ROUNDING_OF_HALF if half else _ROUNDING))
