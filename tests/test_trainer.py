import dataclasses
import math
import os
import shutil
from types import SimpleNamespace

import datasets
import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, USE_CPU, adapter_weights, config, logged, lora, rows, tiny_model
from peft import PeftModel, PromptTuningConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import TrainerCallback
from transformers.integrations.flash_attention import get_target_dtype
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from trl import SFTConfig, SFTTrainer

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig
from trl_ema.checks import check_free_space
from trl_ema.forward import _of_sequences, _tokens_of, sequence_numbers
from trl_ema.measurement import DriftCallback, Measurement
from trl_ema.processes import Launch, refuse_parallelism, refuse_sharding


FORMATS = {
    "completion_only": dict(data="prompt_completion"),
    "full_sequence": dict(data="prompt_completion", completion_only_loss=False),
    "text": dict(data="text"),
    "assistant_only": dict(data="messages", assistant_only_loss=True),
    "accumulation": dict(data="prompt_completion", gradient_accumulation_steps=3, per_device_train_batch_size=2),
    "packing_bfd": dict(data="prompt_completion", packing=True, per_device_train_batch_size=1),
    "packing_bfd_split": dict(data="text", packing=True, packing_strategy="bfd_split", per_device_train_batch_size=1),
    "packing_wrapped": dict(data="text", packing=True, packing_strategy="wrapped"),
    "padding_free": dict(data="prompt_completion", padding_free=True, max_length=None),
    "dft": dict(data="prompt_completion", loss_type="dft"),
    "checkpointing": dict(data="prompt_completion", gradient_checkpointing=True),
    "checkpointing_reentrant": dict(
        data="prompt_completion", gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    ),
}


def same_run(a, b, rtol=0.0, atol=0.0, keys=("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")):
    for key in keys:
        assert len(logged(a, key)) == 4
        torch.testing.assert_close(logged(a, key), logged(b, key), rtol=rtol, atol=atol)
    ours, theirs = adapter_weights(a), adapter_weights(b)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=rtol, atol=atol)


# Equal to SFTTrainer


@pytest.mark.parametrize("name", FORMATS)
def test_no_teacher_equals_sft_trainer_step_for_step(make_trainer, name):
    changes = dict(FORMATS[name])
    data = rows(kind=changes.pop("data"))
    ours = make_trainer(data=data, teacher="none", **changes)
    theirs = make_trainer(data=data, teacher="none", trainer_class=SFTTrainer, **changes)
    ours.train(), theirs.train()
    same_run(ours, theirs)


@pytest.mark.parametrize("name", FORMATS)
def test_weight_zero_equals_sft_trainer_to_float_tolerance(make_trainer, name):
    """The same through our fused loss: one forward, gradient formed in it, normalized by TRL."""
    changes = dict(FORMATS[name])
    data = rows(kind=changes.pop("data"))
    ours = make_trainer(data=data, kl_weight=0.0, **changes)
    theirs = make_trainer(data=data, teacher="none", trainer_class=SFTTrainer, **changes)
    ours.train(), theirs.train()
    same_run(ours, theirs, rtol=2e-3, atol=2e-4)
    if name != "dft":
        torch.testing.assert_close(logged(ours, "loss"), logged(ours, "ce_loss"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("teacher", ["ema", "frozen", "none"])
def test_evaluation_reports_the_student_as_sft_would(make_trainer, teacher):
    ours = make_trainer(teacher=teacher, eval_dataset=rows(7, seed=9), per_device_eval_batch_size=2)
    theirs = make_trainer(
        teacher="none", trainer_class=SFTTrainer, eval_dataset=rows(7, seed=9), per_device_eval_batch_size=2
    )
    metrics, expected = ours.evaluate(), theirs.evaluate()
    for key in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[key] == expected[key]
    assert "eval_teacher_loss" not in metrics


def test_teacher_is_evaluated_on_request(make_trainer):
    trainer = make_trainer(eval_teacher=True, eval_dataset=rows(7, seed=9), eval_strategy="steps", eval_steps=2)
    first = trainer.evaluate()
    assert first["eval_teacher_loss"] == pytest.approx(first["eval_loss"])
    trainer.train()
    assert len(logged(trainer, "eval_teacher_loss")) == 2
    last = trainer.evaluate()
    with trainer.teacher.activate():
        alone = SFTTrainer.evaluation_loop(trainer, trainer.get_eval_dataloader(), "", prediction_loss_only=True)
    assert last["eval_teacher_loss"] == alone.metrics["eval_loss"] != last["eval_loss"]


UNLABELLED = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 4)


@pytest.mark.parametrize("teacher", ["ema", "none"])
@pytest.mark.parametrize("several", [False, True])
def test_evaluation_data_without_a_label_are_refused_before_training(make_trainer, teacher, several):
    data = {"good": rows(4), "bad": UNLABELLED} if several else UNLABELLED
    name = "bad" if several else "eval"
    with pytest.raises(
        ValueError, match=f"No token of the evaluation data set '{name}' carries a label.*Raise `max_length`"
    ):
        make_trainer(teacher=teacher, eval_dataset=data)


@pytest.mark.parametrize("eval_teacher", [False, True])
def test_without_a_label_the_teacher_has_no_loss_where_the_student_has_none(make_trainer, eval_teacher):
    trainer = make_trainer(eval_teacher=eval_teacher)
    metrics = trainer.evaluate(UNLABELLED)
    assert not {"eval_loss", "eval_teacher_loss"} & metrics.keys()
    for data in (UNLABELLED, UNLABELLED.select([])):
        metrics = trainer.predict(data).metrics
        assert ("test_loss" in metrics) == bool(len(data))
        assert ("test_teacher_loss" in metrics) == (eval_teacher and bool(len(data)))


def test_evaluation_of_several_data_sets(make_trainer):
    trainer = make_trainer(eval_teacher=True, eval_dataset={"a": rows(4, seed=8), "b": rows(4, seed=9)})
    metrics = trainer.evaluate()
    assert {"eval_a_loss", "eval_a_teacher_loss", "eval_b_loss", "eval_b_teacher_loss"} <= metrics.keys()


def test_an_sft_config_is_read_as_one_with_the_default_teacher(make_trainer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sft = SFTConfig("sft", use_cpu=USE_CPU, bf16=False, max_steps=1, report_to="none", save_strategy="no")
    trainer = make_trainer(args=sft)
    assert isinstance(trainer.args, MeanTeacherConfig) and trainer.args.teacher == "ema"
    trainer.train()


# The loss


def dense_step(trainer, batch, teacher_model, kl_weight=1.0, dft=False, eaft=False, prompt=False):
    """Mean of CE and, over labelled tokens or those of prompts, mean of KL, with all logits in memory, in float64."""
    log_ps, labels = predictions(trainer.model.double(), batch)
    with torch.no_grad():
        log_pt, _ = predictions(teacher_model.double(), batch)
    mask = labels != -100
    ce = -log_ps[mask].gather(1, labels[mask][:, None]).squeeze(1)
    if dft:
        ce = ce * (-ce.detach()).exp()
    if eaft:
        top = log_ps[mask].detach().topk(20).values.softmax(-1)
        ce = ce * torch.special.entr(top).sum(-1) / math.log(20)
    kl = F.kl_div(log_ps, log_pt, log_target=True, reduction="none").sum(-1)[~mask if prompt else mask]
    return ce.mean() + kl_weight * kl.mean()


def predictions(model, batch):
    """Log-probabilities `(tokens, vocab)` and labels `(tokens,)` of all that is predicted; packed documents one by one."""
    if "attention_mask" in batch:
        logits, lengths = (
            model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).logits,
            batch["attention_mask"].sum(-1),
        )
        rows_of = list(zip(logits, batch["labels"], strict=True))
    else:
        lengths = batch["cu_seq_lens_q"].diff()
        ids, labels = (batch[k][0].split(lengths.tolist()) for k in ("input_ids", "labels"))
        rows_of = [(model(input_ids=one[None]).logits[0], own) for one, own in zip(ids, labels, strict=True)]
    logits = torch.cat([row[: n - 1] for (row, _), n in zip(rows_of, lengths, strict=True)])
    return logits.log_softmax(-1), torch.cat([own[1:n] for (_, own), n in zip(rows_of, lengths, strict=True)])


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    ("options", "dense"),
    [
        (dict(), dict()),
        (dict(loss_type="dft"), dict(dft=True)),
        (dict(kl_tokens="prompt"), dict(prompt=True)),
        (dict(entropy_weighting=True), dict(eaft=True)),
        (dict(entropy_weighting=True, kl_tokens="prompt"), dict(eaft=True, prompt=True)),
        (dict(entropy_weighting=True, teacher="none"), dict(eaft=True, kl_weight=0)),
    ],
    ids=[
        "ce",
        "dft (ASFT)",
        "prompt tokens (SelfAug)",
        "entropy, frozen",
        "entropy, prompt tokens",
        "entropy alone (EAFT)",
    ],
)
def test_frozen_teacher_loss_and_gradient_equal_dense_float64(make_trainer, options, dense, packed):
    """
    With DFT this is ASFT, arXiv:2509.23753: p(y)·CE, p(y) held constant, plus KL to the base model; with that on prompt tokens
    SelfAug, arXiv:2509.03934; without a teacher, CE weighted by the entropy of the prediction, EAFT, arXiv:2601.02151.
    """
    held = {} if options.get("teacher") == "none" else dict(teacher="frozen", kl_weight=0.6)
    trainer = make_trainer(**held, **options, **(dict(padding_free=True, max_length=None) if packed else {}))
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    trainer.model.train().double()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    grads = {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    expected = dense_step(trainer, batch, tiny_model().to(DEVICE), **(dict(kl_weight=0.6) | dense))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-7 if packed else 1e-9, atol=0)
    for name, p in trainer.model.named_parameters():
        if p.grad is not None:
            # The model's norms round to float32: other sums before them, of documents alone or over more tokens, show.
            exact = not packed and "prompt" not in dense
            torch.testing.assert_close(grads[name], p.grad, rtol=1e-6, atol=1e-12 if exact else 1e-8)


