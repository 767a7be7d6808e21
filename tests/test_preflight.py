"""`trl-ema check`: a training, seen beforehand and without weights, beside what the training then does."""

import json
import math
import os
import sys
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DeepSpeedPlugin, DynamoBackend, FullyShardedDataParallelPlugin, ParallelismConfig
from conftest import config, lora, rows, tiny_config, tiny_model
from datasets import Dataset
from peft import get_peft_model
from test_cli import trl_ema
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import ModelConfig

from trl_ema import MeanTeacherConfig, memory, preflight
from trl_ema.checks import bytes_to_write, check_optimizer
from trl_ema.data import tokenize_rows
from trl_ema.fingerprint import tokenizer_fingerprint
from trl_ema.launch import checks_of_launch, launch_of, launcher_settings, sees_one_device, with_options_of_training
from trl_ema.memory import BFLOAT16, FLOAT32, NF4
from trl_ema.outlook import (
    bytes_of,
    checkpoints_kept,
    memory_of,
    memory_of_machine,
    shown_row,
    sizes_of,
    total_steps,
)
from trl_ema.preflight import TrainerWithoutWeights, with_trained_adapter
from trl_ema.processes import Launch, refuse_sharding
from trl_ema.refusals import Given, Refusals, as_far_as_it_goes, is_hollow
from trl_ema.script import TrainingScriptArguments
from trl_ema.texts import Sampling, texts_path


OF_MODE = {"ddp": {}, "zero2": {"zero_stage": 2}, "zero3": {"zero_stage": 3}, "fsdp2": {"fsdp_version": 2}}
QUICK = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none", "--eval_fraction", "0.2", "--max_length", "48"]


def check(folder, *arguments, **options):
    return trl_ema("check", "--model_name_or_path", "model", *QUICK, *arguments, cwd=folder, **options)


def said(done):
    return " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def workplace(tiny_folder):
    odd = [{"Frage": f"what is {i} the liver", "Antwort": f"the pain {i}"} for i in range(30)]
    Dataset.from_list(odd).to_csv(tiny_folder / "odd.csv")
    return tiny_folder


# What it shows


def test_texts_that_would_be_seen_more_often_than_was_measured_are_told(workplace):
    told = said(check(
        workplace, "--dataset_name", "data.jsonl", "--num_train_epochs", "12", "--per_device_train_batch_size", "4",
        "--rehearsal_weight", "4", "--rehearsal_num_texts", "16", "--rehearsal_num_tokens", "32",
    ))  # fmt: skip
    assert "each text is seen 24 times That is more often than was measured: give more texts" in told


def test_a_training_that_would_start_is_shown_and_leaves_nothing(workplace):
    before = sorted(os.listdir(workplace))
    done = check(
        workplace, "--dataset_name", "data.jsonl", "--output_dir", "deep/er/out", "--num_train_epochs", "2", "--ema_half_life",
        "0.25", "--kl_warmup_ratio", "0.5", "--warmup_steps", "3", "--per_device_train_batch_size", "4", "--save_steps", "5",
        "--gradient_accumulation_steps", "2", "--rehearsal_weight", "4", "--rehearsal_num_texts", "16",
        "--rehearsal_num_tokens", "32",
    )  # fmt: skip
    assert sorted(os.listdir(workplace)) == before
    told = said(done)
    assert "rehearsal: weight 4, each text is seen 4 times" in told  # 2 beside 4 rows, in 32 micro-batches
    assert "more often than was measured" not in told
    # 64 rows: 16 micro-batches, 8 steps an epoch.
    assert "16 optimizer steps of 8 rows on 1 process(es); 64 rows an epoch" in told
    assert f"half of it is replaced in 4 steps (0.25 of the run), decay {0.5 ** (1 / 4):.6g}" in told
    assert "3 steps of warmup" in told and "after a ramp of 8 steps" in told
    assert "4 checkpoint(s) of " in told and " data 64 16 64 " in told and "0.0 % 0.0 %" in told
    assert told.count("--- row ") == 3 and "⟦" in told and "\033" not in told
    assert told.endswith("`trl-ema train` would start.")


def test_an_adapter_that_is_gone_on_from_is_the_one_that_counts(workplace):
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    get_peft_model(base, lora(r=3)).save_pretrained(workplace / "first")
    arguments = ["--dataset_name", "data.jsonl", "--max_steps", "2", "--adapter_name_or_path"]
    done = trl_ema("check", *QUICK, *arguments, "first", cwd=workplace)
    assert "adapter: first" in said(done) and said(done).endswith("`trl-ema train` would start.")
    assert "the adapter that it goes on from, at most" in said(done)
    done = trl_ema(
        "check",
        *QUICK,
        *arguments,
        "model",
        "--eval_tasks",
        "no_such_task",
        "--eval_tasks_steps",
        "1",
        cwd=workplace,
        check=False,
    )
    assert done.returncode == 1
    assert "`adapter_name_or_path='model'` holds a whole model and no adapter" in said(done) and "no_such_task" in said(
        done
    )


def test_rows_are_shown_as_they_are_trained_on(tokenizer):
    ((ids, labels),) = (
        (row["input_ids"], row["labels"])
        for row in tokenize_rows(
            Dataset.from_list([
                {
                    "prompt": [{"role": "user", "content": "what is pain"}],
                    "completion": [{"role": "assistant", "content": "the drug"}],
                }
            ]),
            tokenizer,
        )
    )  # fmt: skip
    assert shown_row(ids, labels, tokenizer, False) == "<user> what is pain </s> <assistant>⟦the drug </s>⟧"
    assert shown_row(ids, labels, tokenizer, True) == "<user> what is pain </s> <assistant>\033[32mthe drug </s>\033[0m"
    long = shown_row([6] * 1000, [-100] * 1000, tokenizer, False)
    assert len(long) < 450 and "1,599 characters" in long


