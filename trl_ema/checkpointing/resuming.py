"""Before anything is loaded from a checkpoint: that it is whole, of this model and run, and can be read under this launch."""

import glob
import os
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import TrainerState

from ..adapters.files import check_adapter_file, read_student
from ..adapters.names import STUDENT_NAME
from ..sharding import reshard, write_whole
from . import portable
from .folders import TRAINER_STATE


# Of what a run must know that is no tensor, in `trainer_state.json`.
STATE_KEY = "trl_ema"


def states_of(saved: dict) -> dict[str, dict]:
    """By the regularizers' names; of a checkpoint from before there were several, the schedule of its teacher."""
    if saved.get("schedule"):
        return {"teacher": {"schedule": saved["schedule"], "weight": {}}}
    return saved.get("regularizers", {})


def check_checkpoint(trainer: Any, folder: str) -> None:
    """Raises `ValueError` unless this run can go on from the checkpoint in `folder`; says why and what to do."""
    state = os.path.join(folder, TRAINER_STATE)
    if not os.path.isfile(state):
        raise ValueError(
            f"{folder!r} is no checkpoint: there is no {TRAINER_STATE} in it. Give a `checkpoint-*` folder of the run."
        )
    saved = TrainerState.load_from_json(state)
    ours = saved.stateful_callbacks.get(STATE_KEY, {})
    check_weights(trainer, folder, ours.get("run_id"), saved.global_step)
    states = states_of(ours)
    for regularizer in trainer.regularizers:
        if regularizer.name in states:
            regularizer.check_state(states[regularizer.name])
    if not glob.glob(os.path.join(glob.escape(folder), "rng_state*.pth")):
        raise ValueError(
            f"{folder!r} has no random state (rng_state*.pth), so dropout and data would not go on as they were: it was "
            "saved with `save_only_model`, or is half deleted. Resume from another checkpoint, or start anew from its "
            "adapter with `PeftModel.from_pretrained`."
        )
    if is_peft_model(trainer.model) and (portable.format_of(folder) == portable.PLAIN or not reads(trainer, folder)):
        _check_optimizer(trainer, folder)


def check_weights(trainer: Any, folder: str, run_id: str | None, step: int) -> None:
    """Raises `ValueError` unless `folder` holds student and regularizers of this model, saved in this run at this step."""
    if is_peft_model(trainer.model) and trainer.model.active_adapters == [STUDENT_NAME]:
        check_adapter_file(trainer.model, STUDENT_NAME, folder, "Student")
    for regularizer in trainer.regularizers:
        regularizer.check(folder, run_id=run_id, step=step)


def _check_optimizer(trainer: Any, folder: str) -> None:
    """Where it is read in the plain layout, and not as Transformers, DeepSpeed or FSDP read their own."""
    plans = deepspeed_plans(trainer)
    if plans:
        raise ValueError(
            f"{folder!r} was not written under this launch, and DeepSpeed's config describes its own "
            f"{plans}, which cannot be filled from it. Leave that to the trainer's options, or launch "
            "as it was launched then."
        )
    missing = [name for name in (OPTIMIZER_NAME, SCHEDULER_NAME) if not os.path.isfile(os.path.join(folder, name))]
    if missing:
        raise ValueError(
            f"{folder!r} has no {' and no '.join(missing)}: it was saved with `save_only_model`, or by DeepSpeed with an "
            "optimizer of its own. Resume from another checkpoint, launch as it was launched then, or start anew from its "
            "adapter with `PeftModel.from_pretrained`."
        )


def deepspeed_plans(trainer: Any) -> list[str]:
    """What of optimizer and schedule DeepSpeed's own config describes; only DeepSpeed can save and load that."""
    if not trainer.is_deepspeed_enabled:
        return []
    config = trainer.accelerator.state.deepspeed_plugin.deepspeed_config or {}
    return [name for name in ("optimizer", "scheduler") if name in config]


def reads(trainer: Any, folder: str) -> bool:
    """Whether the launch of this run wrote `folder`, or one that reads it alike."""
    made_by = portable.format_of(folder)
    if trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        return made_by == portable.DEEPSPEED and portable.is_readable_by(stage, trainer.args.world_size, folder)
    if trainer.is_fsdp_enabled:
        return made_by in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    return made_by == portable.PLAIN


@torch.no_grad()
def load_student(model: Any, folder: str) -> dict[str, torch.Tensor]:
    """From the adapter file, and in float32 from DeepSpeed's master weights where they are; returns them by name."""
    weights = read_student(model, folder)
    optimizer = os.path.join(folder, OPTIMIZER_NAME)
    if portable.format_of(folder) == portable.DEEPSPEED and os.path.isfile(optimizer):
        saved = torch.load(optimizer, map_location="cpu", weights_only=True, mmap=True)
        weights |= saved.get(portable.MASTER, {})
    reshard(model)
    for name, whole in weights.items():
        write_whole(model.get_parameter(name), whole)
    return {name: whole for name, whole in weights.items() if model.get_parameter(name).requires_grad}
