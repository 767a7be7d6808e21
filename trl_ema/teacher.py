"""The averaged adapter: a second PEFT adapter on the same base, a copy of the student that follows it."""

import copy
import functools
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import EMBEDDING_LAYER_NAMES, AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .files import follow_umask, read_json, write_json
from .sharding import (
    any_sharded,
    drop_stale_copy,
    gather_whole,
    is_sharded,
    local_shard,
    reshard,
    sum_over_shards,
    take_shard,
    whole_shape,
    whole_weights,
)


TEACHER_NAME = "teacher"
# Beside the teacher's weights: their checksum, and where in which run they were saved.
STATE_NAME = "state.json"
# In a config: about the adapter, without an effect on what it computes.
_ABOUT = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
# Values of `init_lora_weights` with which an adapter begins beside the base, not as a part of it; and those that take the same from
# the same base again, whenever the adapter is loaded: no random numbers, and nothing that was computed before from data.
_KEEP_BASE = {"true", "false", "gaussian", "orthogonal", "eva", "mica"}
_REPEATABLE = _KEEP_BASE | {"pissa", "olora"}
_HALF = (torch.float16, torch.bfloat16)
# They compute the same in both modes, and are most of an adapter's modules.
_WITHOUT_MODE = {torch.nn.Identity, torch.nn.Linear, torch.nn.Embedding, torch.nn.ModuleDict, torch.nn.ParameterDict}
_PLAIN = "Use a `LoraConfig`, or `teacher='none'`."
_LORA = "Use a `LoraConfig`."  # plain fine-tuning does not train them either
_ONE_BANK = (
    f"shares its trained tensors between all layers and writes them in another form than it trains them in. {_PLAIN}"
)
# Kinds of which no second adapter can be an average of the first: why, and what to do.
_UNAVERAGED = {
    "ADALORA": f"changes its rank while it trains, so no average fits. {_PLAIN}",
    "POLY": f"mixes its tensors by the task of each row, which fine-tuning does not name. {_LORA}",
    "SHADOW": f"carries a second model through the layers, which an average of the adapter does not have. {_LORA}",
    "TINYLORA": _ONE_BANK,
    "UNILORA": _ONE_BANK,
    "VBLORA": _ONE_BANK,
    "XLORA": f"mixes several finished adapters, so there is not one to average. {_LORA}",
}
_ANOTHER = "Resume from another checkpoint, or start anew from this adapter with `PeftModel.from_pretrained`"
NO_ADAPTER = (
    "The model has no PEFT adapter to average. Pass `peft_config=LoraConfig(...)` or a `PeftModel`, or use "
    "`teacher='none'`."
)
_MISSING = object()
_POWERS_OF_TWO = frozenset(2.0**n for n in range(-10, 11))


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
        self._student = student_name(model)
        trainable = trained_names(model)
        check_adapter(model.peft_config[self._student], anchor)
        self.is_base = frozen and adapter_changes_nothing(model, self._student)
        if not self.is_base:
            self._add_adapter(anchor)
            if trainable != trained_names(model):
                raise RuntimeError("Adding the teacher changed which parameters are trained: this needs peft>=0.21.")
        self._slots = [] if self.is_base else [self._slot(name) for name in trainable]
        # Each averaged tensor's names: more than one where layers share it (LILY).
        self._names = [] if self.is_base else self._tie(trainable)
        self._keys = self._file_keys()
        # Float32 averages of those teacher tensors that the model itself must keep in half precision.
        self._averages: list[torch.Tensor | None] = [None] * len(self._slots)
        if not self.is_base:
            self._start_as_copy()
            self._hook = model.register_state_dict_post_hook(functools.partial(self._put_averages))  # torch marks it
        self._switches = self._find_switches()

    def _add_adapter(self, anchor: float) -> None:
        config: Any = _teacher_config(self.model.peft_config[self._student], anchor)
        # What PEFT does to the base for an adapter (PiSSA, OLoRA, replicated layers, ...) it has done for the student. The
        # initial weights are overwritten below: leave the random state, and so the run, as without a teacher.
        done = {
            name: getattr(config, name) for name in ("init_lora_weights", "layer_replication") if hasattr(config, name)
        }
        neutral = {"init_lora_weights": True, "layer_replication": None}
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices=devices), _base_kept(self.model):
            for name in done:
                setattr(config, name, neutral[name])
            self.model.add_adapter(TEACHER_NAME, config)
        self._config = self.model.peft_config[TEACHER_NAME]
        # It must do so again for whoever loads the teacher alone, however it was saved.
        for name, value in done.items():
            setattr(self._config, name, value)
        self.model.set_requires_grad(TEACHER_NAME, False)

    def _tie(self, trainable: list[str]) -> list[list[str]]:
        """
        The names of each of the teacher's tensors. Where the student has one tensor under several names the teacher gets
        one too: PEFT ties those of the first adapter alone.
        """
        shared = _names_of(self.model)
        names = [[_twin(alias, self._student) for alias in shared[name]] for name in trainable]
        for first, *others in names:
            for other in others:
                module, _, own = other.rpartition(".")
                setattr(self.model.get_submodule(module), own, self.model.get_parameter(first))
        return names

    def _file_keys(self) -> list[str]:
        """The name that each averaged tensor has in a PEFT file."""
        if self.is_base:
            return []
        keys = file_keys(self.model, TEACHER_NAME)
        lost = [first for first, *_ in self._names if first not in keys]
        if lost:
            kind = getattr(self.model.peft_config[self._student].peft_type, "value", None)
            raise ValueError(
                f"{kind} writes its trained tensor {lost[0]!r} in another form, so a teacher could not be read back. Use a "
                "`LoraConfig`, or `teacher='none'`."
            )
        return [keys[first] for first, *_ in self._names]

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

    def _put_averages(self, module, state: dict, prefix: str, metadata) -> None:
        """Whoever saves the model has the averages in their own precision, not those it computes with."""
        if not self._is_attached():
            return
        for names, average, teacher in zip(self._names, self._averages, self._teachers(), strict=True):
            if average is not None and not is_sharded(teacher):
                state.update({f"{prefix}{name}": average for name in names if f"{prefix}{name}" in state})

    def _slot(self, name: str) -> tuple[torch.nn.Module, str, torch.nn.Module, str]:
        """(module, attribute) of a student parameter and of its twin in the teacher.

        Modules, not parameters: sharding replaces the parameters themselves.
        """
        twin = _twin(name, self._student)
        (module, _, own), (twins_module, _, twins_own) = name.rpartition("."), twin.rpartition(".")
        try:
            if name == twin:
                raise AttributeError
            slot = self.model.get_submodule(module), own, self.model.get_submodule(twins_module), twins_own
            getattr(slot[2], twins_own)
        except AttributeError:
            raise ValueError(
                f"Parameter {name!r} is trained but belongs to no adapter, so the teacher cannot have its own copy. "
                "Train an adapter alone: put whole modules into `modules_to_save`, use `bias='none'` and leave the base "
                "frozen; or use `teacher='none'`."
            ) from None
        return slot

    def _students(self) -> list[torch.Tensor]:
        return [getattr(module, name) for module, name, _, _ in self._slots]

    def _teachers(self) -> list[torch.Tensor]:
        self._check_attached()
        return [getattr(module, name) for _, _, module, name in self._slots]

    @torch.no_grad()
    def _start_as_copy(self) -> None:
        """All that is the student's own, trained or not: MICA has a frozen factor, others have masks and buffers."""
        named = dict(self.model.named_parameters(remove_duplicate=False))
        named |= dict(self.model.named_buffers(remove_duplicate=False))
        for name, tensor in named.items():
            twin = _twin(name, self._student)
            if twin != name and twin in named:
                named[twin].copy_(tensor)
        for layer in _tuner_layers(self.model):
            for value in vars(layer).values():  # SHIRA's indices
                if isinstance(value, dict) and torch.is_tensor(value.get(self._student)):
                    value[TEACHER_NAME] = value[self._student].clone()

    def _pairs(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """This rank's shards of the averages and of the student, in the precision of the averages."""
        reshard(self.model)
        averages, students = self._average_shards(), [local_shard(s) for s in self._students()]
        other = [
            i
            for i, (s, a) in enumerate(zip(students, averages, strict=True))
            if s.dtype != a.dtype or s.device != a.device
        ]
        if other:
            precise = [torch.empty_like(students[i], dtype=averages[i].dtype, device=averages[i].device) for i in other]
            torch._foreach_copy_(precise, [students[i] for i in other])
            for i, student in zip(other, precise, strict=True):
                students[i] = student
        return averages, students

    def _average_shards(self) -> list[torch.Tensor]:
        """The tensors that hold the average: the teacher's own, or float32 ones beside a teacher in half precision."""
        shards = [local_shard(teacher) for teacher in self._teachers()]
        for i, shard in enumerate(shards):
            if shard.dtype in _HALF:
                average = self._averages[i]
                # Before the first update the teacher is a copy of the student: nothing is lost in its precision.
                self._averages[i] = shard.float() if average is None else average.to(shard.device)
        return [s if a is None else a for a, s in zip(self._averages, shards, strict=True)]

    def _find_switches(self) -> list[tuple[torch.nn.Module, str, object]]:
        """Every (module, attribute, value) that tells the teacher's pass from the student's."""
        adapter = ("_disable_adapters", True) if self.is_base else ("_active_adapter", [TEACHER_NAME])
        switches = _adapter_switches(self.model, *adapter)
        for module in self.model.modules():
            if hasattr(module, "gradient_checkpointing"):
                # Checkpointing saves memory for a backward pass that the teacher does not have.
                switches.append((module, "gradient_checkpointing", False))
        # The teacher's pass is deterministic. `model.eval()` would also switch the 4-bit layers into a mode that
        # repacks their weights on some CPUs, and cost a walk over every module.
        stochastic = [*_stochastic_modules(self.model), *_adapter_modules(self.model)]
        switches += [(module, "training", False) for module in stochastic]
        if not self.is_base:
            plain = (module for module in self.model.modules() if _is_plain_lora(module))
            switches += [(layer, "forward", functools.partial(_add_update_in_place, layer)) for layer in plain]
        return switches

    @contextmanager
    def activate(self):
        """Within this context the model computes as the teacher. Restores everything, also after an error."""
        self._check_attached()
        with _switched(self._switches):
            yield

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """φ ← decay·φ + (1 − decay)·θ, for all tensors in one fused call."""
        averages, students = self._pairs()
        torch._foreach_lerp_(averages, students, 1.0 - decay)
        self._publish()
        self.num_updates += 1

    def _publish(self) -> None:
        """The model computes with the new averages from now on."""
        teachers = self._teachers()
        kept = [(local_shard(t), a) for t, a in zip(teachers, self._averages, strict=True) if a is not None]
        if kept:
            torch._foreach_copy_([teacher for teacher, _ in kept], [average for _, average in kept])
        for teacher in teachers:
            drop_stale_copy(teacher)

    @torch.no_grad()
    def distance(self) -> float:
        """‖φ − θ‖ / ‖θ‖ over all averaged tensors; 0 for the base-model teacher, which has none. Called on all ranks."""
        if self.is_base:
            return 0.0
        averages, students = self._pairs()
        gap = self._norm(torch._foreach_sub(averages, students))
        return gap / max(self._norm(students), 1e-30)

    def _norm(self, shards: list[torch.Tensor]) -> float:
        """L2 norm of all tensors together, over all their shards and devices."""
        squares: dict[tuple, torch.Tensor] = {}
        for parameter, norm in zip(self._teachers(), torch._foreach_norm(shards), strict=True):
            kind = type(parameter), norm.device
            squares[kind] = squares.get(kind, 0) + norm.double() ** 2
        owner = {(type(p), s.device): p for p, s in zip(self._teachers(), shards, strict=True)}
        return sum(sum_over_shards(total, owner[kind]).item() for kind, total in squares.items()) ** 0.5

    @contextmanager
    def hidden(self):
        """Within this context `save_pretrained` of the model saves the student alone."""
        student_alone = functools.partial(self.model.save_pretrained, selected_adapters=[self._student])
        with _switched([(self.model, "save_pretrained", student_alone)]):
            yield

    @torch.no_grad()
    def save(self, directory: str, *, writes: bool = True, **state) -> None:
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
        write_json(os.path.join(folder, STATE_NAME), {"sha256": _digest(folder, state, self._keys), **state})

    def _gathered(self, keep: bool) -> dict[str, torch.Tensor]:
        """What PEFT writes of the teacher, whole, on the ranks that `keep` it. Called on all ranks."""
        state = gather_file(self.model, TEACHER_NAME, keep)
        for names, average, teacher in zip(self._names, self._average_shards(), self._teachers(), strict=True):
            whole = gather_whole(average, teacher)
            if keep:
                state.update(dict.fromkeys(names, whole.cpu()))
        return state

    @torch.no_grad()
    def load(self, directory: str) -> None:
        """Read the teacher back from a checkpoint, exactly. [`check_checkpoint`] says beforehand if it fits."""
        if self.is_base:
            return
        folder = os.path.join(directory, TEACHER_NAME)
        tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
        reshard(self.model)
        for i, (key, teacher) in enumerate(zip(self._keys, self._teachers(), strict=True)):
            part, own = take_shard(tensors[key], teacher), local_shard(teacher)
            own.copy_(part)
            self._averages[i] = part.to(own.device).clone() if own.dtype in _HALF else None
            drop_stale_copy(teacher)
        self.num_updates = read_json(os.path.join(folder, STATE_NAME))["num_updates"]

    def check_checkpoint(self, directory: str) -> None:
        """
        Raises `ValueError`, before anything is changed, if `directory` does not hold this teacher and this student.
        """
        check_adapter_file(self.model, self._student, directory, "Student")
        folder = os.path.join(directory, TEACHER_NAME)
        if self.is_base:
            if os.path.isdir(folder):
                raise ValueError(
                    f"{directory} holds a teacher adapter, but the frozen teacher of this run is the base model. Resume "
                    "with the `teacher` option the checkpoint was made with."
                )
            return
        check_adapter_file(self.model, TEACHER_NAME, folder, "Teacher")
        _check_state(folder, self._keys)

    def check_origin(self, directory: str, **origin) -> None:
        """Raises `ValueError` unless the teacher in `directory` was saved with this `origin`, such as its run and step."""
        if self.is_base:
            return
        path = os.path.join(directory, TEACHER_NAME, STATE_NAME)
        saved = {name: read_json(path).get(name) for name in origin}
        if saved != origin:
            raise ValueError(
                f"Teacher checkpoint {os.path.dirname(path)} belongs to another checkpoint ({saved}) than the student beside "
                f"it ({origin}). {_ANOTHER}."
            )


def without_adapter(model):
    """
    Context in which a `PeftModel` computes as its base, whichever adapter is active; nothing for another model.

    PEFT's `disable_adapter` does the same but flips `requires_grad`, which takes a hundred times longer and which FSDP2 does
    not bear.
    """
    return _switched(_adapter_switches(model, "_disable_adapters", True))


def _is_plain_lora(module: torch.nn.Module) -> bool:
    """Whether PEFT's forward of the teacher's adapter here is `base(x) + scale · B(A(x))` and nothing else."""
    return (
        type(module) in (lora.Linear, getattr(lora, "Linear4bit", None))
        and TEACHER_NAME in module.lora_A
        and TEACHER_NAME not in module.lora_variant
        and isinstance(module.lora_dropout[TEACHER_NAME], torch.nn.Identity)
    )


def _add_update_in_place(layer, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """
    PEFT's forward of a plain LoRA layer, to the bit, without what a backward pass would need: under autocast PEFT casts the
    input to the adapter's float32, autocast casts it back, and scaling and adding make new tensors.
    """
    if layer.merged or args or kwargs or not torch.is_autocast_enabled(x.device.type):
        return type(layer).forward(layer, x, *args, **kwargs)
    scale = layer.scaling[TEACHER_NAME]
    result = layer.base_layer(x)
    update = layer.lora_B[TEACHER_NAME](layer.lora_A[TEACHER_NAME](x))
    if scale in _POWERS_OF_TWO:  # nothing is rounded between the product and the sum
        return result.add_(update, alpha=scale)
    return result.add_(update.mul_(scale))


def _adapter_switches(model, key: str, value) -> list[tuple[torch.nn.Module, str, object]]:
    layers = (module for module in model.modules() if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
    return [(layer, key, value) for layer in layers]


@contextmanager
def _switched(switches: list[tuple[torch.nn.Module, str, object]]):
    """Sets each (module, attribute, value), and restores everything, also after an error."""
    saved = [(vars(module), key, vars(module).get(key, _MISSING)) for module, key, _ in switches]
    try:
        for module, key, value in switches:
            vars(module)[key] = value
        yield
    finally:
        for attributes, key, value in saved:
            if value is _MISSING:
                attributes.pop(key, None)
            else:
                attributes[key] = value


def _twin(name: str, student: str) -> str:
    """The teacher's parameter beside the student's parameter `name`."""
    return ".".join(TEACHER_NAME if part == student else part for part in name.split("."))


def _digest(folder: str, state: dict, names: list[str]) -> str:
    """
    SHA-256 of what a teacher computes, not of bytes: the tensors called `names`, the fields of its config that change the
    function, and what is said about it. PEFT may write the same teacher again, as callbacks do that save the model, and
    with embeddings of the base beside it.
    """
    digest = hashlib.sha256()
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        for name in sorted(names):
            tensor = file.get_tensor(name)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    config = function_fields(read_json(os.path.join(folder, CONFIG_NAME)))
    digest.update(json.dumps([config, state], sort_keys=True).encode())
    return digest.hexdigest()


def function_fields(config: dict) -> dict:
    """Of the fields of a PEFT config those that change what the adapter computes; names, a set in memory, in order."""
    return {
        name: sorted(value)
        if isinstance(value, (set, list)) and all(isinstance(item, str) for item in value)
        else value
        for name, value in config.items()
        if name not in _ABOUT
    }


def _sha256(folder: str, state: dict) -> str:
    """The checksum that checkpoints had first: of the files' bytes."""
    digest = hashlib.sha256()
    for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME):
        with open(os.path.join(folder, name), "rb") as file:
            digest.update(file.read())
    digest.update(json.dumps(state, sort_keys=True).encode())
    return digest.hexdigest()


def _check_state(folder: str, names: list[str]) -> None:
    """Raises `ValueError` unless the teacher's file is the one that was written."""
    path = os.path.join(folder, STATE_NAME)
    for needed in (path, os.path.join(folder, CONFIG_NAME)):
        if not os.path.isfile(needed):
            raise ValueError(f"Teacher checkpoint {needed} is missing. {_ANOTHER}.")
    try:
        state = read_json(path)
        expected = state.pop("sha256")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"Teacher checkpoint {path} is damaged ({error!r}). {_ANOTHER}.") from error
    if _digest(folder, state, names) != expected and _sha256(folder, state) != expected:
        files = f"{SAFETENSORS_WEIGHTS_NAME}, {CONFIG_NAME} and {STATE_NAME}"
        raise ValueError(
            f"Teacher checkpoint {folder} is damaged ({files} do not have their checksum together). {_ANOTHER}."
        )


def _state_at_hand(model) -> dict[str, torch.Tensor]:
    """The model's state without communication: of a sharded model the buffers alone."""
    return dict(model.named_buffers()) if any_sharded(model) else model.state_dict()


def file_keys(model: PeftModel, adapter_name: str, embeddings: bool | str = False) -> dict[str, str]:
    """
    The key in a PEFT file of each tensor that PEFT writes of an adapter unchanged, by its name in the model; with
    `embeddings` also of the base's, which it writes beside an adapter that wraps them, or where they were resized ("auto").
    """
    names = {*_state_at_hand(model), *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    numbered = {name: torch.tensor(i) for i, name in enumerate(names)}
    written = get_peft_model_state_dict(model, numbered, adapter_name, save_embedding_layers=embeddings)
    key_of = {id(tensor): key for key, tensor in written.items()}
    return {name: key_of[id(number)] for name, number in numbered.items() if id(number) in key_of}


def gather_file(model: PeftModel, adapter_name: str, keep: bool) -> dict[str, torch.Tensor]:
    """
    Of a sharded model, the parameters that PEFT writes of an adapter, whole and by name, and its buffers; on the ranks that
    `keep` them. Called on all ranks.
    """
    state = dict(model.named_buffers()) if keep else {}
    # The first rank decides: whether embeddings were resized PEFT may look up on the hub, which not every rank may reach.
    written = [file_keys(model, adapter_name, embeddings="auto") if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(written)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in written[0]:
            whole = gather_whole(local_shard(parameter), parameter)
            if keep:
                state[name] = whole.cpu()
    return state


def _names_of(model) -> dict[str, list[str]]:
    """By the first name of each parameter: all names it has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def trained_names(model) -> list[str]:
    """Names of the parameters that are trained."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def read_student(model: PeftModel, folder: str) -> dict[str, torch.Tensor]:
    """The parameters in the adapter file of `folder`, trained or not, by their names in the model."""
    tensors = load_file(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME))
    keys = file_keys(model, "default")
    return {name: tensors[keys[name]] for name, _ in model.named_parameters() if name in keys}


def check_adapter_file(model: PeftModel, adapter_name: str, folder: str, who: str) -> None:
    """Raises `ValueError` unless the adapter file in `folder` has the names and shapes of the adapter in `model`."""
    shapes = _read_shapes(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), who)
    parameters = model.named_parameters(remove_duplicate=False)
    whole = {name: torch.empty(whole_shape(parameter), device="meta") for name, parameter in parameters}
    state = _state_at_hand(model) | whole
    # Beside the adapter PEFT writes the base's embeddings where an adapter wraps them or they were resized.
    expected, known = (
        {key: tuple(tensor.shape) for key, tensor in written.items()}
        for written in (
            get_peft_model_state_dict(model, state, adapter_name, save_embedding_layers=embeddings)
            for embeddings in (False, True)
        )
    )
    remedy = "Resume with the original `target_modules`, `r` and `modules_to_save`."
    _check_same_function(model.peft_config[adapter_name], folder, who)
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in known]
    if missing or unexpected:
        first = f"first missing: {missing[0]!r}" if missing else f"first unexpected: {unexpected[0]!r}"
        raise ValueError(
            f"{who} checkpoint in {folder} has {len(shapes)} tensors, the model has {len(expected)}; {first}. {remedy}"
        )
    for name, shape in shapes.items():
        if known[name] != shape:
            raise ValueError(
                f"{who} checkpoint in {folder} has shape {shape} for {name!r}, the model has {known[name]}. {remedy}"
            )
    if any(name not in expected for name in shapes):
        _check_base(model, adapter_name, folder, who)