def test_shares_of_rows_that_are_cut_or_left_out_are_those_of_the_training(workplace):
    given = [
        {"prompt": "what " * (40 if i % 4 == 0 else 3), "completion": "pain " * (60 if i % 4 == 1 else 3)}
        for i in range(40)
    ]
    (workplace / "long.jsonl").write_text(
        "\n".join(json.dumps(row | {"prompt": f"{row['prompt']}{i}"}) for i, row in enumerate(given))
    )
    done = check(
        workplace, "--dataset_name", "long.jsonl", "--max_length", "32", "--max_steps", "2", "--output_dir", "out"
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("long ")).split()
    size, truncated, unlabelled = int(line[1]), float(line[-4]), float(line[-2])
    assert truncated > unlabelled > 10
    left = round(size * (1 - unlabelled / 100))
    assert f"; {left} rows an epoch" in said(done)


def test_a_large_data_set_is_looked_at_in_part_and_a_stream_at_its_beginning(workplace, monkeypatch):

    monkeypatch.setattr(preflight, "_ROWS", 20)
    told = said(check(workplace, "--dataset_name", "data.jsonl", "--output_dir", "out"))
    assert " data 64 16 20 " in told and "; 64 rows an epoch" in told
    streaming = [
        "--dataset_name",
        "data.jsonl",
        "--output_dir",
        "out",
        "--dataset_streaming",
        "true",
        "--eval_samples",
        "8",
    ]
    told = said(check(workplace, *streaming, "--max_steps", "7"))
    assert "7 optimizer steps of 8 rows" in told and "; a stream" in told and " data a stream 8 72 " in told
    refused = check(workplace, *streaming, check=False)
    assert refused.returncode == 1 and "steps must be known in advance" in refused.stdout


def test_a_mixture_is_told_by_the_rows_that_are_taken_and_not_by_those_looked_at(workplace, monkeypatch, caplog):
    caplog.set_level("INFO")
    columns = {"prompt": "Frage", "completion": "Antwort"}
    block = [{"path": "data.jsonl", "fraction": 0.8}, {"path": "odd.csv", "fraction": 0.2, "columns": columns}]
    (workplace / "shares.yaml").write_text(yaml.safe_dump({"datasets": block, "output_dir": "out"}))
    expected = "data 64 of 64 rows, 80 % of all odd 16 of 24 rows, 20 % of all"
    assert f"The mixture, shuffled: {expected}" in said(check(workplace, "--config", "shares.yaml"))
    monkeypatch.setattr(preflight, "_ROWS", 20)
    told = said(check(workplace, "--config", "shares.yaml"))
    assert f"looked at tell: {expected}" in told and "; 80 rows an epoch" in told
    replay = json.dumps({"path": "odd.csv", "columns": columns})
    arguments = ["--dataset_name", "data.jsonl", "--replay_dataset", replay, "--output_dir", "out"]
    assert f"data 64 of 64 rows, {6400 / 71:.4g} % of all odd 7 of 24 rows" in said(check(workplace, *arguments))
    assert "% of the mixture" not in caplog.text


