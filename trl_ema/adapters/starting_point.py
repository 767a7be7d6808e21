"""The model before a training: what drift is measured from."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from accelerate.utils import is_peft_model

from ..sharding import cpu_copy, drop_stale_copy, is_sharded, local_shard, reshard, take_shard
from .fitness import adapter_changes_nothing
from .names import trained_names
from .switching import Switch, base_switches, nothing_random, switched


class StartingPoint:
    """
    The model before its training, to be measured later.

    Of a new adapter this is the model with the adapter switched off, and nothing is kept. PiSSA, OLoRA and others take from the
    base's weights what they put into the adapter, and a run may go on from an adapter: then the trained tensors are kept on the
    CPU, and put back for as long as the starting point computes.

    Args:
        model (`torch.nn.Module`): Before its training. Where FSDP2 shards it, each rank swaps its own part; ZeRO-3
            can only switch an adapter off.
        is_base (`bool`, *optional*): Whether it is the model with its adapter switched off. By default it is where the
            adapter, as it is now, changes nothing.
    """

    @torch.no_grad()
    def __init__(self, model: Any, is_base: bool | None = None):
        self.model = model
        if is_base is None:
            is_base = is_peft_model(model) and all(
                adapter_changes_nothing(model, name) for name in model.active_adapters
            )
        self.is_base = is_base
        self._kept: dict[str, tuple[torch.Tensor, bool]] = {}
        if not self.is_base:
            self.keep()

    @torch.no_grad()
    def keep(self) -> None:
        """The start is what the trained tensors are now, even if it is the base."""
        self.is_base = False
        for name in trained_names(self.model):
            parameter = self.model.get_parameter(name)
            # Sharding may come later, or be there already, as that of a copied head under ZeRO-3.
            self._kept[name] = cpu_copy(local_shard(parameter)), is_sharded(parameter)

    @property
    def bytes_kept(self) -> int:
        """Of what is kept on the CPU, by each rank; none where the start is the base."""
        return sum(tensor.numel() * tensor.element_size() for tensor, _ in self._kept.values())

    @contextmanager
    def activate(self) -> Iterator[None]:
        """
        Within this context the model computes as it did at the start, with nothing random in it. Restores everything, also after an
        error.
        """
        if self.is_base:
            with switched([*base_switches(self.model), *self._nothing_random]):
                yield
            return
        reshard(self.model)
        now = {name: local_shard(self.model.get_parameter(name)).clone() for name in self._kept}
        try:
            self._write({name: self._part(name) for name in self._kept})
            with switched(self._nothing_random):
                yield
        finally:
            reshard(self.model)
            self._write(now)

    @cached_property
    def _nothing_random(self) -> list[Switch]:
        return nothing_random(self.model)

    def _part(self, name: str) -> torch.Tensor:
        tensor, was_sharded = self._kept[name]
        return tensor if was_sharded else take_shard(tensor, self.model.get_parameter(name))

    @torch.no_grad()
    def _write(self, shards: dict[str, torch.Tensor]) -> None:
        for name, shard in shards.items():
            parameter = self.model.get_parameter(name)
            local_shard(parameter).copy_(shard)
            drop_stale_copy(parameter)
        torch.clear_autocast_cache()  # of casts of what was there before
