"""`trl-ema train --adapter_name_or_path`: the model before the training is base plus adapter, in every figure and as a teacher."""

import runpy
from dataclasses import make_dataclass

import pytest
import torch
import yaml
from conftest import VOCAB_SIZE, lora, qwen2_tokenizer, tiny_model
from safetensors.torch import load_file
from test_cli import trl_ema
from test_scaling import LAYERS, write_run
from trl import ModelConfig

from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.run import run_comparison
from trl_ema.evaluation.drift import measure_drift, tokenized_batches
from trl_ema.evaluation.models import load_base, vocabulary, with_adapter
from trl_ema.files import read_json, shipped
from trl_ema.inputs import held_out_rows, warn_of_other_lora
from trl_ema.script import options_of_run


QUICK = [
    "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--max_steps", 3, "--learning_rate", "1e-2", "--report_to", "none",
    "--eval_samples", 6, "--eval_fraction", 0.2, "--generations", 0, "--max_length", 48, "--save_strategy", "no",
    "--per_device_train_batch_size", 4, "--disable_tqdm", "true",
]  # fmt: skip


@pytest.fixture(scope="module")
def start(tiny_folder, tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("start"), tiny_folder / "model", r=3, lora_alpha=5)
    qwen2_tokenizer().save_pretrained(folder)
    return folder


def train(*arguments, **options):
    return trl_ema("train", *QUICK, *arguments, **options)


def test_a_training_goes_on_and_measures_from_the_adapter(start, tiny_folder, tmp_path):
    out = tmp_path / "out"
    rows = ["--dataset_name", tiny_folder / "data.jsonl"]
    train("--adapter_name_or_path", start, *rows, "--teacher", "frozen", "--output_dir", out)
    metrics = read_json(out / "metrics.json")
    before, student = metrics["before"]["domain"], metrics["student"]["domain"]
    assert before["kl_base_model"] == pytest.approx(0, abs=1e-6) and student["kl_base_model"] > 1e-3
    model, tokenizer = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    model, _ = with_adapter(model, str(start))
    held_out = held_out_rows(str(out), options_of_run(str(out)))
    expected = measure_drift(model, tokenized_batches(held_out, tokenizer, 48))
    assert before["loss"] == pytest.approx(expected["loss"], rel=1e-4) and student["loss"] < before["loss"]
    # A frozen teacher is where it began; the student is another one, of the same rank and scaling.
    teacher, began, now = (load_file(folder / "adapter_model.safetensors") for folder in (out / "teacher", start, out))
    assert teacher.keys() == began.keys() == now.keys()
    assert all(teacher[key].equal(began[key]) for key in began) and not all(now[key].equal(began[key]) for key in began)
    config = read_json(out / "adapter_config.json")
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5, str(tiny_folder / "model"))
    assert metrics["provenance"]["adapter"] == str(start)
    assert f"| `adapter` | {start.name} |" in (out / "README.md").read_text()

    done = trl_ema("export", out, "--scale", 0.5, check=False)
    assert done.returncode == 1 and f"went on from the adapter {str(start)!r}" in done.stderr
    done = trl_ema("export", out, "--to", "merged", "--dtype", "float32", "--output_dir", tmp_path / "merged")
    assert "on 54 rows (6 held out by the run, 48 general)" in done.stdout
    merged, _ = load_base(str(tmp_path / "merged"), dtype=torch.float32)
    again = measure_drift(merged, tokenized_batches(held_out, tokenizer, 48))
    assert again["loss"] == pytest.approx(student["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter_name_or_path", "none"], "`adapter_name_or_path='none'` holds no adapter (adapter_config.json is missing)"),
        (["--adapter_name_or_path", "run", "--model_name_or_path", "some/base"], "not on 'some/base'"),
        (["--adapter_name_or_path", "bare"], "`adapter_name_or_path='bare'` holds no weights of its adapter (adapter_model.safetensors is missing)"),
        (["--model_name_or_path", "run"], "`model_name_or_path='run'` is an adapter. To go on from it give it as `--adapter_name_or_path`"),
    ],
)  # fmt: skip
def test_what_is_no_start_is_refused_in_a_line(tiny_folder, tmp_path, arguments, message):
    for name in ("run", "bare"):
        lora(base_model_name_or_path=str(tiny_folder / "model")).save_pretrained(tmp_path / name)
    (tmp_path / "run" / "adapter_model.safetensors").touch()
    done = train(
        *arguments, "--dataset_name", tiny_folder / "data.jsonl", "--output_dir", "x", check=False, cwd=tmp_path
    )
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_a_training_that_is_not_measured_prepares_no_measurement(start, tiny_folder, tmp_path, monkeypatch):
    main = runpy.run_path(str(shipped("recipes") / "medical_ema.py"))["main"]
    made = []
    monkeypatch.setitem(main.__globals__, "Measurement", lambda *_: made.append(1))
    arguments = [*QUICK, "--adapter_name_or_path", start, "--dataset_name", tiny_folder / "data.jsonl"]
    arguments += ["--max_steps", 1, "--measure", "false", "--output_dir", tmp_path / "out"]
    main([*map(str, arguments)])
    metrics = read_json(tmp_path / "out" / "metrics.json")
    assert not made and "student" not in metrics and metrics["provenance"]["steps"] == 1


