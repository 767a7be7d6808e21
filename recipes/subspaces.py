"""
Adapt a language model within a sub-space that leaves the base's main directions alone: OSF, CorDA or OFT, by PEFT.

    python recipes/subspaces.py --subspace osf --effective_rank 0.9 --config FILE.yaml

Takes every option of `recipes/medical_ema.py`, and those below, on the command line or in the YAML of `--config`. Each has a strength
of its own: OSF `--effective_rank`, CorDA `--lora_r`, OFT `--oft_block_size`. `--lora_target_modules` is that of all three.
"""

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from medical_ema import main
from peft import LoraConfig, OFTConfig, OSFConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda
from tqdm.auto import tqdm
from trl.trainer.utils import create_model_from_path

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig
from trl_ema.files import follow_umask
from trl_ema.texts import Sampling, load_texts, model_fingerprint, texts_path, write_texts


SUBSPACES = ("osf", "corda", "oft")


class SubspaceConfig(MeanTeacherConfig):
    """Whose texts CorDA reads, with rehearsal or without."""

    reads_texts = True


@dataclass
class Subspace:
    """
    Makes the adapter, instead of LoRA.

    - OSF (Nayak et al. 2025, https://arxiv.org/abs/2504.07097): the largest singular directions of each weight are frozen, the
      others trained, with gradients orthogonal to those.
    - CorDA in its knowledge-preserved mode (Yang et al. 2024, https://arxiv.org/abs/2406.05223): LoRA that starts from the
      directions which matter least to the activations on general text; here on texts that the model writes itself.
    - OFT (Qiu et al. 2023, https://arxiv.org/abs/2306.07280): the inputs of each layer are rotated, block by block.
    """

    training_config: ClassVar[type] = SubspaceConfig

    subspace: str = field(default="osf", metadata={"help": "`osf`, `corda` or `oft`.", "choices": list(SUBSPACES)})
    effective_rank: float = field(
        default=0.5,
        metadata={"help": "OSF: share of singular directions that are frozen, in (0, 1); larger keeps more."},
    )
    oft_block_size: int = field(
        default=32,
        metadata={
            "help": "OFT: size of a rotated block, at least 2; smaller keeps more. PEFT takes a divisor of a layer's input near it."
        },
    )

    def __post_init__(self) -> None:
        if self.subspace not in SUBSPACES:
            raise ValueError(f"`subspace` must be one of {', '.join(map(repr, SUBSPACES))}, got {self.subspace!r}.")
        if not 0 < self.effective_rank < 1:
            raise ValueError(
                f"`effective_rank` must be inside (0, 1), got {self.effective_rank}. It is the share of frozen directions; try 0.9."
            )
        if self.oft_block_size < 2:
            raise ValueError(f"`oft_block_size` must be at least 2, got {self.oft_block_size}. Try 32.")

    def make(self, model_name: str, tokenizer: Any, training_args: Any, model_args: Any) -> tuple[Any, Any, Callable]:
        """Model (or its name) and `peft_config` for the trainer, and what saves its result."""
        quantized = model_args.load_in_4bit or model_args.load_in_8bit
        if quantized and self.subspace != "oft":
            raise ValueError(
                f"`subspace={self.subspace!r}` decomposes the base's weights, which are quantized. Give `--load_in_4bit false` (and "
                "`--load_in_8bit false`), or use `--subspace oft`."
            )
        targets = model_args.lora_target_modules or ["all-linear"]
        targets = targets[0] if targets == ["all-linear"] else targets
        if self.subspace == "corda":
            return self._corda(model_name, tokenizer, training_args, model_args, targets)
        if self.subspace == "osf":
            config = OSFConfig(effective_rank=self.effective_rank, target_modules=targets, task_type="CAUSAL_LM")
        else:
            config = OFTConfig(oft_block_size=self.oft_block_size, target_modules=targets, task_type="CAUSAL_LM")
        return model_name, config, EMARegularizedSFTTrainer.save_model

    def _corda(self, model_name: str, tokenizer: Any, training_args: Any, model_args: Any, targets: Any) -> tuple:
        if training_args.teacher != "none":
            raise ValueError(
                f"`teacher={training_args.teacher!r}` does not go with CorDA, of whose base no second adapter can be made. Use "
                "`--teacher none`, with rehearsal or without."
            )
        if training_args.rehearsal_texts is not None and training_args.rehearsal_weight:
            raise ValueError(
                f"`rehearsal_texts={training_args.rehearsal_texts!r}` are of the base, which CorDA changes before it trains: they cannot be "
                "rehearsed. Leave them out, and the model writes what is read and what is rehearsed; or set `rehearsal_weight` to 0."
            )
        if training_args.world_size > 1:
            raise ValueError(
                f"CorDA is prepared in one process, this launch has {training_args.world_size}. Launch one, or use `--subspace osf`."
            )
        options = {**training_args.model_init_kwargs, "trust_remote_code": training_args.trust_remote_code}
        training_args.model_init_kwargs = None  # the trainer loads nothing
        model = create_model_from_path(model_name, **options).to(training_args.device)
        if targets == "all-linear":
            head = model.get_output_embeddings()
            linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head]
            targets = sorted({name.rpartition(".")[2] for name in linear})
        # Kept with the run: resumed, it takes the same part of the base into the adapter.
        source, read = _own_texts(model, tokenizer, training_args)
        made_of = json.dumps([source, str(model.dtype), model_args.lora_r, targets])
        kept = Path(training_args.output_dir, f"corda-{hashlib.sha256(made_of.encode()).hexdigest()[:16]}.pt")
        part = kept if kept.is_file() else kept.with_suffix(".part")
        if part != kept:
            part.unlink(missing_ok=True)  # of a run that was killed: PEFT would read it
        config = LoraConfig(
            r=model_args.lora_r, lora_alpha=model_args.lora_alpha, lora_dropout=model_args.lora_dropout, target_modules=targets,
            task_type="CAUSAL_LM", init_lora_weights="corda", corda_config=CordaConfig(cache_file=str(part), corda_method="kpm"),
        )  # fmt: skip
        ids = [] if part == kept else read()  # before PEFT watches the layers
        preprocess_corda(model, config, lambda: _read(model, ids))
        os.replace(part, kept)
        config.corda_config.cache_file = None  # no path tells one such model from another
        return get_peft_model(model, config), None, save_as_lora


