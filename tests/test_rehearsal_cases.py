"""Rehearsal under whatever models, adapters, options and data there are: the loss of the two batches apart, at each micro-batch."""

import numpy as np
import pytest
import torch
from conftest import DEVICE, USE_CPU, adapter_weights, logged, lora, make_tokenizer, rows, tiny_model
from datasets import concatenate_datasets
from peft import get_peft_model
from test_families import FAMILIES
from test_qlora import nf4_model  # noqa: F401
from test_rehearsal import TEXTS, of, rehearsing  # noqa: F401
from test_texts import interrupted_after
from transformers import TrainerCallback
from trl import SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_ema.forward import Parts
from trl_ema.regularizers.own_texts import FILE
from trl_ema.regularizers.text_rows import with_documents, with_rows
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
        with torch.no_grad():  # first: the model before training may write into weights that a pass has used
            apart = self.apart(model, dict(inputs), num_items_in_batch)
        loss = self.ours(model, dict(inputs), num_items_in_batch=num_items_in_batch)
        torch.testing.assert_close(loss.double(), apart, **self.tolerance)
        self.sizes.append(len(inputs["input_ids"]))
        self.last = inputs, num_items_in_batch
        return loss

    def apart(self, model, inputs, num_items_in_batch):
        trainer, rehearsal = self.trainer, of(self.trainer)
        if not self.left:  # the texts of a step, all their predictions counted together
            self.left = self.number = trainer.current_gradient_accumulation_steps
            places = range(self.taken, self.taken + sum(rehearsal._counts))
            texts = rehearsal.texts.ids
            orders = [np.random.default_rng([trainer.args.seed, i]).permutation(len(texts)) for i in range(30)]
            self.texts = [texts[orders[place // len(texts)][place % len(texts)]] for place in places]
            self.taken = places.stop
        done = self.number - self.left
        own = self.texts[sum(rehearsal._counts[:done]) :][: rehearsal._counts[done]]
        self.left -= 1
        befores = [log_probs(trainer, ids, before=True) for ids in own]
        if not own:
            return SFTTrainer.compute_loss(
                trainer, trainer.model, inputs, num_items_in_batch=num_items_in_batch
            ).double()
        with trainer.precision():
            ce = SFTTrainer.compute_loss(trainer, trainer.model, inputs, num_items_in_batch=num_items_in_batch).double()
        kl = 0.0
        for ids, before in zip(own, befores, strict=True):
            kl = kl + (before.exp() * (before - log_probs(trainer, ids))).sum()
        counted = own if num_items_in_batch is None else self.texts
        self.divergences.append(kl.item() / sum(len(ids) - 1 for ids in own))
        return ce + self.weight * kl / sum(len(ids) - 1 for ids in counted)


def check(trainer, *, least=1e-4, gradient=True, of_gradient=None, **tolerance):
    """Values at each micro-batch of a training, the gradient at one after it (to `of_gradient` of its norm, where that is given)."""
    apart = Apart(trainer, **tolerance)
    trainer.train()
    assert abs(apart.divergences[0]) < 1e-6 and apart.divergences[-1] > least
    assert of(trainer).taken == apart.taken
    if gradient:
        check_gradient(trainer, apart, of_gradient)
    return apart


def check_gradient(trainer, apart, of_norm=None):
    trainer.model.train()
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.current_gradient_accumulation_steps, apart.left = 1, 0
    found = []
    for loss in (apart.ours, apart.apart):
        trainer.model.zero_grad()
        loss(trainer.model, dict(batch), num_items_in_batch=items).backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
    if of_norm is not None:
        ours, theirs = (torch.cat([gradient.flatten().double() for gradient in gradients]) for gradients in found)
        assert (ours - theirs).norm() < of_norm * theirs.norm()
        return
    scale = max(gradient.abs().max().item() for gradient in found[1])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-5 * scale)


def assert_same(one, other, last=0):
    """Both runs bit for bit, or the last steps of them."""
    for key in ("loss", "grad_norm", "rehearsal_kl", "rehearsal_weight"):
        assert logged(one, key)[-last:] == logged(other, key)[-last:] and logged(one, key), key
    expected = adapter_weights(other)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(one).items())


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
    "an adapter that is gone on from": dict(peft_config=dict(init_lora_weights=False), gone_on_from=True),
    "pissa": dict(peft_config=dict(init_lora_weights="pissa")),
    "checkpointing": dict(gradient_checkpointing=True),
    "reentrant checkpointing": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
    "packed": dict(packing=True, per_device_train_batch_size=1),
    "packed rows": dict(packing=True, packing_strategy="wrapped", per_device_train_batch_size=2),
    "padding-free": dict(padding_free=True, max_length=None),
    "padding-free, to a multiple": dict(padding_free=True, max_length=None, pad_to_multiple_of=32),
    "padded to a multiple": dict(pad_to_multiple_of=16),
    "full sequences": dict(completion_only_loss=False),
    "dft": dict(loss_type="dft"),
    "soft-capped": dict(model=dict(model_type="gemma2", final_logit_softcapping=5.0)),
    "experts": dict(model=dict(model_type="qwen3_moe") | FAMILIES["qwen3_moe"], router_aux_loss_coef=0.1),
    "experts, packed": dict(
        model=dict(model_type="mixtral") | FAMILIES["mixtral"], packing=True, per_device_train_batch_size=1
    ),
}  # fmt: skip