def _check_base(model: PeftModel, adapter_name: str, folder: str, who: str) -> None:
    """
    The base's embeddings in an adapter file, which PEFT reads into the model, are the model's own. Where the vocabulary was
    enlarged the new rows, drawn at random, are the last ones: the first half is compared.
    """
    key_of = file_keys(model, adapter_name, embeddings=True)
    with safe_open(os.path.join(folder, SAFETENSORS_WEIGHTS_NAME), framework="pt") as file:
        saved = set(file.keys()) - set(file_keys(model, adapter_name).values())
        for name, parameter in model.named_parameters():
            key, of_adapter = key_of.get(name), not set(model.peft_config).isdisjoint(name.split("."))
            if key not in saved or of_adapter or parameter.requires_grad:
                continue
            theirs = file.get_tensor(key)
            with whole_weights(parameter) as (ours,):
                own_rows = len(theirs) // 2
                coarse = min(ours.dtype, theirs.dtype, key=lambda dtype: dtype.itemsize)
                ours, theirs = (x[:own_rows].detach().cpu().to(coarse) for x in (ours, theirs))
            if not torch.equal(ours, theirs):
                raise ValueError(
                    f"{who} checkpoint in {folder} has other values for {key!r}, which is not trained, than the model: it was "
                    "made on another base. Resume with the original base model."
                )


