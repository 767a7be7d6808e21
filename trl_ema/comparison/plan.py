"""The plan of a comparison: which arms, with which seeds, measured how. Light: a report reads it too."""

import logging
import os
import re
from dataclasses import dataclass, replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

from ..evaluation.settings import Suite
from ..files import read_json, read_yaml
from .stages import Stage, check_options_once, check_tasks_of_stages, read_stages


logger = logging.getLogger(__name__)

DEFAULT_CONFIG = str(files("trl_ema") / "configs" / "compare_smollm2.yaml")
BASE = "base"
PLAN = "plan.json"
# `TEACHER_NAME`, whose module loads PEFT.
_TEACHER = "teacher"
_KEYS = {
    "output_dir": str,
    "training": dict,
    "arms": dict,
    "reference": str,
    "controls": list,
    "stages": list,
    "seeds": list,
    "evaluation": dict,
    "launch": dict,
}
# Held-out rows that a map needs at least: settings are chosen on one half of them and measured on the other.
LEAST_ROWS = 4
# Scales of an adapter between 0 and 1: with fewer, lines between them lie far below its curve.
LEAST_SCALES = 3
# Of a run; the comparison sets them.
_RESERVED = ("seed", "output_dir", "measure", "resume_from_checkpoint", "eval_samples")
# Of a stage: it goes on from an adapter, whose model all stages share.
_RESERVED_OF_STAGES = (*_RESERVED, "adapter_name_or_path", "model_name_or_path")


@dataclass(frozen=True)
class Arm:
    """
    One way to fine-tune.

    Args:
        name (`str`): Folder and label.
        options (`dict`): Options of `trl-ema train` that differ from the common ones. `learning_rate_scale` multiplies the
            common learning rate.
        method (`str`): What it is a setting of: the arms of a `grid` are settings of one method. Its own name by default.
        script (`str`, *optional*): Path of the training script that is run instead of `trl-ema train`. It takes the same options with
            `--config`, and those of its own that its `--help` lists.
        interpolate (`str`, *optional*): Train nothing: take this arm's student and scale its adapter.
        scales (`tuple`): Factors of the adapter's update: 0 is the base model, 1 the student.
    """

    name: str
    options: dict
    method: str
    script: str | None = None
    interpolate: str | None = None
    scales: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, name: str, options: dict | None) -> "Arm":
        """From an entry of `arms` in the YAML file."""
        if not re.fullmatch(r"[\w.-]+", str(name)) or name == BASE:
            raise ValueError(
                f"An arm is named {name!r}; it becomes a folder, so use letters, digits, `_`, `-` and `.`, and not {BASE!r}, the "
                "model before training."
            )
        if not isinstance(options, dict | None):
            raise ValueError(f"Arm {name!r} is {options!r}; expected options such as `{{teacher: none}}`.")
        options = dict(options or {})
        reserved = [key for key in _RESERVED if key in options]
        if reserved:
            raise ValueError(f"Arm {name!r} sets {reserved}, which the comparison itself sets. Leave them out.")
        method = options.pop("method", name)
        if not isinstance(method, str):
            raise ValueError(f"`method` of arm {name!r} is {method!r}; expected the name of what it is a setting of.")
        script = options.pop("script", None)
        if not isinstance(script, str | None):
            raise ValueError(
                f"`script` of arm {name!r} is {script!r}; expected a path, such as `script: recipes/subspaces.py`."
            )
        scales = options.pop("scales", None) or []
        if not isinstance(scales, list) or not all(isinstance(scale, int | float) for scale in scales):
            raise ValueError(f"`scales` of arm {name!r} is {scales!r}; expected a list of factors such as [0.25, 0.5].")
        arm = cls(name, options, method, script, options.pop("interpolate", None), tuple(scales))
        if "learning_rate_scale" in arm.options and "learning_rate" in arm.options:
            raise ValueError(f"Arm {name!r} has `learning_rate` and `learning_rate_scale`. Give one of them.")
        if (arm.interpolate is None) == bool(arm.scales):
            raise ValueError(
                f"Arm {name!r} needs `interpolate` and `scales` together: an arm's name and a list of factors."
            )
        given = sorted(arm.options) + ([] if script is None else ["script"])
        if arm.interpolate is not None and given:
            raise ValueError(f"Arm {name!r} interpolates and trains nothing, but has options {given}.")
        return arm


