"""DDP on two CPU processes: whatever the batches and the options, as a plain dense trainer under DDP."""

import pytest
from ddp_worker import CASES
from launching import torchrun


pytestmark = pytest.mark.distributed


def test_student_and_teacher_are_those_of_a_dense_trainer(tmp_path):
    output = torchrun("ddp_worker.py", str(tmp_path))
    for case in CASES:
        assert output.count(f"<{case}> done") == 2
