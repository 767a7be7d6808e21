"""
What the teacher costs: our trainer and what people use instead, side by side in one run.

    python benchmarks/benchmark.py all --quick      every figure that has a goal
    python benchmarks/benchmark.py step             time of a training step: SFTTrainer, ours, a second model, the adapter off
    python benchmarks/benchmark.py loss             the fused loss: bare matrix products, TRL's kernels, dense logits
    python benchmarks/benchmark.py update           the average: moving its bytes, TRL's callback, ema-pytorch
    python benchmarks/benchmark.py memory           peak memory of a fresh process for each trainer
    python benchmarks/benchmark.py scaling          growth with the number of tokens

`pip install 'trl_ema[benchmark]'` brings the peers, on a GPU `pip install liger-kernel` one more; what is not installed is
left out, and named.

The arms alternate, one call each in turn; every ratio is the median over the repetitions, with its quartiles, of times
measured one after the other. Speed claims live here, not in timed tests.
"""

import argparse
import gc
import itertools
import json
import math
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path


MODELS = ("smollm2", "qwen2")  # 49k and 152k words
OURS = {
    "ema": dict(teacher="ema", ema_decay=0.999),
    "ema, a quarter": dict(teacher="ema", ema_decay=0.999, kl_fraction=0.25),
    "frozen": dict(teacher="frozen"),
    "rehearsal": dict(teacher="none", rehearsal_weight=4.0, rehearsal_num_texts=64),
    # As in a run that takes none again: the model before training passes over them in each micro-batch.
    "rehearsal, fresh texts": dict(teacher="none", rehearsal_weight=4.0, rehearsal_num_texts=64),
    # Draws no sequence: TRL's own head multiplies ignored tokens too where there is no Triton, ours does not.
    "no pass of the teacher": dict(teacher="ema", ema_decay=0.999, kl_fraction=1e-9),
}
# What others do, at the same work: see `_peer`.
PEERS = ("second model", "adapter off")
ARMS = ("sft", *OURS, *PEERS)


@dataclass
class Figure:
    """
    One measured ratio: what, the most it should be, its quartiles and median over the repetitions; and what it is of, each
    measurement in seconds or MiB.
    """

    name: str
    goal: float | None
    low: float
    median: float
    high: float
    over: list[float]
    under: list[float]

    @classmethod
    def of(
        cls, name: str, goal: float | None, ratios: Iterable[float], over: list[float] = (), under: list[float] = ()
    ) -> "Figure":
        import numpy as np

        quartiles = (float(q) for q in np.percentile(list(ratios), [25, 50, 75]))
        return cls(name, goal, *quartiles, list(over), list(under))

    def row(self) -> str:
        goal = "" if self.goal is None else f"≤ {self.goal:g}"
        met = "" if self.goal is None else "yes" if self.median <= self.goal else "no"
        return f"| {self.name} | {goal} | {self.median:.4g} | {self.low:.4g} to {self.high:.4g} | {met} |"


def alternate(arms: dict[str, Callable[[], object]], repetitions: int, title: str) -> dict[str, list[float]]:
    """Seconds of each call of each arm, one of each in turn, after one that does not count."""
    import torch
    from tqdm.auto import trange

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for call in arms.values():
        call()
    for _ in trange(repetitions, desc=title, leave=False):
        for arm, call in arms.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[arm].append(time.perf_counter() - start)
    return seconds


def _installed(peer: str) -> bool:
    """Whether a peer can be measured; says so where it cannot."""
    found = find_spec(peer) is not None
    if not found:
        print(f"{peer} is not installed: left out.", file=sys.stderr)
    return found


def ratio(name: str, goal: float | None, over: list[float], under: list[float]) -> Figure:
    return Figure.of(name, goal, [a / b for a, b in zip(over, under, strict=True)], over, under)


# A training step


