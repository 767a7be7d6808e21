"""FSDP2 on two CPU processes, by torch's own `fully_shard`: accelerate shards on accelerators alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tiny_model
from peft import PeftModel


pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_each_rank_averages_its_own_shard_and_the_file_is_whole(tmp_path, dtype):
    worker = Path(__file__).with_name("fully_shard_worker.py")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        "0",
        "--standalone",
    ]
    command += [str(worker), str(tmp_path), dtype]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert "rank 0 done" in done.stdout and "rank 1 done" in done.stdout
    PeftModel.from_pretrained(tiny_model(), tmp_path / "teacher")
