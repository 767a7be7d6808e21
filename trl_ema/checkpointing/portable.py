"""The optimizer's state in the layout of a plain `optimizer.pt`, whatever shards it.

DeepSpeed's own checkpoint can be read by as many ranks as wrote it, at the same ZeRO stage; FSDP's by FSDP. This one, beside
them, lets a run go on under any launch: with another number of ranks, at another stage, without DeepSpeed or FSDP, and back.
"""

import copy
import glob
import os
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..sharding import take_shard


# Float32 weights by name, where DeepSpeed keeps them beside a model in half precision. Torch ignores the key.
MASTER = "master"
PLAIN, DEEPSPEED, FSDP_FULL, FSDP_SHARDED = "plain", "deepspeed", "FULL_STATE_DICT", "SHARDED_STATE_DICT"


def format_of(folder: str) -> str:
    """In whose format the checkpoint in `folder` is: `PLAIN` (one process, or DDP), `DEEPSPEED`, or one of FSDP's two."""
    if glob.glob(os.path.join(folder, "global_step*")):
        return DEEPSPEED
    if os.path.isfile(os.path.join(folder, "pytorch_model_fsdp.bin")):
        return FSDP_FULL
    return FSDP_SHARDED if os.path.isdir(os.path.join(folder, "pytorch_model_fsdp_0")) else PLAIN


def is_readable_by(stage: int, ranks: int, folder: str) -> bool:
    """Whether DeepSpeed itself resumes from its checkpoint in `folder` at this stage with that many ranks."""
    shards = glob.glob(os.path.join(folder, "global_step*", "*_optim_states.pt"))
    models = glob.glob(os.path.join(folder, "global_step*", "zero_pp_rank_*_model_states.pt"))
    return len(shards) == ranks and bool(models) == (stage == 3)


def schedule_for(groups: int, state: dict) -> dict:
    """A learning rate schedule's state for so many parameter groups, which share one schedule: DeepSpeed drops empty ones."""
    lists = {key: value for key, value in state.items() if isinstance(value, list) and value}
    return state | {key: (value * groups)[:groups] for key, value in lists.items()}


# FSDP2: the plain optimizer, over DTensors


def gathered_state_dict(optimizer: Any, keep: bool) -> dict | None:
    """`optimizer.state_dict()` with whole tensors, on the ranks that `keep` it. Called on all ranks."""
    plain = optimizer.state_dict()
    state = {i: {key: _gathered(value, keep) for key, value in entry.items()} for i, entry in plain["state"].items()}
    return plain | {"state": state} if keep else None


def load_gathered_state_dict(optimizer: Any, saved: dict) -> None:
    """The reverse of [`gathered_state_dict`]. Called on all ranks, each with the whole of `saved`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_count(saved, len(parameters))
    state = {
        i: {key: _scattered(value, parameters[i]) for key, value in entry.items()}
        for i, entry in saved["state"].items()
    }
    optimizer.load_state_dict({"state": state, "param_groups": saved["param_groups"]})


def _gathered(value, keep: bool):
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.cpu() if keep and torch.is_tensor(value) else value


def _scattered(value, parameter):
    if not (torch.is_tensor(value) and value.dim() and isinstance(parameter, DTensor)):
        return value
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )


def _check_count(saved: dict, parameters: int) -> None:
    if len(saved["state"]) != parameters:
        raise ValueError(
            f"The checkpoint's optimizer has {len(saved['state'])} parameters, this run trains {parameters}. Resume with the "
            "adapter options the checkpoint was made with."
        )


# DeepSpeed: flat shards


def group_names(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> list[dict]:
    """`optimizer.param_groups` with names for parameters; taken before DeepSpeed flattens them and drops empty groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]


