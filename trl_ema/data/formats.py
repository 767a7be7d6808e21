"""Columns: those of TRL's formats, those of known data sets, and how the one becomes the other."""

from collections.abc import Callable, Collection
from typing import Any, TypeVar

from datasets import Dataset, Features, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import maybe_convert_to_chatml

from .rows import complete_rows, is_answer


Rows = TypeVar("Rows", Dataset, IterableDataset)
_LETTERS = "ABCD"


def _choices(question: str, options: list[str]) -> str:
    return "\n".join([question, *(f"{letter}. {text}" for letter, text in zip(_LETTERS, options, strict=False))])


def _medical_o1(row: dict) -> tuple[str, str]:
    return row["Question"], row["Response"]


def _medmcqa(row: dict) -> tuple[str, str]:
    options, correct = [row[f"op{letter.lower()}"] for letter in _LETTERS], int(row["cop"])
    answer = f"{_LETTERS[correct]}. {options[correct]}"
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


def trained_columns(columns: set[str], text_field: str = "text") -> list[str]:
    """Which of the columns hold the text that is trained on; of tokens none."""
    if "input_ids" in columns:
        return []
    if {"prompt", "completion"} <= columns:
        return ["prompt", "completion"]
    return [name for name in ("messages", "conversations", text_field) if name in columns][:1]


def seen_columns(columns: set[str], text_field: str = "text") -> list[str]:
    """
    Those that decide what a model sees of a row, the answer or text last: a chat template shows the model its tools and options too.
    """
    found = trained_columns(columns, text_field) or ["input_ids"]
    with_template = found[-1] in ("completion", "messages", "conversations")
    return [c for c in ("tools", "chat_template_kwargs") if with_template and c in columns] + found


def to_prompt_completion(
    dataset: Dataset | IterableDataset,
    text_field: str = "text",
    drop_incomplete: bool = False,
    name: str = "the data set",
    option: str | None = None,
) -> Dataset | IterableDataset:
    """
    Rows of a well-known medical data set as `{"prompt", "completion"}`; rows in a TRL format come back unchanged, but for
    whole numbers, which become their text.

    Args:
        drop_incomplete (`bool`): Leave out the rows in which a text is missing, instead of refusing them.
        name (`str`): What an error calls the data; of a file its path, so that it can name the line.
        option (`str`, *optional*): The option in which a user named them, see [`DataPart`]: an error says how it is told columns.

    Raises:
        IncompleteRowsError: A text is missing or is no text; names row and column. Of a stream, when it is read.
        NoAnswersError: No row has an answer.
        ValueError: The columns are of no known format; the text lists the known ones. Or one holds text in the place of messages, tokens,
            options or paragraphs.
    """
    columns = set(dataset.column_names or next(iter(dataset)))
    if not trl_format(columns, text_field) and trl_format(columns - {"prompt"}, text_field):
        # the first message once more, as in ultrachat_200k
        dataset, columns = dataset.remove_columns("prompt"), columns - {"prompt"}
    needed, convert = set(trained_columns(columns, text_field)), None
    if not trl_format(columns, text_field):
        known = [one for one in FORMATS.values() if one[0] <= columns]
        if not known:
            raise ValueError(_unknown_columns(columns, name, option))
        needed, convert = known[0]
    _check_nested(dataset, (needed | columns & {"input_ids"}) - {text_field}, name)
    dataset = complete_rows(_numbers_as_text(dataset, needed), needed, drop_incomplete, name)
    if convert is None:
        return dataset
    return dataset.map(
        lambda row: dict(zip(("prompt", "completion"), convert(row), strict=True)), remove_columns=list(columns)
    )


# What stands in columns that are no text, and cannot stand in a cell of a table.
_NESTED = {
    "messages": "messages", "conversations": "messages", "input_ids": "tokens", "options": "options by their letters",
    "context": "paragraphs",
}  # fmt: skip


def _check_nested(dataset: Dataset | IterableDataset, columns: set[str], name: str) -> None:
    first: dict[str, Any] = next(iter(dataset), {})
    for column in sorted(columns & _NESTED.keys()):
        if isinstance(first.get(column), str):
            raise ValueError(
                f"Column `{column}` of {name} holds text ({first[column][:60]!r}), as every cell of a CSV file does; expected "
                f"{_NESTED[column]}. Save the rows as JSONL or Parquet, or as CSV with a `prompt` and its `completion`."
            )


def _unknown_columns(columns: set[str], name: str, option: str | None) -> str:
    known = "; ".join(f"{', '.join(sorted(needed))} ({name})" for name, (needed, _) in FORMATS.items())
    return (
        f"Unknown data set columns {sorted(columns)} in {name}. Expected a TRL format (`messages`; `prompt`, `completion`; `text`) "
        f"or one of: {known}. Rename your columns to `prompt` and `completion`, or {_how_to_tell(option)}."
    )


def _told_in(option: str | None) -> str:
    """Where a user says which column is which."""
    return {None: "`columns`", "dataset_name": "`dataset_columns`"}.get(option, f"`columns` in `{option}`")


