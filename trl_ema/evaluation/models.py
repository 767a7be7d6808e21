"""Models to evaluate: a base model, an adapter folder, its `teacher/`, or a merged model."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.utils import CONFIG_NAME, load_peft_weights, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_FILE

from ..adapters.files import function_fields
from ..adapters.fitness import base_changed_by, check_repeatable
from ..adapters.names import STUDENT_NAME, TEACHER_NAME
from ..adapters.starting_point import StartingPoint
from ..data import hub_errors
from ..offline import demo_model, is_demo_model
from ..sharding import whole_shape
from ..workarounds import keep_4bit_layers_trainable


_TOKENIZER_FILES = ("tokenizer*", CHAT_TEMPLATE_FILE)


def is_adapter(path: str) -> bool:
    """Whether `path` is a folder with a PEFT adapter."""
    return os.path.isfile(os.path.join(path, CONFIG_NAME))


def missing_of_adapter(folder: str) -> str | None:
    """In words, what keeps `folder` from being one of an adapter with its weights; `None` where it is one."""
    if not is_adapter(folder):
        whole = os.path.isfile(os.path.join(folder, "config.json"))
        return f"holds {'a whole model and ' if whole else ''}no adapter (adapter_config.json is missing)"
    if not any(Path(folder).glob("adapter_model.*")):
        return "holds no weights of its adapter (adapter_model.safetensors is missing)"
    return None


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


def adapter_revision(folder: str | None) -> str | None:
    """Branch, tag or commit of the base that the adapter in `folder` was trained on, if it says so."""
    return None if folder is None else PeftConfig.from_pretrained(folder).revision


def check_reference(reference: str | None, adapter: str | None, base: str) -> None:
    """Raises `ValueError` unless the training of `adapter` can have gone on from the one in the folder `reference`."""
    if reference is None or adapter is None:
        return
    if not is_adapter(reference):
        raise ValueError(f"`reference_adapter={reference!r}` is no folder of an adapter. Give one, or leave it out.")
    adapter_base(reference, base)
    _check_same_adapter(PeftConfig.from_pretrained(adapter), reference, adapter)


def _same_model(one: str, other: str) -> bool:
    return one == other or (os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other))


def load_tokenizer(
    base: str, adapter: str | None = None, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a base model or, where `adapter` is a folder that holds one, the one that was trained with.

    A teacher without a tokenizer of its own has its student's.

    Raises:
        ConnectionError: The hub cannot be reached.
    """
    folders = [] if adapter is None else [Path(adapter)]
    if folders and folders[0].name == TEACHER_NAME:
        folders.append(folders[0].parent)
    own = next((str(folder) for folder in folders if (folder / "tokenizer_config.json").is_file()), None)
    with nullcontext() if own else hub_errors("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(own or base, revision=revision, trust_remote_code=trust_remote_code)
    template = next(
        (folder / CHAT_TEMPLATE_FILE for folder in folders if (folder / CHAT_TEMPLATE_FILE).is_file()), None
    )
    if template is not None:
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(name: str, revision: str = "main", **options: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """
    A causal language model and its tokenizer, by hub name or path.

    Args:
        options: For `from_pretrained`: `quantization_config`, `dtype`, `device_map`, `trust_remote_code` ...

    Raises:
        ConnectionError: The hub cannot be reached.
    """
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=options.get("trust_remote_code", False))
    with hub_errors("model", name):
        model = AutoModelForCausalLM.from_pretrained(name, revision=revision, **options)
    keep_4bit_layers_trainable(model)
    return model.eval(), tokenizer


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the model is in eval mode. Every module gets its own mode back, also after an error."""
    keep_4bit_layers_trainable(model)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def with_adapter(
    base: PreTrainedModel,
    folder: str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reference: str | None = None,
) -> tuple[PeftModel, StartingPoint]:
    """
    `base` with the adapter in `folder`, and the model before that adapter was trained.

    Args:
        base (`PreTrainedModel`): Gets the adapter's vocabulary where that has another size.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The one that was trained with.
        reference (`str`, *optional*): Folder of the adapter that the training went on from. By default it began with a new
            one: of PiSSA and others that take from the base's weights, what they put into the adapter at first.

    Raises:
        ValueError: One of the adapters does not fit.
    """
    config = PeftConfig.from_pretrained(folder)
    check_repeatable(
        config,
        f"{folder} holds one. Save it as a LoRA, by PEFT's `save_pretrained(..., path_initial_model_for_weight_conversion=...)` on "
        "the trained model, and evaluate that.",
    )
    config.inference_mode = False
    _resize(base, folder, tokenizer)
    with _fits(folder, base):
        # As `PeftModel.from_pretrained`, which leaves no moment between the adapter's initialization and its weights.
        model = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(config.task_type or "", PeftModel)(base, config)
    # An initialization that leaves the base alone may be a random one: then only the base can be told.
    start = StartingPoint(model, is_base=base_changed_by(config) is None)
    if reference is not None:
        _check_same_adapter(config, reference, folder)
        with _fits(reference, base):
            set_peft_model_state_dict(model, load_peft_weights(reference, device="cpu"))
        start.keep()
    _load(model, folder, STUDENT_NAME, is_trainable=True)
    return model.eval(), start


def add_adapter(model: PeftModel, folder: str, name: str) -> None:
    """Load one more adapter beside those of `model`, switched off. Raises `ValueError` if it does not fit."""
    _load(model, folder, name, is_trainable=False)
    model.eval()


def _load(model: PeftModel, folder: str, name: str, is_trainable: bool) -> None:
    base: Any = model.get_base_model()
    with _fits(folder, base):
        found = model.load_adapter(folder, name, is_trainable=is_trainable)
        config: Any = model.peft_config[name]
        # PEFT also writes embeddings and heads under names of their own, which it does not read.
        prefix = PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
        surplus = [key for key in found.unexpected_keys if prefix and prefix in key]
        strange = [*_not_loaded(model, config, found.missing_keys), *surplus]
        if strange:
            raise RuntimeError(f"\nnot in both: {strange[0]}")


def _not_loaded(model: PeftModel, config: PeftConfig, missing: list[str]) -> list[str]:
    """Names that the adapter's file lacks; not those of a tensor that stands in it under another name."""
    if config.is_prompt_learning:
        return []
    tensors = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if name not in tensors or id(tensors[name]) not in loaded]