def zero_state_dict(engine: Any, groups: list[dict], keep: bool) -> dict | None:
    """
    What `state_dict` of the plain optimizer would be, and [`MASTER`]; on the ranks that `keep` it. Called on all ranks.

    Args:
        engine (`DeepSpeedEngine`): At ZeRO stage 1, 2 or 3.
        groups (`list[dict]`): From [`group_names`].
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    base, parameters = engine.optimizer.optimizer, dict(engine.module.named_parameters())
    sharded, single = _keys(base.state[_flat_tensors(engine)[0]])
    state, master = {}, {}
    for i, name in enumerate(_names(groups)):
        whole = {key: safe_get_full_optimizer_state(parameters[name], key) for key in sharded}
        weight = safe_get_full_fp32_param(parameters[name])
        if keep:
            # A step of its own for each: torch counts them up in place.
            state[i] = {key: value.cpu() for key, value in whole.items()} | copy.deepcopy(single)
            master[name] = weight.cpu()
    if not keep:
        return None
    numbers = iter(range(len(state)))
    kept = iter(base.param_groups)  # those that have parameters
    param_groups = [
        {**(next(kept) if group["params"] else group), "params": [next(numbers) for _ in group["params"]]}
        for group in groups
    ]
    return {"state": state, "param_groups": param_groups, MASTER: master}


@torch.no_grad()
def load_zero_state_dict(engine: Any, groups: list[dict], saved: dict, weights: dict[str, Tensor]) -> None:
    """
    Put a plain optimizer's state and the float32 `weights`, by name, into DeepSpeed's shards. Called on all ranks.

    Raises:
        ValueError: `saved` is of another set of parameters.
    """
    base, parameters, names = engine.optimizer.optimizer, dict(engine.module.named_parameters()), _names(groups)
    _check_count(saved, len(names))
    sharded, single = _keys(saved["state"][0])
    kept = [group for group in saved["param_groups"] if group["params"]]
    for group, old in zip(base.param_groups, kept, strict=True):
        group.update({key: value for key, value in old.items() if key in group and key != "params"})
    if "step" in single:
        single["step"] = _step_for(base, float(single["step"]))
    for flat in _flat_tensors(engine):
        base.state[flat] = {key: torch.zeros_like(flat) for key in sharded} | copy.deepcopy(single)
    if engine.zero_optimization_stage() < 3:
        engine.optimizer._lazy_init_hp_params_optimizer_state()  # its fragments are views of these
    for i, name in enumerate(names):
        set_zero_value(parameters[name], weights[name])
        for key in sharded:
            set_zero_value(parameters[name], saved["state"][i][key], key)


def set_zero_value(parameter: Any, value: Tensor, key: str | None = None) -> None:
    """The optimizer's `key`, or without one DeepSpeed's float32 weight, of one parameter. Without communication."""
    from deepspeed import utils

    if not hasattr(parameter, "ds_tensor"):
        value = value.to(parameter.device).float()
        if key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)
        return
    # By shard: what DeepSpeed does with a whole tensor fails on a last shard that is padded.
    shard = parameter.ds_tensor.new_zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32)
    part = take_shard(value, parameter)
    shard[: part.numel()] = part
    if key is None:
        utils.safe_set_local_fp32_param(parameter, shard)
    else:
        utils.safe_set_local_optimizer_state(parameter, shard, key)


def _names(groups: list[dict]) -> list[str]:
    return [name for group in groups for name in group["params"]]


def _flat_tensors(engine) -> list[Tensor]:
    """This rank's flat float32 weights, which the optimizer's state belongs to."""
    if engine.zero_optimization_stage() == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return engine.optimizer.single_partition_of_fp32_groups


def _keys(state: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Of one parameter's state: what has an element for each weight, and what is single, such as the step."""
    sharded = [key for key, value in state.items() if torch.is_tensor(value) and value.dim() > 0]
    return sharded, {key: value for key, value in state.items() if key not in sharded}


def _step_for(base, step: float):
    """Torch's optimizers count in tensors, on the device where they are fused; DeepSpeed's own in whole numbers."""
    if not type(base).__module__.startswith("torch."):
        return int(step)
    group = base.param_groups[0]
    fused = group.get("fused") or group.get("capturable")
    return torch.tensor(step, device=group["params"][0].device if fused and group["params"] else "cpu")
