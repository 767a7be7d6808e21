import os
from types import SimpleNamespace

import pytest
import torch

from trl_ema.checkpointing import portable
from trl_ema.checkpointing.resuming import load_student


def test_a_schedule_fits_any_number_of_groups():
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    two = torch.optim.SGD([{"params": [weights[0]]}, {"params": [weights[1]]}], lr=0.5)
    one = torch.optim.SGD(weights, lr=0.5)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)) for optimizer in (two, one)]
    for schedule in schedules:
        schedule.step(3)
    states = [schedule.state_dict() for schedule in schedules]
    assert portable.schedule_for(1, states[0]) == states[1] and portable.schedule_for(2, states[1]) == states[0]
    schedules[1].load_state_dict(portable.schedule_for(1, states[0]))
    assert schedules[1].get_last_lr() == [0.125]


@pytest.mark.parametrize(("stage", "ranks", "readable"), [(2, 2, True), (2, 1, False), (3, 2, False)])
def test_deepspeed_reads_what_as_many_ranks_wrote_at_its_stage(tmp_path, stage, ranks, readable):
    folder = tmp_path / "global_step3"
    folder.mkdir()
    for rank in range(2):
        (folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (folder / "mp_rank_00_model_states.pt").touch()
    assert portable.format_of(str(tmp_path)) == portable.DEEPSPEED
    assert portable.is_readable_by(stage, ranks, str(tmp_path)) == readable


def test_the_format_of_a_checkpoint_is_told_by_its_files(tmp_path):
    assert portable.format_of(str(tmp_path)) == portable.PLAIN
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    assert portable.format_of(str(tmp_path)) == portable.FSDP_SHARDED
    (tmp_path / "pytorch_model_fsdp.bin").touch()
    assert portable.format_of(str(tmp_path)) == portable.FSDP_FULL


@pytest.mark.parametrize("foreign", ["global_step2", "pytorch_model_fsdp_0"])
def test_a_plain_run_goes_on_from_a_sharded_checkpoint(make_trainer, tmp_path, foreign):
    """Everything that a plain run reads lies beside what DeepSpeed or FSDP reads."""
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / foreign).mkdir()
    resumed, whole = make_trainer(), make_trainer(output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    whole.train()
    weights = dict(whole.model.named_parameters())
    assert all(torch.equal(weight, weights[name]) for name, weight in resumed.model.named_parameters())


def test_a_plain_run_takes_deepspeeds_float32_weights(make_trainer, tmp_path):
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    trainer.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    (checkpoint / "global_step2").mkdir()
    state = torch.load(checkpoint / "optimizer.pt")
    name = next(name for name, p in trainer.model.named_parameters() if p.requires_grad)
    state["master"] = {name: torch.full_like(trainer.model.get_parameter(name), 0.123, device="cpu")}
    torch.save(state, checkpoint / "optimizer.pt")
    assert torch.equal(load_student(trainer.model, str(checkpoint))[name].cpu(), state["master"][name])
    assert torch.equal(trainer.model.get_parameter(name).cpu(), state["master"][name])


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("foreign", [None, "global_step2"])
def test_a_checkpoint_without_an_optimizer_is_refused(make_trainer, tmp_path, name, foreign):
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    if foreign:
        (checkpoint / foreign).mkdir()
    os.remove(checkpoint / name)
    with pytest.raises(ValueError, match=f"has no {name}: it was saved with `save_only_model`, or by DeepSpeed with"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))


def test_a_half_deleted_checkpoint_is_refused(make_trainer, tmp_path):
    make_trainer(save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    os.remove(checkpoint / "rng_state.pth")
    with pytest.raises(ValueError, match=r"has no random state \(rng_state\*.pth\), so dropout"):
        make_trainer().train(resume_from_checkpoint=str(checkpoint))


def test_an_optimizer_of_other_parameters_is_refused():
    class Engine:
        optimizer = type("Zero", (), {"optimizer": None})()
        module = torch.nn.Linear(2, 2)

    groups = [{"params": ["weight", "bias"]}]
    with pytest.raises(ValueError, match="optimizer has 1 parameters, this run trains 2. Resume with the adapter"):
        portable.load_zero_state_dict(Engine(), groups, {"state": {0: {}}}, {})


def test_deepspeeds_own_schedule_is_refused_under_another_launch(make_trainer, tmp_path, monkeypatch):
    make_trainer(save_strategy="steps", save_steps=2).train()
    trainer = make_trainer()
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    plugin = SimpleNamespace(zero_stage=2, deepspeed_config={"scheduler": {"type": "WarmupLR"}})
    monkeypatch.setattr(trainer.accelerator.state, "deepspeed_plugins", {"default": plugin}, raising=False)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", plugin)
    with pytest.raises(
        ValueError, match=r"DeepSpeed's config describes its own \['scheduler'\], which cannot be filled"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
