"""The real recipe on two processes: the same losses, student and teacher as one process gives."""

import json

import pytest
import torch
from launching import OPTIONS, launch, logged, weights


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tiny_folder):
    """`runs(mode)` is the folder of an undisturbed run, made once."""
    made = {}

    def run(mode):
        if mode not in made:
            made[mode] = launch(mode, tiny_folder, mode)
        return made[mode]

    return run


def assert_same(folder, other, rtol=0.0, atol=0.0):
    for key in ("loss", "ce_loss", "kl_loss", "teacher_distance", "mean_token_accuracy"):
        found, expected = logged(folder, key), logged(other, key)
        assert len(found) == OPTIONS["max_steps"]
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=atol or 1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    for who in ("student", "teacher"):
        ours, theirs = weights(folder, who), weights(other, who)
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=rtol, atol=atol)


MODES = ["ddp", "zero2", "zero3", "fsdp2", "fsdp2_sharded"]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does(runs, mode):
    assert_same(runs(mode), runs("one"), rtol=1e-3, atol=1e-4)
    figures = [json.loads((runs(name) / "metrics.json").read_text()) for name in (mode, "one")]
    for who in ("before", "student", "teacher"):
        for group in ("domain", "general"):
            assert figures[0][who][group]["loss"] == pytest.approx(figures[1][who][group]["loss"], abs=1e-3)
            assert figures[0][who][group]["tokens"] == figures[1][who][group]["tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_like_an_undisturbed_one(runs, tiny_folder, mode):
    resumed = launch(
        mode, tiny_folder, f"{mode}_resumed", resume_from_checkpoint=str(runs(mode) / "checkpoint-3"), measure=False
    )
    assert_same(resumed, runs(mode))


@pytest.mark.parametrize(
    ("before", "after"),
    [("ddp", "one"), ("one", "ddp"), ("zero2", "one"), ("one", "zero3"), ("zero3", "zero2"), ("zero2", "zero3_alone")],
)
def test_a_checkpoint_resumes_under_another_launch(runs, tiny_folder, before, after):
    output = f"{before}_to_{after}"
    launch(after, tiny_folder, output, resume_from_checkpoint=str(runs(before) / "checkpoint-3"), measure=False)
    assert_same(tiny_folder / output, runs("one"), rtol=1e-3, atol=1e-4)