def build_model(name: str, nf4: bool):
    """The demo's SmolLM2-135M (49k words), a random 2-layer model in the shape of Qwen2-1.5B (152k), or a folder."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

    from trl_ema import offline

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4") if nf4 else None
    if name == "qwen2" and nf4:
        with tempfile.TemporaryDirectory() as folder:
            build_model(name, False).save_pretrained(folder)
            return build_model(folder, True)
    if name == "qwen2":
        torch.manual_seed(0)
        config = Qwen2Config(
            hidden_size=1536, intermediate_size=8960, num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=2,
            vocab_size=151936, tie_word_embeddings=True,
        )  # fmt: skip
        return Qwen2ForCausalLM(config)
    path = offline.demo_model() if name == "smollm2" else name
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=four_bit)


def _size(args) -> tuple[int, int]:
    """Tokens of a sequence, sequences of a step. A quarter of four sequences is always one."""
    return args.tokens or 128, args.batch_size or 4


def make_trainer(arm: str, args, folder: str):
    import datasets
    import torch
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig, offline

    tokens, batch_size = _size(args)
    model = build_model(args.model, args.nf4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch_size, tokens), generator=generator).tolist()
    masked = tokens // 2 if args.rows == "prompted" else 0
    if args.rows in ("padded", "packed"):
        # Packed rows need more of them to be as full.
        ids = [row[: tokens * (1 + i % 4) // 4] for i, row in enumerate(ids * (1 if args.rows == "padded" else 2))]
    options = dict(
        output_dir=folder, per_device_train_batch_size=batch_size, max_length=tokens, bf16=args.bf16,
        packing=args.rows == "packed", gradient_checkpointing=args.checkpointing, report_to="none", save_strategy="no", logging_strategy="no",
        disable_tqdm=True, max_steps=10**6, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    common = dict(
        train_dataset=datasets.Dataset.from_dict(
            {"input_ids": ids, "labels": [[-100] * masked + row[masked:] for row in ids]}
        ),
        processing_class=AutoTokenizer.from_pretrained(offline.demo_model() if args.model in MODELS else args.model),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    if arm in OURS:
        length = min(tokens, MeanTeacherConfig.rehearsal_num_tokens)
        own = dict(OURS[arm])
        if "rehearsal_weight" in own:  # in few tokens there is no room for a chat
            own |= {"rehearsal_num_tokens": length, "rehearsal_chat": None if length >= 64 else False}
        return EMARegularizedSFTTrainer(model, MeanTeacherConfig(**own, **options), **common)
    trainer = (SFTTrainer if arm == "sft" else _peer(arm, args))(model, SFTConfig(**options), **common)
    if args.nf4 and not args.bf16:
        # TRL makes the adapter bfloat16 here, ours leaves it in float32: the same work for all.
        for parameter in trainer.model.parameters():
            parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return trainer


def _peer(arm: str, args):
    """
    A trainer as users write it: float32 logits of student and reference, `F.cross_entropy`, `F.kl_div`. The reference is a
    second model (as ASFT's own code has it), or the model with its adapter switched off.
    """
    import torch
    import torch.nn.functional as F
    from trl import SFTTrainer

    class Dense(SFTTrainer):
        # In training mode, without dropout in it: bitsandbytes has other kernels for evaluation.
        reference = build_model(args.model, args.nf4).train() if arm == "second model" else None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            labels = inputs["labels"][:, 1:]
            inputs = {key: inputs[key] for key in ("input_ids", "attention_mask", "position_ids") if key in inputs}
            logits = model(**inputs, use_cache=False).logits[:, :-1].float()
            with torch.no_grad(), self.accelerator.autocast():
                if self.reference is not None:
                    teacher = self.reference.to(logits.device)(**inputs, use_cache=False).logits[:, :-1].float()
                else:
                    with self.accelerator.unwrap_model(model).disable_adapter():
                        teacher = model(**inputs, use_cache=False).logits[:, :-1].float()
            mask = labels != -100
            ce = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            kl = F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="none").sum(-1)[mask].sum()
            return (ce + kl) / num_items_in_batch

    return Dense


class Stepper:
    """One optimizer step at a time, through the trainer's own `training_step`."""

    def __init__(self, arm: str, args, folder: str):
        self.trainer = trainer = make_trainer(arm, args, folder)
        trainer.state.max_steps = 1 if arm == "rehearsal, fresh texts" else 10**6
        trainer.current_gradient_accumulation_steps = 1
        if args.checkpointing:  # as `train` does it
            trainer.model.gradient_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.create_optimizer()
        self.model, self.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        self.batch = next(iter(trainer.get_train_dataloader()))
        self.regularizers = getattr(trainer, "regularizers", [])
        for regularizer in self.regularizers:  # which lets the model write its texts
            regularizer.begin(trainer)

    def __call__(self, rows: int | None = None) -> None:
        """A step on the first `rows` sequences of the batch, by default on all."""
        batch = dict(self.batch) if rows is None else {key: value[:rows] for key, value in self.batch.items()}
        items = (batch["labels"][:, 1:] != -100).sum()
        trainer = self.trainer
        for regularizer in self.regularizers:
            regularizer.before_step([batch], trainer.state.global_step, trainer.args.device, trainer.accelerator.gather)
        self.trainer.training_step(self.model, batch, items)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if getattr(self.trainer, "teacher", None) is not None:
            self.trainer.after_step()
        self.trainer.state.global_step += 1  # `kl_fraction` draws anew


STEP_GOALS = {
    # arm, against, with checkpointing: what it should be at most
    ("ema", "sft", False): 1.25,
    ("ema", "sft", True): 1.22,
    ("ema, a quarter", "sft", False): 1.08,
    ("ema, a quarter", "sft", True): 1.08,
    ("frozen", "sft", False): 1.20,
    ("frozen", "sft", True): 1.20,
    ("rehearsal", "sft", False): 1.30,
    ("rehearsal", "sft", True): 1.30,
}
SECOND_MODEL_GOALS = {"smollm2": 0.70, "qwen2": 0.60}


def step(args) -> list[Figure]:
    """Time of a step, with the ratio of the floating point operations beside it."""
    tokens, batch_size = _size(args)
    title = f"{args.model}, {batch_size} × {tokens} tokens"
    title += (
        f", {args.rows} rows" * (args.rows != "equal")
        + ", NF4" * args.nf4
        + ", bfloat16" * args.bf16
        + ", checkpointing" * args.checkpointing
    )
    with tempfile.TemporaryDirectory() as folder:
        arms = {arm: Stepper(arm, args, folder) for arm in args.arms}
        operations = {arm: _operations(stepper) for arm, stepper in arms.items()}
        product, size = _product(arms["sft"])
        seconds = alternate(arms | {"product": product}, args.repetitions, f"steps, {title}")
    found = []
    for arm in [arm for arm in ("sft", "ema") if arm in arms]:
        name = f"step, {arm} / its {operations[arm] / 1e9:.0f} GFLOP at the speed of a bare product ({title})"
        found.append(ratio(name, None, seconds[arm], [s * operations[arm] / size for s in seconds["product"]]))
    for arm in args.arms:
        if arm == "sft":
            continue
        floor = operations[arm] / operations["sft"]
        name = f"step, {arm} / SFTTrainer ({title}; operations {floor:.2f})"
        found.append(ratio(name, STEP_GOALS.get((arm, "sft", args.checkpointing)), seconds[arm], seconds["sft"]))
    if "rehearsal" in arms:
        found.append(_writing(arms["rehearsal"], seconds["sft"], title))
    for peer in set(PEERS) & set(args.arms) if "ema" in args.arms else ():
        goal = SECOND_MODEL_GOALS.get(args.model) if peer == "second model" else None
        found.append(ratio(f"step, ema / {peer} ({title})", goal, seconds["ema"], seconds[peer]))
    return found


def _writing(stepper: Stepper, seconds_of_step: list[float], title: str) -> Figure:
    """Time in which the model writes the default number of texts and reads them once, over that of 1,000 steps of plain SFT."""
    from trl_ema import MeanTeacherConfig
    from trl_ema.regularizers.known_states import states_before
    from trl_ema.texts import write_texts

    rehearsal = stepper.regularizers[0]
    own = rehearsal.own
    number = MeanTeacherConfig.rehearsal_num_texts
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        texts = write_texts(
            own.model, own.tokenizer, own.sampling, f"{folder}/texts.safetensors", before=own.start.activate,
            fingerprint=own.fingerprint,
        )  # fmt: skip
        states_before(stepper.trainer, own.start, texts.ids, own.tokenizer.pad_token_id, taken=10**6)
        seconds = (time.perf_counter() - start) * number / len(texts.ids)
    tokens = own.sampling.num_tokens
    name = f"writing and reading {number} texts of {tokens} tokens / 1,000 steps of SFTTrainer ({title})"
    return ratio(name, 0.10, [seconds], [1000 * statistics.median(seconds_of_step)])


def _product(stepper: Stepper) -> tuple[Callable[[], object], int]:
    """Products in the shape of the model's MLP over the batch, some 10 GFLOP of them, and how many operations they are."""
    import torch

    config, ids = stepper.trainer.model.config, stepper.batch["input_ids"]
    shape = ids.numel(), config.hidden_size, config.intermediate_size
    dtype = torch.bfloat16 if stepper.trainer.args.bf16 else torch.float32
    left, right = (torch.randn(a, b, dtype=dtype, device=ids.device) for a, b in itertools.pairwise(shape))
    one = 2 * shape[0] * shape[1] * shape[2]
    times = max(1, round(1e10 / one))

    def product():
        for _ in range(times):
            left @ right

    return product, times * one


def _operations(stepper: Stepper) -> int:
    """Floating point operations of all matrix products of a step."""
    import bitsandbytes  # noqa: F401  its operators
    import torch
    from torch.utils.flop_counter import FlopCounterMode, flop_registry

    aten = torch.ops.aten
    attention = aten._scaled_dot_product_flash_attention
    counter = FlopCounterMode(
        display=False,
        custom_mapping={torch.ops.bitsandbytes.gemm_4bit: lambda a, b, shape, *_, **__: 2 * math.prod(a) * shape[0]},
    )
    counter.flop_registry |= {
        aten.addmm_: flop_registry[aten.addmm],
        aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[attention],
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
            aten._scaled_dot_product_flash_attention_backward
        ],
    }
    with counter:
        stepper()
    return counter.get_total_flops()


