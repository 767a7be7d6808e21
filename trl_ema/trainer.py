"""`EMARegularizedSFTTrainer`: TRL's `SFTTrainer` with a mean teacher wired in."""

import contextlib
import itertools
import logging
import os
import shutil
import signal
import uuid
from collections import defaultdict
from dataclasses import fields
from typing import Any

import torch
from accelerate.utils import is_peft_model
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, IterableDataset
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, rotate_checkpoints
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import get_config_model_id

from . import zero
from .config import MeanTeacherConfig
from .data import check_columns
from .files import OutputError, check_output_dir, replace_folder
from .forward import add_mean_teacher_forward, check_head, divergence_mask
from .losses import IGNORE_INDEX
from .model_card import write_model_card
from .schedules import half_life_to_decay, sigmoid_ramp, warmed_up_decay
from .sharding import gather_whole, local_shard
from .teacher import NO_ADAPTER, TEACHER_NAME, MeanTeacher, check_adapter, check_adapter_file, student_name


# Rows of a stream that are read, at most, in search of a label.
_STREAM_ROWS = 1000
# A checkpoint that is being written.
_STAGING = "checkpoint.part"
_TRAINER_STATE = "trainer_state.json"
_STATE_KEY = "trl_ema"


logger = logging.getLogger(__name__)


