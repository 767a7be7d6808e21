"""Several ways to fine-tune on the same data, seeds and steps: train each, evaluate each, collect the figures."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import yaml
from datasets import Dataset
from peft.helpers import rescale_adapter_scale

from . import data
from .evaluation.drift import general_rows
from .evaluation.models import fingerprint, load_base, with_adapter
from .evaluation.suite import Suite, evaluate_model
from .evaluation.tasks import check_tasks, task_manager
from .files import read_json, write_json, write_text
from .provenance import provenance
from .teacher import TEACHER_NAME
from .training import load_data, load_tokenizer, parse, quantization, sources


logger = logging.getLogger(__name__)

DEFAULT_CONFIG = str(files(__package__) / "configs" / "compare_smollm2.yaml")
BASE = "base"
_KEYS = ("output_dir", "training", "arms", "seeds", "evaluation")


@dataclass(frozen=True)
class Arm:
    """
    One way to fine-tune.

    Args:
        name (`str`): Folder and label.
        options (`dict`): Options of `trl-ema train` that differ from the common ones. `learning_rate_scale` multiplies the
            common learning rate.
        interpolate (`str`, *optional*): Train nothing: take this arm's student and scale its adapter.
        scales (`tuple`): Factors of the adapter's update: 0 is the base model, 1 the student.
    """

    name: str
    options: dict
    interpolate: str | None = None
    scales: tuple[float, ...] = ()

    @classmethod
    def from_dict(cls, name: str, options: dict | None) -> "Arm":
        """From an entry of `arms` in the YAML file."""
        options = dict(options or {})
        scales = options.pop("scales", ())
        arm = cls(name, options, options.pop("interpolate", None), tuple(scales if scales else ()))
        if (arm.interpolate is None) == bool(arm.scales):
            raise ValueError(
                f"Arm {name!r} needs `interpolate` and `scales` together: an arm's name and a list of factors."
            )
        if arm.interpolate is not None and arm.options:
            raise ValueError(f"Arm {name!r} interpolates and trains nothing, but has options {sorted(arm.options)}.")
        return arm


@dataclass(frozen=True)
class Comparison:
    """
    The plan of a comparison, read from a YAML file by [`load_comparison`].

    Args:
        output_dir (`str`): One folder below it for each arm and seed.
        training (`dict`): Options of `trl-ema train` common to all arms.
        arms (`dict`): Name to [`Arm`].
        seeds (`tuple`): Each arm is trained once with each.
        suite ([`Suite`]): What is measured.
    """

    output_dir: str
    training: dict
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    suite: Suite

    def folder(self, arm: str, seed: int) -> str:
        """Where an arm's run with this seed lies."""
        return os.path.join(self.output_dir, arm, f"seed_{seed}")

    def options(self, arm: Arm, seed: int) -> dict:
        """Options of `trl-ema train` for one run."""
        options = {**self.training, **arm.options}
        scale = options.pop("learning_rate_scale", None)
        if scale is not None:
            options["learning_rate"] = float(self.training["learning_rate"]) * scale
        run = {
            "seed": seed,
            "output_dir": self.folder(arm.name, seed),
            "measure": False,
            "resume_from_checkpoint": "true",
        }
        return options | run

    def trained(self) -> list[Arm]:
        """The arms that are trained, in order."""
        return [arm for arm in self.arms.values() if arm.interpolate is None]


