"""What every regularizer keeps to, and when the trainer asks it."""

import functools

import pytest
import torch
from conftest import adapter_weights, logged, lora, tiny_model
from documented import documented
from peft import get_peft_model
from trl import SFTTrainer

from trl_ema.files import read_json, write_json
from trl_ema.forward import Divergence
from trl_ema.regularizers import make_regularizers
from trl_ema.regularizers.base import Regularizer
from trl_ema.regularizers.divergence import TeacherDivergence
from trl_ema.regularizers.penalties import EWC, L2SP, L1Penalty
from trl_ema.regularizers.rehearsal import Rehearsal


TEXTS = dict(rehearsal_num_texts=10, rehearsal_num_tokens=12)
GroupLasso = documented("regularizers.md", "GroupLasso")


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    """Of the texts that a model writes."""
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))


def group_lasso(make_trainer, weight, **options):
    trainer = make_trainer(teacher="none", **options)
    trainer.regularizers.append(GroupLasso(trainer.model, weight))
    return trainer


# How to make a trainer that is held back by it alone, with a weight.
METHODS = {
    "ema": lambda make, weight, **options: make(teacher="ema", kl_weight=weight, **options),
    "frozen": lambda make, weight, **options: make(teacher="frozen", kl_weight=weight, **options),
    "frozen adapter": lambda make, weight, **options: make(
        teacher="frozen", kl_weight=weight, peft_config=lora(init_lora_weights=False), **options
    ),
    "l1": lambda make, weight, **options: make(teacher="none", l1_weight=weight, **options),
    "l2": lambda make, weight, **options: make(teacher="none", l2_weight=weight, **options),
    "documented": group_lasso,
    # Off it is not there at all.
    "rehearsal": lambda make, weight, **options: make(
        teacher="none", rehearsal_weight=weight, **({} if not weight else TEXTS), **options
    ),
    "ewc": lambda make, weight, **options: make(
        teacher="none", ewc_weight=100 * weight, **({} if not weight else TEXTS), **options
    ),
    "replay": lambda make, weight, **options: make(
        teacher="none", rehearsal_weight=weight, **({} if not weight else TEXTS | dict(rehearsal_loss="ce")), **options
    ),
    "selfaug": lambda make, weight, **options: make(teacher="frozen", kl_tokens="prompt", kl_weight=weight, **options),
    "asft": lambda make, weight, **options: make(teacher="frozen", loss_type="dft", kl_weight=weight, **options),
    # No strength: it is on or off.
    "eaft": lambda make, weight, **options: make(teacher="none", entropy_weighting=weight > 0, **options),
}
OF_WEIGHTS = ("l1", "l2", "documented")
every_method = pytest.mark.parametrize("method", METHODS)


@every_method
@pytest.mark.parametrize("options", [{}, dict(packing=True), dict(gradient_accumulation_steps=2)], ids=str)
def test_off_equals_plain_sft_step_for_step(make_trainer, method, options):
    ours = METHODS[method](make_trainer, 0.0, **options)
    adapter = lora(init_lora_weights=False) if method == "frozen adapter" else "lora"
    if method == "asft":
        options["loss_type"] = "dft"
    theirs = make_trainer(trainer_class=SFTTrainer, peft_config=adapter, **options)
    for trainer in (ours, theirs):
        trainer.train()
    for key in ("loss", "grad_norm"):
        assert logged(ours, key) == pytest.approx(logged(theirs, key), rel=1e-5), key
    expected = adapter_weights(theirs)
    for name, weight in adapter_weights(ours).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


def test_every_regularizer_is_held_to_this():
    of_ours = {cls for cls in _below(Regularizer) if cls.__module__.startswith("trl_ema.") and hasattr(cls, "name")}
    assert of_ours == {TeacherDivergence, Rehearsal, L1Penalty, L2SP, EWC}  # a new one needs an entry in METHODS


def _below(cls):
    return {cls, *(lower for child in cls.__subclasses__() for lower in _below(child))} - {Regularizer}


