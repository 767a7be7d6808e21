"""The command `trl-ema`, as users type it."""

import subprocess
import sys

import pytest
import torch
from conftest import lora
from peft import get_peft_model

from trl_ema.evaluation.models import load_base
from trl_ema.files import read_json, read_jsonl


def trl_ema(*arguments, check=True):
    command = [sys.executable, "-m", "trl_ema", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def adapter(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    get_peft_model(model, lora(init_lora_weights=False)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("command", ["train", "evaluate", "compare", "report"])
def test_each_command_has_a_help(command):
    assert f"trl-ema {command}" in trl_ema(command, "--help").stdout


def test_the_help_shows_an_example_of_each_command():
    text = trl_ema("--help").stdout
    for command in ("train", "evaluate", "compare", "report"):
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


def test_evaluate_refuses_an_unknown_task(tmp_path):
    done = trl_ema("evaluate", "--tasks", "helaswag", "--offline", "true", "--output_dir", tmp_path, check=False)
    assert "There is no task 'helaswag'. Near matches: hellaswag" in done.stderr


def test_report_over_a_folder_without_a_comparison_says_what_is_missing(tmp_path):
    done = trl_ema("report", tmp_path, check=False)
    assert "holds no comparison" in done.stderr and "plan.json is missing" in done.stderr
