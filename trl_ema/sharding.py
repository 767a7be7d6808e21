"""This rank's part of a parameter, and back to the whole: plain tensors, ZeRO-3 partitions, DTensors (FSDP2).

An average is elementwise, so each rank averages its own part without a word to the others. Only files need the whole.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from trl.trainer.utils import maybe_gather_lm_head_ctx


# A tensor; under ZeRO-3 with DeepSpeed's own attributes, `ds_tensor` and others.
Parameter: TypeAlias = Any


def is_sharded(parameter: Parameter) -> bool:
    """Whether a rank keeps but a part of it."""
    return _is_zero3(parameter) or isinstance(parameter, DTensor)


def any_sharded(model: torch.nn.Module) -> bool:
    """Whether a rank keeps but a part of any of the model's parameters."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def whole_shape(parameter: Parameter) -> torch.Size:
    """Of the parameter itself, whichever part of it this rank keeps."""
    return parameter.ds_shape if _is_zero3(parameter) else parameter.shape


def local_shard(parameter: Parameter) -> Tensor:
    """
    The elements of `parameter` that this rank keeps, as a view: writing to it writes the parameter.

    The whole tensor where it is not sharded; a flat part of it under ZeRO-3; for a DTensor its local tensor.
    """
    if _is_zero3(parameter):
        start, stop = _zero3_range(parameter)
        # The last partition is padded with whatever was in memory.
        return parameter.ds_tensor.detach()[: stop - start]
    if isinstance(parameter, DTensor):
        return parameter.to_local().detach()
    return parameter.detach()


def cpu_copy(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a shape without values, as `trl-ema check` has them, another one."""
    return (tensor if tensor.is_meta else tensor.cpu()).clone()


def take_shard(whole: Tensor, parameter: Parameter) -> Tensor:
    """The part of `whole`, which every rank has, that belongs where [`local_shard`] of `parameter` is. No communication."""
    if _is_zero3(parameter):
        start, stop = _zero3_range(parameter)
        return whole.reshape(-1)[start:stop]
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    return whole


def gather_whole(shard: Tensor, parameter: Parameter) -> Tensor:
    """The whole tensor from every rank's `shard`, in the layout of `parameter`. Called on all ranks."""
    if _is_zero3(parameter):
        part = shard.new_zeros(parameter.ds_tensor.ds_numel, device=parameter.ds_tensor.device)
        part[: shard.numel()] = shard
        part = part.to(_collective_device(parameter.ds_process_group))
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(parameter.ds_process_group))]
        dist.all_gather(parts, part, group=parameter.ds_process_group)
        return torch.cat(parts)[: parameter.ds_numel].view(parameter.ds_shape)
    if isinstance(parameter, DTensor):
        mesh, placements = parameter.device_mesh, parameter.placements
        whole = DTensor.from_local(shard, mesh, placements, shape=parameter.shape, stride=parameter.stride())
        return whole.full_tensor()
    return shard


@contextmanager
def whole_weights(*parameters: Parameter) -> Iterator[list[Any]]:
    """
    Parameters that are used outside their module's forward, such as the head's in the fused loss: gathered where ZeRO-3 or
    FSDP2 shards them, each once, `None` as it is. Called on all ranks. Gradients are averaged over the ranks, as both do.
    """
    with maybe_gather_lm_head_ctx(*filter(_is_zero3, parameters)):
        if any(isinstance(parameter, DTensor) for parameter in parameters):
            yield _gathered_once(parameters)
        else:
            yield list(parameters)


@torch.compiler.disable
def _gathered_once(parameters: tuple[Parameter, ...]) -> list[Tensor | None]:
    whole = {id(parameter): _full(parameter) for parameter in parameters}
    return [whole[id(parameter)] for parameter in parameters]


def _full(parameter: Parameter) -> Tensor:
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    full = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full.to(mesh.device_type)  # from where parameters are offloaded to


def write_whole(parameter: Parameter, whole: Tensor) -> None:
    """This rank's part of `whole`, which every rank has, into its part of `parameter`. No communication."""
    local_shard(parameter).copy_(take_shard(whole, parameter))
    drop_stale_copy(parameter)


def drop_stale_copy(parameter: Parameter) -> None:
    """After a write to the shard: ZeRO-3 keeps small parameters gathered, from before the write. They are gathered anew."""
    if _is_zero3(parameter):
        parameter.partition()


def reshard(model: torch.nn.Module) -> None:
    """FSDP2 leaves the outermost parameters whole after a forward without a backward."""
    if not dist.is_initialized():
        return
    modules = [model]
    while modules:  # `model.modules()` takes three times longer, at every update of the teacher
        module = modules.pop()
        if isinstance(module, FSDPModule):
            module.reshard()
        modules += [child for child in module._modules.values() if child is not None]


def sum_over_shards(value: Tensor, parameter: Parameter) -> Tensor:
    """Sum of a per-shard `value` over the ranks that share `parameter`; `value` itself where it is not sharded."""
    for group in _shard_groups(parameter):
        value = value.to(_collective_device(group))
        dist.all_reduce(value, group=group)
    return value


def _shard_groups(parameter: Parameter) -> list:
    if _is_zero3(parameter):
        return [parameter.ds_process_group]
    if isinstance(parameter, DTensor):
        return [
            parameter.device_mesh.get_group(dim)
            for dim, placement in enumerate(parameter.placements)
            if isinstance(placement, Shard)
        ]
    return []


def _is_zero3(parameter: Parameter) -> bool:
    return hasattr(parameter, "ds_tensor")


def _zero3_range(parameter: Parameter) -> tuple[int, int]:
    """Which elements of the flattened parameter this rank keeps: `[start, stop)`."""
    size = parameter.ds_tensor.ds_numel
    rank = dist.get_rank(parameter.ds_process_group)
    return min(rank * size, parameter.ds_numel), min((rank + 1) * size, parameter.ds_numel)


def _collective_device(group) -> torch.device:
    backend = dist.get_backend(group)
    return torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
