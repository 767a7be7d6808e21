"""Held-out rows: chosen by hashes of their texts, so that no question of them is trained on."""

import hashlib
import json
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Iterable

from datasets import Dataset, IterableDataset

from .formats import seen_columns
from .rows import rows_of


logger = logging.getLogger(__name__)


# An answer to more questions than this is a class (a letter, a code, a tool call): training does without none of them.
_CLASS_QUESTIONS = 10


def held_out_split(
    dataset: Dataset, fraction: float, key: str | None = None, seed: int = 0, text_field: str = "text"
) -> tuple[Dataset, Dataset]:
    """
    `(train, held_out)` by seeded hashes of the rows' texts, so that neither order nor neighbours matter.

    Without `key` rows that share a prompt (and tools), or are equal, are on one side, and so many of them are held out that
    their share comes near `fraction`: at least one row, and never all rows of an answer that others share. Where few prompts
    have many rows each the share may be far from it: then a warning says so. A prompt of half of the rows or more is no
    question but a preamble: its rows, if they differ, are on both sides.

    Args:
        dataset (`Dataset`): Rows in a TRL format.
        fraction (`float`): Share of the held-out part, in (0, 1).
        key (`str`, *optional*): Column whose equal texts are on one side, each side with about its share of the *texts*.
            Only for texts of which each is rare: of four letters one would be held out in all its rows.

    Raises:
        ValueError: No row can be held out; says why.
    """
    if key is not None:
        texts = [str(row[key]) for row in dataset.select_columns(key)]
        held = {i for i, text in enumerate(texts) if _position(text, seed) < fraction}
    else:
        columns = seen_columns(set(dataset.column_names), text_field)
        held = _chosen([question_and_answer(row, columns) for row in rows_of(dataset, columns)], fraction, seed)
    return (
        dataset.select([i for i in range(len(dataset)) if i not in held]),
        dataset.select(sorted(held)),
    )


def held_out_of_stream(
    dataset: IterableDataset, samples: int, fraction: float, seed: int = 0, text_field: str = "text"
) -> tuple[IterableDataset, Dataset]:
    """
    `(train, held_out)` as of [`held_out_split`]: `samples` of the first `samples / fraction` rows. A later row that is equal
    to a held-out one, or shares its prompt, is left out of training too.
    """
    first = list(dataset.take(math.ceil(samples / fraction)))
    if len(first) <= samples:
        return dataset.skip(samples), Dataset.from_list(first)
    columns = seen_columns(set(first[0]), text_field)
    rows = [question_and_answer(row, columns) for row in first]
    chosen = _chosen(rows, samples / len(first), seed)
    held = {rows[i] for i in chosen}
    questions = {question for question, _ in held} - {rows[i][0] for i in range(len(rows)) if i not in chosen}

    def trained(row: dict) -> bool:
        question, answer = question_and_answer(row, columns)
        return question not in questions and (question, answer) not in held

    return dataset.filter(trained), Dataset.from_list([first[i] for i in sorted(chosen)])


def rows_digest(parts: Iterable[Dataset], text_field: str = "text") -> str:
    """Tells the rows of one or several data sets, one after the other, from others: by all that a model sees of them."""
    digest = hashlib.sha256()
    for rows in parts:
        columns = seen_columns(set(rows.column_names), text_field)
        for row in rows_of(rows, columns):
            digest.update(json.dumps(question_and_answer(row, columns)).encode())
    return digest.hexdigest()


def _position(text: str, seed: int) -> float:
    """In [0, 1), by a hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{text}".encode()).digest()[:8], "big") / 2**64


def question_and_answer(row: dict, columns: list[str]) -> tuple[str, str]:
    """As texts. Of a conversation the last message is the answer; a text alone is an answer to no question."""
    *values, last = [row[name] for name in columns]
    if columns[-1] in ("messages", "conversations"):
        values, last = [*values, last[:-1]], last[-1:]
    *question, answer = (json.dumps(value, sort_keys=True, default=str) for value in (*values, last))
    return "".join(question), answer


def _groups(rows: list[tuple[str, str]], seed: int) -> list[list[int]]:
    """Numbers of the rows that stay on one side, those of one question together, in the order of their hashes."""
    times_asked = Counter(question for question, _ in rows)
    groups = defaultdict(list)
    for i, (question, answer) in enumerate(rows):
        # What half of the rows begin with is a preamble: only their answers tell them apart.
        alone = bool(question) and 2 * times_asked[question] < len(rows)
        groups[question if alone else question + answer].append(i)
    return [groups[text] for text in sorted(groups, key=lambda text: _position(text, seed))]


def _chosen(rows: list[tuple[str, str]], fraction: float, seed: int) -> set[int]:
    """Which of the `(question, answer)` rows to hold out: whole groups, see [`_groups`]."""
    if len(rows) < 2:
        raise ValueError("One row cannot be parted into training and held-out rows. Give at least two.")
    wanted = max(1, min(round(fraction * len(rows)), len(rows) - 1))
    order = _groups(rows, seed)
    in_all = Counter(answer for _, answer in rows)
    questions_of = Counter(answer for _, answer in set(rows))
    left = in_all.copy()
    held: set[int] = set()

    def spared(group: list[int]) -> bool:
        """Whether training goes without: some of each answer is left, or it was of this one question and no class."""
        if len(held) + len(group) >= len(rows):
            return False
        taken = Counter(rows[i][1] for i in group)
        return all(n < left[a] or (n == in_all[a] and not frequent(a)) for a, n in taken.items())

    def frequent(answer: str) -> bool:
        """Or a tenth of all rows, equal as they may be."""
        return questions_of[answer] > _CLASS_QUESTIONS or in_all[answer] > max(_CLASS_QUESTIONS, len(rows) / 10)

    def hold(group: list[int]) -> None:
        held.update(group)
        left.subtract(rows[i][1] for i in group)

    for group in order:
        if len(held) + len(group) <= wanted and spared(group):
            hold(group)
    # What is left is larger than what is still wanted: the smallest, if that comes nearer.
    rest = (group for group in order if group[0] not in held and spared(group))
    smallest = min(rest, key=len, default=[])
    if not held or len(held) + len(smallest) - wanted < wanted - len(held):
        hold(smallest)
    if not held:
        raise ValueError(
            f"No row can be held out: of {len(rows)} rows {len(set(rows))} differ, and without any of these training would "
            "lose an answer. Name a split for the evaluation with `--dataset_test_split`, or give more, and different, rows."
        )
    if not wanted / 2 <= len(held) <= 2 * wanted:
        logger.warning(
            "%d of %d rows are held out instead of %d: rows that are equal or share a prompt stay on one side (%d groups), and "
            "training keeps each frequent answer. Name a split with `--dataset_test_split` for another share.",
            len(held), len(rows), wanted, len(order),
        )  # fmt: skip
    return held
