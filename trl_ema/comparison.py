"""Several ways to fine-tune on the same data, seeds and steps: train each, evaluate each, collect the figures."""

import logging
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from peft.helpers import rescale_adapter_scale
from peft.utils.other import AuxiliaryTrainingWrapper

from . import data
from .adapters.names import TEACHER_NAME
from .evaluation.drift import general_rows
from .evaluation.generation import PACKAGES as GENERATION_PACKAGES
from .evaluation.models import fingerprint, is_adapter, load_base, vocabulary, with_adapter
from .evaluation.models import load_tokenizer as load_adapter_tokenizer
from .evaluation.runner import check_settings
from .evaluation.suite import HeldOutText, Suite, evaluate_model
from .evaluation.tasks import check_tasks, is_offline, task_manager
from .extras import require
from .files import read_json, write_json, write_text
from .training import load_data, load_tokenizer, parse, quantization, sources


logger = logging.getLogger(__name__)

DEFAULT_CONFIG = str(files(__package__) / "configs" / "compare_smollm2.yaml")
BASE = "base"
PLAN = "plan.json"
_KEYS = {"output_dir": str, "training": dict, "arms": dict, "reference": str, "seeds": list, "evaluation": dict}
# Of a run; the comparison sets them.
_RESERVED = ("seed", "output_dir", "measure", "resume_from_checkpoint", "eval_samples")


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
        scales = options.pop("scales", None) or []
        if not isinstance(scales, list) or not all(isinstance(scale, int | float) for scale in scales):
            raise ValueError(f"`scales` of arm {name!r} is {scales!r}; expected a list of factors such as [0.25, 0.5].")
        arm = cls(name, options, options.pop("interpolate", None), tuple(scales))
        if "learning_rate_scale" in arm.options and "learning_rate" in arm.options:
            raise ValueError(f"Arm {name!r} has `learning_rate` and `learning_rate_scale`. Give one of them.")
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
        reference (`str`, *optional*): The arm that the others' gain and forgetting are given as shares of; by default the
            first that is plain SFT.
    """

    output_dir: str
    training: dict
    arms: dict[str, Arm]
    seeds: tuple[int, ...]
    suite: Suite
    reference: str | None = None

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
            # Held out alike for every arm, and for the evaluation.
            "eval_samples": self.suite.domain_samples,
            "measure": False,
            "resume_from_checkpoint": "true",
        }
        return options | run

    def evaluations(self, arm: Arm, seed: int) -> dict[str, tuple[str, str, float]]:
        """
        The ways to use an arm (`"student"`, `"teacher"`, `"scale_0.5"`), and for each the folder of the adapter, the folder of
        its figures and the adapter's scale.
        """
        folder = self.folder(arm.name, seed)
        if arm.interpolate is None:
            ways = {"student": (folder, 1.0)}
            # A frozen teacher is the start, not a result.
            if self.options(arm, seed).get("teacher", "ema") == "ema":
                ways["teacher"] = (os.path.join(folder, TEACHER_NAME), 1.0)
        else:
            ways = {f"scale_{scale:g}": (self.folder(arm.interpolate, seed), scale) for scale in arm.scales}
        return {
            role: (adapter, os.path.join(folder, "evaluation", role), scale) for role, (adapter, scale) in ways.items()
        }

    def is_trained(self, arm: str, seed: int) -> bool:
        """Whether this run is done."""
        return os.path.isfile(os.path.join(self.folder(arm, seed), "metrics.json"))

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
        return _comparison(yaml.safe_load(file) or {}, path, output_dir)


def kept_comparison(folder: str) -> Comparison:
    """
    The plan that [`run_comparison`] wrote into its output folder.

    Raises:
        FileNotFoundError: There is none.
    """
    path = Path(folder, PLAN)
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no comparison: {path} is missing. Run `trl-ema compare` first.")
    plan = {key: value for key, value in read_json(path).items() if key in _KEYS}
    return _comparison(plan, str(path), folder)


def _comparison(plan: dict, path: str, output_dir: str | None) -> Comparison:
    unknown = sorted(set(plan) - set(_KEYS)) if isinstance(plan, dict) else [plan]
    if unknown:
        raise ValueError(f"{path} has unknown keys {unknown}; expected some of {list(_KEYS)}.")
    for key, kind in _KEYS.items():
        if plan.get(key) is not None and not isinstance(plan[key], kind):
            what = {str: "a text", dict: "a mapping `name: value`", list: "a list such as [0, 1, 2]"}[kind]
            raise ValueError(f"`{key}` in {path} is {plan[key]!r}; expected {what}.")
    arms = {name: Arm.from_dict(name, options) for name, options in (plan.get("arms") or {}).items()}
    if not arms:
        raise ValueError(f"{path} has no arms. List some under `arms`, such as `sft: {{teacher: none}}`.")
    comparison = Comparison(
        output_dir=output_dir or plan.get("output_dir") or "runs/comparison",
        training=plan.get("training") or {},
        arms=arms,
        seeds=tuple(plan.get("seeds") or (0,)),
        suite=Suite.from_dict(plan.get("evaluation") or {}),
        reference=plan.get("reference"),
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
    for arm in arms.values():
        if "learning_rate_scale" in arm.options and "learning_rate" not in comparison.training:
            raise ValueError(f"Arm {arm.name!r} scales the learning rate; give the common one under `training`.")
        if arm.interpolate is not None and arm.interpolate not in trained:
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
    seeds = comparison.seeds if seeds is None else seeds
    chosen = [arm for arm in comparison.arms.values() if arms is None or arm.name in arms]
    for arm in chosen:
        for seed in seeds:
            _check_source(comparison, arm, chosen, seed)
            _check_weights(comparison, arm, seed)
    parsed = _write_configs(comparison)
    _check_same_tokenizer({arm: config for (arm, _), (_, config, _) in parsed.items()})
    manager = _checked_tasks(comparison.suite)
    first = next(iter(parsed.values()))
    write_json(Path(comparison.output_dir, PLAN), _plan(comparison, parsed))
    evaluator = _Evaluator(comparison, first, manager)
    evaluator.base()
    for seed in seeds:
        # What interpolates comes after what is trained.
        for arm in sorted(chosen, key=lambda arm: arm.interpolate is not None):
            if arm.interpolate is None and not comparison.is_trained(arm.name, seed):
                logger.info("Training %s, seed %d", arm.name, seed)
                evaluator.release()
                config = os.path.join(comparison.folder(arm.name, seed), "config.yaml")
                subprocess.run([sys.executable, "-m", __package__, "train", "--config", config], check=True)
            for adapter, folder, scale in comparison.evaluations(arm, seed).values():
                # A run may be kept with its figures and without its weights.
                if is_adapter(adapter):
                    evaluator.adapter(adapter, folder, scale)


def _write_configs(comparison: Comparison) -> dict:
    """A YAML file for `trl-ema train` in the folder of each run; returns the parsed options by arm and seed."""
    runs = {
        (arm.name, seed): comparison.options(arm, seed) for arm in comparison.trained() for seed in comparison.seeds
    }
    paths = {run: Path(comparison.folder(*run), "config.yaml") for run in runs}
    for run, options in runs.items():
        _check_same_run(paths[run], options)
    for run, options in runs.items():
        write_text(paths[run], yaml.safe_dump(options))
    return {run: parse(["--config", str(path)]) for run, path in paths.items()}


def _check_same_tokenizer(settings: dict[str, Any]) -> None:
    """Raises `ValueError` unless base and arms can be measured on the same tokens: `settings` are the arms' training options."""
    first = next(iter(settings))
    for arm, options in settings.items():
        for name in ("eos_token", "chat_template_path"):
            ours, theirs = getattr(options, name), getattr(settings[first], name)
            if ours != theirs:
                raise ValueError(
                    f"Arm {arm!r} has `{name}={ours!r}` and arm {first!r} {theirs!r}: their losses would be of different tokens. Give "
                    "all arms the same, under `training`."
                )
    template = settings[first].chat_template_path
    if template is not None and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
        raise ValueError(
            f"`chat_template_path={template!r}` is no .jinja file. Those of another model may bring tokens that the base does not "
            "have, so that it cannot be measured beside the arms. Write that model's chat template into a .jinja file."
        )