# The loss


LOSS_SHAPES = {"49k words": (512, 576, 49152), "152k words": (256, 1536, 151936)}


def loss(args) -> list[Figure]:
    """Forward and backward of the fused loss, on random hidden states."""
    found = []
    for title, shape in LOSS_SHAPES.items():
        arms = loss_arms(*shape)
        seconds = alternate(arms, args.repetitions, f"loss, {title}")
        found += [
            ratio(f"fused loss / three matrix products ({title})", 1.25, seconds["ours"], seconds["products"]),
            ratio(f"fused loss / TRL's two chunked kernels ({title})", 0.50, seconds["ours"], seconds["TRL"]),
            ratio(f"fused loss / dense logits ({title})", None, seconds["ours"], seconds["dense"]),
        ]
        if "Liger" in arms:
            found.append(ratio(f"fused loss / Liger's fused JSD ({title})", None, seconds["ours"], seconds["Liger"]))
    return found


def loss_inputs(tokens: int, hidden: int, words: int):
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    student, teacher, weight = (
        torch.randn(n, hidden, generator=generator, device=device) * hidden**-0.5 for n in (tokens, tokens, words)
    )
    return (
        student.requires_grad_(),
        teacher,
        weight,
        torch.randint(words, (tokens,), generator=generator, device=device),
    )


