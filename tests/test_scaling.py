"""The dial: an adapter scaled and mixed is what dense weights compute, its curve is measured, and what is written is that point."""

import copy
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import config, lora, qwen2_tokenizer, rows, tiny_model
from datasets import Dataset
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from test_cli import trl_ema
from torch.nn import functional as F
from transformers import AutoTokenizer, BitsAndBytesConfig
from trl import ModelConfig

from trl_ema import EMARegularizedSFTTrainer
from trl_ema.adapters.fitness import not_plain_by, unscalable_by
from trl_ema.adapters.names import tuner_layers
from trl_ema.comparison.pictures import draw_scales
from trl_ema.data import as_chat
from trl_ema.evaluation import scaling
from trl_ema.evaluation.drift import drift_of_rows, general_rows, passes_of_base, tokenized_batches
from trl_ema.evaluation.models import load_base
from trl_ema.evaluation.scaling import Dial, check_run, check_scales, curve_of, gains
from trl_ema.files import read_json, write_json, write_jsonl
from trl_ema.inputs import load_data
from trl_ema.script import TrainingScriptArguments, describe_run, options_of_run, parse
from trl_ema.tune_scale import ScaleArguments


LAYERS = r".*\.(q_proj|down_proj)"
KINDS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 6},
        "alpha_pattern": {"down_proj": 3, "layers.0.self_attn.q_proj": 5},
    },
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "biases": {"lora_bias": True},
}


def write_run(folder, base, anchor=0.0, **changes):
    """A student with random factors in `folder`, and another one as its teacher below, as the trainer writes them."""
    adapter = lora(init_lora_weights=False, **({"target_modules": LAYERS} | changes))
    for where, share, seed in ((folder, 1, 1), (folder / "teacher", 1 - anchor, 2)):
        torch.manual_seed(seed)
        its = copy.deepcopy(adapter)
        its.lora_alpha *= share
        its.alpha_pattern = {name: alpha * share for name, alpha in its.alpha_pattern.items()}
        model = get_peft_model(load_base(str(base), dtype=torch.float32)[0], its)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.1)
        model.save_pretrained(where)
    return folder


def dense(base, run, mixture, scale):
    """The base in float64 with scale · ((1 − m)·ΔW_student + m·ΔW_teacher) added to its weights."""
    model, _ = load_base(str(base), dtype=torch.float64)
    for folder, share in ((run, 1 - mixture), (run / "teacher", mixture)):
        found, tensors = PeftConfig.from_pretrained(str(folder)), load_file(folder / "adapter_model.safetensors")

        def pattern(values, name, default):
            return next((value for key, value in values.items() if name.endswith(f".{key}")), default)

        for key, a in tensors.items():
            if "lora_A" not in key and "lora_embedding_A" not in key:
                continue
            name = key.removeprefix("base_model.model.").partition(".lora_")[0]
            b = tensors[key.replace("_A", "_B")].double()
            rank, alpha = (
                pattern(*x)
                for x in ((found.rank_pattern, name, found.r), (found.alpha_pattern, name, found.lora_alpha))
            )
            factor = share * scale * alpha / (math.sqrt(rank) if found.use_rslora else rank)
            update = b @ a.double() * factor
            layer = model.get_submodule(name)
            layer.weight.data += update.T if "embedding" in key else update
            bias = tensors.get(key.replace("lora_A.weight", "lora_B.bias"))
            if "embedding" not in key and bias is not None:
                layer.bias = torch.nn.Parameter((0 if layer.bias is None else layer.bias.data) + bias.double() * factor)
    return model.eval()


@pytest.fixture(scope="module")
def base(tiny_folder):
    return tiny_folder / "model"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), base, anchor=0.25)


def batches(seed, n=6):
    return tokenized_batches(rows(n, seed=seed), qwen2_tokenizer(), batch_size=4)


def make_dial(base, run, folder, dtype=torch.float64, general=None, **changes):
    model, tokenizer = load_base(str(base), dtype=dtype)
    general = general or {"general": batches(1), "yours": batches(2, 3)}
    return Dial(model, str(run), tokenizer, batches(0), general, str(folder), **({"model_id": "m"} | changes))


