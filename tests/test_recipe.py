"""The main job, run as users run it, on a tiny model and local files."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from conftest import rows, tiny_model
from peft import PeftModel

from trl_ema import MeanTeacherConfig, offline
from trl_ema.evaluation.drift import general_rows, measure_drift
from trl_ema.evaluation.settings import Suite
from trl_ema.files import OutputError
from trl_ema.inputs import load_data
from trl_ema.measurement import card_figures, samples_and_table
from trl_ema.script import TrainingScriptArguments, resume_from


ROOT = Path(__file__).parent.parent
QUICK = [
    "--use_cpu", "true", "--bf16", "false", "--max_steps", "6", "--learning_rate", "2e-2", "--report_to", "none",
    "--eval_samples", "6", "--generation_tokens", "4", "--max_length", "48", "--logging_steps", "1", "--save_steps", "3",
    "--load_in_4bit", "true", "--bnb_4bit_quant_type", "nf4", "--use_bnb_nested_quant", "true", "--dtype", "float32",
]  # fmt: skip


def launch(*arguments, cwd):
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / "accelerate_configs" / "cpu.yaml"), str(ROOT / "recipes" / "medical_ema.py"), *arguments]
    environment = os.environ | {"TRL_EMA_CACHE": str(cwd / "cache"), "HF_HOME": str(cwd / "hf")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def run(workplace, monkeypatch):
    """The main job in this process: one of its own imports for longer than these train."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("TRL_EMA_CACHE", str(workplace / "cache"))
    main = runpy.run_path(str(ROOT / "recipes" / "medical_ema.py"), run_name="recipe")["main"]
    return lambda *arguments: main([*arguments])


@pytest.fixture(scope="module")
def workplace(tiny_folder):
    return tiny_folder


def test_main_job_trains_measures_and_writes_its_files(workplace, run):
    arguments = ["--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--eval_fraction", "0.2", *QUICK]
    done = launch(*arguments, "--output_dir", "out", cwd=workplace)
    metrics = json.loads((workplace / "out" / "metrics.json").read_text())
    assert metrics["student"]["domain"]["loss"] < metrics["before"]["domain"]["loss"]
    assert metrics["before"]["domain"]["kl_base_model"] == pytest.approx(0, abs=1e-6)
    assert metrics["student"]["domain"]["kl_base_model"] > metrics["teacher"]["domain"]["kl_base_model"] > 0
    assert {"loss", "kl_base_model", "kl_model_base", "tokens"} == metrics["student"]["general"].keys()
    assert len(metrics["generations"]) == 3
    assert {"prompt", "reference", "before", "student", "teacher"} == metrics["generations"][0].keys()
    assert metrics["provenance"]["versions"].keys() >= {"trl", "torch", "trl_ema"}
    assert "held-out domain loss" in done.stdout and "KL(base || model), general text" in done.stdout
    card = (workplace / "out" / "README.md").read_text()
    assert (
        "| `data` | data.jsonl |" in card
        and "| `student, domain, loss` |" in card
        and "| `quantization` | nf4 |" in card
    )
    assert {"adapter_model.safetensors", "teacher", "README.md", "metrics.json", "checkpoint-6"} <= set(
        os.listdir(workplace / "out")
    )

    run(*arguments, "--output_dir", "again", "--resume_from_checkpoint", "out/checkpoint-3")
    again = json.loads((workplace / "again" / "metrics.json").read_text())
    for who in ("student", "teacher"):
        assert again[who] == metrics[who]


