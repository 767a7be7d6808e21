"""The texts of a run that the model before training has written itself: found, or written when training begins."""

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..adapters.starting_point import StartingPoint
from ..config import MeanTeacherConfig
from ..fingerprint import model_fingerprint, tokenizer_fingerprint
from ..texts import (
    Sampling,
    Texts,
    check_sampling,
    load_texts,
    save_texts,
    texts_path,
    write_texts,
)


logger = logging.getLogger(__name__)

# The texts, beside a run.
FILE = "rehearsal.safetensors"


def sampling_of(args: MeanTeacherConfig) -> Sampling:
    """How the texts are drawn."""
    return Sampling(
        num_texts=args.rehearsal_num_texts,
        num_tokens=args.rehearsal_num_tokens,
        start_token=args.rehearsal_start,
        chat=args.rehearsal_chat,
    )


def may_be_at_hand(args: MeanTeacherConfig, tokenizer: Any = None) -> bool:
    """
    Whether texts are given, lie beside the run, or in the cache those of a model with this tokenizer. Whether they are this very
    model's takes its weights to say.

    Args:
        args ([`MeanTeacherConfig`]): See [`OwnTexts`].
        tokenizer (`PreTrainedTokenizerBase`, *optional*): By default any.
    """
    if args.rehearsal_texts is not None or os.path.isfile(os.path.join(str(args.output_dir), FILE)):
        return True
    theirs = "*" if tokenizer is None else tokenizer_fingerprint(tokenizer)
    cached = texts_path(f"*-{theirs}", sampling_of(args))
    return any(cached.parent.glob(cached.name))


class OwnTexts:
    """
    Self-written texts of the model before training, for whichever regularizer asks; they are written once.

    Args:
        model (`PeftModel`): Its adapter is about to be trained.
        args ([`MeanTeacherConfig`]): `rehearsal_texts`, `rehearsal_num_texts`, `rehearsal_num_tokens`, `rehearsal_start` and
            `rehearsal_chat`.
        tokenizer (`PreTrainedTokenizerBase`): Of the model.
        start ([`StartingPoint`]): The model before training.

    Raises:
        FileNotFoundError, ValueError: The texts that the user gives, or that are at hand, are not there, damaged, or another model's.
    """

    def __init__(self, model: Any, args: MeanTeacherConfig, tokenizer: Any, start: StartingPoint):
        self.model, self.args, self.tokenizer, self.start = model, args, tokenizer, start
        self.sampling = sampling_of(args)
        if not may_be_at_hand(args, tokenizer):  # before all weights are read
            check_sampling(model, tokenizer, self.sampling)
        self.fingerprint = model_fingerprint(model, tokenizer, start.activate)
        self.at_hand = self._find()
        if self.at_hand is None:
            check_sampling(model, tokenizer, self.sampling)

    def _find(self) -> Texts | None:
        given, beside = self.args.rehearsal_texts, os.path.join(str(self.args.output_dir), FILE)
        if given is not None:
            return load_texts(given, model_fingerprint=self.fingerprint)
        if os.path.isfile(beside):
            texts = load_texts(beside, model_fingerprint=self.fingerprint)
            if texts.about["sampling"] == asdict(self.sampling):
                return texts
            logger.info("%s holds texts of another sampling, %s: they are not used.", beside, texts.about["sampling"])
        return load_texts(self._cached, model_fingerprint=self.fingerprint) if self._cached.is_file() else None

    @property
    def _cached(self) -> Path:
        return texts_path(self.fingerprint, self.sampling)

    def get(self, trainer: Any) -> Texts:
        """The texts, which the model writes now where none are at hand. Called on all ranks."""
        # Another job may have finished the same ones after some of the ranks had looked: all go the same way.
        missing = torch.tensor(self.at_hand is None, device=self.args.device)
        if trainer.accelerator.gather(missing).any() or self.at_hand is None:
            self.at_hand = self._write(trainer)
        assert self.at_hand is not None
        return self.at_hand

    def keep_beside(self, trainer: Any) -> None:
        """The texts of [`get`] lie beside the run from now on, in the place of others."""
        beside = os.path.join(str(self.args.output_dir), FILE)
        assert self.at_hand is not None
        if trainer.is_world_process_zero() and not _holds(beside, self.at_hand):
            save_texts(self.at_hand, beside)

    def _write(self, trainer: Any) -> Texts:
        accelerator, path = trainer.accelerator, self._cached
        logger.info("The model writes %d texts, once, into %s", self.sampling.num_texts, path)
        with trainer.precision():
            return write_texts(
                self.model, self.tokenizer, self.sampling, path, before=self.start.activate, fingerprint=self.fingerprint,
                rank=accelerator.process_index, world_size=accelerator.num_processes, barrier=accelerator.wait_for_everyone,
            )  # fmt: skip


def _holds(path: str, texts: Texts) -> bool:
    """Whether a file has these texts, and not others, nothing or something damaged."""
    try:
        return load_texts(path) == texts
    except (FileNotFoundError, ValueError):
        return False