@pytest.mark.parametrize("method", [name for name in METHODS if name != "eaft"])
def test_on_it_holds_the_student_back(make_trainer, method):
    """Nearer to the start in what it computes, or in its weights."""
    kept = {}
    for weight in (5.0, 0.0):
        trainer = METHODS[method](make_trainer, weight, max_steps=12)
        batch = next(iter(trainer.get_train_dataloader()))
        inputs = {key: batch[key].to(trainer.model.device) for key in ("input_ids", "attention_mask")}
        measure = functools.partial(*((_weights, trainer) if method in OF_WEIGHTS else (_moved, trainer, inputs)))
        start = measure()
        trainer.train()
        kept[weight] = (measure() - start).square().sum().item()
    assert kept[5.0] < kept[0.0]


@torch.no_grad()
def _moved(trainer, inputs):
    trainer.model.eval()
    logits = trainer.model(**inputs).logits.log_softmax(-1)
    trainer.model.train()
    return logits


def _weights(trainer):
    return torch.cat([weight.flatten() for weight in adapter_weights(trainer).values()])


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
    if method in (
        "frozen",
        "selfaug",
        "asft",
        "rehearsal",
        "replay",
        "eaft",
    ):  # the base is in every checkpoint, and the texts are beside the run
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
    trainer, held = (make_trainer(teacher="none", l2_weight=weight, **options) for weight in (0.0, 0.3))
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
    """Each row once more, with nothing to learn; of a packed one each document."""

    name = "rows"

    def add_rows(self, inputs, step, num_items):
        tensors = {key: value for key, value in inputs.items() if torch.is_tensor(value) and value.dim() == 2}
        packed = "position_ids" in tensors
        twice = {key: torch.cat([value, value], 1 if packed else 0) for key, value in tensors.items()}
        twice["labels"] = torch.cat([inputs["labels"], torch.full_like(inputs["labels"], -100)], 1 if packed else 0)
        for key in ("cu_seq_lens_q", "cu_seq_lens_k"):
            if key in inputs:
                twice[key] = torch.cat([inputs[key], inputs[key][1:] + inputs[key][-1]])
        return inputs | twice, []