def test_the_figures_before_and_after_are_in_the_runs_trackers(workplace, run, monkeypatch):
    import trackio
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setenv("WANDB_RUN_GROUP", "study")
    arguments = ["--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--eval_fraction", "0.2", *QUICK]
    (workplace / "tracked.yaml").write_text("{report_to: [trackio, tensorboard], run_name: one, project: recipe}")
    arguments.remove("--report_to"), arguments.remove("none")
    tracked = ["--config", "tracked.yaml", "--max_steps", "1"]
    run(*arguments, *tracked, "--generations", "0", "--output_dir", "tracked")
    metrics = json.loads((workplace / "tracked" / "metrics.json").read_text())
    (found,) = trackio.Api().runs("recipe")
    assert (found.name, found.config["_Group"], found.config["max_steps"]) == ("one", "study", 1)
    *_, last = SQLiteStorage.get_logs("recipe", "one")
    (folder,) = (workplace / "tracked" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    for who in ("before", "student", "teacher"):
        for text in ("domain", "general"):
            for name, key in (("loss", "loss"), ("drift", "kl_base_model")):
                tag, value = f"eval/{who}_{text}_{name}", metrics[who][text][key]
                assert last[tag] == value and events.Scalars(tag)[-1].value == pytest.approx(value)
    assert not any("before_domain_loss" in name for row in metrics["log"] for name in row)


@pytest.mark.parametrize("name", ["qwen2_1.5b_qlora", "qwen2_1.5b_qlora_study"])
def test_a_shipped_config_runs_on_its_architecture(workplace, run, name):
    """The YAML of Qwen2-1.5B, with the model, the data, the size and the device of this machine in its place."""
    config = ROOT / "recipes" / "configs" / f"{name}.yaml"
    arguments = ["--config", str(config), "--model_name_or_path", "model", "--dataset_name", "data.jsonl"]
    arguments += ["--eval_fraction", "0.2", "--generations", "0"]
    texts = ["--rehearsal_num_texts", "16", "--rehearsal_num_tokens", "32"] if name == "qwen2_1.5b_qlora" else []
    run(*arguments, *texts, *QUICK, "--output_dir", name)
    metrics = json.loads((workplace / name / "metrics.json").read_text())
    assert metrics["provenance"]["arguments"]["gradient_accumulation_steps"] == 2
    assert ("teacher" in metrics) == name.endswith("study")
    assert any("rehearsal_kl" in row for row in metrics["log"]) != name.endswith("study")


@pytest.mark.parametrize("option", ["--model_name_or_path", "--dataset_name"])
def test_a_hub_name_without_a_hub_says_what_works_offline(run, option):
    names = {"--model_name_or_path": "model", "--dataset_name": "data.jsonl"} | {option: "no-such/thing"}
    with pytest.raises(ConnectionError, match="'no-such/thing' is no local path") as error:
        run(*(x for pair in names.items() for x in pair), *QUICK, "--output_dir", "off")
    assert "run `recipes/medical_ema.py` with no arguments" in str(error.value)


def test_an_output_folder_that_cannot_be_written_is_refused_first(workplace, run):
    (workplace / "file").write_text("")
    with pytest.raises(OutputError, match="Cannot write to `output_dir='file/out'`"):
        run("--model_name_or_path", "no/such", *QUICK, "--output_dir", "file/out")


def test_rows_of_tokens_with_a_prompt_are_trained_and_measured(workplace, run):
    """A TRL format without completions: there is nothing to generate for."""
    tokens = [
        {"prompt": "a", "input_ids": list(range(3, 9 + i % 5)), "labels": list(range(3, 9 + i % 5))} for i in range(30)
    ]
    datasets.Dataset.from_list(tokens).to_json(workplace / "tokens.jsonl")
    arguments = ["--model_name_or_path", "model", "--dataset_name", "tokens.jsonl", "--eval_fraction", "0.3", *QUICK]
    run(*arguments, "--output_dir", "tokens")
    metrics = json.loads((workplace / "tokens" / "metrics.json").read_text())
    assert metrics["student"]["domain"]["loss"] < metrics["before"]["domain"]["loss"] and not metrics["generations"]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(eval_fraction=1.5), r"`eval_fraction` must be in \(0, 1\), got 1.5"),
        (dict(eval_samples=0), "`eval_samples` must be a whole number of at least 1, got 0"),
        (dict(max_train_samples=0), "`max_train_samples` must be a whole number of at least 1"),
    ],
)
def test_ranges_of_the_jobs_own_options(changes, match):
    with pytest.raises(ValueError, match=match):
        TrainingScriptArguments(**changes)