def loss_arms(tokens: int, hidden: int, words: int) -> dict[str, Callable[[], object]]:
    import torch
    import torch.nn.functional as F
    from trl.kernels import ChunkedLogProbFunction
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    from trl_ema.losses import _empty, default_chunk_size, fused_linear_cross_entropy_kl

    student, teacher, weight, labels = loss_inputs(tokens, hidden, words)
    rows = default_chunk_size(student.device.type, words)
    logits = _empty(min(rows, tokens), words, student.dtype, student.device)

    def ours():
        fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0).loss.backward()

    @torch.no_grad()
    def products():
        for start in range(0, tokens, rows):
            chunk = student[start : start + rows]
            out = logits[: len(chunk)]
            torch.mm(chunk, weight.t(), out=out)
            torch.mm(teacher[start : start + rows], weight.t(), out=out)
            torch.mm(out, weight)

    def trl():
        options = (1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, None, 1.0, ("log_probs",))
        log_probs, *_ = ChunkedLogProbFunction.apply(student, weight, None, labels, *options)
        divergence, _ = ChunkedDivergenceFunction.apply(student, weight, None, teacher, weight, None, 0.0)
        (divergence.sum() - log_probs.sum()).backward()

    def dense():
        z_s, z_t = student @ weight.t(), teacher @ weight.t()
        kl = F.kl_div(z_s.log_softmax(-1), z_t.softmax(-1), reduction="sum")
        (F.cross_entropy(z_s, labels, reduction="sum") + kl).backward()

    arms: dict[str, Callable[[], object]] = {"ours": ours, "products": products, "TRL": trl, "dense": dense}
    if torch.cuda.is_available() and _installed("liger_kernel"):
        from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

        liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.5, weight_soft_loss=0.5, beta=0.0)
        arms["Liger"] = lambda: liger(student, weight, teacher, weight, labels).backward()
    return arms


