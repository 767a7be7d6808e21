"""
One GPU, offline, random weights of Qwen2-1.5B's shape: is the loss right, and what does a teacher cost?

    python benchmarks/gpu.py --output_dir out [--smoke] [--only loss_right loss_speed first_step steps] [--steps …]

Writes `out/gpu.json` as it goes; a section that fails says so and the next one runs. Arms take turns, figures are medians.
`--smoke` is everything at tiny size, on a CPU too, where Triton's kernel runs in its interpreter (TRITON_INTERPRET=1).
"""

import argparse
import functools
import gc
import json
import os
import statistics
import tempfile
import time
import traceback
import warnings


os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
import datasets
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig, losses
from trl_ema.losses import fused_linear_cross_entropy_kl


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12, vocab_size=151936)
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=997)
ARMS = {
    "sft": None,
    "ema": dict(teacher="ema", ema_decay=0.999),
    "a quarter": dict(teacher="ema", ema_decay=0.999, kl_fraction=0.25),
    "frozen": dict(teacher="frozen"),
    # Of the texts that the model writes, two of 96 tokens are beside each batch; its states of them are known before the first step.
    "rehearsal": dict(
        teacher="none", rehearsal_weight=4.0, rehearsal_num_texts=64, rehearsal_chat=False, rehearsal_start="<eos>"
    ),
}


class Run:
    """Figures by name, written to a file with each one; and what is left of the time."""

    def __init__(self, output_dir: str, smoke: bool, seconds: float, kinds: list[str]):
        os.makedirs(output_dir, exist_ok=True)
        self.path, self.smoke = os.path.join(output_dir, "gpu.json"), smoke
        self.size = TINY if smoke else FULL
        self.start, self.end, self.kinds = time.time(), time.time() + seconds, kinds
        self.figures: dict[str, object] = {}

    def note(self, name: str, value) -> None:
        self.figures[name] = value
        print(f"[{time.time() - self.start:6.1f} s] {name}: {value}", flush=True)
        with open(self.path, "w") as file:
            json.dump(self.figures, file, indent=1, default=str)

    @property
    def out_of_time(self) -> bool:
        return time.time() > self.end


def milliseconds(function) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def medians(arms: dict, repetitions: int, warmup: int = 2) -> dict[str, float]:
    """Of each arm's time in ms; they take turns."""
    for function in arms.values():
        for _ in range(warmup):
            function()
    times: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repetitions):
        for name, function in arms.items():
            times[name].append(milliseconds(function))
    return {name: round(statistics.median(values), 3) for name, values in times.items()}


def loss_inputs(tokens, hidden_size, vocabulary, dtype, spread=0.05):
    g = torch.Generator(DEVICE).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=g, device=DEVICE)

    student = 3 * normal(tokens, hidden_size)
    teacher = student + 3 * spread * normal(tokens, hidden_size)
    weight = normal(vocabulary, hidden_size) * 4 / 3 * hidden_size**-0.5
    labels = torch.randint(vocabulary, (tokens,), generator=g, device=DEVICE)
    labels[::5] = -100
    return student.to(dtype), teacher.to(dtype), weight.to(dtype), labels


def dense(student, teacher, weight, labels, direction):
    """CE, divergence and the gradient of their sum, in float64."""
    x = student.double().requires_grad_()
    z_s, z_t = x @ weight.double().t(), teacher.double() @ weight.double().t()
    log_s, log_t = z_s.log_softmax(-1), z_t.log_softmax(-1)
    if direction == "forward":
        kl = (log_t.exp() * (log_t - log_s)).sum()
    elif direction == "reverse":
        kl = (log_s.exp() * (log_s - log_t)).sum()
    else:
        log_m = ((log_s.exp() + log_t.exp()) / 2).log()
        kl = ((log_t.exp() * (log_t - log_m)).sum() + (log_s.exp() * (log_s - log_m)).sum()) / 2
    ce = torch.nn.functional.cross_entropy(z_s, labels, reduction="sum")
    (ce + kl).backward()
    return float(ce), float(kl), x.grad


