"""How a training is launched, as an accelerate configuration asks for it or as its processes run, and what cannot be done then."""

from dataclasses import dataclass
from typing import Any

from accelerate.utils import DynamoBackend


# Kinds of parallelism that split a sequence or a matrix, by the beginning of accelerate's names for them.
PARALLEL = {"sp": "sequence (Ulysses)", "cp": "context", "tp": "tensor"}


@dataclass(frozen=True)
class Launch:
    """
    How many processes, and what is sharded over them.

    Args:
        ranks (`int`): Number of processes.
        zero_stage (`int`, *optional*): Of DeepSpeed, where it is used.
        offload_param (`str`, *optional*): Where DeepSpeed keeps weights, `none` for on the GPUs.
        fsdp_version (`int`, *optional*): Of FSDP, where it is used.
        wraps_layers (`bool`): Whether FSDP puts a wrapper of its own around each layer (`fsdp_activation_checkpointing`).
        compiles (`bool`): Whether accelerate compiles the model.
        sp_size, cp_size, tp_size (`int`): Ranks that a sequence (`sp` by Ulysses, `cp` by context) or a matrix is split over.
    """

    ranks: int = 1
    zero_stage: int | None = None
    offload_param: str | None = None
    fsdp_version: int | None = None
    wraps_layers: bool = False
    compiles: bool = False
    sp_size: int = 1
    cp_size: int = 1
    tp_size: int = 1

    @classmethod
    def of_state(cls, state: Any) -> "Launch":
        """That of the processes that run: `state` is accelerate's."""
        fsdp, deepspeed = getattr(state, "fsdp_plugin", None), getattr(state, "deepspeed_plugin", None)
        compiler = getattr(state, "dynamo_plugin", None)
        return cls(
            ranks=getattr(state, "num_processes", 1),
            **({} if deepspeed is None else zero_of(deepspeed)),
            fsdp_version=None if fsdp is None else fsdp.fsdp_version,
            wraps_layers=bool(getattr(fsdp, "activation_checkpointing", False)),
            compiles=compiler is not None and compiler.backend != DynamoBackend.NO,
            **parallel_sizes(getattr(state, "parallelism_config", None)),
        )

    @property
    def mode(self) -> str:
        """`ddp`, `zero2`, `zero3` or `fsdp2`, as in docs/scaling.md; a single process is `ddp`."""
        if self.fsdp_version is not None:
            return "fsdp2"
        if self.zero_stage is None:
            return "ddp"
        # At stage 1 gradients alone are not sharded, which are not among what is held.
        return "zero3" if self.zero_stage == 3 else "zero2"

    @property
    def writes_shards(self) -> bool:
        """Whether DeepSpeed or FSDP write files of their own."""
        return self.mode != "ddp"

    @property
    def shards_weights(self) -> bool:
        """Whether a rank keeps but a part of the model."""
        return self.mode in ("zero3", "fsdp2")


def zero_of(plugin: Any) -> dict[str, Any]:
    """`zero_stage` and `offload_param` of accelerate's plugin for DeepSpeed."""
    options = plugin.deepspeed_config or {}
    offload = (options.get("zero_optimization", {}).get("offload_param") or {}).get("device")
    return {"zero_stage": plugin.zero_stage, "offload_param": offload}


def parallel_sizes(config: Any) -> dict[str, Any]:
    """`sp_size`, `cp_size` and `tp_size` of accelerate's configuration, none without one."""
    return {} if config is None else {f"{name}_size": int(getattr(config, f"{name}_size")) for name in PARALLEL}


def refuse_parallelism(launch: Launch) -> None:
    """The divergence needs whole sequences and whole logits on each rank."""
    for name, what in PARALLEL.items():
        size = getattr(launch, f"{name}_size")
        if size > 1:
            raise ValueError(
                f"{what.capitalize()} parallelism (`{name}_size={size}`) is not supported with a teacher. Set `{name}_size=1` and "
                "shard with DDP, FSDP2 or DeepSpeed, or use `teacher='none'`."
            )


def refuse_wrapping(launch: Launch) -> None:
    """Raises where a wrapper around each layer would hide the adapter from PEFT: every checkpoint would be empty."""
    if launch.wraps_layers:
        raise ValueError(
            "The launch asks for `fsdp_activation_checkpointing`, which wraps the layers of the model: PEFT would find no adapter to "
            "save. Use `gradient_checkpointing` instead of `fsdp_activation_checkpointing`."
        )


