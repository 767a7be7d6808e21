import contextlib
import json
import os
import re
from dataclasses import fields

import pytest
from conftest import logged, lora, rows, tiny_model
from huggingface_hub import ModelCard
from peft import LoHaConfig
from transformers import BitsAndBytesConfig

from trl_ema import MeanTeacherConfig, __version__, offline
from trl_ema.data import DataPart
from trl_ema.evaluation.models import adapter_base
from trl_ema.measurement import card_results
from trl_ema.model_card import CITATIONS, method_of


TEACHERS = ("ema", "frozen", "none")
OWN_TEXTS = dict(rehearsal_num_texts=4, rehearsal_num_tokens=8)
GIVEN_TEXTS = OWN_TEXTS | dict(rehearsal_dataset=rows())


@pytest.fixture(autouse=True)
def _cache_of_texts(tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ema.texts.cache_dir", lambda: tmp_path / "cache")


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


# Base model and quick start


def local(folder):
    """A model in `folder`, loaded from there."""
    from transformers import AutoModelForCausalLM

    tiny_model().save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def run(code, folder, capsys):
    """The quick start as it stands, in the folder of the run, which it says."""
    scope = {}
    with contextlib.chdir(folder / "out"):
        exec(code, scope)
    assert capsys.readouterr().out.strip()
    return scope["model"]


def quick_starts(card):
    section = card.text.split("## Quick start")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


@pytest.mark.parametrize("card_of", [saved_card, created_card])
@pytest.mark.parametrize("chat", [True, False])
def test_quick_starts_of_a_run_on_a_local_model_run_as_written(
    make_trained, tmp_path, capsys, tokenizer, card_of, chat
):
    if not chat:
        tokenizer.chat_template = None
    trainer = make_trained(model=local(tmp_path / "the-base"), peft_config=lora(task_type="CAUSAL_LM"))
    trainer.save_model()
    card = card_of(trainer)
    assert "None]" not in card.text and '"None"' not in card.text
    assert "made from the local model `the-base`" in card.text
    assert card.text.count("## Quick start") == 1
    student, teacher = quick_starts(card)
    assert str(tmp_path) not in str(card)
    for code, name in ((student, "default"), (teacher, "teacher")):
        loaded = run(code, tmp_path, capsys).state_dict()
        trained = {key: value for key, value in trainer.model.state_dict().items() if f".{name}." in key}
        assert trained and all(loaded[key.replace(f".{name}.", ".default.")].equal(x) for key, x in trained.items())


@pytest.mark.parametrize(("teacher", "blocks"), [("frozen", 1), ("none", 1)])
def test_quick_start_of_a_run_without_a_teacher_folder_has_the_student_alone(make_trained, tmp_path, teacher, blocks):
    trainer = make_trained(model=local(tmp_path / "base"), teacher=teacher)
    assert len(quick_starts(saved_card(trainer))) == blocks


def test_quick_start_of_a_whole_model_runs_as_written(make_trained, tmp_path, capsys):
    trainer = make_trained(model=local(tmp_path / "base"), teacher="none", peft_config=None)
    (code,) = quick_starts(saved_card(trainer))
    loaded = run(code, tmp_path, capsys).state_dict()
    assert all(loaded[name].equal(value) for name, value in trainer.model.state_dict().items())


def test_card_of_a_run_on_the_demo_model_names_it_and_runs_on_any_machine(make_trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "here"))
    trainer = make_trained(model=local(offline._demo_folder()))
    card = saved_card(trainer)
    text = str(card)
    assert "[HuggingFaceTB/SmolLM2-135M-Instruct](https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct)" in text
    assert "quantized to Q4_1 and back" in text
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "base_model:adapter:HuggingFaceTB/SmolLM2-135M-Instruct" in card.data.tags
    assert str(tmp_path / "here") not in text
    # Another machine, whose cache is elsewhere.
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "there"))
    for code in quick_starts(card):
        run(code, tmp_path, capsys)
    assert adapter_base(trainer.args.output_dir) == offline.demo_model()
    assert adapter_base(trainer.args.output_dir, offline.demo_model()) == offline.demo_model()


