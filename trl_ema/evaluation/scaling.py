"""The dial: what a trained adapter gains and how far it drifts when its update is scaled, without any training."""

import copy
import hashlib
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..adapters.blending import Adapter, blended, check_same_layers, mixed_adapter, scaled_adapter, variant_of
from ..adapters.fitness import unscalable_by
from ..adapters.names import STUDENT_NAME, TEACHER_NAME, tuner_layers
from ..files import follow_umask, read_json, write_json
from ..provenance import provenance
from .drift import Pass, check_measurable, drift_of_rows, mean_drift, passes_of_base
from .models import add_adapter, is_adapter, with_adapter


FIGURES = "scale.json"
SCALES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25)
MIXTURES = (0.5,)
LARGEST_SCALE = 2.0
_WRITTEN = "scaled"
# Of an update in float32, relative to its norm.
_ROUNDING = 1e-5
# A scale is found when its drift is no more than the budget and no less than this share of it.
_CLOSE = 0.97
_TRIES = 4


def teacher_of(run: str) -> str | None:
    """Folder of the teacher in the folder of a run; `None` where there is none."""
    folder = os.path.join(run, TEACHER_NAME)
    return folder if is_adapter(folder) else None


def check_run(run: str) -> None:
    """
    Raises `ValueError` unless `run` holds a student whose update can be scaled, and its teacher, if there is one, can be mixed
    with it.
    """
    if not is_adapter(run):
        raise ValueError(
            f"{run!r} holds no adapter ({CONFIG_NAME} is missing). Give the folder that `trl-ema train` wrote, its `--output_dir`."
        )
    for folder in filter(None, (run, teacher_of(run))):
        config = PeftConfig.from_pretrained(folder)
        cause = unscalable_by(config)
        if cause is not None:
            raise ValueError(
                f"The adapter in {folder} cannot be scaled: {cause} is no factor of its update, or it did not begin as its base. Only "
                "plain LoRA and rsLoRA can (no DoRA, `modules_to_save`, PiSSA, ...). Train one of those, or at a lower learning rate."
            )
        check_measurable(config)
    if teacher_of(run) is not None:
        folder = str(teacher_of(run))
        check_same_layers(PeftConfig.from_pretrained(run), PeftConfig.from_pretrained(folder), folder)


def check_scales(run: str, scales: Iterable[float], mixtures: Sequence[float] | None) -> tuple[float, ...]:
    """
    The shares of the teacher that are traced: none without one.

    Args:
        scales: Of the update, in [0, 2].
        mixtures: Shares of the teacher, in (0, 1), beside student and teacher alone; by default a half.

    Raises:
        ValueError: A number is outside its range, or there is nothing to mix.
    """
    for scale in scales:
        if not 0 <= scale <= LARGEST_SCALE:
            raise ValueError(
                f"`scales` must be in [0, {LARGEST_SCALE:g}], got {scale:g}. 0 is the base, 1 the adapter as it was trained."
            )
    for mixture in mixtures or ():
        if not 0 < mixture < 1:
            raise ValueError(
                f"`mixtures` must be in (0, 1), got {mixture:g}. It is the teacher's share; student and teacher alone are always "
                "traced."
            )
    if teacher_of(run) is None:
        if mixtures:
            raise ValueError(
                f"`mixtures` is for a student and its teacher, and {os.path.join(run, TEACHER_NAME)} holds none. Leave it out."
            )
        return (0.0,)
    if getattr(PeftConfig.from_pretrained(run), "target_parameters", None):  # their factors are in another order
        if mixtures:
            raise ValueError(
                "`mixtures` of an adapter with `target_parameters` cannot be written as one adapter. Give an empty list: student and "
                "teacher alone can be scaled."
            )
        return (0.0, 1.0)
    return (0.0, *sorted({*(MIXTURES if mixtures is None else mixtures)}), 1.0)