@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_batch_eight_equals_accumulation_of_eight(make_trainer, teacher):
    data = rows(64)
    runs = []
    for batch, accumulation in ((8, 1), (2, 4), (1, 8)):
        trainer = make_trainer(
            data=data, teacher=teacher, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation
        )
        trainer.train()
        runs.append(trainer)
    for other in runs[1:]:
        same_run(runs[0], other, rtol=1e-3, atol=1e-4, keys=("loss", "grad_norm"))


@pytest.mark.parametrize(
    "options",
    [dict(kl_tokens="all"), dict(kl_tokens="prompt"), dict(kl_tokens="prompt", entropy_weighting=True)],
    ids=["all", "prompt", "prompt, entropy weighting"],
)
def test_the_divergence_is_a_mean_over_its_own_tokens_whatever_the_batching(make_trainer, options):
    data = rows(64)
    runs = []
    for batch, accumulation in ((8, 1), (1, 8)):
        trainer = make_trainer(
            data=data, teacher="frozen", **options, per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
        )  # fmt: skip
        trainer.train()
        runs.append(trainer)
    same_run(*runs, rtol=1e-3, atol=1e-4, keys=("loss", "grad_norm", "kl_loss"))
    if "entropy_weighting" in options:  # `ce_loss` is without the weights
        return
    losses = torch.tensor(logged(runs[0], "loss"))
    parts = torch.tensor(logged(runs[0], "ce_loss")) + torch.tensor(logged(runs[0], "kl_loss"))
    torch.testing.assert_close(losses, parts, rtol=1e-3, atol=1e-3)


def test_all_tokens_leaves_out_padding_and_the_next_document():
    from trl_ema.forward import divergence_mask

    labels = torch.tensor([[-100, -100, 7, 8], [-100, 9, -100, -100]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    assert divergence_mask("loss", labels, attention).tolist() == [[False, True, True], [True, False, False]]
    assert divergence_mask("all", labels, attention).tolist() == [[True, True, True], [True, False, False]]
    assert divergence_mask("prompt", labels, attention).tolist() == [[True, False, False], [False, False, False]]
    packed = dict(labels=torch.tensor([[-100, 5, -100, 6]]), position_ids=torch.tensor([[0, 1, 0, 1]]))
    assert divergence_mask("all", **packed).tolist() == [[True, False, True]]
    assert divergence_mask("prompt", **packed).tolist() == [[False, False, False]]


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(kl_tokens="all"),
        dict(kl_tokens="prompt"),
        dict(packing=True, per_device_train_batch_size=1),
        dict(packing=True, per_device_train_batch_size=1, kl_tokens="prompt"),
        dict(teacher="frozen"),
    ],
    ids=["rows", "all tokens", "prompts", "packed documents", "packed prompts", "base as teacher"],
)
def test_a_share_of_the_sequences_gives_the_same_loss_in_the_mean(make_trainer, monkeypatch, options):
    trainer = make_trainer(kl_weight=0.6, kl_fraction=0.3, **options)
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    trainer.model.train().double()
    batch = next(iter(trainer.get_train_dataloader()))
    number = int(sequence_numbers(**batch).max()) + 1
    assert number > 1

    def loss_and_gradient(*choice):
        monkeypatch.setattr(trainer.regularizers[0], "choose_sequences", lambda *_: choice)
        trainer.model.zero_grad()
        loss = trainer.compute_loss(trainer.model, dict(batch))
        loss.backward()
        return torch.cat([loss[None], *[p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]])

    whole, nobody = loss_and_gradient(None, 1.0), loss_and_gradient(torch.tensor([], dtype=torch.long), 1.0)
    draws = [loss_and_gradient(torch.tensor([i]), number) for i in range(number)]
    torch.testing.assert_close(sum(draws) / number, whole.detach(), rtol=1e-5, atol=1e-7)
    assert whole[0] > nobody[0] + 1e-4  # which is the cross-entropy