def loss_right(run: Run) -> None:
    """Relative errors against float64 on the same rounded inputs, with the kernel and without."""
    shape = (24, 16, 99) if run.smoke else (700, 256, 20011)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        student, teacher, weight, labels = loss_inputs(*shape, dtype)
        for direction in ("forward", "reverse", "jsd"):
            ce, kl, grad = dense(student, teacher, weight, labels, direction)
            for own_head in (False, True):
                x = student.clone().requires_grad_()
                head = dict(teacher_weight=weight.clone()) if own_head else {}
                out = fused_linear_cross_entropy_kl(x, teacher, weight, labels, 1.0, direction=direction, **head)
                out.loss.backward()
                errors = dict(
                    ce=float(out.ce_loss) / ce - 1, kl=float(out.kl_loss) / kl - 1,
                    grad=float((x.grad.double() - grad).norm() / grad.norm()),
                )  # fmt: skip
                name = f"right/{str(dtype)[6:]}/{direction}{'/own head' if own_head else ''}"
                run.note(name, {key: float(f"{value:.2g}") for key, value in errors.items()})
    student, _, weight, labels = loss_inputs(*shape, torch.bfloat16)
    equal = fused_linear_cross_entropy_kl(student, student, weight, labels, 1.0)
    run.note("right/divergence of equal models", float(equal.kl_loss))


def loss_speed(run: Run) -> None:
    """Forward and backward of the loss alone, in ms."""
    from trl.kernels import ChunkedLogProbFunction

    tokens, hidden_size, vocabulary = (24, 16, 99) if run.smoke else (8192, 1536, 151936)
    student, teacher, weight, labels = loss_inputs(tokens, hidden_size, vocabulary, torch.bfloat16)
    labels, x = labels.clamp(min=0), student.clone().requires_grad_()

    def ours(weight=weight, x=x, teacher=teacher, **options):
        fused_linear_cross_entropy_kl(x, teacher, weight, labels, 1.0, **options).loss.backward()
        x.grad = None

    def trl():
        outputs = ("log_probs", "entropy", "is_top1")
        log_probs, *_ = ChunkedLogProbFunction.apply(
            x, weight, None, labels, 1.0, min(vocabulary, 32768), None, 1.0, outputs
        )
        (-log_probs.sum()).backward()
        x.grad = None

    in_float32 = weight.float(), student.float().requires_grad_(), teacher.float()

    def under_autocast():
        with torch.autocast(DEVICE, torch.bfloat16):
            ours(*in_float32)

    rows = losses.default_chunk_size(DEVICE, vocabulary, torch.bfloat16 if losses._kernels(DEVICE) else None)
    rows = min(rows, tokens)
    logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16, device=DEVICE)

    def products():
        for _ in range(0, tokens, rows):
            torch.mm(student[:rows], weight.t(), out=logits)
            torch.mm(student[:rows], weight.t(), out=logits)
            torch.mm(logits, weight)

    arms = {
        "three products": products, "TRL's SFT head": trl, "forward": ours,
        "reverse": functools.partial(ours, direction="reverse"), "jsd": functools.partial(ours, direction="jsd"),
        "teacher's own head": functools.partial(ours, teacher_weight=weight.clone()),
        "float32 head, autocast": under_autocast, "CE alone": lambda: ours(teacher=teacher[:0]),
    }  # fmt: skip
    times = medians(arms, 1 if run.smoke else 10, 1)
    run.note("loss/ms", times)
    run.note("loss/three products", round(times["forward"] / times["three products"], 3))
    run.note("loss/TRL's SFT head", round(times["forward"] / times["TRL's SFT head"], 3))
    if DEVICE == "cuda":
        _memory_of_loss(run, ours, trl)
        run.note("profile/loss", profile_of(ours)[:10])
    if losses._kernels(DEVICE) is not None:
        _kernel_variants(run, ours, tokens)


def _memory_of_loss(run, ours, trl) -> None:
    def scratch(function):
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20)

    run.note("loss/scratch, MiB", {"ours": scratch(ours), "TRL's SFT head": scratch(trl)})