# The model before training passes over each micro-batch, or over each text once where it is taken again.
PASSES = {"fresh texts": {}, "texts again": dict(max_steps=12)}


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_the_two_batches_apart(rehearsing, case, passes):  # noqa: F811
    options = dict(learning_rate=0.03) | CASES[case] | PASSES[passes]
    model, adapter = tiny_model(**options.pop("model", {})), lora(**options.pop("peft_config", {}))
    if options.pop("gone_on_from", False):
        model, adapter = get_peft_model(model, adapter), None
    trainer = rehearsing(model=model, peft_config=adapter, **options)
    check(trainer)
    if passes == "texts again":
        head_is_trained = any(p.requires_grad for p in trainer.model.get_output_embeddings().parameters())
        assert (of(trainer)._known is None) == head_is_trained


APART = {
    "long rows": (40, {}, {(4, 40), (2, 12)}),
    "short rows": (4, {}, {(4, 4), (2, 12)}),
    "of one length": (12, {}, {(6, 12), (2, 12)}),
    "experts": (
        40, dict(model=dict(model_type="qwen3_moe") | FAMILIES["qwen3_moe"], router_aux_loss_coef=0.1), {(4, 40), (2, 12)},
    ),
    "checkpointing": (40, dict(gradient_checkpointing=True), {(4, 40), (2, 12)}),
    "to a multiple": (40, dict(pad_to_multiple_of=8), {(4, 40), (2, 16)}),
    "longer texts, to a multiple": (32, dict(pad_to_multiple_of=32, rehearsal_num_tokens=40), {(4, 32), (2, 64)}),
    # Whose pass is over both, padded alike.
    "beside a frozen teacher": (40, dict(teacher="frozen", kl_weight=0.0), {(4, 40), (2, 12), (6, 40)}),
    "beside an EMA teacher": (40, dict(teacher="ema", kl_weight=0.0), {(4, 40), (2, 12)}),
}  # fmt: skip


@pytest.mark.skipif(not USE_CPU, reason="A GPU joins the texts, and passes over few tokens together: see below.")
@pytest.mark.parametrize("case", APART)
def test_rows_and_texts_of_other_lengths_are_not_padded_alike(rehearsing, case):  # noqa: F811
    length, options, expected = APART[case]
    trainer, shapes = rehearsing_rows_of(rehearsing, length, options)
    check(trainer)
    # Those of the two batches apart too; texts are written by five.
    assert {shape for shape in shapes if shape[0] in (2, 4, 6)} == expected | {(4, length)}


def rehearsing_rows_of(rehearsing, length, options):  # noqa: F811
    """A trainer on full rows of so many tokens, and the shapes that its model is given."""
    options = dict(options)
    model = tiny_model(**options.pop("model", {}))
    data = rows(8).map(lambda row, i: {"input_ids": [5 + (i + j) % 30 for j in range(length)]}, with_indices=True)
    data = data.map(lambda row: {"labels": row["input_ids"]}).select_columns(["input_ids", "labels"])
    trainer = rehearsing(
        model=model,
        data=data,
        dataset_kwargs={"skip_prepare_dataset": True},
        learning_rate=0.03,
        max_length=None,
        **options,
    )
    shapes = []
    model.base_model.register_forward_pre_hook(
        lambda _, args, inputs: shapes.append(tuple((args[0] if args else inputs["input_ids"]).shape)), with_kwargs=True
    )
    return trainer, shapes


