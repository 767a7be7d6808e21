"""What the trainer writes and reads: whole checkpoints with the teacher in them, for any launch, and stops in between."""

import contextlib
import glob
import logging
import os
import shutil
import signal
import uuid
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import TrainerState
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, get_last_checkpoint, sort_checkpoints

from . import portable
from .files import finish_replacing, follow_umask, remove_folder, replace_folder
from .model_card import mend_model_card, without_folder, write_model_card
from .sharding import any_sharded, reshard, write_whole
from .teacher import TEACHER_NAME, MeanTeacher, check_adapter_file, gather_file, read_student, trained_names


logger = logging.getLogger(__name__)

# A checkpoint that is being written. Pushes to the hub leave out what begins with an underscore.
_STAGING = "_checkpoint.part"
_TRAINER_STATE = "trainer_state.json"
STATE_KEY = "trl_ema"


def last_checkpoint(args: TrainingArguments) -> str | None:
    """The newest whole checkpoint in `args.output_dir`, the same on all ranks. Called on all ranks."""
    if args.local_process_index == 0:
        finish_replacing(args.output_dir)
    found = None
    if args.process_index == 0 and os.path.isdir(args.output_dir):
        found = get_last_checkpoint(args.output_dir)
        _warn_of_another_branch(args.output_dir, found)
    return broadcast_object_list([found])[0]