def test_no_training_row_left_is_refused(workplace, tokenizer):
    args = TrainingScriptArguments(str(workplace / "data.jsonl"), dataset_streaming=True, eval_samples=90)
    with pytest.raises(ValueError, match="No training row is left beside 80 held-out ones"):
        load_data(args, tokenizer)


def test_no_row_held_out_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(
        offline, "demo_rows", lambda: [{"prompt": f"what is {i}", "completion": f"{i}"} for i in range(9)]
    )
    with pytest.raises(
        ValueError, match="No row is held out: `eval_fraction=1e-09` of 9 rows. Raise `--eval_fraction`"
    ):
        load_data(TrainingScriptArguments(eval_fraction=1e-9), tokenizer)


def test_a_test_split_that_was_named_must_be_there(workplace, tokenizer, tmp_path):
    args = TrainingScriptArguments(str(workplace / "data.jsonl"), dataset_test_split="validatoin", eval_fraction=0.2)
    with pytest.raises(ValueError, match="has no split 'validatoin', only 'train'"):
        load_data(args, tokenizer)
    args.dataset_test_split = "test"  # the default: rows are held out
    train, held_out = load_data(args, tokenizer)
    assert len(train) + len(held_out) == 80 and len(held_out) > 0


def test_own_text_field_works_in_the_main_job(tokenizer, tmp_path):
    rows(40, kind="text").rename_column("text", "content").to_json(tmp_path / "data.jsonl")
    args = TrainingScriptArguments(str(tmp_path / "data.jsonl"), eval_fraction=0.2)
    train, held_out = load_data(args, tokenizer, "content")
    assert len(train) + len(held_out) == 40 and train.column_names == ["content"]


@pytest.mark.parametrize("word", [True, "true", "True"])
def test_resume_true_is_the_newest_checkpoint_if_there_is_one(tmp_path, word):
    args = MeanTeacherConfig(str(tmp_path / "out"), bf16=False, resume_from_checkpoint=word)
    assert resume_from(args) is None
    for step in (2, 10):
        (tmp_path / "out" / f"checkpoint-{step}").mkdir(parents=True)
    assert resume_from(args) == str(tmp_path / "out" / "checkpoint-10")


def test_a_share_of_less_than_a_row_holds_one_out(workplace, tokenizer):
    args = TrainingScriptArguments(str(workplace / "data.jsonl"), eval_fraction=0.0001)
    train, held_out = load_data(args, tokenizer)
    assert len(held_out) == 1 and len(train) == 79


@pytest.mark.parametrize(
    ("given", "held", "options"),
    [
        (50, 5, {}),
        (200, 16, {}),
        (1000, 20, {}),
        (50, 1, {"eval_fraction": 0.02}),
        (50, 5, {"eval_samples": 4}),
        (1000, 20, {"eval_fraction": 0.02}),
    ],
)
def test_of_small_data_more_rows_are_held_out_and_few_are_warned_of(tmp_path, tokenizer, caplog, given, held, options):
    found = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(given)]
    datasets.Dataset.from_list(found).to_json(tmp_path / "data.jsonl")
    train, held_out = load_data(TrainingScriptArguments(str(tmp_path / "data.jsonl"), **options), tokenizer)
    asked = options.get("eval_samples", 128)
    assert (len(train), len(held_out)) == (given - held, min(held, asked))
    warning = f"Only {held} rows are held out of 'data': figures on so few tell little. Hold out more with a larger `--eval_fraction`"
    assert (warning in caplog.text) == (held < min(16, asked))


