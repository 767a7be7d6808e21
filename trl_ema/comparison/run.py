"""A comparison's plan, carried out: each arm trained with each seed in a process of its own, and evaluated."""

import logging
import os
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
from functools import cache
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
from ..adapters.fitness import unscalable_by
from ..config import MeanTeacherConfig
from ..evaluation.drift import adapter_configs, general_rows
from ..evaluation.generation import PACKAGES as GENERATION_PACKAGES
from ..evaluation.models import (
    adapter_fingerprint,
    fingerprint,
    load_base,
    missing_of_adapter,
    vocabulary,
    with_adapter,
)
from ..evaluation.models import load_tokenizer as load_adapter_tokenizer
from ..evaluation.runner import check_settings, tasks_to_ask
from ..evaluation.settings import Suite, TaskSettings
from ..evaluation.suite import HeldOutText, Kept, Reference, evaluate_model
from ..evaluation.tasks import DOMAIN_TASKS, asked_as_chats, check_tasks, is_offline, suite_tasks, task_manager
from ..extras import require
from ..files import read_json, write_json, write_text
from ..inputs import as_trained_with, load_held_out, load_tokenizer, lora, quantization
from ..launch import checks_of_launch
from ..preflight import check_training
from ..processes import Launch
from ..regularizers.own_texts import may_be_at_hand
from ..script import data_of, option_names, parse, sources
from .plan import BASE, PLAN, Arm, Comparison
from .rows import Options, RunData, check_same, check_same_split, shared_rows
from .stages import check_tasks_of_stages
from .training import START, check_jobs, is_begun, options_of_script, train, train_together


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

logger = logging.getLogger(__name__)


def run_comparison(
    comparison: Comparison,
    arms: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    evaluate_only: bool = False,
    jobs: int = 1,
    stages: Sequence[str] | None = None,
) -> None:
    """
    Train and evaluate whatever of the comparison is not done yet; each run in a process of its own.

    A run is done when its `metrics.json` is there, and goes on from its newest checkpoint when it was interrupted. Where there are
    stages, each of them is a run, which begins with the adapter of the one before.

    Args:
        arms, seeds (*optional*): Do only these now; all of the plan by default. A method stands for all of its arms.
        evaluate_only (`bool`): Train nothing: evaluate the runs that are done, such as those that were trained elsewhere.
        jobs (`int`): Trainings at once, one on each GPU; then they are all trained before the first is evaluated.
        stages (*optional*): Do only these now.

    Raises:
        ValueError: Something of the plan cannot be done, or not beside what is done already. Nothing was trained then.
    """
    choices: tuple[tuple[str, Sequence, Sequence], ...] = (
        ("arms", arms or (), list(dict.fromkeys([*comparison.arms, *comparison.methods]))),
        ("seeds", seeds or (), comparison.seeds),
        ("stages", stages or (), [stage.name for stage in comparison.stages]),
    )
    for name, asked, planned in choices:
        unknown = [one for one in asked if one not in planned]
        if unknown:
            raise ValueError(f"The comparison has no {name} {unknown}; expected some of {list(planned)}.")
    launch = None if evaluate_only else check_jobs(comparison, jobs)
    seeds = comparison.seeds if seeds is None else seeds
    chosen = [arm for arm in comparison.arms.values() if arms is None or {arm.name, arm.method} & {*arms}]
    parsed = _parsed(comparison)
    comparison = _understood(comparison, parsed)
    first = [next(iter(of_stage.values())) for of_stage in parsed]
    suite, manager = _checked_tasks(comparison.suite, first[0])
    check_tasks_of_stages(comparison.stages, suite.tasks)
    comparison = replace(comparison, suite=suite)
    now = [one for one in comparison.by_stage() if stages is None or (one.stage and one.stage.name in stages)]
    for arm in chosen:
        _check_scalable(comparison, arm, parsed[-1])
    for arm, seed in product(chosen, seeds):
        _check_run(comparison, arm, seed, now, chosen, evaluate_only)
    todo = [
        (stage, arm, seed)
        for stage, arm, seed in product(now, chosen, seeds)
        if arm.interpolate is None and not stage.is_trained(arm.name, seed)
    ]
    if launch is not None:
        for stage, arm, seed in todo:
            _check_launch(stage, arm.name, seed, launch, parsed[stage.at][arm.name, seed])
    _check_same_tokenizer({arm: config for (arm, _), (_, config, _) in parsed[0].items()})
    _check_same_model({arm: model_args for (arm, _), (_, _, model_args) in parsed[0].items()})
    check_same_split(parsed[0])
    _write(comparison, parsed, [] if evaluate_only else todo, evaluate_only)
    evaluator = _Evaluator(comparison, first, manager)
    evaluator.base()
    if jobs > 1 and not evaluate_only:
        evaluator.release()
        train_together(comparison, [(arm, seed) for seed in seeds for arm in chosen], jobs, now)
    for seed in seeds:
        # What interpolates comes after what is trained.
        for arm, stage in product(sorted(chosen, key=lambda arm: arm.interpolate is not None), now):
            if not evaluate_only and stage.is_to_be_trained(arm, seed):
                evaluator.release()
                train(stage, arm, seed)
            if stage.is_trained(arm.interpolate or arm.name, seed):
                _evaluate(stage, arm, seed, evaluator)


