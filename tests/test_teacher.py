import copy

import peft
import pytest
import torch
from conftest import lora, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import (
    IA3Config,
    LilyConfig,
    LoHaConfig,
    LoKrConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
)
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file

from trl_ema.regularizers.teacher import MeanTeacher


LINEAR = ["q_proj", "v_proj"]
ADAPTERS = {
    "lora": lora(lora_dropout=0.1),
    "rslora": lora(use_rslora=True),
    "dora": lora(use_dora=True),
    "pissa": lora(init_lora_weights="pissa"),
    "modules_to_save": lora(target_modules=LINEAR, modules_to_save=["lm_head", "embed_tokens"]),
    "trainable_tokens": lora(target_modules=LINEAR, trainable_token_indices=[3, 5]),
    "embedding": lora(target_modules=["embed_tokens", "q_proj"]),
    "rank_pattern": lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}),
    "ia3": IA3Config(target_modules=[*LINEAR, "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(target_modules=LINEAR, r=4, module_dropout=0.3),
    "lokr": LoKrConfig(target_modules=LINEAR, r=4),
    "oft": OFTConfig(target_modules=LINEAR, oft_block_size=8, module_dropout=0.3),
    "vera": VeraConfig(target_modules=LINEAR, r=4),
}
IDS = torch.arange(3, 15)[None]


def peft_model(name="lora", **changes):
    torch.manual_seed(0)
    return get_peft_model(tiny_model(**changes), copy.deepcopy(ADAPTERS[name]))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def student_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def shake(model, seed=1, size=0.1):
    """Move the student, as training would."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student_parameters(model):
            p.add_((size * torch.randn(p.shape, generator=g)).to(p.dtype))


@pytest.mark.parametrize("name", ADAPTERS)
def test_teacher_starts_equal_to_the_student_and_stays_when_it_moves(name):
    model = peft_model(name).eval()
    shake(model)
    before = logits(model)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    teacher = MeanTeacher(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == names
    assert torch.equal(logits(model), before)
    shake(model, seed=2)
    with teacher.activate():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), before)


@pytest.mark.parametrize("name", ADAPTERS)
def test_update_with_decay_zero_copies_and_one_freezes(name):
    model = peft_model(name).eval()
    teacher = MeanTeacher(model)
    start = logits(model)
    shake(model)
    teacher.update(1.0)
    with teacher.activate():
        torch.testing.assert_close(logits(model), start, rtol=0, atol=1e-5)
    teacher.update(0.0)
    assert teacher.distance() == 0
    with teacher.activate():
        copied = logits(model)
    torch.testing.assert_close(copied, logits(model), rtol=0, atol=1e-5)


@settings(max_examples=10, deadline=None)
@given(decay=st.floats(0, 1), updates=st.integers(1, 30))
def test_constant_student_gives_the_closed_form_average(decay, updates):
    model = peft_model().double()
    teacher = MeanTeacher(model)
    start = [t.clone() for t in teacher.average_shards()]
    shake(model)
    for _ in range(updates):
        teacher.update(decay)
    share = decay**updates
    for average, first, student in zip(teacher.average_shards(), start, student_parameters(model), strict=True):
        torch.testing.assert_close(average, share * first + (1 - share) * student.detach(), rtol=1e-9, atol=1e-12)


def test_half_precision_student_still_moves_its_average():
    """In bfloat16, 0.001 of a small difference rounds to nothing."""
    model = peft_model("modules_to_save").to(torch.bfloat16)
    teacher = MeanTeacher(model)
    start = [a.clone() for a in teacher.average_shards()]
    assert {a.dtype for a in start} == {torch.float32}
    shake(model, size=0.01)
    for _ in range(10):
        teacher.update(0.999)
    averages = teacher.average_shards()
    for average, first, student in zip(averages, start, student_parameters(model), strict=True):
        expected = first + (1 - 0.999**10) * (student.detach().float() - first)
        torch.testing.assert_close(average, expected, rtol=1e-4, atol=1e-7)
    assert torch.isfinite(logits(model)).all()


def test_attaching_leaves_the_random_state_alone():
    model = peft_model()
    state = torch.get_rng_state()
    MeanTeacher(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_activation_restores_everything_after_an_error():
    model = peft_model(attention_dropout=0.2).train()
    model.gradient_checkpointing_enable()
    teacher = MeanTeacher(model)

    def snapshot():
        watched = ("_active_adapter", "_disable_adapters", "training", "gradient_checkpointing")
        return [(n, {k: vars(m)[k] for k in watched if k in vars(m)}) for n, m in model.named_modules()]

    before, grads = snapshot(), [p.requires_grad for p in model.parameters()]
    with pytest.raises(RuntimeError, match="on purpose"), teacher.activate():
        assert snapshot() != before
        raise RuntimeError("on purpose")
    assert snapshot() == before
    assert [p.requires_grad for p in model.parameters()] == grads


@pytest.mark.parametrize("dropout", [dict(attention_dropout=0.5), dict()])
def test_teacher_is_deterministic_while_the_student_drops_out(dropout):
    model = peft_model(**dropout).train()
    shake(model)
    teacher = MeanTeacher(model)
    assert not torch.equal(logits(model), logits(model))
    with teacher.activate():
        assert torch.equal(logits(model), logits(model))


@pytest.mark.parametrize("name", [*ADAPTERS, "odd alpha", "lora_bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_the_teachers_pass_is_the_same_to_the_bit(name, dtype):
    """Which of its layers compute in place or not."""
    changes = {"odd alpha": dict(lora_alpha=6), "lora_bias": dict(lora_bias=True)}
    adapter = lora(**changes[name]) if name in changes else copy.deepcopy(ADAPTERS[name])
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(dtype=dtype), adapter)
    shake(model)
    teacher = MeanTeacher(model)
    with torch.autocast("cpu", torch.bfloat16):
        with teacher.activate():
            averaged = logits(model)
        assert torch.equal(averaged, logits(model.eval()))


@pytest.mark.parametrize("name, autocast, calls", [("lora", True, 0), ("lora", False, 14), ("dora", True, 14)])
def test_only_plain_lora_layers_under_autocast_leave_out_what_a_backward_pass_needs(monkeypatch, name, autocast, calls):
    called, forward = [], peft.tuners.lora.Linear.forward
    monkeypatch.setattr(
        peft.tuners.lora.Linear,
        "forward",
        lambda layer, *args, **kwargs: called.append(layer) or forward(layer, *args, **kwargs),
    )
    model = peft_model(name)
    teacher = MeanTeacher(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        with teacher.activate():
            logits(model)
        assert len(called) == calls
        logits(model)  # the student's pass is PEFT's
    assert len(called) == calls + 14


def test_activation_touches_each_layer_once_and_walks_no_module(monkeypatch):
    model = get_peft_model(tiny_model(num_hidden_layers=30), lora())
    teacher = MeanTeacher(model)

    def walk(*args, **kwargs):
        raise AssertionError("walked the model")

    for name in ("modules", "named_modules", "children", "parameters", "train"):
        monkeypatch.setattr(torch.nn.Module, name, walk)
    with teacher.activate():
        pass
    assert sum("_active_adapter" in switch for switch in teacher._switches) == 210


@pytest.mark.parametrize("name", ["lora", "rslora", "rank_pattern"])
def test_frozen_teacher_over_a_fresh_adapter_is_the_base_and_copies_nothing(name):
    base = tiny_model().eval()
    expected = logits(base)
    model = get_peft_model(base, ADAPTERS[name]).eval()
    teacher = MeanTeacher(model, frozen=True)
    shake(model)
    assert teacher.is_base and list(model.peft_config) == ["default"] and teacher.distance() == 0
    with teacher.activate():
        assert torch.equal(logits(model), expected)
    assert not torch.allclose(logits(model), expected)


@pytest.mark.parametrize("name", ["dora", "pissa", "ia3"])
def test_frozen_teacher_copies_where_switching_off_could_differ(name):
    model = peft_model(name).eval()
    before = logits(model)
    teacher = MeanTeacher(model, frozen=True)
    shake(model)
    assert not teacher.is_base
    with teacher.activate():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-5)


def test_frozen_teacher_of_a_given_adapter_is_that_adapter(tmp_path):
    trained = peft_model().eval()
    shake(trained)
    before = logits(trained)
    trained.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True).eval()
    teacher = MeanTeacher(model, frozen=True)
    shake(model, seed=3)
    assert not teacher.is_base
    with teacher.activate():
        torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("anchor", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", ["lora", "rslora", "rank_pattern"])
def test_anchor_shrinks_the_teacher_towards_the_base(anchor, name):
    """One layer, so that the logits show the merged weights: base + (1 - anchor) * update."""
    model = peft_model(name).eval()
    shake(model)
    teacher = MeanTeacher(model, anchor=anchor)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            x = torch.randn(3, module.in_features)
            base = module.base_layer(x)
            with torch.no_grad():
                student = module(x)
                with teacher.activate():
                    torch.testing.assert_close(module(x), base + (1 - anchor) * (student - base), rtol=1e-5, atol=1e-5)


def test_saved_teacher_loads_with_plain_peft(tmp_path):
    model = peft_model().eval()
    shake(model)
    teacher = MeanTeacher(model, anchor=0.4)
    shake(model, seed=5)
    teacher.update(0.7)
    with teacher.activate():
        expected = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "teacher").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-6)


def test_saved_teacher_of_a_pissa_student_loads_with_plain_peft(tmp_path):
    """PiSSA changes the base, and PEFT must do so again at load."""
    model = peft_model("pissa").eval()
    teacher = MeanTeacher(model)
    shake(model)
    teacher.update(0.5)
    with teacher.activate():
        expected = logits(model)
    model.save_pretrained(tmp_path)
    teacher.save(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "teacher").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-3)


def test_an_adapter_of_another_name_is_refused():
    model = get_peft_model(tiny_model(), lora(), adapter_name="med")
    with pytest.raises(ValueError, match="named 'med'; expected 'default'"):
        MeanTeacher(model)


def test_a_lora_bias_is_no_base_model_teacher():
    model = get_peft_model(tiny_model(), lora(lora_bias=True, target_modules=LINEAR))
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].bias.fill_(1.0)
    assert not MeanTeacher(model, frozen=True).is_base


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["lora", "modules_to_save", "dora"])
def test_state_survives_a_round_trip_exactly(tmp_path, dtype, name):
    model = peft_model(name).to(dtype)
    teacher = MeanTeacher(model)
    shake(model)
    teacher.update(0.9)
    model.save_pretrained(tmp_path)
    teacher.save(tmp_path)
    other_model = peft_model(name).to(dtype)
    other = MeanTeacher(other_model)
    other.check(tmp_path)
    other.load(tmp_path)
    pairs = zip(other.average_shards(), teacher.average_shards(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_whoever_saves_a_half_precision_model_saves_the_averages_exactly(tmp_path):
    model = peft_model("modules_to_save").to(torch.bfloat16)
    teacher = MeanTeacher(model)
    shake(model, size=0.01)
    teacher.update(0.999)
    averages = [average.clone() for average in teacher.average_shards()]
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    teacher.save(tmp_path)
    model.save_pretrained(tmp_path)
    other = MeanTeacher(peft_model("modules_to_save").to(torch.bfloat16))
    other.check(tmp_path)
    other.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(other.average_shards(), averages, strict=True))


def test_a_teacher_taken_off_leaves_nothing_in_what_the_model_saves():
    model = peft_model("modules_to_save").to(torch.bfloat16)
    teacher = MeanTeacher(model)
    shake(model)
    teacher.update(0.5)
    teacher.remove()
    MeanTeacher(model)
    state = model.state_dict()
    assert all(torch.equal(state[name], p) for name, p in model.named_parameters() if ".teacher." in name)


@pytest.mark.parametrize("name", ["lora", "modules_to_save", "trainable_tokens", "embedding", "ia3"])
def test_a_model_whose_teacher_was_deleted_is_saved_and_gets_another(tmp_path, name):
    model = peft_model(name).to(torch.bfloat16)
    teacher = MeanTeacher(model)
    shake(model)
    teacher.update(0.5)
    model.delete_adapter("teacher")  # as an error advises
    model.save_pretrained(tmp_path / "alone")
    assert not (tmp_path / "alone" / "teacher").exists()
    another = MeanTeacher(model, frozen=True)
    another.save(tmp_path)
    own = load_file(tmp_path / "teacher" / "adapter_model.safetensors")
    assert own and all(
        torch.equal(own[k], t) for k, t in zip((twin.key for twin in another.twins), another.teachers(), strict=True)
    )


@pytest.mark.parametrize("replaced", [False, True])
def test_a_teacher_that_is_no_longer_on_the_model_says_so(tmp_path, replaced):
    model = peft_model()
    teacher = MeanTeacher(model)
    model.delete_adapter("teacher")
    if replaced:
        MeanTeacher(model)
    with pytest.raises(RuntimeError, match="no longer on the model.*Save the student"), teacher.activate():
        pass
    for use in (lambda: teacher.save(tmp_path), lambda: teacher.update(0.5), teacher.distance):
        with pytest.raises(RuntimeError, match="no longer on the model"):
            use()
    teacher.remove()
    assert ("teacher" in model.peft_config) == replaced


def test_an_error_while_a_teacher_is_added_leaves_the_base_alone(monkeypatch):
    model = get_peft_model(tiny_model(), lora(kasa_config=KasaConfig(), target_modules=LINEAR))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}

    def fail(self, *args, really=PeftModel.add_adapter, **kwargs):
        really(self, *args, **kwargs)
        raise MemoryError

    monkeypatch.setattr(PeftModel, "add_adapter", fail)
    with pytest.raises(MemoryError):
        MeanTeacher(model)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)


def test_a_tensor_of_several_layers_is_averaged_under_each_of_its_names(tmp_path):
    """LILY shares a factor: under the second name a file must not hold the model's own, rounded copy."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), LilyConfig(target_modules=LINEAR, r=4)).to(torch.bfloat16)
    teacher = MeanTeacher(model)
    shake(model)
    teacher.update(0.9)
    teacher.save(tmp_path)
    tensors = load_file(tmp_path / "teacher" / "adapter_model.safetensors")
    first, second = (tensors[f"base_model.model.model.layers.{i}.self_attn.q_proj.lily_B.weight"] for i in range(2))
    assert first.dtype == torch.float32 and torch.equal(first, second)
    layers = model.get_base_model().model.layers
    assert layers[0].self_attn.q_proj.lily_B["teacher"].weight is layers[1].self_attn.q_proj.lily_B["teacher"].weight


def saved(tmp_path, name="lora"):
    model = peft_model(name)
    teacher = MeanTeacher(model)
    model.save_pretrained(tmp_path)
    teacher.save(tmp_path)


@pytest.mark.parametrize(
    "changes, match",
    [
        (dict(target_modules=["q_proj"]), "first unexpected: .*original `target_modules`"),
        (dict(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"]), "first .*original `target_modules`"),
        (dict(r=8), r"has shape \(4, .*the model has \(8, .*original"),
    ],
)
def test_checkpoint_of_other_targets_or_rank_is_refused(tmp_path, changes, match):
    saved(tmp_path)
    teacher = MeanTeacher(get_peft_model(tiny_model(), lora(**changes)))
    with pytest.raises(ValueError, match=match):
        teacher.check(tmp_path)


def test_missing_teacher_file_is_refused(tmp_path):
    saved(tmp_path)
    (tmp_path / "teacher" / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match="Teacher checkpoint .* is missing. Resume from another"):
        MeanTeacher(peft_model()).check(tmp_path)


def test_truncated_teacher_file_is_refused(tmp_path):
    saved(tmp_path)
    path = tmp_path / "teacher" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="Teacher checkpoint .* is damaged .*Resume from another"):
        MeanTeacher(peft_model()).check(tmp_path)


def test_teacher_folder_is_refused_by_a_base_model_teacher(tmp_path):
    saved(tmp_path)
    with pytest.raises(ValueError, match="holds a teacher adapter, but the frozen teacher of this run is the base"):
        MeanTeacher(peft_model(), frozen=True).check(tmp_path)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: tiny_model(), "no PEFT adapter to average. Pass `peft_config"),
        (lambda: get_peft_model(tiny_model(), lora(bias="all")), "`bias='all'` trains the base model's own biases"),
        (
            lambda: get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)),
            "prompt learning",
        ),
    ],
)
def test_models_that_cannot_be_averaged_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        MeanTeacher(make())


