"""How the trainings of a comparison are started."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest

from trl_ema.comparison import training
from trl_ema.comparison.plan import load_comparison
from trl_ema.comparison.training import check_jobs, train, train_together
from trl_ema.processes import Launch


@pytest.fixture
def plan(tmp_path):
    """A comparison of three arms, none of them trained."""

    def make(more=""):
        path = tmp_path / "plan.yaml"
        path.write_text(f"output_dir: {tmp_path}/out\narms: {{a: {{}}, b: {{}}, c: {{}}}}\n{more}")
        found = load_comparison(str(path))
        for arm in found.arms:
            Path(found.folder(arm, 0)).mkdir(parents=True, exist_ok=True)
        return found

    return make


@pytest.fixture
def started(monkeypatch):
    """What was started, with its environment; the arm `b` fails."""
    found = []

    def run(command, check, env, stdout=None, stderr=None):
        found.append((command, env, threading.get_ident()))
        time.sleep(0.2)
        if "/b/" in command[-1]:
            raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", run)
    return found


def test_a_training_is_launched_as_the_plan_says(plan, started):
    comparison = plan("launch: {accelerate_config: zero2, num_processes: 4}")
    train(comparison, comparison.arms["a"], 0)
    ((command, env, _),) = started
    config = f"--config {comparison.folder('a', 0)}/config.yaml"
    assert " ".join(command[1:]) == f"-m trl_ema train --accelerate_config zero2 --num_processes 4 {config}"
    assert (env["WANDB_PROJECT"], env["WANDB_RUN_GROUP"]) == ("out", "a")


def test_trainings_at_once_share_the_gpus(plan, started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    comparison = plan()
    Path(comparison.folder("b", 0), "metrics.json").touch()  # done
    train_together(comparison, [(arm, 0) for arm in comparison.arms.values()], 2)
    assert {env["CUDA_VISIBLE_DEVICES"] for _, env, _ in started} == {"3", "5"}
    assert len({thread for *_, thread in started}) == 2


def test_trainings_at_once_share_the_cores(plan, started, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(7))
    comparison = plan()
    train_together(comparison, [(comparison.arms["a"], 0)], 3)
    assert started[0][1]["OMP_NUM_THREADS"] == "2"


def test_after_a_failure_no_other_training_begins(plan, started):
    comparison = plan()
    runs = [(comparison.arms[name], 0) for name in ("b", "a", "c")]
    with pytest.raises(ValueError, match=r"training of b, seed 0, failed; what it said is in .*b/seed_0/train.log"):
        train_together(comparison, runs, 1)
    assert len(started) < 3


def test_a_training_that_fails_alone_is_told_in_a_line_too(plan, started):
    comparison = plan()
    with pytest.raises(
        ValueError, match="The training of b, seed 0, failed; what it said is above. The others are kept"
    ):
        train(comparison, comparison.arms["b"], 0)


def test_after_ctrl_c_no_other_training_begins(plan, monkeypatch):
    begun = []

    def interrupted(comparison, arm, seed, log, **environment):
        begun.append(arm.name)
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "train", interrupted)
    comparison = plan()
    with pytest.raises(KeyboardInterrupt):
        train_together(comparison, [(arm, 0) for arm in comparison.arms.values()], 1)
    assert len(begun) < 3


def test_a_training_of_one_process_has_one_of_several_gpus(plan, started, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    comparison = plan()
    for gpus, seen in ((2, "0"), (1, None)):
        monkeypatch.setattr("torch.cuda.device_count", lambda gpus=gpus: gpus)
        train(comparison, comparison.arms["a"], 0)
        assert started[-1][1].get("CUDA_VISIBLE_DEVICES") == seen


@pytest.mark.parametrize(
    "jobs, more, message",
    [
        (0, "", "`jobs` must be at least 1, got 0"),
        (3, "", "`jobs=3` trainings have 2 GPUs"),
        (
            2,
            "launch: {accelerate_config: zero2}",
            "`jobs=2` gives each training one GPU, and `launch` in the plan gives it",
        ),
        (1, "launch: {accelerate_config: zero9}", "`accelerate_config='zero9'` is neither a file nor a packaged"),
        (
            1,
            "launch: {accelerate_config: zero2, num_procesess: 4}",
            "Of --num_procesess 4 not everything is an option of `trl-ema train` or of `accelerate launch`",
        ),
        (
            1,
            "launch: {accelerate_config: zero2, max_steps: 4}",
            "`launch` in the plan has --max_steps 4, which is of the training and not of its launch. Give it under `training`",
        ),
    ],
)
def test_what_cannot_be_started_is_refused(plan, monkeypatch, jobs, more, message):
    monkeypatch.setattr(training, "_devices", lambda: ["0", "1"])
    with pytest.raises(ValueError, match=message):
        check_jobs(plan(more), jobs)


def test_what_is_true_is_a_flag_of_the_launcher(plan, started):
    comparison = plan("launch: {accelerate_config: zero3, num_processes: 4, same_network: true}")
    assert check_jobs(comparison, 1) == Launch(4, zero_stage=3, offload_param="none")
    assert check_jobs(plan(), 1) == Launch()
    train(comparison, comparison.arms["a"], 0)
    assert "--num_processes 4 --same_network --config " in " ".join(started[0][0])


@pytest.mark.parametrize(
    ("visible", "gpus", "devices"),
    [(None, 2, ["0", "1"]), ("3, 5", 2, ["3", "5"]), ("", 2, []), ("-1", 2, []), ("2,-1,3", 1, ["2"]), ("0,1", 0, [])],
)
def test_gpus_are_those_that_cuda_shows(monkeypatch, visible, gpus, devices):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert training._devices() == devices


def test_where_no_gpu_is_shown_trainings_at_once_share_the_cores(plan, started, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6))
    comparison = plan()
    check_jobs(comparison, 2)
    train_together(comparison, [(comparison.arms["a"], 0)], 2)
    ((_, env, _),) = started
    assert (env["CUDA_VISIBLE_DEVICES"], env["OMP_NUM_THREADS"]) == ("-1", "3")


def test_a_launch_without_a_configuration_is_refused(plan):
    with pytest.raises(ValueError, match="`launch` in .* has no `accelerate_config`. Give the name of a packaged one"):
        plan("launch: {num_processes: 4}")
