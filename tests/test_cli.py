"""The command `trl-ema`, as users type it."""

import contextlib
import functools
import io
import os
import subprocess
import sys
from dataclasses import asdict
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import lora
from peft import get_peft_model

from trl_ema.cli import EvaluationArguments, _held_out_text, main
from trl_ema.evaluation import tasks
from trl_ema.evaluation.answers import check_against
from trl_ema.evaluation.models import load_base
from trl_ema.evaluation.settings import TaskSettings
from trl_ema.files import read_json, read_jsonl, write_json, write_jsonl


def trl_ema(*arguments, check=True, cwd=None):
    """What the command does, in this process: a process of its own imports for longer than most of these tests take."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        contextlib.chdir(cwd or os.getcwd()),
        mock.patch.object(sys, "argv", ["trl-ema", *map(str, arguments)]),
    ):
        try:
            main()
        except SystemExit as exit:
            code = exit.code
            if isinstance(code, str):
                code = print(code, file=err) or 1
    assert not code or not check, err.getvalue()[-3000:]
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


def test_the_command_is_installed(tmp_path):
    """In a process of its own: the one that imports least."""
    command = [sys.executable, "-m", "trl_ema", "report", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"trl-ema report: {tmp_path} holds no comparison" in done.stderr


def test_an_unknown_task_is_refused_in_a_line():
    done = trl_ema("evaluate", "--tasks", "helaswag", "--offline", "true", "--model", "none", check=False)
    assert done.returncode == 1 and "trl-ema evaluate: There is no task 'helaswag'" in done.stderr


@pytest.fixture(scope="module", autouse=True)
def one_manager():
    """lm-eval reads its thousands of task files once."""
    with mock.patch.object(tasks, "task_manager", functools.cache(tasks.task_manager)):
        yield


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "command", ["train", "check", "evaluate", "compare", "report", "rehearse", "tune-scale", "export"]
)
def test_each_command_has_a_help(command):
    assert f"trl-ema {command}" in trl_ema(command, "--help").stdout


def test_the_help_shows_an_example_of_each_command():
    text = trl_ema("--help").stdout
    for command in ("train", "check", "evaluate", "compare", "report", "rehearse", "tune-scale", "export"):
        assert f"trl-ema {command}" in text


def test_evaluate_measures_an_adapter_and_prints_its_scores(adapter, tmp_path):
    done = trl_ema(
        "evaluate", "--model", adapter, "--tasks", "arc_easy", "mmlu_medical", "--sample", 6, "--load_in_4bit", "true",
        "--dtype", "float32", "--offline", "true", "--output_dir", tmp_path,
    )  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} == {
        "arc_easy.json", "arc_easy.jsonl", "mmlu_medical.json", "mmlu_medical.jsonl",
    }  # fmt: skip
    table = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.startswith(("arc_", "mmlu_"))}
    for task, row in table.items():
        result = read_json(tmp_path / f"{task}.json")
        assert float(row[1]) == pytest.approx(result["score"], abs=1e-4) and int(row[-1]) == 6
        assert len(read_jsonl(tmp_path / f"{task}.jsonl")) == 6
    assert table.keys() == {"arc_easy", "mmlu_medical"}


def test_evaluate_refuses_another_base_before_it_loads_a_model(adapter, tmp_path):
    done = trl_ema(
        "evaluate", "--model", adapter, "--base", "no/such", "--tasks", "arc_easy", "--offline", "true",
        "--output_dir", tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "not on 'no/such': on another base its figures mean nothing" in done.stderr


def evaluate(*arguments, **options):
    return trl_ema("evaluate", "--tasks", "arc_easy", "--dtype", "float32", "--offline", "true", *arguments, **options)


def test_evaluate_compares_with_an_earlier_evaluation(adapter, tiny_folder, tmp_path):
    rows_file = tiny_folder / "data.jsonl"
    before = evaluate("--model", tiny_folder / "model", "--sample", 12, "--output_dir", tmp_path / "before")
    assert "change" not in before.stdout
    after = evaluate(
        "--model", adapter, "--sample", 12, "--output_dir", tmp_path / "after", "--against", tmp_path / "before",
        "--dataset_name", rows_file, "--dataset_samples", 4, "--generation_tokens", 3,
    )  # fmt: skip
    scores = [
        [row["score"] for row in read_jsonl(tmp_path / folder / "arc_easy.jsonl")] for folder in ("before", "after")
    ]
    lost = sum(a > b for a, b in zip(*scores, strict=True))
    table = after.stdout[after.stdout.index("change") :]
    assert f"{sum(scores[0]) / 12:9.4f}{sum(scores[1]) / 12:9.4f}" in table and f"{lost:6d}" in table
    assert "Mean relative drop (FG" in table
    text = read_json(tmp_path / "after" / "text.json")
    assert f"{text['domain']['kl_base_model']:12.4f}" in after.stdout and text["domain"]["kl_base_model"] > 0
    assert read_json(tmp_path / "after" / "arc_easy.json")["about"]["model"] == str(adapter)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (["--sample", 11], "`sample` is 12 there and 11 here. Evaluate both with the same `sample`"),
        (["--limit", 3], "`limit` is not given there and 3 here"),
        (["--sample", 12, "--num_fewshot", 2], "`num_fewshot` is not given there and 2 here"),
        (["--sample", 12, "--metric", "acc"], "`metric` is not given there and acc here"),
    ],
)
def test_answers_that_cannot_be_paired_are_refused_before_a_model_is_loaded(
    tiny_folder, tmp_path, monkeypatch, arguments, difference
):
    monkeypatch.setattr("trl_ema.evaluation.models.load_base", lambda *_, **__: pytest.fail("loaded a model"))
    write_jsonl(tmp_path / "before" / "arc_easy.jsonl", [])
    kept = {"settings": asdict(TaskSettings(sample=12)), "backend": "transformers"}
    write_json(tmp_path / "before" / "arc_easy.json", kept)
    done = evaluate(
        "--model", tiny_folder / "model", *arguments, "--against", "before", "--output_dir", "after", check=False, cwd=tmp_path
    )  # fmt: skip
    assert done.returncode == 1 and difference in done.stderr
    assert "before/arc_easy.jsonl and after/arc_easy.jsonl cannot be compared" in done.stderr


def test_answers_whose_settings_are_not_known_are_paired_by_themselves(tmp_path):
    write_jsonl(tmp_path / "t.jsonl", [])
    for known in (None, {"key": "x"}):
        if known is not None:
            write_json(tmp_path / "t.json", known)
        check_against(str(tmp_path), "after", "t", asdict(TaskSettings()), "vllm")


def test_evaluate_measures_an_adapter_with_tokens_of_its_own_on_tool_calls(tiny_folder, tmp_path, monkeypatch):
    model, tokenizer = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    tokenizer.add_tokens([f"<new {i}>" for i in range(len(model.get_input_embeddings().weight) - len(tokenizer) + 2)])
    added = len(tokenizer) - 1
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] or '' }}{% for c in m['tool_calls'] or [] %}"
        "{{ c['function'] | tojson }}{% endfor %}<new 0> {% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    model.resize_token_embeddings(len(tokenizer))
    peft = get_peft_model(model, lora(init_lora_weights=False, trainable_token_indices={"embed_tokens": [added]}))
    peft.save_pretrained(tmp_path / "adapter")
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "dose", "arguments": {"of": "drug"}}}],
    }
    rows = [{"messages": [{"role": "user", "content": f"the drug {i}"}, call]} for i in range(3)]
    write_jsonl(tmp_path / "calls.jsonl", rows)
    arguments = [
        "--model",
        tmp_path / "adapter",
        "--limit",
        2,
        "--dataset_name",
        tmp_path / "calls.jsonl",
        "--generation_tokens",
        3,
    ]
    monkeypatch.setattr("trl_ema.evaluation.suite.generation_metrics", lambda answers, references: {"n": 3})
    tokenizer.save_pretrained(tmp_path / "adapter")
    done = evaluate(*arguments, "--output_dir", tmp_path / "out")
    text = read_json(tmp_path / "out" / "text.json")
    assert text["domain"]["tokens"] > 3 and text["domain"]["kl_base_model"] > 0
    references = {row["reference"] for row in read_jsonl(tmp_path / "out" / "generations.jsonl")}
    assert len(references) == 1 and '{"name": "dose", "arguments": {"of": "drug"}}' in references.pop()
    assert f"The base of the drift is {tiny_folder / 'model'}" in done.stdout


def test_evaluate_measures_from_the_adapter_that_a_training_went_on_from(adapter, tiny_folder, tmp_path):
    rows_file = tiny_folder / "data.jsonl"
    options = ["--limit", 2, "--dataset_name", rows_file, "--dataset_samples", 3, "--generation_tokens", 0]
    found = []
    for name, more in (("base", []), ("same", ["--reference_adapter", adapter])):
        evaluate("--model", adapter, *options, *more, "--output_dir", tmp_path / name)
        found.append(read_json(tmp_path / name / "text.json"))
    assert found[0]["domain"]["kl_base_model"] > 1e-3 and found[1]["domain"]["kl_base_model"] < 1e-6
    assert found[0]["domain"]["loss"] == found[1]["domain"]["loss"] and found[0]["key"] != found[1]["key"]


def test_evaluate_names_a_blank_cell_before_it_loads_a_model_or_leaves_it_out(
    tiny_folder, tmp_path, tokenizer, monkeypatch
):
    monkeypatch.setattr("trl_ema.evaluation.models.load_base", lambda *_, **__: pytest.fail("loaded a model"))
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,completion\nthe drug,the skin\nthe fever,\n")
    done = evaluate(
        "--model", tiny_folder / "model", "--dataset_name", rows, "--output_dir", tmp_path / "out", check=False
    )  # fmt: skip
    assert done.returncode == 1
    assert f"Row 2 of {rows} (line 3) is incomplete: column `completion` is blank" in done.stderr
    assert "`--drop_incomplete_rows true`" in done.stderr
    args = EvaluationArguments(dataset_name=str(rows), drop_incomplete_rows=True, generation_tokens=0)
    assert len(_held_out_text(args, tokenizer, None).batches["domain"][0]["labels"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "nowhere"], "`against='nowhere'` has no answers to 'arc_easy' (arc_easy.jsonl)"),
        (["--output_dir", "/proc/none"], "Cannot write to `output_dir='/proc/none'`"),
        (["--base", "some/base"], "`base='some/base'` is for an adapter"),
        (["--reference_adapter", "out"], "`reference_adapter='out'` is for an adapter"),
        (["--metric", "f1"], "Task 'arc_easy' has no metric 'f1'"),
        (["--gen_kwargs", "max_gen_toks=8"], "say how answers are written, and in 'arc_easy' they are chosen"),
        (["--gen_kwargs", "max_gen_toks"], "expected `key=value,key=value`"),
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "both say how weights are kept"),
        (["--include_path", "nowhere"], "`include_path` names 'nowhere', which is no folder with tasks"),
        (["--backend", "vllm", "--load_in_8bit", "true"], "Leave out `load_in_8bit` or `backend`"),
        (["--backend", "vllm"], "This needs `vllm`. Install it with `pip install 'trl_ema[vllm]'`"),
        (["--dtype", "float23"], "invalid choice: 'float23'"),
        (["--limit", "2.5"], "`limit` must be a number of questions, or a share of them below 1, got 2.5"),
    ],
)
def test_evaluate_refuses_bad_input_in_a_line(tiny_folder, tmp_path, arguments, message):
    done = evaluate("--model", tiny_folder / "model", *arguments, check=False, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_scores_and_changes_that_no_resample_varies_are_printed_without_an_interval(tmp_path, capsys):
    from trl_ema.cli import print_changes, print_scores
    from trl_ema.files import write_jsonl

    asked = {"task": "arc_easy", "doc_hash": "x", "prompt_hash": "y"}
    for folder in ("before", "after"):
        answers = [asked | {"doc_id": i, "score": 1.0} for i in range(4)]
        write_jsonl(tmp_path / folder / "arc_easy.jsonl", answers)
    print_scores({"arc_easy": {"score": 1.0, "chance": 0.25, "n": 4}}, str(tmp_path / "after"))
    print_changes(str(tmp_path / "before"), str(tmp_path / "after"), ["arc_easy"])
    printed = capsys.readouterr().out
    assert "nan" not in printed and " to " not in printed and printed.count("–") == 2


def test_each_model_has_a_folder_of_its_own_and_a_share_of_the_questions_is_a_limit(tiny_folder, tmp_path):
    evaluate("--model", tiny_folder / "model", "--limit", 0.002, cwd=tmp_path)
    (folder,) = (tmp_path / "runs" / "evaluation").iterdir()
    assert folder.name.endswith("-model") and read_json(folder / "arc_easy.json")["n"] == 5


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("dataset_samples", 5.0, 5),
        ("generation_tokens", np.int64(0), 0),
        ("num_fewshot", torch.tensor(2), 2),
        ("sample", 7.0, 7),
        ("batch_size", np.float32(4), 4),
        ("seed", np.int64(3), 3),
        ("limit", np.float64(0.5), 0.5),
        ("limit", 3, 3.0),
        ("offline", "true", True),
        ("load_in_4bit", "no", False),
    ],
)
def test_evaluations_numbers_and_booleans_are_read_from_any_library(name, value, expected):
    found = getattr(EvaluationArguments(**{name: value}), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("sample", "3", "`sample` must be a number, got '3'"),
        ("limit", "3", "`limit` must be a number, got '3'"),
        ("dataset_samples", 0, "`dataset_samples` must be a whole number of at least 1, got 0"),
        ("batch_size", 2.5, "`batch_size` must be a whole number of at least 1, got 2.5"),
        ("generation_tokens", -1, "`generation_tokens` must be a whole number of at least 0, got -1"),
        ("apply_chat_template", "perhaps", "`apply_chat_template` must be a boolean, got 'perhaps'"),
    ],
)
def test_evaluations_options_of_another_kind_are_refused(name, value, message):
    with pytest.raises((ValueError, TypeError), match=message):
        EvaluationArguments(**{name: value})


def test_evaluate_loads_weights_in_8_bits(tiny_folder, tmp_path):
    evaluate("--model", tiny_folder / "model", "--limit", 2, "--load_in_8bit", "true", "--output_dir", tmp_path / "8")
    evaluate("--model", tiny_folder / "model", "--limit", 2, "--output_dir", tmp_path / "32")
    kept = [read_json(tmp_path / folder / "arc_easy.json") for folder in ("8", "32")]
    assert kept[0]["about"]["load_in_8bit"] is True and kept[0]["n"] == 2 and kept[0]["key"] != kept[1]["key"]


def test_a_suite_says_what_it_lacks_and_the_model_is_loaded_as_asked(tiny_folder, tmp_path, asked_of_base):
    done = evaluate(
        "--model", tiny_folder / "model", "--suite", "medical", "--limit", 1, "--trust_remote_code", "true", "--load_in_8bit",
        "true", "--output_dir", tmp_path, check=False,
    )  # fmt: skip
    assert "Not asked of the suite `medical`, for want of a hub: pubmedqa, medqa_4options, ifeval." in done.stdout
    assert "trl-ema evaluate: loaded" in done.stderr and asked_of_base["trust_remote_code"] is True
    assert asked_of_base["quantization_config"].load_in_8bit and not asked_of_base["quantization_config"].load_in_4bit


def test_evaluate_refuses_an_unknown_task(tmp_path):
    done = trl_ema("evaluate", "--tasks", "helaswag", "--offline", "true", "--output_dir", tmp_path, check=False)
    assert "There is no task 'helaswag'. Near matches: hellaswag" in done.stderr


def test_report_over_a_folder_without_a_comparison_says_what_is_missing(tmp_path):
    done = trl_ema("report", tmp_path, check=False)
    assert "holds no comparison" in done.stderr and "plan.json is missing" in done.stderr
