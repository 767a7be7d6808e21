"""Texts of the model before training as further rows, held by their own divergence."""

import errno
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import adapter_weights, logged, lora, make_tokenizer, rows, tiny_model
from peft import PromptTuningConfig, get_peft_model
from transformers import default_data_collator
from trl import SFTTrainer

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig
from trl_ema.data import as_chat, tokenize_rows
from trl_ema.files import OutputError
from trl_ema.regularizers import own_texts
from trl_ema.regularizers.own_texts import FILE
from trl_ema.regularizers.rehearsal import Rehearsal, _spread
from trl_ema.schedules import BudgetedWeight, SmoothedMean
from trl_ema.script import parse
from trl_ema.texts import Sampling, Texts, load_texts, save_texts, texts_path, write_texts


TEXTS = dict(rehearsal_num_texts=10, rehearsal_num_tokens=12)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def rehearsing(make_trainer):
    def make(weight=2.0, **options):
        written = {} if options.get("rehearsal_texts") else TEXTS
        return make_trainer(**(dict(teacher="none", rehearsal_weight=weight) | written | options))

    return make


def of(trainer):
    return next(regularizer for regularizer in trainer.regularizers if isinstance(regularizer, Rehearsal))


def text_at(rehearsal, place):
    """The text that is taken there, of all places of the run."""
    return rehearsal.texts.ids[rehearsal._order.number_at(place)]


def _micro_batches(trainer, number):
    """As `Trainer` draws them for the next step, after whatever it needs to have begun."""
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), number, trainer.args.device)
    trainer.current_gradient_accumulation_steps = number
    return [dict(batch) for batch in batches], items


def _sum_of_ce(trainer, ids):
    """Σ CE over every prediction of one text, float64."""
    ids = torch.tensor(ids, device=trainer.model.device)
    logits = trainer.model(input_ids=ids[None]).logits[0, :-1].double()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")


def _sum_of_kl(trainer, ids):
    """Σ KL(before ‖ student) over every prediction of one text, float64."""
    inputs = {"input_ids": torch.tensor([ids], device=trainer.model.device)}
    now = trainer.model(**inputs).logits[0, :-1].double().log_softmax(-1)
    with torch.no_grad(), trainer.starting_point.activate():
        before = trainer.model(**inputs).logits[0, :-1].double().log_softmax(-1)
    return (before.exp() * (before - now)).sum()


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("number", [1, 3], ids=["one micro-batch", "three"])
@pytest.mark.parametrize("teacher", ["none", "ema", "frozen"])
@pytest.mark.parametrize("kind", ["kl", "ce"])
def test_loss_and_gradient_are_those_of_two_batches_apart(rehearsing, kind, teacher, number, packing):
    options = dict(packing=True, max_length=32, per_device_train_batch_size=1) if packing else {}
    if teacher != "none":
        options["kl_weight"] = 0.0
    trainer = rehearsing(teacher=teacher, learning_rate=0.05, rehearsal_loss=kind, **options)
    trainer.train()  # away from the start
    trainer.model.train()
    rehearsal = of(trainer)
    batches, items = _micro_batches(trainer, number)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    first = rehearsal._first
    loss = sum(trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items) for batch in batches)
    ours = torch.autograd.grad(loss, trained)
    taken = [text_at(rehearsal, place) for place in range(first, rehearsal.taken)]
    plain = SFTTrainer.compute_loss
    trainer.regularizers.clear()
    ce = sum(plain(trainer, trainer.model, dict(batch), num_items_in_batch=items) for batch in batches)
    sum_of = _sum_of_kl if kind == "kl" else _sum_of_ce
    replay = sum(sum_of(trainer, ids) for ids in taken) / sum(len(ids) - 1 for ids in taken)
    expected = torch.autograd.grad(ce.double() + 2.0 * replay, trained)
    assert replay > 1e-4
    torch.testing.assert_close(loss.double(), ce.double() + 2.0 * replay, rtol=1e-5, atol=1e-6)
    found = rehearsal.metrics(trainer.accelerator.gather)
    assert found[f"rehearsal_{kind}"] == pytest.approx(replay.item(), rel=1e-4) and len(found) == 2
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
    taken = [text_at(of(trainer), place) for place in range(first, of(trainer).taken)]
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


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("fraction", [1.0, 0.5], ids=["all", "half"])
def test_a_teacher_that_is_the_base_and_rehearsal_share_a_pass(rehearsing, monkeypatch, packing, fraction):
    options = dict(padding_free=True, max_length=None) if packing else {}
    trainer = rehearsing(teacher="frozen", learning_rate=0.05, kl_fraction=fraction, **options)
    trainer.train()
    trainer.model.train()
    (batch,), items = _micro_batches(trainer, 1)
    trained, passes = [p for p in trainer.model.parameters() if p.requires_grad], []
    backbone = trainer.model.get_base_model().model
    backbone.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))

    def gradients():
        of(trainer)._micro_batch = 0
        trainer.regularizers[0]._micro_batch = (trainer.state.global_step, -1)  # the same draw
        passes.clear()
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        return loss, torch.autograd.grad(loss, trained)

    together = gradients()
    assert passes == [False, True]
    monkeypatch.setattr("trl_ema.forward._is_same", lambda *_: False)
    apart = gradients()
    assert passes == [False, False, True]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-7)