def test_quick_start_of_the_demo_model_with_more_tokens_runs_as_written(make_trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    model = local(offline._demo_folder())
    model.resize_token_embeddings(70)
    trainer = make_trained(model=model, peft_config=lora(trainable_token_indices=[66]))
    for code in quick_starts(saved_card(trainer)):
        assert run(code, tmp_path, capsys).get_input_embeddings().weight.shape[0] == 70


def test_a_card_names_the_repository_it_is_pushed_to(make_trained, tmp_path):
    trainer = make_trained(model=local(tmp_path / "base"), hub_model_id="someone/medical-ema")
    assert all('snapshot_download("someone/medical-ema")' in code for code in quick_starts(saved_card(trainer)))


def test_adapter_config_names_a_base_that_loads_here(make_trained, tmp_path):
    trainer = make_trained(model=local(tmp_path / "base"))
    text = saved_card(trainer).text
    for folder in ("", "teacher"):
        with open(os.path.join(trainer.args.output_dir, folder, "adapter_config.json"), encoding="utf-8") as file:
            assert json.load(file)["base_model_name_or_path"] == str(tmp_path / "base")
    assert "On another machine put the place of your copy there, as `base_model_name_or_path`" in text


@pytest.mark.parametrize(
    ("path", "link"),
    [
        ("some-org/some-model", "some-org/some-model"),
        ("/cache/hub/models--some-org--some-model/snapshots/0123abcd", "some-org/some-model"),
    ],
)
def test_card_of_a_run_on_a_hub_model_links_to_it(make_trained, path, link):
    model = tiny_model()
    model.config._name_or_path = model.name_or_path = path
    trainer = make_trained(model=model)
    for card in (saved_card(trainer), created_card(trainer)):
        assert f"made from [{link}](https://huggingface.co/{link})" in card.text
        assert "[None]" not in card.text and len(quick_starts(card)) == 2
        assert card.data.base_model in (link, None)
        assert "/cache/hub" not in str(card)
    assert ("`adapter_config.json` names the base by its path" in card.text) == (path != link)


def test_card_of_a_base_that_is_gone_by_now_links_to_no_path(make_trained):
    model = tiny_model()
    model.config._name_or_path = "/scratch/gone"
    text = created_card(make_trained(model=model)).text
    assert "fine-tuned version of the local model `gone`" in text and "huggingface.co//" not in text


def test_card_of_a_model_without_a_name_says_so(make_trained):
    text = created_card(make_trained()).text
    assert "fine-tuned version of a model that was given in memory, without a name" in text
    assert "load that model, then `PeftModel.from_pretrained(base, folder)`" in text and "[None]" not in text


def test_cards_know_no_path_of_the_machine(make_trained, tmp_path):
    trainer = make_trained(model=local(tmp_path / "base"), save_strategy="steps", save_steps=1)
    trainer.model_card_details = {"Sources": {"data": str(tmp_path / "base"), "model": "some-org/some-model"}}
    trainer.create_model_card("tiny", dataset_name=str(tmp_path / "base"))
    found = table((tmp_path / "out" / "README.md").read_text())
    assert (found["data"], found["model"], found["base_model"]) == (
        "base",
        "some-org/some-model",
        "the local model `base`",
    )
    for card in (tmp_path / "out").rglob("README.md"):
        assert str(tmp_path) not in card.read_text()
    assert (tmp_path / "out" / "checkpoint-1" / "README.md").is_file()


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


# Citations


ALWAYS = {"TRL", "PEFT", "LoRA"}


def cited(text):
    """What the whole card cites, by our names, each once."""
    counts = {name: text.count(f"{entry.partition(',')[0]},") for name, entry in CITATIONS.items()}
    assert set(counts.values()) <= {0, 1}
    return {name for name, count in counts.items() if count}


@pytest.mark.parametrize("card_of", [saved_card, created_card])
@pytest.mark.parametrize(
    ("options", "used"),
    [
        (dict(teacher="ema"), {"mean teacher", "EMA study"}),
        (dict(teacher="ema", loss_type="dft"), {"mean teacher", "EMA study", "DFT"}),
        (dict(teacher="frozen"), {"frozen teacher"}),
        (dict(teacher="frozen", loss_type="dft"), {"frozen teacher", "DFT", "ASFT"}),
        (dict(teacher="frozen", kl_tokens="prompt"), {"frozen teacher", "SelfAug"}),
        (dict(teacher="ema", kl_tokens="prompt"), {"mean teacher", "EMA study", "SelfAug"}),
        (dict(teacher="none", entropy_weighting=True), {"EAFT"}),
        (dict(teacher="none"), set()),
        (dict(teacher="none", loss_type="dft"), {"DFT"}),
        (dict(teacher="none", l1_weight=1e-3), {"EMA study"}),
        (dict(teacher="none", l2_weight=1e-3), {"L2-SP"}),
        (dict(teacher="none", rehearsal_weight=1.0, **OWN_TEXTS), {"self-generated replay"}),
        (dict(teacher="none", rehearsal_weight=1.0, rehearsal_loss="ce", **GIVEN_TEXTS), {"GeRe"}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_card_cites_what_the_run_used_and_nothing_else(make_trained, card_of, options, used):
    assert cited(card_of(make_trained(**options)).text) == ALWAYS | used


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            OWN_TEXTS,
            r"KL\(model before training \|\| student\), with a weight of 2, on texts .* wrote itself .*own comparison",
        ),
        (
            dict(OWN_TEXTS, drift_budget=0.1),
            r"with a weight that began at 2 and was steered to 0.1 nats per token, on texts .*\(arXiv:2605.26097\).\n",
        ),
        (
            dict(OWN_TEXTS, teacher="ema"),
            r"with a weight of 2, on texts .* wrote itself \(arXiv:2605.26097\).\n",
        ),
        (
            dict(OWN_TEXTS, rehearsal_loss="ce"),
            r"the cross-entropy, as of training data, .* wrote itself \(arXiv:2605.26097\).\n",
        ),
        (
            GIVEN_TEXTS,
            r"student\), with a weight of 2, on general texts that were given \(arXiv:2508.04676\).\n",
        ),
    ],
)
def test_card_tells_what_was_rehearsed_and_how(make_trained, options, told):
    """And what was measured of rehearsal, where it is what was measured."""
    assert re.search(
        f"Beside it, rehearsal: .*{told}",
        saved_card(make_trained(**dict(teacher="none", rehearsal_weight=2.0) | options)).text,
    )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(teacher="ema"), True),
        (dict(teacher="frozen"), True),
        (dict(teacher="none", l2_weight=0.1), True),
        (dict(teacher="none", entropy_weighting=True), True),
        (dict(teacher="none"), False),
        (dict(OWN_TEXTS, rehearsal_weight=2.0, teacher="ema"), False),
    ],
)
def test_card_says_what_the_comparison_found_of_teachers_and_penalties(make_trained, options, told):
    assert ("no teacher alone kept much more" in saved_card(make_trained(**options)).text) == told


