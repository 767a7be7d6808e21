"""A comparison's plan, carried out: each arm trained with each seed in a process of its own, and evaluated."""

import logging
import os
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from datasets import Dataset
from peft import PeftModel
from peft.helpers import rescale_adapter_scale
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from .. import data
from ..config import MeanTeacherConfig
from ..evaluation.drift import general_rows
from ..evaluation.generation import PACKAGES as GENERATION_PACKAGES
from ..evaluation.models import fingerprint, is_adapter, load_base, vocabulary, with_adapter
from ..evaluation.models import load_tokenizer as load_adapter_tokenizer
from ..evaluation.runner import check_settings
from ..evaluation.settings import Suite
from ..evaluation.suite import HeldOutText, Kept, Reference, evaluate_model
from ..evaluation.tasks import check_tasks, is_offline, task_manager
from ..extras import require
from ..files import write_json, write_text
from ..script import (
    TrainingScriptArguments,
    as_trained_with,
    load_held_out,
    load_tokenizer,
    parse,
    quantization,
    sources,
)
from .plan import BASE, PLAN, Arm, Comparison
from .training import check_jobs, train, train_together


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)

_Options = tuple[TrainingScriptArguments, MeanTeacherConfig, ModelConfig]


def run_comparison(
    comparison: Comparison,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    evaluate_only: bool = False,
    jobs: int = 1,
) -> None:
    """
    Train and evaluate whatever of the comparison is not done yet; each run in a process of its own.

    A run is done when its `metrics.json` is there, and goes on from its newest checkpoint when it was interrupted.

    Args:
        arms, seeds (*optional*): Do only these now; all of the plan by default. A method stands for all of its arms.
        evaluate_only (`bool`): Train nothing: evaluate the runs that are done, such as those that were trained elsewhere.
        jobs (`int`): Trainings at once, one on each GPU; then they are all trained before the first is evaluated.

    Raises:
        ValueError: Something of the plan cannot be done, or not beside what is done already. Nothing was trained then.
    """
    choices: tuple[tuple[str, Sequence, Sequence], ...] = (
        ("arms", arms or (), list(dict.fromkeys([*comparison.arms, *comparison.methods]))),
        ("seeds", seeds or (), comparison.seeds),
    )
    for name, asked, planned in choices:
        unknown = [one for one in asked if one not in planned]
        if unknown:
            raise ValueError(f"The comparison has no {name} {unknown}; expected some of {list(planned)}.")
    check_jobs(comparison, jobs)
    seeds = comparison.seeds if seeds is None else seeds
    chosen = [arm for arm in comparison.arms.values() if arms is None or {arm.name, arm.method} & {*arms}]
    if not evaluate_only:
        for arm, seed in product(chosen, seeds):
            _check_source(comparison, arm, chosen, seed)
    parsed = _parsed(comparison)
    configs = {arm: config for (arm, _), (_, config, _) in parsed.items()}
    comparison = _understood(comparison, configs)
    for arm, seed in product(chosen, seeds):
        _check_weights(comparison, arm, seed)
    _check_same_tokenizer(configs)
    _write_configs(comparison, evaluate_only)
    manager = _checked_tasks(comparison.suite)
    first = next(iter(parsed.values()))
    write_json(Path(comparison.output_dir, PLAN), _plan(comparison, first))
    evaluator = _Evaluator(comparison, first, manager)
    evaluator.base()
    if jobs > 1 and not evaluate_only:
        evaluator.release()
        train_together(comparison, [(arm, seed) for seed in seeds for arm in chosen], jobs)
    for seed in seeds:
        # What interpolates comes after what is trained.
        for arm in sorted(chosen, key=lambda arm: arm.interpolate is not None):
            if not evaluate_only and comparison.is_to_be_trained(arm, seed):
                evaluator.release()
                train(comparison, arm, seed)
            if comparison.is_trained(arm.interpolate or arm.name, seed):
                _evaluate(comparison, arm, seed, evaluator)


def _evaluate(comparison: Comparison, arm: Arm, seed: int, evaluator: "_Evaluator") -> None:
    for adapter, folder, scale in comparison.evaluations(arm, seed).values():
        # A run may be kept with its figures and without its weights.
        if is_adapter(adapter):
            evaluator.adapter(adapter, folder, scale, curve=arm.interpolate is None)


def _understood(comparison: Comparison, configs: dict[str, MeanTeacherConfig]) -> Comparison:
    """The comparison with what its arms' options mean."""
    return replace(
        comparison,
        plain_sft=tuple(arm for arm, config in configs.items() if config.is_plain_sft),
        averaged=tuple(arm for arm, config in configs.items() if config.teacher == "ema"),
    )


def _runs(comparison: Comparison) -> dict[tuple[str, int], dict]:
    """The options of `trl-ema train` by arm and seed."""
    return {
        (arm.name, seed): comparison.options(arm, seed) for arm in comparison.trained() for seed in comparison.seeds
    }


