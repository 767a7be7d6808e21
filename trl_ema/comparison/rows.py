"""The rows of a comparison: held out alike in every arm, and what is trained on of them all the same."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from typing import Any

from datasets import Dataset
from trl import ModelConfig

from .. import data
from ..config import MeanTeacherConfig
from ..data import LoadedPart
from ..inputs import load_parts, load_tokenizer
from ..script import TrainingScriptArguments
from .plan import Comparison


logger = logging.getLogger(__name__)

Options = tuple[TrainingScriptArguments, MeanTeacherConfig, ModelConfig]

_DOMAIN = "the domain"
# Of the data's options those by which the held-out rows of a data set are chosen; `test_split_size` is the second.
_OF_THE_SPLIT = ("split_seed", "eval_fraction", "dataset_test_split", "dataset_streaming")


def check_same_split(runs: dict[tuple[str, int], Options]) -> None:
    """
    Raises `ValueError` if arms hold out rows in different ways: all are measured on those of the first.

    Args:
        runs (`dict`): Options by arm and seed.
    """
    by_arm = {arm: args for (arm, _), (args, *_) in runs.items()}
    check_same(by_arm, _OF_THE_SPLIT, "it would be trained on rows that all arms are measured on")


def check_same(settings: dict[str, Any], names: Iterable[str], otherwise: str) -> None:
    """
    Raises `ValueError` unless these options are the same in all arms.

    Args:
        settings (`dict`): Some of the options of each arm, as attributes.
        otherwise (`str`): What would come of it.
    """
    first, expected = next(iter(settings.items()))
    for (arm, options), name in product(settings.items(), names):
        ours, theirs = getattr(options, name), getattr(expected, name)
        if ours != theirs:
            raise ValueError(
                f"Arm {arm!r} has `{name}={ours!r}` and arm {first!r} {theirs!r}: {otherwise}. Give all arms the same, under `training`."
            )


class RunData:
    """What runs train on and hold out; where several have the same data it is read once."""

    def __init__(self) -> None:
        self._read: dict[str, list[LoadedPart]] = {}

    @staticmethod
    def key(options: Options) -> str:
        """Equal for runs of the same data. An adapter that is gone on from need not be there yet: its base has its tokenizer."""
        args, settings, model_args = options
        of_settings = settings.dataset_text_field, settings.trust_remote_code
        of_model = model_args.model_name_or_path, model_args.model_revision
        return repr((replace(args, adapter_name_or_path=None), *of_settings, *of_model))

    def parts(self, options: Options) -> list[LoadedPart]:
        """As [`load_parts`] loads them."""
        key, (args, settings, model_args) = self.key(options), options
        if key not in self._read:
            _, tokenizer = load_tokenizer(model_args, settings.trust_remote_code)
            self._read[key] = load_parts(args, tokenizer, settings.dataset_text_field)
        return self._read[key]


def shared_rows(comparison: Comparison, parsed: list[dict[tuple[str, int], Options]], read: RunData) -> dict:
    """
    As an entry of the plan, how many of the held-out rows that are measured on, those of the first arm, are trained on: in another
    stage, or by an arm with other data. Figures on them tell less of what was learned or lost. Streams are not looked at.

    Args:
        parsed (`list`): Options by arm and seed, of each stage.
    """
    first = [next(iter(of_stage.values())) for of_stage in parsed]
    measured = dict(zip([stage.name for stage in comparison.stages] or [_DOMAIN], first, strict=True))
    trained = (measured if comparison.stages else {}) | _other_data(comparison, parsed, first)
    found, field = [], first[0][1].dataset_text_field
    for (one, own), (other, others) in product(measured.items(), trained.items()):
        if one == other:
            continue
        held_out = [part.held_out for part in _at_hand(one, own, read) if not part.replayed]
        train = [part.train for part in _at_hand(other, others, read) if isinstance(part.train, Dataset)]
        # A row may stand in several of the data sets that are trained on.
        rows = sum(min(len(held), sum(data.rows_in_common(held, part, field) for part in train)) for held in held_out)
        if rows:
            of = sum(map(len, held_out))
            found.append({"held_out": one, "trained": other, "rows": rows, "of": of})
            logger.warning(
                "%d of the %d held-out rows of %s are among the training rows of %s: losses on them tell less of what was "
                "learned or forgotten. Take equal rows out of one of the data sets, or give both the same rows and `split_seed`.",
                rows, of, *(f"stage {name!r}" if name in measured and comparison.stages else name for name in (one, other)),
            )  # fmt: skip
    return {"shared_rows": found} if found else {}


def _other_data(
    comparison: Comparison, parsed: list[dict[tuple[str, int], Options]], first: list[Options]
) -> dict[str, Options]:
    """Of each data set that is not the first arm's, which arms train on it, as a report has it, and the options of one of them."""
    found: dict[str, Options] = {}
    for stage, of_stage, own in zip(comparison.by_stage(), parsed, first, strict=True):
        arms: dict[str, list[str]] = {}
        for (arm, _), options in of_stage.items():
            same = arms.setdefault(RunData.key(options), [])
            same.extend([arm] if arm not in same else [])
        for same in (names for key, names in arms.items() if key != RunData.key(own)):
            label = f"arm {same[0]}" if len(same) == 1 else f"arms {', '.join(same)}"
            options = next(options for (arm, _), options in of_stage.items() if arm == same[0])
            found[label + (f", stage {stage.stage.name}" if stage.stage else "")] = options
    return found


def _at_hand(name: str, options: Options, read: RunData) -> list[LoadedPart]:
    """What is trained on, or nothing where it is not there any more, as that of runs that are evaluated alone need not be."""
    try:
        return read.parts(options)
    except (OSError, ValueError) as error:
        logger.warning("Nobody could count the held-out rows that are trained on, as far as %s goes: %s", name, error)
        return []
