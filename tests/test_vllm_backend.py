"""Tasks asked in vLLM, by lm-eval's own model for it, over a stand-in for vLLM that computes with transformers and PEFT."""

import json
import sys

import pytest
import torch
from conftest import lora
from peft import IA3Config, get_peft_model
from test_cli import trl_ema
from test_tasks import write_tasks
from transformers import AutoModelForCausalLM

from trl_ema.cli import EvaluationArguments
from trl_ema.evaluation import tasks
from trl_ema.evaluation.models import load_base, load_tokenizer, with_adapter
from trl_ema.evaluation.runner import evaluate_tasks
from trl_ema.evaluation.settings import TaskSettings
from trl_ema.evaluation.vllm_backend import check_vllm_reads, load_vllm
from trl_ema.files import read_json, read_jsonl


ENGINE = """
from types import SimpleNamespace

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

MADE = []


def TokensPrompt(prompt_token_ids):
    return {"prompt_token_ids": prompt_token_ids}


class SamplingParams(SimpleNamespace):
    pass


class LLM:
    def __init__(self, model, tokenizer, **options):
        MADE.append(options)
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer, self.lora = AutoTokenizer.from_pretrained(tokenizer or model), None
        length = self.model.config.max_position_embeddings
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=length))

    @torch.no_grad()
    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        if lora_request is not None and self.lora is None:
            self.lora = lora_request
            self.model = PeftModel.from_pretrained(self.model, lora_request.path).eval()
        pairs = zip([prompt["prompt_token_ids"] for prompt in prompts], sampling_params, strict=True)
        return [self.score(ids) if hasattr(one, "prompt_logprobs") else self.write(ids, one) for ids, one in pairs]

    def score(self, ids):
        rows = self.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found = [{int(row.argmax()): row.max().item(), token: row[token].item()} for row, token in zip(rows, ids[1:])]
        return SimpleNamespace(prompt_logprobs=[None, *found])

    def write(self, ids, one):
        assert one.temperature == 0  # 1 would be vLLM's default
        more = []
        for _ in range(one.max_tokens):
            more.append(int(self.model(input_ids=torch.tensor([ids + more])).logits[0, -1].argmax()))
            if any(stop in self.tokenizer.decode(more) for stop in one.stop):
                break
        return SimpleNamespace(outputs=[SimpleNamespace(text=self.tokenizer.decode(more))])
"""
FILES = {
    "vllm/__init__.py": ENGINE,
    "vllm/lora/__init__.py": "",
    "vllm/lora/request.py": "from collections import namedtuple\nLoRARequest = namedtuple('LoRARequest', 'name id path')\n",
    "vllm/renderers/__init__.py": "",
    "vllm/renderers/hf.py": "def resolve_chat_template(tokenizer, chat_template, tools, model_config):\n    return 'of vLLM'\n",
    "vllm/tokenizers.py": (
        "from transformers import AutoTokenizer\n\n\ndef get_tokenizer(name, tokenizer_mode, trust_remote_code, revision):\n"
        "    return AutoTokenizer.from_pretrained(name)\n"
    ),
    "vllm-0.11.2.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.11.2\n",
}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory):
    """The stand-in's options, of each engine that was made."""
    folder = tmp_path_factory.mktemp("site")
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        import vllm

        yield vllm.MADE
    for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(write_tasks(tmp_path_factory.mktemp("own") / "tasks")), include_defaults=False)


@pytest.fixture(scope="module")
def base(tiny_folder):
    return str(tiny_folder / "model")