def _known_or_not(rehearsing, **options):
    """Loss and gradients of one micro-batch of a trained student, with what is known of the texts and by a pass; those passes."""
    trainer = rehearsing(learning_rate=0.05, max_steps=9, **options)
    trainer.train()
    trainer.model.train()
    (batch,), items = _micro_batches(trainer, 1)
    trained, passes = [p for p in trainer.model.parameters() if p.requires_grad], []
    trainer.model.get_base_model().model.register_forward_pre_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    found, known = [], of(trainer)._known
    for states in (known, None):
        of(trainer)._micro_batch, of(trainer)._known = 0, states
        torch.manual_seed(0)  # the student's dropout
        loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
        found.append((loss, *torch.autograd.grad(loss, trained)))
    assert [len(states) for states in known] == [len(ids) - 1 for ids in of(trainer).texts.ids]
    return found, passes


@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("of_base", [True, False], ids=["base", "adapter"])
def test_texts_taken_again_and_again_are_read_once_by_the_model_before(rehearsing, packing, of_base):
    options = dict(padding_free=True, max_length=None) if packing else {}
    if not of_base:  # with something random in it
        model = get_peft_model(tiny_model(), lora(lora_dropout=0.5, init_lora_weights=False))
        options |= dict(model=model, peft_config=None)
    (with_it, by_pass), passes = _known_or_not(rehearsing, **options)
    assert passes == [True, False, True]
    torch.testing.assert_close(with_it, by_pass, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reason", ["few taken", "a trained head", "too many", "replay"])
def test_the_model_before_passes_over_each_micro_batch_where_its_states_are_not_kept(rehearsing, monkeypatch, reason):
    options = dict(max_steps=9)
    if reason == "few taken":
        options |= dict(max_steps=2)
    if reason == "a trained head":
        options |= dict(peft_config=lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    if reason == "too many":
        monkeypatch.setattr("trl_ema.regularizers.known_states.MOST_BYTES", 1000)
    if reason == "replay":
        options |= dict(rehearsal_loss="ce")
    trainer = rehearsing(**options)
    trainer.train()
    assert of(trainer)._known is None


def test_the_model_before_training_has_nothing_random(rehearsing):
    """NEFTune's noise and an adapter's dropout are the student's alone."""
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.5, init_lora_weights=False))
    trainer = rehearsing(model=model, peft_config=None, neftune_noise_alpha=5.0, max_steps=1)
    trainer.train()
    trainer.model.train()
    ids = torch.tensor([[1, 7, 9]], device=trainer.model.device)
    with torch.no_grad(), trainer.starting_point.activate():
        one, other = (trainer.model(input_ids=ids).logits for _ in range(2))
    assert torch.equal(one, other)


def test_a_head_that_is_trained_on_is_the_one_of_before_in_the_pass_of_before(rehearsing):
    model = get_peft_model(tiny_model(), lora(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    trainer = rehearsing(model=model, peft_config=None, learning_rate=0.05)
    trainer.train()
    assert not trainer.starting_point.is_base
    trainer.model.train()
    (batch,), items = _micro_batches(trainer, 1)
    taken = [text_at(of(trainer), place) for place in range(of(trainer)._first, of(trainer).taken)]
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=items)
    kl = sum(_sum_of_kl(trainer, ids) for ids in taken) / sum(len(ids) - 1 for ids in taken)
    trainer.regularizers.clear()
    ce = SFTTrainer.compute_loss(trainer, trainer.model, dict(batch), num_items_in_batch=items)
    assert kl > 1e-3
    torch.testing.assert_close(loss.double(), ce.double() + 2.0 * kl, rtol=1e-5, atol=1e-6)


# Given texts


def general(kind="text", number=12):
    return rows(number, seed=7, kind=kind)


@pytest.mark.parametrize("kind", ["text", "messages", "prompt_completion"])
def test_given_texts_are_rehearsed_whole(rehearsing, tokenizer, kind):
    trainer = rehearsing(rehearsal_dataset=general(kind), max_steps=2)
    texts = of(trainer).texts.ids
    assert len(texts) == 10 and of(trainer).own is None
    whole = {tuple(ids[:12]) for ids in tokenize_rows(general(kind), tokenizer)["input_ids"]}
    assert {tuple(ids) for ids in texts} < whole
    trainer.train()
    assert logged(trainer, "rehearsal_kl")[-1] > 0


def test_a_file_of_given_texts_is_read_as_training_data_are(rehearsing, tokenizer, tmp_path):
    path = str(tmp_path / "rows.jsonl")
    general("prompt_completion").to_json(path)
    trainer = rehearsing(rehearsal_dataset=path)
    chats = as_chat(general("prompt_completion"), tokenizer)
    whole = {tuple(ids[:12]) for ids in tokenize_rows(chats, tokenizer)["input_ids"]}
    assert {tuple(ids) for ids in of(trainer).texts.ids} < whole


def test_given_texts_need_no_adapter_to_be_replayed(rehearsing):
    options = dict(rehearsal_dataset=general(), peft_config=None)
    trainer = rehearsing(rehearsal_loss="ce", max_steps=2, **options)
    trainer.train()
    assert len(logged(trainer, "rehearsal_ce")) == 2
    with pytest.raises(ValueError, match="needs a model with a PEFT adapter.*or rehearse a `rehearsal_dataset` with"):
        rehearsing(**options)
    with pytest.raises(ValueError, match="needs a model with a PEFT adapter"):
        rehearsing(rehearsal_loss="ce", peft_config=None)


def test_a_stream_gives_its_first_texts_and_a_text_may_have_another_name(rehearsing, tokenizer):
    named = general().rename_column("text", "words")
    trainer = rehearsing(rehearsal_dataset=named.to_iterable_dataset(), dataset_text_field="words", data=named)
    whole = tokenize_rows(general(), tokenizer)["input_ids"]
    assert of(trainer).texts.ids == [ids[:12] for ids in whole[:10]]


def test_given_texts_go_on_where_the_run_was_and_others_are_refused(rehearsing, tmp_path):
    saving = dict(save_strategy="steps", save_steps=2, max_steps=4, rehearsal_dataset=general())
    whole = rehearsing(**saving)
    whole.train()
    resumed = rehearsing(output_dir=str(tmp_path / "resumed"), seed=42, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(resumed, "rehearsal_kl")[-2:] == logged(whole, "rehearsal_kl")[-2:]
    other = rehearsing(**saving | dict(rehearsal_dataset=rows(12, seed=8, kind="text")))
    with pytest.raises(
        ValueError, match="other rehearsed texts than those .* its own `rehearsal_dataset`, with the same"
    ):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))