def load_comparison(path: str, output_dir: str | None = None) -> Comparison:
    """
    The plan in a YAML file, checked as far as it can be before any work.

    Args:
        output_dir (`str`, *optional*): Instead of the file's own.

    Raises:
        ValueError: Unknown keys, an option that `trl-ema train` does not have, an arm that interpolates no trained one.
    """
    with open(path, encoding="utf-8") as file:
        plan = yaml.safe_load(file)
    unknown = sorted(set(plan) - set(_KEYS))
    if unknown:
        raise ValueError(f"{path} has unknown keys {unknown}; expected some of {list(_KEYS)}.")
    arms = {name: Arm.from_dict(name, options) for name, options in plan.get("arms", {}).items()}
    if not arms:
        raise ValueError(f"{path} has no arms. List some under `arms`, such as `sft: {{teacher: none}}`.")
    comparison = Comparison(
        output_dir=output_dir or plan.get("output_dir") or "runs/comparison",
        training=plan.get("training") or {},
        arms=arms,
        seeds=tuple(plan.get("seeds") or (0,)),
        suite=Suite.from_dict(plan.get("evaluation") or {}),
    )
    for arm in arms.values():
        if arm.name == BASE:
            raise ValueError(f"An arm is named {BASE!r}, the name of the model before training. Choose another name.")
        if "learning_rate_scale" in arm.options and "learning_rate" not in comparison.training:
            raise ValueError(f"Arm {arm.name!r} scales the learning rate; give the common one under `training`.")
        if arm.interpolate is not None and arm.interpolate not in [trained.name for trained in comparison.trained()]:
            raise ValueError(f"Arm {arm.name!r} interpolates {arm.interpolate!r}, which is no trained arm of this run.")
    return comparison