@torch.no_grad()
def loss_and_drift(model, before, batches):
    """Over the labelled tokens together, from all logits."""
    loss = drift = tokens = 0
    for batch in batches:
        labels, inputs = batch["labels"][:, 1:], {name: x for name, x in batch.items() if name != "labels"}
        now, then = (m(**inputs).logits[:, :-1][labels != -100].log_softmax(-1) for m in (model, before))
        labels = labels[labels != -100]
        loss += F.nll_loss(now, labels, reduction="sum").item()
        drift += F.kl_div(now, then, reduction="sum", log_target=True).item()
        tokens += len(labels)
    return loss / tokens, drift / tokens


# What a point is


@pytest.mark.parametrize("kind", KINDS)
def test_a_point_and_the_adapter_written_for_it_compute_as_dense_weights(base, tmp_path, kind):
    run = write_run(tmp_path / "run", base, anchor=0.25, **KINDS[kind])
    ids = batches(0)[0]["input_ids"]
    dial = make_dial(base, run, tmp_path)
    scalings = [dict(layer.scaling) for layer in tuner_layers(dial.model)]
    for number, (mixture, scale) in enumerate([(0.0, 1.0), (0.0, 0.3), (1.0, 0.7), (0.3, 0.8), (0.6, 1.5)]):
        expected = dense(base, run, mixture, scale)(ids).logits
        with dial.at(mixture, scale):
            torch.testing.assert_close(dial.model(ids).logits, expected, rtol=0, atol=1e-11)
        folder = tmp_path / f"written_{number}"
        folder.mkdir()
        point = {"mixture": mixture, "scale": scale, "drift": 0.0}
        apart = dial.write(point, str(folder), qwen2_tokenizer())
        alone = mixture in (0, 1)
        loaded = PeftModel.from_pretrained(load_base(str(base), dtype=torch.float64)[0], folder).eval()
        # A mixture is rounded to float32 once more.
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-11 if alone else 1e-5)
        assert abs(apart) < (1e-13 if alone else 1e-9)
        assert loaded.peft_config["default"].r == (4 if alone else 8)
    assert scalings == [dict(layer.scaling) for layer in tuner_layers(dial.model)]


def test_a_mixture_of_adapters_with_other_alphas_in_single_layers_is_exact(base, tmp_path):
    run = write_run(tmp_path / "run", base, **KINDS["patterns"])
    path = run / "teacher" / "adapter_config.json"
    write_json(
        path, read_json(path) | {"lora_alpha": 7, "alpha_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 9}}
    )
    dial, ids = make_dial(base, run, tmp_path), batches(0)[0]["input_ids"]
    expected = dense(base, run, 0.4, 0.9)(ids).logits
    with dial.at(0.4, 0.9):
        torch.testing.assert_close(dial.model(ids).logits, expected, rtol=0, atol=1e-11)
    assert dial.write({"mixture": 0.4, "scale": 0.9, "drift": 0.0}, str(tmp_path), qwen2_tokenizer()) < 1e-9
    loaded = PeftModel.from_pretrained(load_base(str(base), dtype=torch.float64)[0], tmp_path).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=0, atol=1e-5)


def test_loss_and_drift_of_a_point_are_those_of_dense_weights(base, run, tmp_path):
    dial = make_dial(base, run, tmp_path)
    before = load_base(str(base), dtype=torch.float64)[0]
    for mixture, scale in [(0.0, 0.0), (0.0, 0.5), (1.0, 1.0), (0.5, 0.75)]:
        point, model = dial.measure(mixture, scale), dense(base, run, mixture, scale)
        assert point["loss"] == pytest.approx(loss_and_drift(model, before, dial.held_out)[0], rel=1e-10)
        for name, its in dial.general.items():
            assert point["drift_on"][name] == pytest.approx(loss_and_drift(model, before, its)[1], abs=1e-12)
        assert point["drift"] == max(point["drift_on"].values())
    assert dial.points[0]["drift"] == 0 < dial.points[1]["drift"]


def test_passes_of_the_base_can_be_kept_and_a_divergence_left_out():
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False))
    its = [{name: x.clamp(max=63) for name, x in batch.items()} for batch in batches(0)]
    whole = drift_of_rows(model, its)
    kept = passes_of_base(model, its)
    assert torch.equal(drift_of_rows(model, its, passes_before=kept), whole)
    one = drift_of_rows(model, its, directions=("reverse",), passes_before=kept)
    assert torch.equal(one[:, [0, 2, 3]], whole[:, [0, 2, 3]]) and one[:, 1].isnan().all()

    def none():
        pytest.fail("the base made a pass")

    alone = drift_of_rows(model, its, directions=(), reference=none)
    torch.testing.assert_close(alone[:, [0, 3]], whole[:, [0, 3]])
    assert alone[:, 1:3].isnan().all()
    with pytest.raises(ValueError, match="shorter"):
        drift_of_rows(model, its, passes_before=kept[:-1])


