"""lm-eval on a model that is in memory: one file of results and one of answers per task, resumable."""

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import psutil
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..files import read_json, write_json, write_jsonl
from ..provenance import provenance
from .answers import summarize
from .models import evaluating
from .settings import METRICS, TaskSettings
from .tasks import check_tasks, leaves, quiet


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_LM_EVAL_LOGGERS = ("lm_eval.api.task", "lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.api.model")
_CPU_BATCH_SIZE = 16


def evaluate_tasks(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    folder: str,
    *,
    model_id: str,
    manager: "TaskManager",
    settings: TaskSettings | None = None,
    batch_size: int | str | None = None,
    about: dict | None = None,
) -> dict[str, dict]:
    """
    Runs lm-eval's tasks or groups and keeps the results in `folder`.

    A task that `folder` holds already, of the same model and settings, is read instead of run. Within a task every
    answer is kept as it comes, so an interrupted evaluation goes on at the next question.

    Args:
        model (`PreTrainedModel` or `PeftModel`): Evaluated as it is, with the adapter that is active.
        tasks (list of `str`): Names of lm-eval tasks or groups.
        folder (`str`): Gets `TASK.json` and `TASK.jsonl`, a line a question.
        model_id (`str`): What tells this model from others, such as [`fingerprint`].
        manager (`lm_eval.tasks.TaskManager`): See [`task_manager`].
        batch_size (`int` or `str`, *optional*): Found automatically by default.
        about (`dict`, *optional*): Kept with the results, such as the name of the model.

    Returns:
        `dict`: For each task its `score` (mean of `metric` over the questions, in [0, 1]), `n`, `chance` (score of
        guessing), `subtasks` (score and n of each) and lm-eval's own results.

    Raises:
        ValueError: lm-eval knows no such task; the text lists near matches.
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
        with evaluating(model):
            results[name] = _run(model, tokenizer, name, path, keys[name], manager, settings, batch_size, about)
    return {name: results[name] for name in tasks}


def check_settings(name: str, settings: TaskSettings, manager: "TaskManager") -> None:
    """Raises `ValueError`, before anything is run, if the task cannot be asked or scored as `settings` say."""
    if settings.sample is not None:
        sample_questions(name, settings.sample, settings.seed, manager)
    for leaf in leaves(name, manager):
        offered = [str(metric["metric"]) for metric in manager.task_index[leaf].cfg.get("metric_list") or ()]
        if offered and not set(offered) & ({settings.metric} if settings.metric else set(METRICS)):
            raise ValueError(_no_metric(leaf, offered, settings.metric))


def _no_metric(task: str, offered: Sequence[str], metric: str | None) -> str:
    wanted = f"`{metric}`" if metric else "`acc` or `acc_norm`"
    return (
        f"Task {task!r} is scored by {list(offered)}; expected {wanted}, one number per question. Choose another `metric`, or "
        "a multiple-choice task."
    )


def _run(model, tokenizer, name, path: Path, key, manager, settings, batch_size, about) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    path.parent.mkdir(parents=True, exist_ok=True)
    answers = path.with_name(f".{name}.{key}")
    samples = sample_questions(name, settings.sample, settings.seed, manager) if settings.sample else None
    # lm-eval asks git for the commit of the folder that it runs in, and git complains on the screen where there is none.
    no_git = mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None)
    with quiet(*_LM_EVAL_LOGGERS), no_git:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size or automatic_batch_size(model))
        output = simple_evaluate(
            lm,
            tasks=[name],
            num_fewshot=settings.num_fewshot,
            limit=settings.limit,
            samples=samples,
            apply_chat_template=settings.apply_chat_template,
            use_cache=str(answers),
            bootstrap_iters=0,
            task_manager=manager,
            fewshot_random_seed=settings.seed,
        )
    rows = [_row(task, sample, settings.metric) for task, found in output["samples"].items() for sample in found]
    result = {"key": key, "task": name, **summarize(rows), "settings": asdict(settings), "samples": samples}
    result |= {"lm_eval_version": version("lm_eval"), "lm_eval": {**output["results"], **output.get("groups", {})}}
    result |= {"about": about, "provenance": provenance()}
    write_jsonl(path.with_suffix(".jsonl"), rows)
    write_json(path, result)
    for leftover in path.parent.glob(f"{answers.name}*"):
        leftover.unlink()
    return result


def _row(task: str, sample: dict, metric: str | None) -> dict:
    """What a paired comparison needs of lm-eval's record of a question."""
    found = {name: float(sample[name]) for name in METRICS if name in sample["metrics"]}
    metric = metric or next(iter(found), None)
    if metric not in found:
        raise ValueError(_no_metric(task, sample["metrics"], metric))
    choices = len(sample["arguments"])
    return {
        "task": task,
        "doc_id": sample["doc_id"],
        "doc_hash": sample["doc_hash"],
        "prompt_hash": sample["prompt_hash"],
        **found,
        "metric": metric,
        "score": found[metric],
        # lm-eval asks each option by itself; a task with one request has no options to guess from.
        "chance": 1 / choices if choices > 1 else 0.0,
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
    text = json.dumps([model_id, task, asdict(settings), version("lm_eval")], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
