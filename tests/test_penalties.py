"""Penalties on the trained weights, against plain float64 arithmetic; the Fisher information, against gradients text by text."""

import itertools
import os
from types import SimpleNamespace

import pytest
import torch
from conftest import adapter_weights, logged, lora, make_tokenizer, tiny_model
from peft import get_peft_model
from safetensors.torch import load, load_file, save_file
from trl import SFTTrainer

from trl_ema.adapters.names import trained_names
from trl_ema.fingerprint import model_fingerprint
from trl_ema.regularizers.own_texts import FILE
from trl_ema.regularizers.penalties import EWC, L2SP, L1Penalty, squared_scores
from trl_ema.regularizers.rehearsal import Rehearsal
from trl_ema.texts import Sampling, Texts, _write_chats, drawn_labels, load_texts, write_texts


TEXTS = dict(rehearsal_num_texts=10, rehearsal_num_tokens=24)
ALL = dict(l1_weight=1e-3, l2_weight=0.1, ewc_weight=2.0)


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def held(make_trainer):
    def make(**options):
        texts = TEXTS if options.get("ewc_weight") or options.get("rehearsal_weight") else {}
        return make_trainer(**(dict(teacher="none") | texts | options))

    return make


def double_model(**changes):
    return get_peft_model(tiny_model(), lora(**changes)).double()


def trained(model):
    return [model.get_parameter(name) for name in trained_names(model)]


def _score(model, ids, labels):
    """∂ Σ_t log p(y_t) / ∂θ of one text, from all its logits."""

    def log_probability(parameters):
        logits = torch.func.functional_call(model, parameters, kwargs={"input_ids": torch.tensor([ids])}).logits[0]
        log_p = logits.log_softmax(-1)
        return sum(log_p[place - 1, label] for place, label in enumerate(labels) if label != -100)

    return torch.func.grad(log_probability)(dict(zip(trained_names(model), trained(model), strict=True)))


# The penalties


@pytest.mark.parametrize(
    ("make", "omega", "gradient"),
    [
        (L1Penalty, lambda by, fisher: by.abs().sum(), lambda by, fisher: by.sign()),
        (L2SP, lambda by, fisher: by.square().sum() / 2, lambda by, fisher: by),
        (
            lambda model, weight: EWC(model, weight, None, 1),
            lambda by, fisher: (fisher * by**2).sum() / 2,
            lambda by, fisher: fisher * by,
        ),
    ],
    ids=["l1", "l2", "ewc"],
)
def test_value_and_gradient_are_those_of_the_formula(make, omega, gradient):
    model = double_model()
    penalty = make(model, 0.3)
    torch.manual_seed(0)
    moved = [torch.randn_like(p) for p in trained(model)]
    fisher = [torch.rand_like(p) for p in trained(model)]
    penalty.fisher = dict(zip(penalty.start, fisher, strict=True))
    assert penalty.penalty(0) == 0
    with torch.no_grad():
        for parameter, by in zip(trained(model), moved, strict=True):
            parameter.add_(by)
    value = penalty.penalty(1)
    expected = [omega(by, of_it) for by, of_it in zip(moved, fisher, strict=True)]
    torch.testing.assert_close(value, 0.3 * sum(expected), rtol=1e-12, atol=0)
    for found, by, of_it in zip(torch.autograd.grad(value, trained(model)), moved, fisher, strict=True):
        torch.testing.assert_close(found, 0.3 * gradient(by, of_it), rtol=1e-9, atol=1e-12)
    assert penalty.metrics(None) == {f"{penalty.name}_penalty": pytest.approx(sum(expected).item() / 2)}


def test_a_bfloat16_adapter_is_compared_in_float32():
    model = get_peft_model(tiny_model(), lora()).bfloat16()
    penalty = L2SP(model, 1.0)
    with torch.no_grad():
        for parameter in trained(model):
            parameter.add_(parameter.abs().max() / 64)
    pairs = zip(trained(model), penalty.start.values(), strict=True)
    expected = sum((now.double() - start.double()).square().sum() / 2 for now, start in pairs)
    assert penalty.penalty(0).dtype == torch.float32 and penalty.penalty(0).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("teacher", ["none", "ema", "frozen"])
@pytest.mark.parametrize("more", [{}, dict(rehearsal_weight=2.0)], ids=["", "rehearsal"])
def test_they_go_with_each_other_and_with_everything_else(held, teacher, more):
    trainer = held(teacher=teacher, **ALL, **more)
    trainer.train()
    parts = {name: logged(trainer, name) for name in ("l1_penalty", "l2_penalty", "ewc_penalty")}
    assert all(values[0] == 0 and values[-1] > 0 for values in parts.values())
    if teacher == "none" and not more:
        return
    expected = [
        ce + sum(weight * parts[f"{name[:-7]}_penalty"][i] for name, weight in ALL.items())
        for i, ce in enumerate(logged(trainer, "ce_loss"))
    ]
    for name, weight in (("kl_loss", 1.0), ("rehearsal_kl", 2.0)):
        for i, value in enumerate(logged(trainer, name)):
            expected[i] += weight * value
    assert logged(trainer, "loss") == pytest.approx(expected, rel=1e-4)