class Dial:
    r"""
    A model with a run's student and teacher beside each other, measured at W + scale · ((1 − m)·ΔW_student + m·ΔW_teacher).

    Each point is kept in `scale.json` as it comes: what broke off goes on where it did.

    Args:
        base (`PreTrainedModel`): As it was trained. Gets both adapters.
        run (`str`): See [`check_run`].
        tokenizer (`PreTrainedTokenizerBase`): The one that was trained with.
        held_out (`list[dict]`): Batches whose loss is measured, see [`tokenized_batches`].
        general (`dict[str, list[dict]]`): Batches by name; the drift of a point, KL(base ‖ model), is the largest of theirs.
        folder (`str`): Where `scale.json` is.
        model_id (`str`): Tells this base and these adapters from others, see [`fingerprint`].
        about (`dict`): Said of the figures in `scale.json`.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        run: str,
        tokenizer: PreTrainedTokenizerBase,
        held_out: list[dict],
        general: dict[str, list[dict]],
        folder: str,
        model_id: str,
        about: dict | None = None,
    ):
        self.run, self.held_out, self.general = run, held_out, general
        self.model, _ = with_adapter(base, run, tokenizer)
        if teacher_of(run) is not None:
            add_adapter(self.model, str(teacher_of(run)), TEACHER_NAME)
        variant = variant_of(self.model)
        if variant is not None:
            raise ValueError(
                f"The adapter in {run} cannot be scaled: its layers are of the kind {variant}, not plain LoRA. Train a `LoraConfig` "
                "without the option that makes them so."
            )
        self.path = Path(folder, FIGURES)
        key = [model_id, _digest([held_out, *general.values()])]
        kept = read_json(self.path) if self.path.is_file() else {}
        if kept.get("key") == key:
            self.figures = kept
        else:
            self.figures = {"key": key, **(about or {}), "provenance": provenance(), "points": [], "suggested": None}
        self._base_passes: dict[str, list[Pass]] | None = None

    @property
    def points(self) -> list[dict]:
        """
        Those that were measured: `mixture`, `scale`, `loss`, `drift_on` each general text, `drift`, the largest of them, and
        after [`trace`] `gain`.
        """
        return self.figures["points"]

    def at(self, mixture: float, scale: float) -> AbstractContextManager:
        """Context in which the model computes as it does there."""
        return blended(self.model, self._shares(mixture, scale))

    def _shares(self, mixture: float, scale: float) -> dict[str, float]:
        shares = {STUDENT_NAME: scale * (1 - mixture), TEACHER_NAME: scale * mixture}
        return {name: share for name, share in shares.items() if share}

    def measure(self, mixture: float, scale: float) -> dict:
        """The point there, measured unless it was before. At scale 0 all mixtures are the base."""
        mixture = mixture if scale else 0.0
        known = (point for point in self.points if (point["mixture"], point["scale"]) == (mixture, scale))
        found = next(known, None)
        if found is None:
            loss, drift = self._loss_and_drift(mixture, scale)
            found = {"mixture": mixture, "scale": scale, "loss": loss, "drift": max(drift.values()), "drift_on": drift}
            self.points.append(found)
            self.points.sort(key=lambda point: (point["mixture"], point["scale"]))
            write_json(self.path, self.figures)
        return found

    def _loss_and_drift(self, mixture: float, scale: float) -> tuple[float, dict[str, float]]:
        options: dict[str, Any] = dict(adapter=lambda: self.at(mixture, scale), reference=self._base)
        loss = mean_drift(drift_of_rows(self.model, self.held_out, description="Loss", directions=(), **options))[
            "loss"
        ]
        if scale == 0:
            return loss, dict.fromkeys(self.general, 0.0)
        if self._base_passes is None:  # the same for every point
            self._base_passes = {
                name: passes_of_base(self.model, batches, self._base) for name, batches in self.general.items()
            }
        drift = {}
        for name, batches in self.general.items():
            rows = drift_of_rows(
                self.model, batches, directions=("forward",), passes_before=self._base_passes[name], **options
            )
            drift[name] = max(0.0, mean_drift(rows)["kl_base_model"])  # rounding may put it below
        return loss, drift

    def _base(self) -> AbstractContextManager:
        return blended(self.model, {})

    def trace(self, mixtures: Iterable[float], scales: Iterable[float], max_drift: float | None = None) -> None:
        """
        Measure every scale of every mixture, then those between two of them at which the drift comes to `max_drift`.

        Args:
            mixtures: Shares of the teacher, see [`check_scales`].
            scales: See there; 0, the base, is always measured.
        """
        mixtures, scales = list(mixtures), sorted({0.0, *scales})
        todo = [(0.0, 0.0), *((mixture, scale) for mixture in mixtures for scale in scales if scale)]
        for mixture, scale in tqdm(todo, desc="Scales"):
            self.measure(mixture, scale)
        if max_drift is not None:
            for mixture in tqdm(mixtures, desc="Budget"):
                self._refine(mixture, max_drift)
        for point, gain in zip(self.points, gains(self.points), strict=True):
            point["gain"] = gain
        self.figures["max_drift"] = max_drift
        write_json(self.path, self.figures)

    def _refine(self, mixture: float, max_drift: float) -> None:
        """Scales between the last within the budget and the first beyond it, until one is close to it."""
        for _ in range(_TRIES):
            curve = curve_of(self.points, mixture)
            beyond = next((i for i, point in enumerate(curve) if point["drift"] > max_drift), 0)
            if not beyond:
                return  # all of it is within
            below, above = curve[beyond - 1 : beyond + 1]
            within = min(curve[:beyond], key=lambda point: point["loss"])
            if within is not below or below["drift"] >= _CLOSE * max_drift:
                return  # a lower loss than at the budget, or close to it
            scale = _scale_at(curve, (1 + _CLOSE) / 2 * max_drift)
            if not below["scale"] < scale < above["scale"]:
                scale = (below["scale"] + above["scale"]) / 2
            self.measure(mixture, float(f"{scale:.4g}"))

    def suggested(self, max_drift: float) -> dict | None:
        """
        The point with the lowest held-out loss of those whose drift is at most `max_drift`; `None` if that is the base.

        Without a budget there is none to suggest: gain against drift is a smooth curve without a knee, and what a nat of drift
        is worth nobody else can say.
        """
        within = [point for point in self.points if point["drift"] <= max_drift]
        best = min(within, key=lambda point: (point["loss"], point["drift"]))
        return best if best["scale"] else None

    def adapter(self, mixture: float, scale: float) -> Adapter:
        """That point as one plain adapter in PEFT's form: config and tensors."""
        return adapter_at(self.run, mixture, scale)

    def write(self, point: dict, folder: str, tokenizer: PreTrainedTokenizerBase) -> float:
        """
        Write the adapter at `point` into `folder`, in PEFT's form, once it is known that it computes the same when it is loaded.

        Returns:
            `float`: KL(model at `point` ‖ model with the written adapter) on the general rows, nats per token.
        """
        where = point["mixture"], point["scale"]
        with tempfile.TemporaryDirectory(dir=folder, prefix=".") as scratch:
            save_adapter(self.adapter(*where), scratch)
            apart = self._check_written(scratch, point)
            tokenizer.save_pretrained(folder)
            for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):  # with the last it is an adapter
                shutil.move(os.path.join(scratch, name), os.path.join(folder, name))
        follow_umask(folder)
        self.figures |= {"suggested": {**point, "kl_reloaded": apart}}
        write_json(self.path, self.figures)
        return apart

    def _check_written(self, folder: str, point: dict) -> float:
        """The nats between the model at `point` and with the adapter in `folder`. Raises `RuntimeError` where they are not the same."""
        where = point["mixture"], point["scale"]
        add_adapter(self.model, folder, _WRITTEN)
        try:
            error = self._error_of_updates(*where)
            apart = self._apart(lambda: blended(self.model, {_WRITTEN: 1.0}), *where)
            # A share ε of the update is ε² of the drift. Half precision rounds after each of two adapters that are added: as much
            # as the point is from itself with the two in the other order.
            allowed = max(1e-6, point["drift"] / 1000)
            if not apart <= allowed and 0 < where[0] < 1:
                shares = dict(reversed(self._shares(*where).items()))
                allowed = max(allowed, 4 * self._apart(lambda: blended(self.model, shares), *where))
        finally:
            self.model.delete_adapter(_WRITTEN)
        if not (apart <= allowed and error <= _ROUNDING):
            raise RuntimeError(
                f"The written adapter is {apart:.3g} nats from the one that was measured at {where} (expected at most {allowed:.3g}), and "
                f"its updates are off by up to {error:.3g} of their norm (at most {_ROUNDING:g}). Please report it."
            )
        return apart

    def _apart(self, context: Callable[[], AbstractContextManager], mixture: float, scale: float) -> float:
        """KL(model at the point ‖ model in `context`) on the first of the general texts."""
        rows = drift_of_rows(
            self.model,
            next(iter(self.general.values())),
            adapter=context,
            reference=lambda: self.at(mixture, scale),
            directions=("forward",),
            description="Written",
        )
        return mean_drift(rows)["kl_base_model"]

    @torch.no_grad()
    def _error_of_updates(self, mixture: float, scale: float) -> float:
        """The largest ‖ΔW_written − Σ share · ΔW‖ / ‖ΔW_written‖ of all layers."""
        errors = [0.0]
        for layer in tuner_layers(self.model):
            update: Any = getattr(layer, "get_delta_weight")  # noqa: B009
            written = update(_WRITTEN).double()
            expected = sum(share * update(name).double() for name, share in self._shares(mixture, scale).items())
            norm = written.norm().item()
            errors.append((written - expected).norm().item() / norm if norm else float(torch.as_tensor(expected).any()))
        return max(errors)


