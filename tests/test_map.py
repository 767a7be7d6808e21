"""A map of methods: many settings of each, measured at several scales, from runs that were trained elsewhere."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import lora, rows
from datasets import Dataset
from matplotlib.text import Text
from peft import get_peft_model
from scipy import integrate
from test_comparison import check_tags

from trl_ema.cli import compare
from trl_ema.comparison.curves import LEVELS, Curve, choose, drift_at, follow, gain_at, hypervolume
from trl_ema.comparison.figures import summarize_comparison
from trl_ema.comparison.fronts import Fronts, Setting
from trl_ema.comparison.pictures import COLORS, _fronts, arm_colors
from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.report import write_report
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
                "kl_model_base": float(kl @ tokens / tokens.sum()),
                "rows": np.stack([loss * tokens, tokens, kl * tokens], axis=1).tolist(),
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


def test_the_drift_of_a_map_is_that_on_the_texts_it_names(tmp_path):
    def measured(name, **evaluation):
        given = {"retention_tasks": {}, "domain_tasks": {}, "generation_tokens": 0, "scales": [0.25, 0.5, 0.75]}
        given |= {"drift_data": {"other": "x.jsonl"}} | evaluation
        write_measured(tmp_path / name, evaluation=given)
        summary = summarize_comparison(str(tmp_path / name))
        return summary["map"], Path(write_report(str(tmp_path / name))).read_text()

    (both, page), (other, page_of_other) = measured("both"), measured("other", drift_on=["other"])
    texts = read_json(
        tmp_path / "both" / both["reference"]["label"] / "seed_0" / "evaluation" / "student" / "text.json"
    )
    drift = {name: texts[name]["kl_base_model"] for name in ("general", "other")}
    assert both["reference"]["drift"] == pytest.approx(np.mean(list(drift.values())))
    assert other["reference"]["drift"] == pytest.approx(drift["other"])
    assert both["texts"] == other["texts"] == ["general", "other"] and other["drift_on"] == ["other"]
    assert "on general and other text, their mean" in page and "on other text." in page_of_other


def test_runs_that_were_trained_elsewhere_are_measured_and_nothing_is_trained(runs, monkeypatch):
    monkeypatch.setattr("trl_ema.comparison.run.train", lambda *args, **kwargs: pytest.fail("trained"))
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
    assert sums.tolist() == pytest.approx(expected[[0, 3, 1]].tolist(), rel=1e-4)
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


def test_the_command_measures_alone_and_takes_a_method_for_its_arms(runs, tmp_path, monkeypatch, capsys):
    """Here the runs of one method, with no measured figures yet."""
    folder = tmp_path / "out"
    for arm in ("sft-1", "sft-0.5", "ema-1"):
        shutil.copytree(runs.folder(arm, 0), folder / arm / "seed_0", ignore=shutil.ignore_patterns("evaluation"))
    monkeypatch.setattr("trl_ema.comparison.run.train", lambda *args, **kwargs: pytest.fail("trained"))
    plan = str(Path(runs.output_dir).parent / "plan.yaml")
    compare(["--config", plan, "--output_dir", str(folder), "--evaluate_only", "--arms", "sft"])
    assert f"Report: {folder}/report.html" in capsys.readouterr().out
    summary = read_json(folder / "comparison.json")
    assert [point["label"] for point in summary["points"]] == ["sft-1", "sft-0.5"]
    assert summary["missing"] == [
        "ema-1, seed 0: student not evaluated",
        "ema-1, seed 0: teacher not evaluated",
        "ema-3, seed 0: not trained (ema-3/seed_0)",
        "dora, seed 0: not trained (dora/seed_0)",
    ]
    with pytest.raises(ValueError, match=r"no arms \['lora'\]; expected some of \['sft-1', .* 'dora', 'sft', 'ema'\]"):
        compare(["--config", plan, "--output_dir", str(folder), "--evaluate_only", "--arms", "lora"])


def test_a_report_is_of_what_there_is(runs, tmp_path):
    page = Path(write_report(runs.output_dir)).read_text()
    summary = read_json(Path(runs.output_dir, "comparison.json"))
    assert summary["missing"] == ["ema-3, seed 0: not trained (ema-3/seed_0)"]
    assert [point["label"] for point in summary["points"]] == ["sft-1", "sft-0.5", "ema-1", "ema-1, teacher", "dora"]
    drift = summary["points"][0]["drift"]
    assert list(drift) == ["domain", "general", "other", "texts"] and drift["texts"]["kl_base_model"]["mean"] > 0
    assert summary["reference"] == "sft-1" and summary["map"]["texts"] == ["general", "other", "texts"]
    found = {entry["method"]: entry for entry in summary["map"]["methods"]}
    assert {name: (entry["settings"], entry["planned"]) for name, entry in found.items()} == {
        "sft": (2, 2), "ema": (1, 2), "dora": (1, 1),
    }  # fmt: skip
    assert [len(way["points"]) for way in found["ema"]["ways"]] == [3, 3] and len(
        found["dora"]["ways"][0]["points"]
    ) == 1
    text = Path(runs.output_dir, "report.md").read_text()
    assert "dora is shown at its own scale alone: `use_dora=True` is no factor of the update." in text
    assert "| ema | 1 of 2 |" in text and "KL, texts text" in text and "mean drop |" not in text
    assert "<h2>The map</h2>" in page and "drift_data:" in page
    check_tags(page)
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids)) and {*re.findall(r"url\(#([^)]*)\)", page)} <= {*ids}
    (tmp_path / "comparison.json").write_bytes(Path(runs.output_dir, "comparison.json").read_bytes())
    write_report(str(tmp_path))
    for name in ("report.md", "report.html", "front.png"):
        assert (tmp_path / name).read_bytes() == Path(runs.output_dir, name).read_bytes()


def share_of(folder, sft, scale, half):
    """Gain and drift of one place on one half of the rows, by hand."""

    def mean(text, name, column):
        rows = [row for i, row in enumerate(text[name]["rows"]) if i % 2 == half]
        return sum(row[column] for row in rows) / sum(row[1] for row in rows)

    student = folder / sft / "seed_0" / "evaluation" / "student"
    text = read_json(student / "text.json") if scale == 1 else read_json(student / "curve.json")["scales"][f"{scale:g}"]
    base = read_json(folder / "base" / "text.json")
    drift = (mean(text, "general", 2) + mean(text, "other", 2)) / 2
    return np.array([mean(base, "domain", 0) - mean(text, "domain", 0), drift])


def test_fronts_are_chosen_on_one_half_of_the_rows_and_measured_on_the_other(tmp_path):
    write_measured(tmp_path, noise=0.6)
    found = summarize_comparison(str(tmp_path))["map"]
    assert found["reference"]["label"] == "sft-1"

    def curves(half):
        unit = np.array(share_of(tmp_path, "sft-1", 1, half))
        for arm in METHODS["rehearsal"]:
            points = [share_of(tmp_path, arm, scale, half) / unit for scale in (0.25, 0.5, 0.75, 1)]
            gains, drifts = np.array([(0, 0), *points]).T
            yield np.interp(np.sqrt(LEVELS), np.sqrt(drifts), gains)

    areas, used = [], set()
    for half in (0, 1):
        chosen = np.argmax(list(curves(1 - half)), axis=0)
        used |= {*chosen[1:].tolist()}
        gains = np.array(list(curves(half)))[chosen, np.arange(len(LEVELS))]
        areas.append(integrate.trapezoid(gains[LEVELS <= 1], LEVELS[LEVELS <= 1]))
    assert len(used) > 1
    methods = {entry["method"]: entry for entry in found["methods"]}
    area = methods["rehearsal"]["hypervolume"]
    assert area["mean"] == pytest.approx(np.mean(areas)) and area["low"] < area["mean"] < area["high"]
    ahead = methods["rehearsal"]["ahead"]["sft"]
    assert ahead["mean"] == pytest.approx(area["mean"] - methods["sft"]["hypervolume"]["mean"])
    # Paired: both fronts are measured on the same rows.
    assert ahead["high"] - ahead["low"] < 0.8 * (area["high"] - area["low"]) and ahead["low"] > 0
    assert methods["sft"]["is_control"] and not methods["rehearsal"]["is_control"]
    assert next(iter(methods)) == "rehearsal" and methods["sft"]["ahead"] == {}
    assert "chosen on the seed that they are reported on" in Path(write_report(str(tmp_path))).read_text()


SCALES = (0.25, 0.5, 0.75, 1.0)


def noisy_settings(g, settings, rows=64, noise=0.6, seeds=1, spread=0.0, resamples=200):
    """
    Settings whose adapters lie anywhere along one true front, gain 0.9·(1 − exp(−6·drift)), with noise of their own in gain and
    drift, by row and by seed; and the true curves.
    """

    def sums(values, column):
        return np.stack(
            [values if column == 0 else np.zeros(rows), np.ones(rows), values if column == 2 else np.zeros(rows)], 1
        )

    def text(gain, drift):
        return {"domain": sums(3 - gain, 0), "general": sums(drift, 2)}

    base = text(np.zeros(rows), np.zeros(rows))
    reference = Setting(
        "sft", "sft", "sft", {1.0: {s: text(1 + g.normal(0, 0.05, rows), np.ones(rows)) for s in range(seeds)}}
    )
    found, truth = [reference], []
    for i in range(settings):
        drift = g.uniform(0.05, 0.9)
        gain = 0.9 * (1 - np.exp(-6 * drift))
        measured = {scale: {} for scale in SCALES}
        for seed in range(seeds):
            gains = gain + g.normal(0, noise, rows) + g.normal(0, spread)
            drifts = drift * (1 + g.normal(0, noise, rows) + g.normal(0, spread))
            for x in SCALES:
                measured[x][seed] = text(gains * (2 * x - x**2), drifts * x**2)
        found.append(Setting(f"a-{i}", "a", f"a-{i}", measured))
        points = np.array([[gain * (2 * x - x**2), drift * x**2] for x in SCALES])
        truth.append(Curve(points[:, :1], points[:, 1:]))
    return Fronts(found, base, reference, resamples=resamples), truth


def on_same_rows(fronts, seeds):
    curves = [fronts.whole.curve(setting, SCALES, seeds) for setting in fronts.methods["a"].finalists]
    return float(hypervolume(follow(choose(curves), curves))[0])


def test_many_settings_do_not_make_a_front_look_better_than_the_truth():
    """Chosen and measured on the same rows, 12 settings look better than the true front of all of them."""
    g = np.random.default_rng(1)
    measured, same_rows, truths, covered = [], [], [], 0
    for _ in range(30):
        fronts, truth = noisy_settings(g, 12)
        found = fronts.figure(hypervolume, "a")
        measured.append(found["mean"])
        same_rows.append(on_same_rows(fronts, [0]))
        truths.append(float(hypervolume(follow(choose(truth), truth))[0]))
        # The interval is given the settings chosen: it is of their own truth.
        finalists = fronts.methods["a"].finalists
        chosen = [choose([half.curve(setting, SCALES, [0]) for setting in finalists]) for half in fronts.halves]
        own = np.mean([hypervolume(follow(policy, truth))[0] for policy in chosen])
        covered += found["low"] <= own <= found["high"]
    error = np.std(np.subtract(measured, truths)) / 30**0.5
    assert np.mean(measured) < np.mean(truths) + 2 * error
    assert np.mean(same_rows) > np.mean(truths) + 4 * error
    assert covered >= 21  # all about equally good, and so too narrow: see docs/comparison.md


def test_many_settings_do_not_make_gains_at_a_drift_or_drifts_at_a_gain_better_than_the_truth():
    g = np.random.default_rng(3)
    gains, drifts = [], []
    for _ in range(30):
        fronts, truth = noisy_settings(g, 12, noise=0.3)
        true = follow(choose(truth), truth)
        gains.append(fronts.figure(lambda x: gain_at(x, 0.25), "a")["mean"] - gain_at(true, 0.25)[0])
        drifts.append(fronts.drift_at(0.6, "a")["mean"] / drift_at(true, 0.6)[0])
    assert np.mean(gains) < 2 * np.std(gains) / 30**0.5
    assert np.mean(drifts) > 1 - 2 * np.std(drifts) / 30**0.5


def test_seeds_that_settings_were_chosen_on_are_not_those_they_are_measured_on():
    g = np.random.default_rng(2)
    measured, same_seeds, truths = [], [], []
    for _ in range(30):
        fronts, truth = noisy_settings(g, 10, noise=0.01, seeds=3, spread=0.2, resamples=10)
        measured.append(fronts.figure(hypervolume, "a")["mean"])
        same_seeds.append(on_same_rows(fronts, [0, 1, 2]))
        truths.append(float(hypervolume(follow(choose(truth), truth))[0]))
    error = np.std(np.subtract(measured, truths)) / 30**0.5
    assert np.mean(measured) < np.mean(truths) + 2 * error
    assert np.mean(same_seeds) > np.mean(truths) + 4 * error


def test_the_interval_of_a_hypervolume_covers():
    g = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        fronts, truth = noisy_settings(g, 1)
        found = fronts.figure(hypervolume, "a")
        hits += found["low"] <= hypervolume(follow(choose(truth), truth))[0] <= found["high"]
    assert 88 <= hits <= 100


def test_settings_with_more_seeds_make_the_front(tmp_path):
    write_measured(tmp_path, seeds=(0, 1), spread=0.02)
    for arm in ("rehearsal-1", "sft-0.5"):
        (tmp_path / arm / "seed_1" / "metrics.json").unlink()
    found = summarize_comparison(str(tmp_path))["map"]
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert (methods["rehearsal"]["settings"], methods["rehearsal"]["finalists"]) == (3, 2)
    assert (
        methods["rehearsal"]["hypervolume"]["seeds"] == [0, 1]
        and len(methods["rehearsal"]["hypervolume"]["by_seed"]) == 2
    )
    assert {way["label"] for way in methods["rehearsal"]["ways"] if way["finalist"]} == {"rehearsal-4", "rehearsal-30"}
    # The one with one seed has the larger hypervolume of its own.
    own = {way["label"]: way["hypervolume"] for way in methods["rehearsal"]["ways"]}
    assert max(own, key=own.get) == "rehearsal-1" and methods["rehearsal"]["best"] == "rehearsal-4"
    assert {point["label"] for point in methods["rehearsal"]["front"]} == {"rehearsal-4", "rehearsal-30"}
    write_report(str(tmp_path))
    assert "| rehearsal | 3; 2 in the front |" in (tmp_path / "report.md").read_text()


def test_a_gain_that_is_not_reached_has_no_drift(tmp_path):
    write_measured(tmp_path, {name: METHODS[name] for name in ("sft", "frozen")})
    write_report(str(tmp_path))
    frozen = next(
        entry for entry in read_json(tmp_path / "comparison.json")["map"]["methods"] if entry["method"] == "frozen"
    )
    assert frozen["drift_at"]["0.98"]["mean"] is None
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| frozen |"))
    assert row.endswith("| not reached |")


def test_a_gain_that_is_just_reached_has_a_drift_without_an_upper_end(tmp_path):
    methods = {"sft": METHODS["sft"], "close": {"close-1": (0.79, 0.1)}}
    write_measured(tmp_path, methods, rows=12, noise=0.9)
    write_report(str(tmp_path))
    found = {entry["method"]: entry for entry in read_json(tmp_path / "comparison.json")["map"]["methods"]}
    drift = found["close"]["drift_at"]["0.98"]
    assert 0 < drift["low"] < drift["mean"] and drift["high"] is None
    assert " to ∞ †) |" in (tmp_path / "report.md").read_text()


def test_the_reference_and_the_controls_may_be_named(tmp_path):
    write_measured(tmp_path, reference="sft-0.5", controls=["frozen", "sft"])
    found = summarize_comparison(str(tmp_path))["map"]
    assert found["reference"]["label"] == "sft-0.5" and found["controls"] == ["frozen", "sft"]
    assert {entry["method"]: list(entry["ahead"]) for entry in found["methods"]} == {
        "rehearsal": ["frozen", "sft"], "frozen": ["sft"], "sft": ["frozen"],
    }  # fmt: skip


def test_where_there_is_no_map_the_report_says_why(tmp_path):
    def absent(name, rows=40, change=None, methods=METHODS, **plan):
        write_measured(tmp_path / name, methods, rows=rows, **plan)
        if change is not None:
            path = tmp_path / name / "frozen-1" / "seed_0" / "evaluation" / "student" / "text.json"
            text = json.loads(path.read_text())
            change(text)
            path.write_text(json.dumps(text))
        write_report(str(tmp_path / name))
        found = read_json(tmp_path / name / "comparison.json")["map"]["absent"]
        assert f"Not shown: {found}." in (tmp_path / name / "report.md").read_text()
        assert "Not shown: " in (tmp_path / name / "report.html").read_text()
        assert not (tmp_path / name / "front.png").exists()
        return found

    def earlier(text):
        text["general"]["rows"] = [row[:2] for row in text["general"]["rows"]]

    assert absent("none", plain_sft=[]).startswith("no arm is plain SFT, and the plan names no `reference`")
    assert absent("few", rows=3) == "domain has fewer than 4 rows, too few to choose settings on one half of them"
    assert "kept no drift of single rows; run `trl-ema compare` again" in absent("earlier", change=earlier)
    flat = METHODS | {"sft": {"sft-1": (0.0, 0.3)}}
    assert absent("flat", methods=flat) == "sft-1, the reference, has no clear gain on one half of the rows"


def test_a_curve_of_another_adapter_is_not_taken(tmp_path):
    write_measured(tmp_path)
    path = tmp_path / "frozen-1" / "seed_0" / "evaluation" / "student" / "curve.json"
    curve = json.loads(path.read_text())
    path.write_text(json.dumps(curve | {"key": ["another", "rows"]}))
    summary = summarize_comparison(str(tmp_path))
    assert summary["missing"] == ["frozen-1, seed 0: student not measured at all other scales"]
    frozen = next(entry for entry in summary["map"]["methods"] if entry["method"] == "frozen")
    assert len(frozen["ways"][0]["points"]) == 1


def test_the_names_of_many_methods_lie_beside_their_fronts(tmp_path):
    many = {"sft": METHODS["sft"]} | {
        f"method_{i}": {f"method_{i}-1": (0.7 + i / 100, 0.1 + i / 100)} for i in range(14)
    }
    write_measured(tmp_path, many, rows=16)
    summary = summarize_comparison(str(tmp_path))
    colors = arm_colors(summary)
    assert len(set(colors.values())) == 10 and colors["sft-1"] == colors["sft-2"] in COLORS
    best = [entry["method"] for entry in summary["map"]["methods"] if not entry["is_control"]]
    assert len({colors[f"{method}-1"] for method in best[:8]}) == 8
    assert len({colors[f"{method}-1"] for method in best[8:]}) == 1
    figure = _fronts(summary, colors)
    figure.canvas.draw()
    names = [text for text in figure.axes[0].texts if text.get_text() in many]
    assert len(names) == 15
    boxes = [Text.get_window_extent(text) for text in names]  # without the line to the front
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(figure.bbox.contains(box.x1, box.y0) and figure.bbox.contains(box.x1, box.y1) for box in boxes)


def test_the_reference_is_the_least_drift_at_a_gain_that_is_not_clearly_below_the_best(tmp_path):
    methods = {"sft": {"sft-1": (0.80, 0.30), "sft-0.5": (0.74, 0.2), "sft-2": (0.801, 0.45)}}
    write_measured(tmp_path, methods)
    assert summarize_comparison(str(tmp_path))["reference"] == "sft-1"


def test_a_map_with_too_few_scales_has_no_figures_of_fronts(tmp_path):
    write_measured(tmp_path, scales=(0.25, 0.5))
    write_report(str(tmp_path))
    text = (tmp_path / "report.md").read_text()
    assert "sft: sft-1 is measured at 2 scales between 0 and 1, fewer than 3" in text  # its method, and its setting
    assert "| frozen | 1 | frozen-1 | – | – | – | – | – | – |" in text
    page = (tmp_path / "report.html").read_text()
    assert "not reached" not in page and "fronts: sft: " not in page and 'class="text">frozen-1<' in page
    # A line from the origin through one or two points would claim what nobody measured.
    summary = read_json(tmp_path / "comparison.json")
    ax = _fronts(summary, arm_colors(summary)).axes[0]
    assert {line.get_linestyle() for line in ax.lines} == {"None"} and not ax.texts
    assert {text.get_text() for text in ax.get_legend().get_texts()} == {*METHODS}
    points = {line.get_label(): len(line.get_xdata()) for line in ax.lines}
    assert points["frozen"] == 3 and points["rehearsal"] == 9


def test_no_controls_are_none_and_finalists_without_a_common_seed_are_a_map(tmp_path):
    write_measured(tmp_path, seeds=(0, 1), controls=[])
    for arm, seed in (("rehearsal-1", 1), ("rehearsal-4", 0), ("rehearsal-30", 0)):
        (tmp_path / arm / f"seed_{seed}" / "metrics.json").unlink()
    write_report(str(tmp_path))
    found = read_json(tmp_path / "comparison.json")["map"]
    methods = {entry["method"]: entry for entry in found["methods"]}
    assert found["controls"] == [] and all(entry["ahead"] == {} for entry in found["methods"])
    assert methods["rehearsal"]["seeds"] == [1] and methods["rehearsal"]["finalists"] == 2
    text = (tmp_path / "report.md").read_text()
    assert "11 of 14 (arms × seeds) are measured whole: [what is missing](#missing)." in text
    assert "- rehearsal, 3 parts:\n  - rehearsal-4, seed 0: not trained" in text


def test_arms_whose_tasks_were_not_run_are_on_the_map(tmp_path):
    write_measured(tmp_path)
    path = tmp_path / "plan.json"
    plan = json.loads(path.read_text())
    plan["evaluation"]["retention_tasks"] = {"hellaswag": None}
    path.write_text(json.dumps(plan))
    rows = [{"task": "hellaswag", "doc_id": i, "doc_hash": "h", "prompt_hash": "p", "score": i % 2} for i in range(6)]
    for folder in (tmp_path / "base", tmp_path / "rehearsal-4" / "seed_0" / "evaluation" / "student"):
        (folder / "hellaswag.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        task = {"metric": "acc", "score": 0.5, "chance": 0.25, "n": 6, "subtasks": {}, "settings": {}}
        (folder / "hellaswag.json").write_text(json.dumps(task))
    summary = summarize_comparison(str(tmp_path))
    assert [point["label"] for point in summary["points"]] == ["rehearsal-4"]
    assert summary["points"][0]["gain_kept"] is not None and summary["points"][0]["forgetting_avoided"] is None
    assert {entry["method"]: entry["settings"] for entry in summary["map"]["methods"]} == {
        "rehearsal": 3, "frozen": 1, "sft": 3,
    }  # fmt: skip
    assert len(summary["missing"]) == 6


def test_an_arm_that_interpolates_is_one_curve_at_its_scales(tmp_path):
    write_measured(tmp_path)
    path = tmp_path / "plan.json"
    plan = json.loads(path.read_text())
    plan["arms"]["scaled"] = {"interpolate": "sft-1", "scales": [0.25, 0.5, 0.75]}
    path.write_text(json.dumps(plan))
    student = tmp_path / "sft-1" / "seed_0" / "evaluation" / "student"
    for scale, text in read_json(student / "curve.json")["scales"].items():
        folder = tmp_path / "scaled" / "seed_0" / "evaluation" / f"scale_{scale}"
        folder.mkdir(parents=True)
        (folder / "text.json").write_text(json.dumps({"key": [f"scaled {scale}", "rows"]} | text))
    methods = {entry["method"]: entry for entry in summarize_comparison(str(tmp_path))["map"]["methods"]}
    (way,) = methods["scaled"]["ways"]
    own = next(way for way in methods["sft"]["ways"] if way["label"] == "sft-1")
    assert way["label"] == "scaled" and way["points"] == [point for point in own["points"] if point["scale"] < 1]


def test_plans_of_maps_are_checked_before_any_work(tmp_path, caplog):
    plan = json.loads(json.dumps(PLAN))
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan))
    load_comparison(str(path))
    assert "measured at 2 scales between 0 and 1: the map will show the settings" in caplog.text
    plan["evaluation"]["domain_samples"] = 3
    path.write_text(yaml.safe_dump(plan))
    with pytest.raises(ValueError, match="`domain_samples` under `evaluation` .* is 3; a map .* needs at least 4"):
        load_comparison(str(path))