def test_in_4_bits_the_written_mixture_computes_what_was_measured(base, run, tmp_path):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model, tokenizer = load_base(str(base), dtype=torch.float32, quantization_config=quantization)
    dial = Dial(model, str(run), tokenizer, batches(0), {"general": batches(1)}, str(tmp_path), "m")
    point = dial.measure(0.5, 0.8)
    assert point["drift"] > 1e-3 and dial.write(point, str(tmp_path), tokenizer) < 1e-6 * point["drift"] + 1e-7
    assert read_json(tmp_path / "scale.json")["suggested"]["drift"] == point["drift"]


# The curve


class Parabola(Dial):
    """Loss and drift by formula: nothing is loaded."""

    def __init__(self, path, best=1.0, rate=0.2):
        self.figures, self.path, self.best, self.rate = {"points": []}, path, best, rate

    def _loss_and_drift(self, mixture, scale):
        strength = scale * (1 - mixture / 4)
        drift = self.rate * strength**2 * (1 + strength / 3)
        return 2 + (strength - self.best) ** 2, {"general": drift, "yours": drift / 2}


@pytest.mark.parametrize("max_drift", [0.002, 0.03, 0.05, 0.2])
def test_the_suggested_point_uses_the_budget_up_and_keeps_it(tmp_path, max_drift):
    dial = Parabola(tmp_path / "scale.json")
    dial.trace([0.0, 0.5, 1.0], [0.25, 0.5, 1.0], max_drift)
    point = dial.suggested(max_drift)
    assert 0.97 * max_drift <= point["drift"] <= max_drift
    assert point["loss"] == min(p["loss"] for p in dial.points if p["drift"] <= max_drift)
    grid = {(0.0, 0.0), *((m, s) for m in (0.0, 0.5, 1.0) for s in (0.25, 0.5, 1.0))}
    found = {(p["mixture"], p["scale"]) for p in dial.points}
    assert grid < found and len(found) <= len(grid) + 3 * 2
    assert read_json(dial.path)["points"] == dial.points and dial.figures["max_drift"] == max_drift


def test_a_budget_that_the_lowest_loss_does_not_need_is_not_used_up(tmp_path):
    dial = Parabola(tmp_path / "scale.json", best=0.25)
    dial.trace([0.0], [0.25, 0.5, 1.0, 1.25], 0.2)
    assert dial.suggested(0.2)["scale"] == 0.25 and len(dial.points) == 5


def test_where_nothing_gains_the_base_is_best_and_nothing_is_suggested(tmp_path):
    dial = Parabola(tmp_path / "scale.json", best=-1.0)
    dial.trace([0.0], [0.5, 1.0], 0.05)
    assert dial.suggested(0.05) is None and all(math.isnan(gain) for gain in gains(dial.points))


def test_gain_is_a_share_of_the_largest_fall_of_the_loss(tmp_path):
    dial = Parabola(tmp_path / "scale.json")
    dial.trace([0.0], [0.5, 1.0])
    assert [point["gain"] for point in dial.points] == pytest.approx([0, 0.75, 1])


def test_a_measurement_that_broke_off_goes_on_where_it_did(base, run, tmp_path, monkeypatch):
    whole = make_dial(base, run, tmp_path / "whole", torch.float32)
    whole.trace([0.0, 1.0], [0.5, 1.0])
    measured, real = [], Dial._loss_and_drift

    def broken(self, *where):
        measured.append(where)
        if len(measured) == 4:
            raise KeyboardInterrupt
        return real(self, *where)

    monkeypatch.setattr(Dial, "_loss_and_drift", broken)
    with pytest.raises(KeyboardInterrupt):
        make_dial(base, run, tmp_path / "cut", torch.float32).trace([0.0, 1.0], [0.5, 1.0])
    again = make_dial(base, run, tmp_path / "cut", torch.float32)
    again.trace([0.0, 1.0], [0.5, 1.0])
    assert measured == [(0.0, 0.0), (0.0, 0.5), (0.0, 1.0), (1.0, 0.5), (1.0, 0.5), (1.0, 1.0)]
    assert again.points == whole.points
    other = make_dial(base, run, tmp_path / "cut", torch.float32, model_id="another")
    assert other.points == []


