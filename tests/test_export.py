"""A run's adapter exported: each form computes as dense weights do, is whole or not there, and says what loads it."""

import json
import re
import shlex
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import lora, qwen2_tokenizer, rows, tiny_model
from peft import PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_cli import trl_ema
from test_scaling import KINDS, dense, write_run
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl import TrlParser

from trl_ema import gguf_files
from trl_ema.adapters.blending import plain_adapter
from trl_ema.evaluation.drift import tokenized_batches
from trl_ema.evaluation.merging import merged_and_compared
from trl_ema.evaluation.models import load_base, with_adapter
from trl_ema.evaluation.scaling import adapter_at, read_adapter, save_adapter
from trl_ema.export import ExportArguments, _Export, _generation_config
from trl_ema.files import new_folder, read_json


DOCS = Path(__file__).parents[1] / "docs"
ALONG = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "export.json"}


@pytest.fixture(scope="module")
def base(tiny_folder):
    return tiny_folder / "model"


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"), base, anchor=0.25)
    qwen2_tokenizer().save_pretrained(folder)
    return folder


def batches(n=5):
    return tokenized_batches(rows(n), qwen2_tokenizer(), batch_size=3)


def export(*arguments, **options):
    return trl_ema("export", *arguments, **options)


def ids():
    return batches()[0]["input_ids"]


# Adapters


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_made_plain_computes_as_dense_weights(base, tmp_path, kind):
    run = write_run(tmp_path / "run", base, anchor=0.25, **KINDS[kind])
    for mixture, scale in [(0.0, 1.0), (0.0, 0.3), (1.0, 0.7), (0.3, 0.85)]:
        folder = tmp_path / f"{mixture} {scale}"
        folder.mkdir()
        save_adapter(plain_adapter(adapter_at(str(run), mixture, scale)), str(folder))
        config = read_json(folder / "adapter_config.json")
        assert isinstance(config["lora_alpha"], int) and not config["use_rslora"]
        assert not config["alpha_pattern"] and not config["rank_pattern"]
        model, _ = with_adapter(load_base(str(base), dtype=torch.float64)[0], str(folder))
        expected = dense(base, run, mixture, scale)(ids()).logits
        torch.testing.assert_close(model(ids()).logits, expected, rtol=0, atol=1e-5)


def test_what_is_plain_already_stays_as_it_is(run):
    adapter = adapter_at(str(run), 0.0, 1.0)
    nothing, zeros = plain_adapter(adapter_at(str(run), 0.0, 0.0))  # llama.cpp takes an alpha of 0 for none
    assert nothing.lora_alpha == nothing.r > 0 and not any(zeros[key].any() for key in zeros if "lora_B" in key)
    config, tensors = plain_adapter(adapter)
    assert config.lora_alpha == 8 and tensors is adapter[1]
    experts = lora(target_modules=[], target_parameters=["mlp.experts.down_proj"], lora_alpha=0.5)
    assert plain_adapter((experts, {})) == (experts, {})


def test_an_exported_adapter_is_whole_and_says_what_serves_it(run, base, tmp_path):
    done = export(run, "--to", "adapter", "--adapter", "mix=0.5", "--scale", 0.85, "--output_dir", tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *ALONG, "adapter_config.json", "adapter_model.safetensors",
    }  # fmt: skip
    model = PeftModel.from_pretrained(load_base(str(base), dtype=torch.float32)[0], tmp_path / "out").eval()
    torch.testing.assert_close(
        model(ids()).logits.double(), dense(base, run, 0.5, 0.85)(ids()).logits, rtol=0, atol=1e-3
    )
    name = f"{run.name}-mix0.5-x0.85"
    assert (
        f"vllm serve {base} --enable-lora --max-lora-rank 8 --lora-modules {name}={tmp_path / 'out'} "
        f"--chat-template {tmp_path / 'out' / 'chat_template.jinja'}"
    ) in done.stdout
    assert "Ollama:     takes whole models" in done.stdout and "KL(" not in done.stdout
    told = read_json(tmp_path / "out" / "export.json")
    assert (told["adapter"], told["scale"], told["to"], told["figures"]) == ("mix=0.5", 0.85, "adapter", None)