def _check_same_function(config, folder: str, who: str) -> None:
    """Options that change what an adapter's weights mean, without changing a shape."""
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        return  # nothing to compare with
    try:
        saved = read_json(path)
    except ValueError as error:
        raise ValueError(f"{who} checkpoint {path} is damaged ({error}). {_ANOTHER}.") from error
    for name in ("lora_alpha", "use_rslora", "use_dora", "alpha_pattern"):
        ours = getattr(config, name, None)
        if name in saved and ours is not None and saved[name] != ours:
            options = f"`{name}`, `teacher_anchor`" if who == "Teacher" else f"`{name}`"
            raise ValueError(
                f"{who} checkpoint in {folder} was trained with `{name}={saved[name]!r}`, the model has {ours!r}. Resume with "
                f"the original {options}."
            )


def _read_shapes(path: str, who: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header."""
    if not os.path.isfile(path):
        raise ValueError(f"{who} checkpoint {path} is missing. {_ANOTHER} (or `teacher='none'` if none was trained).")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{who} checkpoint {path} is damaged ({error}). {_ANOTHER}.") from error


def student_name(model: PeftModel, earlier_teacher: bool = False) -> str:
    """
    Name of the adapter that is trained. Raises `ValueError` if there is not just one, named as PEFT's default, or there is one
    of the teacher's name, unless that is an `earlier_teacher`, which will be removed.
    """
    if not isinstance(model, PeftModel):
        raise ValueError(NO_ADAPTER)
    active = model.active_adapters
    if len(active) != 1:
        raise ValueError(f"The student must be one active adapter, got {active}. Choose one with `model.set_adapter`.")
    if TEACHER_NAME in model.peft_config and not earlier_teacher:
        raise ValueError(
            f"The model already has an adapter named {TEACHER_NAME!r}, the name of the mean teacher. Remove it with "
            f"`model.delete_adapter({TEACHER_NAME!r})`, or load the adapter you train as 'default'."
        )
    if active[0] != "default":
        raise ValueError(
            f"The student's adapter is named {active[0]!r}; expected 'default', the one that PEFT saves at the root of a "
            "folder. Create or load it without an `adapter_name`."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(
            f"Adapter {active[0]!r} has no trainable parameter. Load it with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    return active[0]


def check_adapter(config, anchor: float) -> None:
    """Raises `ValueError` if no second adapter of this kind can be an average of the first."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{kind} is prompt learning: its virtual tokens cannot be averaged beside the student's. Use a `LoraConfig` "
            "(or another adapter in the weights), or `teacher='none'`."
        )
    if kind in _UNAVERAGED:
        raise ValueError(f"{kind} {_UNAVERAGED[kind]}")
    check_repeatable(config, "Use `'pissa'` or `'olora'`, which do; or `teacher='none'`.")
    if getattr(config, "ensure_weight_tying", False) and _targets_embeddings(config):
        raise ValueError(
            "`ensure_weight_tying=True` puts the adapter of the embeddings on `lm_head` too, whose weight the loss multiplies by "
            "directly. Leave it out, or train both whole with `modules_to_save`."
        )
    if getattr(config, "bias", "none") not in ("none", None):
        raise ValueError(
            f"`bias={config.bias!r}` trains the base model's own biases, which a second adapter cannot have. Use "
            "`bias='none'`."
        )
    if anchor == 0:
        return
    scalable = isinstance(config, LoraConfig) and not config.use_dora and config.trainable_token_indices is None
    if not scalable or config.modules_to_save or base_changed_by(config):
        raise ValueError(
            f"`teacher_anchor={anchor}` scales a LoRA update towards the base, which needs plain LoRA or rsLoRA: no DoRA, "
            "`modules_to_save`, `trainable_token_indices` or what changes the base (PiSSA, OLoRA, KaSA, `layer_replication`, ...). "
            "Use `teacher_anchor=0`."
        )