def expanded_arms(arms: dict[str, Any]) -> dict[str, Any]:
    """
    The arms of a plan by name: each with a `grid: {option: [values]}` becomes one for each combination of its values, named
    ARM-V1-V2 in the order of the grid's keys, and of the method ARM.

    Raises:
        ValueError: A grid is none, or two arms have one name.
    """
    found: dict[str, Any] = {}
    for name, options in arms.items():
        for one, combined in _combinations(name, options):
            if one in found:
                raise ValueError(f"Two arms are named {one!r}; an arm becomes a folder. Rename one of them.")
            found[one] = combined
    return found


def _combinations(name: str, options: Any) -> list[tuple[str, Any]]:
    if not isinstance(options, dict) or "grid" not in options:
        return [(name, options)]
    grid, common = options["grid"], {key: value for key, value in options.items() if key != "grid"}
    if (
        not isinstance(grid, dict)
        or not grid
        or not all(isinstance(values, list) and values for values in grid.values())
    ):
        raise ValueError(
            f"`grid` of arm {name!r} is {grid!r}; expected lists of values by option, such as `{{learning_rate_scale: [1, 2]}}`."
        )
    twice = sorted(set(grid) & set(common))
    if twice:
        raise ValueError(f"Arm {name!r} has {twice} beside its `grid` and in it. Give each option in one place.")
    return [
        ("-".join([name, *map(_shown, values)]), {"method": name} | common | dict(zip(grid, values, strict=True)))
        for values in product(*grid.values())
    ]


def _shown(value: Any) -> str:
    """A value as the name of an arm has it."""
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


