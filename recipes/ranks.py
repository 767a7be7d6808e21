"""
What each rank holds and sends, with a teacher and without: the tables of docs/scaling.md.

    python recipes/ranks.py measure      DDP, ZeRO-2, ZeRO-3 and FSDP2 on two processes, bytes counted, against the formulas
    python recipes/ranks.py table        the formulas for models of 1.5B, 7B and 70B on 1 to 1,024 GPUs

`measure` trains a small random model for a few steps. Memory is counted tensor by tensor; bytes sent are those of every
collective that PyTorch's profiler sees, taken as rings: an all-reduce of n bytes over R ranks sends 2·(R − 1)/R·n from each,
a gather to n bytes or a scatter of n bytes (R − 1)/R·n.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path


MODES = ("ddp", "zero2", "zero3", "fsdp2")
TEACHERS = ("none", "frozen", "ema")
RANKS = 2
STEPS = 2  # that are profiled


# Formulas


@dataclass(frozen=True)
class Sizes:
    """
    Elements, and bytes of one.

    Args:
        base (`float`): Frozen weights.
        adapter (`float`): Trained weights.
        base_bytes, adapter_bytes (`int`): 2 for bfloat16, 4 for float32.
    """

    base: float
    adapter: float
    base_bytes: int = 2
    adapter_bytes: int = 2


def memory(mode: str, teacher: str, sizes: Sizes, ranks: int) -> dict[str, float]:
    """Bytes on each rank that stay between steps."""
    everything = 1 / ranks if mode in ("zero3", "fsdp2") else 1.0
    optimizer = 1.0 if mode == "ddp" else 1 / ranks
    half = sizes.adapter_bytes == 2
    # DeepSpeed trains a float32 copy; at stage 3 a float32 model is that copy itself.
    master = 4 * sizes.adapter if mode == "zero2" or (mode == "zero3" and half) else 0.0
    # A frozen teacher over a fresh adapter is the base: nothing is kept.
    average = 0.0
    if teacher == "ema":  # in float32, and where the model is in half precision its own copy of it
        average = (4 + (sizes.adapter_bytes if half else 0)) * sizes.adapter
    return {
        "base": sizes.base_bytes * sizes.base * everything,
        "student": sizes.adapter_bytes * sizes.adapter * everything,
        "optimizer": (2 * (4 if mode.startswith("zero") else sizes.adapter_bytes) * sizes.adapter + master) * optimizer,
        "teacher": average * everything,
    }


def sent(mode: str, teacher: str, sizes: Sizes, ranks: int) -> float:
    """Bytes that each rank sends in a step of one micro-batch, without gradient checkpointing."""
    share = (ranks - 1) / ranks
    trained = sizes.adapter_bytes * sizes.adapter
    whole = sizes.base_bytes * sizes.base + trained
    if mode == "ddp":
        return share * 2 * trained
    if mode == "zero2":  # gradients are scattered (all-reduced in DeepSpeed's default), new weights gathered
        return share * 3 * trained
    passes = 2 if teacher == "none" else 3  # forward and backward gather every weight; so does the teacher's forward
    return share * (passes * whole + trained)


# Measured


def worker(mode: str, teacher: str, output: str) -> None:
    """One rank: train, count, and let the first rank write what it holds and sends."""
    import torch
    import torch.distributed as dist
    from torch.profiler import ProfilerActivity, profile

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        prepare = _fully_sharded if mode == "fsdp2" else _trained_by_trainer
        model, held, step = prepare(mode, teacher, folder)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
            for _ in range(STEPS):
                step()
        trace = Path(folder, f"trace_{dist.get_rank()}.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
        found = {"memory": held(), "sent": sum(map(_ring_bytes, events)) / STEPS} | _sizes(model)
    if dist.get_rank() == 0:
        Path(output).write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _small_model():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=64, use_cache=False,
        )
    )  # fmt: skip
    add_fused_lm_head(base)
    return get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))


def _batch():
    import torch

    ids = torch.randint(2048, (1, 32))
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def _trained_by_trainer(mode: str, teacher: str, folder: str):
    """Our trainer under DDP or DeepSpeed, stepped by hand as its own loop does."""
    import datasets
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig

    stage = {"zero2": 2, "zero3": 3}.get(mode)
    options: dict = {"ddp_find_unused_parameters": False} if stage is None else {"deepspeed": _deepspeed(stage)}
    args = MeanTeacherConfig(
        folder, teacher=teacher, per_device_train_batch_size=1, max_steps=STEPS + 1, bf16=False, ddp_backend="gloo",
        report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        use_cpu=stage is None, **options,
    )  # fmt: skip
    rows = [{key: value[0].tolist() for key, value in _batch().items()} for _ in range(8)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")), pad_token="<pad>",
        eos_token="</s>",
    )  # fmt: skip
    trainer = EMARegularizedSFTTrainer(
        _small_model(), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = STEPS + 1, 1
    model, _ = trainer._prepare_for_training(STEPS + 1, trainer.get_train_dataloader(), None)

    def step():
        batch = {key: value.to(args.device) for key, value in _batch().items()}
        trainer.training_step(model, batch, batch["labels"].numel())
        trainer.optimizer.step()
        model.zero_grad()
        if trainer.teacher is not None:
            trainer.update_teacher()

    def held():
        optimizer = model.optimizer.optimizer if stage else trainer.optimizer.optimizer
        flats = []
        if stage == 2:
            flats = model.optimizer.single_partition_of_fp32_groups
        return _held(trainer.model, trainer.teacher, optimizer, flats)

    step()
    return trainer.model, held, step


def _deepspeed(stage: int) -> dict:
    return {
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }


def _fully_sharded(mode: str, teacher: str, folder: str):
    """`fully_shard` by hand: accelerate shards on accelerators alone."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from trl_ema.forward import add_mean_teacher_forward
    from trl_ema.teacher import MeanTeacher

    dist.init_process_group("gloo")
    model = _small_model()
    mean_teacher = None
    if teacher != "none":
        mean_teacher = MeanTeacher(model, frozen=teacher == "frozen")
        add_mean_teacher_forward(model.get_base_model(), mean_teacher, kl_tokens="loss")
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        options = {} if teacher == "none" else {"kl_weight": 1.0}
        outputs = model(**_batch(), fused_lm_head=True, **options)
        (-outputs.log_probs.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if teacher == "ema":
            mean_teacher.update(0.9)

    step()
    return model, lambda: _held(model, mean_teacher, optimizer, []), step


def _held(model, teacher, optimizer, flats) -> dict[str, int]:
    """Bytes on this rank, by what they are for."""
    from trl_ema.sharding import local_shard

    found = {"base": 0, "student": 0, "teacher": 0}
    for name, parameter in model.named_parameters():
        owner = "student" if parameter.requires_grad else "teacher" if ".teacher." in name else "base"
        shard = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else local_shard(parameter)
        found[owner] += shard.numel() * shard.element_size()
    if teacher is not None:
        found["teacher"] += sum(a.numel() * a.element_size() for a in teacher._averages if a is not None)
    tensors = [t for state in optimizer.state.values() for t in state.values() if hasattr(t, "dim") and t.dim()]
    tensors = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    found["optimizer"] = sum(t.numel() * t.element_size() for t in [*tensors, *flats])
    return found


def _sizes(model) -> dict[str, int]:
    whole = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if ".teacher." not in name:
            whole[parameter.requires_grad] += getattr(parameter, "ds_numel", None) or parameter.numel()
    return {"base": whole[False], "adapter": whole[True]}


def _ring_bytes(event: dict) -> float:
    """What one rank sends for one collective of the trace; its tensors are float32."""
    name = event.get("name", "")
    if not name.startswith("c10d::"):
        return 0.0
    dims = event["args"]["Input Dims"]
    share = (RANKS - 1) / RANKS
    whole = {
        "allreduce": lambda: 2 * _elements(dims[0]), "reduce_scatter": lambda: max(map(_elements, dims[:2])),
        "_reduce_scatter_base": lambda: max(map(_elements, dims[:2])), "_allgather_base": lambda: _elements(dims[0]),
        "allgather": lambda: RANKS * _elements(dims[1]), "reduce": lambda: _elements(dims[0]),
        "allgather_into_tensor_coalesced": lambda: RANKS * _elements(dims[1]), "broadcast": lambda: _elements(dims[0]),
        "barrier": lambda: 0,
    }  # fmt: skip
    return 4 * share * whole[name.removeprefix("c10d::").removesuffix("_")]()


def _elements(shape) -> int:
    """Of a shape, or of a list of them."""
    if shape and isinstance(shape[0], list):
        return sum(map(_elements, shape))
    count = 1
    for size in shape:
        count *= size
    return count


def measure() -> None:
    """Every mode and teacher, against the formulas, as a Markdown table."""
    print("MiB of each rank, counted and by formula\n")
    print("| | teacher | base | student | optimizer | teacher | sent per step |\n|---|---|---|---|---|---|---|")
    for mode in MODES:
        for teacher in TEACHERS:
            found = _launch(mode, teacher)
            sizes = Sizes(found["base"], found["adapter"], base_bytes=4, adapter_bytes=4)
            expected = memory(mode, teacher, sizes, RANKS) | {"sent": sent(mode, teacher, sizes, RANKS)}
            counted = found["memory"] | {"sent": found["sent"]}
            cells = [f"{counted[key] / 2**20:.2f} ({expected[key] / 2**20:.2f})" for key in expected]
            print(f"| {mode} | {teacher} | {' | '.join(cells)} |", flush=True)


def _launch(mode: str, teacher: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "found.json"))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--standalone"]
        command += [__file__, "worker", "--mode", mode, "--teacher", teacher, "--output", output]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{mode}, {teacher}:\n{done.stderr[-3000:]}")
        return json.loads(Path(output).read_text())