def _evaluate(stage: Comparison, arm: Arm, seed: int, evaluator: "_Evaluator") -> None:
    for adapter, folder, scale in stage.evaluations(arm, seed).values():
        # A run may be kept with its figures and without its weights.
        if missing_of_adapter(adapter) is None:
            evaluator.adapter(adapter, folder, scale, curve=stage.is_traced(arm))


def _understood(comparison: Comparison, parsed: list[dict[tuple[str, int], Options]]) -> Comparison:
    """The comparison with what its arms' options mean, in every stage."""
    configs: dict[str, list[MeanTeacherConfig]] = {arm.name: [] for arm in comparison.trained()}
    for of_stage in parsed:
        for (arm, _), (_, config, _) in of_stage.items():
            configs[arm].append(config)
    return replace(
        comparison,
        plain_sft=tuple(
            arm
            for arm, found in configs.items()
            if comparison.arms[arm].script is None and all(config.is_plain_sft for config in found)
        ),
        averaged=tuple(arm for arm, found in configs.items() if all(config.teacher == "ema" for config in found)),
    )


def _parsed(comparison: Comparison) -> list[dict[tuple[str, int], Options]]:
    """The options of `trl-ema train` by arm and seed, as the script understands them, of each stage."""
    _check_options_of_stages(comparison)
    return [
        {(arm.name, seed): _understand(stage, arm, seed) for arm, seed in product(stage.trained(), stage.seeds)}
        for stage in comparison.by_stage()
    ]


def _understand(stage: Comparison, arm: Arm, seed: int) -> Options:
    """The options of one run, as the script understands them; nothing is left behind."""
    run = stage.run_name(arm.name, seed)
    try:
        with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
            if arm.script is not None:  # which says itself what it ignores
                warnings.simplefilter("ignore", UserWarning)
            path = Path(scratch, "config.yaml")
            write_text(path, yaml.safe_dump(_options_of_training(stage, arm, seed)))
            found = parse(["--config", str(path)])
    except ValueError as error:
        if stage.stage is None:
            raise
        raise ValueError(f"The options of {run}, cannot be: {error}") from error
    if stage.earlier is None and found[0].adapter_name_or_path is not None:
        raise ValueError(
            f"Arm {arm.name!r} goes on from an adapter, and a comparison measures every arm from its base. Leave out "
            "`adapter_name_or_path`; `trl-ema train` and `trl-ema evaluate --reference_adapter` measure such a run."
        )
    if stage.earlier is not None and found[1].rehearsal_texts is not None:
        raise ValueError(
            f"{run}, has `rehearsal_texts={found[1].rehearsal_texts!r}`, texts of one model, and each stage begins with another. Leave "
            "it out, so that each writes its own, or give `rehearsal_dataset`."
        )
    return found  # type: ignore[return-value]


def _options_of_training(stage: Comparison, arm: Arm, seed: int) -> dict:
    """The options of one run without those that only the arm's own script takes."""
    options = stage.options(arm, seed)
    if arm.script is None:
        return options
    own = options_of_script(arm.script) - option_names()
    return {name: value for name, value in options.items() if name not in own}


# Beside TRL's `ModelConfig`: what all stages share.
_OF_THE_MODEL = ("teacher", "eos_token", "pad_token", "chat_template_path", "model_init_kwargs")


def _check_options_of_stages(comparison: Comparison) -> None:
    """Raises `ValueError` if a stage changes the model, its adapter or the method, and not what is learned."""
    names = {*_OF_THE_MODEL, *(f.name for f in fields(ModelConfig))}
    for stage in comparison.stages:
        not_own = [name for name in stage.options if name in names]
        if not_own:
            raise ValueError(
                f"Stage {stage.name!r} sets {not_own}: model, adapter and method stay the same over all stages. Give them under "
                "`training` or in the arms."
            )


