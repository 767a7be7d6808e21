"""
What each rank holds and sends, with a teacher and without: the tables of docs/scaling.md.

    python benchmarks/ranks.py measure      DDP, ZeRO-2, ZeRO-3 and FSDP2 on two processes, bytes counted, against the formulas
    python benchmarks/ranks.py table        the formulas for models of 1.5B, 7B and 70B on 1 to 1,024 GPUs

`measure` trains a small random model for a few steps. Memory is counted tensor by tensor; bytes sent are those of every
collective that PyTorch's profiler sees, taken as rings: an all-reduce of n bytes over R ranks sends 2·(R − 1)/R·n from each,
a gather to n bytes or a scatter of n bytes (R − 1)/R·n.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from trl_ema.memory import BFLOAT16, FLOAT32, MODES, Bytes, Sizes, memory


TEACHERS = ("none", "frozen", "ema")
# A case beside them, under the launches that our trainer is measured in: no teacher, and given texts beside the batch.
REHEARSAL = "rehearsal"
RANKS = 2
STEPS = 2  # that are profiled


# Formulas: what is held between steps is in trl_ema/memory.py


def sent(mode: str, teacher: str, n: Sizes, b: Bytes, ranks: int) -> float:
    """
    Bytes that each rank sends in a step of one micro-batch, without gradient checkpointing, by rings: (ranks − 1) / ranks of

        DDP    2 · adapter: the gradients are all-reduced
        ZeRO-2 3 · adapter: the gradients are all-reduced, the new weights gathered
        ZeRO-3 2 · (layers + adapter) + embeddings + adapter: forward and backward gather, the gradients are scattered;
               a teacher's pass adds layers + embedding, and its adapter when it is an average; with rehearsal the model before
               training has such a pass, over its texts, as a frozen teacher over a fresh adapter has
        FSDP2  as ZeRO-3, but a layer's student and teacher are always gathered together, and backward, when it has passed
               the first layer, fetches what ran before it in vain: the input embedding, or the teacher's last layer where
               the embedding is the head too and stays gathered
    """
    share = (ranks - 1) / ranks * b.sent
    if not mode.startswith(("zero3", "fsdp2")):
        return share * n.adapter * (3 if mode == "zero2" else 2)
    copied, passes = teacher == "ema", 0 if teacher == "none" else 1
    outer = n.embedding + n.head
    if mode == "zero3":
        teachers_pass = passes * (n.layers + n.embedding + copied * n.adapter)
        return share * (2 * (n.layers + n.adapter) + outer + teachers_pass + n.adapter)
    group = n.layers + n.adapter * (1 + copied)
    again = (1 + passes) * n.embedding if n.head else passes * group / n.depth
    return share * ((2 + passes) * group + again + outer + n.adapter)


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
        found = {"memory": held(), "sent": sum(map(_ring_bytes, events)) / STEPS, "sizes": _sizes(model)}
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
    rehearses = teacher == REHEARSAL
    # A half-life would be a share of a run, and this is none.
    options = {"ema": {"ema_decay": 0.9}, REHEARSAL: {"rehearsal_weight": 1.0, "rehearsal_fraction": 0.5}}.get(
        teacher, {}
    )
    args = MeanTeacherConfig(
        folder, teacher="none" if rehearses else teacher, per_device_train_batch_size=1, max_steps=STEPS + 1, bf16=False,
        ddp_backend="gloo", report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, use_cpu=stage is None, ddp_find_unused_parameters=False, **options,
    )  # fmt: skip
    rows = [{key: value[0].tolist() for key, value in _batch().items()} for _ in range(8)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>")), pad_token="<pad>",
        eos_token="</s>",
    )  # fmt: skip
    trainer = EMARegularizedSFTTrainer(
        _small_model(), args, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        rehearsal_dataset=datasets.Dataset.from_list([{"text": "<pad> </s> " * 8}] * 8) if rehearses else None,
    )  # fmt: skip
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = STEPS + 1, 1
    model, _ = trainer._prepare_for_training(STEPS + 1, trainer.get_train_dataloader(), None)

    for regularizer in trainer.regularizers if rehearses else ():
        regularizer.begin(trainer)
    batches = iter(trainer.get_train_dataloader())

    def step():
        (batch,), items = trainer.get_batch_samples(batches, 1, args.device)
        trainer.training_step(model, batch, items)
        trainer.optimizer.step()
        model.zero_grad()
        if trainer.teacher is not None:
            trainer.after_step()

    def held():
        optimizer = model.optimizer.optimizer if stage else trainer.optimizer.optimizer
        flats = []
        if stage == 2:
            flats = model.optimizer.single_partition_of_fp32_groups
        return _held(trainer.model, trainer.teacher, optimizer, flats)

    step()
    return trainer.model, held, step


_BUFFERS = ("param_persistence_threshold", "max_reuse_distance", "max_live_parameters", "prefetch_bucket_size")


def _deepspeed(stage: int) -> dict:
    return {
        # As of a model that is large beside DeepSpeed's buffers: every weight is sharded, fetched and given back.
        "zero_optimization": {"stage": stage} | {f"stage3_{name}": 0 for name in _BUFFERS},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "zero_allow_untested_optimizer": True,
    }


def _fully_sharded(mode: str, teacher: str, folder: str):
    """`fully_shard` by hand, in the units of accelerate, which shards on accelerators alone."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    from trl_ema.forward import Divergence, add_regularized_forward
    from trl_ema.regularizers.teacher import MeanTeacher

    dist.init_process_group("gloo")
    model = _small_model()
    mean_teacher = None
    if teacher != "none":
        mean_teacher = MeanTeacher(model, frozen=teacher == "frozen")
        add_regularized_forward(model.get_base_model())
    base = model.get_base_model()
    for unit in (*base.model.layers, base.model.embed_tokens):
        fully_shard(unit)
    fully_shard([base.model.norm, base.lm_head], reshard_after_forward=False)
    fully_shard(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step():
        options = {} if teacher == "none" else {"divergences": [Divergence(mean_teacher, 1.0)]}
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
    """The fields of [`Sizes`]."""
    found = {"layers": 0, "embedding": 0, "head": 0, "adapter": 0, "depth": model.config.num_hidden_layers}
    for name, parameter in model.named_parameters():
        if ".teacher." not in name:
            frozen = "embedding" if "embed_tokens" in name else "head" if "lm_head" in name else "layers"
            key = "adapter" if parameter.requires_grad else frozen
            found[key] += getattr(parameter, "ds_numel", None) or parameter.numel()
    return found


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


def measure(modes: list[str]) -> None:
    """Every mode and teacher, against the formulas, as a Markdown table."""
    print("MiB of each rank, counted and by formula\n")
    print("| launch | teacher | base | student | optimizer | teacher | sent per step |\n|---|---|---|---|---|---|---|")
    for mode in modes:
        for teacher in (*TEACHERS, *([] if mode == "fsdp2" else [REHEARSAL])):
            found = _launch(mode, teacher)
            case = (mode, teacher, Sizes(**found["sizes"]), FLOAT32[mode], RANKS)
            expected = memory(*case) | {"sent": sent(*case)}
            counted = found["memory"] | {"sent": found["sent"]}
            cells = [f"{counted[key] / 2**20:.2f} ({expected[key] / 2**20:.2f})" for key in expected]
            print(f"| {mode} | {teacher} | {' | '.join(cells)} |", flush=True)


def _launch(mode: str, teacher: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder, "found.json"))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(RANKS), "--standalone"]
        command += [__file__, "worker", "--mode", mode, "--teacher", teacher, "--output", output]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        if mode.startswith("zero"):
            config = Path(folder, "deepspeed.json")
            config.write_text(json.dumps(_deepspeed(int(mode[-1]))))
            environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
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