# The average


def update(args) -> list[Figure]:
    """One update of a 210-layer adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from trl.experimental.sdft.teacher_sync import PEFTAdapterEMACallback

    from trl_ema.regularizers.teacher import MeanTeacher

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    ours, theirs = (get_peft_model(build_model("smollm2", False), lora).to(device) for _ in range(2))
    teacher = MeanTeacher(ours)
    students = torch.nn.ParameterList([p for p in ours.parameters() if p.requires_grad])
    size = sum(p.numel() for p in students)
    average, student = torch.zeros(size, device=device), torch.ones(size, device=device)
    callback = PEFTAdapterEMACallback(theirs, update_rate=0.001)
    from transformers import TrainerControl, TrainerState, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        call = (TrainingArguments(folder, use_cpu=not torch.cuda.is_available()), TrainerState(), TrainerControl())
    callback.on_train_begin(*call)
    arms: dict[str, Callable[[], object]] = {
        "ours": lambda: teacher.update(0.999),
        # Reads two numbers and writes one for each element, as an average must.
        "bytes": lambda: torch.add(average, student, out=average),
        "TRL": lambda: callback.on_step_end(*call),
    }
    if _installed("ema_pytorch"):
        from ema_pytorch import EMA

        averaged = EMA(students, beta=0.999, update_every=1, update_after_step=0)
        arms["ema-pytorch"] = averaged.update
    with tempfile.TemporaryDirectory() as folder:
        stepper = Stepper("ema", args, folder)
        arms["step"] = stepper
        seconds = alternate(arms, args.repetitions, "updates")
    found = [
        ratio("average / a step", 0.003, seconds["ours"], seconds["step"]),
        ratio("average / moving its bytes", 1.2, seconds["ours"], seconds["bytes"]),
        ratio("average / TRL's PEFTAdapterEMACallback", None, seconds["ours"], seconds["TRL"]),
    ]
    if "ema-pytorch" in seconds:
        found.append(ratio("average / ema-pytorch", None, seconds["ours"], seconds["ema-pytorch"]))
    return found


# Memory


def memory(args) -> list[Figure]:
    """Peak memory over the loaded model, at 152k words: each trainer in fresh processes, in turn."""
    found = []
    for tokens in (512, 2048):
        arms = ("sft", "ema", "rehearsal", "second model") if tokens == 2048 else ("sft", "ema")
        peaks: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(args.memory_repetitions):
            for arm in arms:
                options = ("--model", "qwen2", "--tokens", tokens, "--batch_size", 1)
                peaks[arm].append(_fresh("memory-of", arm, *options))
        title = f"2-layer Qwen2-1.5B, {tokens} tokens"
        found.append(ratio(f"peak memory over the model, ema / SFTTrainer ({title})", 1.01, peaks["ema"], peaks["sft"]))
        if "rehearsal" in peaks:
            name = f"peak memory over the model, rehearsal / SFTTrainer ({title})"
            found.append(ratio(name, 1.02, peaks["rehearsal"], peaks["sft"]))
        if "second model" in peaks:
            name = f"peak memory over the model, ema / second model ({title})"
            found.append(ratio(name, 0.40, peaks["ema"], peaks["second model"]))
    return found


def _fresh(*arguments) -> float:
    """MiB that a fresh process of this script prints."""
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")
    return float(done.stdout.strip().splitlines()[-1])


def memory_of(args) -> None:
    """Peak of a step over what the model itself takes, less the teacher's own copy of the adapter."""
    import trl_ema.measurement  # noqa: F401  libraries are not what a trainer takes

    with tempfile.TemporaryDirectory() as folder:
        before, copy = _held_mib(), 0.0
        model = build_model(args.model, args.nf4)
        weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
        del model
        _reset_peak()
        stepper = Stepper(args.arm, args, folder)
        teacher = getattr(stepper.trainer, "teacher", None)
        if teacher is not None:
            copy = sum(p.numel() * p.element_size() for p in teacher.students()) / 2**20
        _reset_peak()
        stepper()
        print(_peak_mib() - before - weights - copy)


