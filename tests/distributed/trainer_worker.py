"""
One rank of `torchrun`: `EMARegularizedSFTTrainer` against a plain dense trainer under DDP, step by step.

    torchrun --nproc_per_node 2 trainer_worker.py FOLDER ddp
    torchrun --nproc_per_node 2 trainer_worker.py FOLDER zero2 zero3    after it: its dense runs are kept in FOLDER, and so are DeepSpeed's
                                                                        options for each mode
"""

import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F


sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import adapter_weights, config, logged, lora, make_tokenizer, rows, tiny_model
from datasets import Dataset
from peft import get_peft_model
from torch.distributed.tensor.debug import CommDebugMode
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config
from trl import SFTTrainer

from trl_ema import EMARegularizedSFTTrainer
from trl_ema.evaluation.drift import measure_drift
from trl_ema.measurement import starting_point, trainer_batches
from trl_ema.regularizers.own_texts import FILE
from trl_ema.regularizers.penalties import squared_scores
from trl_ema.sharding import any_sharded, gather_whole, local_shard, reshard, whole_shape
from trl_ema.texts import Sampling, drawn_labels, load_texts, write_texts


DECAY, KL_WEIGHT = 0.7, 0.8
CASES = {
    # More texts than are written, so that some come again, and a weight that each step moves.
    "rehearsal with a budget": dict(
        rehearsal_weight=2.0, drift_budget=0.01, gradient_accumulation_steps=2, data=11, num_train_epochs=2, max_steps=-1
    ),
    "uneven last batches and accumulation": dict(data=11, gradient_accumulation_steps=2, num_train_epochs=2, max_steps=-1),
    "tokens counted on each rank": dict(average_tokens_across_devices=False, gradient_accumulation_steps=2),
    "a rank without a label": dict(
        data="masked", dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential"
    ),
    "rehearsal counted on each rank": dict(
        rehearsal_weight=2.0, average_tokens_across_devices=False, gradient_accumulation_steps=2
    ),
    "a penalty on the weights": dict(l2_weight=3.0, gradient_accumulation_steps=2, data=11, num_train_epochs=2, max_steps=-1),
    "checkpointing": dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True},
        ddp_find_unused_parameters=False,  # DDP needs it here, with TRL alone too
    ),
    # One layer and one shape: compiling takes long.
    "compiled": dict(torch_compile=True, torch_compile_backend="aot_eager", layers=1, pad_to_multiple_of=32),
    "packed": dict(packing=True, per_device_train_batch_size=1),
}  # fmt: skip

# The harder ones, also under DeepSpeed and FSDP2.
ZERO_CASES = [*list(CASES)[:6], "reentrant checkpointing"]
TEXTS = dict(num_texts=10, num_tokens=12)


