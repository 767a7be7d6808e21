"""
Adapt a language model to medicine, by rehearsal or under a mean teacher, and see what it learned and what it kept.

With no arguments, the offline demo: SmolLM2-135M-Instruct in 4-bit NF4 learns medical definitions and rehearses
what it knew, in about ten minutes on 2 CPU cores.

    accelerate launch recipes/medical_ema.py

With a model and data from the hub (or local paths), on a GPU:

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/medical_ema.py \\
        --config recipes/configs/qwen2_1.5b_qlora.yaml

Every option of `MeanTeacherConfig`, TRL's `ModelConfig` and the job's own can be given on the command line or in the YAML
of `--config`; the command line wins. `trl-ema train` runs this very file.
"""

import logging
import os
import signal
import sys
import time

from datasets import Dataset

from trl_ema import EMARegularizedSFTTrainer
from trl_ema.checks import check_free_space, check_optimizer
from trl_ema.comparison.changes import changes_table
from trl_ema.data import as_chat, hub_errors
from trl_ema.evaluation.drift import general_rows
from trl_ema.evaluation.runner import tasks_to_ask
from trl_ema.files import check_output_dir, write_json
from trl_ema.inputs import load_parts, load_to_go_on, load_tokenizer, lora, quantization, training_sets
from trl_ema.measurement import (
    DriftCallback,
    Measurement,
    TasksCallback,
    TrainedDrift,
    card_figures,
    card_results,
    samples_and_table,
)
from trl_ema.model_card import write_model_card
from trl_ema.noise import hide_noise
from trl_ema.options import changed
from trl_ema.script import describe_run, parse, resume_from, sources
from trl_ema.tracking import final_figures, group_run, log_when_ended


def main(arguments: list[str], subspace: type | None = None) -> None:
    """`subspace`: further options, which make another adapter than LoRA; see `recipes/subspaces.py`."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    hide_noise()
    start = time.perf_counter()
    args, training_args, model_args, *others = parse(arguments, *([] if subspace is None else [subspace]))
    say = print if training_args.process_index == 0 else lambda *_: None
    if others and args.adapter_name_or_path is not None:
        raise ValueError("A sub-space makes an adapter of its own. Leave out `--adapter_name_or_path` or `--subspace`.")
    check_output_dir(training_args.output_dir)
    check_optimizer(training_args)
    checkpoint = resume_from(training_args)
    manager, tasks = None, {}
    if args.eval_tasks:
        manager, tasks = tasks_to_ask(args.eval_tasks, tuple(args.eval_tasks_include_path or ()))

    # Data: rows to learn, rows held out, and questions of general knowledge, for what is forgotten beside the domain
    with training_args.main_process_first(local=False, desc="model and data"):
        adapter = args.adapter_name_or_path
        model_name, tokenizer = load_tokenizer(model_args, training_args.trust_remote_code, adapter)
        parts = load_parts(args, tokenizer, training_args.dataset_text_field)
    general = as_chat(Dataset.from_list(general_rows()), tokenizer)
    train, held_out = training_sets(parts, general, args, tokenizer, training_args)

    # Model and adapter: TRL loads the one and makes the other
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **(training_args.model_init_kwargs or {}),
    }
    model, peft_config, save = model_name, lora(model_args), EMARegularizedSFTTrainer.save_model
    if others:
        model, peft_config, save = others[0].make(model_name, tokenizer, training_args, model_args)
    elif adapter is not None:  # the model before this training is base plus adapter
        model, peft_config = load_to_go_on(adapter, model_name, tokenizer, training_args, model_args), None

    # Trainer: TRL's own, with the teacher of `MeanTeacherConfig`
    if training_args.metric_for_best_model in ("loss", "eval_loss"):  # of two sets that are evaluated
        training_args.metric_for_best_model = "eval_domain_loss"
    made = {"assistant_only_loss": False} if args.is_mixture else {}  # its rows have their labels already
    with hub_errors("model", model_name), changed(training_args, **made):
        trainer = EMARegularizedSFTTrainer(
            model,
            args=training_args,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            quantization_config=quantization(model_args, training_args) if isinstance(model, str) else None,
            peft_config=peft_config,
        )
    group_run(trainer)
    if args.drift_steps:
        trainer.add_callback(DriftCallback(trainer, args.drift_steps))
    elif str(training_args.metric_for_best_model).endswith("drift"):
        TrainedDrift(trainer)  # is then measured at each evaluation
    asked = TasksCallback(trainer, tasks, args.eval_tasks_steps, manager) if tasks else None
    if asked is not None:
        trainer.add_callback(asked)
    check_free_space(trainer, checkpoint=False)
    rows = len(trainer.train_dataset) if hasattr(trainer.train_dataset, "__len__") else "a stream of"
    say(f"{rows} training rows, {len(held_out['domain'])} held out.")

    # Train
    questions = parts[0].held_out
    has_prompts = {"prompt", "completion"} <= set(questions.column_names)
    samples = questions.select(range(min(args.generations, len(questions)) if has_prompts else 0))
    # Of the model as it is now, too.
    measurement = Measurement(trainer, samples, args.generation_tokens) if args.measure else None
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.stopped_by:
        name = signal.Signals(trainer.stopped_by).name
        say(f"Stopped by {name} after step {trainer.state.global_step}. Go on with `--resume_from_checkpoint true`.")
        return
    save(trainer)

    # Measure
    metrics: dict = {}
    trainer.model_card_details = {"Sources": sources(args, model_args)}
    if measurement is not None:
        say("Measuring the model as it was before, and as it is now ...")
        metrics, _ = measurement.models()
        trainer.model_card_details["Held-out figures, nats per token"] = card_figures(metrics)
        named = {loaded.name: part for loaded, part in zip(parts, args.parts, strict=True)}
        trainer.model_card_results = card_results(metrics, named)
    metrics["log"] = trainer.state.log_history
    seconds = round(time.perf_counter() - start)
    metrics["provenance"] = describe_run(trainer, args, model_args, parts) | {"wall_seconds": seconds}

    # Save
    if trainer.is_world_process_zero():
        path = os.path.join(training_args.output_dir, "metrics.json")
        write_model_card(trainer, training_args.output_dir)
        write_json(path, metrics)
        log_when_ended(trainer, final_figures(metrics))
        if args.measure:
            say(samples_and_table(metrics))
        if asked is not None and (folders := asked.first_and_last()) is not None:
            say(f"\n{changes_table(*folders, asked.tasks)}")
        say(f"\nSaved the student to {training_args.output_dir}, all figures to {path}.")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_name)


if __name__ == "__main__":
    main(sys.argv[1:])