def _targets_embeddings(config) -> bool:
    targets = config.target_modules
    return isinstance(targets, (list, set, tuple)) and any(
        name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in targets
    )


def _teacher_config(student_config, anchor: float):
    """A copy for the teacher: no dropout, no samples, and the anchor as its scale."""
    config = copy.deepcopy(student_config)
    config.inference_mode = True
    for f in fields(config) if is_dataclass(config) else ():
        if "dropout" in f.name and isinstance(getattr(config, f.name), (int, float)):
            setattr(config, f.name, 0.0)
    if hasattr(config, "sample_at_inference"):  # PVeRA
        config.sample_at_inference = False
    if isinstance(config, LoraConfig) and anchor > 0:
        config.lora_alpha = config.lora_alpha * (1 - anchor)
        config.alpha_pattern = {name: alpha * (1 - anchor) for name, alpha in config.alpha_pattern.items()}
    return config


@contextmanager
def _base_kept(model):
    """Within this context the model's parameters can be replaced (KaSA does so at each adapter) and are put back."""
    before = [(parameter, parameter.data) for parameter in model.parameters() if not is_sharded(parameter)]
    try:
        yield
    finally:
        for parameter, data in before:
            if parameter.data_ptr() != data.data_ptr():
                parameter.data = data


def base_changed_by(config) -> str | None:
    """
    The option by which this kind of adapter changes the base's own weights or layers, so that without the adapter the model is
    not the base; `None` where the base stays as it was.
    """
    if getattr(config, "kasa_config", None) is not None:
        return "`kasa_config`"  # cuts off the smallest singular values
    if getattr(config, "layer_replication", None):
        return f"`layer_replication={config.layer_replication}`"
    if getattr(config, "bias", "none") not in ("none", None):
        return f"`bias={config.bias!r}`"
    init = getattr(config, "init_lora_weights", True)
    return None if str(init).lower() in _KEEP_BASE else f"`init_lora_weights={init!r}`"


