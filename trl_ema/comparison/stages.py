"""Several domains in a row: what the stages of a comparison are, read from its plan. Light: a report reads it too."""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any


# Entries of the file that loss and drift are kept in, beside the names of texts; and what lies in the folder of a run.
_TAKEN = ("answered", "domain", "general", "generation", "key", "provenance", "base", "evaluation", "teacher")


@dataclass(frozen=True)
class Stage:
    """
    One of several domains that each arm learns one after the other, going on from its adapter of the stage before.

    Args:
        name (`str`): Folder and label.
        options (`dict`): Options of `trl-ema train` that differ from the common ones: the data above all.
        tasks (`tuple`): Those tasks of the evaluation that ask for its domain.
    """

    name: str
    options: dict
    tasks: tuple[str, ...] = ()

    @property
    def written(self) -> dict:
        """As the YAML file has it."""
        return {"name": self.name, **({"tasks": list(self.tasks)} if self.tasks else {}), **self.options}


def read_stages(entries: list | None, path: str, reserved: Iterable[str], texts: Iterable[str]) -> tuple[Stage, ...]:
    """
    The stages of a plan, in order; none without the key.

    Args:
        entries (`list`, *optional*): `stages` of the YAML file.
        path (`str`): Of that file, for messages.
        reserved: Options that the comparison itself sets.
        texts: Names of the other texts that are measured.

    Raises:
        ValueError: A stage has no name, one that is taken, or an option that is not its own; or there is one stage alone.
    """
    if entries is None:
        return ()
    stages = tuple(_stage(number, entry, path, tuple(reserved)) for number, entry in enumerate(entries, 1))
    names = [stage.name for stage in stages]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"`stages` in {path} has {twice!r} twice; a stage becomes a folder. Rename one of them.")
    taken = next((name for name in names if name in (*_TAKEN, *texts)), None)
    if taken is not None:
        raise ValueError(
            f"`stages` in {path} has a stage named {taken!r}, which is the name of something else in a comparison. Rename it, or the "
            "text of `drift_data` with this name."
        )
    if len(stages) < 2:
        raise ValueError(
            f"`stages` in {path} has {len(stages)}; expected at least two, in the order in which they are learned. Of a single domain "
            "give the options under `training`."
        )
    return stages


def _stage(number: int, entry: Any, path: str, reserved: tuple[str, ...]) -> Stage:
    if not isinstance(entry, dict) or entry.get("name") is None:
        raise ValueError(
            f"Stage {number} in {path} is {entry!r}; expected a `name` and the options that it changes, such as `- {{name: drugs, "
            "dataset_name: drugs.jsonl}`."
        )
    name = str(entry["name"])
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(
            f"A stage in {path} is named {name!r}; it becomes a folder, so use letters, digits, `_`, `-` and `.`."
        )
    tasks = entry.get("tasks") or []
    if not isinstance(tasks, list) or not all(isinstance(task, str) for task in tasks):
        raise ValueError(
            f"`tasks` of stage {name!r} in {path} is {tasks!r}; expected a list of names such as [medmcqa]."
        )
    options = {key: value for key, value in entry.items() if key not in ("name", "tasks")}
    not_own = [key for key in options if key in reserved]
    if not_own:
        raise ValueError(
            f"Stage {name!r} in {path} sets {not_own}, which the comparison itself sets: each stage goes on from the adapter of the one "
            "before, in a folder of its own. Leave them out."
        )
    return Stage(name, options, tuple(tasks))


def check_tasks_of_stages(stages: Sequence[Stage], asked: Collection[str]) -> None:
    """
    Raises `ValueError` if a stage names tasks that are not asked, or has none while others have some.

    Args:
        asked: Names of the tasks that are measured.
    """
    having = [stage for stage in stages if stage.tasks]
    for stage in stages if having else ():
        if not stage.tasks:
            raise ValueError(
                f"Stage {stage.name!r} has no `tasks`, and {having[0].name!r} has some: transfer in accuracy needs those of every stage. "
                "Give each some, or none."
            )
        strange = [task for task in stage.tasks if task not in asked]
        if strange:
            raise ValueError(
                f"Stage {stage.name!r} has `tasks` {strange}, which are not measured; expected some of {list(asked)}, the tasks under "
                "`evaluation`."
            )


def check_options_once(stages: Iterable[Stage], arms: dict[str, dict]) -> None:
    """
    Raises `ValueError` if a stage and an arm both set an option, so that nobody knows which counts.

    Args:
        arms (`dict`): By name, the options of the arms.
    """
    for stage in stages:
        if "learning_rate_scale" in stage.options:
            raise ValueError(
                f"Stage {stage.name!r} has `learning_rate_scale`, which is an arm's. Give the stage its `learning_rate`."
            )
        for arm, options in arms.items():
            both = [key for key in stage.options if key in options]
            if both:
                raise ValueError(
                    f"Stage {stage.name!r} and arm {arm!r} both set {both}. Give each option in one of them, or under `training`."
                )