def test_documents_of_a_packed_row_are_cut_out_whole(make_trainer):
    trainer = make_trainer(padding_free=True, max_length=None)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    starts = batch["cu_seq_lens_q"].tolist()
    assert len(starts) == 5
    chosen = torch.tensor([1, 3], device=DEVICE)
    tokens = _tokens_of(chosen, batch)
    taught = _of_sequences(chosen, tokens, int(tokens.sum()), batch)
    documents = [slice(starts[i], starts[i + 1]) for i in (1, 3)]
    for key in ("input_ids", "labels", "position_ids"):
        expected = torch.cat([batch[key][:, document] for document in documents], 1)
        assert torch.equal(taught[key], expected) and torch.equal(batch[key][tokens][None], expected)
    lengths = [document.stop - document.start for document in documents]
    for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
        assert taught[key].tolist() == [0, lengths[0], sum(lengths)] and taught[key].dtype == torch.int32


def test_each_sequence_is_drawn_with_the_probability_asked_for(make_trainer):
    trainer = make_trainer(kl_fraction=0.3)
    batch = next(iter(trainer.get_train_dataloader()))
    seen = torch.zeros(4)
    for trainer.state.global_step in range(500):
        chosen, factor = trainer.regularizers[0].choose_sequences(batch, trainer.state.global_step)
        assert len(chosen) in (1, 2) and factor == pytest.approx(1 / 0.3)
        seen[chosen] += 1
    # Standard deviation of a share of 500 draws is 0.02.
    torch.testing.assert_close(seen / 500, torch.full((4,), 0.3), rtol=0, atol=0.08)


def test_every_rank_of_a_sharded_model_takes_the_teachers_pass(make_trainer, monkeypatch):
    trainer = make_trainer(kl_fraction=0.01)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(trainer.regularizers[0].choose_sequences(batch, trainer.state.global_step)[0]) == 0
    monkeypatch.setattr("trl_ema.regularizers.divergence.is_sharded", lambda _: True)
    chosen, factor = trainer.regularizers[0].choose_sequences(batch, trainer.state.global_step)
    assert len(chosen) == 1 and factor == 0


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
@pytest.mark.parametrize("teacher", ["ema", "frozen"])
def test_divergence_is_exactly_zero_at_the_first_step_with_dropout_on(make_trainer, teacher, direction):
    trainer = make_trainer(teacher=teacher, kl_direction=direction, peft_config=lora(lora_dropout=0.5), max_steps=2)
    trainer.train()
    first, second = logged(trainer, "kl_loss")
    assert first == pytest.approx(0.0, abs=1e-7)
    assert second > 1e-6


def test_a_stronger_teacher_keeps_the_student_closer_to_where_it_started(make_trainer):
    drifts = []
    for weight in (0.0, 1.0, 10.0):
        trainer = make_trainer(teacher="frozen", kl_weight=weight, max_steps=12)
        trainer.train()
        drifts.append(logged(trainer, "kl_loss")[-1])
    assert drifts[0] > drifts[1] > drifts[2]


def test_a_batch_without_labels_gives_an_attached_zero(make_trainer):
    trainer = make_trainer()
    trainer.model.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
    loss.backward()
    assert loss == 0
    grads = [p.grad for p in trainer.model.parameters() if p.requires_grad]
    assert all(g is None or not g.any() for g in grads) and any(g is not None for g in grads)


def test_kl_weight_follows_its_ramp(make_trainer):
    trainer = make_trainer(kl_weight=2.0, kl_warmup_ratio=0.5)
    trainer.train()
    expected = [2 * math.exp(-5 * (1 - min(s / 2, 1)) ** 2) for s in (0, 1, 2, 3)]
    assert logged(trainer, "kl_weight") == pytest.approx(expected)
    parts = zip(logged(trainer, "ce_loss"), logged(trainer, "kl_loss"), logged(trainer, "kl_weight"), strict=True)
    assert logged(trainer, "loss") == pytest.approx([ce + weight * kl for ce, kl, weight in parts], rel=1e-4)


# The average


def test_half_life_sets_the_decay_from_the_length_of_the_run(make_trainer):
    trainer = make_trainer(ema_half_life=0.5)
    trainer.train()
    assert logged(trainer, "ema_decay") == pytest.approx([0.5 ** (1 / 2)] * 4)
    assert trainer.teacher.num_updates == 4
    assert all(d > 0 for d in logged(trainer, "teacher_distance"))


def test_an_update_before_training_needs_a_decay_that_is_known(make_trainer):
    trainer = make_trainer(ema_decay=0.5)
    trainer.after_step()
    assert trainer.teacher.num_updates == 1
    assert trainer.regularizers[0].schedule["ema_decay"] == 0.5
    for ask in (lambda trainer: trainer.after_step(), lambda trainer: trainer.regularizers[0].schedule):
        with pytest.raises(ValueError, match="half-life is a fraction of the run.*Set `ema_decay`, or leave"):
            ask(make_trainer())


def test_updates_are_as_rare_as_asked(make_trainer):
    trainer = make_trainer(ema_decay=0.5, ema_update_steps=2)
    trainer.train()
    assert trainer.teacher.num_updates == 2


def test_warmup_lowers_the_early_decay(make_trainer):
    trainer = make_trainer(ema_decay=0.999, ema_warmup=True)
    trainer.train()
    assert logged(trainer, "ema_decay") == pytest.approx([1 / 10, 2 / 11, 3 / 12, 4 / 13])


def test_the_average_follows_a_plain_loop_over_the_run(make_trainer):
    class Loop(TrainerCallback):
        """The mean teacher as one would write it by hand."""

        def on_train_begin(self, args, state, control, model, **kwargs):
            self.average = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

        def on_step_end(self, args, state, control, model, **kwargs):
            for n, p in model.named_parameters():
                if p.requires_grad:
                    self.average[n] = 0.8 * self.average[n] + 0.2 * p.detach()

    loop = Loop()
    trainer = make_trainer(ema_decay=0.8, callbacks=[loop])
    trainer.train()
    for name, average in loop.average.items():
        twin = trainer.model.get_parameter(name.replace(".default.", ".teacher."))
        torch.testing.assert_close(twin, average)