def sizes_of(name: str, ranks: int = 1) -> Sizes:
    """
    Weights of a gated transformer, and of LoRA on all its linear layers; of FSDP2 over so many `ranks` with its padding: each
    gets ⌈rows / ranks⌉ rows of a matrix, so R of them hold and gather R times that.
    """
    hidden, inner, layers, keys, vocabulary, tied = MODELS[name]
    shapes = [(hidden, hidden)] * 2 + [(hidden, keys)] * 2 + [(hidden, inner)] * 2 + [(inner, hidden)]  # in, out

    def padded(rows: int) -> int:
        return math.ceil(rows / ranks) * ranks

    embedding = padded(vocabulary) * hidden
    return Sizes(
        layers=layers * sum(i * padded(o) for i, o in shapes),
        embedding=embedding,
        head=0 if tied else embedding,
        adapter=layers * sum(padded(LORA_RANK) * i + padded(o) * LORA_RANK for i, o in shapes),
        depth=layers,
    )


def table() -> None:
    """What a rank holds (weights, optimizer, teacher) and what it sends in a step, as a Markdown table."""
    print("| model | GPUs | mode | held, GiB | EMA adds, MiB | sent, GiB | frozen adds | EMA adds |")
    print("|---|---|---|---|---|---|---|---|")
    for name in MODELS:
        for ranks in (1, 8, 64, 1024):
            for mode, b in BFLOAT16.items():
                if ranks == 1 and not mode.startswith("ddp"):
                    continue  # nothing to shard over
                n = sizes_of(name, ranks if mode == "fsdp2" else 1)
                held, moved = ([sum_of(mode, t, n, b, ranks) for t in TEACHERS] for sum_of in (_held_in_all, sent))
                more = [f"{100 * (m - moved[0]) / moved[0]:.0f} %" if moved[0] else "0 %" for m in moved[1:]]
                cells = [
                    f"{held[0] / 2**30:.3g}",
                    f"{(held[2] - held[0]) / 2**20:.3g}",
                    f"{moved[0] / 2**30:.3g}",
                    *more,
                ]
                print(f"| {name} | {ranks:,} | {mode} | {' | '.join(cells)} |")


def _held_in_all(*case) -> float:
    return sum(memory(*case).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    measured = commands.add_parser("measure", help="on two CPU processes")
    measured.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    commands.add_parser("table", help="worked out")
    one = commands.add_parser("worker", help=argparse.SUPPRESS)
    for option in ("--mode", "--teacher", "--output"):
        one.add_argument(option, required=True)
    args = parser.parse_args()
    if args.command == "worker":
        worker(args.mode, args.teacher, args.output)
    elif args.command == "measure":
        measure(args.modes)
    else:
        table()


if __name__ == "__main__":
    main()