def refuse_sharding(launch: Launch) -> None:
    """Raises for what shards in a way that an adapter is not whole in any checkpoint, or no pass goes through after one."""
    if launch.fsdp_version not in (None, 2):
        raise ValueError(
            f"The launch asks for FSDP version {launch.fsdp_version}, which flattens an adapter with its base. Set "
            "`fsdp_version: 2` under `fsdp_config`, as `--accelerate_config fsdp2` does."
        )
    if launch.fsdp_version is not None and launch.compiles:
        raise ValueError(
            "`torch_compile` under FSDP2 is not supported with a teacher: weights stay sharded in the pass after a checkpoint. "
            "Leave it out, or launch with DDP as `--accelerate_config multi_gpu` does."
        )
    if launch.zero_stage == 0:
        raise ValueError(
            "The launch asks for DeepSpeed with `zero_stage: 0`, which shards nothing. Set a stage of 1, 2 or 3, or use DDP as "
            "`--accelerate_config multi_gpu` does."
        )
    if launch.offload_param == "nvme":
        raise ValueError(
            "DeepSpeed's `offload_param` is set to `nvme`, where no rank has its shard of the teacher at hand. Offload to the "
            "CPU (`offload_param_device: cpu`), or use `teacher='none'`."
        )


def refuse_lone_fsdp(launch: Launch) -> None:
    """Raises where a training is to be sharded by its option `fsdp`, and has one process."""
    if launch.ranks == 1:
        raise ValueError(
            "The option `fsdp` shards a model over several processes, and this training has one. Launch it with `--accelerate_config "
            "fsdp2 --num_processes N`, or leave `fsdp` out."
        )


def refuse_tasks(launch: Launch) -> None:
    """Raises where tasks cannot be asked during training."""
    if launch.shards_weights:
        raise ValueError(
            "Tasks are asked during training of a model that lies whole on each rank, not sharded (ZeRO-3, FSDP). Launch with DDP "
            "or ZeRO-2, or leave `eval_tasks` out and give the checkpoints to `trl-ema evaluate`."
        )


def refuse_start(launch: Launch, is_base: bool, *, rehearses: bool = False) -> None:
    """
    Raises where the model before a training cannot be put back during it. ZeRO-3 keeps small parameters gathered for as long as a
    pass lasts, and lets nobody write to them: it can only switch an adapter off.

    Args:
        is_base (`bool`): Whether that model is the one with its adapter switched off.
        rehearses (`bool`): Whether it is rehearsal that needs it; drift otherwise.
    """
    if is_base or launch.mode != "zero3":
        return
    start = "this training starts from something else (an adapter that it goes on from, PiSSA, ...)"
    if rehearses:
        raise ValueError(
            f"Under ZeRO-3 the model before training is a base alone, and {start}. Launch with DDP, ZeRO-2 or FSDP2 to rehearse."
        )
    raise ValueError(
        f"Under ZeRO-3 drift is measured from a base alone, and {start}. Launch with DDP, ZeRO-2 or FSDP2, or train without "
        "measuring drift and give the result to `trl-ema evaluate`, with `--reference_adapter` if it goes on from an adapter."
    )


def refuse_fisher(sharded: bool) -> None:
    """Raises where the Fisher information cannot be measured: of a model of which a rank keeps but a part."""
    if sharded:
        raise ValueError(
            "`ewc_weight`: a sharded model (ZeRO-3, FSDP2) has no gradient of one text, which the Fisher information is made of. "
            "Begin the run on one process or under DDP, with `save_steps=1`, stop after the first checkpoint, and resume it here."
        )


def refuse_to_write(sharded: bool, num_texts: int, num_tokens: int) -> None:
    """Raises where so many texts of so many tokens cannot be written: by a model of which a rank keeps but a part."""
    if sharded:
        raise ValueError(
            "A sharded model (ZeRO-3, FSDP) cannot write texts: every token would gather all weights. Let it write before, whole, with "
            f"`trl-ema rehearse --num_texts {num_texts} --num_tokens {num_tokens} --output_file FILE`."
        )
