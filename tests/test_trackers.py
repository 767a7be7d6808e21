"""Real trackers, offline: what a training and a comparison leave in them."""

import shutil
from pathlib import Path

import pytest
from conftest import logged

from trl_ema.cli import compare
from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.report import write_report
from trl_ema.comparison.trackers import check_trackers, log_comparison, log_report
from trl_ema.files import read_json, write_json
from trl_ema.tracking import final_figures, group_run, log_when_ended


KEPT = Path(__file__).parents[1] / "recipes" / "results" / "smollm2_medical"


@pytest.fixture
def trackio():
    """Where it writes is set in `conftest.py`."""
    import trackio

    return trackio


def events(folder):
    """Everything that TensorBoard would show of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0, "tensors": 0})
    return found.Reload()


def logs_of(trackio, run):
    from trackio.sqlite_storage import SQLiteStorage

    return SQLiteStorage.get_logs(run.project, run.name)


def test_a_training_logs_its_own_figures_beside_trls(make_trainer, trackio, tmp_path):
    trainer = make_trainer(report_to=["trackio", "tensorboard"], run_name="ema-seed_0", project="medicine")
    trainer.train()
    (run,) = trackio.Api().runs("medicine")
    assert run.name == "ema-seed_0" and run.config["kl_weight"] == trainer.args.kl_weight
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    for name in ("ce_loss", "kl_loss", "teacher_distance", "loss"):
        expected = logged(trainer, name)
        assert [event.value for event in events(folder).Scalars(f"train/{name}")] == pytest.approx(expected)
        found = [row[f"train/{name}"] for row in logs_of(trackio, run) if row.get(f"train/{name}") is not None]
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("group, run_name", [(None, None), ("ema", "ema-seed_0")])
def test_figures_of_a_training_that_has_ended_are_of_its_run(
    make_trainer, trackio, tmp_path, monkeypatch, group, run_name
):
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    if group is not None:
        monkeypatch.setenv("WANDB_RUN_GROUP", group)
    project = f"ended-{group}"
    trainer = make_trainer(report_to=["trackio", "tensorboard"], run_name=run_name, project=project)
    group_run(trainer)
    trainer.train()
    during = [*trackio.Api().runs(project)]
    figures = {who: {"general": {"loss": 2.5, "kl_base_model": 0.125, "tokens": 3}} for who in ("before", "student")}
    length = len(trainer.state.log_history)
    log_when_ended(trainer, final_figures(figures | {"log": []}))
    (run,) = trackio.Api().runs(project)  # the same one
    assert run.id == during[0].id and (run_name is None or run.name == run_name)
    assert run.config["kl_weight"] == trainer.args.kl_weight and run.config["_Group"] == group
    *_, last = logs_of(trackio, run)
    expected = {f"{who}_general_{name}": x for who in figures for name, x in (("loss", 2.5), ("drift", 0.125))}
    assert {name: last[f"eval/{name}"] for name in expected} == expected
    assert last["train/global_step"] == trainer.state.global_step
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    for name, value in expected.items():
        (event,) = events(folder).Scalars(f"eval/{name}")
        assert (event.step, event.value) == (trainer.state.global_step, value)
    assert len(trainer.state.log_history) == length  # of the training
    assert trackio.context_vars.current_run.get() is None


def test_a_training_without_trackers_logs_its_last_figures_nowhere(make_trainer, tmp_path):
    trainer = make_trainer(report_to="none")
    group_run(trainer)
    log_when_ended(trainer, {"eval_student_general_loss": 1.0})
    assert not (tmp_path / "out" / "runs").exists()


@pytest.mark.parametrize(
    "report_to, expected",
    [(None, []), ("none", []), ("trackio", ["trackio"]), (["wandb", "tensorboard"], ["wandb", "tensorboard"])],
)
def test_runs_of_a_comparison_are_named_by_arm_and_seed_where_they_are_tracked(tmp_path, report_to, expected):
    report_to = "null" if report_to is None else report_to
    (tmp_path / "plan.yaml").write_text(
        f"output_dir: {tmp_path}/my_runs\ntraining: {{report_to: {report_to}, learning_rate: 0.001}}\narms: {{sft: {{teacher: none}}}}"
    )
    comparison = load_comparison(str(tmp_path / "plan.yaml"))
    assert comparison.trackers == expected and comparison.project == "my_runs"
    options = comparison.options(comparison.arms["sft"], 3)
    names = {"run_name": "sft-seed_3", "project": "my_runs"}
    assert {name: options[name] for name in names if name in options} == (names if expected else {})


def test_a_report_is_a_run_with_its_figures_and_pictures(trackio, tmp_path):
    folder = tmp_path / "smollm2"
    shutil.copytree(KEPT, folder)
    write_report(str(folder))
    log_report(str(folder), ["trackio", "tensorboard"], "smollm2")
    point = read_json(folder / "comparison.json")["points"][0]
    (run,) = trackio.Api().runs("smollm2")
    shown = events(folder / "smollm2")
    (figures,) = logs_of(trackio, run)
    assert run.name == "report"
    for name, figure in {
        "gain": point["domain_gain"],
        "accuracy lost": point["forgetting"],
        "drift on general text": point["drift"]["general"]["kl_base_model"],
    }.items():
        tag = f"{name}/{point['label']}"
        assert figures[tag] == figure["mean"]
        assert shown.Scalars(tag)[0].value == pytest.approx(figure["mean"])
    assert set(shown.Tags()["images"]) and any("report" in tag for tag in shown.Tags()["tensors"])
    for name in ("tradeoff", "drift"):
        image = trackio.utils.MEDIA_DIR / figures[name]["file_path"]
        assert figures[name]["_type"] == "trackio.image" and image.read_bytes() == (folder / f"{name}.png").read_bytes()
    page = (folder / "report.md").read_text(encoding="utf-8")
    assert figures["report"] == {"_type": "trackio.markdown", "_value": page}


def test_a_report_is_logged_again_if_it_has_changed_and_to_the_same_run(trackio, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(KEPT, folder)
    trackers = ["trackio", "tensorboard"]
    for gain, rows in ((0.5, 1), (0.5, 1), (0.25, 2)):
        summary = read_json(folder / "comparison.json")
        summary["points"][0]["domain_gain"]["mean"] = gain
        write_json(folder / "comparison.json", summary)
        log_report(str(folder), trackers, "again")
        (run,) = trackio.Api().runs("again")
        tag = f"gain/{summary['points'][0]['label']}"
        assert [row[tag] for row in logs_of(trackio, run)] == [0.5, 0.25][:rows]
        shown = events(folder / "again")
        assert [(event.step, event.value) for event in shown.Scalars(tag)] == [(0, gain)]  # the newest alone
        assert {len(shown.Images(name)) for name in shown.Tags()["images"]} == {1}


@pytest.fixture
def measured(tmp_path):
    """A comparison that was run: a plan, two trained arms and one that interpolates, their evaluations, and a report of others."""
    folder = tmp_path / "arms"
    shutil.copytree(KEPT, folder)
    plan = {
        "training": {"report_to": ["trackio", "tensorboard"], "learning_rate": 1e-3},
        "arms": {
            "sft": {"teacher": "none", "run_name": "plain"},
            "ema": {},
            "half": {"interpolate": "ema", "scales": [0.5]},
        },
        "evaluation": {"retention_tasks": {"chosen": None}, "generation_tokens": 0},
        "plain_sft": ["sft"],
        "averaged": ["ema"],
    }
    write_json(folder / "plan.json", plan)
    for i, (arm, role) in enumerate(
        (("sft", "student"), ("ema", "student"), ("ema", "teacher"), ("half", "scale_0.5"))
    ):
        at = folder / arm / "seed_0" / "evaluation" / role
        texts = {name: {"loss": i + j, "kl_base_model": i / 8} for j, name in enumerate(("domain", "general"))}
        write_json(at / "text.json", {"key": ["m", "r"], **texts, "generation": {"bleu": 0.5, "similarity": None}})
        write_json(at / "chosen.json", {"score": 0.75, "n": 4})
        if arm != "half":
            told = {"steps": 6, "arguments": {"learning_rate": 1e-3}}
            write_json(folder / arm / "seed_0" / "metrics.json", {"provenance": told})
    return folder


def test_a_comparison_logs_each_arms_figures_to_its_run_once(trackio, measured):
    # As transformers leaves them; `sft` was trained on another machine.
    trackio.init(project="arms", name="ema-seed_0", config={"kl_weight": 2.0})
    trackio.log({"train/loss": 1.0})
    trackio.finish()
    own = measured / "ema" / "seed_0" / "runs" / "Jan01_12-00-00_here"
    own.mkdir(parents=True)

    log_comparison(str(measured))
    runs = {run.name: run for run in trackio.Api().runs("arms")}
    assert sorted(runs) == ["ema-seed_0", "half-seed_0", "plain", "report"]
    groups = {name: run.config["_Group"] for name, run in runs.items()}
    assert groups == {"ema-seed_0": "ema", "half-seed_0": "half", "plain": "sft", "report": None}
    assert runs["ema-seed_0"].config["kl_weight"] == 2.0 and runs["plain"].config["learning_rate"] == 1e-3
    before, found = logs_of(trackio, runs["ema-seed_0"])
    assert before["train/loss"] == 1.0 and found["train/global_step"] == 6 and found["step"] > before["step"]
    expected = {
        "teacher_domain_loss": 2,
        "teacher_general_loss": 3,
        "teacher_general_drift": 0.25,
        "student_domain_loss": 1,
    }
    expected |= {"student_chosen": 0.75, "teacher_bleu": 0.5}
    assert {name: found[f"eval/{name}"] for name in expected} == expected
    assert not any("similarity" in name for name in found)
    for name, value in expected.items():
        (event,) = events(own).Scalars(f"eval/{name}")
        assert (event.step, event.value) == (6, value)
    (half,) = logs_of(trackio, runs["half-seed_0"])
    shown = events(measured / "half" / "seed_0" / "runs" / "evaluation")
    assert half["eval/scale_0.5_domain_loss"] == shown.Scalars("eval/scale_0.5_domain_loss")[0].value == 3

    # Once more: what has changed, alone.
    write_json(measured / "sft" / "seed_0" / "evaluation" / "student" / "chosen.json", {"score": 0.5, "n": 4})
    log_comparison(str(measured))
    again = {run.name: run for run in trackio.Api().runs("arms")}
    assert {name: len(logs_of(trackio, run)) for name, run in again.items()} == {
        "ema-seed_0": 2, "half-seed_0": 1, "plain": 2, "report": 1,
    }  # fmt: skip
    assert [row["eval/student_chosen"] for row in logs_of(trackio, again["plain"])] == [0.75, 0.5]
    assert again["plain"].config["learning_rate"] == 1e-3


def test_compare_logs_what_it_found_where_its_runs_are_tracked(measured, monkeypatch):
    seen = []
    monkeypatch.setattr("trl_ema.comparison.run.run_comparison", lambda *_: None)
    monkeypatch.setattr("trl_ema.comparison.report.write_report", lambda folder: folder)
    monkeypatch.setattr("trl_ema.comparison.trackers.log_comparison", seen.append)
    plan = measured / "plan.yaml"
    for training, expected in (("{report_to: trackio}", [str(measured)]), ("{report_to: none}", [])):
        plan.write_text(f"training: {training}\narms: {{sft: {{teacher: none}}}}")
        seen.clear()
        compare(["--config", str(plan), "--output_dir", str(measured)])
        assert seen == expected


def test_trackers_that_cannot_have_the_report_are_refused_before_any_work(tmp_path, monkeypatch):
    check_trackers(["trackio", "tensorboard", "all"])
    check_trackers([])
    monkeypatch.setattr("trl_ema.comparison.run.run_comparison", lambda *_: pytest.fail("worked"))
    plan = tmp_path / "plan.yaml"
    plan.write_text("training: {report_to: [trackio, codecarbon]}\narms: {sft: {teacher: none}}")
    with pytest.raises(
        ValueError, match=r"names \['codecarbon'\], to which .* report cannot be logged; expected some of .*'wandb'"
    ):
        compare(["--config", str(plan), "--output_dir", str(tmp_path / "out")])
    monkeypatch.setattr("trl_ema.comparison.trackers.get_available_trackers", lambda: ["tensorboard"])
    plan.write_text(plan.read_text().replace("codecarbon", "tensorboard"))
    with pytest.raises(ImportError, match="names 'trackio', whose package is not installed.* `pip install trackio`"):
        compare(["--config", str(plan), "--output_dir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
