"""The benchmark's arms on a tiny model: that each runs on each kind of rows, and does the same work. Nothing is timed."""

import importlib.util
import json
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch


def script(name):
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


benchmark = script("benchmark")


def run(monkeypatch, capsys, *arguments):
    """The printed table."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *map(str, arguments)])
    benchmark.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("rows", ["equal", "prompted", "padded", "packed"])
def test_every_arm_steps_on_every_kind_of_rows(monkeypatch, capsys, tiny_folder, tmp_path, rows):
    output = tmp_path / "figures.json"
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    options = ["--model", tiny_folder / "model", "--tokens", 16, "--repetitions", 1, "--rows", rows, "--json", output]
    table = run(monkeypatch, capsys, "step", *options, "--plot", tmp_path / "figures.png")
    figures = json.loads(output.read_text())["figures"]
    assert len(figures) == 13 and all(f["low"] == f["median"] == f["high"] > 0 for f in figures)
    assert all(f["median"] == pytest.approx(f["over"][0] / f["under"][0]) for f in figures)
    assert all(f["name"] in table for f in figures) and (tmp_path / "figures.png").stat().st_size > 10_000


@pytest.mark.parametrize("nf4", [False, True])
def test_the_arms_have_the_same_losses_and_precision(tiny_folder, tmp_path, nf4):
    args = benchmark.parse(["step", "--model", str(tiny_folder / "model"), "--tokens", "16", *["--nf4"] * nf4])
    arms = {arm: benchmark.Stepper(arm, args, str(tmp_path)) for arm in ("frozen", "second model", "adapter off")}
    losses = {}
    for arm, stepper in arms.items():
        trained = [p for p in stepper.trainer.model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        torch.manual_seed(0)
        for parameter in trained:
            parameter.data.normal_(std=0.1)
        items = (stepper.batch["labels"][:, 1:] != -100).sum()
        losses[arm] = stepper.trainer.training_step(stepper.model, dict(stepper.batch), items)
    torch.testing.assert_close(losses["frozen"], losses["adapter off"], rtol=1e-4, atol=0)
    torch.testing.assert_close(losses["second model"], losses["adapter off"], rtol=1e-4, atol=0)


def test_checkpointing_computes_the_forward_pass_again(tiny_folder, tmp_path):
    options = ["step", "--model", str(tiny_folder / "model"), "--tokens", "16"]
    plain, checkpointed = (
        benchmark.Stepper("ema", benchmark.parse([*options, *more]), str(tmp_path))
        for more in ([], ["--checkpointing"])
    )
    # Student forward and backward, teacher forward; and one more forward of the layers.
    assert 1.1 < benchmark._operations(checkpointed) / benchmark._operations(plain) < 1.34


def test_products_with_four_bit_weights_count_as_others(tiny_folder, tmp_path):
    options = ["step", "--model", str(tiny_folder / "model"), "--tokens", "16"]
    plain, nf4 = (
        benchmark._operations(benchmark.Stepper("ema", benchmark.parse([*options, *more]), str(tmp_path)))
        for more in ([], ["--nf4"])
    )
    assert plain == nf4


def test_the_benchmark_for_a_gpu_runs_small_on_a_cpu(monkeypatch, tmp_path):
    gpu = script("gpu")
    monkeypatch.setattr(gpu.losses, "_kernels", gpu.losses._kernels)  # which it replaces
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = ["--smoke", "--output_dir", tmp_path, "--only", "loss_speed", "first_step"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", *map(str, arguments)])
    with warnings.catch_warnings():
        gpu.main()
    figures = json.loads((tmp_path / "gpu.json").read_text())
    assert not [name for name in figures if name.endswith("failed")]
    assert set(figures["loss/ms"]) > {"three products", "TRL's SFT head", "forward", "jsd"}
    first = figures["first step/bf16"]
    assert first["kl"] == 0 and first["ce"] == pytest.approx(first["sft"], rel=1e-3)
