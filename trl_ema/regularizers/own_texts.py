"""The texts of a run that the model before training has written itself: found, or written when training begins."""

import logging
import os
from typing import Any

from ..adapters.starting_point import StartingPoint
from ..config import MeanTeacherConfig
from ..texts import Sampling, Texts, load_texts, model_fingerprint, save_texts, texts_path, write_texts


logger = logging.getLogger(__name__)

# The texts, beside a run.
FILE = "rehearsal.safetensors"


class OwnTexts:
    """
    Self-written texts of the model before training, for whichever regularizer asks; they are written once.

    Args:
        model (`PeftModel`): Its adapter is about to be trained.
        args ([`MeanTeacherConfig`]): `rehearsal_texts`, `rehearsal_num_texts`, `rehearsal_num_tokens` and `rehearsal_start`.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        start ([`StartingPoint`]): The model before training.

    Raises:
        FileNotFoundError, ValueError: The texts that the user gives, or that are at hand, are not there, damaged, or another model's.
    """

    def __init__(self, model: Any, args: MeanTeacherConfig, tokenizer: Any, start: StartingPoint):
        self.model, self.args, self.tokenizer, self.start = model, args, tokenizer, start
        self.sampling = Sampling(
            num_texts=args.rehearsal_num_texts,
            num_tokens=args.rehearsal_num_tokens,
            start_token=args.rehearsal_start,
        )
        self.fingerprint = model_fingerprint(model, tokenizer, start.activate)
        found = next((path for path in self._paths() if os.path.isfile(path)), args.rehearsal_texts)
        self.at_hand = None if found is None else load_texts(found, model_fingerprint=self.fingerprint)

    def _paths(self) -> list[str]:
        """Where texts may lie: where the user says, else beside the run or in the cache."""
        if self.args.rehearsal_texts is not None:
            return [self.args.rehearsal_texts]
        return [os.path.join(str(self.args.output_dir), FILE), str(texts_path(self.fingerprint, self.sampling))]

    def get(self, trainer: Any) -> Texts:
        """The texts, which the model writes now where none are at hand; they are kept beside the run. Called on all ranks."""
        if self.at_hand is None:
            self.at_hand = self._write(trainer)
        beside = os.path.join(str(self.args.output_dir), FILE)
        if trainer.is_world_process_zero() and not os.path.isfile(beside):
            save_texts(self.at_hand, beside)
        return self.at_hand

    def _write(self, trainer: Any) -> Texts:
        accelerator, path = trainer.accelerator, self._paths()[-1]
        logger.info("The model writes %d texts, once, into %s", self.sampling.num_texts, path)
        with trainer.precision():
            return write_texts(
                self.model, self.tokenizer, self.sampling, path, before=self.start.activate, fingerprint=self.fingerprint,
                rank=accelerator.process_index, world_size=accelerator.num_processes, barrier=accelerator.wait_for_everyone,
            )  # fmt: skip
