"""Penalties on the trained weights: how far they are from where training started."""

import logging
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..adapters.files import ANOTHER
from ..adapters.names import trained_names
from ..adapters.switching import evaluating, switched
from ..losses import IGNORE_INDEX
from ..processes import refuse_fisher
from ..sharding import any_sharded, cpu_copy, whole_weights
from ..texts import drawn_labels
from ..workarounds import keep_4bit_layers_trainable
from .base import Gather, Regularizer
from .own_texts import OwnTexts


logger = logging.getLogger(__name__)


class WeightPenalty(Regularizer):
    """
    weight · Σ Ω(θ − θ₀) over the trained tensors, once per optimizer step; θ₀ is where training started.

    A subclass gives Ω in [`of_tensor`]. The factors of a LoRA count each for itself, not their product: B is pulled back to zero and A
    to its random start. Differences are float32 whatever the adapter's precision (float64 for a float64 adapter).

    Args:
        model (`PeftModel`): Its adapter is about to be trained.
        weight (`float`): Of the penalty, against the mean cross-entropy.

    Source: as of the subclass.
    """

    kept: tuple[str, ...] = ("start",)  # attributes that are in a checkpoint: of each trained tensor one of its shape

    def __init__(self, model: PeftModel, weight: float):
        self.model, self.weight = model, weight
        with torch.no_grad(), whole_weights(*self.trained()) as parameters:
            copies = [cpu_copy(precise(parameter)) for parameter in parameters]
        self.start: dict[str, Tensor] = dict(zip(trained_names(model), copies, strict=True))
        self._sum, self._steps = torch.zeros(()), 0  # of what is to be logged

    def of_tensor(self, name: str, moved: Tensor) -> Tensor:
        """Ω of one trained tensor, which has moved by so much from its start: 0-dim."""
        raise NotImplementedError

    def trained(self) -> list[Any]:
        return [self.model.get_parameter(name) for name in trained_names(self.model)]

    def begin(self, trainer: Any, state: dict | None = None) -> None:
        self.start = {name: start.to(trainer.args.device) for name, start in self.start.items()}
        self._sum, self._steps = torch.zeros((), device=trainer.args.device), 0

    def penalty(self, step: int) -> Tensor:
        with whole_weights(*self.trained()) as parameters:
            pairs = zip(self.start.items(), parameters, strict=True)
            terms = [self.of_tensor(name, precise(now) - start.to(now.device)) for (name, start), now in pairs]
        value = torch.stack([term.to(terms[0].device) for term in terms]).sum()
        self._sum, self._steps = self._sum + value.detach().to(self._sum.device), self._steps + 1
        return self.weight * value

    def metrics(self, gather: Gather) -> dict[str, float]:
        mean = self._sum.item() / max(self._steps, 1)  # the same on every rank
        self._sum, self._steps = torch.zeros_like(self._sum), 0
        return {f"{self.name}_penalty": mean}

    # Checkpoints

    def tensors(self) -> dict[str, Tensor]:
        """What a resumed run must know."""
        parts = {part: getattr(self, part) or {} for part in self.kept}
        return {f"{part}.{name}": tensor for part, of_part in parts.items() for name, tensor in of_part.items()}

    def save(self, directory: str, *, writes: bool = True, **origin: Any) -> None:
        if writes:
            os.makedirs(directory, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in self.tensors().items()}, self._file(directory))

    def check(self, directory: str, **origin: Any) -> None:
        path = self._file(directory)
        if not os.path.isfile(path):
            raise ValueError(f"{path} is missing: it was saved without `{self.name}_weight`. Resume without it.")
        try:
            with safe_open(path, framework="pt") as file:
                found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}). {ANOTHER}.") from error
        shapes = {name: tuple(start.shape) for name, start in self.start.items()}
        expected = {f"{part}.{name}": shape for part in self.kept for name, shape in shapes.items()}
        wrong = next((name for name, shape in expected.items() if found.get(name) != shape), None)
        if wrong is not None:
            raise ValueError(
                f"{path} is of another adapter: {wrong!r} has shape {expected[wrong]} in the model and {found.get(wrong)} there. "
                "Resume with the original `target_modules`, `r` and `modules_to_save`."
            )

    def load(self, directory: str) -> None:
        tensors = load_file(self._file(directory))
        for part in self.kept:  # in the order of the model; copies, since what is read is the file itself
            setattr(self, part, {name: tensors[f"{part}.{name}"].clone() for name in self.start})

    def bytes_to_save(self) -> int:
        return len(self.kept) * sum(start.numel() * start.element_size() for start in self.start.values())

    def bytes_on_device(self) -> int:
        return self.bytes_to_save()  # whole on every rank, whatever is sharded

    def _file(self, directory: str) -> str:
        return os.path.join(directory, f"{self.name}.safetensors")


class L1Penalty(WeightPenalty):
    """
    l1_weight · Σᵢ |θᵢ − θ₀ᵢ|

    The study that this project grew from calls an L1 penalty on the weights CE-L1 and names no point that it pulls towards. Here
    that is the start: of B, which starts at zero, the two are the same; A pulled towards zero would be changed for nothing, since
    what a fresh LoRA adds is zero already.

    AdamW takes a step in the sign's direction: weights come near their start and do not stay on it.

    Source: Sviridenko et al., https://www.injoit.ru/index.php/j1/article/view/2518 (CE-L1; the start as its centre is ours).
    """

    name = "l1"

    def of_tensor(self, name: str, moved: Tensor) -> Tensor:
        return moved.abs().sum()


