"""Lets vLLM write a model's texts, which is faster on a GPU: the `continuation` of [`trl_ema.texts.write_texts`]."""

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor

from .extras import require


class VLLMWriter:
    """
    A model in vLLM, for which nothing of the distribution is cut off, nor changed by the model's own settings of generation.

    vLLM draws by its own random numbers, seeded for each text: others than transformers draws.

    Args:
        model (`str`): Hub name or path.
        revision (`str`): Branch, tag or commit of one from the hub.
        dtype (`str`): `auto`, `float32`, `bfloat16` or `float16`.
        options: Further ones of vLLM's `LLM`, such as `gpu_memory_utilization`.

    Raises:
        ImportError: vLLM is not installed; it is the extra `vllm`.
    """

    def __init__(self, model: str, revision: str = "main", dtype: str = "auto", **options: Any):
        require("vllm", "vllm")
        self.vllm: Any = import_module("vllm")
        self.engine = self.vllm.LLM(
            model=model,
            revision=revision,
            tokenizer_revision=revision,
            dtype=dtype,
            generation_config="vllm",
            **options,
        )

    def __call__(self, prompts: list[list[int]], uniforms: Tensor, ends: Iterable[int]) -> list[list[int]]:
        """What the model writes after each of the prompts: a token for each column of `uniforms`, or until one of `ends`, with it."""
        settings = [
            self.vllm.SamplingParams(
                temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
                max_tokens=uniforms.shape[1], ignore_eos=True, stop_token_ids=sorted(ends), seed=int(row[0] * 2**31),
                detokenize=False,
            )
            for row in uniforms
        ]  # fmt: skip
        found = self.engine.generate([{"prompt_token_ids": row} for row in prompts], settings, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]
