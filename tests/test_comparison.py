"""From a YAML file to the report: real trainings and real lm-eval questions on a tiny model."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import yaml
from conftest import CHAT_TEMPLATE, lora, qwen2_tokenizer, rows
from peft import PeftConfig, get_peft_model
from test_tasks import write_tasks
from transformers import AutoTokenizer

from trl_ema import MeanTeacherConfig
from trl_ema.adapters.names import TEACHER_NAME
from trl_ema.cli import train
from trl_ema.comparison import rows as comparison_rows
from trl_ema.comparison import run as running
from trl_ema.comparison.figures import CURVES, summarize_comparison
from trl_ema.comparison.pictures import CAPTIONS, COLORS, _curve_grid, _drift, _subject_bars, _task_bars, _tradeoff
from trl_ema.comparison.plan import DEFAULT_CONFIG, Comparison, kept_comparison, load_comparison
from trl_ema.comparison.report import _in_short, write_report
from trl_ema.comparison.rows import RunData
from trl_ema.comparison.run import _Evaluator, _understood, run_comparison
from trl_ema.evaluation.models import is_adapter, load_base
from trl_ema.evaluation.settings import TaskSettings
from trl_ema.evaluation.tasks import asked_as_chats, check_tasks, is_offline, mmlu_subjects, task_manager
from trl_ema.inputs import load_held_out, load_parts, load_tokenizer
from trl_ema.script import parse


pytestmark = pytest.mark.usefixtures("lm_evals_files_read_once")


SUBSPACES = Path(__file__).parent.parent / "recipes" / "subspaces.py"
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
def comparison(tiny_folder, in_this_process, tmp_path_factory):
    """The folder of a comparison that was run to its end."""
    folder = tmp_path_factory.mktemp("comparison")
    plan = load_comparison(write_plan(tiny_folder), str(folder / "out"))
    with in_this_process():
        run_comparison(plan, seeds=[0])
    run_comparison(plan, jobs=2)
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
    for share, own, whole in (("gain_kept", "domain_gain", 1.0), ("forgetting_avoided", "forgetting", 0.0)):
        shown = (sft[own]["low"] or 0) > max(0, sft[own]["mean"] / 4)
        assert (sft[share] is not None) == shown
        if shown:  # of itself
            assert (sft[share]["mean"], sft[share]["low"], sft[share]["high"]) == (whole, None, None)
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


def test_trainings_at_once_say_what_they_say_in_their_folders(comparison: Comparison):
    for arm in comparison.trained():
        first, second = (Path(comparison.folder(arm.name, seed), "train.log") for seed in (0, 1))
        assert "Saved the student to" in second.read_text() and not first.exists()


def test_what_is_done_is_not_done_again(comparison: Comparison, monkeypatch):
    def no_training(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(subprocess, "run", no_training)
    monkeypatch.setattr("trl_ema.evaluation.runner._run", no_training)
    files = sorted(Path(comparison.output_dir).rglob("evaluation/*/*.json"))
    before = [path.stat().st_mtime_ns for path in files]
    plan = Path(comparison.output_dir, "plan.json").read_text()
    run_comparison(comparison)
    assert Path(comparison.output_dir, "plan.json").read_text() == plan
    assert [path.stat().st_mtime_ns for path in files] == before


@pytest.mark.parametrize("state", ["finished", "begun"])
def test_a_run_is_not_taken_for_one_with_other_options(comparison: Comparison, tiny_folder, tmp_path, state):
    folder = tmp_path / "moved"  # which is no other option
    shutil.copytree(comparison.output_dir, folder)
    if state == "begun":
        (folder / "ema" / "seed_1" / "metrics.json").unlink()
        shutil.rmtree(folder / "ema" / "seed_1" / "checkpoint-4")
        shutil.rmtree(folder / "ema" / "seed_0")
    arms = PLAN["arms"] | {"ema": {"teacher": "ema", "kl_weight": 3.0}}
    other = load_comparison(write_plan(tiny_folder, arms=arms), str(folder))
    configs = {path: path.read_text() for path in folder.rglob("config.yaml")}
    with pytest.raises(ValueError, match=rf"{state} run with other options \(kl_weight: None then, 3.0 now\)"):
        run_comparison(other)
    assert {path: path.read_text() for path in folder.rglob("config.yaml")} == configs


def test_a_moved_comparison_goes_on(comparison: Comparison, tiny_folder, tmp_path, monkeypatch):
    def no_training(*args, **kwargs):
        raise AssertionError("trained again")

    shutil.copytree(comparison.output_dir, tmp_path / "moved")
    monkeypatch.setattr(subprocess, "run", no_training)
    run_comparison(load_comparison(write_plan(tiny_folder), str(tmp_path / "moved")))


def test_a_run_kept_without_its_weights_counts_and_is_not_measured_further(
    comparison: Comparison, tiny_folder, tmp_path
):
    folder = tmp_path / "kept"
    shutil.copytree(comparison.output_dir, folder)
    for path in (folder / "sft").rglob("adapter_*"):
        path.unlink()
    kept = load_comparison(write_plan(tiny_folder), str(folder))
    run_comparison(kept, arms=["sft"], seeds=[0])
    assert not summarize_comparison(str(folder))["missing"]
    shutil.rmtree(folder / "sft_interpolated" / "seed_1" / "evaluation")
    with pytest.raises(
        ValueError, match=r"is to be measured, but the run in .*sft/seed_1 was kept without its weights"
    ):
        run_comparison(kept)


def test_every_figure_of_the_summary_is_the_one_by_hand(comparison: Comparison):
    """Means of the answers in the files, with nothing of the package's own but its reader."""
    root = Path(comparison.output_dir)

    def scores(folder, task):
        return [json.loads(line)["score"] for line in (root / folder / f"{task}.jsonl").read_text().splitlines()]

    def loss(folder):
        rows = json.loads((root / folder / "text.json").read_text())["domain"]["rows"]
        return sum(row[0] for row in rows) / sum(row[1] for row in rows)

    def mean(values):
        values = list(values)
        return sum(values) / len(values)

    summary = json.loads((root / "comparison.json").read_text())
    points = {point["label"]: point for point in summary["points"]}
    folders = {"sft": "sft/seed_{}/evaluation/student", "ema, teacher": "ema/seed_{}/evaluation/teacher"}
    gain, drop = {}, {}
    for label, folder in folders.items():
        gain[label] = loss("base") - mean(loss(folder.format(seed)) for seed in (0, 1))
        assert points[label]["domain_gain"]["mean"] == pytest.approx(gain[label])
        by_seed = [
            mean(
                mean(scores("base", task)) - mean(scores(folder.format(seed), task)) for task in points[label]["tasks"]
            )
            for seed in (0, 1)
        ]
        drop[label] = mean(by_seed)
        assert points[label]["forgetting"]["mean"] == pytest.approx(drop[label])
        assert points[label]["forgetting"]["by_seed"] == pytest.approx(by_seed)
        assert points[label]["forgetting"]["low"] <= drop[label] <= points[label]["forgetting"]["high"]
    teacher = points["ema, teacher"]
    if teacher["gain_kept"] or points["sft"]["domain_gain"]["low"] > gain["sft"] / 4 > 0:
        assert teacher["gain_kept"]["mean"] == pytest.approx(gain["ema, teacher"] / gain["sft"])
    if teacher["forgetting_avoided"]:
        assert teacher["forgetting_avoided"]["mean"] == pytest.approx(1 - drop["ema, teacher"] / drop["sft"])
    against = {(pair["label"], pair["control"]): pair for pair in summary["against"]}
    controls = {"sft", "sft_low_lr", "sft_interpolated, × 0.5"}
    assert against.keys() == {(label, control) for label in ("ema", "ema, teacher") for control in controls}
    pair = against["ema, teacher", "sft"]
    assert pair["domain_gain"]["mean"] == pytest.approx(gain["ema, teacher"] - gain["sft"])
    assert pair["forgetting"]["mean"] == pytest.approx(drop["ema, teacher"] - drop["sft"])
    assert summary["reference"] == "sft"