def saved(base, folder, **options):
    """An adapter that changes answers."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    peft = get_peft_model(model, lora(**({"init_lora_weights": False} | options)))
    peft.save_pretrained(folder)
    return str(folder)


SETTINGS = {"chosen": TaskSettings(), "followed": TaskSettings(metric="share"), "extracted": TaskSettings()}


def ask(model, tokenizer, folder, manager, **options):
    for task, settings in SETTINGS.items():
        evaluate_tasks(
            model, tokenizer, [task], str(folder), model_id="m", manager=manager, settings=settings, **options
        )
    return [read_jsonl(folder / f"{task}.jsonl") for task in SETTINGS]


@pytest.mark.parametrize("has_adapter", [False, True])
def test_answers_are_those_of_transformers_but_for_their_backend(vllm, base, manager, tmp_path, has_adapter):
    adapter = saved(base, tmp_path / "adapter", r=12) if has_adapter else None
    tokenizer = load_tokenizer(base, adapter)
    ours = ask(load_vllm(base, adapter, tokenizer, dtype="float32"), None, tmp_path / "vllm", manager, backend="vllm")
    model, _ = load_base(base, dtype=torch.float32)
    if adapter:
        model, _ = with_adapter(model, adapter, tokenizer)
    theirs = ask(model, tokenizer, tmp_path / "transformers", manager)
    assert [[row | {"backend": "transformers"} for row in found] for found in ours] == theirs
    assert {row["backend"] for found in ours for row in found} == {"vllm"}
    assert read_json(tmp_path / "vllm" / "chosen.json")["backend"] == "vllm"
    assert vllm[-1]["enable_lora"] is has_adapter and vllm[-1]["dtype"] == "float32"
    assert vllm[-1]["max_lora_rank"] == 16  # of a rank of 12, and lm-eval's default without


def test_a_chat_is_written_by_the_tokenizer_that_was_trained_with(vllm, base):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    lm = load_vllm(base, None, tokenizer, gpu_memory_utilization=0.5, max_model_len=64)
    assert (vllm[-1]["gpu_memory_utilization"], vllm[-1]["max_model_len"], lm.max_length) == (0.5, 64, 64)
    assert lm.apply_chat_template([{"role": "user", "content": "fever"}]) == "[fever]"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (dict(use_dora=True), "`use_dora=True`"),
        (dict(modules_to_save=["lm_head"]), "`modules_to_save=.*lm_head"),
        (dict(alpha_pattern={"q_proj": 3}), "`alpha_pattern={'q_proj': 3}`"),
        (dict(rank_pattern={"q_proj": 2}), "`rank_pattern={'q_proj': 2}`"),
        (dict(trainable_token_indices=[1]), "`trainable_token_indices="),
        (dict(init_lora_weights="pissa"), "`init_lora_weights='pissa'`"),
        (dict(alora_invocation_tokens=[1], task_type="CAUSAL_LM"), r"`alora_invocation_tokens=\[1\]`"),
        (dict(target_modules=["q_proj", "embed_tokens"]), "the tensor '.*embed_tokens.*'"),
    ],
)
def test_an_adapter_that_vllm_would_misread_is_refused(base, tmp_path, options, named):
    adapter = saved(base, tmp_path, **options)
    with pytest.raises(ValueError, match=f"{named}.*, which vLLM does not read as PEFT does"):
        check_vllm_reads(adapter)


def test_other_kinds_and_ranks_without_room_are_refused_and_rslora_is_not(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, IA3Config(target_modules=["k_proj"], feedforward_modules=[])).save_pretrained(
        tmp_path / "ia3"
    )
    with pytest.raises(ValueError, match="`peft_type=IA3`"):
        check_vllm_reads(str(tmp_path / "ia3"))
    adapter = tmp_path / "rslora"
    assert check_vllm_reads(saved(base, adapter, use_rslora=True)) == 8
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 600}))
    with pytest.raises(ValueError, match=r"`r=600` \(above 512\)"):
        check_vllm_reads(str(adapter))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(max_model_len=64), "`max_model_len=64` is of vLLM. Give `backend='vllm'`, or leave it out"),
        (dict(backend="vllm", gpu_memory_utilization=90), r"`gpu_memory_utilization` must be in \(0, 1\], got 90"),
        (dict(backend="vllm", max_model_len=0), "`max_model_len` must be a whole number of at least 2, got 0"),
    ],
)
def test_the_memory_of_vllm_has_its_range(options, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(**options)


def test_the_command_asks_in_vllm_and_pairs_with_vllm_alone(vllm, base, manager, tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "task_manager", lambda *_: manager)
    adapter = saved(base, tmp_path / "adapter")

    def evaluate(model, folder, *more, check=True):
        options = ["--tasks", "chosen", "followed", "--dtype", "float32", "--gen_kwargs", "max_gen_toks=3", *more]
        return trl_ema("evaluate", "--model", model, "--output_dir", tmp_path / folder, *options, check=check)

    evaluate(base, "before", "--backend", "vllm", "--gpu_memory_utilization", "0.5")
    assert vllm[-1]["gpu_memory_utilization"] == 0.5 and vllm[-1]["max_model_len"] is None
    done = evaluate(adapter, "after", "--backend", "vllm", "--against", tmp_path / "before")
    assert "chosen" in done.stdout and "Mean relative drop" in done.stdout and vllm[-1]["enable_lora"] is True
    done = evaluate(adapter, "other", "--against", tmp_path / "before", check=False)
    assert done.returncode == 1 and "`backend` is vllm there and transformers here" in done.stderr
    made = len(vllm)
    done = evaluate(
        adapter, "after", "--backend", "vllm", "--max_model_len", "24", "--against", tmp_path / "before", check=False
    )
    assert done.returncode == 1 and "`backend` is vllm there and vllm, max_model_len=24 here" in done.stderr
    assert len(vllm) == made  # before it was loaded
    evaluate(adapter, "cut", "--backend", "vllm", "--max_model_len", "24")
    evaluate(adapter, "other")
    whole, cut = (read_json(tmp_path / folder / "chosen.json") for folder in ("after", "cut"))
    assert whole["key"] != cut["key"] and cut["backend"] == "vllm, max_model_len=24"
    kept = [read_json(tmp_path / folder / "followed.json") for folder in ("after", "other")]
    assert kept[0]["key"] != kept[1]["key"] and kept[0]["settings"]["gen_kwargs"] == {"max_gen_toks": 3}
    assert read_json(tmp_path / "after" / "chosen.json")["settings"]["gen_kwargs"] is None
    done = evaluate(saved(base, tmp_path / "dora", use_dora=True), "dora", "--backend", "vllm", check=False)
    assert done.returncode == 1 and "which vLLM does not read as PEFT does" in done.stderr
