"""Models and adapters in llama.cpp's form: by its own converter, and small adapters by the `gguf` package."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from .adapters.blending import Adapter
from .extras import require


CONVERT_MODEL = "convert_hf_to_gguf.py"
CONVERT_ADAPTER = "convert_lora_to_gguf.py"
MODEL_TYPES = ("f32", "f16", "bf16", "q8_0", "auto")
# Bases whose layers llama.cpp takes as they are, but for the rows of `_PERMUTED`; of others its own converter knows what to do.
_ARCHITECTURES = {"llama": "LLAMA", "mistral": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# Its rotary embedding turns neighbours in place of halves, so the rows of these are in another order.
_PERMUTED = ("q_proj", "k_proj")
_A, _B = ".lora_A.weight", ".lora_B.weight"


def find_converter(name: str, folder: str | None = None) -> list[str] | None:
    """
    The command that runs one of llama.cpp's converters, a Python script; `None` where it is not there.

    Args:
        name (`str`): Of the script.
        folder (`str`, *optional*): Of llama.cpp's source; by default that in the environment variable `LLAMA_CPP`, else the PATH is
            searched.

    Raises:
        FileNotFoundError: A folder is given and does not hold it.
    """
    folder = folder or os.environ.get("LLAMA_CPP")
    if not folder:
        found = shutil.which(name)
        return None if found is None else [found]
    script = os.path.join(folder, name)
    if not os.path.isfile(script):
        raise FileNotFoundError(
            f"{folder!r} holds no {name}. Give the folder of llama.cpp's source as `--llama_cpp` (or `LLAMA_CPP`), or leave it out."
        )
    return [sys.executable, script]


def model_command(converter: list[str] | None, model: str, file: str, outtype: str) -> list[str]:
    """What makes a GGUF `file` of the folder of a model; without a converter as it would be in llama.cpp's source."""
    return [*(converter or ["python", f"llama.cpp/{CONVERT_MODEL}"]), model, "--outfile", file, "--outtype", outtype]


def adapter_command(converter: list[str], base: str, adapter: str, file: str) -> list[str]:
    """What makes a GGUF `file` of the folder of an adapter, over a base of whose folder the configuration is read."""
    return [*converter, "--base", base, "--outfile", file, adapter]


def check_converter(converter: list[str]) -> None:
    """Raises `ChildProcessError`, with its last words, if a converter does not start, as for want of what it imports."""
    _call([*converter, "--help"])


def convert(command: list[str], file: str) -> None:
    """Run a converter. Raises `ChildProcessError`, with its last words, if it fails or there is no `file` then."""
    _call(command, file)


def _call(command: list[str], file: str | None = None) -> None:
    environment = {
        name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"
    }  # it imports what is beside it
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode or not (file is None or os.path.isfile(file)):
        words = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise ChildProcessError(
            f"llama.cpp's converter failed (exit code {done.returncode}):\n{words}\nWhat it needs is in `requirements/` of its source. "
            f"Or export `--to merged`, and convert that folder elsewhere. It was called as: {shlex.join(command)}"
        )


def not_written_here(adapter: Adapter, model_type: str) -> str | None:
    """Why [`write_adapter`] does not suffice for an adapter over such a base; `None` where it does."""
    config, tensors = adapter
    if model_type not in _ARCHITECTURES:
        return f"a base of type {model_type!r} is not one of {', '.join(_ARCHITECTURES)}"
    if getattr(config, "target_parameters", None):
        return "it has `target_parameters`"
    other = next((key for key in tensors if not key.endswith((_A, _B))), None)
    return None if other is None else f"it has a tensor {other!r}, which is no factor of a linear layer"


def write_adapter(adapter: Adapter, config: Any, file: str) -> None:
    """
    A LoRA as a GGUF file in float32: the factors of each layer, which llama.cpp scales by alpha / rank.

    Args:
        adapter: Of one rank and without patterns, see [`plain_adapter`], and of [`not_written_here`].
        config (`PretrainedConfig`): Of the base.
        file (`str`): To be written.

    Raises:
        ImportError: `gguf` is not installed.
        ValueError: A layer has no name in llama.cpp.

    Source: llama.cpp, convert_lora_to_gguf.py, whose tensors these are.
    """
    require("export", "gguf")
    import gguf

    architecture = getattr(gguf.MODEL_ARCH, _ARCHITECTURES[config.model_type])
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(adapter[0].lora_alpha))
    for key, tensor in sorted(adapter[1].items()):
        layer = key.removeprefix("base_model.model.").removesuffix(_A).removesuffix(_B)
        name = names.get_name(f"{layer}.weight", try_suffixes=(".weight",))
        if name is None:
            raise ValueError(
                f"llama.cpp has no name for the layer {layer!r} of {config.model_type!r}. Export `--to merged`."
            )
        heads = _heads(config, layer) if architecture == gguf.MODEL_ARCH.LLAMA and key.endswith(_B) else None
        tensor = tensor.float() if heads is None else _permuted(tensor.float(), heads)
        writer.add_tensor(f"{name}.lora_{'a' if key.endswith(_A) else 'b'}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _heads(config: Any, layer: str) -> int | None:
    """Of a projection whose rows are in another order there; else `None`."""
    name = Path(layer).suffix.lstrip(".")
    if name not in _PERMUTED:
        return None
    return config.num_attention_heads if name == "q_proj" else config.num_key_value_heads


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Of each head the rows of both halves one by one: those that are rotated together become neighbours."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)