def check_chosen(
    columns: dict[str, str] | list[str],
    there: Collection[str],
    name: str = "the data set",
    text_field: str = "text",
    option: str | None = None,
) -> None:
    """
    Raises for columns as of [`with_columns`] that are not all of what a format needs: an error about them alone would not tell what else
    is `there`.

    Raises:
        ValueError: They are of no known format; names what is missing, and the columns of the data set.
    """
    names = {*columns}
    of_trl = trl_format(names, text_field) or trl_format(names - {"prompt"}, text_field)
    if of_trl or any(needed <= names for needed, _ in FORMATS.values()):
        return
    missing = f"`prompt` and `completion`, no `messages` and no `{text_field}`"
    if names & {"prompt", "completion"}:
        missing = "`completion`" if "prompt" in names else "`prompt`"
    raise ValueError(
        f"{_told_in(option)} of {name} has {', '.join(f'`{one}`' for one in columns)} and no {missing}. Its columns are {sorted(there)}: "
        f"{_how_to_tell(option)}, or `{text_field}` alone for plain texts."
    )


def _how_to_tell(option: str | None) -> str:
    """Which column is which, of a data set that is named in this option, or in Python."""
    if option is None:
        return "read the file by `trl_ema.data.load_split(path, columns={'prompt': 'YOURS', 'completion': 'YOURS'})`"
    if option == "dataset_name":
        return "say which is which: `--dataset_columns prompt=YOURS completion=YOURS`"
    return f"say which is which: `{{path: ..., columns: {{prompt: YOURS, completion: YOURS}}}}` in `{option}`"


def with_columns(
    dataset: Rows, columns: dict[str, str] | list[str], name: str = "the data set", option: str | None = None
) -> Rows:
    """
    The data set with these columns alone; a `dict` says what each is to be called, `{"prompt": "Question"}`.

    Args:
        name, option: See [`to_prompt_completion`].

    Raises:
        ValueError: One of them is not there, or has two names.
    """
    told_in = _told_in(option)
    there = dataset.column_names or list(next(iter(dataset)))
    wanted: list[str] = list(columns.values() if isinstance(columns, dict) else columns)
    missing = [column for column in wanted if column not in there]
    if missing:
        raise ValueError(
            f"{name} has no column {', '.join(map(repr, missing))}, only {sorted(there)}. Correct {told_in}."
        )
    if len({*wanted}) < len(wanted):
        raise ValueError(f"{told_in} of {name} names a column twice: {columns}. Give each of its own.")
    chosen = dataset.select_columns(wanted)
    new = {theirs: ours for ours, theirs in columns.items() if ours != theirs} if isinstance(columns, dict) else {}
    return chosen.rename_columns(new) if new else chosen


def _numbers_as_text(dataset: Dataset | IterableDataset, columns: set[str]) -> Dataset | IterableDataset:
    """Whole numbers in `columns` as text: they have one spelling. Others have several (3, 3.0): they stay, to be refused."""
    columns = columns - {"cop"}
    features = dataset.features
    if features is not None:
        # Of a JSON file whose rows differ: "yes" in one, 3 in the other.
        mixed = {c for c in columns if type(features[c]).__name__ == "Json"}
        if isinstance(dataset, Dataset):
            mixed = {c for c in mixed if {type(value) for value in dataset[c]} <= {str, int, type(None)}}
        whole = {c for c in columns if isinstance(features[c], Value) and "int" in features[c].dtype}
        if not whole | mixed:
            return dataset
        texts = {c: Value("string") for c in whole | mixed}
        # Of a stream nobody knows yet what else is in such a column.
        features = Features({**features, **texts}) if isinstance(dataset, Dataset) or not mixed else None
    return dataset.map(
        lambda row: {c: str(row[c]) if type(row[c]) is int else row[c] for c in columns}, features=features
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
    if key is None or any(len(row) < 2 or not is_answer(row[-1]) for row in dataset[key]):
        raise ValueError(
            f"Held-out rows with columns {sorted(columns)} have no prompt and answer to measure by. Expected `prompt` and "
            "`completion`, or `messages` that end with the assistant's."
        )
    unused = [name for name in dataset.column_names if name not in ("tools", "chat_template_kwargs")]

    def parted(row: dict) -> dict:
        messages = maybe_convert_to_chatml({"messages": row[key]})["messages"]
        return {"prompt": messages[:-1], "completion": messages[-1:]}

    return dataset.map(parted, remove_columns=unused)


def as_conversation(dataset: Rows) -> Rows:
    """Plain `{"prompt", "completion"}` texts as one user and one assistant message, for models with a chat template."""
    return dataset.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
    )


def as_chat(dataset: Rows, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """
    Plain `{"prompt", "completion"}` texts as conversations, if `tokenizer` has a chat template; rows of any other kind, and
    without a template all rows, come back unchanged.
    """
    first: dict[str, Any] = next(iter(dataset), {})
    plain = all(isinstance(first.get(column), str) for column in ("prompt", "completion"))
    return as_conversation(dataset) if plain and tokenizer.chat_template else dataset