class Dense(SFTTrainer):
    """What a user would write: a second model, all logits, `F.kl_div`, an average by hand."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with torch.random.fork_rng():  # which orders the rows
            self.twin = get_peft_model(tiny_model(num_hidden_layers=self.model.config.num_hidden_layers), lora())
        self.pairs = list(zip(_trainable(self.twin), _trainable(self.model), strict=True))
        with torch.no_grad():
            for twin, own in self.pairs:
                twin.copy_(own)
        self.l2_weight, self.start = 0.0, [own.detach().clone() for _, own in self.pairs]
        self.add_callback(_Average(self))
        self.rehearsal = _DenseRehearsal(self) if self.args.rehearsal_weight else None

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.rehearsal is not None:
            self.rehearsal.draw(len(batches))
        return batches, num_items

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        inputs = {key: value for key, value in inputs.items() if key != "num_items_in_batch"}
        labels = F.pad(inputs.pop("labels"), (0, 1), value=-100)[:, 1:]
        mask = labels != -100
        logits = model(**inputs, use_cache=False).logits
        with torch.no_grad():
            teachers = self.twin(**inputs, use_cache=False).logits
        ce = F.cross_entropy(logits[mask], labels[mask], reduction="sum")
        kl = F.kl_div(logits[mask].log_softmax(-1), teachers[mask].log_softmax(-1), log_target=True, reduction="sum")
        items = mask.sum() if num_items_in_batch is None else num_items_in_batch
        ranks = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        loss = (ce + KL_WEIGHT * kl) / items * ranks
        if self.rehearsal is not None:
            loss = loss + self.rehearsal.loss(model) * ranks
        if not self.l2_weight:  # DDP bears no weights outside the forward in every case
            return loss
        moved = sum((own - start).pow(2).sum() for (_, own), start in zip(self.pairs, self.start, strict=True))
        return loss + self.l2_weight / 2 * moved / self.current_gradient_accumulation_steps


class _DenseRehearsal:
    """One text beside each micro-batch of each rank, passed alone; its weight keeps the budget, if there is one."""

    def __init__(self, trainer):
        self.trainer, self.args, self.accelerator = trainer, trainer.args, trainer.accelerator
        self.texts = load_texts(self.args.rehearsal_texts).ids
        with torch.random.fork_rng():
            self.before = tiny_model()
        self.weight = self.center = self.args.rehearsal_weight
        self.taken, self.mean, self.steps = 0, 0.0, 0
        self.weights, self.sums = [], torch.zeros(2)

    def draw(self, number):
        ranks, texts = self.accelerator.num_processes, len(self.texts)
        orders = [np.random.default_rng([self.args.seed, i]).permutation(texts) for i in range(5)]
        places = range(self.taken, self.taken + number * ranks)
        drawn = [self.texts[orders[place // texts][place % texts]] for place in places]
        self.taken += number * ranks
        self.own = drawn[self.accelerator.process_index :: ranks]
        counted = drawn if self.args.average_tokens_across_devices else self.own
        self.predicted = sum(len(ids) - 1 for ids in counted)
        self.weights.append(self.weight)

    def loss(self, model):
        inputs = {"input_ids": torch.tensor([self.own.pop(0)]), "use_cache": False}
        student = model(**inputs).logits[0, :-1].log_softmax(-1)
        with torch.no_grad():
            before = self.before(**inputs).logits[0, :-1].log_softmax(-1)
        kl = F.kl_div(student, before, log_target=True, reduction="sum")
        self.sums += torch.stack([kl.detach(), torch.tensor(float(len(student)))])
        return self.weight * kl / self.predicted

    def after_step(self):
        kl, tokens = self.accelerator.gather(self.sums[None]).sum(0).tolist()
        self.sums.zero_()
        self.steps += 1
        self.mean = 0.9 * self.mean + 0.1 * kl / tokens
        if self.args.drift_budget is not None:
            smoothed = self.mean / (1 - 0.9**self.steps)
            begins, left = self.args.rehearsal_weight, 1 - self.steps / self.trainer.state.max_steps
            target = self.args.drift_budget * (1 + left * min(1, math.log(1000 * self.center / begins) / math.log(20)))
            error = max(min(math.log(max(smoothed / target, 1e-9)), 1.0), -1.0)
            self.center = min(max(self.center * math.exp(0.15 * error), begins / 1000), 30 * begins)
            self.weight = min(max(self.center * math.exp(2 * error), begins / 1000), 30 * begins)


class _Average(TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    @torch.no_grad()
    def on_step_end(self, *args, **kwargs):
        if self.trainer.rehearsal is not None:
            self.trainer.rehearsal.after_step()
        for twin, own in self.trainer.pairs:
            twin.lerp_(own, 1 - DECAY)


def _trainable(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def masked_rows(tokenizer):
    """Tokenized rows; the second rank's first batch has no label."""
    made = []
    for i, row in enumerate(rows(16)):
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        prompt = len(tokenizer(row["prompt"])["input_ids"])
        labels = [-100] * len(ids) if i in (2, 3) else [-100] * prompt + ids[prompt:]
        made.append({"input_ids": ids, "labels": labels})
    return Dataset.from_list(made)


