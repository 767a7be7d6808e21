"""Several data sets as one: how many rows of which, and in which order, so that their shares are exact."""

import itertools
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from fractions import Fraction
from typing import Any, cast

import yaml
from datasets import Dataset, IterableDataset, concatenate_datasets
from trl.scripts.utils import DatasetConfig

from ..options import plain_number


logger = logging.getLogger(__name__)

# Names of evaluation sets that are there anyway.
_TAKEN = ("domain", "general")


@dataclass
class DataPart(DatasetConfig):
    """
    A data set, alone or in TRL's `datasets:` block; the keys of an entry of that block, and what they mean, are TRL's. Every other
    option that names further rows (`replay_dataset`, `rehearsal_dataset`, `drift_dataset`, `drift_data`) takes such an entry, too.

    Args:
        columns (`list` or `dict`, *optional*): Columns to read, as in TRL; or which column is which, for columns of no known format:
            `{"prompt": "Question", "completion": "Reply"}`.
        fraction (`float`, *optional*): Target share of the mixture, in (0, 1]; shares are taken as parts of their sum.
    """

    columns: Any = None
    fraction: float | None = None

    @classmethod
    def from_config(cls, given: Any, option: str = "datasets") -> "DataPart":
        """
        A data set as a user wrote it: its hub name or file, or a mapping, as YAML has it or as text on a command line.

        Args:
            option (`str`): The option in which he did, for messages.

        Raises:
            ValueError: It is none.
        """
        if isinstance(given, DatasetConfig):  # of a command line it has a path alone
            given = given.path if str(given.path).startswith("{") else vars(given)
        entry = _as_mapping(given)
        known = [f.name for f in fields(cls) if f.name != "fraction" or option == "datasets"]
        what = "An entry of `datasets`" if option == "datasets" else f"`{option}`"
        if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
            raise ValueError(
                f"{what} is {given!r}; expected a mapping with a `path` (hub name or file), such as `{{path: data.csv, columns: {{prompt: "
                "Question, completion: Reply}}`, or that path alone."
            )
        unknown = sorted(map(str, entry.keys() - {*known}))
        if unknown:
            what = f"The entry {entry['path']!r} of `{option}`"
            raise ValueError(f"{what} has unknown keys {unknown}; known are {known}.")
        part = cls(**cast(dict, entry))
        _check_columns(part, option)
        if part.fraction is not None:
            part.fraction = float(plain_number("fraction", part.fraction))
            if not 0 < part.fraction <= 1:
                raise ValueError(
                    f"`fraction` of {part.path!r} must be in (0, 1], got {part.fraction:g}. It is the share of the training rows "
                    "that come from there."
                )
        return part


@dataclass
class LoadedPart:
    """
    One of the data sets of a training, in a TRL format; plain prompts are chats where the model has a template.

    Args:
        name (`str`): In logs.
        train (`Dataset` or `IterableDataset`), held_out (`Dataset`): Its rows.
        fraction (`float`, *optional*): Its target share.
        replayed (`bool`): Whether it is the `replay_dataset`.
        shared (`list`): Rows that it has in common with its held-out ones, or with others of a mixture, see [`without_held_out`].
    """

    name: str
    train: Dataset | IterableDataset
    held_out: Dataset
    fraction: float | None = None
    replayed: bool = False
    shared: list[dict] = field(default_factory=list)


def _as_mapping(given: Any) -> Any:
    """A name, or the text of a mapping, as a mapping; what is neither stays as it is."""
    if not isinstance(given, str):
        return given
    if not given.startswith("{"):
        return {"path": given}
    try:
        return yaml.safe_load(given)
    except yaml.YAMLError:
        return given


def _check_columns(part: DataPart, option: str) -> None:
    told = part.columns
    names = [*told.keys(), *told.values()] if isinstance(told, dict) else told
    if told is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"`columns` of {part.path!r} in `{option}` is {told!r}; expected which is which, `{{prompt: Question, completion: Reply}}`, or "
            "a list of columns to read."
        )


def names_of_parts(parts: Sequence[DataPart | None]) -> list[str]:
    """Each with a name of its own, for logs: that of its file or on the hub, in letters, digits and `_`; `None` is the demo."""
    names: list[str] = []
    for part in parts:
        file = "demo" if part is None else part.data_files if isinstance(part.data_files, str) else part.path
        stem = re.sub(r"\.(jsonl?|csv|parquet)$", "", os.path.basename(file.rstrip("/")))
        name = re.sub(r"\W+", "_", stem).strip("_") or "part"
        others = (f"{name}_{number}" for number in itertools.count(2))
        names.append(
            next(one for one in (name, *itertools.islice(others, len(parts) + 2)) if one not in (*names, *_TAKEN))
        )
    return names


