"""A training's run in its trackers: its group in trackio, and the figures that are measured when it has ended."""

import os
from collections.abc import Mapping
from typing import Any

from transformers import Trainer, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


# Where Weights & Biases looks for it; in trackio a run has the same one.
RUN_GROUP = "WANDB_RUN_GROUP"


class GroupedTrackioCallback(TrackioCallback):
    """
    transformers' own, whose run belongs to the group that `WANDB_RUN_GROUP` names, as that of Weights & Biases does. A run without a
    name keeps the one that trackio gave it, so that what is logged when the training has ended finds it.
    """

    def setup(self, args: TrainingArguments, state: TrainerState, model: Any, **kwargs: Any) -> None:
        super().setup(args, state, model, **kwargs)
        if state.is_world_process_zero:
            import trackio

            run: Any = trackio.context_vars.current_run.get()
            args.run_name = run.name
            # As `trackio.init(group=...)` keeps it, which transformers does not give.
            run.group = run.config["_Group"] = os.environ.get(RUN_GROUP)


def group_run(trainer: Trainer) -> None:
    """The run of this training belongs to a group in trackio too, if it is logged there, see [`GroupedTrackioCallback`]."""
    if trainer.pop_callback(TrackioCallback) is not None:
        trainer.add_callback(GroupedTrackioCallback())


def final_figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Loss and drift of `metrics.json` as trackers have them: `eval/before_domain_loss`, `eval/student_general_drift`, ..."""
    return {
        f"eval_{who}_{group}_{name}": values[key]
        for who in ("before", "student", "teacher")
        for group, values in metrics.get(who, {}).items()
        for name, key in (("loss", "loss"), ("drift", "kl_base_model"))
    }


def log_when_ended(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """
    Log figures to the run of a training that has ended, on its first process: in trackio and TensorBoard, which go on with a run by its
    name or folder, and Weights & Biases, which is open still. Other trackers would begin another run, and are left out.

    Args:
        figures: By name, as a trainer logs them: `eval_NAME` is shown as `eval/NAME`.
    """
    for callback in trainer.callback_handler.callbacks if figures else ():
        now = (trainer.args, trainer.state, trainer.control)
        if isinstance(callback, TrackioCallback | TensorBoardCallback | WandbCallback):
            callback.on_log(*now, model=trainer.model, logs=dict(figures))
        if isinstance(callback, TrackioCallback | TensorBoardCallback):  # opened once more
            callback.on_train_end(*now, model=trainer.model)
