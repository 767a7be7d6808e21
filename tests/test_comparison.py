"""From a YAML file to the report: real trainings and real lm-eval questions on a tiny model."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from trl_ema.comparison import Comparison, load_comparison, run_comparison
from trl_ema.report import summarize_comparison, write_report


PLAN = {
    "training": dict(
        use_cpu=True, bf16=False, max_steps=4, learning_rate=2e-2, per_device_train_batch_size=4, max_length=48,
        logging_steps=1, save_steps=2, eval_fraction=0.2, drift_steps=2, dtype="float32", report_to="none",
        gradient_checkpointing=False, model_name_or_path="model", dataset_name="data.jsonl", load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
    ),
    "arms": {
        "sft": {"teacher": "none"},
        "ema": {"teacher": "ema"},
        "sft_low_lr": {"teacher": "none", "learning_rate_scale": 0.1},
        "sft_interpolated": {"interpolate": "sft", "scales": [0.5]},
    },
    "seeds": [0, 1],
    "evaluation": {
        "retention_tasks": {"arc_easy": {"sample": 8}, "mmlu_medical": {"limit": 1}},
        "domain_samples": 6,
        "generation_tokens": 4,
    },
}  # fmt: skip


def write_plan(folder, **changes):
    plan = json.loads(json.dumps(PLAN))
    for name in ("model_name_or_path", "dataset_name"):
        plan["training"][name] = str(folder / plan["training"][name])
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump(plan | changes, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def comparison(tiny_folder, tmp_path_factory):
    """The folder of a comparison that was run to its end."""
    folder = tmp_path_factory.mktemp("comparison")
    plan = load_comparison(write_plan(tiny_folder), str(folder / "out"))
    run_comparison(plan)
    write_report(plan.output_dir)
    return plan


def test_every_arm_is_trained_evaluated_and_reported(comparison: Comparison):
    summary = json.loads(Path(comparison.output_dir, "comparison.json").read_text())
    assert not summary["missing"]
    labels = [point["label"] for point in summary["points"]]
    assert labels == ["sft", "ema", "ema, teacher", "sft_low_lr", "sft_interpolated, × 0.5"]
    for point in summary["points"]:
        assert point["seeds"] == [0, 1]
        assert point["tasks"].keys() == {"arc_easy", "mmlu_medical"}
        assert point["tasks"]["mmlu_medical"]["subtasks"].keys() == set(
            summary["base"]["tasks"]["mmlu_medical"]["subtasks"]
        )
        assert point["generation"].keys() >= {"bleu", "chrf", "rougeL", "meteor", "semantic", "empty"}
        assert point["drift"]["domain"]["kl_base_model"]["mean"] > 0
    gains = {point["label"]: point["domain_gain"]["mean"] for point in summary["points"]}
    assert gains["sft"] > gains["sft_low_lr"] > 0
    sft = summary["points"][0]
    assert (sft["gain_kept"] == 1.0 and sft["forgetting_avoided"] in (0.0, None)) or sft["forgetting"]["mean"] <= 0
    assert summary["curves"].keys() >= {"ce_loss", "kl_loss", "teacher_distance", "drift_domain"}
    assert summary["base"]["tasks"]["arc_easy"]["n"] == 8 and summary["base"]["tasks"]["mmlu_medical"]["n"] == 6


def test_runs_differ_by_seed_and_share_the_held_out_rows(comparison: Comparison):
    losses, prompts = set(), set()
    for seed in (0, 1):
        folder = Path(comparison.folder("sft", seed), "evaluation", "student")
        losses.add(json.loads((folder / "text.json").read_text())["domain"]["loss"])
        prompts.add(
            tuple(json.loads(line)["prompt"] for line in (folder / "generations.jsonl").read_text().splitlines())
        )
    assert len(losses) == 2 and len(prompts) == 1


def test_what_is_done_is_not_done_again(comparison: Comparison, monkeypatch):
    def no_training(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(subprocess, "run", no_training)
    monkeypatch.setattr("trl_ema.evaluation.runner._run", no_training)
    files = sorted(Path(comparison.output_dir).rglob("evaluation/*/*.json"))
    before = [path.stat().st_mtime_ns for path in files]
    monkeypatch.setattr("trl_ema.comparison.provenance", dict)
    plan = Path(comparison.output_dir, "plan.json").read_text()
    run_comparison(comparison)
    Path(comparison.output_dir, "plan.json").write_text(plan)
    assert [path.stat().st_mtime_ns for path in files] == before


def test_a_finished_run_is_not_taken_for_one_with_other_options(comparison: Comparison, tiny_folder):
    arms = PLAN["arms"] | {"ema": {"teacher": "ema", "kl_weight": 3.0}}
    other = load_comparison(write_plan(tiny_folder, arms=arms), comparison.output_dir)
    with pytest.raises(ValueError, match=r"finished run with other options \(kl_weight: None then, 3.0 now\)"):
        run_comparison(other)


def test_the_page_stands_alone_and_its_pictures_show_something(comparison: Comparison):
    page = Path(comparison.output_dir, "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", page)
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 4
    for picture in pictures:
        assert len(re.findall(r"<path|<use", picture)) > 20 and "currentColor" in picture
    check_tags(page)
    for label in ("ema, teacher", "sft_interpolated, × 0.5", "arc_easy", "mmlu_medical", "Provenance"):
        assert label in page
    from PIL import Image

    for name in ("tradeoff", "tasks", "subjects", "curves"):
        image = Image.open(Path(comparison.output_dir, f"{name}.png")).convert("L")
        assert len(set(image.getdata())) > 20
    text = Path(comparison.output_dir, "report.md").read_text()
    assert "| ema, teacher" in text and "![Domain gain against forgetting](tradeoff.png)" in text


def check_tags(page):
    """Every element that is opened is closed, in order."""
    from html.parser import HTMLParser

    class Checker(HTMLParser):
        void = {"meta", "link", "br", "img", "input", "hr"}
        open_tags: list[str] = []

        def handle_starttag(self, tag, attrs):
            if tag not in self.void:
                self.open_tags.append(tag)

        def handle_endtag(self, tag):
            assert self.open_tags.pop() == tag

    checker = Checker()
    checker.feed(page)
    assert not checker.open_tags


def test_a_report_names_the_parts_that_are_missing(comparison: Comparison, tmp_path, caplog):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    (folder / "ema" / "seed_1" / "metrics.json").unlink()
    shutil.rmtree(folder / "ema" / "seed_1" / "evaluation")
    shutil.rmtree(folder / "sft_interpolated" / "seed_0")
    write_report(str(folder))
    missing = json.loads((folder / "comparison.json").read_text())["missing"]
    assert [part.split(" (")[0] for part in missing] == [
        "ema, seed 1: not trained",
        "sft_interpolated, seed 0: scale_0.5 not evaluated",
    ]
    assert "Missing: ema, seed 1: not trained" in caplog.text
    assert "ema, seed 1: not trained" in (folder / "report.html").read_text()


def test_a_report_needs_a_comparison_and_its_base(comparison: Comparison, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no comparison: .*plan.json is missing"):
        write_report(str(tmp_path))
    shutil.copy(Path(comparison.output_dir, "plan.json"), tmp_path)
    with pytest.raises(FileNotFoundError, match="The base model of .* is not evaluated"):
        write_report(str(tmp_path))


def test_answers_to_other_questions_are_refused(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    path = folder / "sft" / "seed_0" / "evaluation" / "student" / "arc_easy.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(ValueError, match=r"answers to different questions \(8 and 7, 7 in common"):
        summarize_comparison(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arm": {}}, r"unknown keys \['arm'\]"),
        ({"arms": {}}, "has no arms"),
        ({"arms": {"base": {}}}, "An arm is named 'base'"),
        ({"arms": {"x": {"interpolate": "sft", "scales": [0.5]}}}, "interpolates 'sft', which is no trained arm"),
        ({"arms": {"x": {"scales": [0.5]}}}, "needs `interpolate` and `scales` together"),
        (
            {"arms": {"x": {"interpolate": "y", "scales": [1], "seed": 1}}},
            r"trains nothing, but has options \['seed'\]",
        ),
        ({"training": {}, "arms": {"x": {"learning_rate_scale": 2}}}, "give the common one under `training`"),
        ({"evaluation": {"task": {}}}, r"Unknown evaluation options \['task'\]"),
        ({"evaluation": {"retention_tasks": {"a": {"limit": 1, "sample": 1}}}}, "both choose the questions"),
        ({"evaluation": {"retention_tasks": {"a": {"metric": "f1"}}}}, "`metric` must be one of .*, got 'f1'"),
        ({"evaluation": {"retention_tasks": {"a": {"limit": 0}}}}, "`limit` must be at least 1, got 0"),
        ({"evaluation": {"retention_tasks": {"a": {}}, "domain_tasks": {"a": {}}}}, r"\['a'\] are both retention"),
    ],
)
def test_a_plan_with_a_mistake_is_refused(tiny_folder, tmp_path, changes, message):
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_comparison(write_plan(tmp_path, **changes))


def test_unknown_options_and_tasks_are_refused_before_training(tiny_folder, tmp_path):
    plan = load_comparison(write_plan(tiny_folder, arms={"x": {"kl_wait": 1}}), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="kl_wait"):
        run_comparison(plan)
    plan = load_comparison(
        write_plan(tiny_folder, evaluation={"retention_tasks": {"helaswag": {}}}), str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match=r"no task 'helaswag'. Near matches: hellaswag"):
        run_comparison(plan)


def test_unknown_arms_and_seeds_are_refused(comparison: Comparison):
    with pytest.raises(ValueError, match=r"no arms \['emma'\]; expected some of \['sft', 'ema'"):
        run_comparison(comparison, arms=["emma"])
    with pytest.raises(ValueError, match=r"no seeds \[7\]"):
        run_comparison(comparison, seeds=[7])