def _parsed(comparison: Comparison) -> dict[tuple[str, int], _Options]:
    """The same as the script understands them; nothing is left behind."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "config.yaml")
        parsed = {}
        for run, options in _runs(comparison).items():
            write_text(path, yaml.safe_dump(options))
            parsed[run] = parse(["--config", str(path)])
            if parsed[run][0].adapter_name_or_path is not None:
                raise ValueError(
                    f"Arm {run[0]!r} goes on from an adapter, and a comparison measures every arm from its base. Leave out "
                    "`adapter_name_or_path`; `trl-ema train` and `trl-ema evaluate --reference_adapter` measure such a run."
                )
    return parsed


def _write_configs(comparison: Comparison, check_only: bool = False) -> None:
    """A YAML file for `trl-ema train` in the folder of each run, once it is known that none has other options there."""
    paths = {run: Path(comparison.folder(*run), "config.yaml") for run in _runs(comparison)}
    for run, options in _runs(comparison).items():
        _check_same_run(paths[run], options)
    if check_only:
        return
    for run, options in _runs(comparison).items():
        write_text(paths[run], yaml.safe_dump(options))


def _check_same_tokenizer(settings: dict[str, MeanTeacherConfig]) -> None:
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


def _checked_tasks(suite: Suite) -> "TaskManager | None":
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


def _plan(comparison: Comparison, first: _Options) -> dict:
    args, _, model_args = first
    return {
        "training": comparison.training,
        "arms": comparison.written,
        "reference": comparison.reference,
        "controls": comparison.controls,
        "plain_sft": comparison.plain_sft,
        "averaged": comparison.averaged,
        "seeds": list(comparison.seeds),
        "launch": comparison.launch,
        "evaluation": asdict(comparison.suite),
        **sources(args, model_args),
    }


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
        missing = comparison.suite.missing_files(folder, curve=arm.interpolate is None)
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

    def __init__(self, comparison: Comparison, options: _Options, manager: "TaskManager | None"):
        args, training_args, model_args = options
        self.comparison, self.manager = comparison, manager
        self.name, self.tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
        self.options: dict[str, Any] = dict(
            revision=model_args.model_revision,
            quantization_config=quantization(model_args, training_args),
            dtype=model_args.dtype,
            trust_remote_code=training_args.trust_remote_code,
            device_map={"": training_args.device},
        )
        if model_args.attn_implementation is not None:
            self.options["attn_implementation"] = model_args.attn_implementation
        held_out = load_held_out(args, self.tokenizer, training_args.dataset_text_field)
        general = data.as_chat(Dataset.from_list(general_rows()), self.tokenizer)
        as_trained_with(self.tokenizer, training_args)
        others = {
            name: data.as_chat(data.load_split(path, text_field=training_args.dataset_text_field), self.tokenizer)
            for name, path in comparison.suite.drift_data.items()
        }
        self.rows: dict[str, Any] = dict(domain=held_out, general=general, others=others, settings=training_args)
        HeldOutText(self.tokenizer, comparison.suite, **self.rows)  # refuses what cannot be measured
        self._model: Any = None
        # What the base computes for these rows, once for all arms.
        self._kept: Kept = {}

    @property
    def model(self) -> PreTrainedModel:
        if self._model is None:
            self._model, _ = load_base(self.name, **self.options)
        return self._model

    def release(self) -> None:
        """Gives a GPU's memory back, to a run in another process."""
        if self._model is not None and self._model.device.type != "cpu":
            self._model = None
            self._kept.clear()  # which holds the head
            torch.cuda.empty_cache()

    def _measure(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        folder: str,
        adapter: str | None = None,
        scale: float = 1.0,
        reference: Reference | None = None,
        **options: Any,
    ) -> None:
        logger.info("Evaluating %s", folder)
        settings: dict[str, Any] = {key: repr(value) for key, value in self.options.items() if key != "device_map"}
        settings["scale"] = scale
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
            reference=reference,
            **options,
            **self.rows,
        )

    def base(self) -> None:
        """The model before training."""
        folder = os.path.join(self.comparison.output_dir, BASE)
        self._measure(self.model, self.tokenizer, folder, kept=self._kept)

    def adapter(self, adapter: str, folder: str, scale: float = 1.0, curve: bool = False) -> None:
        """The base with an adapter, scaled; with `curve` at the suite's other scales too."""
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
        kept = self._kept if start.is_base and vocabulary(base) == tokens else None
        with rescale_adapter_scale(model, scale) if scale != 1.0 else nullcontext():
            self._measure(model, tokenizer, folder, adapter, scale, start.activate, kept=kept, curve=curve)
        # One that took from the base's weights, or put modules of its own in their place, leaves no base for the next.
        own = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
        if start.is_base and not own and vocabulary(base) == tokens:
            self._model = model.unload()