def test_an_adapter_that_computes_something_else_is_not_written(base, run, tmp_path, monkeypatch):
    dial = make_dial(base, run, tmp_path, torch.float32)
    point = dial.measure(0.0, 0.5)
    monkeypatch.setattr(scaling, "scaled_adapter", lambda adapter, scale: adapter)
    with pytest.raises(RuntimeError, match="nats from the one that was measured"):
        dial.write(point, str(tmp_path), qwen2_tokenizer())
    assert {path.name for path in tmp_path.iterdir()} == {"scale.json"}
    assert "scaled" not in dial.model.peft_config


@pytest.mark.parametrize("mixture", [0.0, 0.5])
def test_an_adapter_that_is_off_by_a_tenth_is_not_written(base, run, tmp_path, monkeypatch, mixture):
    dial = make_dial(base, run, tmp_path, torch.float32)
    point = dial.measure(mixture, 0.25)
    right = dial.adapter
    monkeypatch.setattr(dial, "adapter", lambda mixture, scale: right(mixture, 1.1 * scale))
    with pytest.raises(RuntimeError, match="its updates are off by up to 0.0909 of their norm"):
        dial.write(point, str(tmp_path), qwen2_tokenizer())
    assert (
        dial._apart(lambda: dial.at(mixture, 0.275), mixture, 0.25) > point["drift"] / 1000
    )  # the outputs tell it too


@pytest.mark.parametrize("mixture", [0.0, 0.3])
def test_in_half_precision_the_written_adapter_is_as_near_as_rounding(base, run, tmp_path, mixture):
    dial = make_dial(base, run, tmp_path, torch.bfloat16)
    assert dial.write(dial.measure(mixture, 0.5), str(tmp_path), qwen2_tokenizer()) < 0.1


def test_the_picture_shows_budget_and_suggestion_where_there_are_any(tmp_path):
    dial = Parabola(tmp_path / "scale.json")
    dial.trace([0.0, 1.0], [0.5, 1.0], 0.05)
    curves = {name: curve_of(dial.points, mixture) for name, mixture in (("student", 0.0), ("teacher", 1.0))}
    whole, bare = (draw_scales(curves, *x).svg for x in ((dial.suggested(0.05), 0.05), (None, None)))
    for text in ("student", "teacher", "held-out loss, nats per token"):
        assert text in whole and text in bare
    for text in ("suggested", "budget"):
        assert text in whole and text not in bare