def _write(
    comparison: Comparison,
    parsed: list[dict[tuple[str, int], Options]],
    todo: Sequence[tuple[Comparison, Arm, int]],
    evaluate_only: bool,
) -> None:
    """
    The plan, and a YAML file for `trl-ema train` in the folder of each run, once it is known that none has other options there, and that
    those which are still to be trained can be.
    """
    configs = {
        Path(stage.folder(arm.name, seed), "config.yaml"): (arm.script, stage.options(arm, seed))
        for stage in comparison.by_stage()
        for arm, seed in product(stage.trained(), stage.seeds)
    }
    for path, (script, options) in configs.items():
        _check_same_run(path, script, options)
    read = RunData()
    _check_trainings(todo, read)
    if not evaluate_only:
        for path, (script, options) in configs.items():
            write_text(path, ("" if script is None else f"{_SCRIPT}{script}\n") + yaml.safe_dump(options))
    first = [next(iter(of_stage.values())) for of_stage in parsed]
    write_json(Path(comparison.output_dir, PLAN), _plan(comparison, first) | shared_rows(comparison, parsed, read))


def _check_trainings(todo: Sequence[tuple[Comparison, Arm, int]], read: RunData) -> None:
    """
    Raises `ValueError` if a run would refuse its data, tasks or options, as `trl-ema check` finds it. Seeds change none of that: of an
    arm one is looked at.
    """
    ask = cache(tasks_to_ask)  # reading all of lm-eval's tasks takes many seconds
    seeds: dict[tuple[int, str], int] = {}
    for stage, arm, seed in todo:
        if seeds.setdefault((stage.at, arm.name), seed) != seed:
            continue
        run = stage.run_name(arm.name, seed)
        logger.info("Checking %s", run)
        # Anew: a trainer changes its settings, which say what the next one made in this process computes in.
        args, settings, model_args = _understand(stage, arm, seed)
        # A script of its own may have other uses for them.
        if arm.script is None and (idle := [name for name in settings.ignored if name in arm.options]):
            raise ValueError(
                f"{run}, would not be what its name says: {', '.join(f'`{name}={arm.options[name]!r}`' for name in idle)} does nothing "
                "beside its other options. Give what turns it on, such as a weight, or leave it out."
            )
        # The adapter of the stage before may be still to be trained. A new one is refused for the same reasons.
        options = replace(args, adapter_name_or_path=None), settings, model_args
        try:
            if args.eval_tasks:
                ask(tuple(args.eval_tasks), tuple(args.eval_tasks_include_path or ()))
            check_training(*options, read.parts(options))
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            raise ValueError(f"{run}, cannot be trained: {error}") from error


def _check_same_model(settings: dict[str, ModelConfig]) -> None:
    """Raises `ValueError` unless all arms begin with one base, which is measured once and carries each adapter."""
    names = (
        "model_name_or_path",
        "model_revision",
        "load_in_4bit",
        "load_in_8bit",
        "bnb_4bit_quant_type",
        "use_bnb_nested_quant",
    )
    check_same(settings, names, "its adapter would be measured on a base that it was not trained on")


def _check_same_tokenizer(settings: dict[str, MeanTeacherConfig]) -> None:
    """Raises `ValueError` unless base and arms can be measured on the same tokens: `settings` are the arms' training options."""
    check_same(settings, ("eos_token", "chat_template_path"), "their losses would be of different tokens")
    template = next(iter(settings.values())).chat_template_path
    if template is not None and not (os.path.isfile(template) and template.endswith((".jinja", ".j2"))):
        raise ValueError(
            f"`chat_template_path={template!r}` is no .jinja file. Those of another model may bring tokens that the base does not "
            "have, so that it cannot be measured beside the arms. Write that model's chat template into a .jinja file."
        )


def _checked_tasks(suite: Suite, options: Options) -> "tuple[Suite, TaskManager | None]":
    """
    The suite with the tasks of the one that it names, and lm-eval's task manager, after every task, sample and package is known to
    be there.
    """
    if suite.generation_tokens:
        require("eval", *GENERATION_PACKAGES)
    if not suite.tasks and suite.suite is None:
        return suite, None
    manager = task_manager(suite.offline, suite.include_path)
    if suite.suite is not None:
        suite = _with_suite(suite, suite.suite, options, manager)
    check_tasks(list(suite.tasks), manager)
    for name, settings in suite.tasks.items():
        check_settings(name, settings, manager)
    return suite, manager


