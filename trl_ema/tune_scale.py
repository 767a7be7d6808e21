"""The command `trl-ema tune-scale`: how far to turn a trained adapter back, measured on its own held-out rows."""

import math
import os
from dataclasses import dataclass, field, fields
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig, TrlParser

from . import data
from .comparison.pictures import draw_scales
from .evaluation.drift import general_rows, sampled_rows, tokenized_batches
from .evaluation.models import adapter_base, adapter_revision, fingerprint, is_adapter, load_base, load_tokenizer
from .evaluation.scaling import FIGURES, SCALES, Dial, check_run, check_scales, curve_of, teacher_of
from .extras import require
from .files import check_output_dir
from .inputs import held_out_rows, quantization
from .options import RowsArguments, plain_count, plain_number, take_booleans, take_columns, warn_about_ignored
from .script import TrainingScriptArguments, options_of_run


PICTURE = "scale.png"
_HELD_OUT = "held out"
_HELP = "Folder that `trl-ema train` wrote: the adapter in it, the teacher's below, if there is one."


@dataclass
class ScaleArguments(RowsArguments):
    """
    Scale the update of a trained adapter: less of it drifts less from the base, and keeps most of what was learned.

    Without training, on one loaded base: held-out loss and drift over scales of the student, of its teacher and of their
    mixture. With a budget the best point within it is written as an adapter of its own.
    """

    max_drift: float | None = field(
        default=None,
        metadata={
            "help": "Budget, KL(base ‖ model) on general text in nats per token, above 0: the point of lowest held-out loss within "
            "it is written. Without one the curves are measured and drawn, and nothing else is written."
        },
    )
    scales: list[float] = field(
        default_factory=lambda: list(SCALES),
        metadata={"help": "Of the update, in [0, 2]; 1 is the adapter as it was trained, 0 the base."},
    )
    mixtures: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the teacher, in (0, 1), to trace beside student and teacher; default: a half, if there is one."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for figures, picture and adapter; default: `scaled` in that of the run."},
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model of the adapter; default: the one named in its configuration."}
    )
    model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of a base from the hub; default: that of the run."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Rows (hub name or file) for the loss; default: those that the run held out."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of `dataset_name`; a single file is `train`."})
    dataset_samples: int = field(
        default=128, metadata={"help": "Rows of `dataset_name` and of `drift_dataset` at most, seeded."}
    )
    drop_incomplete_rows: bool = field(
        default=False, metadata={"help": "Leave out rows of these two in which a text is missing."}
    )
    drift_dataset: dict | str | None = field(
        default=None,
        metadata={
            "help": "Further rows that drift is measured on, beside 48 general ones; the larger of both counts: hub name or file, or an "
            "entry as of `datasets`, such as `{path: other.csv, columns: {prompt: Question, completion: Reply}}`. Its split is `train` "
            "where the entry names none."
        },
    )
    batch_size: int = field(default=16, metadata={"help": "Rows at once."})
    load_in_4bit: bool | None = field(
        default=None, metadata={"help": "4-bit NF4 with double quantization; default: as the run was trained."}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "`auto`, `float32`, `bfloat16` or `float16`; default: that of the run.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )

    def __post_init__(self) -> None:
        take_booleans(self)
        take_columns(self)
        for name, least in dict(dataset_samples=1, batch_size=1, seed=0).items():
            setattr(self, name, plain_count(name, getattr(self, name), least))
        if self.max_drift is not None:
            self.max_drift = float(plain_number("max_drift", self.max_drift))
            if not 0 < self.max_drift < float("inf"):
                raise ValueError(
                    f"`max_drift` must be above 0 and finite, got {self.max_drift:g}. It is in nats per token; try 0.05. Only the base itself "
                    "does not drift."
                )
        if self.dataset_name is None:
            unread: tuple[str, ...] = ("dataset_config", "dataset_split")
            unread += () if self.drift_dataset else ("drop_incomplete_rows", "dataset_samples", "seed")
            warn_about_ignored(self, unread, "`dataset_name=None`")


def main(arguments: list[str]) -> None:
    """Measure, draw and print the curves of a run; with a budget write its adapter."""
    parser = TrlParser(ScaleArguments, prog="trl-ema tune-scale")  # type: ignore[arg-type]
    parser.add_argument("run", metavar="RUN", help=_HELP)
    args, positional = parser.parse_args_and_config(arguments)
    run = str(positional.run)
    require("report", "matplotlib")
    check_run(run)
    mixtures = check_scales(run, args.scales, args.mixtures)
    folder = args.output_dir or os.path.join(run, "scaled")
    _check_free(folder)
    dial, tokenizer = _dial(args, run, folder)
    dial.trace(mixtures, args.scales, args.max_drift)
    point = None if args.max_drift is None else dial.suggested(args.max_drift)
    curves = {_name(mixture): curve_of(dial.points, mixture) for mixture in mixtures}
    with open(os.path.join(folder, PICTURE), "wb") as file:
        file.write(draw_scales(curves, point, args.max_drift).png)
    _print_table(curves, point)
    if point is not None:
        dial.write(point, folder, tokenizer)
    _print_suggestion(args, folder, point)


def _check_free(folder: str) -> None:
    """Raises `ValueError` if something else than the figures of an earlier, unfinished measurement is in `folder`."""
    there = os.listdir(folder) if os.path.isdir(folder) else []
    if is_adapter(folder) or (there and FIGURES not in there):
        raise ValueError(
            f"The folder for the scaled adapter, {folder}, is there already. Delete it, or of an earlier scaled adapter its "
            f"adapter_* files alone ({FIGURES} has the figures, which are not measured again), or choose another with `--output_dir`."
        )
    check_output_dir(folder)


def _dial(args: ScaleArguments, run: str, folder: str) -> tuple[Dial, PreTrainedTokenizerBase]:
    """The loaded base with the run's adapters, and the rows that it is measured on."""
    options = options_of_run(run)
    _, settings, model_args = options or (None, *settings_unknown())
    check_began_as_base(run, options)
    if args.load_in_4bit not in (None, model_args.load_in_4bit):
        model_args.load_in_4bit = model_args.use_bnb_nested_quant = bool(args.load_in_4bit)
    base = adapter_base(run, args.base)
    revision = args.model_revision or adapter_revision(run) or model_args.model_revision
    tokenizer = load_tokenizer(base, run, revision, settings.trust_remote_code)
    rows = _rows(args, run, options, tokenizer)
    batches = {
        name: tokenized_batches(found, tokenizer, settings.max_length, args.batch_size, settings)
        for name, found in rows.items()
    }
    precision: dict[str, Any] = {
        "dtype": args.dtype or model_args.dtype or "auto",
        "quantization_config": quantization(model_args, settings),
    }
    model, _ = load_base(
        base,
        revision,
        **precision,
        device_map={"": "cuda" if torch.cuda.is_available() else "cpu"},
        attn_implementation=model_args.attn_implementation,
        trust_remote_code=settings.trust_remote_code,
    )
    told = {name: repr(value) for name, value in precision.items()}
    told["revision"] = getattr(model.config, "_commit_hash", None) or revision
    teacher = teacher_of(run)
    model_id = fingerprint(base, run, **told, teacher=None if teacher is None else fingerprint(base, teacher))
    about = {"run": run, "base": base, **told, "rows": {name: len(found) for name, found in rows.items()}}
    return Dial(model, run, tokenizer, batches.pop(_HELD_OUT), batches, folder, model_id, about), tokenizer


def settings_unknown() -> tuple[Any, ModelConfig]:
    """Settings of a training that are not known: TRL's, and as `trl-ema evaluate` takes them."""
    defaults = {f.name: f.default for f in fields(SFTConfig)}
    known = {"max_length": 1024, "bf16": torch.cuda.is_available(), "fp16": False}
    return SimpleNamespace(**defaults | known), ModelConfig(dtype="auto")


def check_began_as_base(run: str, options: tuple[TrainingScriptArguments, Any, ModelConfig] | None) -> None:
    """Raises `ValueError` if the run went on from an adapter, so that another scale would also be one of what was trained before."""
    args, _, model_args = options or (None, *settings_unknown())
    start = None if args is None else args.adapter_name_or_path
    if start is None and model_args.model_name_or_path is not None and is_adapter(model_args.model_name_or_path):
        start = model_args.model_name_or_path
    if start is not None:
        raise ValueError(
            f"The run in {run} went on from the adapter {start!r}: what was trained before would be scaled "
            "with it, down to the base. Only an adapter that began as its base can be scaled."
        )


def _rows(
    args: ScaleArguments,
    run: str,
    options: tuple[TrainingScriptArguments, Any, ModelConfig] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Dataset]:
    """Those whose loss is measured, and by name those for the drift."""
    if args.dataset_name is not None:
        held_out = sampled_rows(args, tokenizer)
    else:
        held_out = held_out_rows(run, options)
    rows = {_HELD_OUT: held_out, "general": data.as_chat(Dataset.from_list(general_rows()), tokenizer)}
    if args.drift_dataset is not None:
        rows["yours"] = sampled_rows(args, tokenizer, "drift_dataset")
    return rows


def _name(mixture: float) -> str:
    return {0.0: "student", 1.0: "teacher"}.get(mixture, f"{1 - mixture:g} student + {mixture:g} teacher")


def _print_table(curves: dict[str, list[dict]], suggested: dict | None) -> None:
    for name, points in curves.items():
        texts = list(points[-1]["drift_on"])
        print(
            f"\n{name}\n{'scale':>8}{'held-out loss':>15}{'gain':>9}" + "".join(f"{'drift, ' + t:>16}" for t in texts)
        )
        for point in points:
            gain = "–" if math.isnan(point["gain"]) else f"{100 * point['gain']:.1f} %"
            drift = "".join(f"{point['drift_on'][text]:16.4f}" for text in texts)
            mark = "  <" if point is suggested else ""
            print(f"{point['scale']:8.4g}{point['loss']:15.4f}{gain:>9}{drift}{mark}")
    print(
        "\nLoss and drift, KL(base ‖ model), in nats per token; gain is the fall of the loss, as a share of the largest."
    )


def _print_suggestion(args: ScaleArguments, folder: str, point: dict | None) -> None:
    if args.max_drift is None:
        print(
            "No point is suggested: gain against drift is a smooth curve without a knee. Say how much drift is acceptable with "
            "`--max_drift`; what is measured is not measured again."
        )
    elif point is None:
        print(
            f"No scale gains anything with a drift of at most {args.max_drift:g}: nothing is written but the figures."
        )
    else:
        print(
            f"Suggested: {_name(point['mixture'])} × {point['scale']:g}, {100 * point['gain']:.1f} % of the gain at a drift of "
            f"{point['drift']:.4g} of at most {args.max_drift:g}."
        )
        print(f"The adapter is in {folder}: `PeftModel.from_pretrained(base, {folder!r})`.")
    print(f"Figures: {os.path.join(folder, FIGURES)}; picture: {os.path.join(folder, PICTURE)}.")