@dataclass(frozen=True)
class Comparison:
    """
    The plan of a comparison, read from a YAML file by [`load_comparison`].

    Args:
        output_dir (`str`): One folder below it for each arm and seed.
        training (`dict`): Options of `trl-ema train` common to all arms.
        arms (`dict`): Name to [`Arm`].
        written (`dict`): `arms` as the file has them, with their grids.
        seeds (`tuple`): Each arm is trained once with each.
        suite ([`Suite`]): What is measured.
        reference (`str`, *optional*): The arm that the others' gain, drift and forgetting are given as shares of; by default the
            one that drifts least of those that are plain SFT and whose gain is not clearly below the largest.
        controls (`tuple`, *optional*): Methods that each other method's front is compared with; by default those that are plain
            SFT.
        plain_sft (`tuple`, *optional*): The arms that are plain SFT, as [`run_comparison`] understood their options. A report,
            which knows no TRL, reads it from the kept plan; a plan that was not run does not know.
        averaged (`tuple`, *optional*): The arms whose teacher is an average of the student, likewise.
        launch (`dict`, *optional*): How accelerate launches each training: `accelerate_config`, as `trl-ema train` takes it, and
            options of the launcher such as `num_processes`.
        stages (`tuple`): Each [`Stage`] that every arm learns one after the other; none where there is one domain.
        at (`int`): Which of the stages folders, options and evaluations are of; the last, unless it comes from [`by_stage`].
    """

    output_dir: str
    training: dict
    arms: dict[str, Arm]
    written: dict
    seeds: tuple[int, ...]
    suite: Suite
    reference: str | None = None
    controls: tuple[str, ...] | None = None
    plain_sft: tuple[str, ...] | None = None
    averaged: tuple[str, ...] | None = None
    launch: dict | None = None
    stages: tuple[Stage, ...] = ()
    at: int = 0

    @property
    def stage(self) -> Stage | None:
        """Which of the stages this is; `None` where there is one domain."""
        return self.stages[self.at] if self.stages else None

    def by_stage(self) -> list["Comparison"]:
        """This comparison as of each stage, in order; where there is one domain, as it is."""
        return [replace(self, at=at) for at in range(len(self.stages))] or [self]

    @property
    def earlier(self) -> "Comparison | None":
        """As of the stage before, which this one goes on from."""
        return replace(self, at=self.at - 1) if self.at else None

    @property
    def is_last(self) -> bool:
        """Whether no stage comes after this one."""
        return self.at + 1 >= len(self.stages)

    @property
    def domains(self) -> dict[str, str]:
        """What the held-out text of each stage is called among an evaluation's texts; that of the last one is the domain."""
        return {s.name: s.name for s in self.stages[:-1]} | {s.name: "domain" for s in self.stages[-1:]}

    def run_name(self, arm: str, seed: int) -> str:
        """A run in words."""
        return f"{arm}, seed {seed}" + (f", stage {self.stage.name}" if self.stage else "")

    def folder(self, arm: str, seed: int) -> str:
        """Where an arm's run with this seed lies."""
        return os.path.join(self.output_dir, arm, f"seed_{seed}", *([self.stage.name] if self.stage else []))

    def options(self, arm: Arm, seed: int) -> dict:
        """Options of `trl-ema train` for one run."""
        options = {**self.training, **arm.options, **(self.stage.options if self.stage else {})}
        scale = options.pop("learning_rate_scale", None)
        if scale is not None:
            options["learning_rate"] = float(options["learning_rate"]) * scale
        run = {
            "seed": seed,
            "output_dir": self.folder(arm.name, seed),
            # Held out alike for every arm, and for the evaluation.
            "eval_samples": self.suite.domain_samples,
            "measure": False,
            "resume_from_checkpoint": "true",
        }
        if self.earlier is not None:
            run["adapter_name_or_path"] = self.earlier.folder(arm.name, seed)
        return self.tracking(arm, seed) | options | run

    @property
    def trackers(self) -> list[str]:
        """Those that the runs log to."""
        asked = self.training.get("report_to") or ()
        return [name for name in ([asked] if isinstance(asked, str) else asked) if name != "none"]

    @property
    def project(self) -> str:
        """What the trackers call the comparison."""
        return self.training.get("project") or os.path.basename(os.path.abspath(self.output_dir))

    def tracking(self, arm: Arm, seed: int) -> dict[str, str]:
        """What the trackers call a run, if there are any."""
        name = f"{arm.name}-seed_{seed}" + (f"-{self.stage.name}" if self.stage else "")
        return {"run_name": name, "project": self.project} if self.trackers else {}

    def evaluations(self, arm: Arm, seed: int) -> dict[str, tuple[str, str, float]]:
        """
        The ways to use an arm (`"student"`, `"teacher"`, `"scale_0.5"`), and for each the folder of the adapter, the folder of
        its figures and the adapter's scale.
        """
        folder = self.folder(arm.name, seed)
        if arm.interpolate is None:
            ways = {"student": (folder, 1.0)}
            if self.averaged is None:
                raise ValueError(
                    "A plan that was not run does not know which arms have a teacher to evaluate. Run it with `run_comparison`, and "
                    "read it back with `kept_comparison`."
                )
            # A frozen teacher is the start, not a result.
            if arm.name in self.averaged:
                ways["teacher"] = (os.path.join(folder, _TEACHER), 1.0)
        else:
            ways = {f"scale_{scale:g}": (self.folder(arm.interpolate, seed), scale) for scale in arm.scales}
        return {
            role: (adapter, os.path.join(folder, "evaluation", role), scale) for role, (adapter, scale) in ways.items()
        }

    @property
    def methods(self) -> list[str]:
        """In order."""
        return list(dict.fromkeys(arm.method for arm in self.arms.values()))

    def is_trained(self, arm: str, seed: int) -> bool:
        """Whether this run is done."""
        return os.path.isfile(os.path.join(self.folder(arm, seed), "metrics.json"))

    def is_to_be_trained(self, arm: Arm, seed: int) -> bool:
        """Whether this is a run, and not done yet; of a stage, whether the one before is."""
        can_begin = self.earlier is None or self.earlier.is_trained(arm.name, seed)
        return arm.interpolate is None and can_begin and not self.is_trained(arm.name, seed)

    def is_traced(self, arm: Arm) -> bool:
        """Whether loss and drift of its adapters are measured at the suite's other scales too."""
        return arm.interpolate is None and self.is_last

    def trained(self) -> list[Arm]:
        """The arms that are trained, in order."""
        return [arm for arm in self.arms.values() if arm.interpolate is None]


def load_comparison(path: str, output_dir: str | None = None) -> Comparison:
    """
    The plan in a YAML file, checked as far as it can be before any work.

    Args:
        output_dir (`str`, *optional*): Instead of the file's own.

    Raises:
        ValueError: No YAML, unknown keys, an option that `trl-ema train` does not have, an arm that interpolates no trained one.
    """
    comparison = _comparison(read_yaml(path) or {}, path, output_dir)
    _check_map(comparison, path)
    return comparison


def _check_map(comparison: Comparison, path: str) -> None:
    """Where methods have several settings a map is wanted: whether what is to be measured is enough for one."""
    suite = comparison.suite
    if len(comparison.methods) == len(comparison.arms):
        return
    if suite.domain_samples < LEAST_ROWS:
        raise ValueError(
            f"`domain_samples` under `evaluation` in {path} is {suite.domain_samples}; a map of methods with several settings needs "
            f"at least {LEAST_ROWS}, to choose settings on one half of the rows and measure them on the other. Give some hundred."
        )
    between = [scale for scale in suite.scales if scale < 1]
    if len(between) < LEAST_SCALES:
        logger.warning(
            "Methods have several settings, but adapters are to be measured at %d scales between 0 and 1: the map will show the "
            "settings, and no hypervolume nor other figure of a front. Give at least %d under `evaluation`, such as `scales: [0.25, "
            "0.5, 0.75]`.",
            len(between),
            LEAST_SCALES,
        )


