"""The averaged adapter: a second PEFT adapter on the same base, a copy of the student that follows it."""

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from safetensors.torch import load_file

from ..adapters.files import ANOTHER, check_adapter_file, function_fields, gather_file
from ..adapters.fitness import adapter_changes_nothing, check_adapter, student_name
from ..adapters.names import TEACHER_NAME
from ..adapters.switching import switched, teacher_switches
from ..adapters.twin import Twin, add_twin
from ..files import follow_umask, read_json, write_json
from ..sharding import (
    any_sharded,
    drop_stale_copy,
    gather_whole,
    is_sharded,
    local_shard,
    reshard,
    sum_over_shards,
    take_shard,
)


# Beside the teacher's weights: their checksum, and where in which run they were saved.
STATE_NAME = "state.json"
_HALF = (torch.float16, torch.bfloat16)


class MeanTeacher:
    """
    Exponential moving average of the active adapter of a `PeftModel`, kept as a second, frozen adapter.

        φ ← d·φ + (1 − d)·θ          d: `ema_decay`, the share of the old teacher kept

    The teacher starts as a copy of the student, never as zeros: a LoRA update is the product B·A, and averaging both
    factors from zero damps it quadratically. Averages are float32 (float64 for float64 adapters) whatever the
    student's precision, since in bfloat16 a small `(1 − d)·(θ − φ)` rounds to nothing.

    Attach it before Accelerate wraps the model; the constructor does. Where the wrapper shards the adapter (ZeRO-3, FSDP2)
    each rank averages its own shard. A frozen teacher over a fresh adapter is the base
    model: then nothing is copied and the adapter is switched off instead (`is_base`).

    Args:
        model (`PeftModel`): Its active adapter is the student.
        frozen (`bool`): The teacher will never be updated.
        anchor (`float`): Shrinks the teacher towards the base, base + (1 − anchor)·ΔW_φ, in [0, 1]. For LoRA this is
            the scale `lora_alpha`, so it needs no memory and no state.

    Raises:
        ValueError: The model has no adapter that can be averaged; the text says why and what to change.

    Example:

    ```python
    >>> teacher = MeanTeacher(peft_model)
    >>> with torch.no_grad(), teacher.activate():
    ...     teacher_logits = peft_model(**batch).logits
    >>> optimizer.step()
    >>> teacher.update(decay=0.999)
    ```

    Source: Tarvainen & Valpola 2017, https://arxiv.org/abs/1703.01780, eq. 2 (all weights there, the adapter here).
    """

    def __init__(self, model: PeftModel, *, frozen: bool = False, anchor: float = 0.0):
        self.model = model
        self.num_updates = 0
        student = student_name(model)
        check_adapter(model.peft_config[student], anchor)
        self.is_base = frozen and adapter_changes_nothing(model, student)
        self.twins: list[Twin] = [] if self.is_base else add_twin(model, student, anchor)
        # Float32 averages of those teacher tensors that the model itself must keep in half precision.
        self._averages: list[torch.Tensor | None] = [None] * len(self.twins)
        if not self.is_base:
            self._config = model.peft_config[TEACHER_NAME]
            self._hook = model.register_state_dict_post_hook(functools.partial(self._put_averages))  # torch marks it
        self._switches = teacher_switches(model, self.is_base)

    # On and off the model

    def remove(self) -> None:
        """Take the teacher off the model again."""
        if self.is_base:
            return
        self._hook.remove()
        if self._is_attached():
            self.model.delete_adapter(TEACHER_NAME)

    def _is_attached(self) -> bool:
        """Whether its adapter is still on the model, and not that of a later teacher."""
        return self.is_base or self.model.peft_config.get(TEACHER_NAME) is self._config

    def _check_attached(self) -> None:
        if not self._is_attached():
            raise RuntimeError(
                f"This teacher is no longer on the model: its adapter {TEACHER_NAME!r} was deleted or replaced. Save the student "
                "alone with `model.save_pretrained`; to train on with a teacher make a new trainer."
            )

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Within this context the model computes as the teacher. Restores everything, also after an error."""
        self._check_attached()
        with switched(self._switches):
            yield

    # The average

    def students(self) -> list[torch.Tensor]:
        """The student's trained parameters, as they are on this rank."""
        return [getattr(*twin.student) for twin in self.twins]

    def teachers(self) -> list[torch.Tensor]:
        """The teacher's parameters beside them, in the precision that the model computes in."""
        self._check_attached()
        return [getattr(*twin.teacher) for twin in self.twins]

    def average_shards(self) -> list[torch.Tensor]:
        """This rank's part of the averages: the teacher's own tensors, or float32 ones beside a teacher in half precision."""
        shards = [local_shard(teacher) for teacher in self.teachers()]
        for i, shard in enumerate(shards):
            if shard.dtype in _HALF:
                average = self._averages[i]
                # Before the first update the teacher is a copy of the student: nothing is lost in its precision.
                self._averages[i] = shard.float() if average is None else average.to(shard.device)
        return [s if a is None else a for a, s in zip(self._averages, shards, strict=True)]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """φ ← decay·φ + (1 − decay)·θ, for all tensors in one fused call."""
        averages, students = self._pairs()
        torch._foreach_lerp_(averages, students, 1.0 - decay)
        teachers = self.teachers()
        kept = [(local_shard(t), a) for t, a in zip(teachers, self._averages, strict=True) if a is not None]
        if kept:  # the model computes with the new averages from now on
            torch._foreach_copy_([teacher for teacher, _ in kept], [average for _, average in kept])
        for teacher in teachers:
            drop_stale_copy(teacher)
        self.num_updates += 1

    @torch.no_grad()
    def distance(self) -> float:
        """‖φ − θ‖ / ‖θ‖ over all averaged tensors; 0 for the base-model teacher, which has none. Called on all ranks."""
        if self.is_base:
            return 0.0
        averages, students = self._pairs()
        gap = _norm(list(torch._foreach_sub(averages, students)), self.teachers())
        return gap / max(_norm(students, self.teachers()), 1e-30)

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """This rank's shards of the averages and of the student, in the precision of the averages."""
        reshard(self.model)
        averages = self.average_shards()
        return averages, _as_precise([local_shard(student) for student in self.students()], averages)

    # Files

    @torch.no_grad()
    def save(self, directory: str, *, writes: bool = True, **state: Any) -> None:
        """
        Write `teacher/` in `directory`, which anyone can load with PEFT: the averages in their own precision, the config,
        and `state.json` with a checksum, `num_updates` and whatever `state` is given. Called on all ranks, of which those
        write that are told to.
        """
        if self.is_base:
            return
        self._check_attached()
        reshard(self.model)
        state_dict = self._gathered(writes) if any_sharded(self.model) else None
        if not writes:
            return
        self.model.save_pretrained(directory, selected_adapters=[TEACHER_NAME], state_dict=state_dict)
        folder = os.path.join(directory, TEACHER_NAME)
        follow_umask(folder)
        state = {"num_updates": self.num_updates, **state}
        write_json(os.path.join(folder, STATE_NAME), {"sha256": _digest(folder, state, self.twins), **state})

    def _put_averages(self, module: Any, state: dict, prefix: str, metadata: Any) -> None:
        """Whoever saves the model has the averages in their own precision, not those it computes with."""
        if not self._is_attached():
            return
        for twin, average, teacher in zip(self.twins, self._averages, self.teachers(), strict=True):
            if average is not None and not is_sharded(teacher):
                state.update({f"{prefix}{name}": average for name in twin.names if f"{prefix}{name}" in state})

    def _gathered(self, keep: bool) -> dict[str, torch.Tensor]:
        """What PEFT writes of the teacher, whole, on the ranks that `keep` it. Called on all ranks."""
        state = gather_file(self.model, TEACHER_NAME, keep)
        for twin, average, teacher in zip(self.twins, self.average_shards(), self.teachers(), strict=True):
            whole = gather_whole(average, teacher)
            if keep:
                state.update(dict.fromkeys(twin.names, whole.cpu()))
        return state

    @torch.no_grad()
    def load(self, directory: str) -> None:
        """Read the teacher back from a checkpoint, exactly. [`check`] says beforehand if it fits."""
        if self.is_base:
            return
        folder = os.path.join(directory, TEACHER_NAME)
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        reshard(self.model)
        for i, (twin, teacher) in enumerate(zip(self.twins, self.teachers(), strict=True)):
            part, own = take_shard(tensors[twin.key], teacher), local_shard(teacher)
            own.copy_(part)
            self._averages[i] = part.to(own.device).clone() if own.dtype in _HALF else None
            drop_stale_copy(teacher)
        self.num_updates = read_json(os.path.join(folder, STATE_NAME))["num_updates"]

    def check(self, directory: str, **origin: Any) -> None:
        """
        Raises `ValueError`, before anything is changed, if `directory` does not hold this teacher, saved with this `origin`,
        such as its run and step.
        """
        folder = os.path.join(directory, TEACHER_NAME)
        if self.is_base:
            if os.path.isdir(folder):
                raise ValueError(
                    f"{directory} holds a teacher adapter, but the frozen teacher of this run is the base model. Resume "
                    "with the `teacher` option the checkpoint was made with."
                )
            return
        check_adapter_file(self.model, TEACHER_NAME, folder, "Teacher")
        _check_state(folder, self.twins, origin)


