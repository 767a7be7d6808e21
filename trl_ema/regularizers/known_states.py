"""What the model before training makes of the texts that are rehearsed: computed once, where each is taken more than once."""

import logging
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..adapters.names import base_of
from ..adapters.starting_point import StartingPoint
from ..adapters.switching import evaluating, switched


logger = logging.getLogger(__name__)

# What they may take of the memory of the machine, on each rank.
MOST_BYTES = 2**30
_BATCH_SIZE = 8  # always the same: another one would change the last bits of a resumed run


def bytes_of_states(model: Any, num_texts: int, num_tokens: int, taken: int, sharded: bool) -> int:
    """
    Of what [`states_before`] keeps, at most (in float32); 0 where it keeps nothing.

    That is where a rank takes no more texts (`taken`) than there are, where weights are sharded (all ranks would have to pass
    as often), where the LM head is trained on (it is another one before training), or where they would take more than
    [`MOST_BYTES`].

    Args:
        model (`torch.nn.Module`): About to be trained.
        num_texts, num_tokens (`int`): Of the texts, all together.
        taken (`int`): Texts that a rank takes in the whole run.
        sharded (`bool`): Whether a rank keeps but a part of the model.
    """
    head = base_of(model).get_output_embeddings()
    if taken <= num_texts or sharded or any(p.requires_grad for p in head.parameters()):
        return 0
    needed = num_tokens * head.weight.shape[-1] * 4
    return needed if needed <= MOST_BYTES else 0


def states_before(
    trainer: Any, start: StartingPoint, ids: list[list[int]], pad: int, taken: int
) -> list[torch.Tensor] | None:
    """
    Hidden states of the model before training at every prediction of each text, on the CPU; `None` where its pass in each
    micro-batch is no more work, or is needed: see [`bytes_of_states`].

    Args:
        trainer ([`EMARegularizedSFTTrainer`]): About to train.
        start ([`StartingPoint`]): The model before training.
        ids (`list[list[int]]`): The texts.
        pad (`int`): Token that fills a row.
        taken (`int`): Texts that this rank takes in the whole run.

    Returns:
        `list[torch.Tensor]`: `(len(text) - 1, hidden_size)` of each text, in the type the model computes them in.
    """
    base = base_of(trainer.model)
    embeddings = base.get_input_embeddings()
    if not bytes_of_states(trainer.model, len(ids), sum(map(len, ids)), taken, trainer.shards_weights):
        if taken > len(ids):
            logger.info("The model before training passes over the texts of each micro-batch: its states are not kept")
        return None
    logger.info("The model before training passes over %d texts, once", len(ids))
    states = []
    shows = trainer.is_world_process_zero() and not trainer.args.disable_tqdm
    with torch.no_grad(), trainer.precision(), switched(evaluating(trainer.model)), start.activate():
        for first in tqdm(range(0, len(ids), _BATCH_SIZE), desc="Reading texts", unit="batch", disable=not shows):
            texts = [torch.tensor(text, device=embeddings.weight.device) for text in ids[first : first + _BATCH_SIZE]]
            rows = pad_sequence(texts, batch_first=True, padding_value=pad)
            mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
            hidden = base.base_model(input_ids=rows, attention_mask=mask, use_cache=False).last_hidden_state.cpu()
            states += [row[: len(text) - 1].clone() for row, text in zip(hidden, texts, strict=True)]
    return states


def to_device(states: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without the host waiting for it."""
    return (states.pin_memory() if device.type == "cuda" else states).to(device, non_blocking=True)