# The command


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """A run of 12 steps with an EMA teacher, as `trl-ema train` leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    args = TrainingScriptArguments(dataset_name=str(tiny_folder / "data.jsonl"), eval_samples=8, eval_fraction=0.2)
    model_args = ModelConfig(model_name_or_path=str(tiny_folder / "model"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    train, _ = load_data(args, tokenizer)
    trainer = EMARegularizedSFTTrainer(
        model_args.model_name_or_path,
        args=config(folder, max_steps=12, teacher="ema", max_length=48),
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=lora(),
    )
    trainer.train()
    trainer.save_model()
    write_json(folder / "metrics.json", {"provenance": describe_run(trainer, args, model_args)})
    return folder


def tune(*arguments, **options):
    return trl_ema("tune-scale", *arguments, **options)


def test_the_command_draws_the_curves_and_writes_the_adapter_at_the_budget(trained, tmp_path):
    curves = tune(trained, "--output_dir", tmp_path / "out", "--scales", 0.5, 1)
    assert "No point is suggested" in curves.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"scale.json", "scale.png"}
    first = read_json(tmp_path / "out" / "scale.json")
    assert len(first["points"]) == 7 and first["suggested"] is None
    budget = 0.5 * max(point["drift"] for point in first["points"])
    done = tune(trained, "--output_dir", tmp_path / "out", "--scales", 0.5, 1, "--max_drift", budget)
    figures = read_json(tmp_path / "out" / "scale.json")
    kept = [point for point in figures["points"] if point in first["points"]]
    assert len(kept) >= 7 - 1  # the largest gain may be another now
    point = figures["suggested"]
    assert 0 < point["drift"] <= budget == figures["max_drift"] and point["kl_reloaded"] < 1e-6
    assert f"drift of {point['drift']:.4g} of at most {budget:g}" in done.stdout and "  <\n" in done.stdout
    for name in ("student", "teacher", "0.5 student + 0.5 teacher"):
        assert f"\n{name}\n" in done.stdout
    assert (tmp_path / "out" / "scale.png").read_bytes()[:4] == b"\x89PNG"
    base, _ = load_base(read_json(trained / "adapter_config.json")["base_model_name_or_path"], dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    _, settings, _ = options_of_run(str(trained))
    general = tokenized_batches(general_chats(), AutoTokenizer.from_pretrained(trained), 48, settings=settings)
    found = drift_of_rows(loaded, general).sum(0)
    assert found[1] / found[3] == pytest.approx(point["drift"], rel=1e-3)
    again = tune(trained, "--output_dir", tmp_path / "out", check=False)
    assert again.returncode == 1 and "is there already. Delete it" in again.stderr
    for file in (tmp_path / "out").glob("adapter_*"):  # as it says
        file.unlink()
    tune(trained, "--output_dir", tmp_path / "out", "--max_drift", str(budget))
    assert (tmp_path / "out" / "adapter_config.json").is_file()


def general_chats():
    return as_chat(Dataset.from_list(general_rows()), qwen2_tokenizer())


def test_the_rows_are_those_that_the_run_held_out_or_given_ones(trained, tiny_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(Dial, "trace", lambda self, *_: asked.append(self))
    monkeypatch.setattr("trl_ema.tune_scale.draw_scales", lambda *_: SimpleNamespace(png=b""))
    monkeypatch.setattr("trl_ema.tune_scale._print_table", lambda *_: None)
    write_jsonl(tmp_path / "own.jsonl", list(rows(3, seed=5)))
    own = ["--dataset_name", tmp_path / "own.jsonl", "--drift_dataset", tmp_path / "own.jsonl", "--dataset_samples", 2]
    for name, more in (("run", []), ("own", own)):
        tune(trained, "--output_dir", tmp_path / name, *more)
    args, settings, _ = options_of_run(str(trained))
    tokenizer = AutoTokenizer.from_pretrained(trained)
    _, held_out = load_data(args, tokenizer)
    expected = tokenized_batches(held_out, tokenizer, settings.max_length, settings=settings)
    for batch, its in zip(asked[0].held_out, expected, strict=True):
        assert torch.equal(batch["input_ids"], its["input_ids"]) and torch.equal(batch["labels"], its["labels"])
    assert list(asked[0].general) == ["general"] and list(asked[1].general) == ["general", "yours"]
    assert len(asked[1].held_out[0]["labels"]) == len(asked[1].general["yours"][0]["labels"]) == 2


def test_the_options_of_a_run_are_told_by_its_metrics_or_its_config(trained, tmp_path, tiny_folder):
    args, settings, model_args = options_of_run(str(trained))
    assert args == TrainingScriptArguments(
        dataset_name=str(tiny_folder / "data.jsonl"), eval_samples=8, eval_fraction=0.2
    )
    assert model_args == ModelConfig(model_name_or_path=str(tiny_folder / "model"))
    assert settings.max_length == 48 and settings.completion_only_loss is None and settings.dataset_kwargs is None
    options = {"dataset_name": "rows.jsonl", "eval_samples": 5, "use_cpu": True, "output_dir": "x", "bf16": False}
    options |= {"model_name_or_path": "some/model", "load_in_4bit": True, "max_length": 77}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(options))
    assert [vars(x) for x in options_of_run(str(tmp_path))[::2]] == [
        vars(x) for x in parse(["--config", str(tmp_path / "config.yaml")])[::2]
    ]
    assert options_of_run(str(tmp_path))[1].max_length == 77
    assert options_of_run(str(tmp_path / "none")) is None


# What cannot be


@pytest.mark.parametrize(
    ("adapter", "cause"),
    [
        (dict(use_dora=True), "`use_dora=True`"),
        (dict(modules_to_save=["lm_head"]), r"`modules_to_save=\['lm_head'\]`"),
        (dict(trainable_token_indices=[3]), r"`trainable_token_indices=\[3\]`"),
        (dict(init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
    ],
)
def test_an_adapter_that_is_no_factor_of_its_update_is_refused(tmp_path, adapter, cause):
    lora(**adapter).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"cannot be scaled: {cause} is no factor of its update"):
        check_run(str(tmp_path))


def test_another_kind_of_adapter_is_refused(tmp_path):
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot be scaled: `peft_type=IA3` is no factor"):
        check_run(str(tmp_path))


def test_an_option_that_a_later_peft_may_have_is_no_plain_lora():
    @dataclass
    class Later(LoraConfig):
        another_kind: bool = False

    assert unscalable_by(Later()) is None and not_plain_by(Later(use_rslora=True)) is None
    assert unscalable_by(Later(another_kind=True)) == not_plain_by(Later(another_kind=True)) == "`another_kind=True`"
    # What scales with the update is no hindrance to scaling, and one to readers of plain LoRA.
    several = Later(alpha_pattern={"q_proj": 3})
    assert unscalable_by(several) is None and not_plain_by(several) == "`alpha_pattern={'q_proj': 3}`"


def test_a_teacher_of_another_student_is_refused(tmp_path):
    lora().save_pretrained(tmp_path)
    lora(r=8).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="is no teacher of this student: `r` is 8 there and 4 in the student's"):
        check_run(str(tmp_path))


def test_layers_of_another_kind_of_lora_are_refused(base, tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", base)
    monkeypatch.setattr("trl_ema.evaluation.scaling.variant_of", lambda model: "ALoraLinearVariant")
    with pytest.raises(ValueError, match="its layers are of the kind ALoraLinearVariant, not plain LoRA"):
        make_dial(base, run, tmp_path)


def test_scales_and_mixtures_have_their_ranges(tmp_path):
    lora().save_pretrained(tmp_path)
    assert check_scales(str(tmp_path), [0, 2], None) == (0.0,)
    with pytest.raises(ValueError, match=r"`scales` must be in \[0, 2\], got 2.5"):
        check_scales(str(tmp_path), [1, 2.5], None)
    with pytest.raises(ValueError, match=r"`scales` must be in \[0, 2\], got nan"):
        check_scales(str(tmp_path), [math.nan], None)
    with pytest.raises(ValueError, match="`mixtures` is for a student and its teacher, and .*teacher holds none"):
        check_scales(str(tmp_path), [1], [0.5])
    lora().save_pretrained(tmp_path / "teacher")
    assert check_scales(str(tmp_path), [1], None) == (0.0, 0.5, 1.0)
    assert check_scales(str(tmp_path), [1], [0.75, 0.25]) == (0.0, 0.25, 0.75, 1.0)
    assert check_scales(str(tmp_path), [1], []) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"`mixtures` must be in \(0, 1\), got 1"):
        check_scales(str(tmp_path), [1], [1.0])
    experts = dict(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    lora(**experts).save_pretrained(tmp_path)
    assert check_scales(str(tmp_path), [1], None) == (0.0, 1.0)
    with pytest.raises(ValueError, match="`target_parameters` cannot be written as one adapter"):
        check_scales(str(tmp_path), [1], [0.5])


@pytest.mark.parametrize("value", [0.0, -0.1, math.nan, math.inf])
def test_a_budget_is_above_zero_and_finite(value):
    with pytest.raises(ValueError, match="`max_drift` must be above 0 and finite, got"):
        ScaleArguments(max_drift=value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' holds no adapter (adapter_config.json is missing)"),
        (["run", "--scales", "3"], "`scales` must be in [0, 2], got 3"),
        (["run", "--max_drift", "0"], "`max_drift` must be above 0 and finite, got 0"),
        (["run", "--output_dir", "run"], "The folder for the scaled adapter, run, is there already"),
        (["run", "--output_dir", "full"], "The folder for the scaled adapter, full, is there already"),
        (["run"], "run does not tell what it held out"),
        (["run", "--base", "some/base"], "not on 'some/base'"),
    ],
)
def test_the_command_refuses_bad_input_in_a_line(base, tmp_path, arguments, message):
    lora(base_model_name_or_path=str(base)).save_pretrained(tmp_path / "run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    done = tune(*arguments, check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset_name": "gone.jsonl"}, "of 'gone.jsonl', cannot be found again: There is no data file"),
        ({"model_name_or_path": "other"}, "went on from the adapter 'other'"),
    ],
)
def test_a_run_whose_data_or_start_is_another_is_refused(base, tmp_path, changes, message):
    for name in ("run", "other"):
        lora(base_model_name_or_path=str(base)).save_pretrained(tmp_path / name)
    options = {"dataset_name": "rows.jsonl", "model_name_or_path": str(base), "use_cpu": True, "bf16": False}
    Path(tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(options | {"output_dir": "run"} | changes))
    done = tune("run", check=False, cwd=tmp_path)
    assert done.returncode == 1 and message in done.stderr
