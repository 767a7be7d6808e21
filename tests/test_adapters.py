"""Every kind of adapter that the installed PEFT offers: its teacher is an exact average, or it is refused by name."""

import copy

import pytest
import torch
from conftest import lora, rows, tiny_model
from peft import LilyConfig, LoHaConfig, PeftModel, PveraConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.lora.config import BdLoraConfig, EvaConfig, KasaConfig, MontecloraConfig
from safetensors.torch import load_file
from trl import SFTTrainer

from trl_ema.evaluation.drift import measure_drift
from trl_ema.measurement import trainer_batches
from trl_ema.regularizers.teacher import MeanTeacher


LINEAR = ["q_proj", "v_proj"]
ONE, TWO = dict(target_modules=["q_proj"]), dict(target_modules=LINEAR)
# Kinds that train, with the options they need; PEFT's defaults are for larger layers.
TRAINED = {
    "LORA": dict(r=4, **TWO),
    "ADAMSS": dict(r=8, num_subspaces=2, **TWO),
    "BEFT": dict(target_modules=["v_proj"]),
    "BOFT": dict(boft_block_size=4, boft_dropout=0.2, **ONE),
    "C3A": dict(block_size=8, **ONE),
    "DEFT": dict(para=True, deft_dropout=0.2, **TWO),
    "DELORA": dict(module_dropout=0.2, **TWO),
    "FOURIERFT": dict(n_frequency=20, **TWO),
    "FROD": dict(progressbar=False, **TWO),
    "GLORA": dict(r=4, **TWO),
    "GRALORA": dict(r=4, gralora_k=2, hybrid_r=2, gralora_dropout=0.2, **TWO),
    "HIRA": dict(r=4, hira_dropout=0.2, **TWO),
    "HRA": dict(r=4, **TWO),
    "IA3": dict(target_modules=[*LINEAR, "down_proj"], feedforward_modules=["down_proj"]),
    "LILY": dict(r=4, **TWO),
    "LN_TUNING": dict(target_modules=["input_layernorm"]),
    "LOHA": dict(r=4, module_dropout=0.2, **TWO),
    "LOKR": dict(r=4, module_dropout=0.2, **TWO),
    "MISS": dict(r=4, miss_dropout=0.2, **TWO),
    "OFT": dict(oft_block_size=8, module_dropout=0.2, **TWO),
    "OSF": dict(effective_rank=4, **TWO),
    "PEANUT": dict(r=4, **TWO),
    "PSOFT": dict(r=4, psoft_dropout=0.2, **TWO),
    "PVERA": dict(r=4, **TWO),
    "RANDLORA": dict(r=4, randlora_dropout=0.2, **TWO),
    "ROAD": dict(group_size=8, **TWO),
    "SHIRA": dict(r=2, **TWO),
    "SUPERTUNING": dict(r=2, **TWO),
    "TRAINABLE_TOKENS": dict(token_indices=[7, 11]),
    "VERA": dict(r=4, vera_dropout=0.2, **TWO),
    "WAVEFT": dict(n_frequency=20, **TWO),
}
TOKENS = dict(num_virtual_tokens=2, task_type="CAUSAL_LM")
# Kinds that are refused, with the options they need and by which words.
REFUSED = {
    "ADALORA": (dict(total_step=10, **TWO), "changes its rank"),
    "ADAPTION_PROMPT": (dict(adapter_len=2, adapter_layers=1, target_modules="self_attn"), "prompt learning"),
    "CARTRIDGE": (TOKENS, "prompt learning"),
    "CPT": (dict(cpt_token_ids=[3], cpt_mask=[1], cpt_tokens_type_mask=[1], task_type="CAUSAL_LM"), "prompt learning"),
    "MULTITASK_PROMPT_TUNING": (TOKENS, "prompt learning"),
    "POLY": (TWO, "mixes its tensors by the task"),
    "PREFIX_TUNING": (TOKENS, "prompt learning"),
    "PROMPT_TUNING": (TOKENS, "prompt learning"),
    "P_TUNING": (TOKENS, "prompt learning"),
    "SHADOW": (TWO, "carries a second model"),
    "TINYLORA": (TWO, "writes them in another form"),
    "UNILORA": (TWO, "writes them in another form"),
    "VBLORA": (dict(vector_length=4, **TWO), "writes them in another form"),
    "XLORA": (dict(hidden_size=32, adapters={"0": "somewhere"}), "mixes several finished adapters"),
}
# What LoRA and others can be told beside their defaults, with the model that it needs.
TIED = dict(tie_word_embeddings=True)
MOE = dict(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GPT2 = dict(model_type="gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=128)
PVERA, LILY = PveraConfig(r=4, sample_at_inference=True, **TWO), LilyConfig(r=4, stride_A=2, num_B=3, **TWO)
OPTIONS = {
    "dora": (lora(use_dora=True, lora_dropout=0.2), {}),
    "pissa": (lora(init_lora_weights="pissa"), {}),
    "olora": (lora(init_lora_weights="olora"), {}),
    "mica": (lora(init_lora_weights="mica", **TWO), {}),
    "eva": (lora(init_lora_weights="eva", eva_config=EvaConfig()), {}),
    "kasa": (lora(kasa_config=KasaConfig(), **TWO), {}),
    "monteclora": (lora(monteclora_config=MontecloraConfig(), **TWO), {}),
    "block-diagonal": (lora(use_bdlora=BdLoraConfig(target_modules_bd_a=["q_proj"], nblocks=2), **ONE), {}),
    "activated": (lora(alora_invocation_tokens=[25], task_type="CAUSAL_LM", **TWO), {}),
    "rank and alpha by layer": (lora(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 3}), {}),
    "replicated layers": (lora(layer_replication=[(0, 2), (0, 2)], **TWO), {}),
    "parameters": (lora(target_parameters=["mlp.experts.down_proj"], **ONE), MOE),
    "whole modules": (lora(modules_to_save=["embed_tokens", "lm_head"], **TWO), {}),
    "whole modules, tied": (lora(modules_to_save=["embed_tokens"], ensure_weight_tying=True, **TWO), TIED),
    "tokens": (lora(trainable_token_indices=[7, 11], **TWO), {}),
    "tokens, tied": (lora(trainable_token_indices=[7, 11], **TWO), TIED),
    "tokens of both": (lora(trainable_token_indices={"embed_tokens": [7, 11], "lm_head": [7]}, **TWO), {}),
    "embeddings": (lora(target_modules=["embed_tokens", "q_proj"]), {}),
    "embeddings, tied": (lora(target_modules=["embed_tokens", "q_proj"]), TIED),
    "embeddings of gpt2": (lora(target_modules=["wte", "c_attn"], fan_in_fan_out=True), GPT2),
    "loha's rank dropout": (LoHaConfig(r=4, rank_dropout=0.2, **TWO), {}),
    "pvera that samples always": (PVERA, {}),
    "lily's strides": (LILY, {}),
}
SAMPLED = {"PVERA", "monteclora", "pvera that samples always"}  # the student draws numbers that no checkpoint keeps
IDS = torch.tensor([[1, 7, 12, 25, 2, 9, 11, 21, 40, 2]])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS.to(model.device)).logits.cpu()