def test_the_lines_for_vllm_name_the_revision_and_the_code_that_the_run_had(run):
    export = _Export.__new__(_Export)
    export.args, export.base = ExportArguments(to="adapter"), "org/base"
    for revision, trusts, expected in [
        ("main", False, ""),
        ("v1.1", False, " --revision v1.1"),
        ("v1.1", True, " --revision v1.1 --trust-remote-code"),
    ]:
        export.revision, export.settings = revision, SimpleNamespace(trust_remote_code=trusts)
        line, _ = export._serving_adapter("own", str(run), "out")
        assert line.startswith(f"vLLM:       vllm serve org/base{expected} --enable-lora --max-lora-rank 8 --lora-mod")
    export.base = str(run)  # a folder has no revisions
    assert "--revision" not in export._serving_adapter("own", str(run), "out")[0]
    export.args, export.run = ExportArguments(), "run"
    assert export._serving("", "out")[0].endswith("--served-model-name run-student --trust-remote-code")


def test_by_default_it_lies_below_the_run_and_keeps_the_weights(base, tmp_path):
    run = write_run(tmp_path / "run", base)
    export(run, "--to", "adapter", "--adapter", "teacher")
    folder = run / "exported" / "adapter-teacher"
    ours, theirs = (load_file(where / "adapter_model.safetensors") for where in (folder, run / "teacher"))
    assert ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)
    assert PeftConfig.from_pretrained(folder).lora_alpha == 8


def test_an_adapter_that_is_no_factor_of_its_update_is_copied_or_merged_but_not_scaled(base, tmp_path):
    run = write_run(tmp_path / "run", base, use_dora=True)
    done = export(run, "--to", "adapter", "--output_dir", tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (run / name).read_bytes()
    assert "take plain LoRA alone" in done.stdout
    export(run, "--dtype", "float32", "--output_dir", tmp_path / "merged")
    model = PeftModel.from_pretrained(load_base(str(base), dtype=torch.float32)[0], run).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids()).logits, model(ids()).logits, rtol=0, atol=1e-3)
    done = export(run, "--scale", 0.5, "--output_dir", tmp_path / "half", check=False)
    assert done.returncode == 1 and "cannot be scaled: `use_dora=True`" in done.stderr


# Merged models


