"""Tasks beyond multiple choice: which number is a question's score, how answers are written, and tasks during training."""

import json
import random
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
import yaml
from conftest import WORDS, adapter_weights, logged, lora, make_tokenizer, tiny_model
from transformers import TrainerCallback

from trl_ema.comparison.changes import changes_table, task_changes
from trl_ema.evaluation.answers import paired_scores
from trl_ema.evaluation.metrics import chance_of, check_metric, metric_of, numbers_of
from trl_ema.evaluation.models import load_base
from trl_ema.evaluation.runner import _language_model, check_settings, evaluate_tasks
from trl_ema.evaluation.settings import TaskSettings, parse_tasks
from trl_ema.files import read_json, read_jsonl, write_jsonl
from trl_ema.measurement import TasksCallback


def table_of(callback):
    """As the recipe prints it."""
    folders = callback.first_and_last()
    return changes_table(*folders, callback.tasks) if folders else ""


# As IFEval's: one number of each question, a list of each, and one that is between 0 and 1.
SCORING = """
def process_results(doc, results):
    words = results[0].split()
    return {
        "strict": len(words) % 2 == doc["parity"],
        "parts": [word in doc["question"] for word in words],
        "share": len({*words}) / max(1, len(words)),
    }


def all_parts(items):
    flat = [part for item in items for part in item]
    return sum(flat) / max(1, len(flat))
"""