def kept_comparison(folder: str) -> Comparison:
    """
    The plan that [`run_comparison`] wrote into its output folder.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It was written by an earlier version.
    """
    path = Path(folder, PLAN)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no comparison: {path} is missing. Run `trl-ema compare` first.")
    plan = read_json(path)
    comparison = _comparison({key: value for key, value in plan.items() if key in _KEYS}, str(path), folder)
    for name, what in (("plain_sft", "are plain SFT"), ("averaged", "have a teacher that is an average")):
        if name not in plan:
            raise ValueError(
                f"{path} does not say which arms {what} (`{name}`): it was written by an earlier trl_ema. Run `trl-ema "
                "compare` once more with the same configuration, which does nothing that is done again, or add the list of names."
            )
    return replace(comparison, plain_sft=tuple(plan["plain_sft"]), averaged=tuple(plan["averaged"]))


def _comparison(plan: dict, path: str, output_dir: str | None) -> Comparison:
    unknown = sorted(set(plan) - set(_KEYS)) if isinstance(plan, dict) else [plan]
    if unknown:
        raise ValueError(f"{path} has unknown keys {unknown}; expected some of {list(_KEYS)}.")
    for key, kind in _KEYS.items():
        if plan.get(key) is not None and not isinstance(plan[key], kind):
            what = {str: "a text", dict: "a mapping `name: value`", list: "a list such as [0, 1, 2]"}[kind]
            raise ValueError(f"`{key}` in {path} is {plan[key]!r}; expected {what}.")
    written = plan.get("arms") or {}
    arms = {name: Arm.from_dict(name, options) for name, options in expanded_arms(written).items()}
    if not arms:
        raise ValueError(f"{path} has no arms. List some under `arms`, such as `sft: {{teacher: none}}`.")
    suite = Suite.from_dict(plan.get("evaluation") or {})
    stages = read_stages(plan.get("stages"), path, _RESERVED_OF_STAGES, suite.drift_data)
    check_options_once(stages, {arm.name: arm.options for arm in arms.values()})
    if suite.suite is None:  # whose tasks are known when it is run
        check_tasks_of_stages(stages, suite.tasks)
    comparison = Comparison(
        output_dir=output_dir or plan.get("output_dir") or "runs/comparison",
        training=plan.get("training") or {},
        arms=arms,
        written=written,
        seeds=tuple(plan.get("seeds") or (0,)),
        suite=suite,
        reference=plan.get("reference"),
        controls=None if plan.get("controls") is None else tuple(plan["controls"]),
        launch=plan.get("launch"),
        stages=stages,
        at=max(0, len(stages) - 1),
    )
    if comparison.launch is not None and not comparison.launch.get("accelerate_config"):
        raise ValueError(
            f"`launch` in {path} has no `accelerate_config`. Give the name of a packaged one, or a file, and what else the launcher "
            "takes: `launch: {accelerate_config: multi_gpu, num_processes: 4}`."
        )
    scripts = [arm.name for arm in arms.values() if arm.script is not None]
    for name, there in (("launch", comparison.launch), ("stages", comparison.stages)):
        if there and scripts:
            raise ValueError(
                f"`{name}` in {path} is of `trl-ema train`, and the arms {scripts} have a `script` of their own. Leave out `{name}`, or "
                "these arms."
            )
    reserved = [key for key in _RESERVED if key in comparison.training]
    if reserved:
        raise ValueError(
            f"`training` in {path} sets {reserved}, which the comparison itself sets: `seeds`, `output_dir`, and "
            "`domain_samples` under `evaluation`. Leave them out."
        )
    trained = [arm.name for arm in comparison.trained()]
    if comparison.reference is not None and comparison.reference not in trained:
        raise ValueError(
            f"`reference` in {path} is {comparison.reference!r}; expected an arm that is trained: one of {trained}."
        )
    strange = [name for name in comparison.controls or () if name not in comparison.methods]
    if strange:
        raise ValueError(f"`controls` in {path} names {strange}; expected some of the methods {comparison.methods}.")
    for arm in arms.values():
        if "learning_rate_scale" in arm.options and "learning_rate" not in comparison.training:
            raise ValueError(f"Arm {arm.name!r} scales the learning rate; give the common one under `training`.")
        if arm.interpolate is not None and arm.interpolate not in trained:
            raise ValueError(f"Arm {arm.name!r} interpolates {arm.interpolate!r}, which is no trained arm of this run.")
    return comparison