@contextmanager
def _fits(folder: str, base: PreTrainedModel) -> Iterator[None]:
    """Turns what PEFT says of an adapter and a model that do not belong together into one `ValueError`."""
    try:
        yield
    except (RuntimeError, IndexError, KeyError) as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise ValueError(
            f"The adapter in {folder} does not fit {base.config.name_or_path!r} with its "
            f"{vocabulary(base)} tokens ({first[0].strip()}). Either it was trained on another "
            "base: give that one. Or with another vocabulary: copy the tokenizer of that training into the adapter's folder."
        ) from error


def vocabulary(model: Any) -> int:
    """Tokens that a model has embeddings for."""
    return whole_shape(model.get_input_embeddings().weight)[0]


def _resize(base: PreTrainedModel, folder: str, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """To as many tokens as the embeddings in the adapter's file have; where it has none, so that its tokenizer's fit."""
    saved = _saved_vocabulary(base, folder)
    have = vocabulary(base)
    need = saved or max(have, 0 if tokenizer is None else len(tokenizer))
    if need != have:
        # New rows are drawn at random; those that were trained come with the adapter. The same at every evaluation.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            base.resize_token_embeddings(need)


def _saved_vocabulary(base: PreTrainedModel, folder: str) -> int | None:
    """Tokens of the embedding or head that PEFT wrote beside the adapter; `None` if it wrote none."""
    layers = base.get_input_embeddings(), base.get_output_embeddings()
    names = [f"base_model.model.{name}." for name, module in base.named_modules() if any(module is x for x in layers)]
    for key, tensor in load_peft_weights(folder, device="cpu").items():
        if key.startswith(tuple(names)) and tensor.dim() == 2:
            if key.endswith("lora_embedding_A"):
                return tensor.shape[1]
            if key.endswith(".weight") and "lora_" not in key:
                return tensor.shape[0]
    return None


def _check_same_adapter(config: PeftConfig, reference: str, folder: str) -> None:
    """Raises `ValueError` unless the adapter in `folder` can have gone on from the one in `reference`."""
    ours, theirs = (function_fields(c.to_dict()) for c in (config, PeftConfig.from_pretrained(reference)))
    other = [name for name in ours if ours[name] != theirs.get(name)]
    if other:
        name = other[0]
        raise ValueError(
            f"The adapter in {folder} did not go on from the one in {reference}: `{name}` is {ours[name]!r} there and "
            f"{theirs.get(name)!r} here. Give the adapter that this training started with, or none to measure from the base."
        )


def fingerprint(base: str, adapter: str | None = None, **settings: Any) -> str:
    """
    Tells one evaluated model from another: base (a hub name, or the weights and configuration of a local one, wherever they
    lie), adapter weights and configuration, the tokenizers beside them, and `settings` such as the quantization, the scale
    of the adapter, and of a base from the hub its commit.
    """
    digest = hashlib.sha256(repr(sorted(settings.items())).encode())
    if os.path.isdir(base):
        _add_files(digest, base, ("config.json", "*.safetensors", "*.bin", *_TOKENIZER_FILES))
    else:
        digest.update(base.encode())
    if adapter is not None:
        _add_files(digest, adapter, (CONFIG_NAME, "adapter_model.*", *_TOKENIZER_FILES))
    return digest.hexdigest()[:16]


def adapter_fingerprint(folder: str) -> str:
    """Tells the adapter in `folder` from others, wherever it lies."""
    digest = hashlib.sha256()
    _add_files(digest, folder, (CONFIG_NAME, "adapter_model.*"))
    return digest.hexdigest()[:16]


def _add_files(digest: Any, folder: str, patterns: tuple[str, ...]) -> None:
    for path in sorted(path for pattern in patterns for path in Path(folder).glob(pattern)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