def _as_precise(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors in precision and on the device of the others; those that are so already as they are."""
    pairs = enumerate(zip(tensors, others, strict=True))
    changed = [i for i, (tensor, other) in pairs if tensor.dtype != other.dtype or tensor.device != other.device]
    if not changed:
        return tensors
    copies = [torch.empty_like(tensors[i], dtype=others[i].dtype, device=others[i].device) for i in changed]
    torch._foreach_copy_(copies, [tensors[i] for i in changed])
    copied = dict(zip(changed, copies, strict=True))
    return [copied.get(i, tensor) for i, tensor in enumerate(tensors)]


def _norm(shards: list[torch.Tensor], parameters: list[torch.Tensor]) -> float:
    """L2 norm of all tensors together, over all their shards, which lie as those of `parameters` do, and devices."""
    squares: dict[tuple, torch.Tensor] = {}
    owner = {}
    for parameter, shard, norm in zip(parameters, shards, torch._foreach_norm(shards), strict=True):
        squares[type(parameter), norm.device] = squares.get((type(parameter), norm.device), 0) + norm.double() ** 2
        owner[type(parameter), shard.device] = parameter
    return sum(sum_over_shards(total, owner[kind]).item() for kind, total in squares.items()) ** 0.5


def _digest(folder: str, state: dict, twins: list[Twin]) -> str:
    """
    SHA-256 of what a teacher computes, not of bytes: the tensors, the fields of its config that change the
    function, and what is said about it. PEFT may write the same teacher again, as callbacks do that save the model, and
    with embeddings of the base beside it.
    """
    digest = hashlib.sha256()
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        for name in sorted(twin.key for twin in twins):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    config = function_fields(read_json(os.path.join(folder, CONFIG_NAME)))
    digest.update(json.dumps([config, state], sort_keys=True).encode())
    return digest.hexdigest()


def _sha256(folder: str, state: dict) -> str:
    """The checksum that checkpoints had first: of the files' bytes."""
    digest = hashlib.sha256()
    for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _check_state(folder: str, twins: list[Twin], origin: dict) -> None:
    """Raises `ValueError` unless the teacher's file is the one that was written, with this origin."""
    path = os.path.join(folder, STATE_NAME)
    for needed in (path, os.path.join(folder, CONFIG_NAME)):
        if not os.path.isfile(needed):
            raise ValueError(f"Teacher checkpoint {needed} is missing. {ANOTHER}.")
    try:
        state = read_json(path)
        expected = state.pop("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Teacher checkpoint {path} is damaged ({error!r}). {ANOTHER}.") from error
    if _digest(folder, state, twins) != expected and _sha256(folder, state) != expected:
        files = f"{SAFETENSORS_WEIGHTS_NAME}, {CONFIG_NAME} and {STATE_NAME}"
        raise ValueError(
            f"Teacher checkpoint {folder} is damaged ({files} do not have their checksum together). {ANOTHER}."
        )
    saved = {name: state.get(name) for name in origin}
    if saved != origin:
        raise ValueError(
            f"Teacher checkpoint {folder} belongs to another checkpoint ({saved}) than the student beside it ({origin}). "
            f"{ANOTHER}."
        )