def test_off_is_plain_sft_bit_for_bit(held, make_trainer):
    ours, theirs = held(l1_weight=0, l2_weight=0, ewc_weight=0), make_trainer(trainer_class=SFTTrainer)
    for trainer in (ours, theirs):
        trainer.train()
    assert logged(ours, "loss") == logged(theirs, "loss") and ours.regularizers == []
    expected = adapter_weights(theirs)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(ours).items())


def test_weight_decay_acts_on_the_adapter(make_trainer):
    """AdamW, decoupled: after one step the two runs differ by −lr·decay·θ₀."""
    options = dict(teacher="none", max_steps=1, learning_rate=1e-2, peft_config=lora(init_lora_weights=False))
    plain, decayed = (make_trainer(weight_decay=decay, **options) for decay in (0.0, 0.5))
    start = adapter_weights(decayed)
    assert all(torch.equal(weight, start[name]) for name, weight in adapter_weights(plain).items())
    for trainer in (plain, decayed):
        trainer.train()
    expected = adapter_weights(plain)
    for name, weight in adapter_weights(decayed).items():
        torch.testing.assert_close(weight - expected[name], -1e-2 * 0.5 * start[name], rtol=1e-3, atol=1e-7)
    assert plain.args.is_plain_sft and not decayed.args.is_plain_sft


# The Fisher information


@pytest.mark.parametrize("kind", ["raw", "chat"])
def test_scores_are_the_gradients_of_single_texts(kind, tmp_path):
    model, tokenizer = double_model(init_lora_weights=False), make_tokenizer()
    sampling = Sampling(num_texts=4, num_tokens=24, chat=kind == "chat")
    texts = write_texts(model, tokenizer, sampling, tmp_path / "texts.safetensors")
    rows = list(zip(texts.ids, drawn_labels(texts), strict=True))
    model.train()
    modes = [module.training for module in model.modules()]
    found = squared_scores(model, trained(model), rows)
    expected = [sum(one[name] ** 2 for one in (_score(model, *row) for row in rows)) for name in trained_names(model)]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == torch.float64 and ours.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-14)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes


CHAT = {"header": [4, 9], "tail": [2, 5], "ends": [2], "sampling": {"num_tokens": 8}}  # prompts of two tokens at most


def test_what_the_model_was_given_is_no_label():
    texts = Texts([[1, 7, 2, 8], [4, 9, 4, 9, 2, 5, 11, 2]], ["raw", "chat"], CHAT)
    assert drawn_labels(texts) == [[-100, 7, 2, 8], [-100, -100, 4, 9, -100, -100, 11, 2]]


@pytest.mark.parametrize("changes", [{}, {"ends": [3]}], ids=["a token that ends turns", "plain text"])
def test_the_end_of_a_prompt_is_a_label_where_the_model_drew_it(changes):
    texts = Texts([[4, 9, 8, 2, 5, 11, 2], [4, 9, 2, 5, 11]], ["chat"] * 2, CHAT | changes)
    assert drawn_labels(texts) == [[-100, -100, 8, 2, -100, 11, 2], [-100, -100, 2, -100, 11]]


def test_an_end_that_the_template_writes_otherwise_leaves_prompts_without_labels():
    texts = Texts([[4, 9, 8, 5, 2, 11, 2], [4, 9, 8, 8, 5, 2, 11]], ["chat"] * 2, CHAT | {"tail": [5, 2]})
    assert drawn_labels(texts) == [[-100] * 5 + [11, 2], [-100] * 6 + [11]]


class _Unconditional(torch.nn.Module):
    """p(token) = softmax(θ), whatever came before: F of θᵢ is pᵢ·(1 − pᵢ) for each token that is drawn."""

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor([0.3, -0.4, 0.1], dtype=torch.float64))
        self.embeddings = torch.nn.Embedding(1, 1)

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.theta.expand(*input_ids.shape, -1))


def _all_chats(about):
    """Each that can be written, of tokens 0 (which ends a turn), 1 and 2, with its probability as the tokens drawn."""

    def until_end(most):
        words = [list(w) for n in range(most + 1) for w in itertools.product((1, 2), repeat=n)]
        return [word if len(word) == most else [*word, 0] for word in words]

    third, length = 2, about["sampling"]["num_tokens"]
    for prompt in until_end(third):
        begun = len(about["header"]) + len(about["tail"]) + len([token for token in prompt if token])
        for answer in until_end(length - begun):
            drawn = iter((prompt, answer))
            (ids,) = _write_chats(lambda *_, drawn=drawn: [next(drawn)], [0], about)
            yield ids, prompt + answer


