"""FSDP2 on two CPU processes, by torch's own `fully_shard`: accelerate shards on accelerators alone."""

import pytest
from conftest import tiny_model
from launching import torchrun
from peft import PeftModel


pytestmark = pytest.mark.distributed


def test_each_rank_averages_its_own_shard_and_the_file_is_whole(tmp_path):
    output = torchrun("fully_shard_worker.py", str(tmp_path), "float32", "bfloat16")
    for dtype in ("float32", "bfloat16"):
        assert all(f"rank {rank} done in {dtype}" in output for rank in (0, 1))
        PeftModel.from_pretrained(tiny_model(), tmp_path / dtype / "teacher")