def adapter_config(kind, options):
    return PEFT_TYPE_TO_CONFIG_MAPPING[kind](**copy.deepcopy(options))


def check_pass(name, model, teacher):
    """The teacher at `ema_decay=0` is the student, and draws no random numbers. Returns its logits."""
    model.train()
    state = torch.get_rng_state()
    with teacher.activate():
        assert torch.equal(logits(model), logits(model)), "the teacher samples"
    assert torch.equal(torch.get_rng_state(), state), "the teacher draws numbers"
    model.eval()
    with teacher.activate():
        expected = logits(model)
    assert teacher.distance() < 1e-6
    if name != "pvera that samples always":
        torch.testing.assert_close(expected, logits(model), rtol=0, atol=1e-5)
    return expected


def check_file(folder, expected, **changes):
    loaded = PeftModel.from_pretrained(tiny_model(**changes), folder / "teacher").eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-4)


def check_run(name, peft_config, make_trainer, tmp_path):
    def run(**options):
        return make_trainer(peft_config=copy.deepcopy(peft_config), data=rows(8), max_steps=2, ema_decay=0.0, **options)

    trainer = run(save_strategy="steps", save_steps=1)
    start = logits(trainer.model.eval())
    trainer.train()
    expected = check_pass(name, trainer.model, trainer.teacher)
    assert not torch.equal(expected, start)
    check_file(tmp_path / "out" / "checkpoint-2", expected)

    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert resumed.teacher.num_updates == 2
    if name not in SAMPLED:
        resumed.save_model(str(tmp_path / "again"))
        for folder in ("", "teacher"):
            again, first = (
                load_file(path / folder / "adapter_model.safetensors")
                for path in (tmp_path / "again", tmp_path / "out" / "checkpoint-2")
            )
            torch.testing.assert_close(again, first, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", [kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING])
def test_each_kind_of_adapter_is_averaged_or_refused(kind, make_trainer, tmp_path, monkeypatch):
    if kind in TRAINED:
        check_run(kind, adapter_config(kind, TRAINED[kind]), make_trainer, tmp_path)
    elif kind in REFUSED:
        options, words = REFUSED[kind]
        monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *_, **__: pytest.fail("tokenized before"))
        with pytest.raises(ValueError, match=f"{kind} .*{words}.*Use a `LoraConfig`"):
            make_trainer(peft_config=adapter_config(kind, options))
    else:
        pytest.fail(f"PEFT has a new kind, {kind}: say in TRAINED or REFUSED what becomes of it.")


@pytest.mark.parametrize("kind", ["ADALORA", "PREFIX_TUNING", "VBLORA"])
def test_a_kind_that_is_refused_trains_and_resumes_without_a_teacher(kind, make_trainer, tmp_path):
    def run(**options):
        peft_config = adapter_config(kind, REFUSED[kind][0])
        return make_trainer(peft_config=peft_config, data=rows(8), max_steps=2, teacher="none", **options)

    whole = run(save_strategy="steps", save_steps=1)
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    expected = dict(whole.model.named_parameters())
    assert all(torch.equal(expected[name], weight) for name, weight in resumed.model.named_parameters())