def test_a_mixture_with_odd_columns_is_looked_at_part_by_part(workplace):
    block = {
        "datasets": [
            {"path": "data.jsonl", "fraction": 0.8},
            {"path": "odd.csv", "fraction": 0.2, "columns": {"prompt": "Frage", "completion": "Antwort"}},
        ]
    }
    (workplace / "mix.yaml").write_text(yaml.safe_dump(block))
    done = check(workplace, "--config", "mix.yaml", "--output_dir", "out", "--max_train_samples", "60")
    assert " odd 24 6 24 " in said(done) and "; 60 rows an epoch" in said(done) and "the pain" in done.stdout
    refused = check(workplace, "--config", "mix.yaml", "--output_dir", "out", "--max_train_samples", "150", check=False)
    assert refused.returncode == 1 and "`max_train_samples=150` with these fractions takes" in refused.stdout


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without a GPU, also where there is one."""
    monkeypatch.setattr(preflight, "has_accelerator", lambda: False)
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)


# As the shipped configurations: nothing is said of a CPU.
SHIPPED = {
    "model_name_or_path": "model", "dataset_name": "data.jsonl", "output_dir": "out", "teacher": "none", "lora_r": 4,
    "num_train_epochs": 1, "per_device_train_batch_size": 8, "max_length": 48, "eval_fraction": 0.2, "report_to": "none",
}  # fmt: skip


@pytest.mark.parametrize(
    ("precision", "reason"),
    [
        ({"bf16": True}, "Your setup doesn't support bf16/gpu."),
        ({}, "Your setup doesn't support bf16/gpu."),  # TRL's default
        ({"bf16": False, "tf32": True}, "--tf32 requires Ampere"),
    ],
)
def test_a_machine_without_a_gpu_is_told_apart_from_the_options(workplace, no_gpu, precision, reason):
    (workplace / "shipped.yaml").write_text(yaml.safe_dump(SHIPPED | precision))
    done = trl_ema("check", "--config", "shipped.yaml", cwd=workplace)
    assert done.returncode == 0
    assert f"This machine has no GPU: `trl-ema train` would refuse here. {reason}" in said(done)
    assert said(done).endswith("`trl-ema train` would start on a machine with a GPU.")
    assert done.stdout.count("--- row ") == 3 and "8 optimizer steps of 8 rows" in done.stdout
    assert "Memory of each of 1 process(es), ddp" in done.stdout and "MiB" in done.stdout


def test_what_is_wrong_with_the_options_is_refused_without_a_gpu_too(workplace, no_gpu):
    (workplace / "shipped.yaml").write_text(yaml.safe_dump(SHIPPED | {"bf16": True}))
    done = trl_ema("check", "--config", "shipped.yaml", "--generations", "-1", cwd=workplace, check=False)
    assert done.returncode == 1 and told_reasons(done) == ["`generations` must be"]
    assert "This machine has no GPU" in done.stdout and "8 optimizer steps of 8 rows" in done.stdout
    done = trl_ema("check", "--config", "shipped.yaml", "--use_cpu", "true", cwd=workplace)
    assert "no GPU" not in done.stdout and said(done).endswith("`trl-ema train` would start.")
    (workplace / "shipped.yaml").write_text(yaml.safe_dump(SHIPPED | {"fp16": True}))  # which does nothing on a CPU
    assert said(trl_ema("check", "--config", "shipped.yaml", cwd=workplace)).endswith("`trl-ema train` would start.")


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset_name", "odd.csv"], "Unknown data set columns ['Antwort', 'Frage']"),
        (
            ["--dataset_name", "data.jsonl", "--lora_target_modules", "no_proj"],
            "Target modules no_proj not found in the base",
        ),
        (["--dataset_name", "data.jsonl", "--lora_target_modules", "lm_head"], "has an adapter on `lm_head`"),
        (
            ["--dataset_name", "data.jsonl", "--eos_token", "<none>"],
            "The specified `eos_token` ('<none>') is not found",
        ),
        (["--dataset_name", "data.jsonl", "--label_smoothing_factor", "0.1"], "is not supported with a teacher"),
        (["--dataset_name", "data.jsonl", "--padding_free", "true"], "`max_length` is not enforced"),
        (["--dataset_name", "data.jsonl", "--max_length", "1"], "No token of the training data carries a label"),
        (["--dataset_name", "data.jsonl", "--resume_from_checkpoint", "nowhere"], "'nowhere' is no checkpoint"),
        (
            [
                "--dataset_name",
                "data.jsonl",
                "--rehearsal_weight",
                "1",
                "--rehearsal_num_texts",
                "1",
                "--rehearsal_num_tokens",
                "32",
            ],
            "1 texts are fewer than the 4 that a micro-batch rehearses",
        ),
        (
            ["--dataset_name", "data.jsonl", "--rehearsal_weight", "1", "--rehearsal_texts", "no.safetensors"],
            "There are no texts in",
        ),
        (["--dataset_name", "data.jsonl", "--replay_dataset", "gone.jsonl"], "There is no data file 'gone.jsonl'"),
    ],
)
def test_what_a_training_refuses_is_refused_in_its_words(workplace, arguments, message):
    done = check(workplace, *arguments, "--output_dir", "out", check=False)
    assert (
        done.returncode == 1
        and message in done.stdout
        and "`trl-ema train` would refuse, for 1 reason(s)" in done.stdout
    )


def test_all_reasons_are_told_at_once(workplace):
    (workplace / "file").write_text("")
    done = check(
        workplace,
        "--dataset_name",
        "gone.jsonl",
        "--lora_target_modules",
        "no_proj",
        "--output_dir",
        "file/out",
        check=False,
    )
    assert done.returncode == 1 and "for 3 reason(s)" in done.stdout
    for message in ("Cannot write to `output_dir='file/out'`", "no data file 'gone.jsonl'", "no_proj not found"):
        assert message in done.stdout


def told_reasons(done):
    """The first words of each."""
    return [" ".join(line.split()[1:4]) for line in done.stdout.splitlines() if line.startswith("  - ")]


def test_what_options_and_launcher_refuse_is_told_beside_all_else(workplace):
    """Each of the command line; an option is refused by argparse, by its class, or known to nobody."""
    options = ["--dataset_name", "gone.jsonl", "--lora_target_modules", "no_proj", "--output_dir", "out"]
    wrong = ["--max_steps", "many", "--kl_weight", "-1", "--ema_decay", "2", "--no_such", "3", "--generations", "-1"]
    done = check(workplace, *options, *wrong, check=False)
    refused = [
        "argument --max_steps/--max-steps: invalid", "`kl_weight` must be", "`ema_decay` must be", "Some specified arguments",
        "`generations` must be", "There is no", "Target modules no_proj",
    ]  # fmt: skip
    told = told_reasons(done)
    assert done.returncode == 1 and len(told) == len(refused)
    assert all(any(one.startswith(" ".join(words.split()[:3])) for one in told) for words in refused), told
    assert all(f"`{option[2:]}`" in done.stdout.splitlines()[-1] for option in wrong[::2])
    launcher = ["--accelerate_config", "fsdp2", "--num_processes", "some", "--nor_this", "1", "--torch_compile", "true"]
    done = check(workplace, "--dataset_name", "data.jsonl", "--output_dir", "out", *launcher, check=False)
    assert told_reasons(done) == [
        "argument --num_processes/--num-processes: invalid",
        "Of --nor_this 1",
        "`torch_compile` under FSDP2",
    ]
    assert "8 process(es), fsdp2" in done.stdout
    done = check(workplace, *options, "--kl_weight", "-1", "--accelerate_config", "zero9", check=False)
    assert told_reasons(done)[:2] == ["`accelerate_config='zero9'` is neither", "`kl_weight` must be"]
    assert len(told_reasons(done)) == 4 and "Steps, disk and memory are those of a launch" in done.stdout


def test_what_a_configuration_has_wrong_is_told_and_the_rest_of_it_looked_at(workplace):
    wrong = {"dataset_name": "data.jsonl", "kl_weight": -1, "no_such": 3, "max_steps": 5, "output_dir": "out"}
    (workplace / "wrong.yaml").write_text(yaml.safe_dump(wrong))
    done = check(workplace, "--config", "wrong.yaml", check=False)
    assert told_reasons(done) == ["`kl_weight` must be", "Unknown arguments from"]
    assert "5 optimizer steps of 8 rows" in done.stdout and (workplace / "wrong.yaml").read_text() == yaml.safe_dump(
        wrong
    )
    for name, message in (("nowhere", "`config='nowhere'` is neither"), ("list.yaml", "Config file list.yaml")):
        (workplace / "list.yaml").write_text("[1]")
        done = check(workplace, "--config", name, "--accelerate_config", "zero9", check=False)
        assert told_reasons(done) == ["`accelerate_config='zero9'` is neither", message]
    # Of which rows or which model a misspelt option speaks nobody knows.
    done = check(workplace, "--dataset_nname", "data.jsonl", "--output_dir", "out", check=False)
    assert told_reasons(done) == ["Some specified arguments"] and "⟦" not in done.stdout
    done = trl_ema("check", "--model_nname", "model", "--output_dir", "out", cwd=workplace, check=False)
    assert told_reasons(done) == ["Some specified arguments"] and "SmolLM2" not in done.stdout


def test_refusals_that_come_of_an_option_left_out_are_none(workplace):
    def make(given):
        options = {words[0][2:]: words[1:] for words in given.words}
        if options.get("steps") == ("-1",):
            raise ValueError("`steps` must be at least 0.")
        if "tasks" in options and "steps" not in options:
            raise ValueError("`tasks` and `steps=0` belong together.")
        if "other" in options:
            raise ValueError("No option is named, and nothing goes with that.")
        return sorted(options)

    given, refusals = Given.on(["--tasks", "a", "b", "--steps", "-1", "--kept=1", "--other"]), Refusals()
    assert given.names == ["tasks", "steps", "kept", "other"]
    assert as_far_as_it_goes(make, given, refusals) == ["kept=1"]
    assert refusals.found == ["`steps` must be at least 0.", "No option is named, and nothing goes with that."]
    assert refusals.left_out == ["steps", "tasks", "other"]

    def never(given):
        raise TypeError("no")

    assert as_far_as_it_goes(never, given, refusals) is None and refusals.found[-1] == "no"
    with pytest.raises(SystemExit):  # that of `--help`
        as_far_as_it_goes(lambda given: sys.exit(0), given, refusals)


def test_models_that_cannot_be_are_refused(workplace):
    done = check(
        workplace, "--dataset_name", "data.jsonl", "--model_name_or_path", "no/such", "--output_dir", "out", check=False
    )
    assert done.returncode == 1 and "The model 'no/such' is no local path" in done.stdout


@pytest.mark.parametrize(
    "method",
    [
        ["--teacher", "frozen"],
        ["--teacher", "none", "--rehearsal_weight", "2", "--rehearsal_num_tokens", "32"],
        ["--rehearsal_weight", "2", "--rehearsal_num_tokens", "32", "--max_drift", "0.1", "--drift_steps", "0"],
        ["--ewc_weight", "1", "--l2_weight", "1"],
    ],
)
def test_no_method_needs_weights_to_be_looked_at(workplace, method):
    done = check(
        workplace, "--dataset_name", "data.jsonl", "--output_dir", "out", "--max_steps", "2", "--drift_steps", "1",
        "--load_in_4bit", "true", "--packing", "true", *method,
    )  # fmt: skip
    assert "would start" in done.stdout and "sequences an epoch" in done.stdout


def test_an_error_is_told_once():
    refusals = Refusals()
    for _ in range(2):
        with refusals.collected():
            raise ValueError("no")
    with pytest.raises(KeyError), refusals.collected():
        raise KeyError("a bug")
    with refusals.collected():
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    assert refusals.found == ["no"] and len(refusals.unseen) == 1


def test_what_torch_says_of_missing_values_is_no_refusal_and_metadata_is_one():
    meta = torch.empty(2, device="meta")
    asked = (meta.tolist, meta.nonzero, lambda: meta.to("cpu"), lambda: meta[0].item(), lambda: meta + torch.ones(2))
    for ask in asked:
        with pytest.raises(RuntimeError) as error:
            ask()
        assert is_hollow(error.value), error.value
    refusals = Refusals()
    for message in ("Error while reading the metadata of x.safetensors", "meta-llama/x needs a newer release"):
        with refusals.collected():
            raise RuntimeError(message)
    assert len(refusals.found) == 2 and not refusals.unseen


# Numbers, beside those of a real training


def test_steps_and_bytes_are_those_of_the_trainer_that_trains(make_trainer, tmp_path):
    options = dict(max_steps=-1, num_train_epochs=1.5, per_device_train_batch_size=3, gradient_accumulation_steps=2)
    real = make_trainer(data=rows(20), **options)
    real.train()
    assert total_steps(real, 20, 1) == real.state.global_step
    hollow = without_weights(tmp_path, real.processing_class, **options)
    assert total_steps(hollow, 20, 1) == real.state.global_step and len(hollow.train_dataset) == len(real.train_dataset)
    for checkpoint in (False, True):
        assert bytes_to_write(hollow, checkpoint=checkpoint) == bytes_to_write(real, checkpoint=checkpoint)


def test_penalties_save_as_much_as_in_a_training(make_trainer, tmp_path):
    weights = dict(l1_weight=1e-5, l2_weight=1e-2)
    real, hollow = make_trainer(**weights), without_weights(tmp_path, make_trainer().processing_class, **weights)
    assert sum(r.bytes_to_save() for r in real.regularizers) == sum(r.bytes_to_save() for r in hollow.regularizers) > 0


@pytest.mark.parametrize("goes_on", [True, False])
@pytest.mark.parametrize("teacher", ["frozen", "ema", "none"])
def test_copies_of_an_adapter_are_counted_as_a_training_makes_them(make_trainer, tmp_path, goes_on, teacher):
    options = dict(teacher=teacher, l1_weight=1e-5, l2_weight=1e-2, ewc_weight=1.0, rehearsal_num_tokens=32)
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False)) if goes_on else None
    if goes_on:
        model.save_pretrained(tmp_path / "before")
    real = make_trainer(model=model, peft_config=None if goes_on else "lora", **options)
    adapter = str(tmp_path / "before") if goes_on else None
    hollow = without_weights(tmp_path, real.processing_class, adapter, **options)
    one = 4 * sum(p.numel() for p in real.model.parameters() if p.requires_grad)
    for mode in memory.MODES:
        launch = Launch(4, **OF_MODE[mode])
        found = memory_of(real, ModelConfig(), launch)
        assert memory_of(hollow, ModelConfig(), launch) == found and found["penalties"] == 4 * one
        assert bool(found["teacher"]) == (teacher == "ema" or (teacher == "frozen" and goes_on))
        kept = {"the adapter that it goes on from": one} if goes_on else {}
        assert memory_of_machine(real, launch, 4) == memory_of_machine(hollow, launch, 4) == kept
    for checkpoint in (False, True):
        expected = bytes_to_write(real, checkpoint=checkpoint)
        assert bytes_to_write(hollow, checkpoint=checkpoint) == expected


def test_kept_states_of_rehearsed_texts_are_counted_as_a_training_keeps_them(make_trainer, tmp_path):
    rows(6, kind="text").to_json(tmp_path / "texts.jsonl")
    options = dict(rehearsal_weight=1.0, rehearsal_dataset=str(tmp_path / "texts.jsonl"), max_steps=9)
    real = make_trainer(**options)
    real.train()
    (rehearsal,) = (one for one in real.regularizers if one.name == "rehearsal")
    hidden = rehearsal._known[0].shape[-1]
    # Of each text the last token predicts nothing.
    expected = 4 * (sum(states.numel() for states in rehearsal._known) + 6 * hidden)
    hollow = without_weights(tmp_path, real.processing_class, **options)
    assert memory_of_machine(hollow, Launch(2), 9) == {"states of rehearsed texts": expected}
    assert memory_of_machine(hollow, Launch(2), 2) == {}  # each text is taken once at most
    assert memory_of_machine(hollow, Launch(2, fsdp_version=2), 9) == {}
    options.pop("rehearsal_dataset")  # to be written: so many, of so many tokens
    written = without_weights(
        tmp_path, real.processing_class, **options, rehearsal_num_texts=5, rehearsal_num_tokens=24
    )
    assert memory_of_machine(written, Launch(), 9) == {"states of rehearsed texts": 5 * 24 * hidden * 4}


def without_weights(folder, tokenizer, adapter=None, **changes):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config())
    if adapter is not None:
        model = with_trained_adapter(model, adapter)
    args, data = config(folder / "hollow", **changes), dict(train_dataset=rows(20), eval_dataset=rows(4))
    peft_config = lora() if adapter is None else None
    return TrainerWithoutWeights(model, args=args, processing_class=tokenizer, peft_config=peft_config, **data)


@pytest.mark.parametrize(("ranks", "steps"), [(1, 4), (2, 2), (3, 2), (7, 1)])
def test_ranks_share_the_batches_of_an_epoch(ranks, steps):
    args = MeanTeacherConfig(
        "out",
        use_cpu=True,
        bf16=False,
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
    )
    assert total_steps(SimpleNamespace(args=args), 20, ranks) == steps


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (dict(save_strategy="no"), 0),
        (dict(save_steps=30), 4),
        (dict(save_steps=0.5), 2),
        (dict(save_steps=30, save_total_limit=2), 2),
        (dict(save_strategy="epoch", num_train_epochs=3), 3),
    ],
)
def test_checkpoints_are_counted_as_they_are_written(options, kept):
    assert checkpoints_kept(MeanTeacherConfig("out", use_cpu=True, bf16=False, **options), 100) == kept


def test_memory_is_by_the_formulas_of_the_page(make_trainer):
    trainer = make_trainer()
    model = trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sizes = sizes_of(model, 1, False)
    whole = sum(p.numel() for n, p in model.named_parameters() if ".teacher." not in n)
    assert sizes.adapter == trained and sizes.depth == 2
    assert sizes.layers + sizes.embedding + sizes.head + sizes.adapter == whole
    assert sizes.embedding == sizes.head == 64 * 32
    padded = sizes_of(model, 5, True)
    assert padded.embedding == 65 * 32  # 64 rows over 5 ranks
    for mode in memory.MODES:
        launch = Launch(4, **OF_MODE[mode])
        assert bytes_of(trainer, ModelConfig(), launch) == FLOAT32[mode]
        expected = memory.memory(mode, "ema", sizes_of(model, 4, mode == "fsdp2"), FLOAT32[mode], 4)
        assert memory_of(trainer, ModelConfig(), launch) == expected


@pytest.mark.parametrize("mode", memory.MODES)
def test_bytes_of_a_bfloat16_run_are_those_of_the_page(mode):
    base = torch.nn.Linear(2, 2, dtype=torch.bfloat16).requires_grad_(False)
    adapter = torch.nn.Linear(2, 2)
    model = torch.nn.ModuleDict({"base": base, "adapter": adapter})
    trainer = SimpleNamespace(args=SimpleNamespace(bf16=True, fp16=False), model=model)
    assert bytes_of(trainer, ModelConfig(), Launch(2, **OF_MODE[mode])) == BFLOAT16[mode]
    if mode == "ddp":
        launch = Launch(2)
        adapter.to(torch.bfloat16)
        four = ModelConfig(load_in_4bit=True, use_bnb_nested_quant=True)
        assert bytes_of(trainer, four, launch) == BFLOAT16["ddp, NF4"] and NF4 < 0.52
        assert bytes_of(trainer, ModelConfig(load_in_4bit=True), launch).layers == 0.5625
        assert bytes_of(trainer, ModelConfig(load_in_8bit=True), launch).layers == 1


# Launches


@pytest.mark.parametrize(
    ("name", "mode", "ranks"),
    [("cpu", "ddp", 1), ("multi_gpu", "ddp", 8), ("zero2", "zero2", 8), ("zero3", "zero3", 8), ("fsdp2", "fsdp2", 8)],
)
def test_a_packaged_launch_is_told_by_its_mode(name, mode, ranks):
    found = launch_of(launcher_settings(name, []))
    assert (found.mode, found.ranks, found.writes_shards) == (mode, ranks, mode != "ddp")
    assert found.shards_weights == (mode in ("zero3", "fsdp2")) and sees_one_device(launcher_settings(name, []))
    assert launch_of(launcher_settings(name, ["--num_processes", "3"])).ranks == 3
    refuse_sharding(found)


def test_a_launch_is_told_by_the_command_line_and_deepspeeds_own_file_too(tmp_path):
    (tmp_path / "zero.json").write_text('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}')
    config = {"distributed_type": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": f"{tmp_path}/zero.json"}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config | {"num_processes": 2}))
    found = launch_of(launcher_settings(str(tmp_path / "own.yaml"), []))
    assert found == Launch(2, zero_stage=3, offload_param="nvme")
    found = launch_of(launcher_settings("multi_gpu", ["--use_fsdp", "--fsdp_version", "2"]))
    assert found == Launch(8, fsdp_version=2)
    assert launch_of(launcher_settings("zero2", ["--zero_stage", "3"])).mode == "zero3"
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump({"distributed_type": "NO", "num_processes": 1}))
    one = str(tmp_path / "alone.yaml")
    assert not sees_one_device(launcher_settings(one, []))
    assert sees_one_device(launcher_settings(one, ["--gpu_ids", "1"]))
    assert not sees_one_device(launcher_settings(one, ["--gpu_ids", "0,1"]))


def test_the_launch_of_a_running_process_is_that_of_its_file():
    """As accelerate's state has it, where the plugins are made of such a file."""
    zero = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": {"offload_param": {"device": "cpu"}}})
    state = SimpleNamespace(num_processes=8, deepspeed_plugin=zero)
    assert Launch.of_state(state) == launch_of(launcher_settings("zero3_offload", []))
    dynamo = SimpleNamespace(backend=DynamoBackend.NO)
    fsdp = SimpleNamespace(fsdp_version=2)
    state = SimpleNamespace(num_processes=8, deepspeed_plugin=None, fsdp_plugin=fsdp, dynamo_plugin=dynamo)
    assert Launch.of_state(state) == launch_of(launcher_settings("fsdp2", []))
    dynamo.backend = DynamoBackend.INDUCTOR
    with pytest.raises(ValueError, match="`torch_compile` under FSDP2 is not supported"):
        refuse_sharding(Launch.of_state(state))
    assert Launch.of_state(PartialState()) == Launch()


