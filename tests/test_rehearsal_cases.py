"""Rehearsal under whatever models, adapters, options and data there are: the loss of the two batches apart, at each micro-batch."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, adapter_weights, lora, make_tokenizer, rows, tiny_model
from peft import get_peft_model
from test_families import FAMILIES
from test_qlora import nf4_model  # noqa: F401
from test_rehearsal import TEXTS, of, rehearsing  # noqa: F401
from test_trainer import same_run
from trl import SFTTrainer

from trl_ema.texts import Sampling, write_texts


pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))


def log_probs(trainer, ids, before=False):
    """Of every prediction of one text, passed alone, float64."""
    inputs = {"input_ids": torch.tensor([ids], device=trainer.model.device), "use_cache": False}
    with trainer.precision():
        if not before:
            return trainer.model(**inputs).logits[0, :-1].double().log_softmax(-1)
        with torch.no_grad(), trainer.starting_point.activate():
            return trainer.model(**inputs).logits[0, :-1].double().log_softmax(-1)


class Apart:
    """Σ of the two batches' losses beside each `compute_loss` of a training: values, and at the end of it the gradient."""

    def __init__(self, trainer, weight=2.0, rtol=2e-5, atol=2e-6):
        self.trainer, self.weight, self.tolerance = trainer, weight, dict(rtol=rtol, atol=atol)
        self.ours, self.taken, self.left, self.divergences, self.sizes = trainer.compute_loss, 0, 0, [], []
        trainer.compute_loss = self

    def __call__(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self.ours(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        apart = self.apart(dict(inputs), num_items_in_batch)
        torch.testing.assert_close(loss.double(), apart, **self.tolerance)
        self.sizes.append(len(inputs["input_ids"]))
        self.last = inputs, num_items_in_batch
        return loss

    def apart(self, inputs, num_items):
        trainer, rehearsal = self.trainer, of(self.trainer)
        if not self.left:  # the texts of a step, all their predictions counted together
            self.left = self.number = trainer.current_gradient_accumulation_steps
            places = range(self.taken, self.taken + self.number * rehearsal.rows)
            texts = rehearsal.texts.ids
            orders = [np.random.default_rng([trainer.args.seed, i]).permutation(len(texts)) for i in range(30)]
            self.texts = [texts[orders[place // len(texts)][place % len(texts)]] for place in places]
            self.taken = places.stop
        own = self.texts[(self.number - self.left) * rehearsal.rows :][: rehearsal.rows]
        self.left -= 1
        with trainer.precision():
            ce = SFTTrainer.compute_loss(trainer, trainer.model, inputs, num_items_in_batch=num_items).double()
        kl = 0.0
        for ids in own:
            before, now = log_probs(trainer, ids, before=True), log_probs(trainer, ids)
            kl = kl + (before.exp() * (before - now)).sum()
        counted = own if num_items is None else self.texts
        self.divergences.append(kl.item() / sum(len(ids) - 1 for ids in own))
        return ce + self.weight * kl / sum(len(ids) - 1 for ids in counted)


def check(trainer, *, least=1e-4, gradient=True, **tolerance):
    """Values at each micro-batch of a training, the gradient at one after it."""
    apart = Apart(trainer, **tolerance)
    trainer.train()
    assert abs(apart.divergences[0]) < 1e-6 and apart.divergences[-1] > least
    assert of(trainer).taken == apart.taken
    if gradient:
        check_gradient(trainer, apart)
    return apart


def check_gradient(trainer, apart):
    trainer.model.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps, apart.left = 1, 0
    found = []
    for loss in (
        apart.ours(trainer.model, dict(batch), num_items_in_batch=items),
        apart.apart(dict(batch), items),
    ):
        trainer.model.zero_grad()
        loss.backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
    scale = max(gradient.abs().max().item() for gradient in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5 * scale)


# Models and adapters


CASES = {
    "untied heads": {},
    "tied heads": dict(model=dict(tie_word_embeddings=True)),
    "rslora": dict(peft_config=dict(use_rslora=True)),
    "dora": dict(peft_config=dict(use_dora=True)),
    "a trained head": dict(peft_config=dict(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "a trained head of tied ones": dict(
        model=dict(tie_word_embeddings=True),
        peft_config=dict(target_modules=["q_proj"], modules_to_save=["lm_head"], ensure_weight_tying=True),
    ),
    "an adapter that is gone on from": dict(peft_config=dict(init_lora_weights=False)),
    "pissa": dict(peft_config=dict(init_lora_weights="pissa")),
    "checkpointing": dict(gradient_checkpointing=True),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "packed": dict(packing=True, per_device_train_batch_size=1),
    "packed rows": dict(packing=True, packing_strategy="wrapped", per_device_train_batch_size=2),
    "padding-free": dict(padding_free=True, max_length=None),
    "padded to a multiple": dict(pad_to_multiple_of=16),
    "full sequences": dict(completion_only_loss=False),
    "dft": dict(loss_type="dft"),
    "soft-capped": dict(model=dict(model_type="gemma2", final_logit_softcapping=5.0)),
    "experts": dict(model=dict(model_type="qwen3_moe") | FAMILIES["qwen3_moe"], router_aux_loss_coef=0.1),
    "experts, packed": dict(
        model=dict(model_type="mixtral") | FAMILIES["mixtral"], packing=True, per_device_train_batch_size=1
    ),
    "a convolution along documents": dict(
        model=dict(model_type="falcon_h1") | FAMILIES["falcon_h1"], padding_free=True, max_length=None,
        peft_config=dict(target_modules=["q_proj", "v_proj", "down_proj"]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_two_batches_apart(rehearsing, case):  # noqa: F811
    options = dict(learning_rate=0.03) | CASES[case]
    model, adapter = options.pop("model", {}), options.pop("peft_config", {})
    check(rehearsing(model=tiny_model(**model), peft_config=lora(**adapter), **options))


def test_a_4bit_model_is_held_to_itself_in_4_bits(rehearsing, nf4_model):  # noqa: F811
    check(rehearsing(model=nf4_model(), learning_rate=0.03), rtol=1e-4)


@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "nf4"])
def test_under_autocast_the_loss_is_as_near_as_its_precision(rehearsing, nf4_model, four_bit):  # noqa: F811
    model = nf4_model() if four_bit else None
    trainer = rehearsing(model=model, learning_rate=0.03, bf16=True)
    check(trainer, gradient=False, rtol=0.02, atol=0.02)


# Nothing random in the model before training


@pytest.mark.parametrize(
    "options",
    [
        dict(peft_config=dict(lora_dropout=0.5)),
        dict(model=dict(attention_dropout=0.5)),
        dict(peft_config=dict(init_lora_weights="pissa", lora_dropout=0.5)),
        dict(neftune_noise_alpha=5.0),
    ],
    ids=["of LoRA", "of the base", "of an adapter that is kept", "noise on the embeddings"],
)
def test_dropout_is_the_students_alone(rehearsing, options):  # noqa: F811
    """Two draws of it would be a divergence of their own, and its gradient none that holds the student."""
    options = dict(options)
    model, adapter = options.pop("model", {}), options.pop("peft_config", {})
    trainer = rehearsing(model=tiny_model(**model), peft_config=lora(**adapter), **options)
    trainer.train()
    ids = torch.tensor([of(trainer).texts.ids[0]], device=DEVICE)
    found = []
    for _ in range(2):
        trainer.model.train()
        with torch.no_grad(), trainer.starting_point.activate():
            found.append(trainer.model(ids).logits)
    assert torch.equal(*found)
    calm = tiny_model(**model).eval()
    torch.testing.assert_close(found[0], calm(ids).logits, rtol=1e-4, atol=1e-4)


# Compiled


@pytest.mark.parametrize("bf16", [pytest.param(False, marks=pytest.mark.slow), True], ids=["float32", "bf16"])
def test_a_compiled_model_gives_the_same_run(rehearsing, bf16):  # noqa: F811
    plain, compiled = (
        rehearsing(bf16=bf16, **more) for more in ({}, dict(torch_compile=True, torch_compile_backend="aot_eager"))
    )
    plain.train(), compiled.train()
    torch.compiler.reset()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    same_run(compiled, plain)
    for key in ("rehearsal_kl", "rehearsal_weight"):
        assert [e[key] for e in compiled.state.log_history if key in e] == [
            e[key] for e in plain.state.log_history if key in e
        ]


# Evaluation


def test_an_evaluation_is_the_students_as_sft_would_report_it(rehearsing, make_trainer):  # noqa: F811
    held_out = rows(6, seed=3)
    ours = rehearsing(eval_dataset=held_out, eval_strategy="steps", eval_steps=2)
    ours.train()
    quiet = rehearsing()
    quiet.train()  # and leaves the training alone
    assert all(torch.equal(weight, adapter_weights(quiet)[name]) for name, weight in adapter_weights(ours).items())
    theirs = make_trainer(trainer_class=SFTTrainer, eval_dataset=held_out, teacher="none")
    for name, parameter in theirs.model.named_parameters():
        if parameter.requires_grad:
            parameter.data = ours.model.get_parameter(name).data.clone()
    expected = theirs.evaluate()
    found = ours.evaluate()
    logged_then = [entry for entry in ours.state.log_history if "eval_loss" in entry][-2]
    timing = {name for name in expected if name.endswith(("runtime", "per_second", "num_tokens"))}
    for name in expected.keys() - timing - {"epoch"}:
        assert found[name] == expected[name] == logged_then[name], name
    assert found.keys() - {"epoch"} == expected.keys() - {"epoch"}


# Data


DATA = {
    "an epoch's last is smaller": (dict(data=11, num_train_epochs=2, max_steps=-1), [4, 4, 3] * 2),
    "dropped": (dict(data=11, num_train_epochs=2, max_steps=-1, dataloader_drop_last=True), [4, 4] * 2),
    "an epoch's last of an accumulation": (
        dict(data=11, num_train_epochs=2, max_steps=-1, gradient_accumulation_steps=2), [4, 4, 3] * 2,
    ),
    "a stream": (dict(data="stream", max_steps=5), [4, 4, 3, 4, 4]),
    "a stream, accumulated": (dict(data="stream", max_steps=4, gradient_accumulation_steps=2), [4, 4, 3] * 2),
    "tokens counted on each rank": (
        dict(data=8, average_tokens_across_devices=False, gradient_accumulation_steps=2, max_steps=3), [4] * 6,
    ),
    "more steps than an epoch has": (dict(data=6, max_steps=9), [4, 2] * 4 + [4]),
    "grouped by length": (dict(data=16, train_sampling_strategy="group_by_length", max_steps=4), [4] * 4),
    "a small fraction": (dict(data=8, rehearsal_fraction=0.01, max_steps=3), [4] * 3),
    "a large fraction": (dict(data=8, rehearsal_fraction=0.7, max_steps=3), [4] * 3),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_whatever_comes_as_a_micro_batch(rehearsing, name):  # noqa: F811
    options, sizes = DATA[name]
    number = options["data"]
    data = rows(11).to_iterable_dataset() if number == "stream" else rows(number)
    apart = check(rehearsing(**options | {"data": data}), least=0, gradient=False)
    assert apart.sizes == sizes


def test_a_step_without_a_label_rehearses_and_is_finite(rehearsing):  # noqa: F811
    data = rows(8).map(lambda row: {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, -100, -100]})
    labelled = rows(1).map(lambda row: {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]})
    from datasets import concatenate_datasets

    data = concatenate_datasets([labelled, data]).select_columns(["input_ids", "labels"])
    check(
        rehearsing(
            data=data, dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
            learning_rate=0.05, max_steps=3,
        ),
        gradient=False,
    )  # fmt: skip


# Options that exclude it


def test_label_smoothing_is_refused_by_its_name(rehearsing):  # noqa: F811
    with pytest.raises(ValueError, match=r"`label_smoothing_factor=0.1` is not supported with .*`rehearsal_weight`"):
        rehearsing(label_smoothing_factor=0.1)


def test_texts_given_are_those_of_the_model_before_training(rehearsing, tmp_path):  # noqa: F811
    path = tmp_path / "given.safetensors"
    sampling = Sampling(num_texts=7, num_tokens=12, seed=3)
    texts = write_texts(get_peft_model(tiny_model(), lora()), make_tokenizer(), sampling, path, progress=False)
    trainer = rehearsing(rehearsal_texts=str(path), max_steps=6)
    check(trainer, least=0)
    assert of(trainer).texts == texts and TEXTS["rehearsal_num_texts"] != 7