def check_repeatable(config, advice: str) -> None:
    """Raises `ValueError` if the adapter takes from the base what it would not take again when it is loaded."""
    init = getattr(config, "init_lora_weights", True)
    if str(init).lower() not in _REPEATABLE:
        raise ValueError(
            f"`init_lora_weights={init!r}` takes a part of the base into the adapter and does not find the same part again when the "
            f"adapter is loaded: what is saved would compute something else than what was trained. {advice}"
        )


def adapter_changes_nothing(model: PeftModel, name: str) -> bool:
    """Whether the model with adapter `name` is exactly the base: LoRA with a zero factor everywhere."""
    config = model.peft_config[name]
    if not isinstance(config, LoraConfig) or config.use_dora or config.lora_bias or base_changed_by(config):
        return False
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            ours, base = module.modules_to_save[name], module.original_module
            with whole_weights(*ours.parameters(), *base.parameters()):
                ours = ours.state_dict()
                if any(not torch.equal(ours[key], tensor) for key, tensor in base.state_dict().items()):
                    return False
        elif isinstance(module, AuxiliaryTrainingWrapper):
            return False
        elif isinstance(module, LoraLayer):
            zero_factor = [factors[name] for factors in (module.lora_B, module.lora_embedding_A) if name in factors]
            tensors = [t.weight if isinstance(t, torch.nn.Module) else t for t in zero_factor]
            if any(t.any() for t in tensors):
                return False
    return True