def test_a_skipped_optimizer_step_does_not_move_the_teacher(make_trainer, monkeypatch):
    trainer = make_trainer(ema_decay=0.5)
    monkeypatch.setattr(type(trainer.accelerator), "optimizer_step_was_skipped", property(lambda self: True))
    trainer.train()
    assert trainer.teacher.num_updates == 0


def test_decay_one_trains_like_a_frozen_teacher(make_trainer):
    ema, frozen = make_trainer(ema_decay=1.0), make_trainer(teacher="frozen")
    ema.train(), frozen.train()
    assert frozen.teacher.is_base and not ema.teacher.is_base
    same_run(ema, frozen, rtol=1e-4, atol=1e-5)


def test_anchor_one_trains_like_a_frozen_teacher(make_trainer):
    anchored, frozen = make_trainer(teacher_anchor=1.0), make_trainer(teacher="frozen")
    anchored.train(), frozen.train()
    same_run(anchored, frozen, rtol=1e-4, atol=1e-5)


def test_training_from_a_given_adapter_holds_it_to_that_adapter(make_trainer, tmp_path):
    first = make_trainer(teacher="none")
    first.train()
    first.save_model(str(tmp_path / "first"))
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", is_trainable=True)
    trainer = make_trainer(model=model, peft_config=None, teacher="frozen")
    trainer.train()
    assert not trainer.teacher.is_base
    assert logged(trainer, "kl_loss")[0] == pytest.approx(0.0, abs=1e-7)
    frozen, given = adapter_weights(trainer, "teacher"), adapter_weights(first)
    assert all(torch.equal(frozen[n.replace(".default.", ".teacher.")], w) for n, w in given.items())


# Options of SFTConfig


