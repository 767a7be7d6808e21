"""`SFTTrainer` whose checkpoints are whole, hold all that regularizes it, and can be read under any launch."""

import os
import uuid
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, is_peft_model
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import TrainOutput

from ..adapters.names import trained_names
from ..files import finish_replacing
from ..options import changed
from ..workarounds import dtypes_kept
from . import portable
from .folders import last_checkpoint
from .resuming import check_checkpoint, check_weights, load_student, reads
from .saving import SavingTrainer
from .signals import StopOnSignal


class CheckpointingTrainer(SavingTrainer):
    """
    [`~trl.SFTTrainer`] with a list of [`Regularizer`]s.

    - A checkpoint is written under another name and renamed when it is whole.
    - It holds the student as PEFT saves it, what the regularizers save, and the optimizer in the layout of a plain run
      beside what DeepSpeed or FSDP write for themselves: see `portable.py`.
    - Before anything is loaded it is known to be whole and of this model and run.
    - With `enable_jit_checkpoint`, SIGTERM and SIGINT save one and stop.
    """

    def _init_checkpoints(self) -> None:
        # The same on all ranks, and kept by resumed runs.
        self.run_id = broadcast_object_list([uuid.uuid4().hex])[0]
        self.stopped_by = 0  # the signal that ended the last training
        self.last_good_checkpoint: str | None = None
        self.resumed_from: str | None = None
        self._on_signal: StopOnSignal | None = None
        if self.args.enable_jit_checkpoint:
            theirs: Any = self.pop_callback(JITCheckpointCallback)
            theirs.on_train_end(self.args, self.state, self.control)  # gives the signal back
            self._on_signal = StopOnSignal(self)
            self.add_callback(self._on_signal)

    # Reading one

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
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
            check_checkpoint(self, resume_from_checkpoint)
        self.resumed_from = resume_from_checkpoint or None
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            if self._on_signal is not None:
                self._on_signal.restore()

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
        if folder is None or not sharded or not is_peft_model(self.model) or reads(self, folder):
            return super()._prepare_for_training(max_steps, train_dataloader, folder)
        # As in a plain run: the weights before the model is wrapped, the optimizer after.
        weights = load_student(self.model, folder)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        saved = torch.load(os.path.join(folder, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
        if self._optimizer_groups is not None:
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
        if is_peft_model(self.model) and not reads(self, resume_from_checkpoint):
            load_student(self.model, resume_from_checkpoint)
            return
        with dtypes_kept(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        best = str(self.state.best_model_checkpoint)
        check_weights(self, best, self.run_id, int(self.state.best_global_step or 0))
        if is_peft_model(self.model) and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            # Not by DeepSpeed or FSDP: it may be of another launch.
            weights = load_student(self.model, best)
            if self.is_deepspeed_enabled:
                for name, whole in weights.items():
                    portable.set_zero_value(self.model.get_parameter(name), whole)
        else:
            with dtypes_kept(self.model):
                super()._load_best_model()
        for regularizer in self.regularizers:
            regularizer.load(best)

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
        stops = bool(self.stopped_by) or (self.control.should_save and self.control.should_training_stop)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **kwargs)
        # `save_strategy="best"` decides anew, after an evaluation, whether to save.
        if stops and self._saved_step != self.state.global_step:
            self._save_checkpoint(model, trial)

    def _finalize_training(self, *args, **kwargs):
        # A run that was stopped goes on from its last checkpoint, which may not be its best.
        kept = {"save_total_limit": None, "load_best_model_at_end": False} if self.stopped_by else {}
        with changed(self.args, **kept):
            return super()._finalize_training(*args, **kwargs)
