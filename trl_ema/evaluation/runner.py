"""lm-eval on a model that is in memory: one file of results and one of answers per task, resumable."""

import copy
import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import psutil
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import read_json, write_json, write_jsonl
from ..provenance import provenance
from .answers import BACKEND, summarize
from .metrics import chance_of, check_metric, full_name, metric_of, numbers_of
from .models import evaluating
from .settings import LATER, TaskSettings, parse_tasks
from .tasks import check_tasks, default_metric, definition, generates, leaves, quiet, task_manager


if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

_LM_EVAL_LOGGERS = ("lm_eval.api.task", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.api.model")
_CPU_BATCH_SIZE = 16


def evaluate_tasks(
    model: "PreTrainedModel | PeftModel | LM",
    tokenizer: PreTrainedTokenizerBase | None,
    tasks: Sequence[str],
    folder: str,
    *,
    model_id: str,
    manager: "TaskManager",
    settings: TaskSettings | None = None,
    batch_size: int | str | None = None,
    about: dict | None = None,
    backend: str = BACKEND,
) -> dict[str, dict]:
    """
    Runs lm-eval's tasks or groups and keeps the results in `folder`.

    A task that `folder` holds already, of the same model and settings, is read instead of run. Within a task every
    answer is kept as it comes, so an interrupted evaluation goes on at the next question.

    Args:
        model (`PreTrainedModel`, `PeftModel` or lm-eval's `LM`): Evaluated as it is, with the adapter that is active; or what lm-eval
            asks in another backend, see [`load_vllm`]; then no tokenizer is needed.
        tasks (list of `str`): Names of lm-eval tasks or groups.
        folder (`str`): Gets `TASK.json` and `TASK.jsonl`, a line a question.
        model_id (`str`): What tells this model from others, such as [`fingerprint`].
        manager (`lm_eval.tasks.TaskManager`): See [`task_manager`].
        batch_size (`int` or `str`, *optional*): Found automatically by default.
        about (`dict`, *optional*): Kept with the results, such as the name of the model.
        backend (`str`): What the model runs in; kept with each answer.

    Returns:
        `dict`: For each task its `score` (mean of `metric` over the questions), `n`, `chance` (score of
        guessing), `subtasks` (score and n of each) and lm-eval's own results.

    Raises:
        ValueError: lm-eval knows no such task (the text lists near matches), or the task has no one number per question.
    """
    settings = settings or TaskSettings()
    check_tasks(list(tasks), manager)
    results, keys = {}, {name: _key(model_id, name, settings) for name in tasks}
    for name in tasks:
        path = Path(folder, f"{name}.json")
        known = read_json(path) if path.is_file() else {}
        if known.get("key") == keys[name]:
            results[name] = known
    pending = [name for name in tasks if name not in results]
    for name in pending:
        check_settings(name, settings, manager)
    for name in pending:
        path = Path(folder, f"{name}.json")
        with _language_model(model, tokenizer, batch_size) as lm:
            results[name] = _run(lm, name, path, keys[name], model_id, manager, settings, about, backend)
    return {name: results[name] for name in tasks}


def check_settings(name: str, settings: TaskSettings, manager: "TaskManager") -> None:
    """Raises `ValueError`, before anything is run, if the task cannot be asked or scored as `settings` say."""
    if settings.sample is not None:
        sample_questions(name, settings.sample, settings.seed, manager)
    metric = settings.metric or default_metric(name, manager)
    for leaf in leaves(name, manager):
        check_metric(leaf, definition(leaf, manager), metric)
    if settings.gen_kwargs and not generates(name, manager):
        raise ValueError(
            f"`gen_kwargs={settings.gen_kwargs}` say how answers are written, and in {name!r} they are chosen. Leave them out."
        )


def tasks_to_ask(
    entries: Sequence[str], include_path: Sequence[str] = (), offline: bool | None = None
) -> "tuple[TaskManager, dict[str, TaskSettings]]":
    """
    lm-eval's task manager, and the tasks written as `TASK` or `TASK:N` with their settings, after each is known to be there.

    Raises:
        ValueError: One of them cannot be asked, or has no one number per question.
    """
    tasks = parse_tasks("eval_tasks", entries)
    manager = task_manager(offline, include_path)
    check_tasks(list(tasks), manager)
    for name, settings in tasks.items():
        check_settings(name, settings, manager)
    return manager, tasks


@contextmanager
def _language_model(
    model: Any, tokenizer: PreTrainedTokenizerBase | None, batch_size: int | str | None
) -> "Iterator[LM]":
    """What lm-eval asks. Within this context a model is in eval mode; it leaves it, and the tokenizer, as they were."""
    from lm_eval.api.model import LM
    from lm_eval.models.huggingface import HFLM

    if isinstance(model, LM):
        yield model
        return
    # A tie of weights belongs to loading. lm-eval asks for one more, of a model that may be in training.
    untied = mock.patch.object(model, "tie_weights", lambda *args, **kwargs: None)
    with evaluating(model), untied, quiet(*_LM_EVAL_LOGGERS):
        size, device = batch_size or automatic_batch_size(model), model.device.type
        # lm-eval computes in a precision of its own: without this it switches an autocast around it off.
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        yield HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=size, mixed_precision_dtype=dtype)


