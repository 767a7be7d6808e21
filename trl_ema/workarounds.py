"""Faults of other libraries, kept out of the way, each with where it is known upstream."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainingArguments


class _TokensOfHead(TrainableTokensWrapper):
    bias = None


def let_tokens_of_head_train(model: Any) -> None:
    """
    Where PEFT trains single tokens of the head (`trainable_token_indices`; those of the embeddings are, if both are tied) it
    wraps the head and hands on its weight alone. TRL's loss reads the bias too, if only to find that there is none.

    Raises:
        ValueError: The head has a bias, which PEFT would leave out (huggingface/peft#3649, open).
    """
    head = model.get_output_embeddings()
    if type(head) is not TrainableTokensWrapper:
        return
    if head.original_module.bias is not None:
        raise ValueError(
            "`trainable_token_indices` has tokens of the LM head, whose bias PEFT would leave out of every logit. Name the input "
            "embeddings alone, or train the whole head with `modules_to_save`."
        )
    head.__class__ = _TokensOfHead


def keep_4bit_layers_trainable(model: torch.nn.Module) -> None:
    """
    bitsandbytes repacks 4-bit weights in an eval-mode forward on CPUs with AVX512-BF16, for a product that has no
    backward. Gradients after an evaluation would silently be wrong, and so would whatever reads the weight itself, such as
    DoRA for its norm. Harmless on other machines and for other models.
    (Since bitsandbytes-foundation/bitsandbytes#1804.)
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks, in place
            vars(module)["support_avx512bf16_for_cpu"] = False


def keep_float32_adapter(model: Any, args: TrainingArguments) -> None:
    """
    TRL casts the adapter of a quantized model to bfloat16, the precision QLoRA computes in. A run in float32 keeps it in
    float32: nothing is rounded, and a CPU without bfloat16 instructions multiplies in bfloat16 tens of times slower. Without a
    teacher too, though `SFTTrainer` then differs: arms that are compared must differ in their teacher alone.
    (huggingface/trl#7268 asks for float32 for a part of it.)
    """
    if args.bf16 or args.fp16:
        return
    if "bitsandbytes" not in sys.modules:  # nobody has made a layer of its own
        return
    from bitsandbytes.nn import Linear4bit

    if {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} == {torch.float32}:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def keep_float32_outputs(accelerator: Any) -> None:
    """
    Accelerate has FSDP2 cast all that a forward returns to bfloat16 or float16: here sums of losses, which do not bear it.
    (`FullyShardedDataParallelPlugin.set_mixed_precision`; no upstream issue is known.)
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


@contextlib.contextmanager
def dtypes_kept(model: torch.nn.Module) -> Iterator[None]:
    """PEFT upcasts an adapter when it loads it (huggingface/peft#2421, as intended); TRL trains 4-bit models' in bfloat16."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, dtype in before.items():
        parameter = model.get_parameter(name)  # PEFT may have put a new one there
        parameter.data = parameter.data.to(dtype)