def test_a_report_is_the_same_from_its_figures_alone_which_hold_no_text(comparison: Comparison, tmp_path):
    folder = Path(comparison.output_dir)
    shutil.copy(folder / "comparison.json", tmp_path)
    write_report(str(tmp_path))
    names = {path.name for path in tmp_path.iterdir()}
    # Without a map: six rows are too few for one.
    pictures = {f"{name}.png" for name in CAPTIONS if name not in ("front", "stages")}
    assert names == {"comparison.json", "report.md", "report.html", *pictures}
    assert all((tmp_path / name).read_bytes() == (folder / name).read_bytes() for name in names)
    generations = [json.loads(line) for line in (folder / "base" / "generations.jsonl").read_text().splitlines()]
    samples = (folder / "samples.html").read_text()
    check_tags(samples)
    assert generations[0]["prompt"] in samples
    for text in [row[key] for row in generations for key in ("prompt", "reference")]:
        assert not [name for name in names if text.encode() in (tmp_path / name).read_bytes()]


def test_figures_alone_are_not_read_where_the_evaluations_lie(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    figures = json.loads((folder / "comparison.json").read_text())
    (folder / "comparison.json").write_text(json.dumps(figures | {"missing": ["of an earlier report"]}))
    write_report(str(folder))
    assert json.loads((folder / "comparison.json").read_text()) == figures


def test_one_common_seed_has_no_interval_over_seeds(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    shutil.rmtree(folder / "ema" / "seed_1")
    write_report(str(folder))
    summary = json.loads((folder / "comparison.json").read_text())
    drift = {point["label"]: point["drift"]["general"]["kl_base_model"] for point in summary["points"]}
    assert drift["ema"]["mean"] > 0 and drift["ema"]["low"] is None and drift["ema"]["high"] is None
    assert drift["sft"]["low"] < drift["sft"]["mean"] < drift["sft"]["high"]
    pair = next(pair for pair in summary["against"] if (pair["label"], pair["control"]) == ("ema", "sft"))
    assert pair["seeds"] == [0] and pair["drift_general"]["low"] is None
    assert pair["domain_gain"]["low"] < pair["domain_gain"]["high"]  # over the rows, and marked
    for report in ("report.md", "report.html"):
        text = (folder / report).read_text()
        assert not re.search(r"\(([+-]?[\d.]+) to \1\)|\bnan\b", text)
        assert f"{pair['domain_gain']['high']:+.3f} †" in text
    row = re.search(r"^\| ema \| sft \| 1 \|.*", (folder / "report.md").read_text(), re.MULTILINE)[0]
    assert row.endswith(f" {pair['drift_general']['mean']:+.3f} |")


def test_only_plain_sft_is_a_control(tiny_folder, tmp_path):
    options = [
        {"teacher": "none"}, {"teacher": "none", "learning_rate": 1e-3}, {"teacher": "none", "weight_decay": 0.1},
        {"teacher": "none", "neftune_noise_alpha": 5.0}, {"teacher": "none", "loss_type": "dft"},
        {"teacher": "none", "label_smoothing_factor": 0.1}, {"teacher": "frozen"}, {"kl_weight": 0.0}, {},
    ]  # fmt: skip
    settings = dict(output_dir=str(tmp_path), bf16=False)
    assert [MeanTeacherConfig(**settings, **one).is_plain_sft for one in options] == [True, True] + [False] * 7


def test_a_regularized_arm_without_a_teacher_is_no_control(comparison: Comparison, tmp_path):
    """As after a run in which `sft` had a weight decay."""
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["plain_sft"] == ["sft", "sft_low_lr"]

    def summary(**changes):
        (folder / "plan.json").write_text(json.dumps(plan | changes))
        found = summarize_comparison(str(folder))
        return found["reference"], {point["label"] for point in found["points"] if point["is_control"]}

    assert summary() == ("sft", {"sft", "sft_interpolated, × 0.5", "sft_low_lr"})
    assert summary(plain_sft=["sft_low_lr"]) == ("sft_low_lr", {"sft_low_lr"})
    assert summary(plain_sft=[]) == (None, set())
    assert summary(plain_sft=[], reference="ema") == ("ema", {"ema", "ema, teacher"})
    (folder / "plan.json").write_text(json.dumps(plan | {"plain_sft": []}))
    write_report(str(folder))
    assert "no arm is plain SFT (no teacher, no other regularizer)" in (folder / "report.md").read_text()
    del plan["plain_sft"]
    with pytest.raises(ValueError, match=r"does not say which arms are plain SFT .*Run `trl-ema compare` once more"):
        summary()


def test_a_teacher_is_a_result_where_the_plan_says_that_it_is_an_average(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    plan = json.loads((folder / "plan.json").read_text())
    assert plan["averaged"] == ["ema"]
    assert TEACHER_NAME == "teacher" and is_adapter(str(folder / "ema" / "seed_0" / TEACHER_NAME))

    def labels(plan):
        (folder / "plan.json").write_text(json.dumps(plan))
        return [point["label"] for point in summarize_comparison(str(folder))["points"]]

    everything = labels(plan)
    assert labels(plan | {"averaged": []}) == [label for label in everything if label != "ema, teacher"]
    del plan["averaged"]
    with pytest.raises(
        ValueError, match=r"does not say which arms have a teacher that is an average \(`averaged`\).*once more"
    ):
        labels(plan)


def test_arms_are_told_by_what_their_options_were_understood_as(tiny_folder, tmp_path):
    arms = {
        "default": {},
        "frozen": {"teacher": "frozen"},
        "decayed": {"teacher": "none", "optim_args": "weight_decay=0.1"},
    }
    arms |= {"sft": {"teacher": "none", "kl_weight": 1.0}}
    plan = load_comparison(write_plan(tiny_folder, arms=arms), str(tmp_path))
    assert plan.plain_sft is None and plan.averaged is None
    training = {"output_dir": str(tmp_path), "bf16": False}
    configs = {arm.name: MeanTeacherConfig(**training | arm.options) for arm in plan.trained()}
    plan = _understood(plan, [{(arm, 0): (None, config, None) for arm, config in configs.items()}])
    assert (plan.plain_sft, plan.averaged) == (("sft",), ("default",))
    roles = {name: list(plan.evaluations(arm, 0)) for name, arm in plan.arms.items()}
    assert roles == {
        "default": ["student", "teacher"],
        "frozen": ["student"],
        "decayed": ["student"],
        "sft": ["student"],
    }


@pytest.mark.parametrize("kept", [False, True], ids=["evaluations", "figures"])
def test_a_report_is_written_without_the_libraries_that_train(comparison: Comparison, tmp_path, kept):
    """Neither from a whole folder nor from the figures that are kept in the repository."""
    folder = tmp_path / "copy"
    if kept:
        folder.mkdir()
        shutil.copy(Path(__file__).parents[1] / "recipes/results/smollm2_medical/comparison.json", folder)
    else:
        shutil.copytree(comparison.output_dir, folder)
        (folder / "report.html").unlink()
    code = "import sys; from trl_ema.cli import main; main(); print(*sys.modules)"
    command = [sys.executable, "-c", code, "report", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert (folder / "report.html").is_file() and {"trl_ema", "matplotlib", "jinja2"} <= loaded
    heavy = {"torch", "transformers", "trl", "peft", "bitsandbytes", "accelerate", "datasets", "deepspeed", "lm_eval"}
    assert not heavy & loaded


def test_shares_are_shown_only_of_what_plain_sft_clearly_gained_or_lost(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    for path in folder.glob("sft/seed_*/evaluation/student/*.jsonl"):
        if path.name != "generations.jsonl":  # sft answers as the base does
            shutil.copy(folder / "base" / path.name, path)
    write_report(str(folder))
    summary = json.loads((folder / "comparison.json").read_text())
    assert {point["forgetting_avoided"] for point in summary["points"]} == {None}
    text = (folder / "report.md").read_text()
    assert "| not shown |" in text and "a share of what sft did not clearly gain or lose" in text


def test_a_base_that_answers_everything_is_not_taken_for_one_that_guesses(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    for path in [folder / "base" / "arc_easy.jsonl"]:
        answers = [json.loads(line) | {"score": 1.0} for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    base = summarize_comparison(str(folder))["base"]
    assert "arc_easy" not in base["retention_leaves_out"]
    assert math.isnan(base["tasks"]["arc_easy"]["low"])  # no resample differs


def test_long_curves_are_thinned(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    path = folder / "ema" / "seed_0" / "metrics.json"
    metrics = json.loads(path.read_text())
    path.write_text(json.dumps(metrics | {"log": [{"step": step, "ce_loss": 1.0} for step in range(5, 2005)]}))
    steps = [step for step, _ in summarize_comparison(str(folder))["curves"]["ce_loss"]["ema"]]
    assert len(steps) == 200 and steps[-1] == 2004 and steps == sorted(set(steps))


def test_the_page_stands_alone_and_its_pictures_show_the_figures(comparison: Comparison):
    page = Path(comparison.output_dir, "report.html").read_text()
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)|url\((?!#)|@import""", page)
    names = ("tradeoff", "drift", "tasks", "curves", "subjects")
    pictures = dict(zip(names, re.findall(r"<svg.*?</svg>", page, re.DOTALL), strict=True))
    assert all(f'role="img" aria-label="{CAPTIONS[name]}"' in page.replace("&#39;", "'") for name in names)
    assert all("currentColor" in picture for picture in pictures.values())
    ids = re.findall(r'\bid="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"url\(#([^)]*)\)", page)) | set(re.findall(r'href="#([^"]*)"', page))
    assert used <= set(ids)
    check_tags(page)
    for label in (
        "ema, teacher",
        "sft_interpolated, × 0.5",
        "arc_easy",
        "mmlu_medical",
        "Provenance",
        "McNemar",
        "chance",
    ):
        assert label in page
    # A drawn datum is a path in its arm's colour: a bar or a marker for each point, a line for each arm's curve.
    arms = [("sft", 1), ("ema", 2), ("sft_low_lr", 1), ("sft_interpolated", 1)]
    for (_, uses), color in zip(arms, COLORS, strict=False):
        assert pictures["tasks"].count(f"fill: {color}") >= 2 * uses
        assert pictures["tradeoff"].count(color) >= uses and pictures["drift"].count(color) >= uses
    assert all(pictures["curves"].count(f"stroke: {color}") >= 2 for color in COLORS[:3])
    text = Path(comparison.output_dir, "report.md").read_text()
    assert "| ema, teacher" in text and all(f"![{CAPTIONS[name]}]({name}.png)" in text for name in names)
    assert "- commit: " in text and "learning_rate_scale: 0.1" in text
    json.loads(Path(comparison.output_dir, "comparison.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize("name", ["tradeoff", "drift", "tasks", "subjects", "curves"])
def test_no_label_of_a_large_comparison_lies_on_another(comparison: Comparison, name):
    summary = large(json.loads(Path(comparison.output_dir, "comparison.json").read_text()))
    colors = {arm: COLORS[i] for i, arm in enumerate(summary["plan"]["arms"])}
    draw = {
        "tradeoff": _tradeoff, "drift": _drift, "tasks": _task_bars, "subjects": _subject_bars, "curves": _curve_grid,
    }  # fmt: skip
    figure = draw[name](summary, colors)
    figure.canvas.draw()
    titles = [ax.title for ax in figure.axes if ax.get_visible() and ax.title.get_text()]
    titles += [text for legend in figure.legends for text in legend.get_texts()]
    titles += [label for ax in figure.axes for label in (ax.xaxis.label, ax.yaxis.label) if label.get_text()]
    assert titles
    boxes = [title.get_window_extent() for title in titles]
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    for box in boxes:
        assert figure.bbox.contains(box.x0, box.y0) and figure.bbox.contains(box.x1, box.y1)


def large(summary):
    """The arms and tasks of the default plan, with the figures of a small one."""
    plan = load_comparison(DEFAULT_CONFIG)
    tasks = list(plan.suite.tasks)
    point, base = summary["points"][0], summary["base"]
    names = [f"mmlu_{subject}" for subject in mmlu_subjects("mmlu_general")]
    for entry in (base, point):
        task = dict(entry["tasks"]["mmlu_medical"])
        entry["tasks"] = dict.fromkeys(tasks, task)
        subtasks = dict.fromkeys(names, {"score": 0.3, "n": 4} if entry is base else 0.1)
        entry["tasks"]["mmlu_general"] = task | {"subtasks": subtasks}
    arms = {
        name: arm.options | ({"interpolate": "sft", "scales": [0.5]} if arm.interpolate else {})
        for name, arm in plan.arms.items()
    }
    summary["plan"]["arms"] = arms
    summary["points"] = [point | {"arm": arm, "label": arm} for arm in arms]
    summary["curves"] = {name: {arm: [[1, 0.5], [2, 0.4]] for arm in arms} for name in CURVES}
    return summary


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
    (folder / "ema" / "seed_0" / "evaluation" / "teacher" / "arc_easy.jsonl").unlink()
    (folder / "sft" / "seed_1" / "evaluation" / "student" / "generations.jsonl").unlink()
    shutil.rmtree(folder / "sft_interpolated" / "seed_0")
    write_report(str(folder))
    summary = json.loads((folder / "comparison.json").read_text())
    assert [part.split(" (")[0] for part in summary["missing"]] == [
        "sft, seed 1: student not evaluated whole",
        "ema, seed 0: teacher not evaluated whole",
        "ema, seed 1: not trained",
        "sft_interpolated, seed 0: scale_0.5 not evaluated",
    ]
    assert "no arc_easy.jsonl)" in summary["missing"][1]
    assert "Missing: ema, seed 1: not trained" in caplog.text
    page, text = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert page.index("ema, seed 1: not trained") > page.index("<h2>Missing</h2>") > page.index("<h2>Provenance</h2>")
    assert text.index("ema, seed 1: not trained") > text.index("## Missing") > text.index("## Provenance")
    assert '4 of 8 (arms × seeds) are measured whole: <a href="#missing">' in page and 'id="missing"' in page
    assert "4 of 8 (arms × seeds) are measured whole: [what is missing](#missing)" in text
    # Half an evaluation is no point: its mean would be over other tasks. And every row says how many seeds it has.
    assert {point["label"]: point["seeds"] for point in summary["points"]} == {
        "sft": [0], "ema": [0], "sft_low_lr": [0, 1], "sft_interpolated, × 0.5": [1],
    }  # fmt: skip
    assert re.search(r"^\| ema( \*)? \| 1 \|", text, re.MULTILINE)


def test_many_missing_parts_are_told_by_method():
    few, many = {"sft": ["sft-1, seed 0: not trained"]}, [f"ema-{i}, seed 0: not trained" for i in range(20)]
    assert _in_short(few) == few["sft"]
    assert _in_short(few | {"ema": many})[1] == "ema, 20 parts, the first: ema-0, seed 0: not trained"


def test_a_report_without_a_point_has_no_picture_of_an_earlier_one(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    for path in folder.glob("*/seed_*"):
        shutil.rmtree(path)
    write_report(str(folder))
    assert not list(folder.glob("*.png")) and "png" not in (folder / "report.md").read_text()


@pytest.mark.parametrize("name", ["base/text.json", "sft/seed_0/metrics.json"])
def test_a_damaged_file_is_named(comparison: Comparison, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    (folder / name).write_text((folder / name).read_text()[:50])
    with pytest.raises(ValueError, match=f"{name} is damaged .*Delete it, and run what wrote it again"):
        write_report(str(folder))


def test_figures_of_different_commits_are_not_hidden(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    path = folder / "sft" / "seed_0" / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["provenance"]["git_commit"] = "0123abcd-dirty"
    path.write_text(json.dumps(metrics))
    commits = summarize_comparison(str(folder))["provenance"]["commit"]
    assert len(commits) == 2 and "0123abcd-dirty" in commits


def test_a_report_needs_a_comparison_and_its_base(comparison: Comparison, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no comparison: .*plan.json is missing"):
        write_report(str(tmp_path))
    shutil.copy(Path(comparison.output_dir, "plan.json"), tmp_path)
    with pytest.raises(FileNotFoundError, match="The base model of .* is not evaluated whole: .*text.json is missing"):
        write_report(str(tmp_path))
    shutil.copytree(Path(comparison.output_dir, "base"), tmp_path / "base")
    (tmp_path / "base" / "arc_easy.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="is not evaluated whole: .*arc_easy.jsonl is missing"):
        write_report(str(tmp_path))


def test_answers_to_other_questions_are_refused(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    path = folder / "sft" / "seed_0" / "evaluation" / "student" / "arc_easy.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))
    with pytest.raises(ValueError, match=r"answers to different questions \(8 and 7, 7 in common"):
        summarize_comparison(str(folder))


def test_losses_on_other_tokens_are_refused(comparison: Comparison, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(comparison.output_dir, folder)
    path = folder / "base" / "text.json"
    text = json.loads(path.read_text())
    text["key"][1] = "other"
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="are of different rows, or of the same rows with other tokens.*Delete both"):
        summarize_comparison(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "sft_interpolated"}, "`reference` in .* is 'sft_interpolated'; expected an arm that is trained"),
        ({"reference": ["sft"]}, r"`reference` in .* is \['sft'\]; expected a text"),
        ({"arm": {}}, r"unknown keys \['arm'\]"),
        ({"arms": {}}, "has no arms"),
        ({"arms": {"base": {}}}, "An arm is named 'base'"),
        ({"arms": {"lr/0.1": {}}}, "An arm is named 'lr/0.1'; it becomes a folder"),
        ({"arms": ["sft"]}, r"`arms` in .* is \['sft'\]; expected a mapping"),
        ({"arms": {"x": 3}}, "Arm 'x' is 3; expected options"),
        ({"arms": {"x": {"seed": 7}}}, r"Arm 'x' sets \['seed'\], which the comparison itself sets"),
        ({"training": {"output_dir": "x"}}, r"`training` in .* sets \['output_dir'\]"),
        ({"arms": {"x": {"learning_rate": 1, "learning_rate_scale": 2}}}, "Give one of them"),
        ({"arms": {"x": {"interpolate": "sft", "scales": 0.5}}}, "`scales` of arm 'x' is 0.5; expected a list"),
        ({"arms": {"x": {"grid": [1]}}}, r"`grid` of arm 'x' is \[1\]; expected lists of values by option"),
        (
            {"arms": {"x": {"grid": {"kl_weight": 1}}}},
            "`grid` of arm 'x' is {'kl_weight': 1}; expected lists of values",
        ),
        ({"arms": {"x": {"grid": {"kl_weight": []}}}}, "`grid` of arm 'x'"),
        (
            {"arms": {"x": {"kl_weight": 1, "grid": {"kl_weight": [2]}}}},
            r"has \['kl_weight'\] beside its `grid` and in it",
        ),
        ({"arms": {"x": {"grid": {"kl_weight": [1, 1.0]}}}}, "Two arms are named 'x-1'; an arm becomes a folder"),
        ({"arms": {"x": {"grid": {"output_dir": ["a"]}}}}, r"Arm 'x-a' sets \['output_dir'\], which the comparison"),
        ({"arms": {"x": {"script": 3}}}, "`script` of arm 'x' is 3; expected a path"),
        (
            {"arms": {"x": {"interpolate": "y", "scales": [1], "script": "a.py"}}},
            r"trains nothing, but has options \['script'\]",
        ),
        (
            {"launch": {"accelerate_config": "multi_gpu"}, "arms": {"x": {"script": "a.py"}}},
            r"the arms \['x'\] have a `script` of their own. Leave out `launch`",
        ),
        (
            {"stages": [{"name": "a"}, {"name": "b"}], "arms": {"x": {"script": "a.py"}}},
            "`stages` in .* is of `trl-ema train`, and the arms",
        ),
        ({"arms": {"x": {"method": 3}}}, "`method` of arm 'x' is 3; expected the name of what it is a setting of"),
        ({"controls": ["sgd"]}, r"`controls` in .* names \['sgd'\]; expected some of the methods \['sft', 'ema'"),
        ({"evaluation": {"scales": 0.5}}, "`scales` is 0.5; expected a list of factors"),
        ({"evaluation": {"scales": [0.5, 1]}}, r"must be different factors above 0, got \[0.5, 1\]"),
        ({"evaluation": {"scales": [0.5, 0.5]}}, "must be different factors above 0"),
        ({"evaluation": {"drift_data": ["a.jsonl"]}}, r"`drift_data` is \['a.jsonl'\]; expected files by name"),
        ({"evaluation": {"drift_data": {"domain": "a.jsonl"}}}, "`drift_data` has a text named 'domain'; use letters"),
        ({"evaluation": {"drift_on": "general"}}, r"`drift_on` is 'general'; expected a list of different texts"),
        (
            {"evaluation": {"drift_data": {"a": "a.jsonl"}, "drift_on": ["b"]}},
            r"`drift_on` names \['b'\]; expected some of \['general', 'a'\]",
        ),
        ({"evaluation": {"suite": "medica"}}, r"`suite` of the evaluation is 'medica'; expected one of \['medical', "),
        ({"evaluation": {"include_path": [3]}}, r"`include_path` is \[3\]; expected a list of folders with tasks"),
        ({"evaluation": {"bf16": "yes"}}, "`bf16` of the evaluation is 'yes'; expected true or false"),
        ({"seeds": 3}, r"`seeds` in .* is 3; expected a list such as \[0, 1, 2\]"),
        (
            {"evaluation": {"retention_tasks": ["arc_easy"]}},
            r"`retention_tasks` is \['arc_easy'\]; expected tasks with",
        ),
        ({"evaluation": {"retention_tasks": {"a": {"sampel": 3}}}}, r"Task 'a' has unknown settings \['sampel'\]"),
        ({"evaluation": {"generation_tokens": -3}}, "`generation_tokens` must be a whole number of at least 0, got -3"),
        ({"evaluation": {"domain_samples": 0}}, "`domain_samples` must be a whole number of at least 1, got 0"),
        ({"arms": {"x": {"interpolate": "sft", "scales": [0.5]}}}, "interpolates 'sft', which is no trained arm"),
        ({"arms": {"x": {"scales": [0.5]}}}, "needs `interpolate` and `scales` together"),
        (
            {"arms": {"x": {"interpolate": "y", "scales": [1], "kl_weight": 1}}},
            r"trains nothing, but has options \['kl_weight'\]",
        ),
        ({"training": {}, "arms": {"x": {"learning_rate_scale": 2}}}, "give the common one under `training`"),
        ({"evaluation": {"task": {}}}, r"Unknown evaluation options \['task'\]"),
        ({"evaluation": {"retention_tasks": {"a": {"limit": 1, "sample": 1}}}}, "both choose the questions"),
        ({"evaluation": {"retention_tasks": {"a": {"limit": 0}}}}, "`limit` must be a number .*, got 0"),
        ({"evaluation": {"retention_tasks": {"a": {"limit": 2.5}}}}, "`limit` must be a number .*, got 2.5"),
        ({"evaluation": {"retention_tasks": {"a": {"sample": 0}}}}, "`sample` must be at least 1, got 0"),
        ({"evaluation": {"retention_tasks": {"a": {}}, "domain_tasks": {"a": {}}}}, r"\['a'\] are both retention"),
    ],
)
def test_a_plan_with_a_mistake_is_refused(tiny_folder, tmp_path, changes, message):
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        load_comparison(write_plan(tmp_path, **changes))


def test_a_grid_is_an_arm_for_each_combination_of_its_values(tiny_folder, tmp_path):
    arms = {
        "rehearsal": {
            "teacher": "none",
            "grid": {"rehearsal_weight": [4, 1.0], "learning_rate_scale": [1, 1.0e-5], "bf16": [False]},
        },
        "sft": {"teacher": "none"},
        "other": {"teacher": "none", "method": "sft"},
    }
    plan = load_comparison(write_plan(tiny_folder, arms=arms), str(tmp_path))
    expected = ["rehearsal-4-1-False", "rehearsal-4-1e-05-False", "rehearsal-1-1-False", "rehearsal-1-1e-05-False"]
    assert list(plan.arms) == [*expected, "sft", "other"] and plan.methods == ["rehearsal", "sft"]
    assert [arm.method for arm in plan.arms.values()] == ["rehearsal"] * 4 + ["sft"] * 2
    assert plan.arms["rehearsal-4-1e-05-False"].options == {
        "teacher": "none", "rehearsal_weight": 4, "learning_rate_scale": 1e-5, "bf16": False,
    }  # fmt: skip
    options = plan.options(plan.arms["rehearsal-4-1e-05-False"], 1)
    assert options["learning_rate"] == pytest.approx(2e-7) and "method" not in options and "grid" not in options
    assert options["output_dir"] == str(tmp_path / "rehearsal-4-1e-05-False" / "seed_1")


def test_unknown_options_and_tasks_are_refused_before_training(tiny_folder, tmp_path):
    plan = load_comparison(write_plan(tiny_folder, arms={"x": {"kl_wait": 1}}), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="kl_wait"):
        run_comparison(plan)
    plan = load_comparison(
        write_plan(tiny_folder, evaluation={"retention_tasks": {"helaswag": {}}}), str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match=r"no task 'helaswag'. Near matches: hellaswag"):
        run_comparison(plan)


def test_an_arm_is_trained_by_a_script_of_its_own(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))
    subspace = {"script": str(SUBSPACES), "teacher": "none"}
    training = PLAN["training"] | {
        name: str(tiny_folder / PLAN["training"][name]) for name in ("model_name_or_path", "dataset_name")
    }
    training["load_in_4bit"] = False  # which OSF and CorDA decompose
    arms = {
        "sft": {"teacher": "none"},
        "osf": {**subspace, "subspace": "osf", "grid": {"effective_rank": [0.9]}},
        "corda": {**subspace, "subspace": "corda", "rehearsal_num_texts": 8, "rehearsal_num_tokens": 32},
    }
    evaluation = {"domain_samples": 6, "generation_tokens": 0, "scales": [0.25, 0.5, 0.75]}
    plan = load_comparison(
        write_plan(tiny_folder, training=training, arms=arms, evaluation=evaluation), str(tmp_path / "out")
    )
    run_comparison(plan, seeds=[0])
    kept = kept_comparison(plan.output_dir)
    assert kept.plain_sft == ("sft",)  # whatever the options that a script shares with `trl-ema train`
    assert PeftConfig.from_pretrained(kept.folder("osf-0.9", 0)).effective_rank == 0.9
    curves = {
        arm: json.loads(Path(kept.folder(arm, 0), "evaluation", "student", "curve.json").read_text())
        for arm in ("osf-0.9", "corda")
    }
    assert curves["osf-0.9"]["unscalable"] and not curves["osf-0.9"]["scales"]
    assert curves["corda"]["unscalable"] is None and len(curves["corda"]["scales"]) == 3
    drift = {
        point["label"]: point["drift"]["general"]["kl_base_model"]["mean"]
        for point in summarize_comparison(plan.output_dir)["points"]
    }
    assert drift.keys() == {"sft", "osf-0.9", "corda"} and min(drift.values()) > 0

    # What neither knows is refused, and another strength or script is another run.
    arms["osf"] |= {"efective_rank": 0.5}
    plan = load_comparison(write_plan(tiny_folder, training=training, arms=arms), str(tmp_path / "other"))
    with pytest.raises(ValueError, match="efective_rank"):
        run_comparison(plan)
    del arms["osf"]["efective_rank"]
    arms["corda"]["lora_r"] = 4
    plan = load_comparison(
        write_plan(tiny_folder, training=training, arms=arms, evaluation=evaluation), str(tmp_path / "out")
    )
    with pytest.raises(ValueError, match="holds a finished run with other options.*lora_r: None then, 4 now"):
        run_comparison(plan)
    del arms["corda"]["lora_r"]
    arms["sft"]["script"] = str(SUBSPACES)
    plan = load_comparison(
        write_plan(tiny_folder, training=training, arms=arms, evaluation=evaluation), str(tmp_path / "out")
    )
    with pytest.raises(
        ValueError, match="holds a finished run with other options.*script: None then, '.*subspaces.py' now"
    ):
        run_comparison(plan)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "`script` '.*own.py' is no file in .*. Give its path from there, or a whole one"),
        ("print('usage: own')", "does not tell the options of a training script: no option `--output_dir`"),
        ("import nothing_such", "does not tell the options .*: ModuleNotFoundError: No module named 'nothing_such'"),
    ],
)
def test_a_script_that_is_none_is_refused(tiny_folder, tmp_path, text, message):
    script = tmp_path / "own.py"
    if text is not None:
        script.write_text(text)
    arms = {"sft": {"teacher": "none"}, "own": {"script": str(script), "teacher": "none"}}
    with pytest.raises(ValueError, match=message):
        run_comparison(load_comparison(write_plan(tiny_folder, arms=arms), str(tmp_path / "out")))


def test_unknown_arms_and_seeds_are_refused(comparison: Comparison):
    with pytest.raises(ValueError, match=r"no arms \['emma'\]; expected some of \['sft', 'ema'"):
        run_comparison(comparison, arms=["emma"])
    with pytest.raises(ValueError, match=r"no seeds \[7\]"):
        run_comparison(comparison, seeds=[7])


def test_a_plan_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "plan.yaml").write_text("- sft\n")
    with pytest.raises(ValueError, match="unknown keys"):
        load_comparison(str(tmp_path / "plan.yaml"))
    (tmp_path / "plan.yaml").write_text("")
    with pytest.raises(ValueError, match="has no arms"):
        load_comparison(str(tmp_path / "plan.yaml"))


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        (
            {"evaluation": {"retention_tasks": {"mmlu_medical": {"sample": 3}}}},
            {},
            "less than one question for each of the 6",
        ),
        (
            {"evaluation": {"retention_tasks": {"mmlu_medical": {"metric": "acc_norm"}}}},
            {},
            r"has no metric 'acc_norm'; expected one number per question.* It is scored by \['acc'\]",
        ),
        (
            {},
            {"arms": ["sft_interpolated"]},
            "is not done. Run that arm first, or both together: `--arms sft sft_interpolated`",
        ),
        (
            {"arms": {"sft": {"teacher": "none"}, "other": {"eos_token": "!"}}},
            {},
            "Arm 'other' has `eos_token='!'` and arm 'sft' None: their losses would be of different tokens",
        ),
        *(
            (
                {"arms": {"sft": {"teacher": "none"}, "other": {"teacher": "none", option: value}}},
                {},
                f"Arm 'other' has `{option}={value!r}` and arm 'sft' .*: its adapter would be measured on a base that it was not",
            )
            for option, value in (
                ("model_name_or_path", "some/other"),
                ("model_revision", "v2"),
                ("load_in_4bit", False),
            )
        ),
        (
            {"arms": {"sft": {"teacher": "none", "chat_template_path": "some/model"}}},
            {},
            "`chat_template_path='some/model'` is no .jinja file.*Write that model's chat template into",
        ),
        (
            {
                "arms": {
                    "sft": {"teacher": "none"},
                    "osf": {"script": str(SUBSPACES), "subspace": "osf", "teacher": "none"},
                    "x": {"interpolate": "osf", "scales": [0.5]},
                },
                "evaluation": {},
            },
            {},
            "Arm 'x' scales the adapters of 'osf', and which ones .*subspaces.py makes is not known before. Leave the arm out",
        ),
        *(
            (
                {
                    "arms": {"dora": {"teacher": "none", **option}, "x": {"interpolate": "dora", "scales": [0, 0.5]}},
                    "evaluation": {},
                },
                {},
                f"Arm 'x' scales the adapters of 'dora', and `{named}.*` is no factor of their update: another scale would not be",
            )
            for option, named in (
                ({"use_dora": True}, "use_dora=True"),
                ({"lora_modules_to_save": ["lm_head"]}, "modules_to_save="),
            )
        ),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(tiny_folder, tmp_path, monkeypatch, changes, asked, message):
    monkeypatch.setattr("trl_ema.comparison.run.load_base", lambda *args, **kwargs: pytest.fail("loaded a model"))
    plan = load_comparison(write_plan(tiny_folder, **changes), str(tmp_path / "out"))
    with pytest.raises(ValueError, match=message):
        run_comparison(plan, **asked)


def test_a_comparison_asks_a_suite_and_tasks_of_a_folder(tiny_folder, tmp_path, monkeypatch, caplog):
    class NoFurther(Exception):
        pass

    def stop(comparison, options, manager):
        assert is_offline(manager) and "chosen" in manager.task_index
        raise NoFurther

    monkeypatch.setattr("trl_ema.comparison.run._Evaluator", stop)
    monkeypatch.setattr("trl_ema.comparison.run.asked_as_chats", asked := mock.Mock(side_effect=asked_as_chats))
    evaluation = {
        "suite": "medical", "offline": "true", "include_path": str(write_tasks(tmp_path / "tasks")), "generation_tokens": 0,
        "retention_tasks": {"chosen": None, "hellaswag": {"sample": 5}},
    }  # fmt: skip
    plan = load_comparison(write_plan(tiny_folder, evaluation=evaluation), str(tmp_path / "out"))
    for _ in range(2):  # again over what is there
        with pytest.raises(NoFurther):
            run_comparison(plan)
    shutil.rmtree(tmp_path / "tasks")
    with pytest.raises(FileNotFoundError, match="`include_path` names .*tasks', which is no folder with tasks"):
        run_comparison(plan)
    suite = kept_comparison(str(tmp_path / "out")).suite
    assert list(suite.retention_tasks) == ["chosen", "hellaswag", "mmlu_general"]
    assert list(suite.domain_tasks) == ["mmlu_medical", "medmcqa", "medqa_5options"]
    assert suite.retention_tasks["hellaswag"].sample == 5 and suite.retention_tasks["mmlu_general"] == TaskSettings()
    assert "Not asked of the suite `medical`, for want of a hub: pubmedqa, medqa_4options, ifeval." in caplog.text
    assert list(asked.call_args.args[0]) == ["mmlu_medical", "medmcqa", "medqa_5options", "mmlu_general"]


def test_what_is_written_for_chat_models_is_asked_as_a_chat_in_a_suite():
    tasks = {"ifeval": TaskSettings(limit=3), "hellaswag": TaskSettings()}
    assert asked_as_chats(tasks, SimpleNamespace(chat_template=None)) == tasks
    expected = tasks | {"ifeval": TaskSettings(limit=3, apply_chat_template=True)}
    assert asked_as_chats(tasks, SimpleNamespace(chat_template="{{ messages }}")) == expected


def test_conversations_are_measured_by_their_last_answer(tiny_folder, tmp_path):
    lines = [json.loads(line) for line in (tiny_folder / "data.jsonl").read_text().splitlines()]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        for row in lines
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    training = PLAN["training"] | {
        "model_name_or_path": str(tiny_folder / "model"),
        "dataset_name": str(tmp_path / "chats.jsonl"),
    }
    plan = json.loads(json.dumps(PLAN)) | {
        "training": training, "arms": {"sft": {"teacher": "none"}}, "seeds": [0], "evaluation": {"domain_samples": 4, "generation_tokens": 2},
    }  # fmt: skip
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))
    run_comparison(load_comparison(str(tmp_path / "plan.yaml"), str(tmp_path / "out")))
    text = json.loads((tmp_path / "out" / "sft" / "seed_0" / "evaluation" / "student" / "text.json").read_text())
    assert text["domain"]["kl_base_model"] > 0 and len(text["domain"]["rows"]) == 4


def test_an_adapter_that_changes_the_base_leaves_a_whole_one_to_the_next(tiny_folder, tmp_path):
    folder = str(tiny_folder / "model")
    for name, init in (("pissa", "pissa"), ("lora", False)):
        model = get_peft_model(load_base(folder, dtype=torch.float32)[0], lora(init_lora_weights=init))
        model.save_pretrained(tmp_path / name)
    evaluation = {"domain_samples": 4, "generation_tokens": 0}
    training = json.loads(json.dumps(PLAN["training"])) | {
        "model_name_or_path": folder, "dataset_name": str(tiny_folder / "data.jsonl"), "load_in_4bit": False,
    }  # fmt: skip
    plan = load_comparison(write_plan(tiny_folder, training=training, evaluation=evaluation), str(tmp_path / "out"))
    evaluator = _Evaluator(plan, [parse(_arguments(plan.training))], None)

    def measured(name, adapter):
        evaluator.adapter(str(tmp_path / adapter), str(tmp_path / name))
        return json.loads((tmp_path / name / "text.json").read_text())["domain"]

    first = measured("first", "lora")
    assert measured("between", "pissa")["kl_base_model"] < 1e-5
    assert measured("second", "lora") == first
    with pytest.raises(ValueError, match="cannot be scaled to 0.5"):
        evaluator.adapter(str(tmp_path / "pissa"), str(tmp_path / "scaled"), 0.5)


@pytest.mark.parametrize("option", ["eos_token", "chat_template_path"])
def test_an_untrained_arm_has_the_base_s_loss_whatever_the_training_makes_of_the_tokenizer(
    tiny_folder, tmp_path, option, monkeypatch
):
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    template = tmp_path / "own.jinja"
    template.write_text(CHAT_TEMPLATE.replace("</s>", "<|endoftext|> the end"))
    if option == "eos_token":  # a chat template writes its own
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
        tokenizer.chat_template = None
        shutil.rmtree(tmp_path / "model")
        shutil.copytree(tiny_folder / "model", tmp_path / "model", ignore=shutil.ignore_patterns("chat_template*"))
        tokenizer.save_pretrained(tmp_path / "model")
    training = json.loads(json.dumps(PLAN["training"])) | {
        "model_name_or_path": str(tmp_path / "model"), "dataset_name": str(tiny_folder / "data.jsonl"), "load_in_4bit": False,
        option: {"eos_token": "!", "chat_template_path": str(template)}[option],
    }  # fmt: skip
    evaluation = {"domain_samples": 6, "generation_tokens": 0}
    plan = load_comparison(write_plan(tiny_folder, training=training, evaluation=evaluation), str(tmp_path / "out"))
    options = plan.options(plan.arms["ema"], 0) | {"resume_from_checkpoint": None, "output_dir": str(tmp_path / "arm")}
    options |= {"max_steps": 1, "learning_rate": 0.0}  # an adapter that changes nothing
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    monkeypatch.setattr(sys, "argv", ["trl-ema"])
    train(arguments)
    evaluator = _Evaluator(plan, [parse(arguments)], None)
    evaluator.base()
    evaluator.adapter(str(tmp_path / "arm"), str(tmp_path / "figures"))
    base, arm = (
        json.loads((path / "text.json").read_text()) for path in (tmp_path / "out" / "base", tmp_path / "figures")
    )
    assert base["key"][1] == arm["key"][1] and base["domain"]["tokens"] == arm["domain"]["tokens"]
    assert base["domain"]["loss"] == pytest.approx(arm["domain"]["loss"], rel=1e-6)


def _arguments(options):
    return [text for name, value in options.items() for text in (f"--{name}", str(value))] + ["--output_dir", "out"]


def test_rows_without_a_prompt_are_refused_before_the_base_is_evaluated(tiny_folder, tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": f"the drug {i}"}) + "\n" for i in range(20)))
    training = PLAN["training"] | {
        "model_name_or_path": str(tiny_folder / "model"),
        "dataset_name": str(tmp_path / "text.jsonl"),
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(PLAN | {"training": training}))
    with pytest.raises(ValueError, match="have no prompt and answer to measure by. Expected `prompt`"):
        run_comparison(load_comparison(str(tmp_path / "plan.yaml"), str(tmp_path / "out")))
    assert not (tmp_path / "out" / "base").exists()


def test_held_out_rows_of_the_evaluation_are_held_out_of_every_run(definitions, monkeypatch):
    monkeypatch.setattr("trl_ema.offline.demo_rows", lambda: [dict(row) for row in definitions])
    plan, read = load_comparison(DEFAULT_CONFIG), RunData()
    (runs,) = running._parsed(plan)
    args, settings, model_args = next(iter(runs.values()))
    held_out = load_held_out(args, load_tokenizer(model_args)[1], settings.dataset_text_field)
    assert len(held_out) == plan.suite.domain_samples and {arm for arm, _ in runs} == {
        arm.name for arm in plan.trained()
    }
    measured = {json.dumps(row, sort_keys=True) for row in held_out}
    for options in {RunData.key(options): options for options in runs.values()}.values():
        (part,) = read.parts(options)
        assert len(part.train) == 4000
        assert not measured & {json.dumps(row, sort_keys=True) for row in part.train}


class Checked(Exception):
    """Raised where a comparison would begin to measure."""


@pytest.fixture
def checked(tiny_folder, tmp_path, monkeypatch):
    """Check a plan of these arms, with all that is done before the base is measured; `DATA` in them is the file of the others."""

    def stop(*_):
        raise Checked

    monkeypatch.setattr(running, "_Evaluator", stop)

    def run(given, training=None, /, **asked):
        data = str(tiny_folder / "data.jsonl")
        options = PLAN["training"] | {"model_name_or_path": str(tiny_folder / "model"), "dataset_name": data}
        options |= {"load_in_4bit": False} | (training or {})
        arms = json.loads(json.dumps(given).replace("DATA", data))
        evaluation = {"generation_tokens": 0, "domain_samples": 16}
        plan = {"training": options, "arms": {"sft": {"teacher": "none"}} | arms, "evaluation": evaluation}
        (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"seeds": [0, 1]} | plan, sort_keys=False))
        found = load_comparison(str(tmp_path / "plan.yaml"), str(tmp_path / "out"))
        with pytest.raises(Checked):
            run_comparison(found, **asked)
        return found

    return run


@pytest.mark.parametrize(
    ("option", "value", "default"),
    [("split_seed", 3, "0"), ("eval_fraction", 0.05, "0.2"), ("dataset_test_split", "dev", "'test'")],
)
def test_arms_that_hold_out_other_rows_are_refused(checked, tmp_path, option, value, default):
    arms = {"b": {"teacher": "none", option: value}}
    message = f"Arm 'b' has `{option}={value!r}` and arm 'sft' {default}: it would be trained on rows that all arms are"
    for asked in ({}, {"arms": ["sft"]}, {"evaluate_only": True}):
        with pytest.raises(ValueError, match=message):
            checked(arms, **asked)
    assert not (tmp_path / "out").exists()


def test_rows_that_an_arm_with_other_data_trains_on_are_counted_and_told(checked, tiny_folder, tmp_path, caplog):
    lines = (tiny_folder / "data.jsonl").read_text().splitlines()
    others = [json.dumps(row) for row in rows(40, seed=8)]
    (tmp_path / "both.jsonl").write_text("\n".join([*others, *lines]) + "\n")
    (tmp_path / "others.jsonl").write_text("\n".join(others) + "\n")
    both, other = ({"teacher": "none", "dataset_name": str(tmp_path / f"{name}.jsonl")} for name in ("both", "others"))
    arms = {"both": both, "both_low": both | {"learning_rate_scale": 0.5}, "replay": {"replay_dataset": "DATA"}}
    arms |= {"other": other}
    plan = checked(arms)
    (runs,) = running._parsed(plan)
    ((sft,), (mixed,)) = (load_parts(runs[arm, 0][0], qwen2_tokenizer()) for arm in ("sft", "both"))
    trained = list(mixed.train)
    expected = sum(row in trained for row in sft.held_out)
    assert expected  # of the 16, those that are not held out of the larger file too
    shared = {"held_out": "the domain", "trained": "arms both, both_low", "rows": expected, "of": 16}
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["shared_rows"] == [shared]
    told = (
        f"{expected} of the 16 held-out rows of the domain are among the training rows of arms both, both_low: losses"
    )
    assert told in caplog.text
    # What is evaluated alone may have been trained on data that is not here.
    (tmp_path / "both.jsonl").unlink()
    checked(arms, evaluate_only=True)
    assert (
        "Nobody could count the held-out rows that are trained on, as far as arms both, both_low goes: " in caplog.text
    )


@pytest.mark.parametrize(
    ("options", "training", "message"),
    [
        ({"replay_dataset": "nosuch.jsonl"}, {}, "There is no data file 'nosuch.jsonl'"),
        ({"replay_dataset": "DATA", "replay_fraction": 0.9}, {}, "`replay_fraction=0.9` beside 64 rows takes 576 rows of"),
        ({"rehearsal_weight": 1.0, "rehearsal_dataset": "nosuch.jsonl"}, {}, "There is no data file 'nosuch.jsonl'"),
        (
            {"datasets": [{"path": "DATA", "fraction": 0.5}, {"path": "DATA", "fraction": 0.5}], "max_train_samples": 900},
            {"dataset_name": None},
            "`max_train_samples=900` with these fractions takes 450 rows of",
        ),
        ({"eval_tasks": ["helaswag:10"], "eval_tasks_steps": 1}, {}, "no task 'helaswag'. Near matches: hellaswag"),
        ({"teacher": "ema", "teacher_anchor": 0.5, "use_dora": True}, {}, "`teacher_anchor=0.5` scales a LoRA update"),
    ],
    ids=["replay", "replay_fraction", "rehearsal", "mixture", "tasks", "anchor"],
)  # fmt: skip
def test_what_an_arm_would_refuse_is_refused_before_any_is_trained(checked, tmp_path, options, training, message):
    arms = {"x": {"teacher": "none"} | options}
    if training:
        arms["sft"] = {"datasets": ["DATA"]}
    with pytest.raises(ValueError, match=f"x, seed 0, cannot be trained: .*{message}"):
        checked(arms, training)
    assert not list((tmp_path / "out").rglob("*"))
    checked(arms, training, arms=["sft"])
    checked(arms, training, evaluate_only=True)


@pytest.mark.filterwarnings("ignore:Ignored with")
@pytest.mark.parametrize(
    "name, options", [("rehearsal_loss", dict(rehearsal_loss="ce")), ("kl_weight", dict(kl_weight=3))]
)
def test_an_arm_whose_option_does_nothing_is_refused(checked, tmp_path, name, options):
    """It would be plain SFT under another name."""
    with pytest.raises(
        ValueError, match=rf"x, seed 0, would not be what its name says: `{name}=.*` does nothing beside its"
    ):
        checked({"x": {"teacher": "none"} | options})
    assert not list((tmp_path / "out").rglob("*"))
    checked({"x": {"teacher": "none"}}, options)  # common to all arms


def test_of_an_arm_that_is_not_trained_yet_one_seed_is_checked_and_data_is_read_once(checked, tmp_path, monkeypatch):
    looked, read = [], []
    check, load = running.check_training, comparison_rows.load_parts
    monkeypatch.setattr(running, "check_training", lambda *args: looked.append(args[1].run_name) or check(*args))
    monkeypatch.setattr(comparison_rows, "load_parts", lambda *args: read.append(args[0]) or load(*args))
    for arm, seed in (("sft", 0), ("done", 0), ("done", 1)):
        folder = tmp_path / "out" / arm / f"seed_{seed}"
        folder.mkdir(parents=True)
        for name in ("metrics.json", "adapter_config.json", "adapter_model.safetensors"):
            (folder / name).write_text("{}")
    arms = {"done": {"teacher": "none", "replay_dataset": "DATA"}, "ema": {"teacher": "ema"}}
    arms |= {"replay": {"teacher": "none", "replay_dataset": "DATA", "packing": False, "learning_rate": 1e-4}}
    checked(arms, {"report_to": "tensorboard"})
    assert looked == ["sft-seed_1", "ema-seed_0", "replay-seed_0"]
    assert [args.replay_dataset is None for args in read] == [True, False]
    assert sorted(path.name for path in (tmp_path / "out" / "ema" / "seed_0").iterdir()) == ["config.yaml"]


@pytest.mark.parametrize("offline", [True, False])
def test_the_tasks_of_the_default_plan_are_there_with_a_hub_and_without(offline):
    check_tasks(list(load_comparison(DEFAULT_CONFIG).suite.tasks), task_manager(offline=offline))