def _tuner_layers(model) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _adapter_modules(model) -> list[torch.nn.Module]:
    """
    The layers of the adapters and what is in them, some of which sample in train mode (PVeRA, MonteCLoRA) or drop out; not the
    layers of the base that they wrap.
    """
    found, todo = [], [(layer, True) for layer in _tuner_layers(model)]
    while todo:
        module, is_layer = todo.pop()
        if type(module) not in _WITHOUT_MODE:
            found.append(module)
        for name, child in module.named_children():
            if not isinstance(child, BaseTunerLayer) and not (is_layer and name == "base_layer"):
                todo.append((child, False))
    return found


def _stochastic_modules(model: PeftModel) -> list[torch.nn.Module]:
    """Modules that behave differently in train mode: dropout, jitter, and NEFTune's noise on the embeddings."""
    found = {id(model.get_input_embeddings()): model.get_input_embeddings()}
    for name, module in model.named_modules():
        if "lora_dropout" in name:
            continue
        children = [c for c in module.children() if isinstance(c, torch.nn.Dropout) and c.p > 0]
        own = any(
            ("drop" in key or "jitter" in key) and isinstance(value, float) and value > 0
            for key, value in vars(module).items()
        )
        if own or children or (isinstance(module, torch.nn.Dropout) and module.p > 0):
            found[id(module)] = module
    return list(found.values())