FSDP = ["--fsdp_activation_checkpointing", "true"]
SPLIT = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}, "num_processes": 4}
SPLIT["parallelism_config"] = {"parallelism_config_cp_size": 2, "parallelism_config_dp_shard_size": 2}


@pytest.mark.parametrize(
    ("name", "options", "expected", "message"),
    [
        ("fsdp2", ["--fsdp_version", "1"], dict(fsdp_version=1), "The launch asks for FSDP version 1"),
        ("fsdp2", ["--dynamo_backend", "inductor"], dict(fsdp_version=2, compiles=True), "`torch_compile` under FSDP2 is not supported"),
        ("fsdp2", FSDP, dict(fsdp_version=2, wraps_layers=True), "Use `gradient_checkpointing` instead of `fsdp_activation"),
        ("split.yaml", [], dict(fsdp_version=2, cp_size=2), "Context parallelism (`cp_size=2`) is not supported"),
        ("split.yaml", ["--parallelism_config_tp_size", "2"], dict(fsdp_version=2, cp_size=2, tp_size=2), "Context parallelism"),
        ("split.yaml", ["--parallelism_config_cp_size", "1"], dict(fsdp_version=2), None),
        ("zero2", ["--zero_stage", "0"], dict(zero_stage=0), "DeepSpeed with `zero_stage: 0`"),
        ("zero3", ["--offload_param_device", "nvme"], dict(zero_stage=3, offload_param="nvme"), "`offload_param` is set to `nvme`"),
        ("zero3", ["--zero_stage", "2"], dict(zero_stage=2, offload_param="none"), None),
        ("multi_gpu", FSDP, {}, None),
        ("fsdp2", ["--cpu"], {}, None),
    ],
)  # fmt: skip
def test_options_of_the_launcher_win_over_its_file_as_in_accelerate(tmp_path, name, options, expected, message):
    (tmp_path / "split.yaml").write_text(yaml.safe_dump(SPLIT))
    config = str(tmp_path / name) if name == "split.yaml" else name
    launch = launch_of(launcher_settings(config, [*options, "--num_processes", "4"]))
    assert launch == Launch(4, **expected)
    assert message is None or any(message in one for one in refused(launch, teacher="ema", words=None))
    assert message is not None or refused(launch, teacher="ema") == []


