"""Real bitsandbytes NF4 layers on the CPU."""

import pytest
import torch
from conftest import adapter_weights, logged, lora, rows, tiny_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl import SFTTrainer

from trl_ema.workarounds import keep_4bit_layers_trainable


@pytest.fixture
def nf4_model(tmp_path):
    tiny_model(hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(tmp_path / "base")

    def load():
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )  # fmt: skip
        return AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization)

    return load


def test_teacher_averages_in_float32_beside_a_bfloat16_student(nf4_model, make_trainer):
    trainer = make_trainer(model=nf4_model(), ema_decay=0.999, bf16=True)
    trainer.train()
    assert {w.dtype for w in adapter_weights(trainer).values()} == {torch.bfloat16}
    assert {w.dtype for w in adapter_weights(trainer, "teacher").values()} == {torch.float32}
    assert logged(trainer, "kl_loss")[0] == pytest.approx(0.0, abs=1e-7)
    assert logged(trainer, "teacher_distance")[-1] > 0


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_a_float32_run_keeps_its_adapter_in_float32(nf4_model, make_trainer, teacher):
    trainer = make_trainer(model=nf4_model(), teacher=teacher)
    trainer.train()
    assert {w.dtype for w in adapter_weights(trainer).values()} == {torch.float32}


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
def test_no_teacher_equals_sft_trainer_step_for_step(nf4_model, make_trainer, bf16):
    """In float32 but for the adapter, which TRL casts to bfloat16 in any run; upcast again, it is the same training."""
    ours = make_trainer(model=nf4_model(), teacher="none", bf16=bf16)
    theirs = make_trainer(model=nf4_model(), teacher="none", bf16=bf16, trainer_class=SFTTrainer)
    for trainer in (ours, theirs):
        keep_4bit_layers_trainable(trainer.model)  # a CPU's matter alone
    assert {w.dtype for w in adapter_weights(theirs).values()} == {torch.bfloat16}
    if not bf16:
        for parameter in theirs.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    ours.train(), theirs.train()
    for key in ("loss", "grad_norm", "entropy", "mean_token_accuracy"):
        assert logged(ours, key) == logged(theirs, key)
    assert all(torch.equal(w, adapter_weights(theirs)[name]) for name, w in adapter_weights(ours).items())


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_training_after_evaluate_still_learns(nf4_model, make_trainer, teacher):
    """On CPUs with AVX512-BF16 an evaluation once left the 4-bit layers without a backward."""
    runs = []
    for evaluate_first in (True, False):
        model = nf4_model()
        model.eval()
        with torch.no_grad():
            model(torch.arange(3, 9, device=model.device)[None])  # as a user would, before there is a trainer
        trainer = make_trainer(model=model, eval_dataset=rows(4, seed=9), teacher=teacher, max_steps=12)
        if evaluate_first:
            trainer.evaluate()
        trainer.train()
        runs.append(trainer)
    assert logged(runs[0], "loss") == logged(runs[1], "loss")
    assert logged(runs[0], "grad_norm") == logged(runs[1], "grad_norm")
    losses = logged(runs[0], "loss")
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])  # an epoch is four steps


@pytest.mark.parametrize("teacher", ["ema", "frozen", "none"])
def test_resumed_qlora_run_equals_an_uninterrupted_one_bit_for_bit(nf4_model, make_trainer, tmp_path, teacher):
    options = dict(
        teacher=teacher, max_steps=6, save_strategy="steps", save_steps=3, peft_config=lora(lora_dropout=0.2)
    )
    whole = make_trainer(model=nf4_model(), output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    resumed = make_trainer(model=nf4_model(), output_dir=str(tmp_path / "resumed"), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for name in ("default", "teacher"):
        ours, theirs = adapter_weights(resumed, name), adapter_weights(whole, name)
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert ours[key].dtype == theirs[key].dtype
            assert torch.equal(ours[key], theirs[key])
    assert logged(resumed, "loss") == logged(whole, "loss")