@pytest.mark.parametrize("first", [True, False], ids=["rows first", "rows last"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize(
    "options",
    [dict(teacher="none"), dict(), dict(kl_tokens="all"), dict(kl_tokens="prompt"), dict(kl_fraction=0.5)],
    ids=str,
)
def test_further_rows_are_in_the_batch_and_without_labels_change_nothing(make_trainer, options, packing, first):
    options = options | dict(packing=packing, max_length=64 if packing else 32)
    plain, more = make_trainer(**options), make_trainer(**options)
    more.regularizers.insert(0 if first else 1, Rows())
    sizes = {plain: [], more: []}
    for trainer in (plain, more):
        trainer.model.get_base_model().model.register_forward_pre_hook(
            lambda module, args, kwargs, found=sizes[trainer]: found.append(kwargs["input_ids"].numel()),
            with_kwargs=True,
        )
        trainer.train()
    assert sum(sizes[more]) > sum(sizes[plain]) and max(sizes[more]) == 2 * max(sizes[plain])
    for key in ("loss", "ce_loss", "kl_loss"):
        assert logged(more, key) == pytest.approx(logged(plain, key), rel=1e-3, abs=1e-6), key
    assert logged(more, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-3)
    assert logged(more, "num_tokens") == logged(plain, "num_tokens")  # the student's own


class Anchor(Regularizer):
    """KL(start ‖ student) on the rows themselves, or on a copy of them behind."""

    name = "anchor"

    def __init__(self, trainer, weight, behind):
        self.start, self.weight, self.behind, self.seen = trainer.starting_point, weight, behind, []

    def divergences(self, inputs, step, num_items):
        return [] if self.behind else [Divergence(self.start, self.weight)]

    def add_rows(self, inputs, step, num_items):
        if not self.behind:
            return inputs, []
        more, _ = Rows().add_rows(inputs, step, num_items)
        size = len(inputs["labels"])
        # All of their tokens, each of which has as much weight as a labelled one of the batch.
        return more, [Divergence(self.start, self.weight, "all", list(range(size, 2 * size)))]

    def observe(self, sums):
        self.seen.append([one.tolist() for one in sums])


def _dense(trainer, batch, weights):
    """CE + λ₁·KL(teacher ‖ ·) + λ₂·KL(start ‖ ·), each over tokens of its own, from whole logits in float64."""
    model, mask = trainer.model, batch["labels"][:, 1:] != -100
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    logits = [model(**inputs).logits[:, :-1].double().log_softmax(-1)]
    for context in (trainer.teacher.activate, trainer.starting_point.activate):
        with torch.no_grad(), context():
            logits.append(model(**inputs).logits[:, :-1].double().log_softmax(-1))
    student, teacher, start = logits
    ce = -student.gather(-1, batch["labels"][:, 1:].clamp(min=0)[..., None])[..., 0][mask].sum()
    everywhere = inputs["attention_mask"][:, 1:].bool()
    kl, anchor = (
        (other.exp() * (other - student)).sum(-1)[where].sum()
        for other, where in ((teacher, mask), (start, everywhere if weights[2] else mask))
    )
    return (ce + weights[0] * kl + weights[1] * anchor) / mask.sum()


@pytest.mark.parametrize("behind", [False, True], ids=["own rows", "further rows"])
def test_two_divergences_at_once_are_both_in_loss_and_gradient(make_trainer, behind):
    trainer = make_trainer(ema_decay=0.5, kl_weight=0.7)
    anchor = Anchor(trainer, 0.4, behind)
    trainer.regularizers.append(anchor)
    trainer.train()  # so that student, teacher and start differ
    anchor.seen.clear()
    trainer.model.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    ours = torch.autograd.grad(loss, trained)
    dense = _dense(trainer, batch, (0.7, 0.4, behind))
    expected = torch.autograd.grad(dense, trained)
    torch.testing.assert_close(loss.double(), dense, rtol=1e-5, atol=1e-7)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
    ((total, tokens),) = anchor.seen[0]
    assert total > 1e-4 and tokens == (
        batch["attention_mask"][:, 1:].sum() if behind else (batch["labels"][:, 1:] != -100).sum()
    )


def test_divergences_that_the_forward_was_not_patched_for_are_refused(make_trainer):
    trainer = make_trainer(teacher="none")
    trainer.regularizers.append(Anchor(trainer, 1.0, behind=False))
    with pytest.raises(
        RuntimeError, match="`MeanTeacherConfig.needs_fused_forward` is false.*Let that property be true"
    ):
        trainer.train()


class Diary(Regularizer):
    """Writes down what it is asked."""

    name = "diary"

    def __init__(self):
        self.entries = []

    def __getattribute__(self, name):
        if name in ("name", "folder", "entries", "bytes_to_save", "saves_student_alone") or name.startswith("__"):
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
    micro_batch = ["divergences", "add_rows"]  # and `observe`, of those that have a divergence
    step = ["before_step", *micro_batch, "penalty", *micro_batch, "after_step", "state", "metrics", "save"]
    assert diary.entries == ["begin", *step, *step]
    assert trainer.state.stateful_callbacks["trl_ema"]["regularizers"]["diary"] == {}
    resumed, diary = make_trainer(max_steps=2, gradient_accumulation_steps=2), Diary()
    resumed.regularizers.append(diary)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert diary.entries == ["check", "check_state", "load", "begin", *step[:-1]]


@pytest.mark.parametrize("given", ["adapter", "base", "whole model"])
def test_a_model_that_is_given_on_is_freed_of_all_of_them(make_trainer, given):
    base = tiny_model()
    model = base if given != "adapter" else get_peft_model(base, lora())
    peft_config = lora() if given == "base" else None
    trainer, diary = make_trainer(model=model, peft_config=peft_config, teacher="none"), Diary()
    trainer.regularizers.append(diary)
    make_trainer(model=model, peft_config=peft_config, teacher="none")
    assert diary.entries == ["remove"]


def test_one_that_does_not_fit_leaves_the_others_to_whoever_has_the_model_next(make_trainer, monkeypatch):
    model = get_peft_model(tiny_model(), lora())

    def failing(model, args, *_):
        yield TeacherDivergence(model, args)
        raise ValueError("does not fit")

    with monkeypatch.context() as patch:
        patch.setattr("trl_ema.trainer.make_regularizers", failing)
        with pytest.raises(ValueError, match="does not fit"):
            make_trainer(model=model, peft_config=None)
    assert make_trainer(model=model, peft_config=None).teacher.distance() == 0


def test_a_penalty_leaves_other_adapters_to_the_files(make_trainer, tmp_path):
    model = get_peft_model(tiny_model(), lora())
    model.add_adapter("other", lora())
    trainer = make_trainer(model=model, peft_config=None, teacher="none", l2_weight=0.1)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "other" / "adapter_model.safetensors").is_file()


def test_a_checkpoint_tells_what_a_run_goes_on_without(make_trainer, tmp_path, caplog):
    make_trainer(save_strategy="steps", save_steps=2).train()
    make_trainer(teacher="none").train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert "The checkpoint was made with teacher, this run goes on without. Resume with the options" in caplog.text


def test_the_schedule_of_an_older_checkpoint_is_known(make_trainer, tmp_path, caplog):
    make_trainer(save_strategy="steps", save_steps=2).train()
    path = tmp_path / "out" / "checkpoint-2" / "trainer_state.json"
    state = read_json(path)
    kept = state["stateful_callbacks"]["trl_ema"]
    kept["schedule"] = kept.pop("regularizers")["teacher"]["schedule"] | {"kl_weight": 99.0}
    write_json(path, state)
    make_trainer().train(resume_from_checkpoint=str(path.parent))
    assert "The checkpoint was made with" in caplog.text and "99.0" in caplog.text


def test_options_make_the_list(make_trainer):
    assert make_trainer(teacher="none").regularizers == []
    (found,) = make_trainer(teacher="frozen").regularizers
    assert isinstance(found, TeacherDivergence) and found.teacher.is_base and found.folder is None
    trainer = make_trainer(teacher="none")
    args = make_trainer(teacher="ema").args
    (made,) = make_regularizers(trainer.model, args, trainer.processing_class, trainer.starting_point)
    assert made.folder == "teacher" and made.teacher.model is trainer.model


class Controlled:
    """Any object with these: half of what it was after each step."""

    observes = True

    def __init__(self):
        self.weight, self.seen = 1.0, []

    def value(self, step):
        return self.weight

    def observe(self, divergence, step):
        self.seen.append(divergence)
        self.weight /= 2

    def state(self):
        return {"weight": self.weight}

    def load(self, state):
        self.weight = state["weight"]


def test_a_weight_that_is_controlled_takes_the_ramps_place(make_trainer, monkeypatch, tmp_path):
    monkeypatch.setattr("trl_ema.regularizers.divergence.make_weight", lambda *_: Controlled())
    options = dict(teacher="frozen", gradient_accumulation_steps=2, save_strategy="steps", save_steps=2)
    trainer = make_trainer(**options)
    trainer.train()
    assert logged(trainer, "kl_weight") == [1.0, 0.5, 0.25, 0.125]
    assert trainer.regularizers[0].weight.seen == pytest.approx(logged(trainer, "kl_loss"))
    kept = trainer.state.stateful_callbacks["trl_ema"]["regularizers"]["teacher"]
    assert kept["weight"] == {"weight": 0.0625}
    resumed = make_trainer(**options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert logged(resumed, "kl_weight")[-2:] == [0.25, 0.125]
    assert logged(resumed, "loss")[-2:] == logged(trainer, "loss")[-2:]
