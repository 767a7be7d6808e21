"""Models to evaluate: a base model, an adapter folder, its `teacher/`, or a merged model."""

import hashlib
import os
from pathlib import Path

from peft import PeftConfig, PeftModel
from peft.utils import CONFIG_NAME
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data import hub_errors
from ..offline import demo_model, is_demo_model


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with a PEFT adapter."""
    return os.path.isfile(os.path.join(path, CONFIG_NAME))


def adapter_base(folder: str, base: str | None = None) -> str:
    """
    The base model of the adapter in `folder`.

    Args:
        base (`str`, *optional*): What the user takes for it.

    Raises:
        ValueError: `base` is another model than the one the adapter was trained on, or neither names one.
    """
    trained_on = PeftConfig.from_pretrained(folder).base_model_name_or_path
    if trained_on is not None and not os.path.exists(trained_on) and is_demo_model(trained_on):
        trained_on = demo_model()  # the adapter comes from another machine
    if trained_on is None and base is None:
        raise ValueError(
            f"The adapter in {folder} does not say what its base model is. Give it: `--base NAME_OR_PATH`."
        )
    if trained_on is None:
        return str(base)
    if base is None or _same_model(base, trained_on):
        return base or trained_on
    raise ValueError(
        f"The adapter in {folder} was trained on {trained_on!r}, not on {base!r}: on another base its figures mean nothing. "
        f"Give {trained_on!r} (or nothing) as the base; if it only moved, correct `base_model_name_or_path` in "
        f"{os.path.join(folder, CONFIG_NAME)}."
    )


def _same_model(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def load_base(name: str, revision: str = "main", **options) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A causal language model and its tokenizer, by hub name or path.

    Args:
        options: For `from_pretrained`: `quantization_config`, `dtype`, `device_map`, `trust_remote_code` ...

    Raises:
        ConnectionError: The hub cannot be reached.
    """
    with hub_errors("model", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=options.get("trust_remote_code", False)
        )
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def with_adapter(base: PreTrainedModel, folder: str) -> PeftModel:
    """
    `base` with the adapter in `folder`. Undo it with `model.unload()`.

    Raises:
        ValueError: The adapter does not fit the model.
    """
    try:
        return PeftModel.from_pretrained(base, folder).eval()
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(
            f"The adapter in {folder} does not fit {base.config.name_or_path!r} ({first[0].strip()}): it was trained on "
            "another base. Give that one as the base."
        ) from error


def fingerprint(base: str, adapter: str | None = None, **settings) -> str:
    """
    Tells one evaluated model from another: base (a hub name, or the weights and configuration of a local one, wherever they
    lie), adapter weights and configuration, and `settings` such as the quantization or the scale of the adapter.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    if os.path.isdir(base):
        _add_files(digest, base, ("config.json", "*.safetensors", "*.bin"))
    else:
        digest.update(base.encode())
    if adapter is not None:
        _add_files(digest, adapter, (CONFIG_NAME, "adapter_model.*"))
    return digest.hexdigest()[:16]


def _add_files(digest, folder: str, patterns: tuple[str, ...]) -> None:
    for path in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
