"""What every regularizer keeps to, and when the trainer asks it."""

import pytest
import torch
from conftest import adapter_weights, logged, lora
from documented import documented
from trl import SFTTrainer

from trl_ema.regularizers import make_regularizers
from trl_ema.regularizers.base import Regularizer
from trl_ema.regularizers.divergence import TeacherDivergence
from trl_ema.schedules import RampedWeight


L2SP = documented("regularizers.md", "L2StartingPoint")


def l2_sp(make_trainer, weight, **options):
    trainer = make_trainer(teacher="none", **options)
    trainer.regularizers.append(L2SP(trainer.model, weight))
    return trainer


# How to make a trainer that is held back by it alone, with a weight.
METHODS = {
    "ema": lambda make, weight, **options: make(teacher="ema", kl_weight=weight, **options),
    "frozen": lambda make, weight, **options: make(teacher="frozen", kl_weight=weight, **options),
    "frozen adapter": lambda make, weight, **options: make(
        teacher="frozen", kl_weight=weight, peft_config=lora(init_lora_weights=False), **options
    ),
    "l2_sp": l2_sp,
}
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("options", [{}, dict(packing=True), dict(gradient_accumulation_steps=2)], ids=str)
def test_off_equals_plain_sft_step_for_step(make_trainer, method, options):
    ours = METHODS[method](make_trainer, 0.0, **options)
    adapter = lora(init_lora_weights=False) if method == "frozen adapter" else "lora"
    theirs = make_trainer(trainer_class=SFTTrainer, peft_config=adapter, **options)
    for trainer in (ours, theirs):
        trainer.train()
    for key in ("loss", "grad_norm"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-5), key
    expected = adapter_weights(theirs)
    for name, weight in adapter_weights(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


@every_method
def test_on_it_holds_the_student_back(make_trainer, method):
    held, free = METHODS[method](make_trainer, 5.0), METHODS[method](make_trainer, 0.0)
    start = adapter_weights(held)
    moved = []
    for trainer in (held, free):
        trainer.train()
        moved.append(sum((w - start[n]).pow(2).sum() for n, w in adapter_weights(trainer).items()).item())
    assert moved[0] != moved[1]
    if method == "l2_sp":
        assert moved[0] < moved[1]


@every_method
def test_a_resumed_run_ends_as_one_that_was_not_stopped_bit_for_bit(make_trainer, tmp_path, method):
    saving = dict(save_strategy="steps", save_steps=2)
    whole = METHODS[method](make_trainer, 1.0, output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    # Another start than that of the checkpoint: what is resumed must not depend on it.
    resumed = METHODS[method](make_trainer, 1.0, output_dir=str(tmp_path / "resumed"), seed=42, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for adapter in ("default", "teacher"):
        expected = adapter_weights(whole, adapter)
        found = adapter_weights(resumed, adapter)
        assert found.keys() == expected.keys() and all(torch.equal(found[n], w) for n, w in expected.items())
    assert logged(resumed, "loss")[-2:] == logged(whole, "loss")[-2:]


@every_method
def test_a_checkpoint_without_it_is_refused_before_anything_is_loaded(make_trainer, tmp_path, method):
    make_trainer(teacher="none", save_strategy="steps", save_steps=2).train()
    trainer = METHODS[method](make_trainer, 1.0)
    before = adapter_weights(trainer)
    if method == "frozen":  # the base is in every checkpoint
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
        return
    with pytest.raises(ValueError, match="missing"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(trainer).items())


@pytest.mark.parametrize("split", [1, 2, 4])
def test_a_penalty_counts_once_per_optimizer_step_however_the_batch_is_cut(make_trainer, split):
    """SGD: weights after the first step tell the gradient."""
    options = dict(optim="sgd", learning_rate=0.5, max_steps=1, max_grad_norm=0.0)
    options |= dict(gradient_accumulation_steps=split, per_device_train_batch_size=4 // split)
    trainer, held = l2_sp(make_trainer, 0.0, **options), l2_sp(make_trainer, 0.3, **options)
    shift = 0.1
    held.regularizers[0].start = {name: start + shift for name, start in held.regularizers[0].start.items()}
    for one in (trainer, held):
        one.train()
    # d/dθ of λ/2·‖θ − θ₀‖² at θ = θ₀ − shift is −λ·shift.
    for name, weight in adapter_weights(held).items():
        torch.testing.assert_close(weight - adapter_weights(trainer)[name], torch.full_like(weight, 0.5 * 0.3 * shift))
    number = sum(start.numel() for start in held.regularizers[0].start.values())
    gap = logged(held, "loss")[0] - logged(trainer, "loss")[0]
    assert gap == pytest.approx(0.3 / 2 * shift**2 * number, rel=1e-3)


class Rows(Regularizer):
    """Each row once more, with nothing to learn."""

    name = "rows"

    def add_rows(self, inputs):
        twice = {key: torch.cat([value, value]) for key, value in inputs.items() if torch.is_tensor(value)}
        twice["labels"][len(inputs["labels"]) :] = -100
        return inputs | twice


@pytest.mark.parametrize("teacher", ["none", "ema"])
def test_further_rows_are_in_the_batch_and_without_labels_change_nothing(make_trainer, teacher):
    plain, more = make_trainer(teacher=teacher), make_trainer(teacher=teacher)
    more.regularizers.append(Rows())
    sizes = []
    more.model.get_base_model().model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for trainer in (plain, more):
        trainer.train()
    assert set(sizes) == {8}
    assert logged(more, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-4)
    assert logged(more, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-3)


class Diary(Regularizer):
    """Writes down what it is asked."""

    name = "diary"

    def __init__(self):
        self.entries = []

    def __getattribute__(self, name):
        if name in ("name", "folder", "entries", "bytes_to_save") or name.startswith("__"):
            return object.__getattribute__(self, name)
        self.entries.append(name)
        return object.__getattribute__(self, name)


def test_each_is_asked_at_its_moment(make_trainer, tmp_path):
    trainer, diary = (
        make_trainer(max_steps=2, gradient_accumulation_steps=2, save_strategy="steps", save_steps=1),
        Diary(),
    )
    trainer.regularizers.append(diary)
    trainer.train()
    micro_batch = ["add_rows", "forward_options", "observe"]
    step = ["before_step", *micro_batch, "penalty", *micro_batch, "after_step", "state", "metrics", "save"]
    assert diary.entries == ["begin", *step, *step]
    assert trainer.state.stateful_callbacks["trl_ema"]["regularizers"]["diary"] == {}
    resumed, diary = make_trainer(max_steps=2, gradient_accumulation_steps=2), Diary()
    resumed.regularizers.append(diary)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert diary.entries == ["check", "load", "begin", *step[:-1]]


def test_a_model_that_is_given_on_is_freed_of_all_of_them(make_trainer):
    model = make_trainer(teacher="none").model
    trainer, diary = make_trainer(model=model, peft_config=None), Diary()
    trainer.regularizers.append(diary)
    make_trainer(model=model, peft_config=None)
    assert diary.entries == ["remove"]


def test_options_make_the_list(make_trainer):
    assert make_trainer(teacher="none").regularizers == []
    (found,) = make_trainer(teacher="frozen").regularizers
    assert isinstance(found, TeacherDivergence) and found.teacher.is_base and found.folder is None
    trainer = make_trainer(teacher="none")
    (made,) = make_regularizers(trainer.model, make_trainer(teacher="ema").args)
    assert made.folder == "teacher" and made.teacher.model is trainer.model


def test_a_weight_that_is_controlled_takes_the_ramps_place(make_trainer):
    class Controlled(RampedWeight):
        """Half of what it was after each micro-batch that it sees."""

        def value(self, step):
            return self.weight

        def observe(self, divergence, tokens):
            assert divergence.shape == tokens.shape == () and tokens > 0
            self.weight /= 2

        def state(self):
            return {"weight": self.weight}

        def load(self, state):
            self.weight = state["weight"]

    trainer = make_trainer(teacher="frozen")
    found = trainer.regularizers[0]
    begin = found.begin

    def controlled(total_steps, state=None):
        begin(total_steps, None)
        found.weight = Controlled(1.0)

    found.begin = controlled
    trainer.train()
    assert logged(trainer, "kl_weight") == [1.0, 0.5, 0.25, 0.125]
    assert trainer.state.stateful_callbacks["trl_ema"]["regularizers"]["teacher"]["weight"] == {"weight": 0.0625}