def test_a_file_of_classes_trains_on_all_of_them(tmp_path, tokenizer):
    datasets.Dataset.from_list([{"prompt": f"question {i}", "completion": "ABCD"[i % 4]} for i in range(1000)]).to_json(
        tmp_path / "data.jsonl"
    )
    for fraction, held in ((0.02, 20), (0.05, 50)):
        train, held_out = load_data(
            TrainingScriptArguments(str(tmp_path / "data.jsonl"), eval_fraction=fraction), tokenizer
        )
        assert len(held_out) == held
        assert {row["completion"][0]["content"] for row in train} == set("ABCD")


@pytest.mark.parametrize("make", [TrainingScriptArguments, Suite])
def test_the_jobs_own_numbers_are_read_from_any_library(make):
    numbers = {f.name: f.default for f in fields(make) if type(f.default) is int} | {
        "max_train_samples" if make is TrainingScriptArguments else "batch_size": 5
    }
    assert len(numbers) >= 4
    for name in numbers:
        for value in (np.int64(7), np.float32(7), 7.0, torch.tensor(7)):
            beside = {"eval_tasks": ["hellaswag"]} if name == "eval_tasks_steps" else {}  # which belong together
            found = getattr(make(**{name: value}, **beside), name)
            assert found == 7 and type(found) is int, name
        for value in ("3", True, np.bool_(True), [3]):
            with pytest.raises(TypeError, match=f"`{name}` must be a number, got "):
                make(**{name: value})
        for value in (-1, 2.5, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"`{name}` must be a whole number of at least [012], got"):
                make(**{name: value})


def test_the_share_of_rows_is_a_number():
    assert TrainingScriptArguments(eval_fraction=np.float64(0.25)).eval_fraction == 0.25
    with pytest.raises(TypeError, match="`eval_fraction` must be a number, got '0.2'"):
        TrainingScriptArguments(eval_fraction="0.2")


def test_a_booleans_text_is_read_as_on_the_command_line():
    args = TrainingScriptArguments(measure="false", drop_incomplete_rows="true")
    assert args.measure is False and args.drop_incomplete_rows is True
    args = TrainingScriptArguments(ignore_bias_buffers="false", dataset_streaming=np.bool_(True))
    assert args.ignore_bias_buffers is False and args.dataset_streaming is True
    with pytest.raises(TypeError, match="`measure` must be a boolean, got 'perhaps'"):
        TrainingScriptArguments(measure="perhaps")


# What a newcomer sees first


def said(stderr):
    """Lines that are no progress bar."""
    lines = [line.rstrip() for line in stderr.replace("\r", "\n").splitlines()]
    return [line for line in lines if line.strip() and not re.search(r"it/s\]|s/it\]|examples/s\]|\?, \?|/s$", line)]


def quietly(workplace, *command):
    environment = os.environ | {"TRL_EMA_CACHE": str(workplace / "cache"), "HF_HOME": str(workplace / "hf")}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=workplace, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_start_says_nothing_but_what_its_user_needs(workplace):
    options = ["--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--output_dir", "quiet", *QUICK]
    options += ["--max_steps", "1", "--measure", "false", "--gradient_checkpointing", "true"]
    done = quietly(workplace, str(ROOT / "recipes" / "medical_ema.py"), *options)
    assert said(done.stderr) == ["data.jsonl has no test split: some of its training rows are held out."]
    assert done.stdout.startswith("72 training rows, 6 held out.")


def test_a_help_page_is_all_that_is_shown(workplace):
    done = quietly(workplace, "-m", "trl_ema", "evaluate", "--help")
    assert done.stderr == "" and done.stdout.startswith("usage: trl-ema evaluate")


def test_a_stream_gives_at_most_max_train_samples_rows_and_holds_others_out(workplace, tokenizer):
    args = TrainingScriptArguments(
        dataset_name=str(workplace / "data.jsonl"), dataset_streaming=True, max_train_samples=10, eval_samples=6
    )
    train, held_out = load_data(args, tokenizer)
    prompts = [row["prompt"][0]["content"] for row in train]
    assert len(prompts) == 10 and len(held_out) == 6
    assert not {row["prompt"][0]["content"] for row in held_out} & set(prompts)