class L2SP(WeightPenalty):
    """
    l2_weight / 2 · ‖θ − θ₀‖²

    Source: Li et al. 2018, https://arxiv.org/abs/1802.01483, eq. 2 (the network there, the adapter here).
    """

    name = "l2"

    def of_tensor(self, name: str, moved: Tensor) -> Tensor:
        return moved.square().sum() / 2


class EWC(WeightPenalty):
    r"""
    ewc_weight / 2 · Σᵢ Fᵢ (θᵢ − θ₀ᵢ)²          F: diagonal of the Fisher information of the model before training

        Fᵢ = Σ_texts (∂ Σ_t log p(y_t) / ∂θᵢ)² / number of tokens y_t

    over texts that the model has written itself: the labels are its own samples, so this is the Fisher information itself and not the
    "empirical" one of given labels. Scores of successive tokens do not correlate, so the square of a text's sum has the
    expectation of the sum of their squares, for one backward pass a text, as long as the draws that end a prompt or an answer are in
    the sum: see [`drawn_labels`]. What the model did not draw (the template of a chat, the start of a raw text) carries no score.
    Of several tokens that may end a prompt, the template's counts for whichever was drawn: where others are likely, this is not exact.

    Per token, ½ Σ F (θ − θ₀)² is KL(before ‖ student) in nats per token to second order, but for all that lies off the diagonal:
    `ewc_weight` and `rehearsal_weight` count alike.

    What it cannot see: at the start of a fresh LoRA B is zero, and with it the gradient of A. F of A is zero, A moves free of
    charge, and F of B is that of the A at the start.

    F is computed when training begins, and kept in every checkpoint. A sharded model (ZeRO-3, FSDP2) has no gradient of one text,
    so there it must come from a checkpoint.

    Args:
        model (`PeftModel`): Its adapter is about to be trained.
        weight (`float`): `ewc_weight`.
        texts ([`OwnTexts`]): Of the model.
        num_texts (`int`): The first so many of them make F; all of fewer.

    Raises:
        ValueError: The model is sharded, and no checkpoint has F.

    Source: Kirkpatrick et al. 2017, https://arxiv.org/abs/1612.00796, eq. 3 (data of the old task there, own texts here).
    """

    name = "ewc"
    kept = ("start", "fisher")

    def __init__(self, model: PeftModel, weight: float, texts: OwnTexts, num_texts: int):
        super().__init__(model, weight)
        self.own, self.num_texts = texts, num_texts
        self.fisher: dict[str, Tensor] | None = None

    def begin(self, trainer: Any, state: dict | None = None) -> None:
        super().begin(trainer, state)
        if self.fisher is None:
            self.fisher = self._measure(trainer)
        self.fisher = {name: fisher.to(trainer.args.device) for name, fisher in self.fisher.items()}

    def _measure(self, trainer: Any) -> dict[str, Tensor]:
        refuse_fisher(any_sharded(self.model))
        texts = self.own.get(trainer)
        self.own.keep_beside(trainer)
        labels = drawn_labels(texts)[: self.num_texts]
        if len(labels) < self.num_texts:
            more = (
                "`rehearsal_texts` has no more" if trainer.args.rehearsal_texts else "`rehearsal_num_texts` writes more"
            )
            logger.warning(
                "The Fisher information is of %d texts, all there are; `ewc_num_texts` asks for %d, and %s.", len(labels), self.num_texts,
                more,
            )  # fmt: skip
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        mine = list(zip(texts.ids, labels, strict=False))[rank::ranks]
        with trainer.precision():
            sums = squared_scores(self.model, self.trained(), mine, progress=trainer.is_world_process_zero())
        tokens = sum(label != IGNORE_INDEX for row in labels for label in row)
        sums = [trainer.accelerator.reduce(one, "sum") if ranks > 1 else one for one in sums]
        return {name: one / tokens for name, one in zip(self.start, sums, strict=True)}

    def of_tensor(self, name: str, moved: Tensor) -> Tensor:
        assert self.fisher is not None
        return (self.fisher[name].to(moved.device) * moved.square()).sum() / 2


def precise(tensor: Tensor) -> Tensor:
    """In float32, or float64 if it is so already: differences of nearly equal bfloat16 numbers are noise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squared_scores(
    model: Any, parameters: list[Any], texts: Iterable[tuple[list[int], list[int]]], *, progress: bool = False
) -> list[Tensor]:
    """
    Σ_texts (∂ Σ_t log p(y_t) / ∂θ)², for each parameter of its shape: text by text, in eval mode, no gradient is left anywhere.

    Args:
        parameters (`list` of `Parameter`): Of `model`.
        texts: Of each the tokens, and as labels those of them that count, −100 otherwise.
    """
    keep_4bit_layers_trainable(model)
    device = model.get_input_embeddings().weight.device
    sums = [torch.zeros_like(precise(parameter)) for parameter in parameters]
    with switched(evaluating(model)), torch.enable_grad():
        for ids, labels in tqdm(texts, desc="Fisher information", unit="text", disable=not progress):
            logits = precise(model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0, :-1])
            targets = torch.tensor(labels[1:], device=logits.device)
            score = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
            # Not `backward`: DDP and DeepSpeed would take part.
            gradients = torch.autograd.grad(score, parameters, allow_unused=True)
            for total, gradient in zip(sums, gradients, strict=True):
                if gradient is not None:  # as of an expert that no token went to
                    total += precise(gradient).square()
    return sums