# Worked out

# Hidden, intermediate, layers, width of keys and values, vocabulary, whether the head is the embedding; by their config files.
MODELS = {
    "Qwen2-1.5B": (1536, 8960, 28, 256, 151936, True),
    "Qwen2-7B": (3584, 18944, 28, 512, 152064, False),
    "Llama-3-70B": (8192, 28672, 80, 1024, 128256, False),
}
LORA_RANK = 16


def sizes_of(name: str) -> Sizes:
    """Weights of a gated transformer, and of LoRA on all its linear layers."""
    hidden, inner, layers, keys, vocabulary, tied = MODELS[name]
    shapes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 3
    base = layers * sum(a * b for a, b in shapes) + vocabulary * hidden * (1 if tied else 2)
    return Sizes(base, layers * LORA_RANK * sum(a + b for a, b in shapes))


def table() -> None:
    """GiB a rank holds (weights, optimizer, teacher) and GiB it sends in a step, for bfloat16 weights."""
    print(
        "| model | GPUs | mode | held, no teacher | frozen adds | EMA adds | sent, no teacher | frozen adds | EMA adds |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        sizes = sizes_of(name)
        for ranks in (1, 8, 64, 1024):
            for mode in MODES if ranks > 1 else MODES[:1]:
                held = {t: sum(memory(mode, t, sizes, ranks).values()) / 2**30 for t in TEACHERS}
                bytes_sent = {t: sent(mode, t, sizes, ranks) / 2**30 for t in TEACHERS}
                cells = [
                    f"{column['none']:.3f} | {column['frozen'] - column['none']:+.3f} | {column['ema'] - column['none']:+.3f}"
                    for column in (held, bytes_sent)
                ]
                print(f"| {name} | {ranks} | {mode} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure", help="on two CPU processes")
    commands.add_parser("table", help="worked out")
    one = commands.add_parser("worker", help=argparse.SUPPRESS)
    for option in ("--mode", "--teacher", "--output"):
        one.add_argument(option, required=True)
    args = parser.parse_args()
    if args.command == "worker":
        worker(args.mode, args.teacher, args.output)
    else:
        {"measure": measure, "table": table}[args.command]()


if __name__ == "__main__":
    main()