def curve_of(points: Iterable[dict], mixture: float) -> list[dict]:
    """The points of one mixture by their scale, from the base on."""
    curve = (point for point in points if point["mixture"] == mixture or point["scale"] == 0)
    return sorted(curve, key=lambda point: point["scale"])


def _scale_at(curve: list[dict], drift: float) -> float:
    """
    Where the curve has this drift, by drift = c · scale^p through its two nearest points; p is 2 near the base, and less where
    the update is large.
    """
    drifting = [point for point in curve if point["drift"] > 0]
    near, *others = sorted(drifting, key=lambda point: abs(math.log(point["drift"] / drift)))
    power = 2.0
    if others:
        power = math.log(near["drift"] / others[0]["drift"]) / math.log(near["scale"] / others[0]["scale"])
    return near["scale"] * (drift / near["drift"]) ** (1 / power) if power > 0 else math.inf


def gains(points: Sequence[dict]) -> list[float]:
    """The fall of the held-out loss of each point, as a share of the largest; NaN where none falls."""
    (base,) = (point["loss"] for point in points if point["scale"] == 0)
    best = base - min(point["loss"] for point in points)
    return [(base - point["loss"]) / best if best > 0 else math.nan for point in points]


def adapter_at(run: str, mixture: float, scale: float) -> Adapter:
    """
    scale · ((1 − m)·ΔW_student + m·ΔW_teacher) of the folder of a run as one plain adapter in PEFT's form: config and tensors.

    Args:
        run (`str`): See [`check_run`].
        mixture (`float`): m, the teacher's share, in [0, 1].
    """
    if mixture == 0:
        return scaled_adapter(read_adapter(run), scale)
    teacher = read_adapter(str(teacher_of(run)))
    if mixture == 1:
        return scaled_adapter(teacher, scale)
    return mixed_adapter(read_adapter(run), teacher, mixture, scale)


def read_adapter(folder: str) -> Adapter:
    """The adapter in `folder`: its config and its tensors, on the CPU."""
    return PeftConfig.from_pretrained(folder), load_peft_weights(folder, device="cpu")


def save_adapter(adapter: Adapter, folder: str) -> None:
    """Write an adapter that began as its base into `folder`, in PEFT's form."""
    config, tensors = copy.deepcopy(adapter[0]), adapter[1]
    config.init_lora_weights = True  # how a training began, which may want its data again
    config.inference_mode = True
    config.save_pretrained(folder)
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(whole, os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})


def _digest(groups: list[list[dict]]) -> str:
    """Tells these rows, as they are tokenized and labelled, from others."""
    digest = hashlib.sha256()
    for batch in [batch for batches in groups for batch in batches]:
        for name in ("input_ids", "labels"):
            digest.update(repr(batch[name].tolist()).encode())
        digest.update(b"\n")
    return digest.hexdigest()[:16]