def _held_mib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated() / 2**20
    return _status("VmRSS")


def _peak_mib() -> float:
    import torch

    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else _status("VmHWM")


def _reset_peak() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _status(field: str) -> float:
    # Not getrusage: its maximum is inherited from the parent.
    return int(re.search(rf"{field}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10


# Growth


def scaling(args) -> list[Figure]:
    """Slope of log time over log tokens from 256 to 8,192 tokens, and the scratch memory of the loss."""
    import numpy as np

    sizes = (256, 512, 1024, 2048) if args.quick else (256, 512, 1024, 2048, 4096, 8192)
    arms = {n: loss_arms(n, *LOSS_SHAPES["49k words"][1:])["ours"] for n in sizes}
    found = [_slope("fused loss", alternate(arms, args.repetitions, "growth of the loss"))]
    with tempfile.TemporaryDirectory() as folder:
        changes = {"model": "smollm2", "tokens": 128, "batch_size": max(sizes) // 128}
        stepper = Stepper("ema", argparse.Namespace(**vars(args) | changes), folder)
        steppers = {tokens: partial(stepper, tokens // 128) for tokens in sizes[: -1 if args.quick else None]}
        found.append(_slope("step", alternate(steppers, max(3, args.repetitions // 2), "growth of a step")))
    scratch = [_fresh("memory-of-loss", n) for n in (1024, 8192)]
    found.append(Figure.of("scratch memory of the loss, 8,192 tokens / 1,024", 1.05, [scratch[1] / scratch[0]]))
    return [f for f in found if not np.isnan(f.median)]


def _slope(name: str, seconds: dict[int, list[float]]) -> Figure:
    import numpy as np

    tokens = np.log(list(seconds))
    slopes = [np.polyfit(tokens, np.log(times), 1)[0] for times in zip(*seconds.values(), strict=True)]
    return Figure.of(f"{name}, slope of log time over log tokens ({min(seconds):,} to {max(seconds):,})", 1.02, slopes)


def memory_of_loss(args) -> None:
    from trl_ema.losses import fused_linear_cross_entropy_kl

    student, teacher, weight, labels = loss_inputs(args.tokens_of_loss, *LOSS_SHAPES["49k words"][1:])
    fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0)  # warms the libraries up
    _reset_peak()
    before = _held_mib()
    # Without the gradient, which is as large as the hidden states.
    fused_linear_cross_entropy_kl(student, teacher, weight, labels, 1.0)
    print(_peak_mib() - before - student.numel() * 4 / 2**20)


# All of it


# Beyond the figures that have a goal.
WIDER: list[dict] = [
    dict(model="smollm2", arms=["sft", "ema", "adapter off"], nf4=True),
    dict(model="smollm2", arms=["sft", "ema", "second model"], rows="prompted"),
    dict(model="smollm2", arms=["sft", "ema", "adapter off"], rows="padded"),
    dict(model="smollm2", arms=["sft", "ema", "adapter off"], rows="packed"),
    dict(model="smollm2", arms=["sft", "ema", "adapter off"], tokens=2048, batch_size=1),
]


def everything(args) -> list[Figure]:
    found = []
    for changes in (
        dict(
            model="smollm2",
            arms=["sft", "ema", "ema, a quarter", "frozen", "second model"] if args.quick else list(ARMS),
        ),
        dict(model="smollm2", arms=["sft", "ema", "ema, a quarter", "frozen"], checkpointing=True),
        dict(model="qwen2", arms=["sft", "ema", "second model"]),
        *([] if args.quick else WIDER),
    ):
        found += step(argparse.Namespace(**vars(args) | changes))
        save(found, args)
        gc.collect()  # a trainer and its callbacks hold one another
    for part in (loss, update, memory, scaling):
        found += part(args)
        save(found, args)
        gc.collect()
    return found


def save(figures: list[Figure], args) -> None:
    if args.json:
        from trl_ema.files import write_json
        from trl_ema.provenance import provenance

        made_by = {"command": sys.argv[1:], **provenance()}
        write_json(args.json, {"provenance": made_by, "figures": [asdict(figure) for figure in figures]})


def report(figures: list[Figure], args) -> None:
    from trl_ema.provenance import provenance

    print(json.dumps(provenance(), indent=2))
    print("| figure | goal | median | quartiles | met |\n|---|---|---|---|---|")
    for figure in figures:
        print(figure.row())
    save(figures, args)
    if args.plot:
        plot(figures, args.plot)


def plot(figures: list[Figure], path: str) -> None:
    """Ratios with their quartiles, and a mark where each should be at most; those over 2 are cut, their number stays."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    shown = figures[::-1]
    _, axes = plt.subplots(figsize=(10, 0.32 * len(shown) + 1), layout="constrained")
    places = range(len(shown))
    axes.barh(places, [f.median for f in shown], color="#4c78a8", height=0.6)
    spread = [[f.median - f.low for f in shown], [f.high - f.median for f in shown]]
    axes.errorbar([f.median for f in shown], places, xerr=spread, fmt="none", ecolor="black", capsize=2)
    goals = [(f.goal, place) for place, f in zip(places, shown, strict=True) if f.goal is not None]
    axes.plot(
        [goal for goal, _ in goals],
        [place for _, place in goals],
        "|",
        color="#e45756",
        markersize=14,
        markeredgewidth=2.5,
        label="goal, at most",
    )
    for figure, place in zip(shown, places, strict=True):
        axes.text(2.02, place, f"{figure.median:.3g}", fontsize=7, verticalalignment="center")
    axes.set_yticks(places, [f.name for f in shown], fontsize=7)
    axes.set_xlim(0, 2)
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("ratio, and its median at the right")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), fontsize=7)
    plt.savefig(path, dpi=100)


STEP_DEFAULTS: dict = dict(
    model="smollm2", arms=list(ARMS), tokens=None, batch_size=None, rows="equal", checkpointing=False, bf16=False, nf4=False,
)  # fmt: skip


def _add_step_options(sub) -> None:
    sub.add_argument("--model", help="`smollm2`, `qwen2` (2 layers, 152k words) or a folder")
    sub.add_argument("--arms", nargs="+", choices=ARMS, help="of `step`; `sft` has to be one")
    sub.add_argument("--tokens", type=int, help="tokens of a sequence; default 128")
    sub.add_argument("--batch_size", type=int, help="sequences of a step; default 4")
    sub.add_argument(
        "--rows",
        choices=("equal", "prompted", "padded", "packed"),
        help="equal lengths, half of each a prompt without labels, or a quarter to whole of them",
    )
    sub.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    sub.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    sub.add_argument("--nf4", action="store_true", help="4-bit base")
    sub.set_defaults(**STEP_DEFAULTS)


PARTS = {"all": everything, "step": step, "loss": loss, "update": update, "memory": memory, "scaling": scaling}
HIDDEN = {"memory-of": memory_of, "memory-of-loss": memory_of_loss}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in (*PARTS, *HIDDEN):
        sub = commands.add_parser(
            name, help=(PARTS[name].__doc__ or "every figure") if name in PARTS else argparse.SUPPRESS
        )
        if name == "memory-of":
            sub.add_argument("arm", choices=ARMS)
        if name == "memory-of-loss":
            sub.add_argument("tokens_of_loss", type=int)
        sub.add_argument("--repetitions", type=int, help="of each arm; default 9, 3 with --quick")
        sub.add_argument("--memory_repetitions", type=int, default=3, help="fresh processes of each arm")
        sub.add_argument("--quick", action="store_true", help="fewer repetitions and sizes")
        sub.add_argument("--json", help="file for all figures")
        sub.add_argument("--plot", help="picture of all figures")
        if name in ("step", "update", "memory-of"):
            _add_step_options(sub)
        else:
            sub.set_defaults(**STEP_DEFAULTS)
    args = parser.parse_args(arguments)
    if "sft" not in args.arms:
        parser.error("--arms has to contain `sft`, which the others are compared with.")
    args.repetitions = args.repetitions or (3 if args.quick else 9)
    args.memory_repetitions = 1 if args.quick else args.memory_repetitions
    return args


def main() -> None:
    warnings.filterwarnings("ignore")
    args = parse(sys.argv[1:])
    if args.command in HIDDEN:
        HIDDEN[args.command](args)
    else:
        report(PARTS[args.command](args), args)


if __name__ == "__main__":
    main()
