"""Tiny models, tokenizers and data, made on the spot: nothing is downloaded and nothing is left behind."""

import atexit
import contextlib
import functools
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


# Before any hub library is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRACKIO_DIR"] = tempfile.mkdtemp()  # which trackio reads when TRL imports it
# `pytest -m gpu`, or TRL_EMA_TESTS_ON=cuda for the whole suite on a GPU. The workers of xdist have other arguments, but inherit this.
if any("gpu" in argument and "not gpu" not in argument for argument in sys.argv):
    os.environ.setdefault("TRL_EMA_TESTS_ON", "gpu")
if "TRL_EMA_TESTS_ON" not in os.environ:
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported by anything
if "PYTEST_XDIST_WORKER" in os.environ:  # several of us share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import accelerate
import datasets
import pytest
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils import collect_env
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Tokenizer

from trl_ema import EMARegularizedSFTTrainer, MeanTeacherConfig
from trl_ema.offline import demo_rows


atexit.register(shutil.rmtree, os.environ["TRACKIO_DIR"], ignore_errors=True)

WORDS = [
    "a",
    "acute",
    "an",
    "and",
    "artery",
    "bone",
    "brain",
    "cell",
    "chronic",
    "cough",
    "disease",
    "drug",
    "fever",
    "gene",
    "heart",
    "infection",
    "is",
    "kidney",
    "liver",
    "lung",
    "muscle",
    "nerve",
    "of",
    "organ",
    "pain",
    "patient",
    "protein",
    "rare",
    "skin",
    "swelling",
    "symptom",
    "syndrome",
    "the",
    "tissue",
    "tumor",
    "vein",
    "virus",
    "what",
]
USE_CPU = os.environ.get("TRL_EMA_TESTS_ON") != "cuda"
DEVICE = "cpu" if USE_CPU else "cuda"
VOCAB_SIZE = 64
TINY = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }} </s>"
    "{% endgeneration %}{% else %}{{ m['content'] }} </s>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


# Which take minutes, as they are: one of them last would leave a worker of xdist alone with it.
LONGEST_FILES = ["test_launch.py", "test_trainer_cases.py", "test_comparison.py", "test_evaluation.py", "test_trainer.py"]  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: LONGEST_FILES.index(item.path.name) if item.path.name in LONGEST_FILES else len(LONGEST_FILES)
    )


def pytest_collection_finish():
    gc.freeze()  # each training begins with a whole collection, which need not look through what is imported for good


@pytest.fixture(autouse=True)
def _no_tf32_is_left():
    """`torch_compile=True` turns on TF32 for the rest of a process, whose tests compare more digits than it has."""
    before = getattr(torch.backends, "fp32_precision", None)  # of torch>=2.9
    yield
    if before is not None:
        torch.backends.fp32_precision = before


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """Keep the caches of `datasets` out of the user's home, and find out once what all tests of a process share."""
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(2, os.cpu_count() or 1)))
    with pytest.MonkeyPatch.context() as patch:
        # accelerate looks in every step whether PEFT is installed, lm-eval in every evaluation at all that is: by pip.
        for module, name in ((accelerate.utils.imports, "_is_package_available"), (collect_env, "get_pip_packages")):
            patch.setattr(module, name, functools.cache(getattr(module, name)))
        yield


@pytest.fixture(scope="session")
def lm_evals_files_read_once():
    """
    lm-eval's own task files, thousands, are read by the first of its task managers alone, and questions from the data package by the first
    that asks them: each takes many seconds for it.
    """
    import lm_eval.tasks._index as index

    from trl_ema.evaluation import tasks

    own, read = Path(index.__file__).parent, index.load_yaml
    cached = functools.cache(read)
    of_wheel, kept = tasks._read, {}

    def read_once(archive, name):
        key = (archive.filename, os.stat(archive.filename).st_mtime_ns, name)
        if key not in kept:
            kept[key] = of_wheel(archive, name)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "load_yaml", lambda path, **how: (cached if own in path.parents else read)(path, **how))
        patch.setattr(tasks, "_read", read_once)
        yield


@pytest.fixture(scope="session")
def in_this_process():
    """A context in which the trainings of a comparison are the real ones, but no processes of their own, which import for longer."""
    from trl_ema.cli import train

    start = subprocess.run

    def run(command, **options):
        return train(command[4:]) if "trl_ema" in command else start(command, **options)

    @contextlib.contextmanager
    def context():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess, "run", run)
            patch.setattr(sys, "argv", sys.argv)  # which it sets
            yield

    return context