@pytest.mark.parametrize(
    "options, error, match",
    [
        (dict(rehearsal_weight=0.0), ValueError, "`rehearsal_dataset` is given, and `rehearsal_weight` is 0"),
        (dict(rehearsal_texts="texts"), ValueError, "trainer's `rehearsal_dataset` and the option `rehearsal_texts='texts'` both"),
        (dict(rehearsal_dataset=[{"text": "a"}]), TypeError, "`rehearsal_dataset` must be a `Dataset` or"),
        (dict(rehearsal_dataset=datasets.Dataset.from_dict({"a": ["b"]})), ValueError, r"Unknown data set columns \['a'\]"),
        (dict(rehearsal_dataset=general().select(range(1))), ValueError, "1 texts are fewer than the 2 that a micro-batch"),
        (dict(rehearsal_dataset="none.jsonl"), FileNotFoundError, "There is no data file 'none.jsonl'"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Ignored with")
def test_given_texts_that_cannot_be_are_refused(rehearsing, options, error, match):
    with pytest.raises(error, match=match):
        rehearsing(**dict(rehearsal_dataset=general()) | options)


def test_rows_without_two_tokens_are_refused(rehearsing):
    empty = datasets.Dataset.from_dict({"input_ids": [[1], [2]], "labels": [[1], [2]]})
    with pytest.raises(ValueError, match="None of the 2 rows to rehearse has two tokens"):
        rehearsing(rehearsal_dataset=empty)


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
        assert sorted(tuple(text_at(rehearsal, place)) for place in range(begin, begin + 10)) == sorted(texts)
    orders = [[tuple(text_at(rehearsal, place)) for place in range(begin, begin + 10)] for begin in (0, 10)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("fraction", [1 / 3, 0.2, 0.05])
@pytest.mark.parametrize("rows, micro_batches, ranks", [(4, 1, 2), (2, 2, 2), (1, 2, 4), (1, 1, 8), (2, 4, 1)])
def test_however_a_full_batch_is_cut_it_takes_the_same_texts(
    rehearsing, monkeypatch, fraction, rows, micro_batches, ranks
):
    trainer = rehearsing(per_device_train_batch_size=8, rehearsal_fraction=fraction)
    trainer.train()
    rehearsal = of(trainer)
    number = rehearsal._counts[0]
    together = [text_at(rehearsal, place) for place in range(4 * number)]
    assert rehearsal.taken == 4 * number
    monkeypatch.setattr(MeanTeacherConfig, "world_size", ranks)
    rehearsal.taken, rehearsal.per_micro_batch = 0, rehearsal.per_micro_batch * rows / 8
    found = []
    for step in range(4):
        rehearsal.before_step([{}] * micro_batches, step, trainer.args.device, None)
        for i in range(micro_batches):
            found += [text for rank in range(ranks) for text in rehearsal._texts(rehearsal._chosen(i, rank))]
    assert found == together and rehearsal.taken == 4 * number


@pytest.mark.parametrize("ranks, counts", [(1, [1]), (2, [0, 1]), (4, [0, 0, 0, 1])])
def test_ranks_without_a_text_do_not_lower_the_weight_where_each_has_its_own_mean(
    rehearsing, monkeypatch, ranks, counts
):
    """Its loss is divided by DDP once more, by the number of ranks."""
    trainer = rehearsing(rehearsal_fraction=0.05, per_device_train_batch_size=1)
    trainer.train()
    monkeypatch.setattr(MeanTeacherConfig, "world_size", ranks)
    monkeypatch.setattr(MeanTeacherConfig, "process_index", ranks - 1)
    batches, items = _micro_batches(trainer, 1)
    of(trainer).before_step(batches, 9, trainer.args.device, None)
    assert of(trainer)._counts == counts
    ((term,),) = [of(trainer).add_rows(dict(batch), 9, items)[1] for batch in batches]
    (text,) = of(trainer)._texts(of(trainer)._chosen(0, ranks - 1))
    assert term.weight / ranks == pytest.approx(2.0 / (len(text) - 1))


def test_as_many_texts_are_on_each_rank_where_weights_are_sharded(rehearsing, monkeypatch):
    rehearsal = of(rehearsing(per_device_train_batch_size=1, rehearsal_fraction=0.2))
    monkeypatch.setattr(MeanTeacherConfig, "world_size", 4)
    assert rehearsal._counts_of(2) == [0, 1, 0, 1, 0, 0, 0, 0]
    rehearsal._alike = True
    assert rehearsal._counts_of(2) == [0] * 4 + [1] * 4 and rehearsal._taken_in(1) == 4


@pytest.mark.parametrize(
    ("mean", "micro_batches", "ranks", "expected"),
    [
        (2, 3, 1, [2, 2, 2]), (0.5, 8, 1, [0, 1] * 4), (1.5, 2, 1, [1, 2]), (0.01, 3, 1, [0, 0, 1]), (0.01, 1, 1, [1]),
        (1.97, 1, 1, [2]), (2.5, 1, 2, [2, 3]), (0.5, 2, 4, [0] * 4 + [1] * 4), (0.1, 2, 2, [0, 1, 0, 0]), (0.49254, 8, 2, [0, 0, 1, 1] * 4),
        (1.2, 2, 2, [1, 2, 1, 1]), (7.5, 1, 1, [8]), (1.5, 5, 1, [1, 2, 1, 2, 2]), (0.75 * 3, 1, 4, [2, 2, 2, 3]),
    ],
)  # fmt: skip
def test_a_step_has_the_share_of_texts_that_was_asked_for_however_it_is_cut(mean, micro_batches, ranks, expected):
    assert _spread(mean, micro_batches, ranks) == expected


def test_micro_batches_without_a_text_leave_the_mean_of_a_step(rehearsing):
    """A mean of each micro-batch where there is no `num_items_in_batch`; `Trainer` then divides by their number."""
    trainer = rehearsing(gradient_accumulation_steps=2, rehearsal_fraction=0.05, learning_rate=0.05)
    trainer.train()
    batches, _ = _micro_batches(trainer, 2)
    assert of(trainer)._counts == [0, 1]
    divergences = [of(trainer).add_rows(dict(batch), 9, None)[1] for batch in batches]
    (text,) = (text_at(of(trainer), place) for place in range(of(trainer)._first, of(trainer).taken))
    assert divergences[0] == [] and divergences[1][0].weight == pytest.approx(2.0 * 2 / (len(text) - 1))


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


def test_a_refused_resume_writes_no_texts_and_leaves_those_beside_the_run(rehearsing, tmp_path, monkeypatch):
    rehearsing(save_strategy="steps", save_steps=2).train()
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "another"))
    kept = (tmp_path / "out" / FILE).read_bytes()
    trainer = rehearsing(rehearsal_num_texts=12)
    monkeypatch.setattr(
        "trl_ema.regularizers.own_texts.write_texts", lambda *_, **__: pytest.fail("texts were written")
    )
    with pytest.raises(ValueError, match="other rehearsed texts than those of this run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert (tmp_path / "out" / FILE).read_bytes() == kept


def test_the_weight_holds_no_number_that_fsdp2_would_round(rehearsing):
    trainer = rehearsing(max_steps=1)
    trainer.train()
    rehearsal = of(trainer)
    batch = {name: torch.ones(2, 5, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}
    rehearsal.before_step([batch], 0, torch.device("cpu"), None)
    (term,) = rehearsal.add_rows(batch, 0, torch.tensor(8))[1]
    assert type(term.weight) is float and term.times.dtype == torch.int64 and int(term.times) == 8


def test_other_texts_than_those_of_the_checkpoint_are_refused(rehearsing, tmp_path):
    rehearsing(save_strategy="steps", save_steps=2).train()
    other = tmp_path / "other.safetensors"
    model = get_peft_model(tiny_model(), lora())
    write_texts(model, make_tokenizer(), Sampling(num_texts=10, num_tokens=12, seed=5), str(other))
    trainer = rehearsing(rehearsal_texts=str(other))
    before = adapter_weights(trainer)
    with pytest.raises(ValueError, match=f"other rehearsed texts than those of this run.*`rehearsal_texts`.*{FILE}"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    # before anything was loaded
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(trainer).items())
    assert trainer.resumed_from is None


def test_texts_of_another_sampling_beside_the_run_are_not_taken(rehearsing, tmp_path):
    first = rehearsing(max_steps=1)
    first.train()
    second = rehearsing(max_steps=1, rehearsal_chat=False)
    second.train()
    assert {*of(second).texts.kinds} == {"raw"} != {*of(first).texts.kinds}
    assert load_texts(str(tmp_path / "out" / FILE)) == of(second).texts


def test_texts_of_another_model_beside_the_run_are_refused_with_what_to_do(rehearsing, tmp_path):
    rehearsing(max_steps=1).train()
    beside = tmp_path / "out" / FILE
    texts = load_texts(beside)
    save_texts(Texts(texts.ids, texts.kinds, texts.about | {"fingerprint": "0-0"}), beside)
    with pytest.raises(
        ValueError, match=f"{FILE} was written by another model.*or none, and leave none in the output folder"
    ):
        rehearsing()


def test_a_damaged_file_beside_the_run_gives_way_to_the_texts_that_are_given(rehearsing, tmp_path):
    rehearsing(max_steps=1).train()
    beside, given = tmp_path / "out" / FILE, tmp_path / "given.safetensors"
    shutil.copy(beside, given)
    beside.write_bytes(beside.read_bytes()[:100])
    trainer = rehearsing(rehearsal_texts=str(given), max_steps=1)
    trainer.train()
    assert load_texts(beside) == load_texts(given) == of(trainer).texts


@pytest.mark.parametrize("chat, kinds", [(None, {"raw", "chat"}), (True, {"chat"}), (False, {"raw"})])
def test_one_kind_of_texts_can_be_asked_for(rehearsing, chat, kinds):
    trainer = rehearsing(rehearsal_chat=chat, max_steps=1)
    trainer.train()
    assert {*of(trainer).texts.kinds} == kinds


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


def test_fewer_texts_than_a_micro_batch_takes_are_refused_before_they_are_written(rehearsing):
    with pytest.raises(
        ValueError, match="10 texts are fewer than the 16 that a micro-batch rehearses. Give or write more"
    ):
        rehearsing(rehearsal_fraction=0.8)


def test_virtual_tokens_are_refused(rehearsing):
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="PROMPT_TUNING is prompt learning: rehearsal and entropy weighting count"):
        rehearsing(peft_config=prompt)


def test_texts_longer_than_the_rows_are_refused(rehearsing, tmp_path):
    rehearsing(max_steps=1).train()
    texts = str(tmp_path / "out" / FILE)
    with pytest.raises(ValueError, match="has 12 tokens, `max_length` is 10. Raise it, or write texts with a lower"):
        rehearsing(max_length=10, rehearsal_texts=texts)


def test_a_model_that_could_not_write_is_refused_before_the_training(rehearsing):
    with pytest.raises(ValueError, match=r"`start_token='<doc>'` \(`rehearsal_start` in training\) is no token"):
        rehearsing(rehearsal_start="<doc>")
    with pytest.raises(ValueError, match="`num_tokens=200` .* is more than the 128 positions"):
        rehearsing(rehearsal_num_tokens=200, max_length=None)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (dict(rehearsal_weight=1.0), ValueError, "`rehearsal_weight` needs a model with a PEFT adapter"),
        (dict(l2_weight=1.0), ValueError, "hold the weights of a PEFT adapter, and the model has none"),
        (
            dict(rehearsal_weight=1.0, rehearsal_texts="no.safetensors"),
            FileNotFoundError,
            "There are no texts in no.safet",
        ),
        (
            dict(ewc_weight=1.0, rehearsal_texts="no.safetensors"),
            FileNotFoundError,
            "There are no texts in no.safetensors",
        ),
        (
            dict(rehearsal_weight=1.0, rehearsal_dataset="no.jsonl"),
            FileNotFoundError,
            "There is no data file 'no.jsonl'",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_a_model_is_loaded(tmp_path, options, error, match):
    args = MeanTeacherConfig(str(tmp_path / "out"), teacher="none", use_cpu=True, bf16=False, **options)
    adapter = None if error is ValueError else lora()
    with pytest.raises(error, match=match):
        EMARegularizedSFTTrainer("no/model", args, train_dataset=rows(4), peft_config=adapter)


def test_a_model_that_could_not_write_is_refused_before_its_weights_are_read(rehearsing, monkeypatch):
    monkeypatch.setattr(own_texts, "model_fingerprint", lambda *_: pytest.fail("the weights were read"))
    with pytest.raises(ValueError, match="`start_token='<doc>'`"):
        rehearsing(rehearsal_start="<doc>")


def test_a_start_that_zero3_could_not_put_back_is_refused(rehearsing):
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False))
    rehearsal = of(rehearsing(model=model, peft_config=None))
    state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config={}))
    with pytest.raises(ValueError, match="Under ZeRO-3 the model before training is a base alone"):
        rehearsal.begin(SimpleNamespace(accelerator=SimpleNamespace(state=state)))


