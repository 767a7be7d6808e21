import os

import pytest
import torch

from trl_ema import zero


def test_a_schedule_fits_any_number_of_groups():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    two = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]]}], lr=0.5)
    one = torch.optim.SGD(weights, lr=0.5)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in (two, one)]
    for schedule in schedules:
        schedule.step(3)
    states = [schedule.state_dict() for schedule in schedules]
    assert zero.schedule_for(1, states[0]) == states[1] and zero.schedule_for(2, states[1]) == states[0]
    schedules[1].load_state_dict(zero.schedule_for(1, states[0]))
    assert schedules[1].get_last_lr() == [0.125]


@pytest.mark.parametrize(("stage", "ranks", "readable"), [(2, 2, True), (2, 1, False), (3, 2, False)])
def test_deepspeed_reads_what_as_many_ranks_wrote_at_its_stage(tmp_path, stage, ranks, readable):
    folder = tmp_path / "global_step3"
    folder.mkdir()
    for rank in range(2):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (folder / "mp_rank_00_model_states.pt").touch()
    assert zero.is_zero_checkpoint(str(tmp_path))
    assert zero.is_readable_by(stage, ranks, str(tmp_path)) == readable


def test_a_deepspeed_checkpoint_without_a_plain_optimizer_is_refused_elsewhere(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / "global_step2").mkdir()
    os.remove(checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="has no optimizer.pt, so only as many ranks as wrote it"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))


def test_an_optimizer_of_other_parameters_is_refused():
    class Engine:
        optimizer = type("Zero", (), {"optimizer": None})()
        module = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match="optimizer has 1 parameters, this run trains 2. Resume with the adapter"):
        zero.load_optimizer_state_dict(Engine(), [{"params": ["weight", "bias"]}], {"state": {0: {}}})