@pytest.mark.parametrize("name", ["activated", "mica", "replicated layers"])
def test_a_run_with_an_option_of_an_adapter(name, make_trainer, tmp_path):
    check_run(name, OPTIONS[name][0], make_trainer, tmp_path)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_an_adapter_trains_and_is_evaluated(name, make_trainer):
    peft_config, changes = OPTIONS[name]
    trainer = make_trainer(
        model=tiny_model(**changes), peft_config=copy.deepcopy(peft_config), data=rows(4), eval_dataset=rows(1, seed=5),
        max_steps=1, kl_weight=0.5,
    )  # fmt: skip
    before = logits(trainer.model.eval())
    trainer.train()
    assert not torch.equal(logits(trainer.model.eval()), before)
    if name != "pvera that samples always":
        check_evaluation(trainer)


def check_evaluation(trainer):
    """The loss that is reported is that of the logits, as the model itself computes it."""
    (batch,) = trainer.get_eval_dataloader()
    with torch.no_grad():
        expected = trainer.model(**batch).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("changes", "indices"), [(TIED, [7, 11]), ({}, {"lm_head": [7, 11]})])
def test_tokens_of_the_head_are_trained_by_the_loss_of_its_logits(changes, indices, make_trainer):
    trainer = make_trainer(
        model=tiny_model(**changes), peft_config=lora(trainable_token_indices=indices, **TWO), data=rows(4),
        eval_dataset=rows(1, seed=5), max_steps=1, teacher="none", learning_rate=0.1,
    )  # fmt: skip
    batch = next(iter(trainer.get_train_dataloader()))
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(trainer.model(**batch).loss, trained)
    gradients = torch.autograd.grad(trainer.compute_loss(trainer.model.train(), batch), trained)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    trainer.train()
    check_evaluation(trainer)
    batches = trainer_batches(trainer, trainer.eval_dataset)
    drift = measure_drift(trainer.model, batches)
    assert drift["loss"] == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-5)


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_tokens_of_a_head_with_a_bias_are_refused(teacher, make_trainer):
    model = tiny_model(model_type="phi", num_key_value_heads=4)
    peft_config = lora(trainable_token_indices={"lm_head": [7]}, **TWO)
    with pytest.raises(ValueError, match="whose bias PEFT would leave out.*`modules_to_save`"):
        make_trainer(model=model, peft_config=peft_config, teacher=teacher)


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_of_an_adapter_is_averaged_and_saved(name, tmp_path):
    peft_config, changes = OPTIONS[name]
    model = get_peft_model(tiny_model(**changes), copy.deepcopy(peft_config)).eval()
    before, trained = logits(model), [n for n, p in model.named_parameters() if p.requires_grad]
    base = [parameter.clone() for parameter in model.parameters() if not parameter.requires_grad]
    teacher = MeanTeacher(model)
    frozen = [p for n, p in model.named_parameters() if not p.requires_grad and ".teacher" not in n]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(frozen, base, strict=True)), "the base has changed"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    teacher.update(0.0)
    expected = check_pass(name, model, teacher)
    assert not torch.equal(expected, before)

    model.save_pretrained(tmp_path / "by PEFT")
    model.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    teacher.save(tmp_path / "ours")
    for folder in ("by PEFT", "ours"):
        check_file(tmp_path / folder, expected, **changes)
    teacher.check(tmp_path / "ours")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], r".*(q_proj|lm_head)"])
@pytest.mark.parametrize("given", ["config", "model"])
@pytest.mark.parametrize(
    "changes",
    [{"teacher": "ema"}, {}, {"rehearsal_weight": 1.0, "rehearsal_num_tokens": 16}, {"entropy_weighting": True}, {"l1_weight": 1e-3}, {"l2_weight": 1.0}],
)  # fmt: skip
def test_an_adapter_on_the_head_is_refused_before_tokenization(make_trainer, monkeypatch, targets, given, changes):
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *_, **__: pytest.fail("tokenized before"))
    adapter = lora(target_modules=targets)
    options = dict(peft_config=adapter)
    if given == "model":
        options = dict(peft_config=None, model=get_peft_model(tiny_model(), adapter))
    with pytest.raises(ValueError, match="has an adapter on `lm_head`.*Leave it out, or train the whole head"):
        make_trainer(**options, **({"teacher": "none"} | changes))


def test_tied_adapters_of_embeddings_are_refused_before_tokenization(make_trainer, monkeypatch):
    monkeypatch.setattr(SFTTrainer, "_prepare_dataset", lambda *_, **__: pytest.fail("tokenized before"))
    peft_config = lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    with pytest.raises(ValueError, match="puts the adapter of the embeddings on `lm_head` too.*Leave it out"):
        make_trainer(model=tiny_model(**TIED), peft_config=peft_config)
