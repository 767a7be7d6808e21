"""Texts of the model before training as further rows, held by their own divergence."""

import itertools
import math
import os
import shutil

import pytest
import torch
from conftest import adapter_weights, logged, lora, make_tokenizer, rows, tiny_model
from peft import get_peft_model
from trl import SFTTrainer

from trl_ema import MeanTeacherConfig
from trl_ema.regularizers.own_texts import FILE
from trl_ema.regularizers.rehearsal import Rehearsal
from trl_ema.schedules import BudgetedWeight
from trl_ema.texts import Sampling, load_texts, texts_path, write_texts


TEXTS = dict(rehearsal_num_texts=10, rehearsal_num_tokens=12)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rehearsing(make_trainer):
    def make(weight=2.0, **options):
        return make_trainer(**(dict(teacher="none", rehearsal_weight=weight) | TEXTS | options))

    return make


def of(trainer):
    return next(regularizer for regularizer in trainer.regularizers if isinstance(regularizer, Rehearsal))


def _micro_batches(trainer, number):
    """As `Trainer` draws them for the next step, after whatever it needs to have begun."""
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), number, trainer.args.device)
    trainer.current_gradient_accumulation_steps = number
    return [dict(batch) for batch in batches], items


def _sum_of_kl(trainer, ids):
    """Σ KL(before ‖ student) over every prediction of one text, float64."""
    inputs = {"input_ids": torch.tensor([ids])}
    now = trainer.model(**inputs).logits[0, :-1].double().log_softmax(-1)
    with torch.no_grad(), trainer.starting_point.activate():
        before = trainer.model(**inputs).logits[0, :-1].double().log_softmax(-1)
    return (before.exp() * (before - now)).sum()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("number", [1, 3], ids=["one micro-batch", "three"])
@pytest.mark.parametrize("teacher", ["none", "ema", "frozen"])
def test_loss_and_gradient_are_those_of_two_batches_apart(rehearsing, teacher, number, packing):
    options = dict(packing=True, max_length=32, per_device_train_batch_size=1) if packing else {}
    if teacher != "none":
        options["kl_weight"] = 0.0
    trainer = rehearsing(teacher=teacher, learning_rate=0.05, **options)
    trainer.train()  # away from the start
    trainer.model.train()
    rehearsal = of(trainer)
    batches, items = _micro_batches(trainer, number)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    first = rehearsal._first
    loss = sum(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items) for batch in batches)
    ours = torch.autograd.grad(loss, trained)
    taken = [rehearsal._text(place) for place in range(first, first + number * rehearsal.rows)]
    plain = SFTTrainer.compute_loss
    trainer.regularizers.clear()
    ce = sum(plain(trainer, trainer.model, dict(batch), num_items_in_batch=items) for batch in batches)
    kl = sum(_sum_of_kl(trainer, ids) for ids in taken) / sum(len(ids) - 1 for ids in taken)
    expected = torch.autograd.grad(ce.double() + 2.0 * kl, trained)
    assert kl > 1e-4
    torch.testing.assert_close(loss.double(), ce.double() + 2.0 * kl, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-6)


def test_a_batch_alone_is_divided_by_its_own_tokens(rehearsing):
    """Some models make `Trainer` pass no `num_items_in_batch`."""
    trainer = rehearsing(learning_rate=0.05)
    trainer.train()
    trainer.model.train()
    (batch,), _ = _micro_batches(trainer, 1)
    first = of(trainer)._first
    loss = trainer.compute_loss(trainer.model, dict(batch))
    taken = [of(trainer)._text(place) for place in range(first, first + of(trainer).rows)]
    kl = sum(_sum_of_kl(trainer, ids) for ids in taken) / sum(len(ids) - 1 for ids in taken)
    trainer.regularizers.clear()
    ce = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch))
    torch.testing.assert_close(loss.double(), ce.double() + 2.0 * kl, rtol=1e-5, atol=1e-6)


def test_it_is_zero_at_the_start_and_keeps_the_student_near(rehearsing):
    held, free = rehearsing(10.0, max_steps=12), rehearsing(1e-9, max_steps=12)
    for trainer in (held, free):
        trainer.train()
    assert logged(held, "rehearsal_kl")[0] == pytest.approx(0.0, abs=1e-7)
    assert 0 < logged(held, "rehearsal_kl")[-1] < 0.5 * logged(free, "rehearsal_kl")[-1]
    assert logged(held, "rehearsal_weight") == [10.0] * 12
    assert held.state.log_history[0]["num_tokens"] == free.state.log_history[0]["num_tokens"]


def test_off_is_plain_sft_bit_for_bit(make_trainer):
    ours, theirs = make_trainer(teacher="none"), make_trainer(trainer_class=SFTTrainer)
    for trainer in (ours, theirs):
        trainer.train()
    assert logged(ours, "loss") == logged(theirs, "loss") and ours.regularizers == []
    expected = adapter_weights(theirs)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(ours).items())


# Which texts