def test_a_merged_model_computes_as_dense_weights_and_has_all_that_belongs_to_it(run, base, tiny_folder, tmp_path):
    out = tmp_path / "new" / "out"
    done = export(
        run, "--adapter", "mix=0.25", "--scale", 0.5, "--dtype", "float32", "--output_dir", out,
        "--dataset_name", tiny_folder / "data.jsonl", "--dataset_samples", 5,
    )  # fmt: skip
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float32 and not hasattr(merged, "peft_config")
    torch.testing.assert_close(
        merged(ids()).logits.double(), dense(base, run, 0.25, 0.5)(ids()).logits, rtol=0, atol=1e-3
    )
    assert {path.name for path in out.iterdir()} == {*ALONG, "config.json", "model.safetensors", "Modelfile"}
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == stat.S_IMODE(
        (out / "config.json").stat().st_mode
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template == qwen2_tokenizer().chat_template
    assert (out / "Modelfile").read_text() == f'FROM .\nPARAMETER stop "{tokenizer.eos_token}"\n'
    found = read_json(out / "export.json")["figures"]
    assert 0 <= found["kl_adapter_merged"] < 1e-6 and found["dtype"] == "float32"
    assert re.search(
        r"KL\(adapter ‖ merged\): \S+ nats per token on 5 rows \(.*data.jsonl\), at most 0.01", done.stdout
    )
    name = f"{run.name}-mix0.25-x0.5"
    assert f"vllm serve {out} --served-model-name {name}\n" in done.stdout
    assert f"ollama create {name} -f {out}/Modelfile && ollama run {name}\n" in done.stdout


def test_the_comparison_is_of_what_was_trained_with_what_is_merged(run, base, tmp_path):
    save_adapter(adapter_at(str(run), 0.0, 0.5), str(tmp_path))  # half of what it should be
    model, tokenizer = load_base(str(base), dtype=torch.float64)
    merged, found = merged_and_compared(model, str(tmp_path), tokenizer, batches(), str(run), 0.0, 1.0)
    kl = loss = tokens = 0
    with torch.no_grad():
        for batch in batches():
            labels, inputs = batch["labels"][:, 1:], {name: x for name, x in batch.items() if name != "labels"}
            now, then = (
                m(**inputs).logits[:, :-1][labels != -100].log_softmax(-1) for m in (merged, dense(base, run, 0.0, 1.0))
            )
            kl += F.kl_div(now, then, reduction="sum", log_target=True).item()
            loss += F.nll_loss(now, labels[labels != -100], reduction="sum").item()
            tokens += len(now)
    assert found == pytest.approx({"kl_adapter_merged": kl / tokens, "loss": loss / tokens}, rel=1e-4)
    assert kl / tokens > 1e-3


def test_a_merge_that_changes_a_head_tied_to_the_embeddings_is_seen(tmp_path):
    tokenizer = qwen2_tokenizer()
    tiny_model("qwen2", vocab_size=416, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    for name, modules in (("inside", ["q_proj"]), ("embeddings", ["embed_tokens"])):
        run = write_run(tmp_path / name, tmp_path / "base", target_modules=modules)
        model, _ = load_base(str(tmp_path / "base"), dtype=torch.float64)
        _, found = merged_and_compared(model, str(run), tokenizer, batches(), str(run))
        assert (found["kl_adapter_merged"] > 0.01) == (name == "embeddings")


def test_above_the_bound_nothing_is_kept(run, tmp_path):
    done = export(run, "--max_kl", 1e-9, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and not list(tmp_path.iterdir())
    assert re.search(
        r"KL\(adapter ‖ merged\) is \S+ nats per token on 48 rows \(general\), above `max_kl=1e-09`", done.stderr
    )
    assert "bfloat16 weights the model is not what was trained" in done.stderr


def test_biases_that_the_base_has_no_place_for_are_not_merged(base, tmp_path):
    run = write_run(tmp_path / "run", base, lora_bias=True, target_modules=["down_proj"])
    done = export(run, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "PEFT cannot merge the adapter" in done.stderr and not (tmp_path / "out").exists()
    done = export(run, "--to", "adapter", "--output_dir", tmp_path / "out")
    assert "take plain LoRA alone" in done.stdout and "vllm serve" not in done.stdout  # which would not read them


def test_after_4_bits_it_is_merged_into_16_and_compared_on_the_rows_of_the_run(base, tiny_folder, tmp_path):
    run = write_run(tmp_path / "run", base)
    options = {"dataset_name": str(tiny_folder / "data.jsonl"), "model_name_or_path": str(base), "load_in_4bit": True}
    options |= {"eval_samples": 3, "eval_fraction": 0.2, "output_dir": "x", "use_cpu": True, "bf16": False}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    done = export(run, "--output_dir", tmp_path / "out", "--max_kl", 100)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert "quantization_config" not in read_json(tmp_path / "out" / "config.json")
    assert (
        "on 51 rows (3 held out by the run, 48 general)" in done.stdout
        and "It was trained over 4-bit weights" in done.stdout
    )


def test_generation_ends_at_the_token_that_was_trained_with(base, run, tmp_path):
    another = tmp_path / "run"
    write_run(another, base)
    tokenizer = qwen2_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.save_pretrained(another)
    before = GenerationConfig.from_pretrained(base).eos_token_id
    for form in ("adapter", "merged"):
        bound = ["--max_kl", 100] if form == "merged" else []
        export(another, "--to", form, "--output_dir", tmp_path / form, *bound)
        found = GenerationConfig.from_pretrained(tmp_path / form).eos_token_id
        assert sorted(found) == sorted([tokenizer.eos_token_id, before])


@pytest.mark.parametrize("known", ["in the cache", "not there", "unknown", "a folder"])
def test_a_generation_config_that_is_out_of_reach_is_not_taken_for_none(tmp_path, monkeypatch, caplog, known):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model, commit = tmp_path / "models--org--base", 40 * "a"
    for folder in ("refs", f"snapshots/{commit}", f".no_exist/{commit}"):
        (model / folder).mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit / "config.json").write_text("{}")
    if known == "in the cache":
        GenerationConfig(do_sample=True, top_k=7).save_pretrained(model / "snapshots" / commit)
    if known == "not there":
        (model / ".no_exist" / commit / "generation_config.json").touch()
    base = str(model / "snapshots" / commit) if known == "a folder" else "org/base"
    found = _generation_config(base, "main", tiny_model("qwen2").config, qwen2_tokenizer())
    assert (found.top_k == 7) == (known == "in the cache")
    said = "Whether 'org/base' has a generation config could not be known (We couldn't connect"
    assert (said in caplog.text) == (known == "unknown") == ("could not be known" in caplog.text)


# GGUF


CONVERTER = """
import json, pathlib, sys
import conversion
if sys.argv[1:] == ["--help"]:
    sys.exit()
model, _, file, *rest = sys.argv[1:]
pathlib.Path(file).write_text(json.dumps([sorted(p.name for p in pathlib.Path(model).iterdir()), rest]))
"""


@pytest.fixture
def llama_cpp(tmp_path):
    """A folder with a converter that writes down what it is given."""
    folder = tmp_path / "llama cpp"
    folder.mkdir()
    (folder / gguf_files.CONVERT_MODEL).write_text(CONVERTER)
    (folder / "conversion.py").touch()
    return folder


def test_a_model_goes_through_the_converter_and_its_adapter_is_written_beside(run, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    out = tmp_path / "out"
    done = export(
        run, "--to", "gguf", "--outtype", "q8_0", "--max_kl", 100, "--llama_cpp", llama_cpp, "--output_dir", out
    )
    assert {path.name for path in out.iterdir()} == {*ALONG, "model.gguf", "adapter.gguf", "Modelfile"}
    given, rest = json.loads((out / "model.gguf").read_text())
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {*given}
    assert rest == ["--outtype", "q8_0"] and (out / "Modelfile").read_text().startswith("FROM ./model.gguf\n")
    assert f"llama-server -m {out}/model.gguf\n" in done.stdout and f"--lora {out}/adapter.gguf" in done.stdout
    assert read_json(out / "export.json")["figures"]["kl_adapter_merged"] >= 0


def test_without_a_converter_the_merged_model_stays_with_the_command(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    out = tmp_path / "an export"
    done = export(run, "--to", "gguf", "--max_kl", 100, "--output_dir", out)
    command = (
        "git clone --depth 1 https://github.com/ggml-org/llama.cpp && python llama.cpp/convert_hf_to_gguf.py "
        f"{shlex.quote(str(out / 'merged'))} --outfile {shlex.quote(str(out / 'model.gguf'))} --outtype auto\n"
    )
    assert command in done.stdout and not (out / "model.gguf").exists()
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in (out / "merged").iterdir()}


def test_a_converter_that_fails_is_quoted_and_nothing_is_kept(run, llama_cpp, tmp_path):
    script = "import sys\nsys.exit(sys.argv[1] != '--help' and 'No module named sentencepiece')\n"
    (llama_cpp / gguf_files.CONVERT_MODEL).write_text(script)
    done = export(
        run, "--to", "gguf", "--max_kl", 100, "--llama_cpp", llama_cpp, "--output_dir", tmp_path / "out", check=False
    )
    assert done.returncode == 1 and "converter failed (exit code 1):\nNo module named sentencepiece\n" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["llama cpp"]


def test_a_converter_that_does_not_start_is_told_before_a_model_is_loaded(run, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ema.export.load_base", lambda *_, **__: pytest.fail("loaded a model"))
    (llama_cpp / "conversion.py").write_text("raise ImportError('No module named gguf.vocab')\n")
    done = export(run, "--to", "gguf", "--llama_cpp", llama_cpp, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "ImportError: No module named gguf.vocab\nWhat it needs is in" in done.stderr
    assert [path.name for path in tmp_path.iterdir() if path.name != "llama cpp"] == []


def test_a_converter_is_found_in_a_folder_or_on_the_path(llama_cpp, tmp_path, monkeypatch):
    name = gguf_files.CONVERT_MODEL
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    assert gguf_files.find_converter(name) is None
    assert gguf_files.find_converter(name, str(llama_cpp))[1] == str(llama_cpp / name)
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp))
    assert gguf_files.find_converter(name)[1] == str(llama_cpp / name)
    with pytest.raises(
        FileNotFoundError, match="holds no convert_lora_to_gguf.py. Give the folder of llama.cpp's source"
    ):
        gguf_files.find_converter(gguf_files.CONVERT_ADAPTER)
    monkeypatch.delenv("LLAMA_CPP")
    (tmp_path / "bin").mkdir()
    script = tmp_path / "bin" / name
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert gguf_files.find_converter(name) == [str(script)]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_an_adapter_in_gguf_has_the_update_of_each_layer(model_type, tmp_path):
    import gguf

    base = tiny_model(model_type)
    torch.manual_seed(0)
    model = get_peft_model(base, lora(r=3, lora_alpha=7, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    adapter = read_adapter(str(tmp_path))
    assert gguf_files.not_written_here(adapter, model_type) is None
    gguf_files.write_adapter(adapter, base.config, str(tmp_path / "adapter.gguf"))
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    told = {name: field.contents() for name, field in reader.fields.items()}
    assert (told["general.architecture"], told["general.type"], told["adapter.type"]) == (model_type, "adapter", "lora")
    factors = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    assert len(factors) == 2 * 2 * len(names)
    for number, layer in enumerate(base.model.layers):
        for name, theirs in names.items():
            module = getattr(layer.self_attn if "attn" in theirs else layer.mlp, name)
            a, b = (factors[f"blk.{number}.{theirs}.weight.lora_{factor}"] for factor in "ab")
            expected = module.get_delta_weight("default").detach()
            if model_type == "llama" and name in (
                "q_proj",
                "k_proj",
            ):  # the rows that are rotated together are neighbours
                half, heads = base.config.head_dim // 2, len(expected) // base.config.head_dim
                order = [
                    2 * half * head + part * half + i for head in range(heads) for i in range(half) for part in (0, 1)
                ]
                expected = expected[order]
            torch.testing.assert_close(told["adapter.lora.alpha"] / len(a) * b @ a, expected)


@pytest.mark.parametrize(
    ("changes", "model_type", "cause"),
    [
        ({}, "gemma3", "a base of type 'gemma3' is not one of llama, mistral, qwen2, qwen3"),
        ({"target_modules": ["embed_tokens"]}, "qwen2", "embed_tokens.base_layer.weight', which is no factor"),
        ({"lora_bias": True, "target_modules": ["q_proj"]}, "qwen2", "lora_B.bias', which is no factor"),
    ],
)
def test_what_the_package_does_not_suffice_for_is_left_to_llama_cpp(tmp_path, changes, model_type, cause):
    get_peft_model(tiny_model("qwen2"), lora(**changes)).save_pretrained(tmp_path)
    assert cause in gguf_files.not_written_here(read_adapter(str(tmp_path)), model_type)


def test_other_adapters_go_through_the_converter_beside_or_a_line_says_why_not(base, llama_cpp, tmp_path):
    run = write_run(tmp_path / "run", base, target_modules=["embed_tokens", "q_proj"])
    arguments = [run, "--to", "gguf", "--max_kl", 100, "--llama_cpp", llama_cpp, "--output_dir"]
    done = export(*arguments, tmp_path / "none")
    assert (
        "No adapter.gguf: it has a tensor" in done.stdout
        and "That takes llama.cpp's convert_lora_to_gguf.py" in done.stdout
    )
    beside = llama_cpp / gguf_files.CONVERT_ADAPTER
    beside.write_text("import pathlib, sys\npathlib.Path(sys.argv[4]).write_text(repr(sys.argv[1:]))\n")
    export(*arguments, tmp_path / "one")
    assert re.match(r"\['--base', '.*merged', '--outfile', '.*adapter.gguf', '.*adapter'\]", (tmp_path / "one" / "adapter.gguf").read_text())  # fmt: skip
    beside.write_text("import sys\nsys.exit('it has a bias')\n")
    done = export(*arguments, tmp_path / "failed")
    assert "No adapter.gguf: llama.cpp's converter failed" in done.stdout and "it has a bias" in done.stdout
    assert (tmp_path / "failed" / "model.gguf").exists() and not (tmp_path / "failed" / "adapter.gguf").exists()


def test_a_layer_without_a_name_in_llama_cpp_is_named(tmp_path):
    config = tiny_model("llama").config
    adapter = lora(), {"base_model.model.model.layers.0.odd.lora_A.weight": torch.ones(4, 4)}
    with pytest.raises(ValueError, match="llama.cpp has no name for the layer 'model.layers.0.odd' of 'llama'"):
        gguf_files.write_adapter(adapter, config, str(tmp_path / "adapter.gguf"))


# What cannot be


def test_what_is_interrupted_leaves_nothing_and_a_killed_one_is_removed_by_the_next(run, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("trl_ema.export.merged_and_compared", interrupted)
        export(run, "--output_dir", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with new_folder(str(tmp_path / "out")) as scratch:
        left = Path(scratch)
    left.mkdir()
    (left / "half").write_text("a killed export")
    (tmp_path / "out").rmdir()
    with new_folder(f"{tmp_path / 'out'}/") as scratch:
        Path(scratch, "whole").write_text("")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/whole"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "'nowhere' holds no adapter (adapter_config.json is missing)"),
        (["run", "--scale", "2.5"], "`scale` must be in [0, 2], got 2.5"),
        (["run", "--scale", "-0.1"], "`scale` must be in [0, 2], got -0.1"),
        (["run", "--scale", "nan"], "`scale` must be in [0, 2], got nan"),
        (["run", "--adapter", "teacher"], "asks for a teacher, and run/teacher holds none"),
        (["run", "--adapter", "mix=0.5"], "asks for a teacher, and run/teacher holds none"),
        (["run", "--adapter", "mix"], "`mix=M` with the teacher's share M in (0, 1), such as `mix=0.5`; got 'mix'"),
        (["run", "--adapter", "mix=1"], "in (0, 1), such as `mix=0.5`; got 'mix=1'"),
        (["run", "--adapter", "half=0.5"], "such as `mix=0.5`; got 'half=0.5'"),
        (["run", "--max_kl", "0"], "`max_kl` must be above 0, got 0"),
        (["run", "--output_dir", "full"], "The folder for the export, full, is there already"),
        (["run", "--base", "some/base"], "not on 'some/base'"),
        (["run", "--to", "gguf", "--llama_cpp", "full"], "'full' holds no convert_hf_to_gguf.py"),
        (["run", "--to", "folder"], "invalid choice: 'folder'"),
        (["quantized"], "is stored quantized: merged into it the adapter would be rounded with it"),
        (
            ["experts", "--adapter", "mix=0.5"],
            "a mixture of adapters with `target_parameters` cannot be written as one",
        ),
        (["prompts"], "could not be compared with this adapter: export `--to adapter`"),
    ],
)
def test_bad_input_is_refused_in_a_line_before_a_model_is_loaded(base, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setattr("trl_ema.export.load_base", lambda *_, **__: pytest.fail("loaded a model"))
    lora(base_model_name_or_path=str(base)).save_pretrained(tmp_path / "run")
    experts = dict(target_modules=[], target_parameters=["mlp.experts.down_proj"])
    for folder in ("experts", "experts/teacher"):
        lora(base_model_name_or_path=str(base), **experts).save_pretrained(tmp_path / folder)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, base_model_name_or_path=str(base))
    prompts.save_pretrained(tmp_path / "prompts")
    config = read_json(base / "config.json") | {
        "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}
    }
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config))
    qwen2_tokenizer().save_pretrained(tmp_path / "small")
    lora(base_model_name_or_path="small").save_pretrained(tmp_path / "quantized")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    done = export(*arguments, check=False, cwd=tmp_path)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"to": "merged", "outtype": "f16"}, "`to='merged'`, `dataset_name=None`: `outtype='f16'`."),
        ({"to": "merged", "seed": 1}, "`to='merged'`, `dataset_name=None`: `seed=1`."),
        ({"to": "gguf", "dataset_split": "test"}, "`to='gguf'`, `dataset_name=None`: `dataset_split='test'`."),
        (
            {"to": "adapter", "dtype": "float32", "max_kl": 0.1, "dataset_name": "x", "llama_cpp": "y"},
            "`to='adapter'`: `dtype='float32'`, `max_kl=0.1`, `dataset_name='x'`, `llama_cpp='y'`.",
        ),
    ],
)
def test_options_that_an_export_does_not_read_are_named(options, message):
    with pytest.warns(UserWarning, match=re.escape(f"Ignored with {message}")):
        ExportArguments(**options)


