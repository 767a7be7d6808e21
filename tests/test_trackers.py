"""Real trackers, offline: what a training and a comparison leave in them."""

import shutil
from pathlib import Path

import pytest
from conftest import logged

from trl_ema.cli import compare
from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.report import write_report
from trl_ema.comparison.trackers import check_trackers, log_report
from trl_ema.files import read_json


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