JOINED = {
    "texts again": (40, dict(max_steps=12), {(5, 40), (8, 12), (2, 12)}),  # which are read eight at a time
    "fresh texts": (40, {}, {(5, 40), (1, 40)}),
    "one text a row": (14, {}, {(6, 14), (2, 14)}),
    "short rows": (4, {}, {(6, 12), (2, 12)}),
    "replay": (40, dict(rehearsal_loss="ce"), {(5, 40)}),
    "sliding windows": (40, dict(model=dict(model_type="gemma2", sliding_window=8)), {(5, 40), (1, 40)}),
    "learned positions": (40, dict(model=dict(model_type="gpt2") | FAMILIES["gpt2"]), {(5, 40), (1, 40)}),
    "experts": (
        40, dict(model=dict(model_type="qwen3_moe") | FAMILIES["qwen3_moe"], router_aux_loss_coef=0.1), {(5, 40), (1, 40)},
    ),
    "checkpointing": (40, dict(gradient_checkpointing=True), {(5, 40), (1, 40)}),
    "beside a frozen teacher": (40, dict(teacher="frozen", kl_weight=0.0), {(5, 40)}),
    "beside an EMA teacher": (40, dict(teacher="ema", kl_weight=0.0), {(5, 40), (1, 40)}),
}  # fmt: skip


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr("trl_ema.regularizers.joined_texts._works_ahead", lambda _: True)


@pytest.mark.parametrize("case", JOINED)
def test_on_a_gpu_texts_stand_in_as_few_rows_as_hold_them(rehearsing, on_a_gpu, case):  # noqa: F811
    length, options, expected = JOINED[case]
    trainer, shapes = rehearsing_rows_of(rehearsing, length, options)
    if options.get("rehearsal_loss") == "ce":
        trainer.train()
    else:
        check(trainer)
    assert of(trainer)._joins
    # Beside those of the reference: the student's own rows, a text by itself or, where they are written, five; two for a trial.
    of_reference = {(4, length), (2, 24), *((number, tokens) for number in (1, 5) for tokens in range(13))}
    assert set(shapes) - of_reference == expected