@pytest.mark.slow
def test_demo_learns_the_domain(tmp_path):
    """The embedded default, shortened: real model, real NF4, real definitions."""
    command = [sys.executable, str(ROOT / "recipes" / "medical_ema.py"), "--max_steps", "8", "--eval_samples", "16"]
    subprocess.run([*command, "--output_dir", str(tmp_path / "out")], check=True, cwd=tmp_path)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["student"]["domain"]["loss"] < metrics["before"]["domain"]["loss"]


# What is shown of the figures


def test_samples_and_figures_are_shown_as_text():
    figures = {
        who: {name: {"loss": loss, "kl_base_model": loss / 10, "tokens": 3} for name in ("domain", "general")}
        for who, loss in (("before", 2.5), ("student", 1.5))
    }
    sample = {"prompt": "What?", "reference": "That.", "before": "This.", "student": "That"}
    assert samples_and_table(figures | {"generations": [sample]}).splitlines() == [
        "",
        "Q: What?",
        "  reference: That.",
        "     before: This.",
        "    student: That",
        "",
        "nats per token                        before   student",
        "held-out domain loss                  2.5000    1.5000",
        "KL(base || model), domain text        0.2500    0.1500",
        "KL(base || model), general text       0.2500    0.1500",
        "loss on general text                  2.5000    1.5000",
    ]
    assert card_figures(figures) == {
        "before, domain, loss": 2.5, "before, domain, kl_base_model": 0.25,
        "before, general, loss": 2.5, "before, general, kl_base_model": 0.25,
        "student, domain, loss": 1.5, "student, domain, kl_base_model": 0.15,
        "student, general, loss": 1.5, "student, general, kl_base_model": 0.15,
    }  # fmt: skip


# Drift


def batches(trainer):
    return trainer.get_eval_dataloader()


def test_drift_equals_dense_logits(make_trainer):
    trainer = make_trainer(eval_dataset=rows(6, seed=9))
    trainer.train()
    drift = measure_drift(trainer.model, batches(trainer))
    sums = torch.zeros(4, dtype=torch.float64)
    trainer.model.eval()
    for batch in batches(trainer):
        labels = batch.pop("labels")[:, 1:]
        mask = labels != -100
        with torch.no_grad():
            log_p = trainer.model(**batch).logits[:, :-1][mask].double().log_softmax(-1)
            log_b = tiny_model().eval()(**batch).logits[:, :-1][mask].double().log_softmax(-1)
        ce = -log_p.gather(1, labels[mask][:, None]).sum()
        sums += torch.stack(
            [ce, (log_b.exp() * (log_b - log_p)).sum(), (log_p.exp() * (log_p - log_b)).sum(), mask.sum().double()]
        )
    expected = (sums / sums[3]).tolist()
    assert [drift["loss"], drift["kl_base_model"], drift["kl_model_base"]] == pytest.approx(expected[:3], rel=1e-4)
    assert drift["tokens"] == sums[3]


def test_drift_of_a_fresh_adapter_is_zero(make_trainer):
    trainer = make_trainer(eval_dataset=rows(6, seed=9))
    drift = measure_drift(trainer.model, batches(trainer))
    assert drift["kl_base_model"] == pytest.approx(0, abs=1e-7) and drift["kl_model_base"] == pytest.approx(0, abs=1e-7)


def test_drift_leaves_the_adapter_active(make_trainer):
    trainer = make_trainer(eval_dataset=rows(6, seed=9))
    trainer.train()
    measure_drift(trainer.model, batches(trainer), trainer.teacher.activate)
    assert isinstance(trainer.model, PeftModel) and trainer.model.get_model_status().enabled is True
    assert all(p.requires_grad == (".default." in n) for n, p in trainer.model.named_parameters())
    assert trainer.model.active_adapters == ["default"]


def test_general_prompts_are_questions_with_answers():
    prompts = general_rows()
    assert len(prompts) == 48 == len({row["prompt"] for row in prompts})
    assert all(row["prompt"].strip() and row["completion"].strip() for row in prompts)