def test_what_a_launch_wraps_or_splits_is_told_of_a_running_process():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, activation_checkpointing=True)
    state = SimpleNamespace(fsdp_plugin=plugin, parallelism_config=ParallelismConfig(cp_size=2, tp_size=3))
    assert Launch.of_state(state) == Launch(1, fsdp_version=2, wraps_layers=True, cp_size=2, tp_size=3)


def test_compiling_in_the_options_of_the_training_counts_as_the_launchers():
    assert refused(Launch(2, fsdp_version=2), torch_compile=True) == []  # nothing is fused
    assert refused(Launch(2, fsdp_version=2), teacher="ema", torch_compile=True) == ["`torch_compile` under FSDP2 is"]
    assert refused(Launch(2), teacher="ema", torch_compile=True) == []


def test_an_option_of_the_launcher_that_training_refuses_is_told(workplace):
    arguments = [
        "--dataset_name",
        "data.jsonl",
        "--output_dir",
        "out",
        "--max_steps",
        "2",
        "--accelerate_config",
        "fsdp2",
    ]
    done = check(workplace, *arguments, "--torch_compile", "true", *FSDP, check=False)
    assert done.returncode == 1 and "would refuse, for 2 reason(s)" in done.stdout
    assert "`torch_compile` under FSDP2" in done.stdout and "`fsdp_activation_checkpointing`" in done.stdout