def test_a_disk_that_is_full_for_texts_loses_nothing(rehearsing, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trainer = rehearsing()
    before = adapter_weights(trainer)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="Cannot write texts to .*No space left on device.*goes on from there"):
        trainer.train()
    assert all(torch.equal(weight, before[name]) for name, weight in adapter_weights(trainer).items())
    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    trainer.train()
    assert len(of(trainer).texts.ids) == 10 and trainer.state.global_step == 4


def test_a_disk_that_is_full_beside_the_run_leaves_the_texts_in_the_cache(rehearsing, tmp_path, monkeypatch):
    write_bytes = Path.write_bytes

    def full(self, data):
        if tmp_path / "out" in self.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    trainer = rehearsing()
    with pytest.raises(
        OutputError, match=f"Cannot write texts to .*No space left.*stay in {tmp_path / 'cache' / 'texts'}"
    ):
        trainer.train()
    assert len(load_texts(texts_path(of(trainer).own.fingerprint, of(trainer).own.sampling)).ids) == 10


# The budget


@pytest.mark.parametrize("begin", [0.05, 1.0, 100.0])
def test_a_budget_is_met_where_the_divergence_falls_with_the_weight(begin):
    weight = BudgetedWeight(begin, budget=0.05, total_steps=400)
    for step in range(400):
        weight.observe(0.1 / (1.0 + weight.value(step)), step + 1)
    assert 0.1 / (1.0 + weight.value(400)) == pytest.approx(0.05, rel=0.05)


