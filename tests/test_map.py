"""A map of methods: many settings of each, measured at several scales, from runs that were trained elsewhere."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import lora, rows
from datasets import Dataset
from peft import get_peft_model

from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.run import run_comparison
from trl_ema.data import as_chat
from trl_ema.evaluation.drift import drift_of_rows, tokenized_batches
from trl_ema.evaluation.models import load_base, load_tokenizer, with_adapter
from trl_ema.files import read_json


PLAN = {
    "training": dict(use_cpu=True, bf16=False, learning_rate=1e-2, eval_fraction=0.3, dtype="float32", report_to="none"),
    "arms": {
        "sft": {"teacher": "none", "grid": {"learning_rate_scale": [1, 0.5]}},
        "ema": {"teacher": "ema", "grid": {"kl_weight": [1, 3]}},
        "dora": {"teacher": "none", "use_dora": True},
    },
    "evaluation": {"scales": [0.5, 0.25], "domain_samples": 16, "generation_tokens": 0, "max_length": 64},
}  # fmt: skip


def write_run(folder, model_folder, steps, batches, **config):
    """As a run leaves it, trained by a loop of its own."""
    torch.manual_seed(0)
    model = get_peft_model(load_base(model_folder, dtype=torch.float32)[0], lora(**config))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
    for _ in range(steps):
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    model.save_pretrained(folder)
    Path(folder, "metrics.json").write_text(json.dumps({"log": [{"step": steps, "loss": 1.0}]}))


@pytest.fixture(scope="module")
def runs(tiny_folder, tmp_path_factory):
    """A comparison whose runs were trained elsewhere: all of its arms but one."""
    folder = tmp_path_factory.mktemp("map")
    model = str(tiny_folder / "model")
    rows(24, seed=4).to_json(folder / "other.jsonl")
    Dataset.from_list([{"text": f"the drug of case {i} was given twice"} for i in range(12)]).to_json(
        folder / "texts.jsonl"
    )
    plan = json.loads(json.dumps(PLAN))
    plan["training"] |= {"model_name_or_path": model, "dataset_name": str(tiny_folder / "data.jsonl")}
    plan["evaluation"]["drift_data"] = {"other": str(folder / "other.jsonl"), "texts": str(folder / "texts.jsonl")}
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan, sort_keys=False))
    batches = tokenized_batches(rows(48, seed=7), load_tokenizer(model), 64)
    out = folder / "out"
    write_run(out / "sft-1" / "seed_0", model, 8, batches)
    write_run(out / "sft-0.5" / "seed_0", model, 3, batches)
    write_run(out / "ema-1" / "seed_0", model, 5, batches)
    write_run(out / "ema-1" / "seed_0" / "teacher", model, 4, batches)
    write_run(out / "dora" / "seed_0", model, 4, batches, use_dora=True)
    comparison = load_comparison(str(folder / "plan.yaml"), str(out))
    run_comparison(comparison, evaluate_only=True)
    return comparison


# Gain and drift of the trained adapter, as nats, and what its scale does to them.
METHODS = {
    "sft": {"sft-1": (0.80, 0.30), "sft-0.5": (0.74, 0.25), "sft-2": (0.78, 0.45)},
    "rehearsal": {"rehearsal-4": (0.79, 0.045), "rehearsal-1": (0.81, 0.09), "rehearsal-30": (0.60, 0.02)},
    "frozen": {"frozen-1": (0.62, 0.085)},
}


def write_measured(
    folder, methods=METHODS, seeds=(0,), rows=40, scales=(0.25, 0.5, 0.75), noise=0.3, spread=0.0, **plan
):
    """The evaluations of a comparison as they would be: drift as scale², gain as 2·scale − scale², and noise of rows and seeds."""
    g = np.random.default_rng(0)
    tokens = g.integers(8, 24, rows)
    losses, shared = 3 + g.normal(0, 0.5, rows), g.normal(0, noise, (2, rows))

    def text(gain, drift, own=0.0):
        of_row = [1 + part + g.normal(0, own, rows) for part in shared]
        gains, drifts = gain * of_row[0], drift * np.maximum(of_row[1], 0.1)
        sums = {"domain": (losses - gains, drifts), "general": (losses, drifts), "other": (losses, 2 * drifts)}
        return {
            name: {
                "loss": float(loss @ tokens / tokens.sum()),
                "kl_base_model": float(kl @ tokens / tokens.sum()),
                "kl_model_base": 0.0,
                "rows": np.stack([loss * tokens, tokens, kl * tokens, 0 * kl], axis=1).tolist(),
            }
            for name, (loss, kl) in sums.items()
        }

    def write(path, value):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))

    arms = {arm: {"teacher": "none", "method": name} for name, found in methods.items() for arm in found}
    write(
        folder / "plan.json",
        {
            "training": {}, "arms": arms, "reference": None, "controls": None, "plain_sft": list(methods["sft"]),
            "averaged": [], "seeds": list(seeds), "model": "m", "data": "d",
            "evaluation": {
                "retention_tasks": {}, "domain_tasks": {}, "generation_tokens": 0, "scales": list(scales), "drift_data": {"other": "x.jsonl"},
            },
        } | plan,
    )  # fmt: skip
    write(folder / "base" / "text.json", {"key": ["base", "rows"]} | text(0.0, 0.0))
    for arm, (gain, drift) in ((arm, point) for found in methods.values() for arm, point in found.items()):
        for seed in seeds:
            gained = gain + g.normal(0, spread)
            write(folder / arm / f"seed_{seed}" / "metrics.json", {"log": [{"step": 1, "loss": 2.0}]})
            student = folder / arm / f"seed_{seed}" / "evaluation" / "student"
            write(student / "text.json", {"key": [arm, "rows"]} | text(gained, drift, 0.05))
            curve = {f"{x:g}": text(gained * (2 * x - x**2), drift * x**2, 0.05) for x in scales}
            write(student / "curve.json", {"key": [arm, "rows"], "unscalable": None, "scales": curve})


def test_runs_that_were_trained_elsewhere_are_measured_and_nothing_is_trained(runs, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *args, **kwargs: pytest.fail("trained"))
    root = Path(runs.output_dir)
    assert not (root / "ema-3").exists() and not list(root.rglob("config.yaml"))
    measured = sorted(str(path.parent.relative_to(root)) for path in root.rglob("text.json"))
    assert measured == [
        "base",
        "dora/seed_0/evaluation/student",
        "ema-1/seed_0/evaluation/student",
        "ema-1/seed_0/evaluation/teacher",
        "sft-0.5/seed_0/evaluation/student",
        "sft-1/seed_0/evaluation/student",
    ]
    times = [path.stat().st_mtime_ns for path in sorted(root.rglob("*.json"))]
    monkeypatch.setattr("trl_ema.evaluation.suite.drift_of_rows", lambda *args, **kwargs: pytest.fail("measured again"))
    run_comparison(runs, arms=["sft", "dora"], evaluate_only=True)
    after = [path.stat().st_mtime_ns for path in sorted(root.rglob("*.json")) if path.name != "plan.json"]
    assert set(after) <= set(times)


def test_a_curve_is_the_adapter_at_its_scales(runs, tiny_folder):
    folder = Path(runs.folder("sft-1", 0))
    curve = read_json(folder / "evaluation" / "student" / "curve.json")
    assert list(curve["scales"]) == ["0.25", "0.5"] and curve["unscalable"] is None
    model, _ = with_adapter(load_base(str(tiny_folder / "model"), dtype=torch.float32)[0], str(folder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.25)
    tokenizer = load_tokenizer(str(tiny_folder / "model"))
    batches = tokenized_batches(as_chat(rows(24, seed=4), tokenizer), tokenizer, 64)
    expected = drift_of_rows(model, batches).sum(0)
    found = curve["scales"]["0.25"]["other"]
    assert found["kl_base_model"] == pytest.approx(float(expected[1] / expected[3]), rel=1e-4)
    sums = torch.tensor(found["rows"]).sum(0)
    assert sums.tolist() == pytest.approx(expected[[0, 3, 1, 2]].tolist(), rel=1e-4)
    drifts = [
        *(curve["scales"][scale]["texts"]["kl_base_model"] for scale in ("0.25", "0.5")),
        read_json(folder / "evaluation" / "student" / "text.json")["texts"]["kl_base_model"],
    ]
    assert 0 < drifts[0] < drifts[1] < drifts[2]


def test_an_adapter_that_cannot_be_scaled_has_no_curve(runs):
    curve = read_json(Path(runs.folder("dora", 0), "evaluation", "student", "curve.json"))
    assert curve["unscalable"] == "`use_dora=True`" and curve["scales"] == {}


def test_a_scale_that_is_missing_is_measured_alone(runs, tmp_path, monkeypatch):
    path = Path(runs.folder("sft-1", 0), "evaluation", "student", "curve.json")
    whole = path.read_text()
    curve = json.loads(whole)
    del curve["scales"]["0.5"]
    path.write_text(json.dumps(curve))
    measured = []
    from trl_ema.evaluation import suite

    monkeypatch.setattr(
        suite,
        "drift_of_rows",
        lambda *args, description, **kwargs: (
            measured.append(description) or drift_of_rows(*args, description=description, **kwargs)
        ),
    )
    run_comparison(runs, arms=["sft-1"], evaluate_only=True)
    assert measured == [f"{name} text × 0.5" for name in ("domain", "general", "other", "texts")]
    assert json.loads(path.read_text()) == json.loads(whole)