def _run(lm, name, path: Path, key, model_id, manager, settings: TaskSettings, about, backend) -> dict:
    from lm_eval import simple_evaluate

    path.parent.mkdir(parents=True, exist_ok=True)
    # What a model answers is one thing, and which figure of it is the score another.
    answers = path.with_name(f".{name}.{_key(model_id, name, replace(settings, metric=None))}")
    samples = sample_questions(name, settings.sample, settings.seed, manager) if settings.sample else None
    # lm-eval asks git for the commit of the folder that it runs in, and git complains on the screen where there is none.
    no_git = mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None)
    # It gives its results to the first process of a launch alone; here each has asked all of the questions itself.
    alone = mock.patch.dict(os.environ, LOCAL_RANK="0")
    with quiet(*_LM_EVAL_LOGGERS), no_git, alone:
        output = simple_evaluate(
            lm,
            tasks=[name],
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            samples=samples,
            apply_chat_template=settings.apply_chat_template,
            gen_kwargs=settings.gen_kwargs,
            use_cache=str(answers),
            bootstrap_iters=0,
            task_manager=manager,
            fewshot_random_seed=settings.seed,
        )
    metric = settings.metric or default_metric(name, manager)
    rows = [
        row
        for task, found in output["samples"].items()
        for row in _rows(task, definition(task, manager), found, metric, backend)
    ]
    result = {"key": key, "task": name, **summarize(rows), "settings": asdict(settings), "samples": samples}
    result |= {"lm_eval_version": version("lm_eval"), "lm_eval": {**output["results"], **output.get("groups", {})}}
    result |= {"backend": backend, "about": about, "provenance": provenance()}
    write_jsonl(path.with_suffix(".jsonl"), rows)
    write_json(path, result)
    for leftover in path.parent.glob(f"{answers.name}*"):
        leftover.unlink()
    return result


def _rows(task: str, defined: dict, samples: list[dict], asked: str | None, backend: str) -> Iterator[dict]:
    """What a paired comparison needs of lm-eval's records of a task's questions. Those of other filters are the same answers."""
    metric, chosen = metric_of(task, defined, samples, asked)
    for sample in samples:
        if sample["filter"] != chosen:
            continue
        found = numbers_of(sample)
        yield {
            **found,
            "task": task,
            "doc_id": sample["doc_id"],
            "doc_hash": sample["doc_hash"],
            "prompt_hash": sample["prompt_hash"],
            "metric": full_name(metric, chosen),
            "score": found[metric],
            "chance": chance_of(metric, sample),
            "backend": backend,
        }


def sample_questions(name: str, n: int, seed: int, manager: "TaskManager") -> dict[str, list[int]]:
    """
    `n` questions of a task or group, drawn with `seed`: indices for each subtask, as lm-eval's `--samples` takes them.

    Every subtask gets its share by size (largest remainders), and at least one question.
    """
    with quiet(*_LM_EVAL_LOGGERS):
        sizes = {task: len(found.eval_docs) for task, found in manager.load([name])["tasks"].items()}
    if n < len(sizes):
        raise ValueError(f"`sample={n}` is less than one question for each of the {len(sizes)} subtasks of {name!r}.")
    n = min(n, sum(sizes.values()))
    shares = {task: n * size / sum(sizes.values()) for task, size in sizes.items()}
    counts = {task: max(1, int(share)) for task, share in shares.items()}
    by_remainder = sorted(sizes, key=lambda task: counts[task] - shares[task])
    while sum(counts.values()) != n:
        missing = n - sum(counts.values())
        for task in by_remainder if missing > 0 else reversed(by_remainder):
            if sum(counts.values()) == n:
                break
            change = 1 if missing > 0 else -1
            if 1 <= counts[task] + change <= sizes[task]:
                counts[task] += change
    generator = random.Random(seed)
    return {task: sorted(generator.sample(range(sizes[task]), counts[task])) for task in sizes}


def automatic_batch_size(model: PreTrainedModel | PeftModel) -> int | str:
    """lm-eval's own search on a GPU; on a CPU, what fits into the free memory as float32 logits."""
    if model.device.type != "cpu":
        return "auto"
    config = model.config.get_text_config()
    length = min(2048, getattr(config, "max_position_embeddings", 2048))
    return int(max(1, min(_CPU_BATCH_SIZE, psutil.virtual_memory().available // (3 * 4 * config.vocab_size * length))))


def _key(model_id: str, task: str, settings: TaskSettings) -> str:
    options = {name: value for name, value in asdict(settings).items() if name not in LATER or value is not None}
    text = json.dumps([model_id, task, options, version("lm_eval")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