def _kernel_variants(run, ours, tokens) -> None:
    """Other shapes of the kernel's blocks and chunks, for whoever has another card."""
    from trl_ema import kernels

    names = ("_WARPS", "_WORDS_OF_THREAD", "_BLOCK")
    saved = {name: getattr(kernels, name) for name in names}
    variants = [(8, 8), (4, 8), (16, 8), (8, 16), (4, 16)]
    best = None
    for warps, words in variants[:2] if run.smoke else variants:
        vars(kernels).update(_WARPS=warps, _WORDS_OF_THREAD=words, _BLOCK=32 * warps * words)
        time_ms = medians({"": ours}, 1 if run.smoke else 10, 1)[""]
        run.note(f"loss/{warps} warps, {words} words each, ms", time_ms)
        best = min(best or (time_ms, None), (time_ms, (warps, words)), key=lambda pair: pair[0])
    if best[1]:
        warps, words = best[1]
        vars(kernels).update(_WARPS=warps, _WORDS_OF_THREAD=words, _BLOCK=32 * warps * words)
    chunks = {
        f"{rows} rows": functools.partial(ours, chunk_size=rows)
        for rows in (256, 512, 768, 1024, 2048)
        if rows <= tokens
    }
    run.note("loss/chunks, ms", medians(chunks, 4, 1))
    vars(kernels).update(saved)


def tokenizer():
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i + 3 for i in range(90)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@functools.cache
def model_folder(smoke: bool) -> str:
    torch.manual_seed(0)
    default, folder = torch.get_default_dtype(), tempfile.mkdtemp()
    torch.set_default_dtype(torch.bfloat16)
    size = TINY if smoke else FULL
    config = Qwen2Config(**size, num_key_value_heads=2, tie_word_embeddings=True, max_position_embeddings=8192)
    with torch.device(DEVICE):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(default)
    model.save_pretrained(folder)
    return folder


def stepper(
    run: Run, arm: str, batch: int, tokens: int, *, nf4=False, dtype=torch.bfloat16, checkpointing=False, prompt=0
):
    """One optimizer step of TRL's trainer or ours, teacher included, as a function; and the trainer."""
    quantization = None
    if nf4:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(run.smoke), dtype=dtype, quantization_config=quantization,
        device_map={"": 0} if DEVICE == "cuda" else None,
    )  # fmt: skip
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(3, run.size["vocab_size"], (batch, tokens), generator=g).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": [[-100] * prompt + row[prompt:] for row in ids]})
    rows = datasets.concatenate_datasets([rows, rows])  # so that the first batch is not the last
    options = dict(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=batch, max_length=tokens, bf16=True, report_to="none",
        gradient_checkpointing=checkpointing, save_strategy="no", logging_strategy="no", disable_tqdm=True, max_steps=10**6,
        use_cpu=DEVICE == "cpu", optim="adamw_torch_fused",
    )  # fmt: skip
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    common = dict(train_dataset=rows, processing_class=tokenizer(), peft_config=lora)
    if ARMS[arm] is None:
        trainer = SFTTrainer(model, SFTConfig(**options), **common)
    else:
        own = dict(ARMS[arm])
        if run.smoke and arm == "rehearsal":
            own |= dict(rehearsal_num_texts=4, rehearsal_num_tokens=8)
        trainer = EMARegularizedSFTTrainer(model, MeanTeacherConfig(**options, **own), **common)
    trainer.state.max_steps, trainer.current_gradient_accumulation_steps = 10**6, 1
    if checkpointing:
        trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    trainer.create_optimizer()
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    model.train()
    inputs = next(iter(trainer.get_train_dataloader()))
    items = (inputs["labels"][:, 1:] != -100).sum()
    trained = [p for p in model.parameters() if p.requires_grad]
    regularizers = getattr(trainer, "regularizers", [])
    began = time.time()
    for regularizer in regularizers:  # which lets the model write its texts
        regularizer.begin(trainer)
    if arm == "rehearsal":
        run.note("writing 64 texts of 96 tokens and reading them, s", round(time.time() - began, 1))

    def step():
        for regularizer in regularizers:
            regularizer.before_step(
                [inputs], trainer.state.global_step, trainer.args.device, trainer.accelerator.gather
            )
        loss = trainer.training_step(model, dict(inputs), items)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if getattr(trainer, "teacher", None) is not None:
            trainer.after_step()
        trainer.state.global_step += 1
        return loss

    return step, trainer