ZERO3 = {
    "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}},
    "train_micro_batch_size_per_gpu": "auto",
}


@pytest.mark.parametrize(
    ("launch", "options", "expected"),
    [
        (Launch(4), dict(fsdp="full_shard"), Launch(4, fsdp_version=2)),
        (Launch(4), dict(fsdp="full_shard", fsdp_config={"version": 1}), Launch(4, fsdp_version=1)),
        (Launch(4, wraps_layers=True), dict(fsdp="auto_wrap"), Launch(4, fsdp_version=2, wraps_layers=True)),
        (
            Launch(4),
            dict(fsdp="full_shard", fsdp_config={"activation_checkpointing": True}),
            Launch(4, fsdp_version=2, wraps_layers=True),
        ),
        (Launch(4, fsdp_version=1), dict(torch_compile=True), Launch(4, fsdp_version=1, compiles=True)),
    ],
)
def test_options_of_the_training_count_before_those_of_its_launch(launch, options, expected):
    settings = MeanTeacherConfig("out", use_cpu=True, bf16=False, gradient_checkpointing=False, **options)
    assert with_options_of_training(launch, settings) == expected


def test_deepspeed_of_the_training_is_read_as_accelerate_reads_it(tmp_path):
    settings = MeanTeacherConfig("out", use_cpu=True, bf16=False)
    (tmp_path / "zero.json").write_text(json.dumps(ZERO3))
    for given in (ZERO3, str(tmp_path / "zero.json"), json.dumps(ZERO3)):
        found = with_options_of_training(Launch(2, zero_stage=2, offload_param="cpu"), settings, given)
        assert found == Launch(2, zero_stage=3, offload_param="nvme")
    for given, message in (("gone.json", "path to an existing deepspeed config"), ({"a": 1}, "specify the ZeRO")):
        with pytest.raises(ValueError, match=message):
            with_options_of_training(Launch(), settings, given)
    assert (
        Launch.of_state(SimpleNamespace(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ZERO3))).offload_param == "nvme"
    )
    assert not is_deepspeed_zero3_enabled()


