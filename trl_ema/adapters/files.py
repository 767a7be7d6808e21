"""Adapters in PEFT's files: what is written, what may be read, and whether it fits."""

import os
from typing import Literal

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..files import read_json
from ..sharding import any_sharded, gather_whole, local_shard, whole_shape, whole_weights
from .names import STUDENT_NAME


# In a config: about the adapter, without an effect on what it computes.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
ANOTHER = "Resume from another checkpoint, or start anew from this adapter with `PeftModel.from_pretrained`"


def file_keys(model: PeftModel, adapter_name: str, embeddings: bool | Literal["auto"] = False) -> dict[str, str]:
    """
    The key in a PEFT file of each tensor that PEFT writes of an adapter unchanged, by its name in the model; with
    `embeddings` also of the base's, which it writes beside an adapter that wraps them, or where they were resized ("auto").
    """
    names = {*_state_at_hand(model), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    numbered = {name: torch.tensor(i) for i, name in enumerate(names)}
    written = get_peft_model_state_dict(model, numbered, adapter_name, save_embedding_layers=embeddings)
    key_of = {id(tensor): key for key, tensor in written.items()}
    return {name: key_of[id(number)] for name, number in numbered.items() if id(number) in key_of}


def gather_file(model: PeftModel, adapter_name: str, keep: bool) -> dict[str, torch.Tensor]:
    """
    Of a sharded model, the parameters that PEFT writes of an adapter, whole and by name, and its buffers; on the ranks that
    `keep` them. Called on all ranks.
    """
    state = dict(model.named_buffers()) if keep else {}
    # The first rank decides: whether embeddings were resized PEFT may look up on the hub, which not every rank may reach.
    written = [file_keys(model, adapter_name, embeddings="auto") if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(written)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in written[0]:
            whole = gather_whole(local_shard(parameter), parameter)
            if keep:
                state[name] = whole.cpu()
    return state


def read_student(model: PeftModel, folder: str) -> dict[str, torch.Tensor]:
    """The parameters in the adapter file of `folder`, trained or not, by their names in the model."""
    tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    keys = file_keys(model, STUDENT_NAME)
    return {name: tensors[keys[name]] for name, _ in model.named_parameters() if name in keys}


def check_adapter_file(model: PeftModel, adapter_name: str, folder: str, who: str) -> None:
    """Raises `ValueError` unless the adapter file in `folder` has the names and shapes of the adapter in `model`."""
    shapes = _read_shapes(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), who)
    parameters = model.named_parameters(remove_duplicate=False)
    whole = {name: torch.empty(whole_shape(parameter), device="meta") for name, parameter in parameters}
    state = _state_at_hand(model) | whole
    # Beside the adapter PEFT writes the base's embeddings where an adapter wraps them or they were resized.
    expected, known = (
        {key: tuple(tensor.shape) for key, tensor in written.items()}
        for written in (
            get_peft_model_state_dict(model, state, adapter_name, save_embedding_layers=embeddings)
            for embeddings in (False, True)
        )
    )
    remedy = "Resume with the original `target_modules`, `r` and `modules_to_save`."
    _check_same_function(model.peft_config[adapter_name], folder, who)
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in known]
    if missing or unexpected:
        first = f"first missing: {missing[0]!r}" if missing else f"first unexpected: {unexpected[0]!r}"
        raise ValueError(
            f"{who} checkpoint in {folder} has {len(shapes)} tensors, the model has {len(expected)}; {first}. {remedy}"
        )
    for name, shape in shapes.items():
        if known[name] != shape:
            raise ValueError(
                f"{who} checkpoint in {folder} has shape {shape} for {name!r}, the model has {known[name]}. {remedy}"
            )
    if any(name not in expected for name in shapes):
        _check_base(model, adapter_name, folder, who)


def _check_base(model: PeftModel, adapter_name: str, folder: str, who: str) -> None:
    """
    The base's embeddings in an adapter file, which PEFT reads into the model, are the model's own. Where the vocabulary was
    enlarged the new rows, drawn at random, are the last ones: the first half is compared.
    """
    key_of = file_keys(model, adapter_name, embeddings=True)
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        saved = set(file.keys()) - set(file_keys(model, adapter_name).values())
        for name, parameter in model.named_parameters():
            key, of_adapter = key_of.get(name), not set(model.peft_config).isdisjoint(name.split("."))
            if key not in saved or of_adapter or parameter.requires_grad:
                continue
            theirs = file.get_tensor(key)
            with whole_weights(parameter) as (ours,):
                own_rows = len(theirs) // 2
                coarse = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
                ours, theirs = (x[:own_rows].detach().cpu().to(coarse) for x in (ours, theirs))
            if not torch.equal(ours, theirs):
                raise ValueError(
                    f"{who} checkpoint in {folder} has other values for {key!r}, which is not trained, than the model: it was "
                    "made on another base. Resume with the original base model."
                )


def _check_same_function(config, folder: str, who: str) -> None:
    """Options that change what an adapter's weights mean, without changing a shape."""
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        return  # nothing to compare with
    try:
        saved = read_json(path)
    except ValueError as error:
        raise ValueError(f"{who} checkpoint {path} is damaged ({error}). {ANOTHER}.") from error
    for name in ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern"):
        ours = getattr(config, name, None)
        if name in saved and ours is not None and saved[name] != ours:
            options = f"`{name}`, `teacher_anchor`" if who == "Teacher" else f"`{name}`"
            raise ValueError(
                f"{who} checkpoint in {folder} was trained with `{name}={saved[name]!r}`, the model has {ours!r}. Resume with "
                f"the original {options}."
            )


def _read_shapes(path: str, who: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header."""
    if not os.path.isfile(path):
        raise ValueError(f"{who} checkpoint {path} is missing. {ANOTHER} (or `teacher='none'` if none was trained).")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who} checkpoint {path} is damaged ({error}). {ANOTHER}.") from error


def _state_at_hand(model) -> dict[str, torch.Tensor]:
    """The model's state without communication: of a sharded model the buffers alone."""
    return dict(model.named_buffers()) if any_sharded(model) else model.state_dict()


def function_fields(config: dict) -> dict:
    """Of the fields of a PEFT config those that change what the adapter computes; names, a set in memory, in order."""
    return {
        name: sorted(value)
        if isinstance(value, (set, list)) and all(isinstance(item, str) for item in value)
        else value
        for name, value in config.items()
        if name not in _ABOUT
    }