def _as_trained_with(tokenizer, settings) -> None:
    """Changes the base's tokenizer as `SFTTrainer` does before it tokenizes."""
    if settings.eos_token is not None:
        if settings.eos_token not in tokenizer.get_vocab():
            raise ValueError(f"`eos_token={settings.eos_token!r}` is no token of the model. Give one that is.")
        tokenizer.eos_token = settings.eos_token
    if settings.chat_template_path is not None:
        tokenizer.chat_template = Path(settings.chat_template_path).read_text(encoding="utf-8")


def _checked_tasks(suite: Suite):
    """lm-eval's task manager, after every task, sample and package is known to be there."""
    if suite.generation_tokens:
        require("eval", *GENERATION_PACKAGES)
    if not suite.tasks:
        return None
    manager = task_manager()
    check_tasks(list(suite.tasks), manager)
    for name, settings in suite.tasks.items():
        check_settings(name, settings, manager)
    return manager


def _plan(comparison: Comparison, parsed) -> dict:
    args, _, model_args = next(iter(parsed.values()))
    return {
        "training": comparison.training,
        "arms": {arm.name: _as_dict(arm) for arm in comparison.arms.values()},
        "reference": comparison.reference,
        # As the options were understood here: a report needs no TRL.
        "plain_sft": list(dict.fromkeys(arm for (arm, _), (_, config, _) in parsed.items() if config.is_plain_sft)),
        "seeds": list(comparison.seeds),
        "evaluation": asdict(comparison.suite),
        **sources(args, model_args),
    }


def _as_dict(arm: Arm) -> dict:
    if arm.interpolate is None:
        return arm.options
    return {"interpolate": arm.interpolate, "scales": list(arm.scales)}


