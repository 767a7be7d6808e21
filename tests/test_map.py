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
from test_comparison import check_tags

from trl_ema.cli import compare
from trl_ema.comparison.figures import summarize_comparison
from trl_ema.comparison.fronts import Fronts, Place
from trl_ema.comparison.pictures import COLORS, _fronts, arm_colors
from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.report import write_report
from trl_ema.comparison.run import run_comparison
from trl_ema.comparison.statistics import hypervolume
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


def test_runs_that_were_trained_elsewhere_are_measured_and_nothing_is_trained(runs, monkeypatch):
    monkeypatch.setattr("trl_ema.comparison.run._train", lambda *args, **kwargs: pytest.fail("trained"))
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
    monkeypatch.setattr("trl_ema.comparison.run._train", lambda *args, **kwargs: pytest.fail("trained"))
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
    return (
        mean(base, "domain", 0) - mean(text, "domain", 0),
        (mean(text, "general", 2) + mean(text, "other", 2)) / 2,
    )


def test_fronts_are_chosen_on_one_half_of_the_rows_and_measured_on_the_other(tmp_path):
    write_measured(tmp_path, noise=0.6)
    found = summarize_comparison(str(tmp_path))["map"]
    assert found["reference"]["label"] == "sft-1"
    areas = []
    for half in (0, 1):
        places = [(arm, scale) for arm in METHODS["rehearsal"] for scale in (0.25, 0.5, 0.75, 1)]
        other = [share_of(tmp_path, *place, 1 - half) for place in places]
        chosen = [
            place
            for place, (gain, drift) in zip(places, other, strict=True)
            if not any(g >= gain and d <= drift and (g, d) != (gain, drift) for g, d in other)
        ]
        assert 2 < len(chosen) < len(places)
        gain, drift = share_of(tmp_path, "sft-1", 1, half)
        gains, drifts = zip(*(share_of(tmp_path, *place, half) for place in chosen), strict=True)
        areas.append(hypervolume(np.array(gains) / gain, np.array(drifts) / drift))
    methods = {entry["method"]: entry for entry in found["methods"]}
    area = methods["rehearsal"]["hypervolume"]
    assert area["mean"] == pytest.approx(np.mean(areas)) and area["low"] < area["mean"] < area["high"]
    ahead = methods["rehearsal"]["ahead"]["sft"]
    assert ahead["mean"] == pytest.approx(area["mean"] - methods["sft"]["hypervolume"]["mean"])
    # Paired: both fronts are measured on the same rows.
    assert ahead["high"] - ahead["low"] < 0.8 * (area["high"] - area["low"]) and ahead["low"] > 0
    assert methods["sft"]["is_control"] and not methods["rehearsal"]["is_control"]
    assert next(iter(methods)) == "rehearsal" and methods["sft"]["ahead"] == {}


def places_of_noise(g, settings, rows=40, gain=0.5, drift=0.3):
    """Settings that are all alike, but for the noise of each."""

    def sums(values):
        return np.stack([values, np.ones(rows), np.zeros(rows)], axis=1)

    def text(gain, drift):
        drifted = sums(np.zeros(rows))
        drifted[:, 2] = drift
        return {"domain": sums(3 - gain), "general": drifted}

    base = text(np.zeros(rows), 0.0)
    reference = Place("sft", "student", "sft", "sft", 1.0, {0: text(np.full(rows, 1.0) + g.normal(0, 0.1, rows), 1.0)})
    noisy = [
        Place(f"a-{i}", "student", "a", f"a-{i}", 1.0, {0: text(gain + g.normal(0, 1.0, rows), drift)})
        for i in range(settings)
    ]
    return Fronts([reference, *noisy], base, reference, resamples=300)


def test_many_settings_do_not_make_a_front_look_better():
    """Chosen and measured on the same rows, the best of 30 that are all alike would look better by two standard errors."""
    g = np.random.default_rng(1)
    found = [places_of_noise(g, 30) for _ in range(60)]
    areas = [fronts.figure(hypervolume, "a")["mean"] for fronts in found]
    truth = 0.5 * 0.7
    assert np.mean(areas) == pytest.approx(truth, abs=4 * np.std(areas) / 60**0.5)
    same_rows = []
    for fronts in found:
        shares = [fronts.whole.means(place, [0]) for place in fronts.methods["a"].front(fronts.whole, [0])]
        gain, drift = fronts.whole.means(fronts.reference, [0])
        same_rows.append(hypervolume([g / gain for g, _ in shares], [d / drift for _, d in shares]))
    assert np.mean(same_rows) > truth + 0.1


def test_the_interval_of_a_hypervolume_covers():
    g = np.random.default_rng(2)
    hits = 0
    for _ in range(100):
        found = places_of_noise(g, 1, rows=64, gain=1.0).figure(hypervolume, "a")
        hits += found["low"] <= 0.7 <= found["high"]
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
    assert not [point for point in methods["rehearsal"]["front"] if point["label"].startswith("rehearsal-1 ")]
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
    write_measured(tmp_path, many, rows=16, scales=(0.5,))
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