def test_two_active_adapters_are_refused():
    model = peft_model()
    model.add_adapter("other", lora())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="must be one active adapter"):
        MeanTeacher(model)


def test_an_adapter_named_teacher_is_refused():
    model = peft_model()
    model.add_adapter("teacher", lora())
    with pytest.raises(ValueError, match="already has an adapter named 'teacher'"):
        MeanTeacher(model)


def test_a_frozen_adapter_is_refused(tmp_path):
    peft_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no trainable parameter.*is_trainable=True"):
        MeanTeacher(PeftModel.from_pretrained(tiny_model(), tmp_path))


def test_trained_base_weights_are_refused():
    model = peft_model()
    model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"norm.weight' is trained but belongs to no adapter"):
        MeanTeacher(model)


@pytest.mark.parametrize("name", ["dora", "pissa", "modules_to_save", "trainable_tokens", "ia3"])
def test_anchor_is_refused_where_it_is_no_scale(name):
    with pytest.raises(ValueError, match="needs plain LoRA or rsLoRA"):
        MeanTeacher(peft_model(name), anchor=0.5)


def test_update_equals_a_plain_loop():
    model = peft_model()
    teacher = MeanTeacher(model)
    shake(model)
    expected = [
        0.9 * t + 0.1 * s.detach() for t, s in zip(teacher.average_shards(), student_parameters(model), strict=True)
    ]
    teacher.update(0.9)
    for ours, theirs in zip(teacher.average_shards(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    gap = torch.cat([(a - s).flatten() for a, s in zip(expected, student_parameters(model), strict=True)]).norm()
    size = torch.cat([s.flatten() for s in student_parameters(model)]).norm()
    assert teacher.distance() == pytest.approx((gap / size).item(), rel=1e-4)
