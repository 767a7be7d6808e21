import os
from dataclasses import fields

import pytest
from conftest import logged, rows
from huggingface_hub import ModelCard

from trl_ema import MeanTeacherConfig, __version__


TEACHERS = ("ema", "frozen", "none")


@pytest.fixture
def make_trained(make_trainer):
    def make(**changes):
        trainer = make_trainer(**(dict(max_steps=2) | changes))
        trainer.train()
        return trainer

    return make


def saved_card(trainer):
    trainer.save_model()
    return ModelCard.load(os.path.join(trainer.args.output_dir, "README.md"))


def created_card(trainer):
    trainer.create_model_card(model_name="tiny-ema", dataset_name="someone/medical", tags=["medical"])
    return ModelCard.load(os.path.join(trainer.args.output_dir, "README.md"))


def table(text):
    """The cells of all two-column tables."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]
    return {name.strip("`"): value for name, value in lines}


@pytest.mark.parametrize("card_of", [saved_card, created_card])
@pytest.mark.parametrize(
    ("teacher", "method"),
    [("ema", "exponential moving average"), ("frozen", "frozen teacher"), ("none", "Plain supervised fine-tuning")],
)
def test_card_tells_the_method(make_trained, card_of, teacher, method):
    section = card_of(make_trained(teacher=teacher)).text.split("## Method (trl_ema)")[1]
    assert method in section
    assert ("kl_weight * D(p_teacher, p_student)" in section) == (teacher != "none")
    assert f"Trained with trl_ema {__version__} for 2 optimizer steps on 16 rows." in section


@pytest.mark.parametrize("card_of", [saved_card, created_card])
def test_card_has_every_setting_of_ours_and_those_of_the_training(make_trained, card_of):
    trainer = make_trained(kl_weight=0.25, kl_direction="jsd", ema_decay=0.9, ema_warmup=True, max_length=20)
    text = card_of(trainer).text.split("## Last logged metrics")[0]
    settings = table(text)
    for f in fields(MeanTeacherConfig):
        if f.name in MeanTeacherConfig.__annotations__:
            assert settings[f.name] == str(getattr(trainer.args, f.name))
    assert (settings["r"], settings["lora_alpha"], settings["peft_type"]) == ("4", "8", "LORA")
    assert settings["learning_rate"] == "0.01"
    assert settings["max_length"] == "20"
    assert settings["lr_scheduler_type"] == "constant"


def test_card_has_the_newest_metrics(make_trained):
    trainer = make_trained(eval_dataset=rows(4, seed=1), eval_teacher=True)
    eval_loss = trainer.evaluate()["eval_loss"]
    metrics = table(saved_card(trainer).text.split("## Last logged metrics")[1])
    assert metrics["eval_loss"] == f"{eval_loss:.4g}"
    assert metrics["loss"] == f"{logged(trainer, 'loss')[-1]:.4g}"
    assert {"ce_loss", "kl_loss", "kl_weight", "ema_decay", "teacher_distance", "eval_teacher_loss"} <= set(metrics)
    assert not [name for name in metrics if name == "epoch" or name.endswith(("_runtime", "_per_second"))]


def test_card_of_an_untrained_model_has_no_metrics(make_trainer):
    assert "Last logged metrics" not in saved_card(make_trainer()).text


@pytest.mark.parametrize("card_of", [saved_card, created_card])
def test_card_cites_the_four_papers(make_trained, card_of):
    text = card_of(make_trained()).text
    for title in (
        "Mean teachers are better role models",
        "Overcoming catastrophic forgetting in neural networks",
        "An Empirical Study of Catastrophic Forgetting",
        "Adapting Large Language Models for narrow domains using the exponential moving average method",
    ):
        assert text.count(f"{{{title}") == 1


def test_second_save_rewrites_our_part_and_keeps_the_rest(make_trainer):
    trainer = make_trainer(max_steps=2)
    assert "for 0 optimizer steps" in saved_card(trainer).text
    trainer.train()
    text = saved_card(trainer).text
    assert text.count("## Method (trl_ema)") == text.count("## Cite\n") == text.count("<!-- trl_ema -->") == 1
    assert "for 2 optimizer steps" in text
    assert "for 0 optimizer steps" not in text
    assert text.count("# Model Card for Model ID") == 1  # PEFT's part
    assert saved_card(trainer).text == text


def test_card_after_a_save_and_a_creation_has_our_part_once(make_trained):
    trainer = make_trained()
    saved_card(trainer)
    assert created_card(trainer).text.count("## Method (trl_ema)") == 1
    assert saved_card(trainer).text.count("## Method (trl_ema)") == 1


@pytest.mark.parametrize("card_of", [saved_card, created_card])
@pytest.mark.parametrize("teacher", TEACHERS)
def test_metadata_is_read_by_the_hub_library(make_trained, card_of, teacher):
    data = card_of(make_trained(teacher=teacher)).data
    assert {"trl", "sft", "trl_ema"} <= set(data.tags)
    if card_of is created_card:
        assert "medical" in data.tags
        assert data.model_name == "tiny-ema"
        assert data.datasets == "someone/medical"


@pytest.mark.parametrize("teacher", TEACHERS)
def test_card_mentions_the_teacher_folder_exactly_if_there_is_one(make_trained, teacher):
    trainer = make_trained(teacher=teacher)
    text = saved_card(trainer).text
    there = os.path.isdir(os.path.join(trainer.args.output_dir, "teacher"))
    assert there == (teacher == "ema")  # a frozen teacher over a fresh adapter is the base model
    assert ("`teacher/`" in text) == there


def test_model_without_an_adapter_has_a_card_too(make_trained):
    text = saved_card(make_trained(teacher="none", peft_config=None)).text
    assert "Plain supervised fine-tuning" in text


def test_streamed_training_data_is_called_a_stream(make_trained):
    text = saved_card(make_trained(data=rows().to_iterable_dataset())).text
    assert "optimizer steps on a stream." in text


def test_card_shows_the_half_life_in_force(make_trained):
    assert table(saved_card(make_trained()).text)["ema_half_life"] == "0.25"


def test_card_takes_more_tables(make_trained):
    trainer = make_trained()
    trainer.model_card_details = {"Sources": {"data": "some ontology 1.0"}, "Figures": {"before": 3.14159}}
    text = saved_card(trainer).text
    assert "## Sources" in text and table(text.split("## Sources")[1])["data"] == "some ontology 1.0"
    assert table(text.split("## Figures")[1])["before"] == "3.142"
