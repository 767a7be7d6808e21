"""What is measured of a model in its trainer: loss, drift and generations before and after, drift and tasks in between."""

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import uuid4

import numpy as np
import torch
from datasets import Dataset
from huggingface_hub import EvalResult
from transformers import (
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from .adapters.starting_point import StartingPoint
from .data import DataPart
from .evaluation.drift import adapter_configs, check_measurable, measure_drift
from .evaluation.generation import generate_answers, prompts_and_references
from .evaluation.runner import evaluate_tasks
from .evaluation.settings import TaskSettings
from .processes import Launch, refuse_start, refuse_tasks
from .regularizers.rehearsal import stop_at_drift
from .trainer import EMARegularizedSFTTrainer


if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


def trainer_batches(trainer: EMARegularizedSFTTrainer, dataset: Dataset) -> list[dict]:
    """Batches of a trainer's tokenized `dataset`, rows of about one length together, the same on every rank."""
    columns = [
        name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names
    ]  # the last: packed
    rows = list(dataset.select_columns(columns))
    rows.sort(key=lambda row: len(row["input_ids"]))
    size = trainer.args.per_device_eval_batch_size
    return [trainer.data_collator(rows[i : i + size]) for i in range(0, len(rows), size)]


def _evaluation_sets(trainer: EMARegularizedSFTTrainer) -> dict[str, Dataset]:
    sets = trainer.eval_dataset
    return sets if isinstance(sets, dict) else {"eval": sets}


def starting_point(trainer: EMARegularizedSFTTrainer) -> StartingPoint:
    """
    The model as it was when the trainer was made. Of a training without an adapter it is a copy of all that is trained.

    Raises:
        ValueError: Such a training has begun already, or DeepSpeed's ZeRO-3 would have to put another start than the base back.
    """
    is_base = getattr(trainer.starting_point, "is_base", False)
    refuse_start(Launch.of_state(trainer.accelerator.state), is_base)
    if trainer.starting_point is not None:
        return trainer.starting_point
    if trainer.state.global_step:
        raise ValueError(
            f"The model has no adapter and is {trainer.state.global_step} steps from where it began, so there is nothing to "
            "measure its drift from. Prepare the measurement before the training."
        )
    return StartingPoint(trainer.model)


class Measurement:
    """
    Everything that is measured before and after: loss and drift on both sets, and sample generations.

    Drift is from the model as it was when the trainer was made.
    """

    def __init__(self, trainer: EMARegularizedSFTTrainer, samples: Dataset, tokens: int):
        self.trainer, self.samples, self.tokens = trainer, samples, tokens
        self.start = starting_point(trainer)
        self.tokenizer = cast(PreTrainedTokenizerBase, trainer.processing_class)
        self.pairs = prompts_and_references(samples, self.tokenizer)
        self.batches = {name: trainer_batches(trainer, rows) for name, rows in _evaluation_sets(trainer).items()}

    def __call__(self, who: str, adapter: Callable[[], AbstractContextManager] = nullcontext) -> dict[str, dict]:
        result = {}
        for name, batches in self.batches.items():
            with self.trainer.precision():
                result[name] = measure_drift(
                    self.trainer.model,
                    batches,
                    adapter,
                    f"{who}, {name} text",
                    self.trainer.wrapper,
                    self.start.activate,
                )
        return result

    def models(self) -> tuple[dict, dict[str, list[str]]]:
        """Figures, and answers, of the model `before`, the `student` and its `teacher`."""
        teacher = self.trainer.teacher
        # The model as it was is measured afterwards too: only now is a sharded one ready to compute.
        adapters: dict[str, Callable[[], AbstractContextManager]]
        adapters = {"before": self.start.activate, "student": nullcontext}
        if teacher is not None and not teacher.is_base:
            adapters["teacher"] = teacher.activate
        figures: dict[str, Any] = {}
        answers: dict[str, list[str]] = {}
        for who, adapter in adapters.items():
            figures[who] = self(who, adapter)
            with adapter():
                answers[who] = self.generate()
        figures["generations"] = [
            pair | {who: texts[i] for who, texts in answers.items()} for i, pair in enumerate(self.pairs)
        ]
        return figures, answers

    def generate(self) -> list[str]:
        """Answers, of the model as it is now, to the prompts of the samples."""
        if not len(self.samples):
            return []
        with self.trainer.precision():
            return generate_answers(self.trainer.model, self.tokenizer, self.samples, self.tokens)


def samples_and_table(metrics: dict) -> str:
    """The sample generations and the figures of `metrics.json` as text."""
    lines = []
    for sample in metrics["generations"]:
        lines.append(f"\nQ: {sample['prompt']}")
        lines += [f"  {who:>9}: {text}" for who, text in sample.items() if who != "prompt"]
    return "\n".join([*lines, f"\n{table(metrics)}"])


def card_figures(metrics: dict) -> dict[str, float]:
    """Loss, and drift from the base, of each model on each set: what a model card shows of `metrics.json`."""
    return {
        f"{who}, {group}, {name}": metrics[who][group][name]
        for who in ("before", "student", "teacher")
        for group in metrics.get(who, ())
        for name in ("loss", "kl_base_model")
    }


def card_results(metrics: dict, parts: Mapping[str, DataPart | None]) -> list[EvalResult]:
    """
    Those figures of the student in `metrics.json` for the metadata of a model card, where the hub shows and compares them, each with the
    data set that the held-out rows are of, by its name on the hub if that is where it is.

    Args:
        parts (`dict`): What was trained on, by the names in `metrics.json`; `None` is the offline demo's.
    """
    student = metrics["student"]
    sets = {name: _of_the_hub(name, part) for name, part in parts.items()}
    own = [name for name in parts if name not in student]  # whose rows alone are the domain
    mixture = {"dataset_type": "mixture", "dataset_name": f"{', '.join(sets)}, held-out rows together"}
    general = {"dataset_type": "general_questions", "dataset_name": "general questions that come with trl_ema"}
    sets |= {"domain": sets[own[0]] if own else mixture, "general": general}
    names = {"loss": "Loss, nats per token", "kl_base_model": "Drift: KL(before || model), nats per token"}
    return [
        EvalResult(
            task_type="text-generation", **sets[group],
            metric_type="loss" if name == "loss" else "kl_divergence", metric_name=names[name], metric_value=student[group][name],
        )
        for group in student if group in sets
        for name in names
    ]  # fmt: skip


def _of_the_hub(name: str, part: DataPart | None) -> dict[str, Any]:
    """What a model card says of a data set: its name on the hub, and its configuration there; of a file what it is called in `metrics.json`."""
    if part is None:
        return {"dataset_type": "human_phenotype_ontology", "dataset_name": "Human Phenotype Ontology, held-out terms"}
    if os.path.exists(part.path) or part.data_files is not None:
        return {"dataset_type": name, "dataset_name": f"{name}, held-out rows"}
    config = "" if part.name is None else f" ({part.name})"
    return {
        "dataset_type": part.path,
        "dataset_config": part.name,
        "dataset_name": f"{part.path}{config}, held-out rows",
    }


def table(metrics: dict) -> str:
    """The figures of `metrics.json` as aligned text."""
    columns = [name for name in ("before", "student", "teacher") if name in metrics]
    parts = [group for group in metrics["student"] if group not in ("domain", "general")]
    rows = [
        ("held-out domain loss", "domain", "loss"),
        ("KL(base || model), domain text", "domain", "kl_base_model"),
        ("KL(base || model), general text", "general", "kl_base_model"),
        ("loss on general text", "general", "loss"),
        *((f"held-out loss, {part}", part, "loss") for part in parts),
    ]
    width = max(34, *(len(label) for label, *_ in rows))
    lines = [f"{'nats per token':{width}}" + "".join(f"{name:>10}" for name in columns)]
    for label, group, key in rows:
        lines.append(f"{label:{width}}" + "".join(f"{metrics[name][group][key]:10.4f}" for name in columns))
    return "\n".join(lines)


class TrainedDrift:
    """
    KL(base ‖ student), in nats per token, on rows of a trainer's evaluation sets, by name.

    From now on it is among the metrics of each evaluation of such a set, `eval_NAME_drift` (`eval_drift` of a single one), so that
    `metric_for_best_model` and early stopping can ask for it.

    The base is the model as it was when the trainer was made, with the adapter that it goes on from, if it does. Without an
    adapter a copy of all that is trained is kept on the CPU.

    Args:
        trainer ([`EMARegularizedSFTTrainer`]): With an `eval_dataset`, one or several by name.
        rows (`int`): Rows of each set.
    """

    def __init__(self, trainer: EMARegularizedSFTTrainer, rows: int = 16):
        if trainer.eval_dataset is None:
            raise ValueError("Drift is measured on the evaluation data, and there is none. Pass an `eval_dataset`.")
        for config in adapter_configs(trainer.model):
            check_measurable(config)
        self.trainer, self.rows = trainer, rows
        self.start = starting_point(trainer)
        self._batches: dict[str, list[dict]] = {}
        trainer.measure_at_evaluation = self.at_evaluation

    def __call__(self, name: str) -> float:
        """On one set, now."""
        if name not in self._batches:
            dataset = _evaluation_sets(self.trainer)[name]
            self._batches[name] = trainer_batches(self.trainer, dataset.select(range(min(self.rows, len(dataset)))))
        with self.trainer.precision():
            return measure_drift(
                self.trainer.model, self._batches[name], wrapper=self.trainer.wrapper, reference=self.start.activate
            )["kl_base_model"]

    def at_evaluation(self, prefix: str) -> dict[str, float]:
        """The metric of an evaluation whose others begin with `prefix`; none of other data than the trainer's sets."""
        single = not isinstance(self.trainer.eval_dataset, dict)
        names = {"eval" if single else f"eval_{name}": name for name in _evaluation_sets(self.trainer)}
        return {f"{prefix}_drift": self(names[prefix])} if prefix in names else {}


class DriftCallback(TrainerCallback):
    """
    Logs KL(base ‖ student), in nats per token, during training: `drift_NAME` for each evaluation set of the trainer, and in each
    evaluation, see [`TrainedDrift`]. With `max_drift` the training is saved and stopped where that of the set `general`, or
    without one the largest, is above it.

    Its cost is two forward passes over `rows` rows of each set every `steps` optimizer steps; `drift_time_share`, logged
    beside, is what it took of the time so far.

    Args:
        trainer ([`EMARegularizedSFTTrainer`]): With an `eval_dataset`, one or several by name.
        steps (`int`): Optimizer steps between two measurements.
        rows (`int`): Rows of each set.

    Source: Shenfeld et al. 2025, https://arxiv.org/abs/2509.04259: drift on the new task predicts forgetting.
    """

    watches_drift = True

    def __init__(self, trainer: EMARegularizedSFTTrainer, steps: int, rows: int = 16):
        if steps < 1 and trainer.eval_dataset is not None:
            raise ValueError(
                f"`steps` must be at least 1, got {steps}. It counts optimizer steps between measurements."
            )
        self.trainer, self.steps, self.drift = trainer, steps, TrainedDrift(trainer, rows)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._start, self._seconds = time.perf_counter(), 0.0

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step % self.steps:
            return
        start = time.perf_counter()
        found = {name: self.drift(name) for name in _evaluation_sets(self.trainer)}
        self._seconds += time.perf_counter() - start
        share = self._seconds / (time.perf_counter() - self._start)
        self.trainer.add_metrics(**{f"drift_{name}": value for name, value in found.items()}, drift_time_share=share)
        if self.trainer.args.max_drift is not None:
            where, drift = max(found.items(), key=lambda one: (one[0] == "general", one[1]))
            # The ranks stop together: their figures may differ in a last bit.
            drift = self.trainer.accelerator.gather(torch.tensor([drift], device=args.device))[0].item()
            stop_at_drift(control, drift, self.trainer.args.max_drift, f"on {where} rows")


class TasksCallback(TrainerCallback):
    """
    Asks the student lm-eval's tasks during training, as it is in memory: before the first step, every `steps` optimizer steps, and
    after the last, whichever that is; of a training that puts its best weights back at its end, those too. A signal ends it without.
    The training goes on as if it had not been asked: random states, modes, adapters and tokenizer are left as they were.

    Logs `task_NAME`, the score. The answers are kept in `output_dir/tasks/step-N`, as `trl-ema evaluate` keeps them: two steps, or a
    step and an evaluation, compare question by question.

    Each rank asks the same questions, and the first one keeps the answers.

    Args:
        trainer ([`EMARegularizedSFTTrainer`]): Of any launch that does not shard the model.
        tasks (`dict`): Name to [`TaskSettings`], see [`tasks_to_ask`].
        steps (`int`): Optimizer steps between two rounds.
        manager (`lm_eval.tasks.TaskManager`): See [`task_manager`].

    Raises:
        ValueError: The model is sharded (ZeRO-3, FSDP), or `steps` is below 1.
    """

    def __init__(
        self,
        trainer: EMARegularizedSFTTrainer,
        tasks: Mapping[str, TaskSettings],
        steps: int,
        manager: "TaskManager",
    ):
        refuse_tasks(Launch.of_state(trainer.accelerator.state))
        if steps < 1:
            raise ValueError(f"`steps` must be at least 1, got {steps}. It counts optimizer steps between two rounds.")
        self.trainer, self.tasks, self.steps, self.manager = trainer, dict(tasks), steps, manager
        self.folder = Path(str(trainer.args.output_dir), "tasks")
        self.asked: list[int] = []
        self.begun = 0
        self.kept: int | None = None  # the step of the weights that the training ended with

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.begun = state.global_step
        if not state.global_step:  # a run that goes on was asked then
            self.ask(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        due = state.global_step % self.steps == 0 or state.global_step == state.max_steps
        if due and not self.trainer.stopped_by:  # whoever sent the signal does not wait
            self.ask(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: Any,
    ) -> None:
        callbacks = self.trainer.callback_handler.callbacks
        if "train_runtime" in (logs or {}) and self in callbacks:
            # The last log but ours: now before the trackers, which end their runs in `on_train_end`.
            callbacks.remove(self)
            callbacks.insert(0, self)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.trainer.stopped_by:  # it goes on later
            return
        is_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        self.kept = int(state.best_global_step or 0) if is_best else state.global_step
        before = self.kept <= self.begun and self._is_whole(self.kept)  # by the process that was cut off
        if self.kept not in self.asked and not before:
            self.ask(self.kept)

    def ask(self, step: int) -> dict[str, float]:
        """Scores of the student as it is now, logged."""
        trainer, start = self.trainer, time.perf_counter()
        batch_size = trainer.args.per_device_eval_batch_size  # the same on every rank
        model_id = uuid4().hex  # whatever lies there is of another run
        scratch: Any = nullcontext(str(self._at(step)))
        if not trainer.is_world_process_zero():
            scratch = tempfile.TemporaryDirectory()
        scores = {}
        with _random_states_kept(), trainer.precision(), scratch as folder:
            for name, settings in self.tasks.items():
                found = evaluate_tasks(
                    trainer.model, cast(Any, trainer.processing_class), [name], folder, model_id=model_id, manager=self.manager,
                    settings=settings, batch_size=batch_size, about={"step": step},
                )  # fmt: skip
                scores[name] = found[name]["score"]
        self.asked.append(step)
        logs = {f"task_{name}": score for name, score in scores.items()}
        due = trainer.control.should_log
        # Not TRL's, which would empty its means of the steps since its last log. What is to be logged of this step is still to come.
        Trainer.log(trainer, logs | {"task_seconds": round(time.perf_counter() - start, 1)})
        trainer.control.should_log = due
        return scores

    def first_and_last(self) -> tuple[str, str] | None:
        """
        Folders of the answers from before the first step (or of the first round that is kept), and of the weights that the training
        ended with, or of the last round; `None` where there are not two.
        """
        steps = self.asked
        if 0 not in steps:  # a run that went on
            last = max([self.begun, *steps])
            steps = [step for step in map(_step, self.folder.glob("step-*")) if step <= last]
        whole = [step for step in sorted({*steps}) if self._is_whole(step)]
        last = self.kept if self.kept in whole else max(whole, default=0)
        if last <= min(whole, default=0):
            return None
        return str(self._at(whole[0])), str(self._at(last))

    def _is_whole(self, step: int) -> bool:
        """Whether all answers of that step are there."""
        return all((self._at(step) / f"{task}.jsonl").is_file() for task in self.tasks)

    def _at(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """Within this context random numbers may be drawn, and seeds set; those after it are drawn as if there had been none."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