def _warn_of_another_branch(output_dir: str, latest: str | None) -> None:
    """A run that went on from an earlier checkpoint has written since, but not as far."""
    states = list(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{_TRAINER_STATE}"))
    newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
    if latest is not None and newest is not None and newest.parent != Path(latest):
        logger.warning(
            "%s is the latest step in %s, but %s was written after it. To go on from that one give "
            "`resume_from_checkpoint` its path.", os.path.basename(latest), output_dir, newest.parent.name,
        )  # fmt: skip


class CheckpointMixin(Trainer):
    """
    For a [`~transformers.Trainer`] with a [`MeanTeacher`] (or `None`) in `teacher`, and `check_is_owner`, which raises where
    another trainer has its model now.

    - A checkpoint is written under another name and renamed when it is whole.
    - It holds the student as PEFT saves it, `teacher/`, and the optimizer in the layout of a plain run beside what
      DeepSpeed or FSDP write for themselves: see `portable.py`.
    - Before anything is loaded it is known to be whole and of this model and run.
    - With `enable_jit_checkpoint`, SIGTERM and SIGINT save one and stop.
    """

    args: Any
    model: Any
    optimizer: Any

    @property
    def teacher(self) -> MeanTeacher | None:
        raise NotImplementedError

    def check_is_owner(self) -> None:
        raise NotImplementedError

    def _init_checkpoints(self) -> None:
        # The same on all ranks, and kept by resumed runs.
        self.run_id = broadcast_object_list([uuid.uuid4().hex])[0]
        self.stopped_by = 0  # the signal that ended the last training
        self.last_good_checkpoint = None
        self.resumed_from = self._staging = self._saved_step = None
        self._optimizer_groups: list[dict] | None = None  # names of what DeepSpeed flattens
        self._on_signal = None
        if self.args.enable_jit_checkpoint:
            theirs = self.pop_callback(JITCheckpointCallback)
            theirs.on_train_end(self.args, self.state, self.control)  # gives the signal back
            self._on_signal = _StopOnSignal(self)
            self.add_callback(self._on_signal)

    # Models

    def save_model(self, output_dir=None, _internal_call=False):
        self.check_is_owner()
        folder = output_dir or self.args.output_dir
        with contextlib.ExitStack() as stack:
            if self.teacher is not None:
                # Before the student: that may push the folder to the hub.
                origin = dict(run_id=self.run_id, step=self.state.global_step)
                self.teacher.save(folder, writes=self.args.should_save, **origin)
                if self.args.should_save and not self.teacher.is_base and self.processing_class is not None:
                    # For whoever loads the teacher alone: new tokens are known by it.
                    self.processing_class.save_pretrained(os.path.join(folder, TEACHER_NAME))
                stack.enter_context(self.teacher.hidden())
            if is_peft_model(self.model) and any_sharded(self.model):
                self._save_sharded_student(folder, _internal_call)
            else:
                super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            for name in ("", *getattr(self.model, "peft_config", ())):  # further adapters have folders of their own
                follow_umask(os.path.join(folder, name))
        if self.is_world_process_zero():
            (mend_model_card if _internal_call else write_model_card)(self, folder)

    def _save_sharded_student(self, folder, _internal_call):
        """To write an adapter Transformers gathers the whole base, or under FSDP writes none where checkpoints are sharded."""
        reshard(self.model)
        self._save(folder, gather_file(self.model, "default", self.args.should_save))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name and without_folder(dataset_name), tags)
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir)

    # Writing a checkpoint

    def _save_checkpoint(self, model, trial):
        run_dir, name = super()._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = os.path.join(run_dir, _STAGING)
        if self.is_local_process_zero():
            shutil.rmtree(staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._staging = staging
        try:
            with changed(self.args, save_total_limit=None):  # older ones go when this one is there
                super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        self.accelerator.wait_for_everyone()
        best = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if self.state.best_global_step == self.state.global_step or os.path.isdir(best):
            self.state.best_model_checkpoint = best
        if self.args.should_save:
            self.state.save_to_json(os.path.join(staging, name, _TRAINER_STATE))
            self._publish_checkpoint(run_dir, name)
            if self.args.push_to_hub:
                self._push_from_checkpoint(os.path.join(run_dir, name))
        self.accelerator.wait_for_everyone()
        # On another machine with a disk of its own, its ranks wrote their part there.
        if self.is_local_process_zero():
            with contextlib.suppress(FileNotFoundError):
                self._publish_checkpoint(run_dir, name)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _publish_checkpoint(self, run_dir, name):
        replace_folder(os.path.join(run_dir, _STAGING, name), os.path.join(run_dir, name))
        shutil.rmtree(os.path.join(run_dir, _STAGING))
        limit, kept = self.args.save_total_limit, self.state.best_model_checkpoint
        if not limit or limit < 0:
            return
        checkpoints = sort_checkpoints(run_dir, use_mtime=True)
        old = [path for path in checkpoints[:-1] if kept is None or path != str(Path(kept))]
        # As Transformers rotates them, but no half of one keeps its name when a kill comes in between.
        for path in old[: max(0, len(checkpoints) - limit)]:
            remove_folder(path)

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is not None:  # not whole yet
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        pushes = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not running)
        teacher = os.path.join(checkpoint_folder, TEACHER_NAME)
        if pushes and self.is_world_process_zero() and os.path.isdir(teacher):
            shutil.copytree(teacher, os.path.join(self.args.output_dir, TEACHER_NAME), dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled and not self._deepspeed_plans() and is_peft_model(self.model):
            self._optimizer_groups = portable.group_names(optimizer, self.model)
        return optimizer

    def _deepspeed_plans(self) -> list[str]:
        """What of optimizer and schedule DeepSpeed's own config describes; only DeepSpeed can save and load that."""
        config = self.accelerator.state.deepspeed_plugin.deepspeed_config or {}
        return [name for name in ("optimizer", "scheduler") if name in config]

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        keep, groups, state = self.args.should_save, self._optimizer_groups, None
        if groups is not None:
            state = portable.zero_state_dict(self.model_wrapped, groups, keep)
            schedule = portable.schedule_for(len(groups), self.lr_scheduler.state_dict())
            if keep:
                torch.save(schedule, os.path.join(output_dir, SCHEDULER_NAME))
        elif self.is_fsdp_enabled and is_peft_model(self.model):
            state = portable.gathered_state_dict(self.optimizer, keep)
        if state is not None:
            torch.save(state, os.path.join(output_dir, OPTIMIZER_NAME))

    # Reading one

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        self.check_is_owner()
        # A run that starts anew leaves alone what others left in its folder.
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"There is no checkpoint in {self.args.output_dir!r} to resume from. Start without "
                    "`resume_from_checkpoint`, or give the `output_dir` of the interrupted run."
                )
        elif resume_from_checkpoint:
            if self.args.local_process_index == 0:
                finish_replacing(os.path.dirname(os.path.abspath(resume_from_checkpoint)))
            self.accelerator.wait_for_everyone()
        if resume_from_checkpoint:
            self._check_checkpoint(resume_from_checkpoint)
        self.resumed_from = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._on_signal is not None:
                self._on_signal.restore()

    def _check_checkpoint(self, folder):
        """Before anything is loaded: that the checkpoint is whole, of this model, and can be read under this launch."""
        state = os.path.join(folder, _TRAINER_STATE)
        if not os.path.isfile(state):
            raise ValueError(
                f"{folder!r} is no checkpoint: there is no {_TRAINER_STATE} in it. Give a `checkpoint-*` folder of the run."
            )
        self._check_weights(folder)
        if self.teacher is not None:
            saved = TrainerState.load_from_json(state)
            saved_run = saved.stateful_callbacks.get(STATE_KEY, {}).get("run_id")
            self.teacher.check_origin(folder, run_id=saved_run, step=saved.global_step)
        if not glob.glob(os.path.join(glob.escape(folder), "rng_state*.pth")):
            raise ValueError(
                f"{folder!r} has no random state (rng_state*.pth), so dropout and data would not go on as they were: it was "
                "saved with `save_only_model`, or is half deleted. Resume from another checkpoint, or start anew from its "
                "adapter with `PeftModel.from_pretrained`."
            )
        made_by = portable.format_of(folder)
        if not is_peft_model(self.model) or (made_by != portable.PLAIN and self._reads(folder)):
            return  # as Transformers, DeepSpeed or FSDP read it
        if self.is_deepspeed_enabled and self._deepspeed_plans():
            raise ValueError(
                f"{folder!r} was not written under this launch, and DeepSpeed's config describes its own "
                f"{self._deepspeed_plans()}, which cannot be filled from it. Leave that to the trainer's options, or launch "
                "as it was launched then."
            )
        missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not os.path.isfile(os.path.join(folder, name))]
        if missing:
            raise ValueError(
                f"{folder!r} has no {' and no '.join(missing)}: it was saved with `save_only_model`, or by DeepSpeed with an "
                "optimizer of its own. Resume from another checkpoint, launch as it was launched then, or start anew from its "
                "adapter with `PeftModel.from_pretrained`."
            )

    def _check_weights(self, folder):
        if self.teacher is not None:
            self.teacher.check_checkpoint(folder)
        elif is_peft_model(self.model) and self.model.active_adapters == ["default"]:
            check_adapter_file(self.model, "default", folder, "Student")

    def _reads(self, folder):
        """Whether the launch of this run wrote `folder`, or one that reads it alike."""
        made_by = portable.format_of(folder)
        if self.is_deepspeed_enabled:
            stage = self.accelerator.state.deepspeed_plugin.zero_stage
            return made_by == portable.DEEPSPEED and portable.is_readable_by(stage, self.args.world_size, folder)
        if self.is_fsdp_enabled:
            return made_by in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return made_by == portable.PLAIN

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        trained = trained_names(self.model)
        prepared = self._prepare_and_load(max_steps, train_dataloader, resume_from_checkpoint)
        renamed = [pair for pair in zip(trained, trained_names(self.model), strict=True) if pair[0] != pair[1]]
        if renamed and is_peft_model(self.model):
            raise ValueError(
                f"The launch wrapped the layers of the model: {renamed[0][0]!r} has become {renamed[0][1]!r}, and PEFT would find "
                "no adapter to save. Use `gradient_checkpointing` instead of `fsdp_activation_checkpointing`, and "
                "`torch_compile` instead of accelerate's regional compilation."
            )
        return prepared

    def _prepare_and_load(self, max_steps, train_dataloader, folder):
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        if folder is None or not sharded or not is_peft_model(self.model) or self._reads(folder):
            return super()._prepare_for_training(max_steps, train_dataloader, folder)
        # As in a plain run: the weights before the model is wrapped, the optimizer after.
        weights = self._load_student(folder)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        saved = torch.load(os.path.join(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        if self.is_deepspeed_enabled:
            portable.load_zero_state_dict(self.model_wrapped, self._optimizer_groups, saved, weights)
        else:
            portable.load_gathered_state_dict(self.optimizer, saved)
            self._load_scaler(folder)
        self._load_schedule(folder)
        return prepared

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or self._optimizer_groups is None:
            return super()._load_optimizer_and_scheduler(checkpoint)
        self._load_schedule(checkpoint)  # DeepSpeed has loaded the optimizer

    def _load_schedule(self, folder):
        saved = torch.load(os.path.join(folder, SCHEDULER_NAME), weights_only=True)
        self.lr_scheduler.load_state_dict(portable.schedule_for(len(self.lr_scheduler.base_lrs), saved))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if is_peft_model(self.model) and not self._reads(resume_from_checkpoint):
            self._load_student(resume_from_checkpoint)
            return
        with _dtypes_kept(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    @torch.no_grad()
    def _load_student(self, folder):
        """From the adapter file, and in float32 from DeepSpeed's master weights where they are; returns them by name."""
        weights = read_student(self.model, folder)
        optimizer = os.path.join(folder, OPTIMIZER_NAME)
        if portable.format_of(folder) == portable.DEEPSPEED and os.path.isfile(optimizer):
            saved = torch.load(optimizer, map_location="cpu", weights_only=True, mmap=True)
            weights |= saved.get(portable.MASTER, {})
        reshard(self.model)
        for name, whole in weights.items():
            write_whole(self.model.get_parameter(name), whole)
        return {name: whole for name, whole in weights.items() if self.model.get_parameter(name).requires_grad}

    def _load_best_model(self):
        best = self.state.best_model_checkpoint
        self._check_weights(best)
        if self.teacher is not None:
            self.teacher.check_origin(best, run_id=self.run_id, step=self.state.best_global_step)
        if is_peft_model(self.model) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # Not by DeepSpeed or FSDP: it may be of another launch.
            weights = self._load_student(best)
            if self.is_deepspeed_enabled:
                for name, whole in weights.items():
                    portable.set_zero_value(self.model.get_parameter(name), whole)
        else:
            with _dtypes_kept(self.model):
                super()._load_best_model()
        if self.teacher is not None:
            self.teacher.load(best)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended
            self.control.should_training_stop = True
            return None
        return super()._run_epoch(*args, **kwargs)

    # Stopping in between

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, model, trial, *args, **kwargs):
        if self.stopped_by and self.control.should_evaluate:
            # An evaluation may take longer than whoever sent the signal waits: what is saved now is replaced after it.
            self._save_checkpoint(model, trial)
            self._saved_step = None
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        # `save_strategy="best"` decides anew, after an evaluation, whether to save.
        if self.stopped_by and self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)

    def _finalize_training(self, *args, **kwargs):
        # A run that was stopped goes on from its last checkpoint, which may not be its best.
        kept = {"save_total_limit": None, "load_best_model_at_end": False} if self.stopped_by else {}
        with changed(self.args, **kept):
            return super()._finalize_training(*args, **kwargs)


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

    def on_epoch_end(self, args, state, control, **kwargs):
        # A stop within an epoch ends it here: what is due at its end is due when the resumed run gets there.
        if self.trainer.stopped_by and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_save = False

    def restore(self):
        """Gives the signals back, and one that came after the last step to whom it is due now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.signal and not self.trainer.stopped_by:
            signal.raise_signal(self.signal)


@contextlib.contextmanager
def changed(holder, **values):
    """Within this context `holder` has other attributes."""
    before = {name: getattr(holder, name) for name in values}
    try:
        for name, value in values.items():
            setattr(holder, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(holder, name, value)


@contextlib.contextmanager
def _dtypes_kept(model):
    """PEFT upcasts an adapter when it loads it; TRL trains 4-bit models' adapters in bfloat16."""
    before = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    yield
    for name, dtype in before.items():
        parameter = model.get_parameter(name)  # PEFT may have put a new one there
        parameter.data = parameter.data.to(dtype)
