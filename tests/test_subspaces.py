"""Sub-spaces that PEFT chooses, as another method's adapter: in the trainer, and by the recipe."""

import copy
import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import adapter_weights, rows, tiny_model
from peft import OFTConfig, OSFConfig, PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ema.evaluation.drift import measure_drift
from trl_ema.evaluation.models import load_base, with_adapter
from trl_ema.script import parse


ROOT = Path(__file__).parent.parent
ADAPTERS = {
    "osf": OSFConfig(target_modules="all-linear", effective_rank=0.9),
    "oft": OFTConfig(target_modules="all-linear", oft_block_size=8),
}
HELD = {
    "alone": dict(teacher="none"),
    "rehearsal": dict(teacher="none", rehearsal_weight=1.0, rehearsal_num_texts=10, rehearsal_num_tokens=12),
    "frozen": dict(teacher="frozen"),
    "ema": dict(teacher="ema"),
}
IDS = torch.arange(3, 15)[None]


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS.to(model.device)).logits.cpu()


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_it_trains_is_measured_saved_and_resumed(make_trainer, tmp_path, monkeypatch, kind, held):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))

    def make(folder):
        return make_trainer(
            peft_config=copy.deepcopy(ADAPTERS[kind]), save_strategy="steps", save_steps=2, output_dir=str(tmp_path / folder),
            eval_dataset=rows(6, seed=1), **HELD[held],
        )  # fmt: skip

    base = logits(tiny_model())
    trainer = make("whole")
    trainer.train()
    trainer.save_model()
    after = logits(trainer.model)
    assert not torch.allclose(after, base, atol=1e-3)
    with trainer.starting_point.activate():
        torch.testing.assert_close(logits(trainer.model), base, rtol=0, atol=1e-5)
    drift = measure_drift(trainer.model, trainer.get_eval_dataloader(), reference=trainer.starting_point.activate)
    assert drift["kl_base_model"] > 1e-4
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(tiny_model(), tmp_path / "whole")), after, rtol=0, atol=1e-5
    )
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = adapter_weights(trainer)
    assert all(torch.equal(weight, expected[name]) for name, weight in adapter_weights(resumed).items())


def test_osf_never_moves_the_directions_that_it_holds(make_trainer):
    """By gradients: what AdamW makes of these, each number on its own scale, is not quite within the sub-space."""
    trainer = make_trainer(
        teacher="none", peft_config=copy.deepcopy(ADAPTERS["osf"]), optim="sgd", learning_rate=0.5, max_grad_norm=0.0
    )
    trainer.train()
    for module in trainer.model.modules():
        if hasattr(module, "osf_svd_params"):
            left, _, right = torch.linalg.svd(module.get_base_layer().weight.detach(), full_matrices=False)
            rank = module.effective_rank["default"]
            update = module.get_delta_weight("default").detach()
            assert update.norm() > 1e-3
            for held in (left[:, :rank].T @ update, update @ right[:rank].T):
                assert held.norm() < 1e-4 * update.norm()


# The recipe

QUICK = [
    "--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--eval_fraction", "0.2", "--use_cpu", "true", "--bf16", "false",
    "--max_steps", "4", "--learning_rate", "1e-2", "--report_to", "none", "--eval_samples", "6", "--generations", "0",
    "--max_length", "48", "--logging_steps", "1", "--save_steps", "2", "--dtype", "float32", "--teacher", "none",
]  # fmt: skip


@pytest.fixture
def run(tiny_folder, monkeypatch):
    """The recipe in this process: one of its own imports for longer than these train."""
    monkeypatch.chdir(tiny_folder)
    monkeypatch.setenv("TRL_EMA_CACHE", str(tiny_folder / "cache"))
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))

    def start(*arguments):
        monkeypatch.setattr(sys, "argv", ["subspaces.py", *arguments])
        runpy.run_path(str(ROOT / "recipes" / "subspaces.py"), run_name="__main__")

    return start


def test_the_recipe_starts_as_a_script():
    command = [sys.executable, str(ROOT / "recipes" / "subspaces.py"), "--help"]
    assert "--subspace" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("osf", ["--effective_rank", "0.75"]),
        ("oft", ["--oft_block_size", "16"]),
        (
            "corda",
            ["--lora_r", "4", "--rehearsal_weight", "1", "--rehearsal_num_texts", "8", "--rehearsal_num_tokens", "32"],
        ),
    ],
)
def test_the_recipe_trains_measures_and_saves_what_loads_over_the_base(tiny_folder, run, kind, options):
    arguments = ["--subspace", kind, *options, *QUICK, "--output_dir", kind]
    if kind == "oft":  # from a file, as well
        lines = [f"{name[2:]}: {value}\n" for name, value in zip(arguments[::2], arguments[1::2], strict=True)]
        (tiny_folder / "oft.yaml").write_text("".join(lines))
        run("--config", "oft.yaml")
    else:
        run(*arguments)
    metrics = json.loads((tiny_folder / kind / "metrics.json").read_text())
    assert metrics["student"]["domain"]["loss"] < metrics["before"]["domain"]["loss"]
    assert metrics["before"]["general"]["kl_base_model"] == pytest.approx(0, abs=1e-6)
    assert metrics["student"]["general"]["kl_base_model"] > 1e-4
    saved = PeftConfig.from_pretrained(tiny_folder / kind)
    assert saved.peft_type.value.lower() == ("lora" if kind == "corda" else kind)
    if kind == "osf":
        assert saved.effective_rank == 0.75
    elif kind == "oft":
        assert saved.oft_block_size == 16
    else:
        assert saved.r == 8 and saved.init_lora_weights is True  # the difference of two of rank 4

    # As an evaluation loads it.
    base, _ = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    model, _ = with_adapter(base, str(tiny_folder / kind), AutoTokenizer.from_pretrained(tiny_folder / kind))
    alone = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder / "model", dtype=torch.float32), tiny_folder / kind
    )
    torch.testing.assert_close(logits(model), logits(alone), rtol=0, atol=1e-5)
    # Over the base as it was it computes what was trained.
    if kind == "corda":
        run(*arguments, "--resume_from_checkpoint", "corda/checkpoint-2")
        again = json.loads((tiny_folder / kind / "metrics.json").read_text())
        assert again["student"] == metrics["student"]
        torch.testing.assert_close(logits(_loaded(tiny_folder, kind)), logits(alone), rtol=0, atol=1e-6)