def _check_source(comparison: Comparison, arm: Arm, chosen: Sequence[Arm], seed: int) -> None:
    """Raises `ValueError` if `arm` interpolates a run that is neither done nor to be done before."""
    if arm.interpolate is None or arm.interpolate in [other.name for other in chosen]:
        return
    if not comparison.is_trained(arm.interpolate, seed):
        raise ValueError(
            f"Arm {arm.name!r} interpolates {arm.interpolate!r}, whose run in {comparison.folder(arm.interpolate, seed)} is "
            f"not done. Run that arm first, or both together: `--arms {arm.interpolate} {arm.name}`."
        )


def _check_weights(comparison: Comparison, arm: Arm, seed: int) -> None:
    """Raises `ValueError` if a run that is done has still to be evaluated, and its weights are not there."""
    source = arm.interpolate or arm.name
    for adapter, folder, _ in comparison.evaluations(arm, seed).values():
        missing = comparison.suite.missing_files(folder)
        if comparison.is_trained(source, seed) and not is_adapter(adapter) and missing:
            raise ValueError(
                f"{missing[0]} is to be measured, but the run in {comparison.folder(source, seed)} was kept without its "
                f"weights ({adapter} holds no adapter). Delete its metrics.json to train it again, or leave it out by `--arms` "
                "and `--seeds`."
            )


def _check_same_run(path: Path, options: dict) -> None:
    """Raises `ValueError` if `path` is the config of a run, finished or begun, with other options."""
    finished = path.with_name("metrics.json").is_file()
    if not path.is_file() or not (finished or any(path.parent.glob("checkpoint-*"))):
        return
    old = yaml.safe_load(path.read_text(encoding="utf-8"))
    # The folder may have moved.
    names = sorted({*old, *options} - {"output_dir"})
    other = [name for name in names if old.get(name) != options.get(name)]
    if other:
        changes = ", ".join(f"{name}: {old.get(name)!r} then, {options.get(name)!r} now" for name in other)
        raise ValueError(
            f"{path.parent} holds a {'finished' if finished else 'begun'} run with other options ({changes}). Choose another "
            "`output_dir`, or delete that folder to train it anew."
        )


class _Evaluator:
    """The base model in memory, and the held-out rows that every arm is measured on."""

    def __init__(self, comparison: Comparison, parsed, manager):
        args, training_args, model_args = parsed
        self.comparison, self.manager = comparison, manager
        self.name, self.tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
        self.options = dict(
            revision=model_args.model_revision,
            quantization_config=quantization(model_args, training_args),
            dtype=model_args.dtype,
            trust_remote_code=training_args.trust_remote_code,
            device_map={"": training_args.device},
        )
        _, held_out = load_data(args, self.tokenizer, training_args.dataset_text_field)
        general = Dataset.from_list(general_rows())
        general = data.as_conversation(general) if self.tokenizer.chat_template else general
        _as_trained_with(self.tokenizer, training_args)
        self.rows = dict(domain=held_out, general=general, settings=training_args)
        HeldOutText(self.tokenizer, comparison.suite, **self.rows)  # refuses what cannot be measured
        self._model: Any = None

    @property
    def model(self):
        if self._model is None:
            self._model, _ = load_base(self.name, **self.options)
        return self._model

    def release(self) -> None:
        """Gives a GPU's memory back, to a run in another process."""
        if self._model is not None and self._model.device.type != "cpu":
            self._model = None
            torch.cuda.empty_cache()

    def _measure(
        self, model, tokenizer, folder: str, adapter: str | None = None, scale: float = 1.0, start=None
    ) -> None:
        logger.info("Evaluating %s", folder)
        settings: dict[str, Any] = {key: repr(value) for key, value in self.options.items() if key != "device_map"} | {
            "scale": scale
        }
        settings["commit"] = getattr(model.config, "_commit_hash", None)
        if self.manager is not None:
            settings["offline"] = is_offline(self.manager)
        evaluate_model(
            model,
            tokenizer,
            self.comparison.suite,
            folder,
            model_id=fingerprint(self.name, adapter, **settings),
            manager=self.manager,
            reference=None if start is None else start.activate,
            **self.rows,
        )

    def base(self) -> None:
        self._measure(self.model, self.tokenizer, os.path.join(self.comparison.output_dir, BASE))

    def adapter(self, adapter: str, folder: str, scale: float = 1.0) -> None:
        """The base with an adapter, scaled."""
        tokenizer = load_adapter_tokenizer(
            self.name, adapter, self.options["revision"], self.options["trust_remote_code"]
        )
        base, self._model = self.model, None
        tokens = vocabulary(base)
        model, start = with_adapter(base, adapter, tokenizer)
        if scale != 1.0 and not start.is_base:
            raise ValueError(
                f"The adapter in {adapter} cannot be scaled to {scale:g}: without it the model is not what it was before its "
                "training. Leave its scales out, or train a plain LoRA."
            )
        with rescale_adapter_scale(model, scale) if scale != 1.0 else nullcontext():
            self._measure(model, tokenizer, folder, adapter, scale, start)
        # One that took from the base's weights, or put modules of its own in their place, leaves no base for the next.
        own = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
        if start.is_base and not own and vocabulary(base) == tokens:
            self._model = model.unload()
