"""FSDP2 on two CPU processes, by torch's own `fully_shard`: accelerate shards on accelerators alone."""

import pytest
from conftest import tiny_model
from launching import torchrun
from peft import PeftModel


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_averages_its_own_shard_and_the_file_is_whole(tmp_path, dtype):
    output = torchrun("fully_shard_worker.py", str(tmp_path), dtype)
    assert "rank 0 done" in output and "rank 1 done" in output
    PeftModel.from_pretrained(tiny_model(), tmp_path / "teacher")