@pytest.fixture(scope="session")
def definitions():
    """The rows of the demo set; reading them takes seconds."""
    return demo_rows()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    return make_tiny_folder(tmp_path_factory.mktemp("tiny"))


def make_tiny_folder(folder):
    """A folder with `model`, a tiny random Qwen2 (the study's architecture) with its tokenizer, and `data.jsonl`."""
    size = dict(hidden_size=64, intermediate_size=128, head_dim=16, vocab_size=416, max_position_embeddings=2048)
    tokenizer = qwen2_tokenizer()
    ids = {f"{name}_token_id": tokenizer.eos_token_id for name in ("bos", "eos", "pad")}
    tiny_model("qwen2", **size, **ids).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows(80).to_json(folder / "data.jsonl")
    return folder


def qwen2_tokenizer():
    """`AutoTokenizer` makes a `Qwen2Tokenizer` of whatever lies beside a Qwen2 model: this is one, with few merges."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    bpe = json.loads(core.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=bpe["vocab"], merges=[tuple(pair) for pair in bpe["merges"]])
    tokenizer.chat_template = CHAT_TEMPLATE.replace("</s>", tokenizer.eos_token)
    return tokenizer


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def make_tokenizer():
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "<user>": 4, "<assistant>": 5}
    vocab |= {word: len(vocab) + i for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(model_type="llama", **changes):
    return AutoConfig.for_model(model_type, **(TINY | changes))


def tiny_model(model_type="llama", seed=0, **changes):
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes))
    # At the default initialization all logits are almost equal, and so would be teacher and student.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def sentence(generator, length):
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (length,), generator=generator))


def rows(n=16, seed=0, kind="prompt_completion"):
    """`n` seeded rows of different lengths in one of TRL's formats."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 10, (n, 2), generator=g).tolist()
    pairs = [(sentence(g, p), sentence(g, c)) for p, c in lengths]
    if kind == "text":
        return datasets.Dataset.from_list([{"text": f"{p} {c}"} for p, c in pairs])
    if kind == "messages":
        return datasets.Dataset.from_list(
            [{"messages": [dict(role="user", content=p), dict(role="assistant", content=c)]} for p, c in pairs]
        )
    return datasets.Dataset.from_list([{"prompt": p, "completion": f" {c}"} for p, c in pairs])


def lora(**changes):
    return LoraConfig(**(dict(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0) | changes))


def config(folder, **changes):
    """A short, exact run: float32, no dropout, a learning rate that moves."""
    defaults = dict(
        output_dir=str(folder), use_cpu=USE_CPU, bf16=False, learning_rate=1e-2, max_steps=4, logging_steps=1,
        per_device_train_batch_size=4, max_length=32, report_to="none", save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, lr_scheduler_type="constant",
    )  # fmt: skip
    return MeanTeacherConfig(**(defaults | changes))


@pytest.fixture
def make_trainer(tmp_path, tokenizer):
    def make(
        *, model=None, data=None, peft_config="lora", trainer_class=EMARegularizedSFTTrainer, args=None, **changes
    ):
        extra = {
            name: changes.pop(name) for name in ("eval_dataset", "callbacks", "formatting_func") if name in changes
        }
        if not isinstance(changes.get("rehearsal_dataset"), str | None):  # a name is an option
            extra["rehearsal_dataset"] = changes.pop("rehearsal_dataset")
        return trainer_class(
            tiny_model() if model is None else model,
            args=config(tmp_path / "out", **changes) if args is None else args,
            train_dataset=rows() if data is None else data,
            processing_class=tokenizer,
            peft_config=lora() if peft_config == "lora" else peft_config,
            **extra,
        )

    return make


@pytest.fixture
def asked_of_base(monkeypatch):
    """The options with which a command loads its base, which ends there with the error "loaded"."""
    seen = {}

    def load_base(name, revision, **options):
        seen.update(options)
        raise ValueError("loaded")

    monkeypatch.setattr("trl_ema.evaluation.models.load_base", load_base)
    return seen


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def adapter_weights(trainer, name="default"):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if f".{name}." in n}