def test_iterable_data_sets(make_trainer):
    shuffled = rows().shuffle(seed=0)  # a stream comes in its own order, so give both runs the same
    stream = make_trainer(data=shuffled.to_iterable_dataset())
    stream.train()
    plain = make_trainer(data=shuffled, train_sampling_strategy="sequential")
    plain.train()
    same_run(stream, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_a_trainer_made_since_with_another_precision_is_told(make_trainer, teacher):
    half = make_trainer(bf16=True, teacher=teacher)
    make_trainer()
    with pytest.raises(RuntimeError, match="with mixed precision 'bf16'; since .*with 'no'.*Make this trainer again"):
        half.train()
    assert half.state.global_step == 0
    with half.precision():  # what is measured of it is in its own
        assert torch.is_autocast_enabled(DEVICE)
    make_trainer(bf16=True)
    half.train()  # the precision it was made with
    half = make_trainer(bf16=True, teacher=teacher)
    config(half.args.output_dir)
    with pytest.raises(RuntimeError, match="another trainer or configuration was made, with None"):
        half.train()


@pytest.mark.parametrize("direction", ["forward", "reverse", "jsd"])
def test_bf16_training_stays_close_to_float32(make_trainer, direction):
    half = make_trainer(bf16=True, kl_direction=direction)
    half.train()  # before there is the other: accelerate has one precision, that of the trainer which was made last
    full = make_trainer(kl_direction=direction)
    full.train()
    torch.testing.assert_close(logged(half, "loss"), logged(full, "loss"), rtol=0.05, atol=0.05)
    assert logged(half, "kl_loss")[0] == pytest.approx(0.0, abs=1e-6)


def test_neftune_noise_is_the_students_alone(make_trainer):
    trainer = make_trainer(teacher="frozen", neftune_noise_alpha=5.0)
    trainer.train()
    assert logged(trainer, "kl_loss")[0] > 0
    quiet = make_trainer(teacher="frozen")
    with quiet.teacher.activate(), trainer.teacher.activate():
        ids = torch.arange(3, 15, device=DEVICE)[None]
        assert torch.equal(trainer.model(ids).logits, quiet.model(ids).logits)


@pytest.mark.parametrize(
    "changes",
    [
        dict(bf16=True),
        pytest.param(dict(), marks=pytest.mark.slow),
        pytest.param(dict(bf16=True, kl_fraction=0.5), marks=pytest.mark.slow),
        pytest.param(dict(bf16=True, teacher="frozen"), marks=pytest.mark.slow),
    ],
    ids=["bf16", "float32", "half of the sequences", "frozen"],
)
def test_a_compiled_model_gives_the_same_run(make_trainer, changes):
    """The teacher's pass switches attributes of modules, of which the compiler must know."""
    compiles = dict(torch_compile=True, torch_compile_backend="aot_eager")
    # One layer: each is compiled anew.
    plain, compiled = (
        make_trainer(model=tiny_model(num_hidden_layers=1), **changes, **options) for options in ({}, compiles)
    )
    plain.train(), compiled.train()
    torch.compiler.reset()
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    same_run(compiled, plain)


@pytest.mark.gpu
def test_activation_offloading_gives_the_same_run(make_trainer):
    offloaded, plain = make_trainer(activation_offloading=True, use_cpu=False), make_trainer(use_cpu=False)
    offloaded.train(), plain.train()
    same_run(offloaded, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
def test_fp16_follows_float32_and_only_steps_taken_move_the_teacher(make_trainer):
    half = make_trainer(fp16=True, use_cpu=False)
    half.train()  # before there is the other: with its precision nothing would be unscaled
    full = make_trainer(use_cpu=False)
    full.train()
    torch.testing.assert_close(logged(half, "kl_loss"), logged(full, "kl_loss"), rtol=0.1, atol=0.05)
    # The first loss scales overflow: those steps are skipped.
    taken = sum(norm == norm and norm != float("inf") for norm in logged(half, "grad_norm"))
    assert half.teacher.num_updates == taken <= full.teacher.num_updates == 4


# Files


def test_saved_student_and_teacher_load_with_plain_peft(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.train()
    trainer.save_model()
    out = tmp_path / "out"
    assert {"adapter_model.safetensors", "teacher", "README.md", "tokenizer.json"} <= set(os.listdir(out))
    ids = torch.arange(3, 15, device=DEVICE)[None]
    student = PeftModel.from_pretrained(tiny_model(), out).eval().to(DEVICE)
    teacher = PeftModel.from_pretrained(tiny_model(), out / "teacher").eval().to(DEVICE)
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(student(ids).logits, trainer.model(ids).logits)
        with trainer.teacher.activate():
            torch.testing.assert_close(teacher(ids).logits, trainer.model(ids).logits)


def test_a_base_model_teacher_writes_no_folder(make_trainer, tmp_path):
    trainer = make_trainer(teacher="frozen")
    trainer.save_model()
    assert "teacher" not in os.listdir(tmp_path / "out")


RESUMABLE = {
    "ema": dict(ema_warmup=True, kl_warmup_ratio=0.9, lr_scheduler_type="linear"),
    "ema, dropout, accumulation": dict(peft_config=lora(lora_dropout=0.3), gradient_accumulation_steps=2),
    "modules_to_save": dict(peft_config=lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "anchored": dict(teacher_anchor=0.5),
    "frozen": dict(teacher="frozen"),
    "none": dict(teacher="none"),
    "kl_fraction": dict(kl_fraction=0.4, gradient_accumulation_steps=2, per_device_train_batch_size=2),
}


@pytest.mark.parametrize("name", RESUMABLE)
def test_resumed_run_equals_an_uninterrupted_one_bit_for_bit(make_trainer, tmp_path, name):
    options = dict(RESUMABLE[name], max_steps=6, save_strategy="steps", save_steps=3, gradient_checkpointing=True)
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    ours, theirs = dict(resumed.model.named_parameters()), dict(whole.model.named_parameters())
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs) and ours.keys() == theirs.keys()
    timings = ("_runtime", "_per_second", "total_flos", "train_loss")
    assert len(whole.state.log_history) == len(resumed.state.log_history) == 7
    for mine, other in zip(resumed.state.log_history, whole.state.log_history, strict=True):
        assert {k: v for k, v in mine.items() if not k.endswith(timings)} == {
            k: v for k, v in other.items() if not k.endswith(timings)
        }
    if whole.teacher is not None:
        assert resumed.teacher.num_updates == whole.teacher.num_updates


def test_best_student_comes_back_with_its_own_teacher(make_trainer, tmp_path):
    trainer = make_trainer(
        eval_dataset=rows(5, seed=9), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, learning_rate=0.3, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best and not best.endswith("-4")
    loaded = PeftModel.from_pretrained(tiny_model(), f"{best}/teacher").to(DEVICE)
    expected = {n.replace(".default.", ".teacher."): p for n, p in loaded.named_parameters() if ".default." in n}
    assert all(torch.equal(w, expected[n]) for n, w in adapter_weights(trainer, "teacher").items())
    student = dict(PeftModel.from_pretrained(tiny_model(), best).to(DEVICE).named_parameters())
    assert all(torch.equal(w, student[n]) for n, w in adapter_weights(trainer).items())


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(peft_config=lora(target_modules=["q_proj"])), "Student checkpoint .* first unexpected"),
        (dict(peft_config=lora(r=2)), r"Student checkpoint .* has shape \(4"),
        (dict(teacher="frozen"), "holds a teacher adapter, but the frozen teacher"),
        (dict(peft_config=lora(lora_alpha=16)), "Student checkpoint .* trained with `lora_alpha=8`, the model has 16"),
        (dict(peft_config=lora(use_rslora=True)), "Student checkpoint .* trained with `use_rslora=False`"),
        (
            dict(teacher_anchor=0.5),
            "Teacher checkpoint .* `lora_alpha=8`.* Resume with the original .*`teacher_anchor`",
        ),
    ],
)
def test_resume_with_another_setup_is_refused_and_changes_nothing(make_trainer, tmp_path, changes, match):
    make_trainer(save_strategy="steps", save_steps=4).train()
    other = make_trainer(output_dir=str(tmp_path / "other"), **changes)
    before = adapter_weights(other)
    with pytest.raises(ValueError, match=match):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert all(torch.equal(before[n], w) for n, w in adapter_weights(other).items())


# Bad input


@pytest.mark.parametrize(
    "prepare, match",
    [
        (
            lambda: get_peft_model(tiny_model(), lora(), adapter_name="other"),
            "adapter is named 'other'; expected 'default'",
        ),
        (lambda: get_peft_model(tiny_model(), lora(inference_mode=True)), "has no trainable parameter"),
        (lambda: get_peft_model(tiny_model(), lora(target_modules=["lm_head"])), "has an adapter on `lm_head`"),
    ],
)
def test_an_unfit_adapter_is_refused_before_the_data_are_tokenized(make_trainer, monkeypatch, prepare, match):
    def tokenize(*args, **kwargs):
        raise AssertionError("tokenized")

    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", tokenize)
    with pytest.raises(ValueError, match=match):
        make_trainer(model=prepare(), peft_config=None)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_prompt_tokens_in_data_without_prompts_are_refused(make_trainer, streaming, packing):
    data = rows(kind="text").to_iterable_dataset() if streaming else rows(kind="text")
    options = dict(data=data, packing=packing, max_length=32)
    with pytest.raises(
        ValueError, match="`kl_tokens='prompt'` has no token in this training data.*use `kl_tokens='all'`"
    ):
        make_trainer(kl_tokens="prompt", **options)
    make_trainer(kl_tokens="all", **options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_without_a_prompt_have_their_cross_entropy_alone(make_trainer, accumulation):
    """The mean over no token is 0: here of whole optimizer steps, or of one of their micro-batches."""
    whole = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4
    part = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 2
    trainer = make_trainer(
        data=datasets.Dataset.from_list(whole + part), teacher="frozen", kl_tokens="prompt", max_steps=6 // accumulation,
        per_device_train_batch_size=1, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    with torch.no_grad():
        for p in trainer.model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    trainer.train()
    kls = torch.tensor(logged(trainer, "kl_loss"))
    assert kls.isfinite().all() and torch.tensor(logged(trainer, "loss")).isfinite().all()
    assert (kls > 0).any() and (accumulation > 1 or (kls == 0).sum() == 4)


@pytest.mark.parametrize("packing", [False, True])
def test_entropy_weighting_goes_with_every_teacher_and_rehearsal(make_trainer, packing, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))
    texts = dict(rehearsal_weight=1.0, rehearsal_num_texts=16, rehearsal_num_tokens=12)
    weighted, plain = {}, make_trainer(teacher="none", packing=packing, max_length=64)
    of_sft = plain.evaluate(plain.train_dataset)["eval_loss"]
    for name, options in {
        "none": dict(teacher="none"), "ema": dict(), "rehearsal": dict(teacher="none") | texts, "both": texts,
        "whole model": dict(teacher="none", peft_config=None, learning_rate=1e-3),
    }.items():  # fmt: skip
        trainer = make_trainer(entropy_weighting=True, packing=packing, max_length=64, **options)
        assert trainer.evaluate(trainer.train_dataset)["eval_loss"] == pytest.approx(
            of_sft, rel=1e-6
        )  # without weights
        trainer.train()
        weighted[name] = logged(trainer, "loss")[0]
        assert 0 < weighted[name] < logged(trainer, "ce_loss")[0]
    # At the start nothing differs but the rows beside.
    assert weighted["ema"] == pytest.approx(weighted["none"], rel=1e-5)
    assert weighted["rehearsal"] == pytest.approx(weighted["both"], rel=1e-5)


def test_a_stream_without_a_label_is_refused(make_trainer):
    masked = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, -100, -100]}] * 3)
    with pytest.raises(ValueError, match="No token of the training data carries a label"):
        make_trainer(data=masked.to_iterable_dataset())
    labelled = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}] * 8)
    trainer = make_trainer(data=labelled.to_iterable_dataset())
    trainer.train()
    assert logged(trainer, "loss")[0] > 0