def run(trainer_class, folder, case, **more):
    options = dict(per_device_train_batch_size=2, ema_decay=DECAY, ema_warmup=False, kl_weight=KL_WEIGHT) | case | more
    if "rehearsal_weight" in options:
        options |= {f"rehearsal_{name}": value for name, value in TEXTS.items()}
        options.setdefault("rehearsal_texts", str(Path(folder, FILE)))
    data, tokenizer = options.pop("data", 16), make_tokenizer()
    model, layers = options.pop("model", None), options.pop("layers", 2)
    adapter = (options.pop("peft_config", None) or lora()) if model is None else None
    if trainer_class is Dense:
        l2_weight = options.pop("l2_weight", 0.0)
    trainer = trainer_class(
        tiny_model(num_hidden_layers=layers) if model is None else model,
        args=config(folder, **options),
        train_dataset=masked_rows(tokenizer) if data == "masked" else rows(data),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    if trainer_class is Dense:
        trainer.l2_weight = l2_weight
    trainer.train()
    return trainer


def dense_run(folder, case):
    """Losses, student and teacher of the dense trainer."""
    dense = run(Dense, folder, {key: value for key, value in case.items() if "compile" not in key}, teacher="none")
    students = adapter_weights(dense)
    names = [name.replace(".default", "") for name in students]
    twins = [twin.detach() for twin, _ in dense.pairs]
    return {
        "loss": logged(dense, "loss"),
        "student": dict(zip(names, students.values(), strict=True)),
        "teacher": dict(zip(names, twins, strict=True)),
        "rehearsal_weight": [] if dense.rehearsal is None else dense.rehearsal.weights,
    }


def check(name, ours, expected):
    assert len(expected["loss"]) >= 4 and logged(ours, "kl_loss")[-1] > 1e-3, name
    losses = torch.tensor(logged(ours, "loss")), torch.tensor(expected["loss"])
    torch.testing.assert_close(*losses, rtol=2e-3, atol=2e-4, msg=_named(name))
    assert logged(ours, "rehearsal_weight") == pytest.approx(expected["rehearsal_weight"], rel=2e-3), name
    for who, adapter in (("student", "default"), ("teacher", "teacher")):
        found = {n: p for n, p in ours.model.named_parameters() if f".{adapter}." in n}
        assert len(found) == len(expected[who])
        for key, parameter in found.items():
            whole = gather_whole(local_shard(parameter), parameter)
            wanted = expected[who][key.replace(f".{adapter}", "")]
            torch.testing.assert_close(whole, wanted, rtol=5e-3, atol=5e-4, msg=_named(f"{name}, {who}, {key}"))
            both = ours.accelerator.gather(whole[None].contiguous())
            assert torch.equal(both[0], both[1]), name


def check_update(trainer):
    """Each rank averages what it has, in float32, without a word to the others."""
    shards = trainer.teacher.average_shards()
    students = [local_shard(student) for student in trainer.teacher.students()]
    assert [s.shape for s in shards] == [s.shape for s in students] and {s.dtype for s in shards} == {torch.float32}
    held, total = sum(s.numel() for s in shards), sum(whole_shape(p).numel() for p in trainer.teacher.students())
    sharded = any_sharded(trainer.model)
    assert abs(held - (total / 2 if sharded else total)) <= 0.05 * total, (held, total)
    before = [shard.clone() for shard in shards]
    with CommDebugMode() as communication:
        trainer.teacher.update(0.5)
    assert communication.get_total_counts() == 0, communication.get_comm_counts()
    for old, student, new in zip(before, students, shards, strict=True):
        torch.testing.assert_close(new, torch.lerp(old, student, 0.5))


def drift_from_a_start_that_is_not_the_base(folder, mode):
    """The start is put back for the measurement, each rank's part of it, and taken out again. ZeRO-3 cannot, and says so."""
    case = {
        "model": get_peft_model(tiny_model(), lora(init_lora_weights=False)),
        "ddp_backend": "gloo",
        "use_cpu": mode == "ddp",
    }
    trainer = run(EMARegularizedSFTTrainer, folder, case)
    if mode == "zero3":
        with pytest.raises(ValueError, match="Under ZeRO-3 drift is measured from a base alone"):
            starting_point(trainer)
        return None
    start, trained = trainer.starting_point, [p for p in trainer.model.parameters() if p.requires_grad]
    reshard(trainer.model)
    before = [local_shard(p).clone() for p in trained]
    batches = trainer_batches(trainer, trainer.train_dataset.select(range(4)))
    found = measure_drift(trainer.model, batches, wrapper=trainer.wrapper, reference=start.activate)
    none = measure_drift(trainer.model, batches, start.activate, wrapper=trainer.wrapper, reference=start.activate)
    reshard(trainer.model)
    assert all(torch.equal(local_shard(p), kept) for p, kept in zip(trained, before, strict=True))
    assert abs(none["kl_base_model"]) < 1e-6 < 1e-3 < found["kl_base_model"]
    return torch.tensor(found["kl_base_model"])


def check_fisher(folder, mode):
    """Each rank's texts make their part of it. A sharded model cannot, and says so."""
    folder = Path(folder, "fisher")  # beside the run there lie its own texts
    file = str(folder / "texts.safetensors")
    case = dict(
        teacher="none", ewc_weight=2.0, ewc_num_texts=5, rehearsal_texts=file, use_cpu=mode == "ddp", ddp_backend="gloo"
    )
    if mode in ("zero3", "fsdp2"):
        with pytest.raises(ValueError, match="`ewc_weight`: a sharded model"):
            run(EMARegularizedSFTTrainer, folder, case)
        return
    if mode == "ddp" and int(os.environ["RANK"]) == 0:
        write_texts(get_peft_model(tiny_model(), lora()), make_tokenizer(), Sampling(6, 12), file)
    torch.distributed.barrier()
    trainer = run(EMARegularizedSFTTrainer, folder, case)
    (ewc,) = trainer.regularizers
    texts = ewc.own.get(trainer)
    labels = drawn_labels(texts)[:5]
    model = get_peft_model(tiny_model(), lora())
    for name, start in ewc.start.items():
        model.get_parameter(name).data.copy_(start)
    sums = squared_scores(model, _trainable(model), zip(texts.ids, labels, strict=False))
    number = sum(label != -100 for row in labels for label in row)
    assert any(one.any() for one in sums)
    for one, found in zip(sums, ewc.fisher.values(), strict=True):
        torch.testing.assert_close(found.cpu(), one / number, rtol=1e-4, atol=1e-9)
        both = trainer.accelerator.gather(found[None].contiguous())
        assert torch.equal(both[0], both[1])


def texts_are_written(folder, mode):
    """By both ranks, the same as by one process; not by a sharded model, which says what to do."""
    output = Path(folder, mode)
    os.environ["TRL_EMA_CACHE"] = str(output / "cache")
    case = {"rehearsal_weight": 2.0, "rehearsal_texts": None, "max_steps": 1, "ddp_backend": "gloo"}
    case["use_cpu"] = mode == "ddp"
    if mode in ("zero3", "fsdp2"):
        with pytest.raises(
            ValueError, match="A sharded model .* cannot write texts: .* `trl-ema rehearse --num_texts 10"
        ):
            run(EMARegularizedSFTTrainer, output, case)
        return
    run(EMARegularizedSFTTrainer, output, case)
    found = load_texts(output / FILE)
    with torch.random.fork_rng():
        model = tiny_model()
    alone = write_texts(
        model, make_tokenizer(), Sampling(**TEXTS), output / f"{torch.distributed.get_rank()}.safetensors"
    )
    assert (found.ids, found.kinds) == (alone.ids, alone.kinds) and set(found.kinds) == {"raw", "chat"}
    assert found.about["fingerprint"] == alone.about["fingerprint"]
    if mode == "ddp" and torch.distributed.get_rank() == 0:
        (output / FILE).rename(Path(folder, FILE))  # for all cases
    torch.distributed.barrier()


def main(folder: str, mode: str) -> None:
    saved = Path(folder, "expected.pt")  # by the run under DDP, for the others
    made = {} if mode == "ddp" else torch.load(saved)
    unset_hf_deepspeed_config()  # of the mode before
    texts_are_written(folder, mode)
    for name in CASES if mode == "ddp" else ZERO_CASES:
        case = CASES[name]
        unset_hf_deepspeed_config()  # of the case before: with it the same seed makes another model
        ours = run(EMARegularizedSFTTrainer, folder, case, use_cpu=mode == "ddp", ddp_backend="gloo")
        assert ours.is_fsdp_enabled == (mode == "fsdp2") and ours.is_deepspeed_enabled == mode.startswith("zero")
        if mode == "ddp":
            made[name] = dense_run(folder, case)
        check(name, ours, made[name])
        check_update(ours)
        print(f"<{mode}, {name}> done", flush=True)
    unset_hf_deepspeed_config()
    check_fisher(folder, mode)
    unset_hf_deepspeed_config()
    drift = drift_from_a_start_that_is_not_the_base(folder, mode)
    if drift is not None:
        torch.testing.assert_close(drift, made.setdefault("drift", drift), rtol=2e-2, atol=1e-4)
    if mode == "ddp" and torch.distributed.get_rank() == 0:
        torch.save(made, saved)
    torch.distributed.barrier()


def _named(name):
    return lambda text: f"{name}: {text}"


if __name__ == "__main__":
    for mode in sys.argv[2:]:
        if mode.startswith("zero"):
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(Path(sys.argv[1], f"{mode}.json"))
        main(sys.argv[1], mode)
    torch.distributed.destroy_process_group()
