"""The command `trl-ema export`: a run's adapter as others load it, alone, merged into its base, or as GGUF."""

import logging
import math
import os
import re
import shlex
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from peft.utils import CONFIG_NAME
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import align_special_tokens
from transformers.utils import CHAT_TEMPLATE_FILE, GENERATION_CONFIG_NAME
from trl import TrlParser

from . import data, gguf_files
from .adapters.blending import plain_adapter
from .adapters.fitness import unscalable_by
from .adapters.names import TEACHER_NAME
from .evaluation.drift import check_measurable, general_rows, sampled_rows, tokenized_batches
from .evaluation.merging import merged_and_compared
from .evaluation.models import adapter_base, adapter_revision, is_adapter, load_base, load_tokenizer
from .evaluation.scaling import LARGEST_SCALE, adapter_at, check_run, read_adapter, save_adapter, teacher_of
from .evaluation.vllm_backend import check_vllm_reads
from .extras import require
from .files import OutputError, check_output_dir, new_folder, write_json, write_text
from .inputs import FEW_ROWS, held_out_rows
from .options import RowsArguments, plain_count, plain_number, take_booleans, take_columns, warn_about_ignored
from .provenance import provenance
from .script import options_of_run
from .tune_scale import check_began_as_base, settings_unknown


logger = logging.getLogger(__name__)

TARGETS = ("adapter", "merged", "gguf")
RECORD = "export.json"
_HELP = "Folder that `trl-ema train` wrote: the adapter in it, the teacher's below, if there is one."
_HELD_OUT = "held out by the run"
# Options that only some exports read: of rows by name, of what is merged and compared on rows, of llama.cpp's form.
_OF_NAMED_ROWS = ("dataset_config", "dataset_split", "drop_incomplete_rows", "seed")
_OF_MERGING = ("dtype", "device", "max_kl", "dataset_name", "dataset_columns", "dataset_samples", "batch_size")
_OF_GGUF = ("outtype", "llama_cpp")


@dataclass
class ExportArguments(RowsArguments):
    """
    Write the adapter of a run as others load it: alone, merged into its base, or as GGUF.

    Tokenizer, chat template and generation config go along. A merged model is compared with base and adapter before it is kept.
    """

    adapter: str = field(
        default="student",
        metadata={
            "help": "`student`, `teacher`, or `mix=M`: (1 - M) · student + M · teacher, M in (0, 1), such as `mix=0.5`."
        },
    )
    scale: float = field(
        default=1.0, metadata={"help": "Of the update, in [0, 2]; 1 is the adapter as it was trained, 0 the base."}
    )
    to: str = field(
        default="merged",
        metadata={
            "help": "`adapter`: a plain PEFT adapter. `merged`: a model, in 16 bits also after QLoRA. `gguf`: that model by llama.cpp's "
            "own converter, and the adapter.",
            "choices": list(TARGETS),
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "New folder for it; default: one below `exported` in that of the run."}
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model of the adapter; default: the one named in its configuration."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a base from the hub; default: that of the run."}
    )
    dtype: str = field(
        default="bfloat16",
        metadata={"help": "Of the merged weights.", "choices": ["bfloat16", "float16", "float32"]},
    )
    device: str | None = field(
        default=None, metadata={"help": "Where the model is merged, such as `cpu`; default: a GPU if there is one."}
    )
    max_kl: float = field(
        default=0.01,
        metadata={
            "help": "A merged model is refused above this KL(adapter ‖ merged) on the rows, in nats per token; above 0."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows (hub name or file) to compare on; default: those that the run held out, else general ones."
        },
    )
    dataset_samples: int = field(default=64, metadata={"help": "Rows to compare on at most."})
    batch_size: int = field(default=8, metadata={"help": "Rows at once."})
    outtype: str = field(
        default="auto",
        metadata={
            "help": "Numbers of a GGUF model, as llama.cpp's converter names them; `auto` is 16 bits.",
            "choices": list(gguf_files.MODEL_TYPES),
        },
    )
    llama_cpp: str | None = field(
        default=None,
        metadata={
            "help": "Folder of llama.cpp's source, with its converters; default: `LLAMA_CPP` in the environment, else the PATH."
        },
    )

    def __post_init__(self) -> None:
        take_booleans(self)
        take_columns(self)
        for name, least in dict(dataset_samples=1, batch_size=1, seed=0).items():
            setattr(self, name, plain_count(name, getattr(self, name), least))
        self.scale, self.max_kl = (float(plain_number(name, getattr(self, name))) for name in ("scale", "max_kl"))
        if not 0 <= self.scale <= LARGEST_SCALE:
            raise ValueError(
                f"`scale` must be in [0, {LARGEST_SCALE:g}], got {self.scale:g}. 0 is the base, 1 the adapter as it was trained."
            )
        if not self.max_kl > 0:
            raise ValueError(
                f"`max_kl` must be above 0, got {self.max_kl:g}. It is in nats per token; rounding to 16 bits alone takes some 0.001."
            )
        self.mixture = _share_of_teacher(self.adapter)
        warn_about_ignored(self, *self._unread())

    def _unread(self) -> tuple[tuple[str, ...], str]:
        """Options that are not read, and what is given that does not read them."""
        unread: tuple[str, ...] = _OF_MERGING if self.to == "adapter" else ()
        if self.to == "adapter" or self.dataset_name is None:
            unread += _OF_NAMED_ROWS
        unread += () if self.to == "gguf" else _OF_GGUF
        return unread, f"`to={self.to!r}`" + ("" if self.to == "adapter" else f", `dataset_name={self.dataset_name!r}`")

    @property
    def name(self) -> str:
        """Of what is written."""
        name = self.adapter.replace("=", "")
        return name if self.scale == 1 else f"{name}-x{self.scale:g}"


