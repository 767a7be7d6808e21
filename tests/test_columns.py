"""Files whose columns have names of their own: in every command and option that reads rows, and in what is said of them."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import rows
from datasets import Dataset
from test_cli import trl_ema
from test_going_on import QUICK
from transformers import AutoTokenizer
from trl import ModelConfig

from trl_ema import MeanTeacherConfig
from trl_ema.cli import EvaluationArguments, _held_out_text
from trl_ema.comparison.run import _Evaluator
from trl_ema.data import as_chat, held_out_split, load_split, rows_digest, tokenize_rows
from trl_ema.evaluation.drift import sampled_rows, tokenized_batches
from trl_ema.evaluation.settings import Suite
from trl_ema.export import ExportArguments
from trl_ema.files import read_json, write_json, write_jsonl
from trl_ema.inputs import as_trained_with, held_out_rows, load_held_out, load_parts
from trl_ema.regularizers.given_texts import given_texts
from trl_ema.script import TrainingScriptArguments, describe_run, options_of_run, parse
from trl_ema.tune_scale import ScaleArguments


COLUMNS = {"prompt": "Frage", "completion": "Antwort"}
PAIRS = ["prompt=Frage", "completion=Antwort"]


def write_odd(path, names=("Frage", "Antwort"), n=20, seed=0):
    """Questions and answers in columns with these names, and one more."""
    given = rows(n, seed=seed)
    columns = dict(zip(names, (given["prompt"], given["completion"]), strict=True))
    Dataset.from_dict({"Nr.": list(range(n))} | columns).to_csv(path)
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("odd")
    write_odd(folder / "odd.csv")
    write_odd(folder / "old.csv", ("Q.", "A."), 30, seed=1)
    Dataset.from_dict({"Body": rows(12, seed=2, kind="text")["text"]}).to_csv(folder / "general.csv")
    return folder


def replayed(files):
    return {"path": str(files / "old.csv"), "columns": {"prompt": "Q.", "completion": "A."}}


def rehearsed(files):
    return {"path": str(files / "general.csv"), "columns": {"text": "Body"}}


def config(files, **options):
    return MeanTeacherConfig(str(files / "out"), use_cpu=True, bf16=False, rehearsal_weight=1.0, **options)


@pytest.fixture(scope="module")
def run(files, tiny_folder):
    """Trained on such a file, with further ones replayed and rehearsed, all on the command line."""
    out = files / "run"
    trl_ema(
        "train", *QUICK, "--model_name_or_path", tiny_folder / "model", "--teacher", "none", "--output_dir", out,
        "--dataset_name", files / "odd.csv", "--dataset_columns", *PAIRS, "--replay_dataset", json.dumps(replayed(files)),
        "--rehearsal_weight", 1, "--rehearsal_dataset", json.dumps(rehearsed(files)), "--rehearsal_num_tokens", 16,
    )  # fmt: skip
    return out


# What a run was told its commands know


def test_a_run_is_evaluated_on_the_rows_that_it_held_out(run, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ema.evaluation.tasks.task_manager", lambda *_: None)
    monkeypatch.setattr("trl_ema.evaluation.tasks.is_offline", lambda _: True)
    monkeypatch.setattr("trl_ema.cli._settings_of_tasks", lambda *_: {})
    trl_ema(
        "evaluate", "--model", run, "--held_out_of", run, "--dtype", "float32", "--generation_tokens", 0, "--output_dir", tmp_path
    )  # fmt: skip
    metrics = read_json(run / "metrics.json")
    found, expected = read_json(tmp_path / "text.json"), metrics["student"]
    held_out = held_out_rows(str(run), options_of_run(str(run)))
    assert metrics["provenance"]["held_out_digest"] == rows_digest([held_out])
    for text in ("domain", "general"):
        assert found[text]["tokens"] == expected[text]["tokens"] > 0
        for figure in ("loss", "kl_base_model"):
            assert found[text][figure] == pytest.approx(expected[text][figure], rel=1e-4)


def test_a_model_without_a_tokenizer_of_its_own_has_the_rows_as_the_run_had_them(tiny_folder, tmp_path, monkeypatch):
    """The base, in the template and with the end of answers that the run was trained with: its own would give other tokens."""
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    end = next(token for token in sorted(tokenizer.get_vocab()) if token != tokenizer.eos_token and token.isalpha())
    rows_of = [[{"role": r, "content": f"{r} the drug {i}"} for r in ("user", "assistant")] for i in range(12)]
    write_jsonl("rows.jsonl", [{"messages": one} for one in rows_of])
    Path("own.jinja").write_text("{% for m in messages %}the fever {{ m['content'] }} the skin {% endfor %}")
    args, settings, _ = parse(
        [*map(str, QUICK), "--model_name_or_path", str(tiny_folder / "model"), "--dataset_name", "rows.jsonl", "--output_dir", "run",
         "--chat_template_path", "own.jinja", "--eos_token", end]
    )  # fmt: skip
    told = SimpleNamespace(train_dataset=[], args=settings, state=SimpleNamespace(global_step=0))
    model_args = ModelConfig(model_name_or_path=str(tiny_folder / "model"))
    write_json("run/metrics.json", {"provenance": describe_run(told, args, model_args)})
    asked = EvaluationArguments(held_out_of="run", generation_tokens=0)
    before = tokenizer.chat_template
    found = _held_out_text(asked, tokenizer, None)
    assert (tokenizer.chat_template, found.tokenizer.eos_token) == (before, end) and tokenizer.eos_token != end
    trained = AutoTokenizer.from_pretrained(tiny_folder / "model")
    as_trained_with(trained, settings)
    expected = tokenized_batches(load_parts(args, tokenizer)[0].held_out, trained, 48, settings=settings)
    own = tokenized_batches(load_parts(args, tokenizer)[0].held_out, tokenizer, 48, settings=settings)
    for ours, theirs, other in zip(found.batches["domain"], expected, own, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert other["input_ids"].tolist() != theirs["input_ids"].tolist()
    # The file is gone, and the run has what was in it; a model without that token ends answers in its own way.
    Path("own.jinja").rename("run/chat_template.jinja")
    path = Path("run/metrics.json")
    path.write_text(path.read_text().replace(f'"eos_token": "{end}"', '"eos_token": "<none>"'))
    again = _held_out_text(asked, tokenizer, None)
    assert again.tokenizer.chat_template == trained.chat_template and again.tokenizer.eos_token == tokenizer.eos_token


def test_rows_that_have_changed_since_are_not_taken_for_those_that_were_held_out(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = [{"prompt": f"the drug {i}", "completion": f"the skin {i}"} for i in range(60)]
    write_jsonl("rows.jsonl", given)
    write_jsonl("notes.jsonl", [{"prompt": f"the fever {i}", "completion": f"the lung {i}"} for i in range(9)])
    model = str(tiny_folder / "model")
    named = ["--dataset_name", "rows.jsonl", "--replay_dataset", "notes.jsonl", "--output_dir", "out"]
    single, settings, model_args = parse([*map(str, QUICK), "--model_name_or_path", model, *named])
    both = replace(single, dataset_name=None, datasets=["notes.jsonl", "rows.jsonl"])
    stream = replace(single, dataset_streaming=True)  # of its first rows
    for name, args in (("one", single), ("two", both), ("stream", stream)):
        told = SimpleNamespace(train_dataset=[], args=settings, state=SimpleNamespace(global_step=0))
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
        for folder, parts in ((name, load_parts(args, tokenizer)), (f"{name}, older", None)):
            write_json(f"{folder}/metrics.json", {"provenance": describe_run(told, args, model_args, parts)})
        assert held_out_rows(name, options_of_run(name))[:] == load_held_out(args, tokenizer)[:]
    write_jsonl(
        "rows.jsonl", [*given, *({"prompt": f"the cough {i}", "completion": f"the skin {i}"} for i in range(40))]
    )
    for name in ("one", "two"):
        with pytest.raises(
            ValueError, match="cannot be found again: the data has changed since .* Give rows with `--dataset_name`"
        ):
            held_out_rows(name, options_of_run(name))
        assert len(held_out_rows(f"{name}, older", options_of_run(f"{name}, older")))  # which nothing is known of
    assert len(held_out_rows("stream", options_of_run("stream"))) == 6


def test_a_run_is_exported_and_tuned_on_the_rows_that_it_held_out_or_on_such_a_file(run, files, tmp_path):
    _, held_out = held_out_split(load_split(str(files / "odd.csv"), columns=COLUMNS), 0.2)
    named = ["--dataset_name", files / "odd.csv", "--dataset_columns", *PAIRS]
    for name, more, expected in (("own", [], len(held_out)), ("named", named, 20)):
        done = trl_ema("export", run, *more, "--max_kl", 100, "--output_dir", tmp_path / name)
        assert f" on {expected + (0 if more else 48)} rows (" in done.stdout  # with the general ones, of so few
        other = ["--drift_dataset", json.dumps(replayed(files))] if more else []
        trl_ema("tune-scale", run, "--scales", 1, *more, *other, "--output_dir", tmp_path / "scaled" / name)
        counts = read_json(tmp_path / "scaled" / name / "scale.json")["rows"]
        assert counts == {"held out": expected, "general": 48} | ({"yours": 30} if more else {})


def test_the_card_of_a_run_names_what_was_rehearsed_without_its_folder(run):
    assert "| `rehearsal_dataset` | general.csv |" in (run / "README.md").read_text()


# Each option that names rows


def test_named_rows_are_the_same_in_every_command(files, tokenizer):
    expected = as_chat(load_split(str(files / "odd.csv"), columns=COLUMNS), tokenizer)
    for command in (EvaluationArguments, ExportArguments, ScaleArguments):
        args = command(dataset_name=str(files / "odd.csv"), dataset_columns=PAIRS)
        assert args.dataset_columns == COLUMNS
        found = sampled_rows(args, tokenizer)
        assert found.column_names == ["prompt", "completion"] and sorted(map(str, found)) == sorted(map(str, expected))
        with pytest.raises(ValueError, match="`dataset_columns` is of a `dataset_name`, and none is given"):
            command(dataset_columns=PAIRS)


def test_a_configuration_of_the_hub_is_asked_for(tokenizer, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "trl_ema.data.loading.load_dataset",
        lambda *names, **_: asked.append(names) or {"dev": rows(4), "train": rows(5)},
    )
    of_parquet = SimpleNamespace(info=SimpleNamespace(builder_name="parquet"))
    monkeypatch.setattr("trl_ema.data.loading.load_dataset_builder", lambda *_, **__: of_parquet)
    args = ScaleArguments(
        dataset_name="some/data", dataset_config="de", dataset_split="dev", drift_dataset="other/data"
    )
    # A further data set has a split of its own.
    assert len(sampled_rows(args, tokenizer)) == 4 and len(sampled_rows(args, tokenizer, "drift_dataset")) == 5
    args.drift_dataset = "{path: other/data, name: en, split: dev}"
    assert len(sampled_rows(args, tokenizer, "drift_dataset")) == 4
    assert asked == [("some/data", "de"), ("other/data", None), ("other/data", "en")]


@pytest.mark.parametrize("as_text", [False, True])
def test_rows_to_replay_and_texts_to_rehearse_are_told_their_columns(files, tokenizer, as_text):
    written = (lambda entry: str(entry)) if as_text else dict
    args = TrainingScriptArguments(
        str(files / "odd.csv"), dataset_columns=PAIRS, replay_dataset=written(replayed(files))
    )
    last = load_parts(args, tokenizer)[-1]
    assert last.replayed and last.name == "old" and len(last.train) + len(last.held_out) == 30
    again = TrainingScriptArguments(**json.loads(json.dumps(asdict(args))))  # as `metrics.json` keeps them
    assert again.parts == args.parts
    options = ["--rehearsal_weight", "1", "--rehearsal_dataset", json.dumps(rehearsed(files)), "--use_cpu", "true"]
    options = parse([*options, "--bf16", "false"])[1] if as_text else config(files, rehearsal_dataset=rehearsed(files))
    found = given_texts(options.rehearsal_dataset, options, tokenizer)
    assert found.ids == tokenize_rows(rows(12, seed=2, kind="text"), tokenizer)["input_ids"]


def evaluator(suite, args, tiny_folder):
    model_args = ModelConfig(str(tiny_folder / "model"))
    training_args = MeanTeacherConfig("out", use_cpu=True, bf16=False)
    return _Evaluator(SimpleNamespace(suite=suite, stages=()), [(args, training_args, model_args)], None)


def test_further_texts_of_a_comparison_are_told_their_columns(files, tiny_folder):
    suite = Suite(drift_data={"old": replayed(files)}, generation_tokens=0)
    args = TrainingScriptArguments(str(files / "odd.csv"), dataset_columns=PAIRS)
    assert len(evaluator(suite, args, tiny_folder).rows["others"]["old"]) == 30


def test_a_column_of_ours_is_told_once(files):
    for command in (EvaluationArguments, TrainingScriptArguments):
        with pytest.raises(
            ValueError, match="`dataset_columns` names two columns as 'prompt': .*Give each of ours once"
        ):
            command(dataset_name=str(files / "odd.csv"), dataset_columns=["prompt=Frage", "prompt=Antwort"])


# Options of rows that are not read beside others


ROWS = {"dataset_split": "test", "dataset_config": "en", "drop_incomplete_rows": True}
SAID = "`dataset_config='en'`, `dataset_split='test'`"
NOT_READ = [
    (EvaluationArguments, ROWS | {"held_out_of": "R"}, f"`held_out_of='R'`: {SAID}, `drop_incomplete_rows=True`."),
    (EvaluationArguments, ROWS, f"`dataset_name=None`: {SAID}, `drop_incomplete_rows=True`."),
    (EvaluationArguments, {"backend": "vllm", "batch_size": 4}, "`backend='vllm'`: `batch_size=4`."),
    (ScaleArguments, ROWS | {"seed": 2}, f"`dataset_name=None`: {SAID}, `drop_incomplete_rows=True`, `seed=2`."),
    (ScaleArguments, ROWS | {"drift_dataset": "x"}, f"`dataset_name=None`: {SAID}."),
    (
        TrainingScriptArguments,
        {"datasets": ["a", "b"], "dataset_config": "en", "dataset_train_split": "foo"},
        "`datasets` of 2: `dataset_config='en'`, `dataset_train_split='foo'`.",
    ),
    (TrainingScriptArguments, {"dataset_config": "en"}, "`dataset_name=None`: `dataset_config='en'`."),
    (TrainingScriptArguments, {"eval_tasks_include_path": "x"}, "`eval_tasks=None`: `eval_tasks_include_path=['x']`."),
]  # fmt: skip


@pytest.mark.parametrize(("command", "options", "message"), NOT_READ)
def test_options_of_rows_that_are_not_read_are_named(command, options, message):
    with pytest.warns(UserWarning) as warned:
        command(**options)
    assert [str(one.message) for one in warned] == [f"Ignored with {message}"] and warned[0].filename == __file__


def test_options_of_rows_that_are_read_are_not_said_to_be_ignored():
    for command in (EvaluationArguments, ScaleArguments):
        command(dataset_name="x", seed=2, dataset_samples=3, **ROWS)
    ScaleArguments(drift_dataset="x", seed=2, dataset_samples=3, drop_incomplete_rows=True)
    EvaluationArguments(batch_size=4, seed=2)
    TrainingScriptArguments("x", dataset_config="en", dataset_train_split="foo")
    TrainingScriptArguments(eval_tasks=["a"], eval_tasks_steps=1, eval_tasks_include_path=["x"])


# What is said of columns names the option that the user gave


def wrong(entry):
    return entry | {"columns": {"prompt": "Frage", "completion": "Replik"}}


def reader(option, given, files, tokenizer, tiny_folder):
    """Reads `given`, a path or an entry, as the value of this option."""
    path, columns = (given, None) if isinstance(given, str) else (given["path"], given["columns"])
    own = dict(dataset_name=str(files / "odd.csv"), dataset_columns=PAIRS)
    named = dict(dataset_name=path, dataset_columns=columns)
    return {
        "train": lambda: load_parts(TrainingScriptArguments(**named), tokenizer),
        "evaluate": lambda: _held_out_text(EvaluationArguments(**named, generation_tokens=0), tokenizer, None),
        "export": lambda: sampled_rows(ExportArguments(**named), tokenizer),
        "datasets": lambda: load_parts(TrainingScriptArguments(datasets=[given]), tokenizer),
        "replay_dataset": lambda: load_parts(TrainingScriptArguments(**own, replay_dataset=given), tokenizer),
        "rehearsal_dataset": lambda: given_texts(given, config(files, rehearsal_dataset=given), tokenizer),
        "drift_dataset": lambda: sampled_rows(ScaleArguments(drift_dataset=given), tokenizer, "drift_dataset"),
        "drift_data": lambda: evaluator(Suite(drift_data={"x": given}, generation_tokens=0), TrainingScriptArguments(**own), tiny_folder),
    }[option]  # fmt: skip


OF_A_NAME = ["train", "evaluate", "export"]
OF_ENTRIES = ["datasets", "replay_dataset", "rehearsal_dataset", "drift_dataset", "drift_data"]


@pytest.mark.parametrize("option", OF_A_NAME + OF_ENTRIES)
def test_columns_that_are_not_known_or_not_there_are_told_by_the_option(files, tokenizer, tiny_folder, option):
    path = str(files / "odd.csv")
    with pytest.raises(ValueError) as error:
        reader(option, path, files, tokenizer, tiny_folder)()
    how = "`--dataset_columns prompt=YOURS completion=YOURS`"
    if option in OF_ENTRIES:
        how = f"`{{path: ..., columns: {{prompt: YOURS, completion: YOURS}}}}` in `{option}`"
    assert f"Unknown data set columns ['Antwort', 'Frage', 'Nr.'] in {path}. Expected a TRL format" in str(error.value)
    assert str(error.value).endswith(f"or say which is which: {how}.")
    with pytest.raises(ValueError) as error:
        reader(option, wrong({"path": path}), files, tokenizer, tiny_folder)()
    told_in = f"`columns` in `{option}`" if option in OF_ENTRIES else "`dataset_columns`"
    assert f"has no column 'Replik', only ['Antwort', 'Frage', 'Nr.']. Correct {told_in}." in str(error.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "`replay_dataset` is 3; expected a mapping with a `path` (hub name or file), such as `{path: data.csv, columns: {"),
        ("{path: [}", "`replay_dataset` is '{path: [}'; expected a mapping with a `path`"),
        ({"columns": COLUMNS}, "; expected a mapping with a `path`"),
        ({"path": "a", "colums": COLUMNS}, "The entry 'a' of `replay_dataset` has unknown keys ['colums']; known are ['path', 'name'"),
        ({"path": "a", "fraction": 0.5}, "The entry 'a' of `replay_dataset` has unknown keys ['fraction']"),
        ({"path": "a", "columns": "Frage"}, "`columns` of 'a' in `replay_dataset` is 'Frage'; expected which is which"),
        ({"path": "a", "columns": {"prompt": 3}}, "`columns` of 'a' in `replay_dataset` is {'prompt': 3}; expected which"),
    ],
)  # fmt: skip
def test_an_entry_that_is_none_is_refused(given, message):
    with pytest.raises(ValueError) as error:
        TrainingScriptArguments(replay_dataset=given)
    assert message in str(error.value)


def test_an_entry_of_the_configuration_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match=r"`rehearsal_dataset` has unknown keys \['column'\]"):
        MeanTeacherConfig(
            "out", use_cpu=True, bf16=False, rehearsal_weight=1.0, rehearsal_dataset={"path": "a", "column": []}
        )


def test_which_rows_to_evaluate_on_is_said_once(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`held_out_of='run'` and `dataset_name='x'` both say which rows are measured"):
        EvaluationArguments(held_out_of="run", dataset_name="x")
    with pytest.raises(ValueError, match="Leave out `held_out_of` or `backend`"):
        EvaluationArguments(held_out_of="run", backend="vllm")
    args = EvaluationArguments(held_out_of=str(tmp_path), generation_tokens=0)
    with pytest.raises(ValueError, match="does not tell what it held out: .* Give rows with `--dataset_name`"):
        _held_out_text(args, tokenizer, None)