@pytest.mark.parametrize("budget", [0.01, 0.03, 0.1])
def test_a_budget_is_met_by_a_student_that_follows_late_and_whose_divergence_falls(budget):
    """As on a short run: eight steps behind its weight, and with the learning rate a quarter is left of the divergence."""
    weight, follows, found = BudgetedWeight(4.0, budget, 120), math.log(4.0), []
    for step in range(120):
        follows += (math.log(weight.value(step)) - follows) / 8
        found.append(0.07 * math.exp(-0.5 * follows) * 2 ** (1 - step / 60) * (1 - math.exp(-(step + 1) / 8)) ** 2)
        weight.observe(found[-1], step + 1)
    assert sum(found[-10:]) / 10 == pytest.approx(budget, rel=0.15)


@pytest.mark.parametrize("total_steps", [120, 300, 1000])
@pytest.mark.parametrize("budget", [0.03, 0.1, 0.2])
def test_a_budget_is_met_by_a_student_that_is_noisy_while_its_learning_rate_is_high(budget, total_steps):
    """
    As measured on the demo model: a part of the divergence is noise that goes with the learning rate and with no weight; the rest
    rises slowly, is pressed down at once, and stays where it is when the learning rate is near zero.
    """
    weight, noise, learned, found = BudgetedWeight(4.0, budget, total_steps), 0.0, 1e-6, []
    for step in range(total_steps):
        rate = (1 + math.cos(math.pi * step / total_steps)) / 2
        rise = 0.006 * math.exp(-step / total_steps) * max(0.0, 1 - learned / 0.45)
        press = min(8.3 * weight.value(step) * learned**2.38, learned)
        learned = max(learned + rate * (rise - press), 1e-6)
        noise += (rate * (0.01 + 0.6 * learned) - noise) / 5
        found.append(learned + noise)
        weight.observe(found[-1], step + 1)
    assert sum(found[-10:]) / 10 == pytest.approx(budget, rel=0.15)


