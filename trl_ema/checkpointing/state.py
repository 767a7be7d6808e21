"""What a run must know that is no tensor, and when the regularizers are asked."""

import logging
import os
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checks import check_best_metric, check_drift_is_watched
from ..regularizers.micro_batch import TokenMean
from ..sharding import local_shard
from .resuming import STATE_KEY, states_of


logger = logging.getLogger(__name__)


class RegularizerCallback(TrainerCallback):
    """Calls the regularizers, and carries what a resumed run must know through `trainer_state.json`."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kept: Any = state.stateful_callbacks  # a dict by now
        trainer, saved = self.trainer, kept.get(STATE_KEY, {})
        check_drift_is_watched(trainer)
        check_best_metric(trainer)
        if trainer.resumed_from is not None:
            # Here in every mode: DeepSpeed and FSDP load a checkpoint after they have wrapped the model.
            trainer.last_good_checkpoint = trainer.resumed_from
            for regularizer in trainer.regularizers:
                regularizer.load(trainer.resumed_from)
        if saved:
            # TRL starts counting anew at each resume.
            trainer._total_train_tokens = saved["num_tokens"]
            trainer.run_id = saved["run_id"]
        states = states_of(saved)
        lost = sorted(set(states) - {regularizer.name for regularizer in trainer.regularizers})
        if lost:
            logger.warning(
                "The checkpoint was made with %s, this run goes on without. Resume with the options it was started with to end as "
                "it would have ended.", ", ".join(lost),
            )  # fmt: skip
        trainer.ce_mean = TokenMean()
        for regularizer in trainer.regularizers:
            regularizer.begin(trainer, states.get(regularizer.name))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # A finite loss can still have had gradients that were not. Each rank looks at its own shards.
        finite = all(local_shard(p).isfinite().all() for p in model.parameters() if p.requires_grad)
        if self.trainer.accelerator.gather(torch.tensor(finite, device=args.device)).all():
            folder = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            self.trainer.last_good_checkpoint = os.path.join(str(args.output_dir), folder)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer.after_step()
        kept: Any = state.stateful_callbacks  # a dict by now
        kept[STATE_KEY] = {
            "run_id": self.trainer.run_id,
            "num_tokens": self.trainer._total_train_tokens,
            "regularizers": {regularizer.name: regularizer.state() for regularizer in self.trainer.regularizers},
        }