def test_card_names_the_kinds_of_many_adapted_modules(make_trained):
    told = "| `target_modules` | down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj: 14 modules by name |"
    assert told in saved_card(make_trained()).text


def test_card_of_a_whole_model_cites_no_adapter(make_trained):
    assert cited(saved_card(make_trained(teacher="none", peft_config=None)).text) == {"TRL"}


def test_card_of_another_adapter_does_not_cite_lora(make_trained):
    text = saved_card(make_trained(peft_config=LoHaConfig(r=2, target_modules=["q_proj"]))).text
    assert cited(text) == {"mean teacher", "EMA study", "TRL", "PEFT"}


@pytest.mark.parametrize(("quantization", "qlora"), [("nf4", True), ("fp4", True), (None, False)])
def test_card_cites_qlora_over_four_bits(make_trained, quantization, qlora):
    trainer = make_trained()
    if quantization is not None:
        trainer.model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=quantization
        )
    assert ("QLoRA" in cited(saved_card(trainer).text)) == qlora


@pytest.mark.parametrize("where", ["log", "table"])
def test_card_cites_the_measure_of_drift_where_it_was_measured(make_trained, where):
    trainer = make_trained()
    assert "drift" not in cited(saved_card(trainer).text)
    if where == "log":
        trainer.state.log_history.append({"drift_domain": 0.1})
    else:
        trainer.model_card_details = {"Held-out figures": {"student, domain, kl_base_model": 0.1}}
    assert "drift" in cited(saved_card(trainer).text)


def test_every_citation_is_whole_bibtex():
    for entry in CITATIONS.values():
        assert re.match(r"@(article|inproceedings|software|misc)\{[\w-]+,\n", entry) and entry.endswith("\n}")
        assert entry.count("{") == entry.count("}")
        assert all(re.search(rf"^  {field} += \{{.+\}},?$", entry, re.MULTILINE) for field in ("title", "author"))