def test_a_subclass_of_sft_config_is_read_without_its_own_fields(make_trainer, tmp_path):
    @dataclasses.dataclass
    class Mine(SFTConfig):
        own: int = 3

    trainer = make_trainer(args=Mine(str(tmp_path / "out"), use_cpu=USE_CPU, bf16=False, learning_rate=0.5))
    assert isinstance(trainer.args, MeanTeacherConfig) and trainer.args.learning_rate == 0.5


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(peft_config=None), "no PEFT adapter to average"),
        (dict(label_smoothing_factor=0.1), "`label_smoothing_factor=0.1` is not supported with a teacher"),
        (dict(peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)), "prompt learning"),
        (dict(peft_config=lora(target_modules=["q_proj", "lm_head"])), "lm_head"),
        (dict(peft_config=lora(bias="all")), "`bias='all'` trains the base model's own biases"),
        (dict(peft_config=lora(use_dora=True), teacher_anchor=0.5), "needs plain LoRA or rsLoRA"),
        (dict(data=datasets.Dataset.from_list([{"q": "x", "a": "y"}])), r"has columns \['a', 'q'\]; expected"),
        (dict(eval_dataset=datasets.Dataset.from_list([{"z": "x"}])), r"eval data set has columns \['z'\]"),
        (dict(data=rows().add_column("image", ["x"] * 16)), "has images"),
        (dict(max_length=2), "No token of the training data carries a label.*Raise `max_length`"),
        (
            dict(teacher="none", entropy_weighting=True, label_smoothing_factor=0.1),
            "or use `teacher='none'` without rehearsal",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_construction(make_trainer, changes, match):
    with pytest.raises(ValueError, match=match):
        make_trainer(**changes)


def test_all_masked_tokenized_data_is_refused(make_trainer):
    data = datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100] * 3}] * 8)
    with pytest.raises(ValueError, match="No token of the training data carries a label"):
        make_trainer(data=data, dataset_kwargs={"skip_prepare_dataset": True})


def test_a_loss_function_of_ones_own_is_refused(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="`compute_loss_func` replaces the loss"):
        EMARegularizedSFTTrainer(
            tiny_model(), config(tmp_path), train_dataset=rows(), processing_class=tokenizer, peft_config=lora(),
            compute_loss_func=lambda *a, **k: 0,
        )  # fmt: skip


@pytest.mark.parametrize("name", ["no/such-model", "a folder"])
def test_a_model_by_name_needs_an_adapter_as_any_other(make_trainer, tmp_path, name):
    with pytest.raises(ValueError, match="no PEFT adapter to average. Pass `peft_config="):
        make_trainer(model=name if name != "a folder" else tmp_path, peft_config=None)


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_an_adapter_config_of_another_kind_is_refused(make_trainer, teacher):
    with pytest.raises(TypeError, match=r"must be a config of PEFT, got `dict`. Pass `LoraConfig\(\*\*peft_config\)`"):
        make_trainer(peft_config=dict(r=4), teacher=teacher)


@pytest.mark.parametrize("given", ["config", "model"])
def test_an_initialization_that_is_another_at_each_load_is_refused_with_a_teacher(make_trainer, monkeypatch, given):
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *_, **__: pytest.fail("tokenized before"))
    model, peft_config = tiny_model(), lora(init_lora_weights="pissa_niter_4")
    if given == "model":
        model, peft_config = get_peft_model(model, peft_config), None
    with pytest.raises(ValueError, match="`init_lora_weights='pissa_niter_4'` takes a part.*`'pissa'` or `'olora'`"):
        make_trainer(model=model, peft_config=peft_config)


def test_an_initialization_that_is_another_at_each_load_is_warned_of_without_a_teacher(make_trainer, caplog):
    make_trainer(peft_config=lora(init_lora_weights="pissa_niter_4"), teacher="none")
    assert "path_initial_model_for_weight_conversion" in caplog.text
    caplog.clear()
    make_trainer(peft_config=lora(init_lora_weights="pissa"), teacher="none")
    assert "init_lora_weights" not in caplog.text


@pytest.mark.parametrize("name", ["half_only", "flash_on_a_gpu"])
def test_the_head_is_checked_and_everything_measured_under_any_attention(make_trainer, monkeypatch, name):
    """FlashAttention takes half precision alone, and only on a GPU, where FSDP and DeepSpeed bring the model later."""
    if name == "flash_on_a_gpu" and DEVICE != "cpu":
        pytest.skip("The model is on a GPU when it is checked, and this attention refuses to be called at all.")

    def attention(module, query, key, value, *args, **kwargs):
        dtype = get_target_dtype(query, module) or query.dtype  # to which transformers casts for FlashAttention
        assert name == "half_only" and dtype == torch.bfloat16, "FlashAttention only supports fp16 and bf16"
        return sdpa_attention_forward(module, query.to(dtype), key.to(dtype), value.to(dtype), *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, attention)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model = tiny_model()
    model.config._attn_implementation = name
    held_out = rows(4, seed=1)
    trainer = make_trainer(model=model, bf16=True, eval_dataset={"domain": held_out, "general": held_out})
    assert model.config._attn_implementation == name and next(model.parameters()).dtype == torch.float32
    if name == "half_only":
        trainer.add_callback(DriftCallback(trainer, 2))
        measure = Measurement(trainer, held_out, 2)
        trainer.train()
        assert len(logged(trainer, "loss")) == 4 and len(logged(trainer, "drift_domain")) == 2
        figures, answers = measure.models()
        assert figures["before"]["domain"]["kl_base_model"] == 0 < figures["student"]["domain"]["kl_base_model"]
        assert all(len(texts) == 4 for texts in answers.values())