def _share_of_teacher(adapter: str) -> float:
    if adapter in ("student", "teacher"):
        return float(adapter == "teacher")
    kind, _, share = adapter.partition("=")
    try:
        mixture = float(share)
    except ValueError:
        mixture = math.nan
    if kind != "mix" or not 0 < mixture < 1:
        raise ValueError(
            f"`adapter` must be `student`, `teacher` or `mix=M` with the teacher's share M in (0, 1), such as `mix=0.5`; got {adapter!r}."
        )
    return mixture


def main(arguments: list[str]) -> None:
    """Write it, and print what loads it."""
    parser = TrlParser(ExportArguments, prog="trl-ema export")  # type: ignore[arg-type]
    parser.add_argument("run", metavar="RUN", help=_HELP)
    args, positional = parser.parse_args_and_config(arguments)
    run = str(positional.run)
    check_exportable(run, args.adapter, args.mixture, args.scale)
    folder = os.path.normpath(args.output_dir or os.path.join(run, "exported", f"{args.to}-{args.name}"))
    check_free(folder)
    export = _Export(args, run)
    with new_folder(folder) as scratch:
        lines = export.write(scratch, folder)
    print("\n".join(lines))


def check_exportable(run: str, adapter: str, mixture: float, scale: float) -> None:
    """Raises `ValueError` unless the folder of a run holds this adapter, and it can be mixed and scaled as is asked."""
    if not is_adapter(run):
        check_run(run)  # says so
    if mixture and teacher_of(run) is None:
        raise ValueError(
            f"`adapter={adapter!r}` asks for a teacher, and {os.path.join(run, TEACHER_NAME)} holds none: the run was trained without "
            "one, or its frozen teacher is the base itself. Give `--adapter student`, or a run with `teacher='ema'`."
        )
    if scale != 1 or 0 < mixture < 1:
        check_run(run)
    if 0 < mixture < 1 and getattr(PeftConfig.from_pretrained(run), "target_parameters", None):
        raise ValueError(
            f"`adapter={adapter!r}`: a mixture of adapters with `target_parameters` cannot be written as one. Give `student` or `teacher`."
        )


