"""What tells a loaded model and its tokenizer from others, wherever they were loaded from."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .adapters.files import function_fields
from .adapters.names import base_of, tuner_layers
from .adapters.switching import without_adapter
from .sharding import is_sharded, whole_weights
from .workarounds import keep_4bit_layers_trainable


Context = Callable[[], AbstractContextManager]
_BLOCK = 2**22  # elements hashed at once
# Fields of a model's configuration that do not change what it computes, or that a trainer sets.
_NOT_THE_MODEL = {
    "architectures", "attn_implementation", "dtype", "id2label", "label2id", "name_or_path", "output_attentions",
    "output_hidden_states", "problem_type", "quantization_config", "return_dict", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


def model_fingerprint(model: Any, tokenizer: PreTrainedTokenizerBase, before: Context | None = None) -> str:
    """
    Tells a model and its tokenizer from others: `"MODEL-TOKENIZER"`, two hexadecimal numbers.

    Of the model all weights count, as float32: one is the same in bfloat16 and float32 if its weights were bfloat16 before.
    Quantized weights count as they are. An adapter that is active counts too, rounded to bfloat16. Of the tokenizer its vocabulary
    and chat template.
    Of a sharded model (ZeRO-3, FSDP2) it is that of the whole one, and every rank must call it.

    Args:
        before (callable, *optional*): Context in which the model is as before its training. By default it is the model without its
            adapter.
    """
    keep_4bit_layers_trainable(model)  # unpacks what an evaluation has packed
    with before() if before is not None else without_adapter(model):
        ours = hashlib.sha256(
            json.dumps(_plain_config(model.config.to_diff_dict()), sort_keys=True, default=str).encode()
        )
        base = dict(_base_tensors(base_of(model)))
        for name, tensor in sorted(base.items()):
            _add_tensor(ours, name, tensor)
        if is_peft_model(model):
            _add_adapter(ours, model, {id(tensor) for tensor in base.values()})
    return f"{ours.hexdigest()[:16]}-{tokenizer_fingerprint(tokenizer)}"


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """The second number of a [`model_fingerprint`]."""
    theirs = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.chat_template])
    return hashlib.sha256(theirs.encode()).hexdigest()[:16]


def _plain_config(config: dict) -> dict:
    return {
        key: _plain_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in _NOT_THE_MODEL and not key.startswith("_") and not key.endswith("token_id")
    }


def _base_tensors(module: Any, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers, each once, by the names they have without an adapter."""
    seen = set() if seen is None else seen
    for wrapper, inside in ((BaseTunerLayer, "base_layer"), (AuxiliaryTrainingWrapper, "original_module")):
        if isinstance(module, wrapper):
            yield from _base_tensors(getattr(module, inside), prefix, seen)
            return
    own = {**module._parameters}
    own |= {name: x for name, x in module._buffers.items() if name not in module._non_persistent_buffers_set}
    for name, tensor in own.items():
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            yield prefix + name, tensor
    for name, child in module.named_children():
        yield from _base_tensors(child, f"{prefix}{name}.", seen)


def _add_adapter(digest: Any, model: Any, base: set[int]) -> None:
    """What an active adapter adds to a model."""
    if all(vars(layer).get("_disable_adapters") for layer in tuner_layers(model)):
        return
    for name, parameter in sorted(base_of(model).named_parameters()):
        if id(parameter) not in base and {*name.split(".")} & {*model.active_adapters}:
            _add_tensor(digest, name, parameter, torch.bfloat16)  # as trainers may have rounded it
    fields = [function_fields(model.peft_config[name].to_dict()) for name in model.active_adapters]
    digest.update(json.dumps(fields, sort_keys=True, default=str).encode())


@torch.no_grad()
def _add_tensor(digest: Any, name: str, tensor: Any, rounded: torch.dtype = torch.float32) -> None:
    """A tensor's name, shape and values; of 4-bit weights their scales too."""
    state = getattr(tensor, "quant_state", None)
    with whole_weights(tensor) if is_sharded(tensor) else nullcontext([tensor]) as (whole,):
        digest.update(f"{name} {tuple(whole.shape)} {getattr(state, 'quant_type', None)}".encode())
        for block in whole.detach().reshape(-1).split(_BLOCK):
            values = block.cpu()
            digest.update(
                (values.to(rounded).float() if values.is_floating_point() else values.view(torch.uint8)).numpy()
            )
    if state is not None:
        scales = [state.absmax, *([state.state2.absmax, state.offset] if state.nested else [])]
        for i, scale in enumerate(scales):
            _add_tensor(digest, f"{name} scales {i}", scale)