def test_the_weight_stays_within_its_bounds():
    low, high = (BudgetedWeight(1.0, budget=0.05, total_steps=1000) for _ in range(2))
    for step in range(1, 1001):
        low.observe(0.0, step)
        high.observe(1e9, step)
    assert low.value(0) == 1e-3 and high.value(0) == 30


def test_a_budgeted_weight_goes_on_from_its_state():
    one, other = BudgetedWeight(1.0, 0.05, 8), BudgetedWeight(1.0, 0.05, 8)
    values = [0.3, 0.01, 0.2, 0.07]
    for step, value in enumerate(values[:2], start=1):
        one.observe(value, step)
    other.load(one.state())
    for step, value in enumerate(values[2:], start=3):
        one.observe(value, step)
        other.observe(value, step)
    assert one.value(4) == other.value(4) and math.isfinite(one.value(4))


def test_a_run_with_a_budget_logs_a_weight_that_moves(rehearsing):
    trainer = rehearsing(1.0, drift_budget=1e-4, max_steps=8, data=rows(32))
    trainer.train()
    weights = logged(trainer, "rehearsal_weight")
    assert weights[-1] > weights[0]  # the student is above so small a budget


@pytest.mark.parametrize(("budget", "told"), [(1e-4, True), (1e-9, True), (None, False)])
def test_who_ends_far_from_the_budget_is_told(rehearsing, caplog, budget, told):
    rehearsing(1.0, drift_budget=budget, max_steps=4).train()
    assert (
        re.search(r"ends at \S+ nats per token, `drift_budget` is .* Begin with `rehearsal_weight=", caplog.text)
        is not None
    ) == told