RERUN = {
    "same": dict(),
    "frozen": dict(teacher="frozen"),
    "none": dict(teacher="none"),
    "fewer layers": dict(peft_config=lora(target_modules=["q_proj"])),
    "whole head": dict(peft_config=lora(target_modules=["q_proj"], modules_to_save=["lm_head"])),
    "full": dict(teacher="none", peft_config=None),
}


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("same", "same"), ("same", "fewer layers"), ("frozen", "none"), ("whole head", "whole head"), ("whole head", "full"),
    ],
)  # fmt: skip
def test_a_second_trainer_on_the_same_model_object_is_as_on_a_new_one(make_trainer, first, second):
    model = tiny_model()
    make_trainer(model=model, **RERUN[first]).train()
    again, fresh = make_trainer(model=model, **RERUN[second]), make_trainer(**RERUN[second])
    ours, theirs = dict(again.model.named_parameters()), dict(fresh.model.named_parameters())
    assert {n: p.requires_grad for n, p in ours.items()} == {n: p.requires_grad for n, p in theirs.items()}
    again.train(), fresh.train()
    assert logged(again, "loss") == logged(fresh, "loss")
    assert all(torch.equal(p, theirs[n]) for n, p in ours.items())


def test_a_second_trainer_on_the_same_adapter_starts_from_where_it_is(make_trainer):
    base = tiny_model()
    model = get_peft_model(base, lora())
    for _ in range(2):
        trainer = make_trainer(model=model, peft_config=None)
        assert trainer.teacher.distance() == 0
        trainer.train()
        assert logged(trainer, "kl_loss")[0] == pytest.approx(0.0, abs=1e-7)
        patches = (trainer.model.get_base_model().forward, vars(base)["_trl_ema_claim"].forward)
        assert patches[0] is not None and patches[1] is None  # not one over the other
    trainer = make_trainer(model=get_peft_model(base, lora()), peft_config=None)  # the cell that makes it, again
    trainer.train()
    assert len(logged(trainer, "loss")) == 4


@pytest.mark.parametrize("given", ["base", "adapter", "adapter, frozen"])
@pytest.mark.parametrize(
    "fault", [dict(peft_config=dict(r=4)), dict(data=rows().select([])), dict(label_smoothing_factor=0.1)]
)
def test_a_refused_second_trainer_leaves_the_first_and_what_it_has_trained_alone(make_trainer, tmp_path, given, fault):
    model = tiny_model() if given == "base" else get_peft_model(tiny_model(), lora())
    changes = dict(peft_config="lora" if given == "base" else None)
    first = make_trainer(model=model, teacher="frozen" if "frozen" in given else "ema", **changes)
    first.train()
    forward, trained = first.model.get_base_model().forward, adapter_weights(first)
    with pytest.raises((TypeError, ValueError), match="config of PEFT|no row|label_smoothing"):
        make_trainer(model=model, **changes | fault)
    assert first.model.get_base_model().forward is forward
    first.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors", device=DEVICE)
    assert trained and all(torch.equal(w, saved[n.replace(".default", "")]) for n, w in trained.items())
    assert (tmp_path / "saved" / "teacher").exists() == ("frozen" not in given)


@pytest.mark.parametrize("teacher", ["ema", "none"])
@pytest.mark.parametrize("given", ["base", "adapter"])
def test_a_trainer_whose_model_was_given_to_another_says_so(make_trainer, tmp_path, given, teacher):
    model = tiny_model() if given == "base" else get_peft_model(tiny_model(), lora())
    changes = dict(peft_config="lora" if given == "base" else None, teacher=teacher)
    first = make_trainer(model=model, **changes)
    second = make_trainer(model=model, **changes)
    uses = [
        lambda: first.save_model(str(tmp_path / "saved")), lambda: first.train(), lambda: first.evaluate(first.train_dataset),
    ]  # fmt: skip
    if teacher == "ema":
        uses += [lambda: first.teacher.distance(), lambda: first.teacher.activate()]
    for use in uses:
        with pytest.raises(RuntimeError, match="given to another trainer.*Save before .*or load the model again"):
            use()
    assert not (tmp_path / "saved").exists()
    second.train()
    second.save_model(str(tmp_path / "saved"))
    assert logged(second, "loss")


@pytest.mark.parametrize("teacher", ["ema", "none"])
@pytest.mark.parametrize("way", ["ours", "plain", "plain, by config"])
def test_an_adapter_among_the_layers_of_an_earlier_one_is_refused(make_trainer, tmp_path, way, teacher):
    base, fewer = tiny_model(), lora(target_modules=["q_proj"])
    plain = dict(
        trainer_class=SFTTrainer, args=SFTConfig(tmp_path / "plain", use_cpu=USE_CPU, bf16=False, report_to="none")
    )
    earlier = make_trainer(model=base, **({} if way == "ours" else plain)).model
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"still carries an earlier adapter: 12 of its layers.*or take .*unload\(\)"
        ):
            if "by config" in way:
                make_trainer(model=base, peft_config=fewer, teacher=teacher)
            else:
                make_trainer(model=get_peft_model(base, fewer), peft_config=None, teacher=teacher)
    if way == "plain":
        trainer = make_trainer(model=get_peft_model(earlier.unload(), fewer), peft_config=None, teacher=teacher)
        assert len([p for p in trainer.model.parameters() if p.requires_grad]) == 4  # A and B of two layers