def test_every_option_is_read_by_some_export():
    """Nothing is said to be ignored where it is read."""
    changed = {"dtype": "float16", "device": "cpu", "max_kl": 0.1, "dataset_samples": 8, "batch_size": 2}
    rows = {"dataset_name": "x", "dataset_split": "test", "drop_incomplete_rows": True, "seed": 1}
    ExportArguments(to="merged", **changed, **rows)
    ExportArguments(to="gguf", outtype="f16", llama_cpp="y", **changed, **rows)
    ExportArguments(to="adapter", adapter="teacher", scale=0.5, output_dir="x", base="y", model_revision="z")


def test_a_run_that_went_on_from_an_adapter_is_not_scaled(base, tmp_path):
    for name in ("run", "other"):
        lora(base_model_name_or_path=str(base)).save_pretrained(tmp_path / name)
    options = {
        "model_name_or_path": "other",
        "dataset_name": "rows.jsonl",
        "output_dir": "x",
        "use_cpu": True,
        "bf16": False,
    }
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(options))
    done = export("run", "--scale", 0.5, check=False, cwd=tmp_path)
    assert done.returncode == 1 and "went on from the adapter 'other'" in done.stderr


def test_a_full_disk_is_told_before_it_is_written_to(run, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ema.export.shutil.disk_usage", lambda _: type("", (), {"free": 1000}))
    done = export(run, "--max_kl", 100, "--output_dir", tmp_path / "out", check=False)
    assert done.returncode == 1 and "MiB are free where the export is written; it needs" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_commands_of_the_page_are_understood():
    text = (DOCS / "export.md").read_text(encoding="utf-8")
    lines = re.findall(r"^trl-ema export (.*)$", text, re.MULTILINE)
    assert len(lines) >= 3
    for line in lines:
        parser = TrlParser(ExportArguments)
        parser.add_argument("run")
        parser.parse_args_and_config(shlex.split(line, comments=True))
    told = {*re.findall(r"`--(\w+)", text)}
    assert told <= set(ExportArguments.__dataclass_fields__) | {"max_kl", "enable"}
