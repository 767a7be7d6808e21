"""SIGKILL at random moments, see `kill_test.py`."""

import pytest
from conftest import make_tiny_folder
from kill_test import kills_of


pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.mark.parametrize("mode", ["one", "ddp", "zero3"])
@pytest.mark.parametrize("rehearsal", [False, True], ids=["a teacher", "rehearsal with a budget"])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_nobody_disturbed(tmp_path, mode, rehearsal):
    runs = list(kills_of(mode, make_tiny_folder(tmp_path), 20, 4, 0, rehearsal))
    assert sum(len(run["kills"]) for run in runs) == 20
    assert [run["tensors_that_differ"] for run in runs] == [0] * len(runs), runs
    if rehearsal and mode != "zero3":
        assert any("while texts are written" in moment for run in runs for moment in run["kills"]), runs