@pytest.mark.parametrize(
    ("options", "name", "paper"),
    [
        (dict(teacher="ema"), "EMA-regularized SFT", "1703.01780"),
        (dict(teacher="frozen"), "SFT with a frozen teacher", "1606.09282"),
        (dict(teacher="frozen", loss_type="dft"), "ASFT", "2509.23753"),
        (dict(teacher="frozen", kl_tokens="prompt"), "SelfAug", "2509.03934"),
        (dict(teacher="none", entropy_weighting=True), "EAFT", "2601.02151"),
        (dict(teacher="none", rehearsal_weight=1.0), "SFT with self-generated replay", "2605.26097"),
        (dict(teacher="none", rehearsal_weight=1.0, rehearsal_dataset="some"), "SFT with general replay", "2508.04676"),
        (dict(teacher="none"), "SFT", None),
        (dict(teacher="none", l1_weight=1e-3), "SFT with an L1 penalty", None),
        (dict(teacher="none", l1_weight=1e-3, l2_weight=1e-3), "SFT with L2-SP", "1802.01483"),
        (dict(teacher="none", ewc_weight=1.0, l2_weight=1e-3), "SFT with EWC", "1612.00796"),
    ],
)
def test_method_of_a_run_has_a_name_and_the_paper_that_introduced_it(tmp_path, options, name, paper):
    found, of_paper = method_of(MeanTeacherConfig(str(tmp_path), use_cpu=True, bf16=False, **options))
    assert (found, of_paper.get("id")) == (name, paper)
    assert bool(of_paper.get("title")) == (paper is not None)


def test_texts_that_are_given_to_the_trainer_count_as_given(make_trained):
    text = created_card(make_trained(teacher="none", rehearsal_weight=1.0, **GIVEN_TEXTS)).text
    assert "SFT with general replay" in text and "2605.26097" not in text


@pytest.mark.parametrize(
    "options",
    [
        dict(weight_decay=0.1),
        dict(optim_args="weight_decay=0.1"),
        dict(loss_type="dft"),
        dict(neftune_noise_alpha=5.0),
        dict(entropy_weighting=True),
    ],
    ids=lambda options: next(iter(options)),
)
def test_training_without_a_teacher_is_called_plain_only_where_it_is(make_trained, options):
    text = saved_card(make_trained(teacher="none", **options)).text
    assert "Plain supervised" not in text and "without a teacher. It is not plain" in text
    ((name, value),) = options.items()
    assert table(text)[name] in (str(value), f"{value:.4g}" if isinstance(value, float) else None)


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


@pytest.mark.parametrize("card_of", [saved_card, created_card])
def test_figures_are_in_the_metadata_as_the_hub_shows_them(make_trained, card_of):
    trainer = make_trained()
    figures = {"domain": {"loss": 2.5, "kl_base_model": 0.125}, "general": {"loss": 3.0, "kl_base_model": 0.25}}
    trainer.model_card_results = card_results({"student": figures}, {"medical": DataPart("someone/medical", "en")})
    for _ in range(2):  # a second card has them once, too
        data = card_of(trainer).data
        found = {(result.dataset_type, result.metric_type): result.metric_value for result in data.eval_results}
        assert found == {
            ("someone/medical", "loss"): 2.5,
            ("someone/medical", "kl_divergence"): 0.125,
            ("general_questions", "loss"): 3.0,
            ("general_questions", "kl_divergence"): 0.25,
        }
        assert {result.dataset_config for result in data.eval_results} == {"en", None}
        assert len(data.eval_results) == 4 and data.model_name == ("tiny-ema" if card_of is created_card else "out")
        assert data.to_dict()["model-index"][0]["results"][0]["task"] == {"type": "text-generation"}


def test_figures_of_a_mixture_are_each_of_their_data_set_and_of_a_file_without_its_folder(tmp_path):
    (tmp_path / "letters.csv").write_text("")
    parts = {"medical": DataPart("someone/medical"), "letters": DataPart(str(tmp_path / "letters.csv")), "demo": None}
    figures = {"loss": 2.5, "kl_base_model": 0.125}

    def found(*groups, **parts):
        results = card_results({"student": dict.fromkeys(groups, figures)}, parts)
        return [(one.dataset_type, one.dataset_name) for one in results if one.metric_type == "loss"]

    assert found("domain", "general", *parts, **parts) == [
        ("mixture", "medical, letters, demo, held-out rows together"),
        ("general_questions", "general questions that come with trl_ema"),
        ("someone/medical", "someone/medical, held-out rows"),
        ("letters", "letters, held-out rows"),
        ("human_phenotype_ontology", "Human Phenotype Ontology, held-out terms"),
    ]
    # One data set, with others that are replayed.
    assert [kind for kind, _ in found("domain", "letters", **parts)] == ["someone/medical", "letters"]


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
