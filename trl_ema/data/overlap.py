"""Rows that stand in several data sets or splits: what is held out of one none trains on, and the rest is counted."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from .formats import seen_columns
from .rows import rows_of
from .split import question_and_answer


def rows_in_common(held_out: Dataset, train: Dataset, text_field: str = "text") -> int:
    """How many rows of one data set's held-out part stand, with equal texts, among the training rows of another one."""
    return _among(_numbers(held_out, text_field), _numbers(train, text_field))


def without_held_out(
    names: Sequence[str],
    train: Sequence[Dataset | IterableDataset],
    held_out: Sequence[Dataset],
    text_field: str = "text",
) -> tuple[list[Dataset | IterableDataset], list[list[dict]]]:
    """
    The training rows of one or several data sets without those that one of them holds out: no row is on both sides, of a mixture or of
    splits that have rows in common.

    As of [`held_out_split`] these are rows that are equal to a held-out one or share its prompt, unless that prompt is a preamble: here
    one that the data set which holds it out trains on too. Of what a stream holds out equal rows alone are left out; a stream that is
    trained on is looked at as it is read.

    Args:
        names, train, held_out: Of the data sets.

    Returns:
        The training rows; and of each data set what it shares, as entries `{"trained", "held_out", "rows", "of"}`: of its training rows
        those that are left out, as held out of the other; `{"trained", "also_trained", "rows", "of"}` and `{"held_out", "also_held_out",
        "rows", "of"}`: of its rows those that an earlier data set has on the same side.

    Raises:
        ValueError: Of one of them no row is left to train on.
    """
    held = [_numbers(rows, text_field) for rows in held_out]
    trained = [_numbers(rows, text_field) if isinstance(rows, Dataset) else None for rows in train]
    asked = [_questions(*both) for both in zip(held, trained, strict=True)]
    left: list[Dataset | IterableDataset] = []
    shared: list[list[dict]] = []
    for place, (name, rows, own) in enumerate(zip(names, train, trained, strict=True)):
        found = _also(names, held, place, "held_out")
        if own is None:
            left.append(_stream_without(rows, held, asked, text_field))
        else:
            out = [
                _in(own, 1, theirs[:, 1]) | _in(own, 0, questions)
                for theirs, questions in zip(held, asked, strict=True)
            ]
            kept = np.flatnonzero(~np.any(out, axis=0))
            if not len(kept):
                raise ValueError(_none_left(name, len(own), alone=len(names) == 1))
            counts = {other: int(one.sum()) for other, one in zip(names, out, strict=True)}
            found += [
                {"trained": name, "held_out": other, "rows": count, "of": len(own)}
                for other, count in counts.items()
                if count
            ]
            left.append(rows if len(kept) == len(own) else rows.select(kept))
            trained[place] = own[kept]
            found += _also(names, trained, place, "trained")
        shared.append(found)
    return left, shared


def _none_left(name: str, rows: int, alone: bool) -> str:
    if alone:
        return (
            f"No training row of {name!r} is left: all of its {rows} are held out too, in the split that figures are measured on. Name "
            "another one with `--dataset_test_split`, or another to train on with `--dataset_train_split`."
        )
    return (
        f"No training row of {name!r} is left: all of its {rows} are held out of another data set of the mixture, or share a prompt with "
        "a row that is. Leave this data set out, or name another split of it."
    )


def _also(names: Sequence[str], numbers: Sequence[np.ndarray | None], place: int, side: str) -> list[dict]:
    """Entries of the rows of one data set that stand in those before it too."""
    own: Any = numbers[place]
    counts = {
        other: _among(own, theirs) for other, theirs in zip(names[:place], numbers, strict=False) if theirs is not None
    }
    return [
        {side: name, f"also_{side}": names[place], "rows": count, "of": len(own)}
        for name, count in counts.items()
        if count
    ]


def _number(text: str) -> int:
    """Tells a text from others, in every process alike."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)


def _two_numbers(row: dict, columns: list[str]) -> tuple[int, int]:
    """Of the question of a row, and of question and answer."""
    question, answer = question_and_answer({column: _without_gaps(row[column]) for column in columns}, columns)
    return _number(question), _number(f"{question}\n{answer}")


def _without_gaps(value: Any) -> Any:
    """Messages without the keys that they have because others of their data set do."""
    if not isinstance(value, list):
        return value
    return [{k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part for part in value]


def _numbers(dataset: Dataset, text_field: str) -> np.ndarray:
    """Of all rows, see [`_two_numbers`], [rows, 2]: for those of millions there is room."""
    columns = seen_columns(set(dataset.column_names), text_field)
    return np.array([_two_numbers(row, columns) for row in rows_of(dataset, columns)], np.int64).reshape(-1, 2)


def _in(own: np.ndarray, column: int, others: np.ndarray) -> np.ndarray:
    return np.isin(own[:, column], others)


def _among(ours: np.ndarray, theirs: np.ndarray) -> int:
    return int(_in(ours, 1, theirs[:, 1]).sum())


def _questions(held: np.ndarray, trained: np.ndarray | None) -> np.ndarray:
    """Those of held-out rows: without the empty one, which a plain text answers, and without those that the same data set trains on."""
    return held[:0, 0] if trained is None else np.setdiff1d(held[:, 0], np.append(trained[:, 0], _number("")))


def _stream_without(
    rows: Any, held: Sequence[np.ndarray], asked: Sequence[np.ndarray], text_field: str
) -> IterableDataset:
    out, questions = set(np.concatenate(held)[:, 1].tolist()), set(np.concatenate(asked).tolist())

    def trained(row: dict) -> bool:
        question, both = _two_numbers(row, seen_columns(set(row), text_field))
        return both not in out and question not in questions

    return rows.filter(trained)