def _loaded(folder, kind):
    return PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32), folder / kind
    )


@pytest.fixture
def subspace(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    monkeypatch.delitem(sys.modules, "subspaces", raising=False)
    import subspaces

    return subspaces.Subspace


@pytest.fixture
def corda(subspace, tiny_folder, tmp_path, monkeypatch):
    """What CorDA starts its adapter from, and its files."""
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")

    def make(folder="out", lora_r=4, **options):
        model_args = SimpleNamespace(
            load_in_4bit=False, load_in_8bit=False, lora_target_modules=["q_proj"], lora_r=lora_r, lora_alpha=8, lora_dropout=0.0
        )  # fmt: skip
        texts = dict(num_texts=4, num_tokens=32, start=None, chat=None, texts=None, weight=0.0) | options
        training_args = SimpleNamespace(
            teacher="none", world_size=1, model_init_kwargs={"dtype": torch.float32}, trust_remote_code=False, device="cpu",
            output_dir=str(tmp_path / folder), **{f"rehearsal_{name}": value for name, value in texts.items()},
        )  # fmt: skip
        model, *_ = subspace(subspace="corda").make(str(tiny_folder / "model"), tokenizer, training_args, model_args)
        return adapter_weights(SimpleNamespace(model=model)), sorted((tmp_path / folder).iterdir())

    return make


def same(one, other):
    return all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_corda_takes_up_its_file_only_for_the_same_texts_and_rank(corda):
    first, files = corda()
    assert same(corda()[0], first) and corda()[1] == files and len(files) == 1
    for number, change in enumerate((dict(num_texts=6), dict(chat=True), dict(lora_r=2)), start=2):
        found, files = corda(**change)
        assert same(found, corda(f"fresh {number}", **change)[0]) and len(files) == number
        assert change == dict(lora_r=2) or not same(found, first)


def test_corda_does_not_read_what_a_killed_run_left(corda, tmp_path):
    first, (file,) = corda()
    file.unlink()
    file.with_suffix(".part").write_bytes(b"half")
    found, files = corda()
    assert same(found, first) and files == [file]


def test_corda_reads_given_texts(corda, tmp_path):
    first, _ = corda(chat=False)
    (texts,) = (tmp_path / "cache" / "texts").glob("*.safetensors")
    given, _ = corda("given", texts=str(texts), num_texts=9)
    assert same(given, first) and len(list((tmp_path / "cache" / "texts").iterdir())) == 1


def test_the_recipe_does_not_call_texts_ignored_that_corda_reads(subspace, tmp_path):
    options = [
        "--model_name_or_path",
        "m",
        "--dataset_name",
        "d",
        "--output_dir",
        str(tmp_path),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
    ]
    of_texts = ["--rehearsal_num_texts", "8", "--rehearsal_chat", "true"]
    _, training_args, *_ = parse([*options, *of_texts], subspace)  # a warning would be an error
    assert training_args.rehearsal_num_texts == 8
    with pytest.warns(UserWarning, match="Ignored with .*: `rehearsal_fraction=0.5`"):
        parse([*options, *of_texts, "--rehearsal_fraction", "0.5"], subspace)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(subspace="pissa"), "`subspace` must be one of 'osf', 'corda', 'oft', got 'pissa'"),
        (dict(effective_rank=1.0), r"`effective_rank` must be inside \(0, 1\), got 1.0.*try 0.9"),
        (dict(oft_block_size=1), "`oft_block_size` must be at least 2, got 1. Try 32"),
    ],
)
def test_options_out_of_their_range_are_refused(subspace, options, match):
    with pytest.raises(ValueError, match=match):
        subspace(**options)


@pytest.mark.parametrize(
    ("kind", "model_options", "training_options", "match"),
    [
        (
            "osf",
            dict(load_in_4bit=True),
            {},
            "'osf'` decomposes the base's weights, which are quantized.*`--subspace oft`",
        ),
        ("corda", dict(load_in_8bit=True), {}, "'corda'` decomposes the base's weights"),
        (
            "corda",
            {},
            dict(teacher="ema"),
            "`teacher='ema'` does not go with CorDA.*`--teacher none`, with rehearsal or",
        ),
        (
            "corda",
            {},
            dict(rehearsal_texts="t.safetensors", rehearsal_weight=4.0),
            "`rehearsal_texts='t.safetensors'` are of the base, which CorDA changes",
        ),
        ("corda", {}, dict(world_size=2), "CorDA is prepared in one process, this launch has 2"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_is_loaded(subspace, kind, model_options, training_options, match):
    model_args = SimpleNamespace(
        **(dict(load_in_4bit=False, load_in_8bit=False, lora_target_modules=None) | model_options)
    )
    training_args = SimpleNamespace(**(dict(teacher="none", world_size=1, rehearsal_texts=None) | training_options))
    with pytest.raises(ValueError, match=match):
        subspace(subspace=kind).make("no/model", None, training_args, model_args)