def test_who_ends_at_the_budget_is_told_nothing(rehearsing, caplog):
    free = rehearsing(1.0, max_steps=4)
    free.train()
    mean = SmoothedMean()
    found = [mean.add(value) for value in logged(free, "rehearsal_kl")][-1]
    held = rehearsing(1.0, drift_budget=found, max_steps=4)
    held.train()
    assert "nats per token, `drift_budget` is" not in caplog.text


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        (dict(drift_budget=0.1), "`drift_budget`"),
        (dict(max_drift=9), "`max_drift`"),
        (dict(drift_budget=0.1, max_drift=9), "`drift_budget` and `max_drift`"),
    ],
)
@pytest.mark.parametrize(("texts", "told"), [(3, True), (4, False)])
def test_a_limit_that_goes_by_texts_seen_before_is_told(rehearsing, tmp_path, caplog, texts, told, limits, named):
    options = dict(rehearsal_num_texts=texts, rehearsal_fraction=0.2, max_steps=4)
    rehearsing(1.0, **limits, **options).train()
    assert (f"The run takes 4 texts and there are 3. Of {named} the measure is then the drift" in caplog.text) == told
    assert ("with `rehearsal_num_texts=4` each is new" in caplog.text) == told
    given = dict(rehearsal_texts=str(tmp_path / "out" / FILE), rehearsal_fraction=0.2, max_steps=4)
    rehearsing(1.0, **limits, **given).train()
    assert ("with 4 texts in the file each is new" in caplog.text) == told
    caplog.clear()
    rehearsing(1.0, **options).train()
    assert "The run takes" not in caplog.text


@pytest.mark.parametrize("loss", ["kl", "ce"])
@pytest.mark.parametrize(("steps", "told"), [(40, False), (41, True)])
def test_texts_that_are_seen_more_often_than_was_measured_are_told(rehearsing, tmp_path, caplog, steps, told, loss):
    options = dict(rehearsal_fraction=0.2, max_steps=steps, rehearsal_loss=loss)
    trainer = rehearsing(1.0, rehearsal_num_texts=2, **options)
    trainer.train()
    assert ("takes 41 texts and there are 2, so that each is seen 20.5 times" in caplog.text) == told
    assert ("Give at least `rehearsal_num_texts=3`." in caplog.text) == told
    caplog.clear()
    rows(2, kind="text").to_json(tmp_path / "few.jsonl")
    rehearsing(1.0, rehearsal_dataset=str(tmp_path / "few.jsonl"), **options).train()
    assert ("Give at least 3 rows in `rehearsal_dataset`." in caplog.text) == told
    assert of(trainer).times_seen(steps, 1, False) == steps / 2 and of(trainer).times_seen(steps, 4, True) == 2 * steps
    options = dict(rehearsal_fraction=0.33, per_device_train_batch_size=1, max_steps=steps, rehearsal_loss=loss)
    trainer = rehearsing(1.0, rehearsal_num_texts=2, **options)
    assert of(trainer).times_seen(6, 8, False) == 6 * 4 / 2  # half a text for each row
    assert of(trainer).times_seen(6, 8, True) == 6 * 8 / 2  # one at least
    rehearsing(1.0, rehearsal_texts=str(tmp_path / "out" / FILE), **options).train()
    assert ("Give at least 3 texts in the file." in caplog.text) == told


@pytest.mark.parametrize(
    ("fraction", "rows", "told"),
    [
        (0.1, 4, "rehearses 1 whole text on 1 process, where `rehearsal_fraction=0.1` of its rows would be 0.44"),
        (0.33, 3, "rehearses 1 whole text on 1 process, where `rehearsal_fraction=0.33` of its rows would be 1.5"),
        (0.2, 4, None),
        (0.33, 4, None),
    ],
)
def test_a_share_that_is_another_for_want_of_rows_is_told(rehearsing, caplog, fraction, rows, told):
    rehearsing(1.0, rehearsal_fraction=fraction, per_device_train_batch_size=rows, max_steps=1).train()
    assert ("whole text" in caplog.text) == bool(told) and (told or "") in caplog.text


def test_the_share_stays_where_a_smaller_batch_is_looked_for(rehearsing, monkeypatch):
    """Also the texts are fewer then, which memory was short for too."""
    tried, compute_loss = [], SFTTrainer.compute_loss

    def limited(self, model, inputs, *args, **kwargs):
        tried.append(len(inputs["input_ids"]))
        if tried[-1] > 4:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SFTTrainer, "compute_loss", limited)
    trainer = rehearsing(auto_find_batch_size=True, per_device_train_batch_size=8, rehearsal_fraction=0.5, max_steps=2)
    trainer.train()
    assert of(trainer)._counts == [4] and tried[:1] == [8] and max(tried[-2:]) == 4