def run_comparison(
    comparison: Comparison, arms: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> None:
    """
    Train and evaluate whatever of the comparison is not done yet; each run in a process of its own.

    A run is done when its `metrics.json` is there, and goes on from its newest checkpoint when it was interrupted.

    Args:
        arms, seeds (*optional*): Do only these now; all of the plan by default.
    """
    choices: tuple[tuple[str, Sequence, Sequence], ...] = (
        ("arms", arms or (), list(comparison.arms)),
        ("seeds", seeds or (), comparison.seeds),
    )
    for name, asked, planned in choices:
        unknown = [one for one in asked if one not in planned]
        if unknown:
            raise ValueError(f"The comparison has no {name} {unknown}; expected some of {list(planned)}.")
    parsed = {}
    for arm in comparison.trained():
        for seed in comparison.seeds:
            options = comparison.options(arm, seed)
            path = Path(comparison.folder(arm.name, seed), "config.yaml")
            _check_same_run(path, options)
            write_text(path, yaml.safe_dump(options))
            parsed[arm.name, seed] = parse(["--config", str(path)])
    manager = None
    if comparison.suite.tasks:
        manager = task_manager()
        check_tasks(list(comparison.suite.tasks), manager)
    plan = {
        "training": comparison.training,
        "arms": {arm.name: _as_dict(arm) for arm in comparison.arms.values()},
        "seeds": list(comparison.seeds),
        "evaluation": asdict(comparison.suite),
    }
    first = next(iter(parsed.values()))
    plan |= sources(first[0], first[2]) | {"provenance": provenance()}
    write_json(Path(comparison.output_dir, "plan.json"), plan)
    evaluator = _Evaluator(comparison, first, manager)
    evaluator.base()
    for seed in comparison.seeds if seeds is None else seeds:
        chosen = [arm for arm in comparison.arms.values() if arms is None or arm.name in arms]
        for arm in chosen:
            if arm.interpolate is not None:
                continue
            folder = comparison.folder(arm.name, seed)
            if not os.path.isfile(os.path.join(folder, "metrics.json")):
                logger.info("Training %s, seed %d", arm.name, seed)
                command = [sys.executable, "-m", __package__, "train", "--config", os.path.join(folder, "config.yaml")]
                subprocess.run(command, check=True)
            evaluator.run(arm, seed)
        for arm in chosen:
            if arm.interpolate is not None:
                evaluator.interpolated(arm, seed)


def _as_dict(arm: Arm) -> dict:
    if arm.interpolate is None:
        return arm.options
    return {"interpolate": arm.interpolate, "scales": list(arm.scales)}


def _check_same_run(path: Path, options: dict) -> None:
    """A finished run is not taken for one with other options."""
    if not path.is_file() or not path.with_name("metrics.json").is_file():
        return
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    other = sorted(name for name in {*old, *options} if old.get(name) != options.get(name))
    if other:
        changes = ", ".join(f"{name}: {old.get(name)!r} then, {options.get(name)!r} now" for name in other)
        raise ValueError(
            f"{path.parent} holds a finished run with other options ({changes}). Choose another `output_dir`, or delete "
            "that folder to train it anew."
        )


class _Evaluator:
    """The base model in memory, loaded once, and the held-out rows that every arm is measured on."""

    def __init__(self, comparison: Comparison, parsed, manager):
        args, training_args, model_args = parsed
        self.comparison, self.manager = comparison, manager
        self.name, _ = load_tokenizer(model_args, training_args.trust_remote_code)
        self.precision = repr(quantization(model_args, training_args))
        self.model, self.tokenizer = load_base(
            self.name,
            model_args.model_revision,
            quantization_config=quantization(model_args, training_args),
            dtype=model_args.dtype,
            trust_remote_code=training_args.trust_remote_code,
        )
        args.eval_samples = comparison.suite.domain_samples
        _, self.domain = load_data(args, self.tokenizer, training_args.dataset_text_field)
        general = Dataset.from_list(general_rows())
        self.general = data.as_conversation(general) if self.tokenizer.chat_template else general

    def _measure(self, model, folder: str, adapter: str | None = None, scale: float = 1.0) -> None:
        logger.info("Evaluating %s", folder)
        evaluate_model(
            model,
            self.tokenizer,
            self.comparison.suite,
            folder,
            model_id=fingerprint(self.name, adapter, precision=self.precision, scale=scale),
            manager=self.manager,
            domain=self.domain,
            general=self.general,
        )

    def base(self) -> None:
        self._measure(self.model, os.path.join(self.comparison.output_dir, BASE))

    def run(self, arm: Arm, seed: int) -> None:
        """An arm's student, and its teacher where it has one of its own."""
        folder = self.comparison.folder(arm.name, seed)
        self._adapter(folder, os.path.join(folder, "evaluation", "student"))
        # A frozen teacher is the start, not a result.
        teacher = os.path.join(folder, TEACHER_NAME)
        if os.path.isdir(teacher) and self.comparison.options(arm, seed).get("teacher", "ema") == "ema":
            self._adapter(teacher, os.path.join(folder, "evaluation", "teacher"))

    def interpolated(self, arm: Arm, seed: int) -> None:
        source = self.comparison.folder(str(arm.interpolate), seed)
        if not os.path.isfile(os.path.join(source, "metrics.json")):
            raise ValueError(
                f"Arm {arm.name!r} interpolates {arm.interpolate!r}, whose run in {source} is not done. Run that arm first."
            )
        for scale in arm.scales:
            folder = os.path.join(self.comparison.folder(arm.name, seed), "evaluation", f"scale_{scale:g}")
            self._adapter(source, folder, scale)

    def _adapter(self, adapter: str, folder: str, scale: float = 1.0) -> None:
        model = with_adapter(self.model, adapter)
        try:
            with rescale_adapter_scale(model, scale) if scale != 1.0 else nullcontext():
                self._measure(model, folder, adapter, scale)
        finally:
            self.model = model.unload()


def evaluated_folders(folder: str) -> Iterator[tuple[str, str, int, str]]:
    """`(arm, role, seed, path)` of each evaluation below a comparison's folder; the base is not among them."""
    for path in sorted(Path(folder).glob("*/seed_*/evaluation/*")):
        arm, seed = path.parts[-4], int(path.parts[-3].removeprefix("seed_"))
        yield arm, path.name, seed, str(path)


def read_evaluation(folder: str) -> dict:
    """`text` and `tasks` of one evaluation, as far as they are there."""
    text = Path(folder, "text.json")
    tasks = {path.stem: read_json(path) for path in sorted(Path(folder).glob("*.json")) if path != text}
    return {"text": read_json(text) if text.is_file() else None, "tasks": tasks}