@pytest.mark.parametrize("tail", [[0, 4], [4, 0]], ids=["ends at once", "writes something before"])
def test_over_all_chats_it_is_the_fisher_information_of_a_draw(tail):
    model, about = (
        _Unconditional(),
        {"header": [3], "tail": tail, "ends": [0], "sampling": {"num_tokens": 8, "seed": 0}},
    )
    p = model.theta.softmax(0).detach()
    total, tokens, mass = torch.zeros(3, dtype=torch.float64), 0.0, 0.0
    for ids, drawn in _all_chats(about):
        (labels,) = drawn_labels(Texts([ids], ["chat"], about))
        likely = p[drawn].prod()
        mass += likely
        total += likely * squared_scores(model, [model.theta], [(ids, labels)])[0]
        tokens += likely * sum(label != -100 for label in labels)
    assert mass == pytest.approx(1)
    torch.testing.assert_close(total / tokens, p * (1 - p), rtol=1e-12, atol=0)


def test_half_of_it_times_a_square_is_the_divergence_per_token():
    """Of one weight at a time, where nothing lies off the diagonal: KL(before ‖ moved) / (ε²/2) is F, in nats per token."""
    model = double_model(init_lora_weights=False).eval()
    start, number, length = [1], 300, 4
    torch.manual_seed(0)
    ids = torch.tensor([start] * number)
    with torch.no_grad():
        for _ in range(length):
            ids = torch.cat([ids, model(input_ids=ids).logits[:, -1].softmax(-1).multinomial(1)], 1)
    rows = [(row, [-100, *row[1:]]) for row in ids.tolist()]
    fisher = [one / (number * length) for one in squared_scores(model, trained(model), rows)]
    which = max(range(len(fisher)), key=lambda i: fisher[i].max())
    place, parameter, step = fisher[which].argmax(), trained(model)[which], 1e-3
    with torch.no_grad():
        before = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
        parameter.view(-1)[place] += step
        after = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    assert fisher[which].max().item() == pytest.approx(2 * kl.item() / step**2, rel=0.15)


@pytest.mark.parametrize("number", [4, 100])
def test_a_run_measures_it_on_its_first_texts_per_token_drawn(held, caplog, number):
    trainer = held(ewc_weight=2.0, ewc_num_texts=number, max_steps=1, peft_config=lora(init_lora_weights=False))
    trainer.train()
    (ewc,) = trainer.regularizers
    texts = ewc.own.get(trainer)
    told = f"Fisher information is of {len(texts.ids)} texts, all there are; `ewc_num_texts` asks for {number}, and `rehearsal_num_texts` writes more."
    assert (told in caplog.text) == (number > len(texts.ids))
    assert set(texts.kinds[:4]) == {"raw", "chat"}
    rows = list(zip(texts.ids, drawn_labels(texts), strict=True))[:number]
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False)).double()
    for name, start in ewc.start.items():
        model.get_parameter(name).data.copy_(start)
    scores = [_score(model, *row) for row in rows]
    tokens = sum(label != -100 for _, labels in rows for label in labels)
    for name, found in ewc.fisher.items():
        expected = sum(one[name] ** 2 for one in scores) / tokens
        torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-3, atol=1e-8)


def test_of_a_fresh_lora_it_sees_b_alone(held):
    trainer = held(ewc_weight=2.0, max_steps=1)
    trainer.train()
    for name, fisher in trainer.regularizers[0].fisher.items():
        assert fisher.any() == ("lora_B" in name), name


def test_dropout_and_noise_are_off_and_random_states_are_left_alone(held):
    losses = {}
    for weight in (1e-12, 0.0):
        trainer = held(ewc_weight=weight, peft_config=lora(lora_dropout=0.3), neftune_noise_alpha=5.0)
        trainer.train()
        losses[weight] = logged(trainer, "loss")
    assert losses[1e-12] == pytest.approx(losses[0.0], rel=1e-6)


