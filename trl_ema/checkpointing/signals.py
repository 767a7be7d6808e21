"""Stops by a signal, at the end of a step and with a checkpoint."""

import logging
import signal
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


logger = logging.getLogger(__name__)


class StopOnSignal(TrainerCallback):
    """
    `enable_jit_checkpoint`: SIGTERM and SIGINT save a checkpoint at the end of the step, and training stops.

    Instead of Transformers' own callback, which knows SIGTERM alone, may save in the middle of a step, before random
    numbers were used that the resumed run then draws again, and lets each rank stop at a step of its own.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, trainer: Any):
        self.trainer, self.signal = trainer, 0
        self._before: dict[signal.Signals, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.signal = self.trainer.stopped_by = 0
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        logger.warning("%s: saving a checkpoint at the end of this step.", signal.Signals(number).name)
        self.signal = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # The ranks agree: a signal may have reached one of them, or each at another step.
        number = int(self.trainer.accelerator.gather(torch.tensor(self.signal, device=args.device)).max())
        if number:
            self.trainer.stopped_by = number
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # A stop within an epoch ends it here: what is due at its end is due when the resumed run gets there.
        if self.trainer.stopped_by and not float(state.epoch).is_integer():
            control.should_evaluate = control.should_save = False

    def restore(self) -> None:
        """Gives the signals back, and one that came after the last step to whom it is due now."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.signal and not self.trainer.stopped_by:
            signal.raise_signal(self.signal)