def first_step(run: Run) -> None:
    """Where the teacher is the student: no divergence, and the loss of plain SFT."""
    for nf4 in (False, True) if DEVICE == "cuda" else (False,):
        tokens = 16 if run.smoke else 256
        step, trainer = stepper(run, "ema", 2, tokens, nf4=nf4)
        step()
        divergence = next(regularizer for regularizer in trainer.regularizers if regularizer.name == "teacher")
        (ce, labels), (kl, taught) = trainer.ce_mean.sums.tolist(), divergence.kl_of_log.sums.tolist()
        sft, _ = stepper(run, "sft", 2, tokens, nf4=nf4)
        figures = dict(ce=ce / labels, kl=kl / taught, sft=float(sft()))
        run.note(f"first step/{'NF4' if nf4 else 'bf16'}", figures)


def synchronizations(step) -> list[str]:
    """Where the host waits for the GPU in one step."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
    torch.cuda.set_sync_debug_mode("default")
    found = [f"{w.filename.split('site-packages/')[-1]}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]
    return sorted(found)


def profile_of(step) -> list:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    most = sorted(profiler.key_averages(), key=lambda event: -event.device_time_total)[:24]
    return [(event.key[:70], event.count, round(event.device_time_total / 1e3, 2)) for event in most]


def steps(run: Run) -> None:
    """Steps of the arms, in turns: ms, ratio to plain SFT, peak memory over the model."""
    batch, tokens = (2, 16) if run.smoke else (8, 1024)
    short = (2, 16 if run.smoke else 512)
    nf4 = DEVICE == "cuda"
    kinds = {
        "bf16, 8 x 1024": (list(ARMS), batch, tokens, {}),
        "float32 weights (TRL's default), 8 x 1024": (["sft", "ema"], batch, tokens, dict(dtype=torch.float32)),
        "NF4, checkpointing, 8 x 1024": (
            ["sft", "ema", "a quarter", "rehearsal"],
            batch,
            tokens,
            dict(nf4=nf4, checkpointing=True),
        ),
        "bf16, half of it prompt, 8 x 1024": (["sft", "ema"], batch, tokens, dict(prompt=tokens // 2)),
        "bf16, 2 x 512": (["sft", "ema"], *short, {}),
        "NF4, 2 x 512": (["sft", "ema"], *short, dict(nf4=nf4)),
    }
    for title, (arms, rows, length, options) in kinds.items():
        if run.kinds and title not in run.kinds:
            continue
        if run.out_of_time:
            run.note(f"step/{title}", "left out: no time")
            continue
        built = {arm: stepper(run, arm, rows, length, **options) for arm in arms}
        times = medians({arm: step for arm, (step, _) in built.items()}, 2 if run.smoke else 8)
        for arm in arms:
            figures = dict(ms=times[arm], ratio=round(times[arm] / times["sft"], 3))
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                built[arm][0]()
                figures["GiB over the models"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
            run.note(f"step/{title}/{arm}", figures)
        if DEVICE == "cuda" and title == "bf16, 8 x 1024":
            for arm in arms:
                run.note(f"synchronizations/{arm}", synchronizations(built[arm][0]))
            for arm in arms[:2]:
                run.note(f"profile/{arm}", profile_of(built[arm][0]))
            teacher = built["ema"][1].teacher
            run.note("update of the teacher, ms", medians({"": lambda t=teacher: t.update(0.999)}, 10)[""])
        del built
        gc.collect()
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {f.__name__: f for f in (loss_right, loss_speed, first_step, steps)}
    parser.add_argument("--output_dir", default="gpu_benchmark")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--only", nargs="*", choices=list(sections), default=list(sections))
    parser.add_argument("--steps", nargs="*", default=[], help='of these kinds alone, such as "bf16, 8 x 1024"')
    parser.add_argument("--seconds", type=float, default=220, help="after which nothing new is begun")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    datasets.disable_progress_bars()
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        from trl_ema import kernels

        losses._kernels = lambda _: kernels
    run = Run(args.output_dir, args.smoke, args.seconds, args.steps)
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "trl", "peft", "bitsandbytes")}
    run.note("versions", versions | {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"})
    for name in args.only:
        if run.out_of_time:
            run.note(name, "left out: no time")
            continue
        try:
            sections[name](run)
        except Exception as error:
            run.note(f"{name}: failed", f"{type(error).__name__}: {error}")
            traceback.print_exc(limit=8)
        gc.collect()
    run.note("seconds", round(time.time() - run.start, 1))


if __name__ == "__main__":
    main()