def write_tasks(folder):
    """A folder for lm-eval's `include_path`: `chosen`, `extracted` with two filters, `followed` with three metrics, and a group."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(
        folder / "rows.jsonl",
        [
            {
                "question": f"the {word} is", "choices": [word, WORDS[i + 1]], "gold": i % 2, "parity": i % 2,
                "answer": "[invalid]" if i % 3 else "cell",
            }
            for i, word in enumerate(WORDS[4:16])
        ],
    )  # fmt: skip
    (folder / "scoring.py").write_text(SCORING)
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}, "test_split": "test",
        "doc_to_text": "question",
    }  # fmt: skip
    written = common | {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 6, "until": ["###"]}}
    mean = {"aggregation": "mean", "higher_is_better": True}
    first = {"function": "take_first"}
    definitions = {
        "chosen": common
        | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"}
        | {"metric_list": [{"metric": "acc", **mean}]},
        "extracted": written
        | {"doc_to_target": "answer", "metric_list": [{"metric": "exact_match", **mean}]}
        | {
            "filter_list": [
                {"name": "strict-match", "filter": [{"function": "regex", "regex_pattern": "#### ([0-9]+)"}, first]},
                {"name": "whole", "filter": [first]},
            ]
        },
        "followed": written | {"doc_to_target": "answer", "metric_list": [{"metric": "strict", **mean}]},
        "both": {
            "group": "both", "task": ["extracted"],
            "aggregate_metric_list": [{"metric": "exact_match", "filter_list": "whole", "weight_by_size": True}],
        },
    }  # fmt: skip
    for name, definition in definitions.items():
        definition = definition if name == "both" else {"task": name} | definition
        text = yaml.safe_dump(definition, sort_keys=False)
        if name == "followed":
            text += "- metric: parts\n  aggregation: !function scoring.all_parts\n  higher_is_better: true\n"
            text += "- metric: share\n  aggregation: mean\n  higher_is_better: true\n"
            text += "process_results: !function scoring.process_results\n"
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(write_tasks(tmp_path_factory.mktemp("own") / "tasks")), include_defaults=False)


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return load_base(str(tiny_folder / "model"), dtype=torch.float32)


def ask(tiny, folder, manager, task, **settings):
    settings = TaskSettings(**settings)
    found = evaluate_tasks(*tiny, [task], str(folder), model_id="m", manager=manager, settings=settings)
    return found[task], read_jsonl(folder / f"{task}.jsonl")


# Which number is the score


MEAN = {"aggregation": "mean"}
IFEVAL = {
    "metric_list": [
        {"metric": "prompt_level_strict_acc", **MEAN},
        {"metric": "inst_level_strict_acc", "aggregation": "/lm_eval/tasks/ifeval/utils.agg_inst_level_acc"},
    ]
}
GSM8K = {
    "metric_list": [{"metric": "exact_match", **MEAN}],
    "filter_list": [{"name": "strict-match"}, {"name": "flexible-extract"}],
}


@pytest.mark.parametrize(
    ("definition", "asked"),
    [
        (IFEVAL, None),
        (IFEVAL, "prompt_level_strict_acc"),
        (IFEVAL, "inst_level_strict_acc"),  # its own function: what it gives is seen in the answers
        (GSM8K, None),
        (GSM8K, "exact_match@flexible-extract"),
        ({"output_type": "multiple_choice"}, "acc_norm"),  # lm-eval's own for this kind
        ({"metric_list": [{"metric": "/humaneval/utils.pass_at_k", **MEAN}]}, "pass_at_k"),
        ({"class": "Squad"}, "exact"),  # written in Python
    ],
)
def test_a_metric_that_may_be_one_number_of_each_question_is_accepted(definition, asked):
    check_metric("t", definition, asked)


@pytest.mark.parametrize(
    ("definition", "asked", "message"),
    [
        (GSM8K, "acc", r"Task 't' has no metric 'acc'; expected one number per question.*\['exact_match'\]. Give one of exact_match"),
        (GSM8K, "exact_match@strict", r"no filter 'strict'. It has strict-match, flexible-extract"),
        ({"metric_list": [{"metric": "bleu"}]}, None, "has no number of each question.*Choose another task"),
        ({"metric_list": [{"metric": "bleu"}]}, "bleu", "is scored by 'bleu', which is of all answers together"),
        ({"metric_list": [{"metric": "wer", "higher_is_better": False, **MEAN}]}, "wer", "which is better when it is lower"),
        ({"output_type": "loglikelihood_rolling"}, None, "'word_perplexity', 'byte_perplexity', 'bits_per_byte'"),
    ],
)  # fmt: skip
def test_a_task_without_one_number_per_question_is_refused_by_its_definition(definition, asked, message):
    with pytest.raises(ValueError, match=message):
        check_metric("t", definition, asked)


def test_a_group_within_a_groups_file_has_its_tasks_too():
    from trl_ema.evaluation.tasks import leaves

    group = {
        "group": "g",
        "task": ["a", {"task": "b", "task_alias": "B"}, {"group": "inner", "task": ["c", {"task": "d"}]}],
    }
    index = {"g": SimpleNamespace(cfg=group)} | {x: SimpleNamespace(cfg={"task": x}) for x in "abcd"}
    assert list(leaves("g", SimpleNamespace(task_index=index))) == ["a", "b", "c", "d"]


def sample(**values):
    return {"filter": "none", "metrics": list(values), "arguments": [()], **values}


def test_the_score_is_accuracy_by_length_then_accuracy_then_the_tasks_first():
    assert metric_of("t", {}, [sample(f1=0.5, acc=1.0, acc_norm=0.0)], None) == ("acc_norm", "none")
    assert metric_of("t", {}, [sample(em=np.float64(1), acc=np.bool_(True))], None) == ("acc", "none")
    assert metric_of("t", IFEVAL, [sample(inst_level_strict_acc=[1, 0], strict=True, loose=1)], None)[0] == "strict"
    assert numbers_of(sample(a=True, b=[1], c=(0, 1), d=0.25)) == {"a": 1.0, "d": 0.25}


@pytest.mark.parametrize(
    ("samples", "asked", "message"),
    [
        ([sample(parts=[True], strict=1)], "parts", "expected one number per question as `parts`, and there is one as strict"),
        ([sample(acc=1), sample(acc=float("nan"))], None, "expected one number per question, and there is none"),
        ([sample(acc=1)], "acc@other", "no filter 'other'. It has none"),
    ],
)  # fmt: skip
def test_answers_without_one_number_per_question_are_refused(samples, asked, message):
    with pytest.raises(ValueError, match=message):
        metric_of("t", {}, samples, asked)


def test_chance_is_of_options_and_of_accuracies():
    four = {"arguments": [()] * 4, "metrics": ["acc"]}
    assert (chance_of("acc", four), chance_of("f1", four)) == (0.25, 0.0)
    assert chance_of("acc", four | {"metrics": ["acc", "acc_mutual_info"]}) == 0.5  # each option twice
    assert chance_of("acc", four | {"arguments": [()]}) == 0.0


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("max_gen_toks=64, temperature=0.5,do_sample=True", {"max_gen_toks": 64, "temperature": 0.5, "do_sample": True}),
        ('{"until": ["\\n"]}', {"until": ["\n"]}),
        ({"max_gen_toks": 8}, {"max_gen_toks": 8}),
        ("", None),
        ("a=b=c", {"a": "b=c"}),
    ],
)  # fmt: skip
def test_settings_of_generation_are_read_from_text_or_a_mapping(given, expected):
    assert TaskSettings(gen_kwargs=given).gen_kwargs == expected


@pytest.mark.parametrize("given", ["max_gen_toks", "=3", "[1, 2]", 7])
def test_settings_of_generation_of_another_form_are_refused(given):
    with pytest.raises(ValueError, match="`gen_kwargs` is .*; expected `key=value,key=value`"):
        TaskSettings(gen_kwargs=given)


def test_a_metric_of_another_form_is_refused():
    for metric in ("exact match", "@strict", "a@b@c"):
        with pytest.raises(ValueError, match="must be the name of a metric, or `metric@filter`"):
            TaskSettings(metric=metric)


def test_tasks_are_written_with_the_number_of_their_questions():
    assert parse_tasks("t", ["hellaswag:100", "piqa"]) == {
        "hellaswag": TaskSettings(sample=100),
        "piqa": TaskSettings(),
    }
    for entry in ("hellaswag:", ":3", "hellaswag:0", "hellaswag:1.5"):
        with pytest.raises(ValueError, match=r"`t` has '.*'; expected a task, or `TASK:N`"):
            parse_tasks("t", [entry])
    with pytest.raises(ValueError, match="names the task 'piqa' twice"):
        parse_tasks("t", ["piqa", "piqa:3"])


# Answers that are written


def test_a_written_answer_is_scored_by_one_metric_of_one_filter(tiny, manager, tmp_path):
    strict, rows = ask(tiny, tmp_path / "strict", manager, "extracted")
    assert strict["metric"] == "exact_match@strict-match" and len(rows) == 12
    # The pattern is never there, and what stands for it is the answer to two questions of three.
    assert strict["score"] == pytest.approx(strict["lm_eval"]["extracted"]["exact_match,strict-match"]) == 8 / 12
    whole, rows = ask(tiny, tmp_path / "whole", manager, "extracted", metric="exact_match@whole")
    assert whole["metric"] == "exact_match@whole" and whole["score"] == 0 and {row["chance"] for row in rows} == {0.0}
    with pytest.raises(ValueError, match="`metric` is exact_match@strict-match there and exact_match@whole here"):
        paired_scores(*(tmp_path / name / "extracted.jsonl" for name in ("strict", "whole")))


def test_a_groups_score_is_its_own_figure(tiny, manager, tmp_path):
    found, rows = ask(tiny, tmp_path, manager, "both")
    assert {row["metric"] for row in rows} == {"exact_match@whole"}
    assert found["score"] == found["lm_eval"]["both"]["exact_match,whole"]


def test_any_number_of_a_question_can_be_its_score_and_the_answers_are_kept_for_another(
    tiny, manager, tmp_path, monkeypatch
):
    model, _ = tiny
    calls, generate = [], model.generate
    monkeypatch.setattr(model, "generate", lambda *args, **kwargs: calls.append(1) or generate(*args, **kwargs))
    with pytest.raises(ValueError, match="as `parts`, and there is one as strict, share"):
        ask(tiny, tmp_path, manager, "followed", metric="parts")
    asked = len(calls)
    strict, rows = ask(tiny, tmp_path, manager, "followed")
    assert len(calls) == asked > 0  # the same answers
    assert strict["metric"] == "strict" and {row["score"] for row in rows} <= {0.0, 1.0}
    assert strict["score"] == pytest.approx(strict["lm_eval"]["followed"]["strict,none"])
    share, rows = ask(tiny, tmp_path, manager, "followed", metric="share")
    assert share["score"] == pytest.approx(np.mean([row["share"] for row in rows]))
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["followed.json", "followed.jsonl"]


def test_settings_of_generation_change_the_answers_and_the_key(tiny, manager, tmp_path):
    long, _ = ask(tiny, tmp_path / "long", manager, "followed", metric="share")
    none, rows = ask(tiny, tmp_path / "none", manager, "followed", metric="share", gen_kwargs={"max_gen_toks": 1})
    assert long["key"] != none["key"] and none["settings"]["gen_kwargs"] == {"max_gen_toks": 1}
    assert {row["share"] for row in rows} <= {0.0, 1.0}  # one token is at most one word
    with pytest.raises(ValueError, match="say how answers are written, and in 'chosen' they are chosen"):
        check_settings("chosen", TaskSettings(gen_kwargs={"max_gen_toks": 1}), manager)


def test_answers_of_an_earlier_version_keep_their_key(monkeypatch):
    from trl_ema.evaluation import runner

    monkeypatch.setattr(runner, "version", lambda name: "0.4.13")
    before = {
        "num_fewshot": None,
        "limit": 2,
        "sample": None,
        "apply_chat_template": False,
        "seed": 1234,
        "metric": None,
    }
    text = json.dumps(["m", "arc_easy", before, "0.4.13"], sort_keys=True)
    expected = runner.hashlib.sha256(text.encode()).hexdigest()[:16]
    assert runner._key("m", "arc_easy", TaskSettings(limit=2)) == expected


def test_every_process_of_a_launch_gets_its_results(tiny, manager, tmp_path, monkeypatch):
    alone, _ = ask(tiny, tmp_path / "alone", manager, "chosen")
    monkeypatch.setenv("LOCAL_RANK", "1")
    second, _ = ask(tiny, tmp_path / "second", manager, "chosen")
    assert second["score"] == alone["score"] and second["backend"] == "transformers"


def test_lm_eval_computes_in_the_autocast_around_it_and_leaves_model_and_tokenizer_alone(tiny):
    model, tokenizer = tiny
    model.train()
    side, model.tie_weights = tokenizer.padding_side, pytest.fail
    try:
        with torch.autocast("cpu", torch.bfloat16), _language_model(model, tokenizer, 2) as lm:
            assert lm._model_call(torch.tensor([[5, 6]])).dtype == torch.bfloat16 and not model.training
            lm.tokenizer.padding_side = "other"
        with _language_model(model, tokenizer, 2) as lm:
            assert lm._model_call(torch.tensor([[5, 6]])).dtype == torch.float32
        assert model.training and tokenizer.padding_side == side and model.tie_weights is pytest.fail
    finally:
        del model.tie_weights
        model.eval()


# Changes


def answers(folder, scores, **others):
    rows = [
        dict(task="t", doc_id=i, doc_hash=str(i), prompt_hash="p", metric="m", score=s) for i, s in enumerate(scores)
    ]
    write_jsonl(folder / "t.jsonl", [row | others for row in rows])
    return str(folder)


def test_changes_are_tested_by_what_their_scores_are(tmp_path):
    before = answers(tmp_path / "before", [1.0] * 20 + [0.0] * 5)
    after = answers(tmp_path / "after", [1.0] * 8 + [0.0] * 17)
    (row,) = task_changes(before, after, ["t"])
    assert (row["test"], row["lost"], row["gained"], row["discovery"]) == ("McNemar", 12, 0, True)
    text = changes_table(before, after, ["t"])
    assert "0.000 *" in text and "paired bootstrap" not in text and "among 1 tests" in text
    part = answers(tmp_path / "part", [0.5, *[1.0] * 19, *[0.0] * 5])
    (row,) = task_changes(before, part, ["t"])
    assert (row["test"], row["lost"], row["gained"], row["discovery"]) == ("bootstrap", 1, 0, False)
    text = changes_table(before, part, ["t"])
    assert f"{row['detectable']:8.3f}" in text and text.splitlines()[1].endswith("b")


def test_long_names_of_tasks_and_folders_leave_the_columns_where_they_are(tmp_path):
    name = "mmlu_professional_medicine_of_some_length"
    for folder in ("before", "after"):
        path = Path(answers(tmp_path / folder, [1.0, 0.0]))
        (path / "t.jsonl").rename(path / f"{name}.jsonl")
    header, row, told = changes_table(str(tmp_path / "before"), str(tmp_path / "after"), [name]).splitlines()[:3]
    assert row.index(" 0.5000") + 7 == header.index("before") + 6 and row.rindex("1.000") + 5 == len(header)
    assert told.startswith(f"before: {tmp_path / 'before'}; after: {tmp_path / 'after'}; ")


def test_answers_of_two_backends_are_never_paired(tmp_path):
    one, other = answers(tmp_path / "one", [1.0, 0.0]), answers(tmp_path / "other", [1.0, 0.0], backend="vllm")
    with pytest.raises(ValueError, match="`backend` is transformers there and vllm here. Evaluate both in one backend"):
        changes_table(one, other, ["t"])
    assert "t " in changes_table(other, answers(tmp_path / "third", [0.0, 0.0], backend="vllm"), ["t"])


# During training


def states():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def trained(make_trainer, folder, tasks=None, manager=None, steps=5):
    trainer = make_trainer(
        model=tiny_model(max_position_embeddings=256), peft_config=lora(lora_dropout=0.2), teacher="ema", max_steps=steps,
        output_dir=str(folder), report_to="none",
    )  # fmt: skip
    callback = None
    if tasks:
        callback = TasksCallback(trainer, tasks, 2, manager)
        trainer.add_callback(callback)
    trainer.train()
    return trainer, callback, states()


def test_a_training_is_the_same_whether_tasks_are_asked_or_not(make_trainer, manager, tmp_path):
    plain, _, after_plain = trained(make_trainer, tmp_path / "plain")
    tasks = {"chosen": TaskSettings(sample=8), "followed": TaskSettings(metric="share")}
    asked, callback, after_asked = trained(make_trainer, tmp_path / "asked", tasks, manager)
    for name in ("default", "teacher"):
        ours, theirs = adapter_weights(asked, name), adapter_weights(plain, name)
        assert ours and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert after_asked == after_plain
    assert logged(asked, "loss") == logged(plain, "loss") and logged(asked, "entropy") == logged(plain, "entropy")
    assert asked.model.training == plain.model.training
    steps = [entry["step"] for entry in asked.state.log_history if "task_chosen" in entry]
    assert steps == callback.asked == [0, 2, 4, 5]  # before the first step, every second, and after the last
    folders = sorted((tmp_path / "asked" / "tasks").iterdir())
    assert [folder.name for folder in folders] == ["step-000000", "step-000002", "step-000004", "step-000005"]
    kept = read_json(folders[-1] / "chosen.json")
    assert kept["score"] == logged(asked, "task_chosen")[-1] and kept["n"] == 8 and kept["about"] == {"step": 5}
    table = table_of(callback)
    assert (
        "chosen" in table and "followed" in table and table == changes_table(str(folders[0]), str(folders[-1]), tasks)
    )


def test_what_is_asked_during_training_is_the_student_of_that_step(make_trainer, manager, tmp_path):
    tasks = {"followed": TaskSettings(metric="share")}
    trainer, _, _ = trained(make_trainer, tmp_path / "run", tasks, manager, steps=1)
    last = read_jsonl(tmp_path / "run" / "tasks" / "step-000001" / "followed.jsonl")
    tokenizer, trainer.model = make_tokenizer(), trainer.model.eval()
    found = evaluate_tasks(
        trainer.model, tokenizer, ["followed"], str(tmp_path / "after"), model_id="m", manager=manager,
        settings=tasks["followed"], batch_size=8,
    )  # fmt: skip
    assert read_jsonl(tmp_path / "after" / "followed.jsonl") == last and found["followed"]["n"] == 12


def test_a_run_that_goes_on_is_not_asked_again_before_its_first_step(make_trainer, manager, tmp_path):
    callback = TasksCallback(make_trainer(), {"chosen": TaskSettings(limit=2)}, 2, manager)
    callback.folder = tmp_path / "tasks"
    callback.on_train_begin(None, SimpleNamespace(global_step=3), None)
    assert callback.asked == [] and table_of(callback) == ""
    for step in (2, 4):  # the first of them by the process that was cut off
        callback.ask(step)
    callback.asked = [4]
    assert str(tmp_path / "tasks" / "step-000002") in table_of(callback)


def test_what_an_early_stop_ends_with_is_asked_and_logged_before_trackers_close(make_trainer, manager, tmp_path):
    class Tracker(TrainerCallback):
        logs: ClassVar[list] = []

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

        def on_log(self, args, state, control, logs, **kwargs):
            self.logs.append(logs)

        def on_train_end(self, args, state, control, **kwargs):
            self.logs.append("closed")

    trainer = make_trainer(
        model=tiny_model(max_position_embeddings=256), max_steps=5, output_dir=str(tmp_path / "run"), report_to="none",
        callbacks=[Tracker()],
    )  # fmt: skip
    callback = TasksCallback(trainer, {"chosen": TaskSettings(sample=4)}, 2, manager)
    trainer.add_callback(callback)
    trainer.train()
    assert callback.asked == [0, 2, 3] and trainer.state.log_history[-1]["task_chosen"] is not None
    assert Tracker.logs[-1] == "closed" and "task_chosen" in Tracker.logs[-2]
    assert str(tmp_path / "run" / "tasks" / "step-000000") in table_of(callback)


def test_the_weights_that_a_training_ends_with_are_asked_once(make_trainer, monkeypatch, tmp_path):
    callback = TasksCallback(make_trainer(), {"t": TaskSettings()}, 2, None)
    callback.folder, asked = tmp_path, []

    def ask(step):
        asked.append(step)
        answers(callback._at(step), [0.0, step / 10])

    monkeypatch.setattr(callback, "ask", ask)

    def end(step, best=None, begun=0, stopped_by=0):
        callback.begun, callback.asked, callback.trainer.stopped_by = begun, [0, 2, 4], stopped_by
        state = SimpleNamespace(global_step=step, best_global_step=best, best_model_checkpoint=best and "folder")
        callback.on_train_end(SimpleNamespace(load_best_model_at_end=best is not None), state, None)
        return [asked.pop() for _ in range(len(asked))]

    for step in (0, 2, 4):
        answers(callback._at(step), [0.0, step / 10])
    assert end(4) == end(5, stopped_by=15) == end(5, best=2) == []
    assert str(tmp_path / "step-000000") in table_of(callback) and "0.1000" in table_of(callback)
    assert end(5) == [5] and end(5, best=3) == [3]
    callback.asked = [0, 2, 3, 4, 5]
    assert "0.1500" in table_of(callback) and "0.2500" not in table_of(callback)  # of step 3, not 5
    assert end(5, begun=5) == []  # gone on from where it had ended: asked then
    callback.trainer.stopped_by = 15  # nor at a step at which a signal ends it
    callback.on_step_end(None, SimpleNamespace(global_step=2, max_steps=5), None)
    assert not asked


def test_tasks_are_not_asked_of_a_sharded_model_nor_every_0_steps(make_trainer):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="`steps` must be at least 1, got 0"):
        TasksCallback(trainer, {}, 0, None)
    for plugins in (
        dict(fsdp_plugin=SimpleNamespace(fsdp_version=2)),
        dict(deepspeed_plugin=SimpleNamespace(zero_stage=3, deepspeed_config={})),
    ):
        sharded = SimpleNamespace(accelerator=SimpleNamespace(state=SimpleNamespace(**plugins)))
        with pytest.raises(
            ValueError, match=r"not sharded \(ZeRO-3, FSDP\).*give the checkpoints to `trl-ema evaluate`"
        ):
            TasksCallback(sharded, {}, 1, None)


@pytest.mark.parametrize("given", [dict(eval_tasks=["piqa"]), dict(eval_tasks_steps=5)])
def test_tasks_and_their_steps_belong_together(given):
    from trl_ema.script import TrainingScriptArguments

    with pytest.raises(ValueError, match=r"belong together.*--eval_tasks hellaswag:100 --eval_tasks_steps 500"):
        TrainingScriptArguments(**given)


def test_one_task_may_be_written_without_a_list():
    from trl_ema.script import TrainingScriptArguments

    assert TrainingScriptArguments(eval_tasks="piqa:5", eval_tasks_steps=2.0).eval_tasks == ["piqa:5"]


def test_the_main_job_asks_tasks_and_prints_their_change(tiny_folder, tmp_path, manager, monkeypatch, capsys):
    monkeypatch.chdir(tiny_folder)
    monkeypatch.setattr("trl_ema.evaluation.runner.task_manager", lambda *_: manager)
    recipe = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "medical_ema.py"), run_name="recipe")
    options = {
        "model_name_or_path": "model", "dataset_name": "data.jsonl", "eval_fraction": 0.2, "use_cpu": "true", "bf16": "false",
        "max_steps": 3, "learning_rate": 2e-2, "report_to": "none", "max_length": 48, "save_strategy": "no", "measure": "false",
        "dtype": "float32", "eval_tasks_steps": 2, "output_dir": tmp_path / "out",
    }  # fmt: skip
    arguments = [str(x) for name, value in options.items() for x in (f"--{name}", value)]
    recipe["main"]([*arguments, "--eval_tasks", "chosen:6", "followed"])
    log = read_json(tmp_path / "out" / "metrics.json")["log"]
    assert [entry["step"] for entry in log if "task_chosen" in entry] == [0, 2, 3]
    printed = capsys.readouterr().out
    assert (
        changes_table(*(str(tmp_path / "out" / "tasks" / f"step-00000{n}") for n in (0, 3)), ["chosen", "followed"])
        in printed
    )
    with pytest.raises(ValueError, match="There is no task 'chosn'"):
        recipe["main"]([*arguments, "--eval_tasks", "chosn:6"])
