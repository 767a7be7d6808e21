"""vLLM in the place of transformers, to ask tasks: lm-eval's own `vllm` model, given only what it reads as it was trained."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from peft import PeftConfig
from peft.utils import load_peft_weights
from transformers import AutoConfig, PreTrainedTokenizerBase

from ..adapters.fitness import not_plain_by
from ..extras import require


if TYPE_CHECKING:
    from lm_eval.api.model import LM

BACKEND = "vllm"
# Those that vLLM can be started with (its `max_lora_rank`).
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_FACTORS = (".lora_A.weight", ".lora_B.weight")


def check_vllm_reads(adapter: str) -> int:
    """
    The rank that vLLM has to make room for.

    Args:
        adapter (`str`): Folder of an adapter.

    Raises:
        ValueError: vLLM would compute something else than PEFT does with it.
    """
    config: Any = PeftConfig.from_pretrained(adapter)
    obstacle = not_plain_by(config)
    if obstacle is None and config.r > _RANKS[-1]:
        obstacle = f"`r={config.r}` (above {_RANKS[-1]})"
    if obstacle is None:
        strange = [name for name in load_peft_weights(adapter, device="cpu") if not name.endswith(_FACTORS)]
        obstacle = f"the tensor {strange[0]!r}" if strange else None
    if obstacle is not None:
        raise ValueError(
            f"The adapter in {adapter} has {obstacle}, which vLLM does not read as PEFT does: its answers would be another model's. "
            "Evaluate it with `--backend transformers`, or merge it into its base (`trl-ema export --to merged`) and give the merged model."
        )
    return next(rank for rank in _RANKS if rank >= config.r)


def load_vllm(
    base: str,
    adapter: str | None,
    tokenizer: PreTrainedTokenizerBase,
    revision: str = "main",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    **room: float,
) -> "LM":
    """
    A base model, or one with a LoRA, in vLLM, to be given to [`evaluate_tasks`] for a model.

    Its answers are another engine's: other kernels round otherwise, and the adapter is computed in the base's precision.

    Args:
        base (`str`): Hub name or path.
        adapter (`str`, *optional*): Folder.
        tokenizer (`PreTrainedTokenizerBase`): See [`load_tokenizer`]: the prompts are the same as with transformers.
        dtype (`str`): `auto`, `float32`, `bfloat16` or `float16`.
        room: vLLM's `gpu_memory_utilization`, a share of a GPU's memory, and `max_model_len`, tokens of a question and its answer;
            its own by default.

    Raises:
        ImportError: vLLM is not installed; it is the extra `vllm`.
        ValueError: See [`check_vllm_reads`].
    """
    rank = None if adapter is None else check_vllm_reads(adapter)
    require("vllm", "vllm")
    from lm_eval.api.registry import get_model

    lora = {} if rank is None else {"lora_local_path": adapter, "max_lora_rank": rank}
    options: dict[str, Any] = {"revision": revision, "tokenizer_revision": revision, "dtype": dtype} | lora | room
    lm: Any = get_model(BACKEND)(pretrained=base, trust_remote_code=trust_remote_code, batch_size="auto", **options)
    lm.modify_gen_kwargs = partial(_greedy_unless_asked, lm.modify_gen_kwargs)
    # An adapter's own, with its chat template: lm-eval would take them from one folder, which may lack one of the two.
    lm.tokenizer, lm.hf_chat_template = tokenizer, None
    return lm


def _greedy_unless_asked(modify: Callable, gen_kwargs: dict, **others: Any) -> Any:
    """
    Of a task that says neither, lm-eval 0.4.13 gives vLLM no temperature, which vLLM takes for 1; in transformers it is greedy.
    """
    says = {"do_sample", "temperature"} & {*gen_kwargs}
    return modify(gen_kwargs if says else gen_kwargs | {"do_sample": False}, **others)


def base_commit(base: str, revision: str, trust_remote_code: bool = False) -> str | None:
    """Of a base from the hub, the commit that the revision stands for."""
    config = AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=trust_remote_code)
    return getattr(config, "_commit_hash", None)