def test_options_of_lora_that_the_adapter_does_not_have_are_named(start, tmp_path):
    given = dict(lora_r=3, lora_alpha=5, lora_dropout=0.0, lora_target_modules="all-linear")
    warn_of_other_lora(str(start), ModelConfig(**given))  # the same, as in a stage of a comparison
    warn_of_other_lora(str(start), ModelConfig(lora_target_modules=[LAYERS]))
    lora(target_modules=["q_proj", "down_proj"]).save_pretrained(tmp_path)
    warn_of_other_lora(str(tmp_path), ModelConfig(lora_r=4, lora_target_modules=["down_proj", "q_proj"]))
    other = given | dict(lora_r=8, lora_target_modules=["q_proj"], use_dora=True)
    with pytest.warns(UserWarning) as record:
        warn_of_other_lora(str(start), ModelConfig(**other))
    (warning,) = record
    assert str(warning.message).startswith(
        f"Ignored with `adapter_name_or_path={str(start)!r}`, whose own options count: `lora_r=8` (it has 3), "
        "`lora_target_modules='q_proj'` (it has "
    )
    assert str(warning.message).endswith("`use_dora=True` (it has False).")


@pytest.mark.parametrize("command", ["train", "check"])
def test_such_options_are_named_beforehand(start, tiny_folder, command):
    given = ["--adapter_name_or_path", start, "--dataset_name", tiny_folder / "data.jsonl", "--lora_alpha", 64]
    with pytest.warns(UserWarning, match=r"`lora_alpha=64` \(it has 5\)"):
        trl_ema(
            command,
            *QUICK,
            *given,
            "--output_dir",
            tiny_folder / "unused",
            "--label_smoothing_factor",
            0.1,
            check=False,
        )


def test_the_vocabulary_of_a_sharded_model_is_the_whole_one():
    model = tiny_model()
    weight = model.get_input_embeddings().weight
    weight.ds_tensor, weight.ds_shape = weight.data, weight.shape  # as DeepSpeed leaves it
    weight.data = torch.empty(0)
    assert vocabulary(model) == VOCAB_SIZE


def test_a_sub_space_makes_an_adapter_of_its_own(start, tmp_path):
    main = runpy.run_path(str(shipped("recipes") / "medical_ema.py"))["main"]
    arguments = [*map(str, QUICK), "--adapter_name_or_path", str(start), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="Leave out `--adapter_name_or_path` or `--subspace`"):
        main(arguments, make_dataclass("Options", [("subspace", str, "osf")]))


def test_a_comparison_begins_at_the_base(start, tiny_folder, tmp_path):
    training = {"model_name_or_path": str(tiny_folder / "model"), "dataset_name": str(tiny_folder / "data.jsonl")}
    training |= {"use_cpu": True, "bf16": False, "max_steps": 1, "adapter_name_or_path": str(start)}
    plan = {
        "output_dir": str(tmp_path / "out"),
        "training": training,
        "arms": {"sft": {"teacher": "none"}},
        "reference": "sft",
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    with pytest.raises(
        ValueError, match="Arm 'sft' goes on from an adapter, and a comparison measures every arm from its base"
    ):
        run_comparison(load_comparison(str(tmp_path / "plan.yaml"), None))