class EMARegularizedSFTTrainer(SFTTrainer):
    """
    [`~trl.SFTTrainer`] whose student is held back by a mean teacher.

        loss = CE(y; p_θ) + kl_weight · ramp(step) · D(p_φ, p_θ)          per token, mean over the accumulated batch
        after each optimizer step:   φ ← d·φ + (1 − d)·θ

    Takes the same arguments as [`~trl.SFTTrainer`], with [`MeanTeacherConfig`] for `args` (an [`~trl.SFTConfig`] is
    read as one with the default teacher). The model needs a PEFT adapter, unless `teacher="none"`.

    Logs what `SFTTrainer` logs, and `ce_loss`, `kl_loss` (nats per token), `kl_weight`, `ema_decay` and
    `teacher_distance` (relative L2 distance between the two adapters). `teacher` is the [`MeanTeacher`], or `None`.

    Example:

    ```python
    >>> trainer = EMARegularizedSFTTrainer(
    ...     "Qwen/Qwen2-1.5B",
    ...     args=MeanTeacherConfig("out", teacher="ema", kl_weight=1.0),
    ...     train_dataset=load_dataset("medalpaca/medical_meadow_medical_flashcards", split="train"),
    ...     peft_config=LoraConfig(target_modules="all-linear"),
    ... )
    >>> trainer.train()
    ```

    Sources: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780.
    """

    args: MeanTeacherConfig
    model: Any  # a PeftModel, unless `teacher="none"`

    _tag_names = ["trl", "sft", "trl_ema"]
    _name = "EMA-regularized SFT"
    _paper = {
        "title": "Mean teachers are better role models",
        "id": "1703.01780",
    }

    def __init__(
        self, model, args=None, data_collator=None, train_dataset=None, eval_dataset=None, processing_class=None,
        compute_loss_func=None, compute_metrics=None, callbacks=None, optimizers=(None, None),
        optimizer_cls_and_kwargs=None, preprocess_logits_for_metrics=None, quantization_config=None, peft_config=None,
        formatting_func=None,
    ):  # fmt: skip
        args = _as_mean_teacher_config(args, model)
        check_output_dir(args.output_dir)
        if args.teacher != "none":
            _refuse_what_cannot_work(args, compute_loss_func, train_dataset)
            _refuse_parallelism(args.parallelism_config)
            _check_peft(model, peft_config, args.teacher_anchor)
        _check_datasets(train_dataset, eval_dataset, args, formatting_func, data_collator)
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func, compute_metrics,
            callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics, quantization_config,
            peft_config, formatting_func,
        )  # fmt: skip
        _check_labels(self.train_dataset)
        _keep_4bit_layers_trainable(self.model)
        _keep_float32_adapter(self.model, args)
        self.teacher = None
        if args.teacher == "none":  # for the model card
            self._name, self._paper = SFTTrainer._name, SFTTrainer._paper
        self._kl_tokens_in_batch = None
        self._ema_decay = self._kl_weight = None
        self.model_card_details: dict[str, dict] = {}  # more tables for the model card, by title
        self.last_good_checkpoint = None
        self.resumed_from = self._staging = None
        self._optimizer_groups = None  # names of what DeepSpeed flattens
        self.run_id = uuid.uuid4().hex  # kept by resumed runs
        self.stopped_by = 0  # the signal that ended the last training, see `enable_jit_checkpoint`
        self._loss_sums = torch.zeros(4, dtype=torch.float64)  # Σ CE, Σ D and their tokens since the last log
        if args.teacher != "none":
            _refuse_parallelism(self.accelerator.parallelism_config)
            self._attach_teacher()
        _check_free_space(args.output_dir, self.model)
        if args.enable_jit_checkpoint:
            theirs = self.pop_callback(JITCheckpointCallback)
            theirs.on_train_end(args, self.state, self.control)  # gives the signal back
            self.add_callback(_StopOnSignal(self))
        # First, so that whatever saves or measures at the end of a step finds the teacher moved.
        self.callback_handler.callbacks.insert(0, _MeanTeacherCallback(self))

    def _attach_teacher(self):
        args = self.args
        base = self.model.get_base_model()
        if not any(p.is_meta or hasattr(p, "ds_id") for p in base.parameters()):
            check_head(base)
        self.teacher = MeanTeacher(self.model, frozen=args.teacher == "frozen", anchor=args.teacher_anchor)
        add_mean_teacher_forward(
            base,
            self.teacher,
            kl_tokens=args.kl_tokens,
            direction=args.kl_direction,
            mixture=args.jsd_mixture,
            temperature=args.kl_temperature,
            dft=args.loss_type == "dft",
        )

    # The loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.teacher is not None and self.args.kl_tokens == "all":
            count = sum(divergence_mask("all", **batch).sum() for batch in batches)
            count = torch.as_tensor(count, device=device)
            if self.args.average_tokens_across_devices:
                count = self.accelerator.gather(count).sum()
            self._kl_tokens_in_batch = count
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # An evaluation is the student's, as SFT would report it.
        if self.teacher is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        kl_weight = self._kl_weight = self.current_kl_weight()
        if self.args.kl_tokens == "all":
            # TRL divides by the labelled tokens, the divergence is a mean over its own.
            num_labels, num_kl = num_items_in_batch, self._kl_tokens_in_batch
            if num_labels is None:  # then TRL divides by those of this batch alone
                num_labels = divergence_mask("loss", **inputs).sum()
                num_kl = divergence_mask("all", **inputs).sum()
            kl_weight = kl_weight * torch.as_tensor(num_labels).clamp(min=1) / num_kl.clamp(min=1)
        outputs = None

        def student_and_teacher(**inputs):
            nonlocal outputs
            outputs = model(**inputs, kl_weight=kl_weight)
            return outputs

        with self._loss_type_done():
            loss = super().compute_loss(student_and_teacher, inputs, num_items_in_batch=num_items_in_batch)
        self._record(outputs)
        return loss

    @contextlib.contextmanager
    def _loss_type_done(self):
        """The fused loss has weighted each token already (DFT): TRL only has to sum and normalize."""
        loss_type, self.args.loss_type = self.args.loss_type, "nll"
        try:
            yield
        finally:
            self.args.loss_type = loss_type

    def _record(self, outputs):
        sums = torch.stack([outputs.ce_loss, outputs.kl_loss, outputs.label_mask, outputs.kl_mask]).float()
        self._loss_sums += self.accelerator.gather(sums).view(-1, 4).cpu().double().sum(0)

    def current_kl_weight(self) -> float:
        """λ at the current step, after its ramp."""
        ramp_steps = self.args.kl_warmup_ratio * self.state.max_steps
        return self.args.kl_weight * sigmoid_ramp(self.state.global_step, ramp_steps)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.args.stop_on_nonfinite_loss and not self.accelerator.gather(loss).isfinite().all():
            last = self.last_good_checkpoint
            resume = f"The last good checkpoint is {last}" if last else "There is no good checkpoint of this run yet"
            raise FloatingPointError(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}; the model was not updated with it. "
                f"{resume}. Lower `learning_rate` or `kl_weight`, or look at the data of this step; "
                "`stop_on_nonfinite_loss=False` goes on regardless."
            )
        return loss

    # The average

    def update_teacher(self):
        """One step of the average, if it is due and the optimizer step was really taken."""
        args = self.args
        if args.teacher != "ema" or self.accelerator.optimizer_step_was_skipped:
            return
        if self.state.global_step % args.ema_update_steps:
            return
        decay = args.ema_decay
        if decay is None:
            decay = half_life_to_decay(args.half_life, self.state.max_steps, args.ema_update_steps)
        if args.ema_warmup:
            decay = warmed_up_decay(decay, self.teacher.num_updates)
        self.teacher.update(decay)
        self._ema_decay = decay

    # Logs and evaluation

    def log(self, logs, start_time=None):
        if self.teacher is not None and self.model.training and "loss" in logs:
            metrics = self._metrics["train"]
            ce, kl, num_labels, num_kl = self._loss_sums.tolist()
            metrics["ce_loss"], metrics["kl_loss"] = [ce / max(num_labels, 1)], [kl / max(num_kl, 1)]
            self._loss_sums.zero_()
            metrics["kl_weight"] = [self._kl_weight]
            if self._ema_decay is not None:
                metrics["ema_decay"] = [self._ema_decay]
            if not self.teacher.is_base:
                metrics["teacher_distance"] = [self.teacher.distance()]
        super().log(logs, start_time)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix="eval", **kwargs):
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self.teacher is None or not self.args.eval_teacher:
            return output
        student_metrics = self._metrics["eval"]
        self._metrics["eval"] = defaultdict(list)
        try:
            with self.teacher.activate():
                teachers = super().evaluation_loop(
                    dataloader, f"{description} (teacher)", prediction_loss_only=True, metric_key_prefix="eval"
                )
        finally:
            self._metrics["eval"] = student_metrics
        output.metrics[f"{metric_key_prefix}_teacher_loss"] = teachers.metrics["eval_loss"]
        return output

    @property
    def wrapper(self):
        """What DDP, DeepSpeed or FSDP put around the model; `None` where nothing did."""
        wrapped = self.model_wrapped
        return wrapped if wrapped is not self.model or self.is_fsdp_enabled else None

    # Files

    def save_model(self, output_dir=None, _internal_call=False):
        super().save_model(output_dir, _internal_call)
        self._save_sharded_student(output_dir)
        if self.teacher is not None:
            self.teacher.save(output_dir or self.args.output_dir, run_id=self.run_id, step=self.state.global_step)
        if not _internal_call and self.is_world_process_zero():
            write_model_card(self, output_dir or self.args.output_dir)

    def _save_sharded_student(self, output_dir):
        """Transformers writes no adapter where FSDP's checkpoints are by shards: nobody could load the run's result."""
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._save(output_dir, {name: gather_whole(local_shard(p), p).cpu() for name, p in trained.items()})

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir)

    def _save_checkpoint(self, model, trial):
        """Written under another name and renamed when it is whole: no checkpoint is ever half there."""
        run_dir, name = super()._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = os.path.join(run_dir, _STAGING)
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        limit, self._staging = self.args.save_total_limit, staging
        self.args.save_total_limit = None  # older ones go when this one is there
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._staging = limit, None
        self.accelerator.wait_for_everyone()
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step == self.state.global_step or os.path.isdir(best):
            self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(staging, name, _TRAINER_STATE))
            replace_folder(os.path.join(staging, name), os.path.join(run_dir, name))
            os.rmdir(staging)
            if self.args.push_to_hub:
                self._push_from_checkpoint(os.path.join(run_dir, name))
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is not None:
            return
        teacher = os.path.join(checkpoint_folder, TEACHER_NAME)
        if self.is_world_process_zero() and os.path.isdir(teacher):
            shutil.copytree(teacher, os.path.join(self.args.output_dir, TEACHER_NAME), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if resume_from_checkpoint is True:
            resume_from_checkpoint = get_last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no checkpoint in {self.args.output_dir!r} to resume from. Start without "
                    "`resume_from_checkpoint`, or give the `output_dir` of the interrupted run."
                )
        if resume_from_checkpoint:
            self._check_checkpoint(resume_from_checkpoint)
        self.resumed_from = resume_from_checkpoint or None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_checkpoint(self, folder):
        """Before anything is loaded: that the checkpoint is whole, and of this model."""
        state = os.path.join(folder, _TRAINER_STATE)
        if not os.path.isfile(state):
            raise ValueError(
                f"{folder!r} is no checkpoint: there is no {_TRAINER_STATE} in it. Give a `checkpoint-*` folder of the run."
            )
        if self.teacher is not None:
            self.teacher.check_checkpoint(folder)
            saved = TrainerState.load_from_json(state)
            saved_run = saved.stateful_callbacks.get(_STATE_KEY, {}).get("run_id")
            self.teacher.check_origin(folder, run_id=saved_run, step=saved.global_step)
        elif is_peft_model(self.model) and self.model.active_adapters == ["default"]:
            check_adapter_file(self.model, "default", folder, "Student")
        if self._resumes_portably(folder) and not os.path.isfile(os.path.join(folder, OPTIMIZER_NAME)):
            raise ValueError(
                f"{folder!r} has no {OPTIMIZER_NAME}, so only as many ranks as wrote it, at the same ZeRO stage, can resume "
                "from it. Launch as it was launched then."
            )

    def _zero_stage(self):
        return self.accelerator.state.deepspeed_plugin.zero_stage if self.is_deepspeed_enabled else 0

    def _resumes_portably(self, folder):
        """Whether DeepSpeed is, or was, at work, and cannot read `folder` itself: see `zero.py`."""
        if not self.is_deepspeed_enabled:
            return zero.is_zero_checkpoint(folder)
        return not zero.is_readable_by(self._zero_stage(), self.args.world_size, folder)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        planned = (self.accelerator.state.deepspeed_plugin.deepspeed_config or {}) if self.is_deepspeed_enabled else {}
        if self._zero_stage() and isinstance(optimizer, torch.optim.Optimizer) and "scheduler" not in planned:
            self._optimizer_groups = zero.group_names(optimizer, self.model)
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._optimizer_groups is not None:
            state = zero.optimizer_state_dict(self.model_wrapped, self._optimizer_groups)
            schedule = zero.schedule_for(len(self._optimizer_groups), self.lr_scheduler.state_dict())
            if self.args.should_save:
                torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))
                torch.save(schedule, os.path.join(output_dir, SCHEDULER_NAME))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._optimizer_groups is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        # The optimizer has been loaded, by DeepSpeed or by us.
        saved = torch.load(os.path.join(checkpoint, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(zero.schedule_for(len(self.lr_scheduler.base_lrs), saved))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        folder = resume_from_checkpoint
        if folder is None or not (self.is_deepspeed_enabled and self._resumes_portably(folder)):
            return super()._prepare_for_training(max_steps, train_dataloader, folder)
        # As without DeepSpeed: the weights before it wraps the model, the optimizer after.
        self._load_from_checkpoint(folder)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        saved = torch.load(os.path.join(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        zero.load_optimizer_state_dict(self.model_wrapped, self._optimizer_groups, saved)
        self._load_optimizer_and_scheduler(folder)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with _dtypes_kept(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        with _dtypes_kept(self.model):
            super()._load_best_model()
        if self.teacher is not None:
            self.teacher.load(self.state.best_model_checkpoint)


class _MeanTeacherCallback(TrainerCallback):
    """Moves the teacher after each step, and carries what a resumed run must know through `trainer_state.json`."""

    KEY = _STATE_KEY

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer = self.trainer
        if trainer.resumed_from is not None:
            # Here in every mode: DeepSpeed and FSDP load a checkpoint after they have wrapped the model.
            trainer.last_good_checkpoint = trainer.resumed_from
            if trainer.teacher is not None:
                trainer.teacher.load(trainer.resumed_from)
        saved = state.stateful_callbacks.get(self.KEY)
        if saved is not None:
            # TRL starts counting anew at each resume.
            trainer._total_train_tokens = saved["num_tokens"]
            trainer.run_id = saved["run_id"]

    def on_save(self, args, state, control, model=None, **kwargs):
        # A finite loss can still have had gradients that were not.
        if all(p.isfinite().all() for p in model.parameters() if p.requires_grad):
            folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.trainer.last_good_checkpoint = os.path.join(args.output_dir, folder)

    def on_step_end(self, args, state, control, **kwargs):
        teacher = self.trainer.teacher
        if teacher is not None:
            self.trainer.update_teacher()
        state.stateful_callbacks[self.KEY] = {
            "run_id": self.trainer.run_id,
            "num_tokens": self.trainer._total_train_tokens,
        }


class _StopOnSignal(TrainerCallback):
    """
    `enable_jit_checkpoint`: SIGTERM and SIGINT save a checkpoint at the end of the step, and training stops.

    Instead of Transformers' own callback, which knows SIGTERM alone, may save in the middle of a step, before random
    numbers were used that the resumed run then draws again, and lets each rank stop at a step of its own.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, trainer):
        self.trainer, self.signal, self._before = trainer, 0, {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.signal = self.trainer.stopped_by = 0
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}

    def _remember(self, number, frame):
        logger.warning("%s: saving a checkpoint at the end of this step.", signal.Signals(number).name)
        self.signal = number

    def on_step_end(self, args, state, control, **kwargs):
        number = torch.tensor(self.signal, device=args.device)
        # The ranks agree: a signal may have reached one of them, or each at another step.
        number = int(self.trainer.accelerator.gather(number).max())
        if number:
            self.trainer.stopped_by = number
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _dtypes_kept(model):
    """PEFT upcasts an adapter when it loads it; TRL trains 4-bit models' adapters in bfloat16."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, dtype in before.items():
        parameter = model.get_parameter(name)  # PEFT may have put a new one there
        parameter.data = parameter.data.to(dtype)


def _keep_4bit_layers_trainable(model) -> None:
    """
    bitsandbytes repacks 4-bit weights in an eval-mode forward on CPUs with AVX512-BF16, for a product that has no
    backward: gradients after an evaluation would silently be wrong.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.state_dict()  # unpacks, in place
            module.support_avx512bf16_for_cpu = False


def _keep_float32_adapter(model, args) -> None:
    """
    TRL casts the adapter of a quantized model to bfloat16, the precision QLoRA computes in. A run in float32 keeps it in
    float32: nothing is rounded, and a CPU without bfloat16 instructions multiplies in bfloat16 tens of times slower.
    """
    if args.bf16 or args.fp16:
        return
    if {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} == {torch.float32}:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def _as_mean_teacher_config(args, model) -> MeanTeacherConfig:
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config)
        return MeanTeacherConfig(f"{name.split('/')[-1]}-EMA-SFT")
    if isinstance(args, MeanTeacherConfig):
        return args
    if isinstance(args, SFTConfig):
        known = {f.name for f in fields(MeanTeacherConfig) if f.init}
        return MeanTeacherConfig(**{f.name: getattr(args, f.name) for f in fields(args) if f.name in known})
    raise TypeError(f"`args` must be a `MeanTeacherConfig`, got `{type(args).__name__}`.")


def _refuse_what_cannot_work(args, compute_loss_func, train_dataset) -> None:
    if compute_loss_func is not None:
        raise ValueError(
            "`compute_loss_func` replaces the loss that the teacher is part of. Drop it, or use `teacher='none'`."
        )
    if args.label_smoothing_factor > 0:
        raise ValueError(
            f"`label_smoothing_factor={args.label_smoothing_factor}` is not supported with a teacher, whose "
            "probabilities are soft targets already. Set it to 0, or use `teacher='none'`."
        )
    columns = _columns(train_dataset)
    if {"image", "images"} & columns:
        raise ValueError(
            f"The data set has images (columns {sorted(columns)}); the teacher supports text alone. Remove the images, "
            "or use `teacher='none'`."
        )


def _check_peft(model, peft_config, anchor: float) -> None:
    if peft_config is None and not is_peft_model(model):
        raise ValueError(NO_ADAPTER)
    if peft_config is None:
        student_name(model)
    config = peft_config if peft_config is not None else model.active_peft_config
    targets = getattr(config, "target_modules", None)
    if isinstance(targets, (list, set, tuple)) and any(name.split(".")[-1] == "lm_head" for name in targets):
        raise ValueError(
            f"`target_modules={sorted(targets)}` has an adapter on `lm_head`, whose weight the loss multiplies by directly. "
            "Leave it out, or train the whole head with `modules_to_save=['lm_head']`."
        )
    check_adapter(config, anchor)


def _refuse_parallelism(config) -> None:
    """The divergence needs whole sequences and whole logits on each rank."""
    for name, what in (("sp", "sequence (Ulysses)"), ("cp", "context"), ("tp", "tensor")):
        if config is not None and getattr(config, f"{name}_enabled", False):
            raise ValueError(
                f"{what.capitalize()} parallelism (`{name}_size={getattr(config, f'{name}_size')}`) is not supported with "
                f"a teacher. Set `{name}_size=1` and shard with DDP, FSDP2 or DeepSpeed, or use `teacher='none'`."
            )


def _columns(dataset) -> set[str]:
    return set(next(iter(dataset), {})) if dataset is not None else set()


def _check_datasets(train_dataset, eval_dataset, args, formatting_func, data_collator) -> None:
    """Before anything is loaded or tokenized: a format that TRL knows."""
    skipped = (args.dataset_kwargs or {}).get("skip_prepare_dataset", False)
    if train_dataset is None or formatting_func is not None or data_collator is not None or skipped:
        return
    evals = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
    for name, dataset in {"train": train_dataset, **evals}.items():
        if dataset is not None:
            check_columns(_columns(dataset), name, args.dataset_text_field)


def _check_labels(dataset) -> None:
    """TRL drops rows without a labelled token; it does not say when none is left. Of a stream the first rows are read."""
    if isinstance(dataset, Dataset):
        rows = dataset.select_columns("labels") if "labels" in dataset.column_names else ()
        missing = len(rows) > 0 or len(dataset) == 0
    elif isinstance(dataset, IterableDataset):
        rows, missing = itertools.islice(dataset, _STREAM_ROWS), True
    else:
        return
    for row in rows:
        if "labels" not in row or any(label != IGNORE_INDEX for label in row["labels"]):
            return
    if missing:
        raise ValueError(
            "No token of the training data carries a label: every one is masked, or every prompt alone fills "
            "`max_length`. Raise `max_length`, shorten the prompts, or look at `completion_only_loss` and "
            "`assistant_only_loss`."
        )


def _check_free_space(output_dir: str, model) -> None:
    """Room for one checkpoint: student, teacher and the optimizer's two moments in float32."""
    free = shutil.disk_usage(output_dir).free
    needed = 16 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    if free < needed:
        raise OutputError(
            f"`output_dir={output_dir!r}` has {free / 2**20:.0f} MiB free; one checkpoint needs {needed / 2**20:.0f} MiB. "
            "Free some space, or choose another `--output_dir`."
        )