def test_its_texts_are_those_of_the_rehearsal_written_once(held, tmp_path, monkeypatch):
    written = []
    real = write_texts
    monkeypatch.setattr(
        "trl_ema.texts._write_parts",
        lambda *args, _real=real.__globals__["_write_parts"]: written.append(1) or _real(*args),
    )
    read = []
    monkeypatch.setattr(
        "trl_ema.regularizers.own_texts.model_fingerprint", lambda *args: read.append(1) or model_fingerprint(*args)
    )
    trainer = held(ewc_weight=1.0, rehearsal_weight=1.0)
    assert len(read) == 1  # a pass over all weights
    trainer.train()
    rehearsal, ewc = sorted(trainer.regularizers, key=lambda one: isinstance(one, EWC))
    assert isinstance(rehearsal, Rehearsal) and rehearsal.texts.ids == ewc.own.at_hand.ids
    assert load_texts(tmp_path / "out" / FILE).ids == rehearsal.texts.ids and len(written) == 1


# Checkpoints


def test_a_resumed_run_does_not_measure_it_again_and_ends_the_same_bit_for_bit(held, tmp_path, monkeypatch):
    saving = dict(save_strategy="steps", save_steps=2, **ALL)
    whole = held(output_dir=str(tmp_path / "whole"), **saving)
    whole.train()
    monkeypatch.setattr("trl_ema.regularizers.penalties.squared_scores", lambda *_, **__: pytest.fail("again"))
    resumed = held(output_dir=str(tmp_path / "resumed"), **saving)
    for one in resumed.regularizers:  # what is resumed must not depend on where it would have started
        one.start = {name: start + 1 for name, start in one.start.items()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for key in ("loss", "l1_penalty", "l2_penalty", "ewc_penalty"):
        assert logged(resumed, key)[-2:] == logged(whole, key)[-2:], key
    expected = adapter_weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items())
    for one, other in zip(whole.regularizers, resumed.regularizers, strict=True):
        size = sum(
            tensor.numel() * 4
            for tensor in load_file(tmp_path / "whole/checkpoint-2" / f"{one.name}.safetensors").values()
        )
        assert one.bytes_to_save() == size
        assert all(torch.equal(kept, other.tensors()[name]) for name, kept in one.tensors().items())


def test_what_a_resumed_run_needs_is_in_checkpoints_and_not_beside_the_final_adapter(held, tmp_path):
    trainer = held(save_strategy="steps", save_steps=2, **ALL)
    trainer.train()
    trainer.save_model()
    files = {f"{regularizer.name}.safetensors" for regularizer in trainer.regularizers}
    assert len(files) == 3 and files <= {*os.listdir(tmp_path / "out" / "checkpoint-2")}
    final = {*os.listdir(tmp_path / "out")}
    assert "adapter_model.safetensors" in final and not files & final


def test_training_once_more_keeps_start_and_fisher_information(held):
    trainer = held(**ALL)
    trainer.train()
    kept = [regularizer.tensors() for regularizer in trainer.regularizers]
    trainer.train()
    for regularizer, before in zip(trainer.regularizers, kept, strict=True):
        assert all(torch.equal(tensor, before[name]) for name, tensor in regularizer.tensors().items())


# Bad input


@pytest.mark.parametrize("name", ["l1_weight", "l2_weight", "ewc_weight"])
def test_a_model_without_an_adapter_is_refused(held, name):
    with pytest.raises(
        ValueError, match="hold the weights of a PEFT adapter, and the model has none. Pass `peft_config="
    ):
        held(peft_config=None, **{name: 1.0})


def test_a_sharded_model_is_told_where_its_fisher_information_must_come_from(held, monkeypatch):
    trainer = held(ewc_weight=1.0)
    monkeypatch.setattr("trl_ema.regularizers.penalties.any_sharded", lambda model: True)
    with pytest.raises(ValueError, match="`ewc_weight`: a sharded model.*Begin the run on one process or under DDP"):
        trainer.train()


@pytest.mark.parametrize("name", ["l1", "l2", "ewc"])
def test_files_that_do_not_fit_are_refused_before_anything_is_loaded(held, tmp_path, name):
    weight = {f"{name}_weight": 1.0}
    held(save_strategy="steps", save_steps=2, **weight).train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    file, again = checkpoint / f"{name}.safetensors", held(**weight)
    before = adapter_weights(again)
    kept, tensors = file.read_bytes(), load(file.read_bytes())

    def refused(match):
        with pytest.raises(ValueError, match=match):
            again.train(resume_from_checkpoint=str(checkpoint))
        assert all(torch.equal(now, before[key]) for key, now in adapter_weights(again).items())

    file.write_bytes(kept[: len(kept) // 2])
    refused(f"{name}.safetensors is damaged .*Resume from another checkpoint")
    last = list(tensors)[-1]
    for other in (tensors | {last: tensors[last][:1].clone()}, {k: v for k, v in tensors.items() if k != last}):
        save_file(other, file)
        refused(f"is of another adapter: '{last}' has shape .*Resume with the original `target_modules`")
    file.unlink()
    refused(f"is missing: it was saved without `{name}_weight`. Resume without it")