def test_sharding_by_options_of_the_training_is_looked_at(workplace):
    """On the command line and in a file; each process of the launch has the same."""
    rows = ["--dataset_name", "data.jsonl", "--output_dir", "out", "--max_steps", "2"]
    several = [*rows, "--accelerate_config", "multi_gpu", "--num_processes", "2"]
    (workplace / "zero.json").write_text(json.dumps(ZERO3))
    (workplace / "zero.yaml").write_text(yaml.safe_dump({"deepspeed": ZERO3}))
    for option in (["--deepspeed", "zero.json"], ["--config", "zero.yaml"]):
        done = check(workplace, *several, *option, "--ewc_weight", "1", check=False)
        assert told_reasons(done) == ["DeepSpeed's `offload_param` is", "`ewc_weight`: a sharded"]
        assert "2 process(es), zero3" in done.stdout
    done = check(workplace, *several, "--deepspeed", "gone.json", check=False)
    assert told_reasons(done) == ["Expected a string"] and "Steps, disk and memory are those" in done.stdout
    fsdp = ["--fsdp", "full_shard", "--fsdp_config"]
    done = check(workplace, *several, *fsdp, '{"version": 1}', check=False)
    assert told_reasons(done) == ["The launch asks"] and "2 process(es), fsdp2" in done.stdout
    done = check(workplace, *several, *fsdp, '{"activation_checkpointing": true}', check=False)
    assert told_reasons(done) == ["The launch asks"] and "`fsdp_activation_checkpointing`" in done.stdout
    assert told_reasons(check(workplace, *rows, "--fsdp", "full_shard", check=False)) == ["The option `fsdp`"]
    assert "ACCELERATE_USE_FSDP" not in os.environ and "ACCELERATE_USE_DEEPSPEED" not in os.environ


def test_a_best_metric_and_a_push_that_cannot_be_are_refused(workplace, monkeypatch):
    monkeypatch.setattr(preflight, "get_token", lambda: None)
    arguments = ["--dataset_name", "data.jsonl", "--output_dir", "out", "--max_steps", "2", "--eval_strategy", "steps"]
    arguments += ["--eval_steps", "1", "--save_steps", "1", "--load_best_model_at_end", "true"]
    push = ["--push_to_hub", "true"]
    done = check(workplace, *arguments, *push, "--metric_for_best_model", "eval_domian_loss", check=False)
    assert done.returncode == 1 and "would refuse, for 2 reason(s)" in done.stdout
    assert "`push_to_hub=True`, and there is no login to the Hub" in done.stdout
    assert "'eval_domian_loss' is none of the metrics" in said(done).replace("`metric_for_best_model=", "").replace(
        "`", ""
    )
    monkeypatch.setattr(preflight, "get_token", lambda: "hf_x")
    assert said(check(workplace, *arguments, *push)).endswith("would start.")  # of the domain, as in the training


@pytest.mark.parametrize("rows_looked_at", [5_000, 20])
def test_evaluation_sets_are_those_of_the_training_however_many_rows_are_looked_at(
    workplace, monkeypatch, rows_looked_at
):
    """The domain is all but what is replayed, and a single data set beside that has no set of its own."""
    monkeypatch.setattr(preflight, "_ROWS", rows_looked_at)
    replay = json.dumps({"path": "odd.csv", "columns": {"prompt": "Frage", "completion": "Antwort"}})
    arguments = ["--dataset_name", "data.jsonl", "--replay_dataset", replay, "--output_dir", "out", "--save_steps", "1"]
    arguments += ["--max_steps", "2", "--eval_strategy", "steps", "--eval_steps", "1", "--metric_for_best_model"]
    done = check(workplace, *arguments, "eval_data_loss", check=False)
    assert done.returncode == 1
    assert "evaluation of this run: eval_domain_loss, eval_general_loss, eval_odd_loss. Give one" in said(done)
    assert said(check(workplace, *arguments, "eval_odd_loss")).endswith("would start.")


NO_SCHEDULE = "`lr_scheduler_type='{}'` with `lr_scheduler_kwargs={}` makes no schedule: "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optim", "galore_adamw"], "You need to install `galore_torch`"),
        (["--optim", "rmsprop", "--optim_args", "alpha"], "`optim='rmsprop'` with `optim_args='alpha'` makes no optimizer: not enough values"),
        (
            ["--lr_scheduler_type", "cosine_with_min_lr"],
            NO_SCHEDULE.format("cosine_with_min_lr", "None") + "One of min_lr or min_lr_rate",
        ),
        (
            ["--lr_scheduler_type", "cosine", "--lr_scheduler_kwargs", '{"nonsense": 1}'],
            NO_SCHEDULE.format("cosine", "{'nonsense': 1}") + "get_cosine_schedule_with_warmup() got an unexpected keyword",
        ),
    ],
)  # fmt: skip
def test_an_optimizer_or_schedule_that_cannot_be_made_is_refused_as_by_the_training_before_its_model(
    workplace, monkeypatch, options, message
):
    arguments = ["--dataset_name", "data.jsonl", "--output_dir", "out", *options]
    done = check(workplace, *arguments, check=False)
    assert done.returncode == 1 and "would refuse, for 1 reason(s)" in done.stdout and message in said(done)
    monkeypatch.setattr("trl_ema.inputs.load_tokenizer", None)
    done = trl_ema("train", "--model_name_or_path", "model", *QUICK, *arguments, cwd=workplace, check=False)
    assert done.returncode == 1 and message in " ".join(done.stderr.split())