def _own_texts(model: Any, tokenizer: Any, training_args: Any) -> tuple[Any, Callable[[], list[list[int]]]]:
    """
    What tells the texts from others, and what gives their tokens: those of `rehearsal_texts`, else what the model writes itself
    with the options of rehearsal. A rehearsal has others, of the base as CorDA leaves it.
    """
    fingerprint = model_fingerprint(model, tokenizer)
    if training_args.rehearsal_texts is not None:
        given = load_texts(training_args.rehearsal_texts, model_fingerprint=fingerprint).ids
        return [fingerprint, given], lambda: given
    sampling = Sampling(
        num_texts=training_args.rehearsal_num_texts,
        num_tokens=training_args.rehearsal_num_tokens,
        start_token=training_args.rehearsal_start,
        chat=training_args.rehearsal_chat,
    )
    path = texts_path(fingerprint, sampling)
    written = partial(write_texts, model, tokenizer, sampling, path, fingerprint=fingerprint)
    return [fingerprint, asdict(sampling)], lambda: written().ids


@torch.no_grad()
def _read(model: Any, texts: list[list[int]]) -> None:
    for ids in tqdm(texts, desc="CorDA"):
        model(input_ids=torch.tensor([ids], device=model.device))


def save_as_lora(trainer: Any) -> None:
    """
    Saves the difference between the adapter that CorDA began with and the trained one: a LoRA of twice the rank over the base as
    it was, which loads like any other.
    """
    trainer.save_model()
    with tempfile.TemporaryDirectory() as scratch:
        first = os.path.join(scratch, "first")
        with trainer.starting_point.activate():
            trainer.model.save_pretrained(first)
        with warnings.catch_warnings():  # of the conversion's own second adapter
            warnings.simplefilter("ignore", UserWarning)
            trainer.model.save_pretrained(trainer.args.output_dir, path_initial_model_for_weight_conversion=first)
    follow_umask(trainer.args.output_dir)


if __name__ == "__main__":
    main(sys.argv[1:], Subspace)
