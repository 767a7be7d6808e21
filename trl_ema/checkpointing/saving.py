"""Writing: the student, what regularizes it, and whole checkpoints of both."""

import contextlib
import os
import shutil
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy
from trl import SFTTrainer

from ..adapters.files import gather_file
from ..adapters.names import STUDENT_NAME
from ..adapters.switching import saved_alone
from ..files import follow_umask
from ..model_card import mend_model_card, without_folder, write_model_card
from ..options import changed
from ..regularizers.base import Regularizer
from ..sharding import any_sharded, reshard
from . import portable
from .folders import STAGING, TRAINER_STATE, publish
from .resuming import deepspeed_plans


class SavingTrainer(SFTTrainer):
    """[`~trl.SFTTrainer`] that writes. See [`CheckpointingTrainer`], which also reads."""

    args: Any
    model: Any
    optimizer: Any
    lr_scheduler: Any
    regularizers: list[Regularizer]
    run_id: str
    _staging: str | None = None  # while a checkpoint is being written
    _saved_step: int | None = None
    _optimizer_groups: list[dict] | None = None  # names of what DeepSpeed flattens

    def check_is_owner(self) -> None:
        """Raises `RuntimeError` if another trainer has the model now."""

    # Models

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        self.check_is_owner()
        folder, writes = output_dir or self.args.output_dir, self.args.should_save
        for regularizer in self.regularizers:  # before the student: that may push the folder to the hub
            if regularizer.folder is None and self._staging is None:  # of use to a run that goes on alone
                continue
            regularizer.save(folder, writes=writes, run_id=self.run_id, step=self.state.global_step)
            if writes and regularizer.folder is not None and self.processing_class is not None:
                # For whoever loads its adapter alone: new tokens are known by it.
                self.processing_class.save_pretrained(os.path.join(folder, regularizer.folder))
        alone = any(regularizer.saves_student_alone for regularizer in self.regularizers)
        with saved_alone(self.model, STUDENT_NAME) if alone else contextlib.nullcontext():
            if is_peft_model(self.model) and any_sharded(self.model):
                # To write an adapter Transformers gathers the whole base, or under FSDP writes none where checkpoints are sharded.
                reshard(self.model)
                self._save(folder, gather_file(self.model, STUDENT_NAME, writes))
                if self.args.push_to_hub and not _internal_call:
                    self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
            else:
                super().save_model(output_dir, _internal_call)
        if writes:
            for name in ("", *getattr(self.model, "peft_config", ())):  # further adapters have folders of their own
                follow_umask(os.path.join(folder, name))
        if self.is_world_process_zero():
            (mend_model_card if _internal_call else write_model_card)(self, folder)

    def create_model_card(  # type: ignore[override]  # as TRL's
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        super().create_model_card(model_name, dataset_name and without_folder(dataset_name), tags)
        if self.is_world_process_zero():
            write_model_card(self, self.args.output_dir)

    # Writing a checkpoint

    def _save_checkpoint(self, model, trial):
        run_dir, name = super()._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = os.path.join(run_dir, STAGING)
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
        placed = (run_dir, name, self.args.save_total_limit, self.state.best_model_checkpoint)
        if self.args.should_save:
            self.state.save_to_json(os.path.join(staging, name, TRAINER_STATE))
            publish(*placed)
            if self.args.push_to_hub:
                self._push_from_checkpoint(os.path.join(run_dir, name))
        self.accelerator.wait_for_everyone()
        # On another machine with a disk of its own, its ranks wrote their part there.
        if self.is_local_process_zero():
            with contextlib.suppress(FileNotFoundError):
                publish(*placed)
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()

    def _get_output_dir(self, trial):
        return self._staging or super()._get_output_dir(trial)

    def _push_from_checkpoint(self, checkpoint_folder):
        if self._staging is not None:  # not whole yet
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        pushes = self.args.hub_strategy != HubStrategy.END and (self.args.hub_always_push or not running)
        for name in [r.folder for r in self.regularizers if r.folder is not None]:
            if pushes and self.is_world_process_zero() and os.path.isdir(os.path.join(checkpoint_folder, name)):
                target = os.path.join(self.args.output_dir, name)
                shutil.copytree(os.path.join(checkpoint_folder, name), target, dirs_exist_ok=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        if self.is_deepspeed_enabled and not deepspeed_plans(self) and is_peft_model(self.model):
            self._optimizer_groups = portable.group_names(optimizer, self.model)
        return optimizer

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