def mixture_counts(
    names: Sequence[str],
    sizes: Sequence[int],
    fractions: Sequence[float | None],
    replay_fraction: float | None = None,
    limit: int | None = None,
) -> list[int]:
    """
    How many rows to take of each part, each within a row of its share:

        n_i = share_i · T          T the largest with n_i ≤ size_i for every part, as TRL has it; without fractions all rows
        replayed rows = T · r / (1 − r)          r: `replay_fraction`, of all training rows together

    Args:
        names, sizes: Of the parts, the replayed one last where there is a `replay_fraction`.
        fractions: Of the others; those of all, or of none.
        limit (`int`, *optional*): Of all rows together: so many with fractions, at most so many without.

    Raises:
        ValueError: A part has fewer rows than its fraction of the limit, or than are replayed; or its share is no row.
    """
    own, replay = list(sizes[: len(fractions)]), Fraction(str(replay_fraction or 0))
    empty = [name for name, size in zip(names, sizes, strict=True) if not size]
    if empty:
        raise ValueError(f"No row of {empty[0]!r} is left to train on. Look at its answers and at `max_length`.")
    given = fractions[0] is not None
    weights = _shares(fractions, own)
    room = [size / weight for size, weight in zip(own, weights, strict=True)]
    total = most = int(min(room))
    if limit is not None:
        total = max(limit - round(limit * replay), 1)
        if given and total > most:
            short = room.index(min(room))
            raise ValueError(
                f"`max_train_samples={limit}` with these fractions takes {math.ceil(total * weights[short])} rows of "
                f"{names[short]!r}, which has {own[short]} to train on. Ask for at most {int(most / (1 - replay))}, change its "
                "`fraction`, or give more data."
            )
        total = min(total, most)
    counts = _parted(total, weights)
    scarce = None if total < most else names[room.index(min(room))]
    if not replay:
        _check_all_taken(names, counts, scarce, limit)
        return counts
    replayed = limit - total if limit is not None and total < most else round(total * replay / (1 - replay))
    if replayed > sizes[-1]:
        largest = math.floor(1000 * Fraction(sizes[-1], sizes[-1] + total)) / 1000
        raise ValueError(
            f"`replay_fraction={replay_fraction:g}` beside {total} rows takes {replayed} rows of {names[-1]!r}, which has "
            f"{sizes[-1]} to train on. Lower it to {largest:g}, train on fewer rows (`--max_train_samples`), or give more to replay."
        )
    _check_all_taken(names, [*counts, replayed], scarce, limit)
    return [*counts, replayed]


def _check_all_taken(names: Sequence[str], counts: Sequence[int], scarce: str | None, limit: int | None) -> None:
    """
    Raises `ValueError` if a part gives no row.

    Args:
        scarce (`str`, *optional*): The part that has too few rows for more of all; `None` where `limit` allows no more.
    """
    without = next((name for name, count in zip(names, counts, strict=True) if not count), None)
    if without is None:
        return
    more = (
        f"raise `max_train_samples={limit}`" if scarce is None else f"give more rows of {scarce!r} or lower its share"
    )
    raise ValueError(
        f"The mixture would have no row of {without!r}: of its {sum(counts)} rows the share of {without!r} is less than one. Raise "
        f"that share (`fraction`, or `replay_fraction` of what is replayed), {more}, or leave {without!r} out."
    )


def _shares(fractions: Sequence[float | None], sizes: Sequence[int]) -> list[Fraction]:
    """Parts of their sum, exactly; without fractions by size."""
    weights = [Fraction(str(f)) if f is not None else Fraction(size) for f, size in zip(fractions, sizes, strict=True)]
    return [weight / sum(weights) for weight in weights]


def _parted(total: int, shares: Sequence[Fraction]) -> list[int]:
    """`total` in whole numbers by largest remainders."""
    exact = [total * share for share in shares]
    counts = [int(number) for number in exact]
    order = sorted(range(len(counts)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


def mixed(
    parts: Sequence[Dataset | IterableDataset],
    names: Sequence[str],
    fractions: Sequence[float | None],
    replay_fraction: float | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Dataset | IterableDataset:
    """
    One data set of the parts' first rows, see [`mixture_counts`], shuffled with `seed`. Where one is a stream so is the result: its rows
    come in a fixed pattern (see [`pattern`]), so that any beginning has the shares, and end with the first part that ends.

    The order depends on nothing but the parts and the seed: each rank takes its own of the same rows, and a resumed run goes on in them.
    """
    if any(isinstance(part, IterableDataset) for part in parts):
        replay = Fraction(str(replay_fraction or 0))
        shares = [(1 - replay) * share for share in _shares(fractions, [1] * len(fractions))]
        stream = _interleaved(parts, [*shares, replay] if replay else shares)
        return stream if limit is None else stream.take(limit)
    sizes = [len(part) for part in parts]  # type: ignore[arg-type]  # no stream is left
    counts = mixture_counts(names, sizes, fractions, replay_fraction, limit)
    for name, count, size in zip(names, counts, sizes, strict=True):
        logger.info("%s: %d of %d rows, %.4g %% of the mixture.", name, count, size, 100 * count / sum(counts))
    chosen: Any = [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]  # type: ignore[union-attr]
    return concatenate_datasets(chosen).shuffle(seed=seed)


def pattern(weights: Sequence[int]) -> Iterator[int]:
    """
    Which part comes next, forever: the one that is furthest behind its share. No part is ever a whole row ahead of it, and after each
    Σ weights rows every part has exactly its own.
    """
    taken, total = [0] * len(weights), sum(weights)
    for number in itertools.count(1):
        behind = [number * weight - total * have for weight, have in zip(weights, taken, strict=True)]
        chosen = behind.index(max(behind))
        taken[chosen] += 1
        yield chosen


def _interleaved(parts: Sequence[Dataset | IterableDataset], shares: Sequence[Fraction]) -> IterableDataset:
    denominator = math.lcm(*(share.denominator for share in shares))
    weights = tuple(int(share * denominator) for share in shares)
    # Tuples: a list would be taken for shards, and parted between the workers of a data loader.
    return IterableDataset.from_generator(_rows, gen_kwargs={"parts": tuple(parts), "weights": weights})


def _rows(parts: tuple, weights: tuple) -> Iterator[dict]:
    iterators = [iter(part) for part in parts]
    for chosen in pattern(weights):
        row = next(iterators[chosen], None)
        if row is None:
            return
        yield row
