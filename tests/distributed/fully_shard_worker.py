"""
One rank of `torchrun`: student and teacher sharded by torch's own `fully_shard` against an unsharded copy, step by step.

    torchrun --nproc_per_node 2 fully_shard_worker.py FOLDER float32 bfloat16
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist


sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import lora, tiny_model
from peft import get_peft_model
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from trl.trainer.utils import add_fused_lm_head

from trl_ema.adapters.starting_point import StartingPoint
from trl_ema.evaluation.drift import measure_drift
from trl_ema.forward import Divergence, add_regularized_forward
from trl_ema.regularizers.teacher import MeanTeacher
from trl_ema.sharding import local_shard, reshard


STEPS = 5


def build(dtype, sharded):
    base = tiny_model()
    add_fused_lm_head(base)
    model = get_peft_model(base, lora(modules_to_save=["lm_head"])).to(dtype)
    teacher = MeanTeacher(model)
    start = StartingPoint(model, is_base=False)
    add_regularized_forward(base)
    if sharded:
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    return model, teacher, optimizer, start


def batch(step):
    ids = torch.randint(6, 40, (4, 9), generator=torch.Generator().manual_seed(step))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[2:] = -100 if step == 1 else labels[2:]  # a rank without a label
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def step(model, teacher, optimizer, inputs, items, world, sequences=None):
    divergences = [Divergence(teacher, 1.0, sequences=sequences)]
    loss = -model(**inputs, fused_lm_head=True, divergences=divergences).log_probs * world / items
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach() / world


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def main(folder: str, dtype: torch.dtype) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-2, atol=2e-2)
    model, teacher, optimizer, start = build(dtype, sharded=True)
    plain, plain_teacher, plain_optimizer, plain_start = build(dtype, sharded=False)
    for number in range(STEPS):
        inputs = batch(number)
        items = (inputs["labels"][:, 1:] != -100).sum()
        part = {key: value[2 * rank : 2 * rank + 2] for key, value in inputs.items()}
        # In the last step the teacher sees two of the four sequences.
        mine, both = [torch.tensor([1 - rank]), torch.tensor([1, 2])] if number == STEPS - 1 else [None, None]
        loss = step(model, teacher, optimizer, part, items, world, mine)
        dist.all_reduce(loss)
        expected = step(plain, plain_teacher, plain_optimizer, inputs, items, 1, both)
        torch.testing.assert_close(loss, expected, **tolerance)
        with CommDebugMode() as communication:
            teacher.update(0.8)
        assert communication.get_total_counts() == 0, communication.get_comm_counts()
        plain_teacher.update(0.8)
        torch.testing.assert_close(teacher.distance(), plain_teacher.distance(), rtol=1e-2, atol=1e-4)
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor)
        torch.testing.assert_close(whole(parameter), theirs[name], **tolerance)
    # The model before is put back in shards, and taken out again.
    reshard(model)
    kept = [local_shard(p).clone() for p in model.parameters()]
    found = measure_drift(model, [batch(0)], wrapper=model, reference=start.activate)
    expected = measure_drift(plain, [batch(0)], reference=plain_start.activate)
    off = measure_drift(plain, [batch(0)])
    reshard(model)
    assert all(torch.equal(local_shard(p), before) for p, before in zip(model.parameters(), kept, strict=True))
    torch.testing.assert_close(found["kl_base_model"], expected["kl_base_model"], rtol=5e-2, atol=1e-3)
    torch.testing.assert_close(expected["kl_base_model"], off["kl_base_model"], rtol=5e-2, atol=1e-3)
    assert found["kl_base_model"] > 1e-3
    # Each rank keeps its half, in float32.
    mine = sum(shard.numel() for shard in teacher.average_shards())
    assert all(shard.dtype == torch.float32 for shard in teacher.average_shards())
    assert mine == sum(local_shard(p).numel() for p in teacher.students())
    total = sum(p.numel() for p in plain_teacher.students())
    assert abs(mine - total / world) <= 0.05 * total, (mine, total)

    teacher.save(folder, writes=rank == 0)
    dist.barrier()
    for sharded in (True, False):
        other_model, other, *_ = build(dtype, sharded)
        other.load(folder)
        for ours, saved in zip(other.average_shards(), teacher.average_shards(), strict=True):
            assert not sharded or torch.equal(ours, saved)
        ours = {name: whole(p) for name, p in other_model.named_parameters() if ".teacher." in name}
        saved = {name: whole(p) for name, p in model.named_parameters() if ".teacher." in name}
        assert ours.keys() == saved.keys() and len(ours) > 8
        assert all(torch.equal(ours[name], saved[name]) for name in saved)
        assert other.num_updates == STEPS
    print(f"rank {rank} done in {str(dtype).removeprefix('torch.')}", flush=True)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in sys.argv[2:]:
        main(str(Path(sys.argv[1], name)), getattr(torch, name))
    dist.destroy_process_group()