def check_free(folder: str) -> None:
    """Raises `ValueError` if there is something in `folder` already."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ValueError(
            f"The folder for the export, {folder}, is there already. Delete it, or choose another with `--output_dir`."
        )
    check_output_dir(os.path.dirname(folder) or ".")


class _Export:
    """One adapter of a run and what belongs to it. Everything that can be refused is, before any weights are loaded."""

    def __init__(self, args: ExportArguments, run: str):
        self.args, self.run = args, run
        options = options_of_run(run)
        _, self.settings, model_args = options or (None, *settings_unknown())
        if args.scale != 1:
            check_began_as_base(run, options)
        self.source = run if args.mixture < 1 else str(teacher_of(run))
        # A LoRA that is a factor of its update; others are exported as they are.
        self.is_plain = unscalable_by(PeftConfig.from_pretrained(self.source)) is None
        self.base = adapter_base(run, args.base)
        self.revision = args.model_revision or adapter_revision(run) or model_args.model_revision
        trust = self.settings.trust_remote_code
        self.tokenizer = load_tokenizer(self.base, self.source, self.revision, trust)
        with data.hub_errors("model", self.base):
            self.config = AutoConfig.from_pretrained(self.base, revision=self.revision, trust_remote_code=trust)
            self.generation = _generation_config(self.base, self.revision, self.config, self.tokenizer)
        self.was_4bit = bool(model_args.load_in_4bit)
        if args.to != "adapter":
            self._check_mergeable()
            self.rows, self.batches = self._rows(options)
        if args.to == "gguf":
            require("export", "gguf")
            self.converter = gguf_files.find_converter(gguf_files.CONVERT_MODEL, args.llama_cpp)
            if self.converter is not None:
                gguf_files.check_converter(self.converter)

    def _check_mergeable(self) -> None:
        if getattr(self.config, "quantization_config", None):
            raise ValueError(
                f"The base {self.base!r} is stored quantized: merged into it the adapter would be rounded with it. Export `--to adapter`, "
                f"or put the model it was made from into {os.path.join(self.source, CONFIG_NAME)} (`base_model_name_or_path`)."
            )
        try:
            check_measurable(PeftConfig.from_pretrained(self.source))
        except ValueError as error:
            raise ValueError(
                f"A merged model could not be compared with this adapter: export `--to adapter`. {error}"
            ) from error

    def _rows(self, options: Any) -> tuple[str, list[dict]]:
        """What the rows to compare on are, and their batches. To few held-out ones general ones are added."""
        args, what = self.args, self.args.dataset_name
        general = data.as_chat(Dataset.from_list(general_rows()), self.tokenizer)
        more = general.select([])
        if what is not None:
            rows = sampled_rows(args, self.tokenizer)
        elif options is not None:
            what, rows = _HELD_OUT, held_out_rows(self.run, options)
        else:
            what, rows = "general", general
        rows = rows.select(range(min(args.dataset_samples, len(rows))))
        if what == _HELD_OUT and len(rows) < FEW_ROWS:
            more = general.select(range(min(args.dataset_samples - len(rows), len(general))))
            what = f"{len(rows)} {what}, {len(more)} general" if len(more) else what
        length, batches = self.settings.max_length, list[dict]()
        for some in (rows, more):  # of different columns, it may be
            if len(some):
                batches += tokenized_batches(some, self.tokenizer, length, args.batch_size, self.settings)
        return f"{len(rows) + len(more)} rows ({what})", batches

    def write(self, scratch: str, folder: str) -> list[str]:
        """
        Write everything into `scratch`, which will be `folder`.

        Returns:
            Lines to print: how it compares, what it is, and what loads it.
        """
        args = self.args
        self._write_beside(scratch)
        figures: dict[str, Any] | None = None
        lines: list[str] = []
        with tempfile.TemporaryDirectory(dir=scratch, prefix=".") as parts:
            adapter = scratch if args.to == "adapter" else os.path.join(parts, "adapter")
            self._write_adapter(adapter)
            if args.to == "merged":
                figures = self._write_merged(adapter, scratch)
            elif args.to == "gguf":
                merged = os.path.join(parts, "merged")
                self._write_beside(merged)
                figures = self._write_merged(adapter, merged)
                lines = [
                    *self._write_gguf_adapter(adapter, merged, scratch),
                    *self._write_gguf(merged, scratch, folder),
                ]
        if args.to != "adapter":
            source = "." if args.to == "merged" else "./model.gguf"
            write_text(Path(scratch, "Modelfile"), _modelfile(source, self.tokenizer))
        about = {"run": self.run, "adapter": args.adapter, "scale": args.scale, "to": args.to, "base": self.base}
        about |= {"revision": self.revision, "figures": figures, "provenance": provenance()}
        write_json(Path(scratch, RECORD), about)
        comparison = [] if figures is None else self._comparison(figures)
        return [*comparison, f"{args.name} of {self.run} is in {folder}.", *lines, *self._serving(scratch, folder)]

    def _write_beside(self, folder: str) -> None:
        """What always goes along. A configuration that cannot be saved fails here, before the model is loaded."""
        self.tokenizer.save_pretrained(folder)
        self.generation.save_pretrained(folder)

    def _write_adapter(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        if self.is_plain:
            save_adapter(plain_adapter(adapter_at(self.run, self.args.mixture, self.args.scale)), folder)
            return
        for path in (Path(self.source, CONFIG_NAME), *Path(self.source).glob("adapter_model.*")):
            shutil.copy(path, folder)

    def _write_merged(self, adapter: str, folder: str) -> dict[str, Any]:
        """Merge, and tell how it compares. Raises `ValueError` if it is another model."""
        args = self.args
        base, _ = load_base(
            self.base,
            self.revision,
            dtype=getattr(torch, args.dtype),
            device_map={"": args.device or ("cuda" if torch.cuda.is_available() else "cpu")},
            trust_remote_code=self.settings.trust_remote_code,
        )
        trained = (self.run, args.mixture, args.scale) if self.is_plain else ()
        merged, figures = merged_and_compared(base, adapter, self.tokenizer, self.batches, *trained)
        if not figures["kl_adapter_merged"] <= args.max_kl:
            raise ValueError(
                f"KL(adapter ‖ merged) is {figures['kl_adapter_merged']:.3g} nats per token on {self.rows}, above `max_kl={args.max_kl:g}`: "
                f"merged into {args.dtype} weights the model is not what was trained. Export `--to adapter`, merge with `--dtype "
                "float32`, or accept it with a larger `--max_kl`."
            )
        _check_room(merged, folder, 2 if args.to == "gguf" else 1)
        merged.generation_config = self.generation
        align_special_tokens(merged, self.tokenizer)
        merged.save_pretrained(folder)
        return figures | {"rows": self.rows, "dtype": args.dtype}

    def _write_gguf(self, merged: str, scratch: str, folder: str) -> list[str]:
        """`model.gguf`; where there is no converter the merged folder, and lines with the command."""
        if self.converter is not None:
            file = os.path.join(scratch, "model.gguf")
            gguf_files.convert(gguf_files.model_command(self.converter, merged, file, self.args.outtype), file)
            return []
        os.rename(merged, os.path.join(scratch, "merged"))
        there, file = os.path.join(folder, "merged"), os.path.join(folder, "model.gguf")
        command = shlex.join(gguf_files.model_command(None, there, file, self.args.outtype))
        return [
            f"llama.cpp's {gguf_files.CONVERT_MODEL} is neither on the PATH nor given (`--llama_cpp`). This makes model.gguf:",
            f"    git clone --depth 1 https://github.com/ggml-org/llama.cpp && {command}",
        ]

    def _write_gguf_adapter(self, adapter: str, merged: str, scratch: str) -> list[str]:
        """`adapter.gguf`, or a line that says why there is none."""
        if not self.is_plain:
            return ["No adapter.gguf: llama.cpp takes plain LoRA alone."]
        written, file = read_adapter(adapter), os.path.join(scratch, "adapter.gguf")
        cause = gguf_files.not_written_here(written, self.config.model_type)
        if cause is None:
            gguf_files.write_adapter(written, self.config, file)
            return []
        beside = None if self.converter is None else Path(self.converter[-1]).with_name(gguf_files.CONVERT_ADAPTER)
        if beside is None or not beside.is_file():
            return [f"No adapter.gguf: {cause}. That takes llama.cpp's {gguf_files.CONVERT_ADAPTER}."]
        try:
            command = gguf_files.adapter_command([*(self.converter or [])[:-1], str(beside)], merged, adapter, file)
            gguf_files.convert(command, file)
        except ChildProcessError as error:  # it knows no biases, for one; the model is whole without it
            Path(file).unlink(missing_ok=True)
            return [f"No adapter.gguf: {error}"]
        return []

    def _comparison(self, figures: dict) -> list[str]:
        lines = [
            f"KL(adapter ‖ merged): {figures['kl_adapter_merged']:.2g} nats per token on {self.rows}, at most {self.args.max_kl:g}. "
            f"Loss of the merged model there: {figures['loss']:.4f}."
        ]
        if self.was_4bit:
            lines.append(
                "It was trained over 4-bit weights and is merged into those they were made from: `trl-ema evaluate` measures the result."
            )
        return lines

    def _serving(self, scratch: str, folder: str) -> list[str]:
        """The lines for servers."""
        name = re.sub(r"[^a-z0-9_.-]+", "-", f"{Path(self.run).resolve().name}-{self.args.name}".lower()).strip("-.")
        if self.args.to == "adapter":
            return self._serving_adapter(name, scratch, folder)
        ollama = f"Ollama:     ollama create {name} -f {_quoted(folder, 'Modelfile')} && ollama run {name}"
        if self.args.to == "merged":
            return [f"vLLM:       vllm serve {_quoted(folder)} --served-model-name {name}{self._trust}", ollama]
        lines = [f"llama.cpp:  llama-server -m {_quoted(folder, 'model.gguf')}"]
        if os.path.isfile(os.path.join(scratch, "adapter.gguf")):
            lines.append(
                f"            llama-server -m BASE.gguf --lora {_quoted(folder, 'adapter.gguf')}    (any GGUF of the base)"
            )
        return [*lines, ollama, "vLLM:       serves merged models: `--to merged`"]

    @property
    def _trust(self) -> str:
        """For vLLM, of a model with code of its own."""
        return " --trust-remote-code" if self.settings.trust_remote_code else ""

    def _serving_adapter(self, name: str, scratch: str, folder: str) -> list[str]:
        try:
            rank = check_vllm_reads(scratch)
        except ValueError:
            return ["vLLM and Ollama take plain LoRA alone: for them export `--to merged` or `--to gguf`."]
        of_hub = self.revision not in (None, "main") and not os.path.isdir(self.base)
        which = f" --revision {shlex.quote(self.revision)}" if of_hub else ""
        vllm = f"vLLM:       vllm serve {_quoted(self.base)}{which}{self._trust}"
        vllm += f" --enable-lora --max-lora-rank {rank} --lora-modules {name}={_quoted(folder)}"
        if os.path.isfile(os.path.join(scratch, CHAT_TEMPLATE_FILE)):
            vllm += f" --chat-template {_quoted(folder, CHAT_TEMPLATE_FILE)}"
        return [vllm, "Ollama:     takes whole models: `--to merged` or `--to gguf`"]


def _quoted(*parts: str) -> str:
    """A path for a shell."""
    return shlex.quote(os.path.join(*parts))


def _generation_config(base: str, revision: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's, with the special tokens of the tokenizer that was trained with."""
    try:
        generation = GenerationConfig.from_pretrained(base, revision=revision)
    except OSError as error:
        # So it is where there is none, in a folder or as the hub says or once said. Out of reach of the hub a cache may merely lack it.
        if "does not appear to have a file named" not in str(error):
            logger.warning(
                "Whether %r has a generation config could not be known (%s). If it has one, what it says of sampling is not in the export: "
                "export again where the hub is in reach, or copy its %s there.",
                base, " ".join(str(error).split()), GENERATION_CONFIG_NAME,
            )  # fmt: skip
        generation = GenerationConfig.from_model_config(config)
    align_special_tokens(SimpleNamespace(config=config, generation_config=generation), tokenizer)
    return generation


def _modelfile(source: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """For `ollama create`. The chat template it finds in the model itself."""
    lines = [f"FROM {source}"]
    if tokenizer.eos_token is not None:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def _check_room(model: PreTrainedModel, folder: str, copies: int) -> None:
    """Raises [`OutputError`] unless there is room for the model, so many times."""
    os.makedirs(folder, exist_ok=True)
    needed, free = copies * model.get_memory_footprint(), shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"{free / 2**20:.0f} MiB are free where the export is written; it needs {needed / 2**20:.0f} MiB. Free some space, or choose "
            "another `--output_dir`."
        )