def _with_suite(suite: Suite, name: str, options: Options, manager: "TaskManager") -> Suite:
    """With the tasks of the named one that are not there by themselves."""
    names, absent = suite_tasks(name, manager)
    if absent:
        logger.warning("Not asked of the suite `%s`, for want of a hub: %s.", name, ", ".join(absent))
    _, training_args, model_args = options
    _, tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
    as_trained_with(tokenizer, training_args)
    new = asked_as_chats({task: TaskSettings() for task in names if task not in suite.tasks}, tokenizer)
    of_domain = {task: settings for task, settings in new.items() if task in DOMAIN_TASKS}
    others = {task: settings for task, settings in new.items() if task not in DOMAIN_TASKS}
    return replace(suite, retention_tasks=suite.retention_tasks | others, domain_tasks=suite.domain_tasks | of_domain)


def _plan(comparison: Comparison, by_stage: list[Options]) -> dict:
    args, _, model_args = by_stage[0]
    found: dict[str, Any] = {
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
    if comparison.stages:
        names = [stage.name for stage in comparison.stages]
        learned = [f"{name}: {data_of(options[0])}" for name, options in zip(names, by_stage, strict=True)]
        found |= {"stages": [stage.written for stage in comparison.stages], "data": "; ".join(learned)}
    return found


def _check_run(
    comparison: Comparison, arm: Arm, seed: int, now: list[Comparison], chosen: Sequence[Arm], evaluate_only: bool
) -> None:
    """Raises `ValueError` if a run cannot be trained and evaluated in the stages of which this is to be done `now`."""
    for stage in now:
        if not evaluate_only:
            _check_source(stage, arm, chosen, seed)
        _check_weights(stage, arm, seed)
    if arm.interpolate is not None:
        return
    for stage in comparison.by_stage():
        if stage.earlier is not None:
            _check_order(stage, stage.earlier, arm.name, seed, [] if evaluate_only else now)


def _check_scalable(comparison: Comparison, arm: Arm, runs: dict[tuple[str, int], Options]) -> None:
    """Raises `ValueError` if `arm` scales adapters that are no factor of their update."""
    if arm.interpolate is None or set(arm.scales) <= {1}:
        return
    script = comparison.arms[arm.interpolate].script
    if script is not None:
        raise ValueError(
            f"Arm {arm.name!r} scales the adapters of {arm.interpolate!r}, and which ones {script} makes is not known before. Leave the "
            "arm out: `scales` under `evaluation` measures every adapter that can be scaled."
        )
    model_args = next(options[2] for (source, _), options in runs.items() if source == arm.interpolate)
    cause = unscalable_by(lora(model_args))
    if cause is not None:
        raise ValueError(
            f"Arm {arm.name!r} scales the adapters of {arm.interpolate!r}, and {cause} is no factor of their update: another scale would "
            "not be another share of it. Leave the arm out, or train a plain LoRA or rsLoRA."
        )


def _check_order(stage: Comparison, earlier: Comparison, arm: str, seed: int, now: list[Comparison]) -> None:
    """Raises `ValueError` unless a stage goes on, or went on, from the adapter of the one `earlier` that is there."""
    folder, before = stage.folder(arm, seed), earlier.folder(arm, seed)
    run, name = stage.run_name(arm, seed), earlier.stage and earlier.stage.name
    if stage.is_trained(arm, seed) or is_begun(folder):
        if earlier in now and not earlier.is_trained(arm, seed):
            raise ValueError(
                f"{folder} holds {run}, and the stage before it, {name!r}, is not trained ({before}): trained now it would be another "
                "adapter than the one that was gone on from. Put it back, or delete the folder of the later stage too."
            )
        started = Path(folder, START)
        is_there = missing_of_adapter(before) is None
        if is_there and started.is_file() and read_json(started)["adapter"] != adapter_fingerprint(before):
            raise ValueError(
                f"{folder} holds {run}, which went on from another adapter of the stage {name!r} than {before} holds now. Delete "
                "the folder of the later stage to train it anew, or put the earlier adapter back."
            )
    if stage not in now or stage.is_trained(arm, seed):
        return
    if earlier not in now and not earlier.is_trained(arm, seed):
        raise ValueError(
            f"Stages out of order: {run}, goes on from stage {name!r}, whose run in {before} is not done. Train that first, or both "
            f"together: `--stages {name} {stage.stage and stage.stage.name}`."
        )
    missing = missing_of_adapter(before) if earlier.is_trained(arm, seed) else None
    if missing is not None:
        raise ValueError(
            f"{run}, goes on from stage {name!r}, which was kept without its weights: {before} {missing}. Put them back, or delete its "
            "metrics.json to train it again."
        )


def _check_launch(stage: Comparison, arm: str, seed: int, launch: Launch, options: Options) -> None:
    """Raises `ValueError` if a run would refuse its launch, as where it cannot go on from the stage before it."""
    args, settings, _ = options
    begun = is_begun(stage.folder(arm, seed))
    # Of a model that is still to be trained there are no texts.
    is_there = stage.earlier is None or stage.earlier.is_trained(arm, seed)
    for check in checks_of_launch(launch, args, settings, begun=begun, has_texts=is_there and may_be_at_hand(settings)):
        try:
            check()
        except ValueError as error:
            before = None if stage.earlier is None else stage.earlier.stage
            goes_on = "" if before is None else f", which goes on from the adapter of stage {before.name!r}"
            raise ValueError(
                f"{stage.run_name(arm, seed)}{goes_on}, cannot be trained as `launch` says: {error} In a comparison the way out is "
                "`accelerate_config: multi_gpu` or `zero2`."
            ) from error


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
        unmeasured = comparison.suite.missing_files(folder, curve=comparison.is_traced(arm))
        missing = missing_of_adapter(adapter) if comparison.is_trained(source, seed) and unmeasured else None
        if missing is not None:
            raise ValueError(
                f"{unmeasured[0]} is to be measured, but the run in {comparison.folder(source, seed)} was kept without its "
                f"weights: {adapter} {missing}. Delete its metrics.json to train it again, or leave it out by `--arms` and `--seeds`."
            )


# A line of a run's config that is no option of the script itself.
_SCRIPT = "# script: "


def _check_same_run(path: Path, script: str | None, options: dict) -> None:
    """Raises `ValueError` if `path` is the config of a run, finished or begun, with other options or by another script."""
    finished = path.with_name("metrics.json").is_file()
    if not path.is_file() or not (finished or any(path.parent.glob("checkpoint-*"))):
        return
    text = path.read_text(encoding="utf-8")
    old, options = yaml.safe_load(text), options | {"script": script}
    if text.startswith(_SCRIPT):
        old["script"] = text.splitlines()[0].removeprefix(_SCRIPT)
    # The folder may have moved, and with it that of the stage before.
    old, options = (
        given | {key: os.path.basename(given[key]) for key in ("adapter_name_or_path",) if given.get(key)}
        for given in (old, options)
    )
    names = sorted({*old, *options} - {"output_dir"})
    other = [name for name in names if old.get(name) != options.get(name)]
    if other:
        changes = ", ".join(f"{name}: {old.get(name)!r} then, {options.get(name)!r} now" for name in other)
        raise ValueError(
            f"{path.parent} holds a {'finished' if finished else 'begun'} run with other options ({changes}). Choose another "
            "`output_dir`, or delete that folder to train it anew."
        )


class _Evaluator:
    """
    The base model in memory, and the held-out rows that every arm is measured on.

    Args:
        by_stage (`list`): Options of a run of each stage; where there is one domain, of one run.
    """

    def __init__(self, comparison: Comparison, by_stage: list[Options], manager: "TaskManager | None"):
        args, training_args, model_args = by_stage[-1]
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
        others: dict[str, Any] = {}
        settings_of_stages: dict[str, MeanTeacherConfig] = {}
        for stage, (stage_args, settings, _) in zip(comparison.stages, by_stage[:-1], strict=False):
            others[stage.name] = load_held_out(stage_args, self.tokenizer, settings.dataset_text_field)
            settings_of_stages[stage.name] = settings
        general = data.as_chat(Dataset.from_list(general_rows()), self.tokenizer)
        as_trained_with(self.tokenizer, training_args)
        for name, given in comparison.suite.drift_data.items():
            part = data.DataPart.from_config(given, "drift_data")
            field, drop = training_args.dataset_text_field, args.drop_incomplete_rows
            rows = data.load_part(part, "drift_data", text_field=field, drop_incomplete=drop)
            others[name] = data.as_chat(rows, self.tokenizer)
        self.rows: dict[str, Any] = dict(domain=held_out, general=general, others=others, settings=training_args)
        self.rows["other_settings"] = settings_of_stages
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
        cause = next(filter(None, map(unscalable_by, adapter_configs(model))), None)
        if scale != 1.0 and cause is not None:
            raise ValueError(
                f"The adapter in {adapter} cannot be scaled to {scale:g}: {cause} is no factor of its update. Leave its scales out, or "
                "train a plain LoRA."
            )
        kept = self._kept if start.is_base and vocabulary(base) == tokens else None
        with rescale_adapter_scale(model, scale) if scale != 1.0 else nullcontext():
            self._measure(model, tokenizer, folder, adapter, scale, start.activate, kept=kept, curve=curve)
        # One that took from the base's weights, or put modules of its own in their place, leaves no base for the next.
        own = any(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
        if start.is_base and not own and vocabulary(base) == tokens:
            self._model = model.unload()