@pytest.mark.parametrize("limit", [dict(drift_budget=0.1), dict(max_drift=0.1), {}], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("lora_dropout=0.1", dict(peft_config=lora(lora_dropout=0.1))),
        ("attention_dropout=0.2", dict(model=tiny_model("llama", attention_dropout=0.2))),
        ("neftune_noise_alpha=5", dict(neftune_noise_alpha=5)),
        (None, dict(model=tiny_model("gpt_neox", classifier_dropout=0.1, attention_dropout=0.0, hidden_dropout=0.0))),
        (None, {}),
    ],
    ids=str,
)
def test_a_limit_of_what_is_measured_with_noise_is_told(rehearsing, caplog, limit, name, options):
    """At a rate of 0 nothing drifts."""
    trainer = rehearsing(1.0, max_steps=1, learning_rate=0.0, **options, **limit)
    trainer.train()
    assert (f"With `{name}` the student's pass is a random one" in caplog.text) == bool(name and limit)
    assert (logged(trainer, "rehearsal_kl")[0] > 1e-6) == (name not in (None, "lora_dropout=0.1"))


def test_rows_that_do_not_tell_their_padding_are_refused(rehearsing):
    data = datasets.Dataset.from_list([dict(input_ids=[7, 8, 9, 10], labels=[7, 8, 9, 10])] * 8)
    trainer = rehearsing(data=data, dataset_kwargs=dict(skip_prepare_dataset=True), max_steps=1)
    trainer.data_collator = default_data_collator
    with pytest.raises(
        ValueError, match=r"gave 4 rows of 4 tokens as \['input_ids', 'labels'\]: texts are rehearsed beside rows"
    ):
        trainer.train()


def test_texts_to_write_are_no_longer_than_a_row_and_given_ones_are_cut(rehearsing):
    with pytest.raises(
        ValueError, match="`rehearsal_num_tokens=12` is more than `max_length=10`, which no row may pass. Low"
    ):
        rehearsing(max_length=10)
    trainer = rehearsing(max_length=10, rehearsal_dataset=general(), max_steps=1)
    trainer.train()
    assert max(map(len, of(trainer).texts.ids)) == 10


# A limit


def test_training_saves_and_stops_where_the_smoothed_divergence_is_above_its_limit(rehearsing, tmp_path, caplog):
    free = rehearsing(0.1, max_steps=12)
    free.train()
    mean = SmoothedMean()
    smoothed = [mean.add(value) for value in logged(free, "rehearsal_kl")]
    limit = (smoothed[5] + smoothed[6]) / 2
    options = dict(max_steps=12, max_drift=limit, save_strategy="steps", save_steps=4)
    held = rehearsing(0.1, output_dir=str(tmp_path / "held"), **options)
    held.train()
    assert held.state.global_step == 7 and os.path.isdir(tmp_path / "held" / "checkpoint-7")
    assert "The drift on rehearsed texts is" in caplog.text
    resumed = rehearsing(0.1, output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "held" / "checkpoint-4"))
    assert resumed.state.global_step == 7


def test_what_stops_above_max_drift_is_saved_also_where_the_best_alone_is(rehearsing, tmp_path):
    trainer = rehearsing(
        max_steps=8, max_drift=1e-9, save_strategy="best", metric_for_best_model="loss", greater_is_better=True,
        eval_strategy="steps", eval_steps=1, eval_dataset=rows(4),
    )  # fmt: skip
    trainer.train()
    assert trainer.state.global_step < 8
    assert (tmp_path / "out" / f"checkpoint-{trainer.state.global_step}").is_dir()


def test_a_step_whose_divergence_is_no_number_does_not_stay_in_the_drift(rehearsing):
    trainer = rehearsing(max_drift=10.0, max_steps=2)
    trainer.train()
    rehearsal, stops = of(trainer), trainer.control.should_training_stop
    trainer.control.should_training_stop = False
    kept, nan = rehearsal.smoothed.state(), torch.tensor(float("nan"))
    rehearsal.observe([(nan, torch.tensor(4))])
    rehearsal.after_step(2, lambda sums: sums)
    assert rehearsal.smoothed.state() == kept and stops and not trainer.control.should_training_stop
    rehearsal.observe([(nan, torch.tensor(4))])  # in a step that the optimizer skips
    rehearsal.before_step([], 2, trainer.args.device, None)
    assert rehearsal.loss_of_step.sums.tolist() == [0, 0]


def test_replayed_texts_watch_no_drift(rehearsing):
    with pytest.raises(ValueError, match="`max_drift=0.1`, but nothing measures the drift during training"):
        rehearsing(rehearsal_loss="ce", max_drift=0.1).train()


def test_texts_longer_than_a_row_are_refused_by_the_command_line_before_anything_is_read(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--rehearsal_weight", "4", "--max_length", "64", "--use_cpu", "true"]
    with pytest.raises(ValueError, match="`rehearsal_num_tokens=96` is more than `max_length=64`"):
        parse(arguments)