NOT_APART = {
    "falcon_h1": dict(model_type="falcon_h1") | FAMILIES["falcon_h1"],
    "lfm2": dict(model_type="lfm2", layer_types=["conv", "full_attention"]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", NOT_APART)
def test_where_positions_do_not_keep_texts_apart_they_are_not_joined(rehearsing, on_a_gpu, family, dtype):  # noqa: F811
    model = tiny_model(**NOT_APART[family]).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    trainer = rehearsing(model=model, peft_config=lora(target_modules=["q_proj", "v_proj"]), max_steps=1)
    trainer.train()
    assert not of(trainer)._joins


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_they_do_no_rounding_refuses_it(rehearsing, on_a_gpu, family, dtype):  # noqa: F811
    model = tiny_model(**dict(model_type=family) | FAMILIES[family]).to(dtype)
    trainer = rehearsing(model=model, peft_config=lora(**{"target_modules": "all-linear"}), max_steps=1)
    trainer.train()
    assert of(trainer)._joins


class FromTheLeft(DataCollatorForLanguageModeling):
    def torch_call(self, examples):
        batch = super().torch_call(examples)
        for i, mask in enumerate(batch["attention_mask"].bool()):
            for value in batch.values():
                value[i] = torch.cat([value[i][~mask], value[i][mask]])
        return batch


def test_rows_that_a_collator_of_ones_own_fills_are_masked_as_it_says(rehearsing, on_a_gpu):  # noqa: F811
    trainer = rehearsing()
    trainer.data_collator = FromTheLeft(pad_token_id=0)
    check(trainer)
    assert not of(trainer)._joins


def test_an_adapter_that_begins_within_a_row_has_one_text_in_it(rehearsing, on_a_gpu):  # noqa: F811
    trainer = rehearsing(max_steps=1)
    trainer.model.peft_config["default"].alora_invocation_tokens = [7, 8]
    trainer.train()
    assert not of(trainer)._joins


@pytest.mark.skipif(not USE_CPU, reason="The trainer is on a GPU.")
def test_a_cpu_joins_no_texts(rehearsing):  # noqa: F811
    trainer = rehearsing()
    trainer.train()
    assert not of(trainer)._joins


def test_what_is_passed_over_apart_must_be_worth_a_pass():
    def better(parts, *shape, device="cpu"):
        return parts.are_better_apart(torch.empty(*shape, device=device))

    assert better(Parts(4, (40, 12), apart=True), 6, 40)
    assert not better(Parts(4, (40, 37), apart=True), 6, 40)  # 6 of 240
    assert not better(Parts(4, (40, 12)), 6, 40) and not better(Parts(4, apart=True), 6, 40)
    # Where kernels are started ahead, no few tokens are.
    assert not better(Parts(4, (40, 12), apart=True), 6, 40, device="meta")
    assert better(Parts(8, (1024, 96), apart=True), 12, 1024, device="meta")


@pytest.mark.parametrize("passes", PASSES)
def test_a_4bit_model_is_held_to_itself_in_4_bits(rehearsing, nf4_model, passes):  # noqa: F811
    check(rehearsing(model=nf4_model(), learning_rate=0.03, **PASSES[passes]), rtol=1e-4)


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("four_bit", [False, True], ids=["float32", "nf4"])
def test_under_autocast_loss_and_gradient_are_as_near_as_their_precision(rehearsing, nf4_model, four_bit, passes):  # noqa: F811
    model = nf4_model() if four_bit else None
    trainer = rehearsing(model=model, learning_rate=0.03, bf16=True, **PASSES[passes])
    check(trainer, of_gradient=0.02, rtol=0.02, atol=0.02)


# Nothing random in the model before training


class Watch(TrainerCallback):
    """Two passes of the model before training, while it trains."""

    def __init__(self, ids):
        self.ids, self.found = torch.tensor([ids], device=DEVICE), []

    def on_step_begin(self, *args, model=None, **kwargs):
        model.train()
        with torch.no_grad(), self.trainer.starting_point.activate():
            self.found.append(model(self.ids).logits)


@pytest.mark.parametrize(
    "options",
    [
        dict(peft_config=dict(lora_dropout=0.5)),
        dict(model=dict(attention_dropout=0.5)),
        dict(peft_config=dict(init_lora_weights="pissa", lora_dropout=0.5)),
        dict(neftune_noise_alpha=50.0),
    ],
    ids=["of LoRA", "of the base", "of an adapter that is kept", "noise on the embeddings"],
)
def test_dropout_is_the_students_alone(rehearsing, options):  # noqa: F811
    """Two draws of it would be a divergence of their own, and its gradient none that holds the student."""
    options, watch = dict(options), Watch([1, 7, 9, 11, 20, 30])
    model, adapter = options.pop("model", {}), options.pop("peft_config", {})
    trainer = rehearsing(model=tiny_model(**model), peft_config=lora(**adapter), callbacks=[watch], **options)
    watch.trainer = trainer
    trainer.train()
    calm = tiny_model(**model).eval().to(DEVICE)(watch.ids).logits
    for logits in watch.found:
        torch.testing.assert_close(logits, calm, rtol=1e-4, atol=1e-4)
    assert len(watch.found) == 4


# Compiled


@pytest.mark.parametrize(
    "options",
    [
        dict(bf16=True, pad_to_multiple_of=32),
        pytest.param(dict(), marks=pytest.mark.slow),
        pytest.param(dict(teacher="ema"), marks=pytest.mark.slow),
    ],
    ids=["one shape, bf16", "float32", "with a teacher"],
)
def test_a_compiled_model_gives_the_same_run(rehearsing, options):  # noqa: F811
    """One layer, two steps: compiling takes long."""
    plain, compiled = (
        rehearsing(model=tiny_model(num_hidden_layers=1), max_steps=2, **options, **more)
        for more in ({}, dict(torch_compile=True, torch_compile_backend="aot_eager"))
    )
    plain.train(), compiled.train()
    torch.compiler.reset()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert_same(compiled, plain)


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
    timing = {name for name in expected if name.endswith(("runtime", "per_second", "num_tokens", "preparation_time"))}
    for name in expected.keys() - timing - {"epoch"}:
        assert found[name] == expected[name] == logged_then[name], name
    assert found.keys() - timing - {"epoch"} == expected.keys() - timing - {"epoch"}


# Data


DATA = {
    "an epoch's last is smaller": (dict(data=11, num_train_epochs=2, max_steps=-1), [4, 4, 3] * 2),
    "dropped": (dict(data=11, num_train_epochs=2, max_steps=-1, dataloader_drop_last=True), [4, 4] * 2),
    "an epoch's last of an accumulation": (
        dict(data=11, num_train_epochs=2, max_steps=-1, gradient_accumulation_steps=2), [4, 4, 3] * 2,
    ),
    "a stream": (dict(data="stream", max_steps=5), [4, 4, 3, 4, 4]),
    # Of a stream whose length is not known, `Trainer` leaves what an epoch has over to the next step.
    "a stream, accumulated": (dict(data="stream", max_steps=3, gradient_accumulation_steps=2), [4, 4, 3, 4, 4, 3, 4, 4]),
    "tokens counted on each rank": (
        dict(data=8, average_tokens_across_devices=False, gradient_accumulation_steps=2, max_steps=3), [4] * 6,
    ),
    "more steps than an epoch has": (dict(data=6, max_steps=9), [4, 2] * 4 + [4]),
    "grouped by length": (dict(data=16, train_sampling_strategy="group_by_length", max_steps=4), [4] * 4),
    "a small fraction": (dict(data=8, rehearsal_fraction=0.01, max_steps=3), [4] * 3),
    "a text in every other": (
        dict(data=16, rehearsal_fraction=0.1, gradient_accumulation_steps=4, max_steps=3), [4] * 12,
    ),
    "three texts in two": (dict(data=16, rehearsal_fraction=0.27, gradient_accumulation_steps=2, max_steps=3), [4] * 6),
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
    data = concatenate_datasets([labelled, data]).select_columns(["input_ids", "labels"])
    check(
        rehearsing(
            data=data, dataset_kwargs={"skip_prepare_dataset": True}, train_sampling_strategy="sequential",
            learning_rate=0.05, max_steps=3,
        ),
        gradient=False,
    )  # fmt: skip


@pytest.mark.parametrize("documents", [False, True], ids=["rows", "documents"])
def test_whatever_tells_tokens_apart_goes_on_in_the_texts(documents):
    """Positions beside a mask, as a collator of one's own may give them; the numbers of documents, for convolutions along them."""
    texts = [[7, 8, 9], [5, 6]]
    if documents:
        collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
        features = [{"input_ids": ids, "labels": ids} for ids in ([1, 2, 3, 4], [1, 2])]
        found = with_documents(collator(features), texts, pad=0)
        assert with_documents(collator(features), texts, pad=0, multiple=16)["input_ids"].shape[1] % 16 == 0
        expected = collator([*features, *({"input_ids": ids, "labels": [-100] * len(ids)} for ids in texts)])
    else:
        collator = DataCollatorForLanguageModeling(pad_token_id=0, return_position_ids=True)
        features = [{"input_ids": ids, "labels": ids} for ids in ([1], [1, 2])]
        found = with_rows(collator(features), texts, 0)
        expected = collator([*features, *({"input_ids": ids, "labels": [-100] * len(ids)} for ids in texts)])
    assert found.keys() == expected.keys() and len(found) == (8 if documents else 4)
    for name, value in expected.items():
        assert found[name] == value if isinstance(value, int) else torch.equal(found[name], value), name
        assert isinstance(value, int) or found[name].dtype == value.dtype, name


# Resumed


@pytest.mark.parametrize("calls", [0, 17, 30], ids="after {} tokens".format)
def test_a_run_that_was_stopped_while_texts_were_written_ends_as_one_that_was_not(
    rehearsing,  # noqa: F811
    tmp_path,
    monkeypatch,
    calls,
):
    monkeypatch.setattr("trl_ema.texts.BATCH_SIZE", 3)
    whole = rehearsing(output_dir=str(tmp_path / "whole"))
    whole.train()
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "other"))
    stopped = rehearsing()
    interrupted_after(stopped.model.get_base_model(), calls)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    parts = len(list(tmp_path.glob("other/texts/*.parts/*.safetensors")))
    assert parts == {0: 0, 17: 1, 30: 2}[calls] and not (tmp_path / "out" / FILE).exists()
    again = rehearsing()
    batches, generate = [], again.model.get_base_model().generate
    again.model.get_base_model().generate = lambda *a, **k: batches.append(1) or generate(*a, **k)
    again.train()
    assert of(again).texts == of(whole).texts
    assert len(batches) == {0: 6, 1: 5, 2: 4}[parts]  # a pass for each batch of raw texts, two for each of chats
    assert_same(again, whole)


@pytest.mark.parametrize(
    "options",
    [{}, dict(gradient_accumulation_steps=2), dict(packing=True, per_device_train_batch_size=1, max_length=64)],
    ids=["rows", "accumulated", "packed"],
)
def test_a_run_goes_on_from_any_step_of_a_budgets_adaptation(rehearsing, tmp_path, options):  # noqa: F811
    """Whichever pass over the texts it is in."""
    options = dict(max_steps=7, drift_budget=0.01, save_strategy="steps", save_steps=1, teacher="ema") | options
    whole = rehearsing(output_dir=str(tmp_path / "whole"), peft_config=lora(lora_dropout=0.2), **options)
    whole.train()
    assert len({*logged(whole, "rehearsal_weight")}) == 7 and of(whole).taken > 10
    for step in (4, 6):
        resumed = rehearsing(
            output_dir=str(tmp_path / f"from {step}"), peft_config=lora(lora_dropout=0.2), seed=42, **options
        )
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same(resumed, whole, last=7 - step)
        assert of(resumed).state() == of(whole).state()


@pytest.mark.parametrize(("before", "after"), [({}, dict(drift_budget=0.01)), (dict(drift_budget=0.01), {})], ids=str)
def test_a_budget_that_comes_or_goes_is_told(rehearsing, tmp_path, caplog, before, after):  # noqa: F811
    rehearsing(save_strategy="steps", save_steps=2, **before).train()
    resumed = rehearsing(output_dir=str(tmp_path / "resumed"), **after)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert f"'drift_budget': {before.get('drift_budget')}" in caplog.text
    assert f"this run goes on with {of(resumed).state()['options']}" in caplog.text
    assert logged(resumed, "rehearsal_weight")[-2] == 2.0


def test_ranks_that_find_texts_go_with_those_that_had_found_none(rehearsing, monkeypatch):  # noqa: F811
    """They were finished in between, by another job: who went on alone would wait for the others for ever."""
    rehearsing().train()
    trainer, calls = rehearsing(), []
    found = of(trainer).own.at_hand
    write = "trl_ema.regularizers.own_texts.write_texts"
    monkeypatch.setattr(write, lambda *_, **options: calls.append(options["world_size"]) or found)
    trainer.train()
    assert not calls
    other = torch.tensor([True], device=DEVICE)
    monkeypatch.setattr(trainer.accelerator, "gather", lambda missing: torch.cat([missing[None], other]))
    assert of(trainer).own.get(trainer) == found and calls == [1]


# Options that exclude it


def test_label_smoothing_is_refused(rehearsing):  # noqa: F811
    with pytest.raises(ValueError, match="`label_smoothing_factor=0.1` is not supported"):
        rehearsing(label_smoothing_factor=0.1)


def test_texts_given_are_those_of_the_model_before_training(rehearsing, tmp_path):  # noqa: F811
    path = tmp_path / "given.safetensors"
    sampling = Sampling(num_texts=7, num_tokens=12, seed=3)
    texts = write_texts(get_peft_model(tiny_model(), lora()), make_tokenizer(), sampling, path, progress=False)
    trainer = rehearsing(rehearsal_texts=str(path), max_steps=6)
    check(trainer, least=0)
    assert of(trainer).texts == texts and TEXTS["rehearsal_num_texts"] != 7


def test_another_seed_which_takes_the_texts_in_another_order_is_told(rehearsing, tmp_path, caplog):  # noqa: F811
    rehearsing(save_strategy="steps", save_steps=2, seed=1).train()
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    for seed, told in ((1, False), (2, True)):
        caplog.clear()
        rehearsing(output_dir=str(tmp_path / "resumed"), seed=seed).train(resume_from_checkpoint=checkpoint)
        assert ("The checkpoint was made with" in caplog.text) == told