@pytest.mark.parametrize(
    ("option", "name"),
    [
        (dict(init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
        (dict(kasa_config=KasaConfig()), "`kasa_config`"),
        (dict(layer_replication=[(0, 2), (0, 2)]), r"`layer_replication=\[\(0, 2\), \(0, 2\)\]`"),
        (dict(bias="all", teacher="none"), "`bias='all'`"),
    ],
)
def test_a_model_that_an_adapter_has_changed_is_not_taken_again(make_trainer, option, name):
    model, teacher = tiny_model(), option.pop("teacher", "ema")
    make_trainer(model=model, peft_config=lora(target_modules=["q_proj"], **option), teacher=teacher)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{name} has changed the weights.*Load the model again"):
            make_trainer(model=model)


def test_a_teacher_adapter_of_the_users_own_is_left_to_them(make_trainer):
    model = get_peft_model(tiny_model(), lora())
    model.add_adapter("teacher", lora())
    for _ in range(2):
        with pytest.raises(ValueError, match="already has an adapter named 'teacher'"):
            make_trainer(model=model, peft_config=None)
    assert "teacher" in model.peft_config


@pytest.mark.parametrize("name", ["sp", "cp", "tp"])
def test_sequence_context_and_tensor_parallelism_are_refused(name):
    split = SimpleNamespace(**(dict(sp_size=1, cp_size=1, tp_size=1) | {f"{name}_size": 2}))
    launch = Launch.of_state(SimpleNamespace(parallelism_config=split))
    with pytest.raises(ValueError, match=f"parallelism .`{name}_size=2`. is not supported.*Set `{name}_size=1`"):
        refuse_parallelism(launch)


def test_layers_that_preparing_has_put_under_another_name_are_refused(make_trainer, monkeypatch):
    def wrapping(self, *_):
        layers = self.model.get_base_model().model.layers
        layers[0] = checkpoint_wrapper(layers[0])

    monkeypatch.setattr(SFTTrainer, "_prepare_for_training", wrapping)
    with pytest.raises(ValueError, match=r"has become 'base_model.model.model.layers.0._checkpoint_wrapped_module\."):
        make_trainer().train()


@pytest.mark.parametrize(
    ("plugins", "match"),
    [
        (dict(fsdp_plugin=SimpleNamespace(fsdp_version=1)), "FSDP version 1, .*Set `fsdp_version: 2`"),
        (
            dict(deepspeed_plugin=SimpleNamespace(zero_stage=0, deepspeed_config={})),
            "`zero_stage: 0`, .*Set a stage of 1, 2 or 3",
        ),
        (
            dict(
                deepspeed_plugin=SimpleNamespace(
                    zero_stage=3, deepspeed_config={"zero_optimization": {"offload_param": {"device": "nvme"}}}
                )
            ),
            "set to `nvme`, .*Offload to the CPU",
        ),
    ],
    ids=["fsdp 1", "zero 0", "nvme"],
)
def test_sharding_that_leaves_no_whole_adapter_is_refused(plugins, match):
    with pytest.raises(ValueError, match=match):
        refuse_sharding(Launch.of_state(SimpleNamespace(**plugins)))


def test_a_config_of_another_kind_is_refused(make_trainer):
    with pytest.raises(TypeError, match="`args` must be a `MeanTeacherConfig`, got `dict`"):
        make_trainer(args={"output_dir": "x"})


def test_a_head_with_a_hidden_extra_is_refused(make_trainer):
    model = tiny_model()
    head, plain = model.lm_head, model.lm_head.forward
    head.forward = lambda x: 3 * plain(x)
    with pytest.raises(ValueError, match="are not its hidden states times its LM head"):
        make_trainer(model=model)


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_non_finite_loss_stops_before_the_update_and_names_the_checkpoint(make_trainer, tmp_path, teacher):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 3:
                next(p for p in model.parameters() if not p.requires_grad).data.fill_(float("nan"))

    trainer = make_trainer(teacher=teacher, save_strategy="steps", save_steps=2, callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match=r"loss of step 4 is nan; .*checkpoint-2.*stop_on_nonfinite_loss"):
        trainer.train()
    assert all(w.isfinite().all() for w in adapter_weights(trainer).values())
    goes_on = make_trainer(teacher=teacher, callbacks=[Poison()], stop_on_nonfinite_loss=False)
    goes_on.train()
    assert goes_on.state.global_step == 4


def test_a_non_finite_divergence_stops_where_the_student_alone_is_fine(make_trainer):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                next(p for n, p in model.named_parameters() if ".teacher." in n).data.fill_(float("inf"))

    trainer = make_trainer(callbacks=[Poison()])
    with pytest.raises(FloatingPointError, match="loss of step 3 is nan"):
        trainer.train()
    assert all(w.isfinite().all() for w in adapter_weights(trainer).values())


def test_an_old_checkpoint_or_a_poisoned_one_is_not_called_good(make_trainer, tmp_path):
    class PoisonAdapter(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model, **kwargs):
            next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    (tmp_path / "out" / "checkpoint-500").mkdir(parents=True)
    trainer = make_trainer(save_strategy="steps", save_steps=1, callbacks=[PoisonAdapter()])
    with pytest.raises(FloatingPointError, match="loss of step 2 is nan.*There is no good checkpoint of this run yet"):
        trainer.train()


@pytest.mark.parametrize("kl_tokens", ["loss", "all", "prompt"])
def test_loss_of_a_batch_alone_is_its_own_mean(make_trainer, kl_tokens):
    """Some models make `Trainer` pass no `num_items_in_batch`."""
    trainer = make_trainer(teacher="frozen", kl_tokens=kl_tokens)
    trainer.train()
    trainer.model.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    before = torch.cat([trainer.ce_mean.sums, trainer.regularizers[0].kl_of_log.sums])
    loss = trainer.compute_loss(trainer.model, dict(batch))
    after = torch.cat([trainer.ce_mean.sums, trainer.regularizers[0].kl_of_log.sums])
    ce, labels, kl, tokens = (after - before).tolist()
    assert loss.item() == pytest.approx(ce / labels + kl / tokens, rel=1e-5)
    known = dict(loss=labels, prompt=tokens, all=batch["attention_mask"][:, 1:].sum())
    assert tokens == known[kl_tokens] and (kl_tokens != "prompt" or tokens + labels == known["all"])


def test_unwritable_output_folder_is_refused_at_start(make_trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Cannot write to `output_dir=.*Choose another"):
        make_trainer(output_dir=str(tmp_path / "file" / "out"))


def test_full_output_folder_is_refused_at_start(make_trainer, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(OSError, match="has 0 MiB free; one checkpoint needs"):
        make_trainer(save_strategy="steps")
    trainer = make_trainer()  # it writes no checkpoint
    with pytest.raises(OSError, match="has 0 MiB free; the trained model needs"):
        check_free_space(trainer, checkpoint=False)


@pytest.mark.parametrize(
    ("changes", "student", "bytes_each"),
    [
        (dict(), "adapter", 4 + 4 + 8),
        (dict(teacher="frozen"), "adapter", 4 + 8),  # which is the base
        (dict(teacher="none"), "adapter", 4 + 8),
        (dict(save_only_model=True), "adapter", 4 + 4),
        (dict(teacher="none", peft_config=None), "model", 4 + 8),
        (dict(teacher="none", peft_config=None, save_only_model=True), "model", 4),
    ],
    ids=["ema", "frozen", "none", "ema, model only", "full", "full, model only"],
)
def test_no_more_space_is_asked_for_than_a_checkpoint_takes(
    make_trainer, tmp_path, monkeypatch, changes, student, bytes_each
):
    trainer = make_trainer(save_strategy="steps", max_steps=1, **changes)
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad or student == "model")
    free = trained * bytes_each
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free))
    check_free_space(trainer, checkpoint=True)
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(free, 0, free - 1))
    with pytest.raises(OSError, match="one checkpoint needs"):
        check_free_space(trainer, checkpoint=True)
    monkeypatch.undo()
    trainer.train()
    written = [
        path for path in (tmp_path / "out" / "checkpoint-1").rglob("*") if path.suffix in (".safetensors", ".pt")
    ]
    assert free < sum(path.stat().st_size for path in written) < 1.5 * free + 100_000