def test_all_texts_are_taken_before_any_is_taken_again(rehearsing):
    rehearsal = of(rehearsing())
    rehearsal.begin(rehearsing(), None) if rehearsal.texts is None else None
    texts = [tuple(ids) for ids in rehearsal.texts.ids]
    for begin in (0, 10, 20):
        assert sorted(tuple(rehearsal._text(place)) for place in range(begin, begin + 10)) == sorted(texts)
    orders = [[tuple(rehearsal._text(place)) for place in range(begin, begin + 10)] for begin in (0, 10)]
    assert orders[0] != orders[1]


def test_two_ranks_take_what_one_does(rehearsing, monkeypatch):
    trainer = rehearsing(per_device_train_batch_size=4)
    trainer.train()
    rehearsal = of(trainer)
    assert rehearsal.rows == 2 and rehearsal.taken == 4 * 2
    together = [rehearsal._text(place) for place in range(8)]
    rehearsal.rows = 1  # as with half the batch
    monkeypatch.setattr(MeanTeacherConfig, "world_size", 2)
    found = []
    for step in range(4):
        rehearsal._first = 2 * step
        found += list(itertools.chain(rehearsal._chosen(0, 0), rehearsal._chosen(0, 1)))
    assert found == together


@pytest.mark.parametrize("options", [{}, dict(gradient_accumulation_steps=2), dict(drift_budget=0.01)], ids=str)
def test_a_resumed_run_takes_the_texts_that_come_next_bit_for_bit(rehearsing, tmp_path, options):
    saving = dict(save_strategy="steps", save_steps=3, max_steps=6, **options)
    whole = rehearsing(output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    resumed = rehearsing(output_dir=str(tmp_path / "resumed"), **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for key in ("loss", "rehearsal_kl", "rehearsal_weight"):
        assert logged(resumed, key)[-3:] == logged(whole, key)[-3:], key
    expected = adapter_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items())
    assert of(resumed).taken == of(whole).taken


def test_other_texts_than_those_of_the_checkpoint_are_refused(rehearsing, tmp_path):
    rehearsing(save_strategy="steps", save_steps=2).train()
    other = tmp_path / "other.safetensors"
    model = get_peft_model(tiny_model(), lora())
    write_texts(model, make_tokenizer(), Sampling(num_texts=10, num_tokens=12, seed=5), str(other))
    trainer = rehearsing(rehearsal_texts=str(other))
    with pytest.raises(ValueError, match=f"other rehearsed texts than those of this run.*`rehearsal_texts`.*{FILE}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


def test_texts_are_written_once_for_a_model_and_kept_beside_the_run(rehearsing, tmp_path, monkeypatch):
    first = rehearsing()
    assert of(first).texts is None  # written when training begins
    first.train()
    kept = load_texts(str(tmp_path / "out" / FILE))
    assert len(kept.ids) == 10 and max(map(len, kept.ids)) <= 12
    monkeypatch.setattr("trl_ema.regularizers.own_texts.write_texts", lambda *_, **__: pytest.fail("written again"))
    shutil.rmtree(tmp_path / "out")
    again = rehearsing()
    again.train()
    assert of(again).texts.ids == kept.ids and os.path.isfile(tmp_path / "out" / FILE)
    assert os.path.isfile(texts_path(of(again).own.fingerprint, of(again).own.sampling))


# Bad input


def test_fewer_texts_than_a_micro_batch_takes_are_refused(rehearsing):
    with pytest.raises(ValueError, match="10 texts are fewer than the 16 that a micro-batch rehearses. Write more"):
        rehearsing(rehearsal_fraction=0.8).train()


def test_texts_longer_than_the_rows_are_refused(rehearsing):
    with pytest.raises(ValueError, match="has 12 tokens, `max_length` is 10. Raise it, or write texts with a lower"):
        rehearsing(max_length=10).train()


# The budget


@pytest.mark.parametrize("begin", [0.01, 1.0, 100.0])
def test_a_budget_is_met_where_the_divergence_falls_with_the_weight(begin):
    weight = BudgetedWeight(begin, budget=0.05)
    for step in range(400):
        weight.observe(0.1 / (1.0 + weight.value(step)))
    assert 0.1 / (1.0 + weight.value(400)) == pytest.approx(0.05, rel=0.05)


def test_the_weight_stays_within_its_bounds():
    low, high = BudgetedWeight(1.0, budget=0.05), BudgetedWeight(1.0, budget=0.05)
    for _ in range(1000):
        low.observe(0.0)
        high.observe(1e9)
    assert low.value(0) == 1e-3 and high.value(0) == 1e3


def test_a_budgeted_weight_goes_on_from_its_state():
    one, other = BudgetedWeight(1.0, 0.05), BudgetedWeight(1.0, 0.05)
    values = [0.3, 0.01, 0.2, 0.07]
    for value in values[:2]:
        one.observe(value)
    other.load(one.state())
    for value in values[2:]:
        one.observe(value)
        other.observe(value)
    assert one.value(4) == other.value(4) and math.isfinite(one.value(4))


def test_a_run_with_a_budget_logs_a_weight_that_moves(rehearsing):
    trainer = rehearsing(1.0, drift_budget=1e-4, max_steps=8, data=rows(32))
    trainer.train()
    weights = logged(trainer, "rehearsal_weight")
    assert weights[-1] > weights[0]  # the student is above so small a budget
