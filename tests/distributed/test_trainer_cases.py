"""Two CPU processes: whatever the batches and the options, as a plain dense trainer under DDP."""

import json
from pathlib import Path

import pytest
from launching import torchrun
from trainer_worker import CASES, ZERO_CASES


# What `accelerate launch` makes of accelerate_configs/fsdp2.yaml
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip

pytestmark = pytest.mark.distributed


def test_student_and_teacher_are_those_of_a_dense_trainer(tmp_path):
    worker = str(Path(__file__).with_name("trainer_worker.py"))
    output = torchrun("trainer_worker.py", str(tmp_path), "ddp")
    assert all(output.count(f"<ddp, {case}> done") == 2 for case in CASES)
    for stage in (2, 3):
        (tmp_path / f"zero{stage}.json").write_text(json.dumps(_deepspeed(stage)))
    output = torchrun("as_on_gpus.py", worker, str(tmp_path), "zero2", "zero3", ACCELERATE_USE_DEEPSPEED="true")
    assert all(output.count(f"<{mode}, {case}> done") == 2 for mode in ("zero2", "zero3") for case in ZERO_CASES)
    output = torchrun("as_on_gpus.py", worker, str(tmp_path), "fsdp2", **FSDP2)
    assert all(output.count(f"<fsdp2, {case}> done") == 2 for case in ZERO_CASES)


def _deepspeed(stage):
    automatic = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    options = {"zero_allow_untested_optimizer": True, "zero_optimization": {"stage": stage}}
    return options | dict.fromkeys(automatic, "auto")