@pytest.mark.parametrize(
    "options",
    [
        {}, dict(optim="adafactor"), dict(optim="sgd", optim_args="momentum=0.9"),
        dict(lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}),
        dict(lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 5}, warmup_steps=0.1),
        dict(lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=1), dict(lr_scheduler_type="polynomial"),
    ],
)  # fmt: skip
def test_optimizers_and_schedules_that_can_be_made_are_taken(options):
    settings = MeanTeacherConfig("out", use_cpu=True, bf16=False, **options)
    before = settings.optim_target_modules
    check_optimizer(settings)
    assert settings.optim_target_modules == before


def refused(launch, begun=False, has_texts=False, teacher="none", words=4, **options):
    """First words of what a training with these options would refuse of its launch."""
    own = {f.name for f in fields(TrainingScriptArguments)}
    args = TrainingScriptArguments(**{name: value for name, value in options.items() if name in own})
    rest = {name: value for name, value in options.items() if name not in own}
    settings = MeanTeacherConfig("out", use_cpu=True, bf16=False, teacher=teacher, **rest)
    found = []
    for one in checks_of_launch(launch, args, settings, begun=begun, has_texts=has_texts):
        try:
            one()
        except ValueError as error:
            found.append(" ".join(str(error).split()[:words]))
    return found


TASKS, FISHER, WRITE = "Tasks are asked during", "`ewc_weight`: a sharded model", "A sharded model (ZeRO-3,"
DRIFT, START = "Under ZeRO-3 drift is", "Under ZeRO-3 the model"


@pytest.mark.parametrize(
    ("options", "sharded", "zero3"),
    [
        ({}, [], []),
        (dict(eval_tasks=["piqa"], eval_tasks_steps=5), [TASKS], []),
        (dict(ewc_weight=1.0), [FISHER], []),
        (dict(ewc_weight=1.0, begun=True), [], []),
        (dict(rehearsal_weight=1.0), [WRITE], []),
        (dict(rehearsal_weight=1.0, has_texts=True), [], []),
        (dict(rehearsal_weight=1.0, rehearsal_dataset="x.jsonl"), [], []),
        (dict(adapter_name_or_path="x"), [], [DRIFT]),
        (dict(adapter_name_or_path="x", measure=False), [], []),
        (dict(adapter_name_or_path="x", measure=False, drift_steps=2), [], [DRIFT]),
        (dict(adapter_name_or_path="x", measure=False, rehearsal_weight=1.0), [WRITE], [START]),
        (dict(adapter_name_or_path="x", measure=False, rehearsal_weight=1.0, rehearsal_dataset="x"), [], [START]),
        (
            dict(adapter_name_or_path="x", measure=False, rehearsal_weight=1.0, rehearsal_dataset="x", rehearsal_loss="ce"),
            [],
            [],
        ),
    ],
)  # fmt: skip
def test_what_a_launch_cannot_do_is_refused_by_what_refuses_it_in_training(options, sharded, zero3):
    assert refused(Launch(2), **options) == refused(Launch(2, zero_stage=2), **options) == []
    assert refused(Launch(2, fsdp_version=2), **options) == sharded
    assert refused(Launch(2, zero_stage=3), **options) == sharded + zero3


def test_what_a_sharded_launch_would_refuse_is_told(workplace, monkeypatch, tmp_path):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    rows = ["--dataset_name", "data.jsonl", "--output_dir", "out", "--max_steps", "2"]
    held = ["--rehearsal_weight", "1", "--rehearsal_num_tokens", "32", "--accelerate_config", "fsdp2"]
    done = check(workplace, *rows, *held, "--ewc_weight", "1", check=False)
    assert done.returncode == 1 and "would refuse, for 2 reason(s)" in done.stdout
    assert "`ewc_weight`: a sharded model" in done.stdout and "cannot write texts: every token" in done.stdout
    # Of a model with this tokenizer there are some: whether they are this one's is not looked at.
    (tmp_path / "texts").mkdir()
    tokenizer, sampling = AutoTokenizer.from_pretrained(workplace / "model"), Sampling(num_tokens=32)
    for theirs, starts in (("0" * 16, False), (tokenizer_fingerprint(tokenizer), True)):
        texts_path(f"{'0' * 16}-{theirs}", sampling).touch()
        done = check(workplace, *rows, *held, check=False)
        assert done.returncode == (0 if starts else 1), done.stdout


def test_under_zero3_a_training_that_goes_on_is_refused_where_it_is_measured(workplace):
    base = AutoModelForCausalLM.from_pretrained(workplace / "model")
    get_peft_model(base, lora(r=3)).save_pretrained(workplace / "before")
    arguments = [*QUICK, "--dataset_name", "data.jsonl", "--max_steps", "2", "--adapter_name_or_path", "before"]
    arguments += ["--output_dir", "out", "--accelerate_config", "zero3"]
    done = trl_ema("check", *arguments, cwd=workplace, check=False)
    assert done.returncode == 1 and "Under ZeRO-3 drift is measured from a base alone" in done.stdout
    assert said(trl_ema("check", *arguments, "--measure", "false", cwd=workplace)).endswith("would start.")


def test_each_process_of_a_launch_has_one_of_several_gpus(workplace, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr(preflight, "has_accelerator", lambda: True)
    arguments = ["--dataset_name", "data.jsonl", "--output_dir", "out", "--max_steps", "2", "--use_cpu", "false"]
    done = check(workplace, *arguments, check=False)
    assert done.returncode == 1 and "does not support `nn.DataParallel`" in done.stdout  # as the training itself
    assert said(check(workplace, *arguments, "--accelerate_config", "multi_gpu")).endswith("would start.")


def test_a_launch_that_cannot_be_is_refused_and_one_that_can_counts_its_processes(workplace):
    arguments = ["--dataset_name", "data.jsonl", "--output_dir", "out", "--per_device_train_batch_size", "2"]
    told = said(check(workplace, *arguments, "--accelerate_config", "zero3", "--num_processes", "4"))
    assert (
        f"{3 * math.ceil(64 / 8)} optimizer steps of 8 rows on 4 process(es)" in told and "4 process(es), zero3" in told
    )
    config = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 1}, "num_processes": 2}
    (workplace / "fsdp1.yaml").write_text(yaml.safe_dump(config))
    done = check(workplace, *arguments, "--accelerate_config", "fsdp1.yaml", check=False)
    assert done.returncode == 1 and "The launch asks for FSDP version 1" in done.stdout
