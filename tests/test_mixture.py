"""Several data sets in one training: which rows of which, in which order, with which labels."""

import itertools
import json
from collections import Counter
from dataclasses import asdict
from fractions import Fraction
from types import SimpleNamespace

import pytest
import trl
import yaml
from accelerate.data_loader import IterableDatasetShard
from conftest import adapter_weights, logged, rows
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import trl_ema
from trl.scripts.utils import DatasetConfig

from trl_ema import MeanTeacherConfig
from trl_ema.data import (
    DataPart,
    as_chat,
    load_split,
    mixed,
    mixture_counts,
    names_of_parts,
    rows_to_mix,
    tokenize_rows,
    without_held_out,
)
from trl_ema.data.mixture import pattern
from trl_ema.inputs import load_data, load_held_out, load_parts, training_sets
from trl_ema.measurement import samples_and_table
from trl_ema.options import changed
from trl_ema.script import TrainingScriptArguments, describe_run, parse, sources


# How many rows of which


@pytest.mark.parametrize(
    ("sizes", "fractions", "replay", "limit", "expected"),
    [
        ([100, 40], [None, None], None, None, [100, 40]),
        ([100, 40], [0.5, 0.5], None, None, [40, 40]),
        ([100, 40], [0.75, 0.25], None, None, [100, 33]),  # a third of a row
        ([100, 40], [0.3, 0.1], None, None, [100, 33]),  # parts of their sum
        ([100, 40], [0.9, 0.1], None, 50, [45, 5]),
        ([100, 40], [None, None], None, 70, [50, 20]),
        ([100, 40], [None, None], None, 700, [100, 40]),
        ([90, 500], [None], 0.1, None, [90, 10]),
        ([80, 500], [None], 0.1, None, [80, 9]),
        ([900, 500], [None], 0.1, 200, [180, 20]),
        ([900, 500], [None], 0.1, 2000, [900, 100]),
        ([100, 40, 500], [0.5, 0.5], 0.2, None, [40, 40, 20]),
        ([1000, 1000, 500], [0.7, 0.3], 0.1, 101, [64, 27, 10]),
    ],
)
def test_each_part_gives_its_share(sizes, fractions, replay, limit, expected):
    assert mixture_counts("abc"[: len(sizes)], sizes, fractions, replay, limit) == expected


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 500), st.integers(1, 100)), min_size=1, max_size=4), st.integers(0, 9))
def test_counts_are_within_a_row_of_their_shares_and_of_the_data(parts, replayed):
    sizes, weights = zip(*parts, strict=True)
    fractions, replay = [weight / 100 for weight in weights], replayed / 10 or None
    most = min(Fraction(size * sum(weights), weight) for size, weight in zip(sizes, weights, strict=True))
    shares = [int(most) * Fraction(weight, sum(weights)) for weight in weights]
    names, all_sizes = ["x"] * (len(parts) + bool(replay)), [*sizes, *[10**6] * bool(replay)]
    try:
        *own, last = [*mixture_counts(names, all_sizes, fractions, replay), *[0] * (not replay)]
    except ValueError as error:
        assert "The mixture would have no row of 'x'" in str(error)
        assert min(shares) < 1 or (replay and int(most) * replay / (1 - replay) <= 0.5)
        return
    assert min(own) > 0 and (last > 0) == bool(replay)
    total = sum(own)
    for count, size, weight in zip(own, sizes, weights, strict=True):
        assert count <= size and abs(count - total * weight / sum(weights)) < 1
    assert abs(last - (total + last) * (replay or 0)) <= 0.5 + 1e-9
    # No more were possible.
    assert any((total + 1) * weight > size * sum(weights) for size, weight in zip(sizes, weights, strict=True))


def test_a_mixture_has_the_rows_that_trl_gives_it(tmp_path):
    given = []
    for name, size, fraction in (("a", 60, 0.5), ("b", 50, 0.3), ("c", 40, 0.2)):
        Dataset.from_list([{"text": name}] * size).to_json(tmp_path / f"{name}.jsonl")
        given.append(DatasetConfig("json", data_files=str(tmp_path / f"{name}.jsonl"), fraction=fraction))
    theirs = Counter(trl.get_dataset(trl.DatasetMixtureConfig(given))["train"]["text"])
    assert [theirs[name] for name in "abc"] == mixture_counts("abc", [60, 50, 40], [0.5, 0.3, 0.2])


@pytest.mark.parametrize(
    ("sizes", "fractions", "replay", "limit", "message"),
    [
        ([100, 30], [0.5, 0.5], None, 100, "`max_train_samples=100` with these fractions takes 50 rows of 'b', which has 30 to "
         "train on. Ask for at most 60, change its `fraction`, or give more data."),
        ([90, 4], [None], 0.1, None, "`replay_fraction=0.1` beside 90 rows takes 10 rows of 'b', which has 4 to train on. Lower it "
         "to 0.042, train on fewer rows"),
        ([3, 1000], [0.9, 0.01], None, None, "The mixture would have no row of 'b': of its 3 rows the share of 'b' is less than one. "
         "Raise that share (`fraction`, or `replay_fraction` of what is replayed), give more rows of 'a' or lower its share, or leave "
         "'b' out."),
        ([9000, 9], [None, None], None, 100, "no row of 'b': of its 100 rows the share of 'b' is less than one. Raise that share "
         "(`fraction`, or `replay_fraction` of what is replayed), raise `max_train_samples=100`, or leave 'b' out."),
        ([4, 9], [None], 0.1, None, "no row of 'b': of its 4 rows the share of 'b' is less than one."),
        ([90, 0], [None, None], None, None, "No row of 'b' is left to train on. Look at its answers and at `max_length`."),
    ],
)  # fmt: skip
def test_fractions_that_exceed_the_data_are_refused(sizes, fractions, replay, limit, message):
    with pytest.raises(ValueError) as error:
        mixture_counts("ab", sizes, fractions, replay, limit)
    assert message in str(error.value)


def test_parts_are_called_after_their_files_and_never_alike():
    paths = ["data/med-quad.jsonl", "lavita/ChatDoctor-HealthCareMagic-100k", "other/med-quad.csv", "general.jsonl"]
    parts = [*map(DataPart, paths), DataPart("json", data_files="notes.jsonl"), None]
    assert names_of_parts(parts) == [
        "med_quad", "ChatDoctor_HealthCareMagic_100k", "med_quad_2", "general_2", "notes", "demo",
    ]  # fmt: skip


# In which order


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_no_part_of_a_pattern_is_a_row_ahead_and_each_round_is_exact(weights):
    total, taken = sum(weights), Counter()
    for number, part in enumerate(itertools.islice(pattern(weights), 3 * total), 1):
        taken[part] += 1
        assert taken[part] - number * weights[part] / total < 1
        if not number % total:
            assert [taken[i] for i in range(len(weights))] == [number // total * weight for weight in weights]


def labelled(name, n):
    return Dataset.from_list([{"input_ids": [i], "labels": [name]} for i in range(n)])


def test_a_mixture_is_the_same_again_and_by_seed_another():
    parts = labelled(1, 90), labelled(2, 30)
    first, again, other = (mixed(parts, "ab", [None], 0.1, seed=seed) for seed in (0, 0, 1))
    assert list(first) == list(again) != list(other)
    assert sorted(map(str, first)) == sorted(map(str, other))
    assert Counter(row["labels"][0] for row in first) == {1: 90, 2: 10}
    assert len({tuple(row["input_ids"]) for row in first if row["labels"] == [1]}) == 90


@pytest.mark.parametrize("kinds", ["sss", "sms"])
def test_a_stream_has_its_shares_from_the_beginning_and_ends_with_its_first_part(kinds):
    made = [labelled(i, n) for i, n in enumerate((500, 300, 60))]
    made = [one.to_iterable_dataset() if kind == "s" else one for one, kind in zip(made, kinds, strict=True)]
    stream = mixed(made, "abc", [0.5, 0.5], 0.1)
    assert isinstance(stream, IterableDataset)
    found = [row["labels"][0] for row in stream]
    for number in range(20, len(found), 20):
        assert Counter(found[:number]) == {0: 9 * number // 20, 1: 9 * number // 20, 2: number // 10}
    assert Counter(found)[2] == 60 and 600 <= len(found) < 610
    assert [row["labels"][0] for row in mixed(made, "abc", [0.5, 0.5], 0.1, limit=40)] == found[:40]


def test_the_ranks_of_a_stream_share_its_rows_and_a_resumed_one_goes_on_in_it():
    parts = [labelled(1, 90).to_iterable_dataset(), labelled(2, 10).to_iterable_dataset()]
    stream = mixed(parts, "ab", [None], 0.1)
    whole = list(stream)
    shards = [
        list(IterableDatasetShard(stream, batch_size=5, num_processes=2, process_index=rank)) for rank in range(2)
    ]
    batches = [shard[i : i + 5] for i in range(0, 50, 5) for shard in shards]
    assert list(itertools.chain(*batches)) == whole and Counter(row["labels"][0] for row in whole) == {1: 90, 2: 10}
    assert list(stream.skip(35)) == whole[35:]


# From files


@pytest.fixture
def files(tmp_path):
    """Rows of three kinds and one of columns that nobody knows."""
    rows(60).to_json(tmp_path / "answers.jsonl")
    rows(50, seed=1, kind="text").to_json(tmp_path / "notes.jsonl")
    rows(40, seed=2, kind="messages").to_json(tmp_path / "talks.jsonl")
    odd = [
        {"Frage": f"what is the {w}", "Antwort": f"{w} pain", "Nr.": 1} for w in ("liver", "skin", "bone", "vein") * 5
    ]
    Dataset.from_list([row | {"Antwort": f"{row['Antwort']} {i}"} for i, row in enumerate(odd)]).to_csv(
        tmp_path / "odd.csv"
    )
    return tmp_path


def arguments(files, *entries, **options):
    parts = [{"path": str(files / name), **more} for name, more in entries]
    return TrainingScriptArguments(datasets=parts, eval_fraction=0.2, **options)


def made(args, tokenizer, train_args):
    with changed(train_args, completion_only_loss=True):
        general = as_chat(rows(4, seed=9), tokenizer)
        return training_sets(load_parts(args, tokenizer), general, args, tokenizer, train_args)


def test_rows_of_several_kinds_have_the_labels_that_they_have_alone(files, tokenizer, make_trainer):
    names = ["answers.jsonl", "notes.jsonl", "talks.jsonl", "odd.csv"]
    columns = {"prompt": "Frage", "completion": "Antwort"}
    args = arguments(files, *((name, {"columns": columns} if name == "odd.csv" else {}) for name in names))
    trainer_args = make_trainer().args
    train, sets = made(args, tokenizer, trainer_args)
    alone = []
    for name in names:
        one = load_split(str(files / name), columns=columns if name == "odd.csv" else None)
        alone += list(tokenize_rows(as_chat(one, tokenizer), tokenizer, trainer_args.max_length))
    held_out = [row for name, rows_of in sets.items() if name not in ("domain", "general") for row in rows_of]
    assert sorted(map(str, [*train, *held_out])) == sorted(map(str, alone))
    assert list(sets) == ["domain", "general", "answers", "notes", "talks", "odd"]
    assert sorted(map(str, sets["domain"])) == sorted(map(str, held_out))
    assert all(
        labels[0] == ids[0]
        for ids, labels in zip(*map(sets["notes"].__getitem__, ("input_ids", "labels")), strict=True)
    )
    assert sets["answers"][0]["labels"][0] == -100 == sets["general"][0]["labels"][0]


def test_shares_are_of_rows_that_are_really_trained_on(files, tokenizer, make_trainer):
    """A prompt that fills `max_length` alone is dropped before shares are counted."""
    long = [{"prompt": "what " * 40, "completion": " pain"}, *rows(30, seed=5)]
    (files / "long.jsonl").write_text("\n".join(map(json.dumps, long)))
    args = TrainingScriptArguments(
        str(files / "long.jsonl"), eval_fraction=0.1, replay_dataset=str(files / "notes.jsonl"), replay_fraction=0.1
    )
    train, sets = made(args, tokenizer, make_trainer().args)
    own = len(sets["domain"])
    assert 27 <= 30 - own <= 28 and len(train) == 30 - own + 3 and list(sets) == ["domain", "general", "notes"]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mixture_trains_logs_each_part_and_goes_on_where_it_was(files, tokenizer, make_trainer, streaming):
    args = arguments(
        files, ("answers.jsonl", {"fraction": 0.6}), ("talks.jsonl", {"fraction": 0.4}), eval_samples=6,
        replay_dataset=str(files / "notes.jsonl"), replay_fraction=0.2, streaming=streaming,
    )  # fmt: skip
    options = dict(assistant_only_loss=True, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=4)
    args_of_training = make_trainer(**options | {"assistant_only_loss": False}, eval_dataset=rows(4)).args
    args_of_training.assistant_only_loss = True
    train, sets = made(args, tokenizer, args_of_training)
    with changed(args_of_training, assistant_only_loss=False):
        trainer = make_trainer(args=args_of_training, data=train, eval_dataset=sets)
    trainer.train()
    for name in ("domain", "general", "answers", "talks", "notes"):
        assert len(logged(trainer, f"eval_{name}_loss")) == 1
    expected = adapter_weights(trainer)
    train, sets = made(args, tokenizer, args_of_training)
    with changed(args_of_training, assistant_only_loss=False):
        again = make_trainer(args=args_of_training, data=train, eval_dataset=sets)
    again.train(resume_from_checkpoint=f"{args_of_training.output_dir}/checkpoint-2")
    assert all(weight.equal(expected[name]) for name, weight in adapter_weights(again).items())


def test_the_main_job_trains_on_a_mixture_and_tells_its_parts(files, tiny_folder):
    block = {
        "datasets": [
            {"path": str(files / "answers.jsonl"), "fraction": 0.8},
            {"path": str(files / "odd.csv"), "columns": {"prompt": "Frage", "completion": "Antwort"}, "fraction": 0.2},
        ],
        "replay_dataset": str(files / "talks.jsonl"), "replay_fraction": 0.25, "eval_fraction": 0.2, "max_train_samples": 40,
        "model_name_or_path": str(tiny_folder / "model"), "output_dir": str(files / "out"), "max_steps": 2, "max_length": 64,
        "use_cpu": True, "bf16": False, "report_to": "none", "generation_tokens": 2, "save_strategy": "no", "eval_samples": 4,
    }  # fmt: skip
    (files / "config.yaml").write_text(yaml.safe_dump(block))
    done = trl_ema("train", "--config", files / "config.yaml")
    assert done.stdout.startswith("40 training rows, 8 held out.") and "held-out loss, talks" in done.stdout
    metrics = json.loads((files / "out" / "metrics.json").read_text())
    assert {"domain", "general", "answers", "odd", "talks"} == metrics["student"].keys()
    assert len(metrics["generations"]) == 3 and metrics["provenance"]["data"].endswith("(replayed, 0.25 of all rows)")


def test_a_single_entry_of_datasets_is_that_data_set(files, tokenizer):
    args = arguments(files, ("answers.jsonl", {"fraction": 1.0}))
    assert not args.is_mixture
    alone = load_data(TrainingScriptArguments(str(files / "answers.jsonl"), eval_fraction=0.2), tokenizer)
    assert [list(side) for side in load_data(args, tokenizer)] == [list(side) for side in alone]


@pytest.mark.parametrize(("fraction", "replay"), [(0.3, {}), (0.3, {"replay_dataset": "old.jsonl"})])
def test_the_fraction_of_a_single_entry_is_said_to_be_ignored(tmp_path, fraction, replay):
    block = {"datasets": [{"path": "one.jsonl", "fraction": fraction}], "use_cpu": True, "bf16": False, **replay}
    config = str(tmp_path / "config.yaml")

    def read(**changes):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(block | changes))
        parse(["--config", config, "--model_name_or_path", "model", "--output_dir", str(tmp_path)])

    with pytest.warns(
        UserWarning, match=r"single entry of `datasets`, 'one.jsonl': `fraction=0.3`.*`max_train_samples`"
    ):
        read()
    for fits in (1.0, *([0.9] if replay else [])):
        read(datasets=[{"path": "one.jsonl", "fraction": fits}])


def test_it_is_said_of_each_data_set_what_it_is_measured_on(files, tokenizer, caplog):
    caplog.set_level("INFO")
    (files / "folder").mkdir()
    for seed, split in enumerate(("train", "test")):
        rows(20, seed=seed).to_json(files / "folder" / f"{split}.jsonl")
    load_parts(arguments(files, ("folder", {}), ("answers.jsonl", {})), tokenizer)
    assert f"Figures are measured on the split 'test' of {files}/folder." in caplog.messages
    assert f"{files}/answers.jsonl has no test split: some of its training rows are held out." in caplog.messages


def test_the_split_that_is_trained_on_is_not_measured_on(files, tokenizer):
    folder = files / "folder"
    folder.mkdir()
    for seed, split in enumerate(("train", "test")):
        rows(20, seed=seed).to_json(folder / f"{split}.jsonl")
    train, held_out = load_data(arguments(files, ("folder", {"split": "test"})), tokenizer)
    assert len(train) + len(held_out) == 20


def test_the_columns_of_a_single_file_can_be_told_on_the_command_line(files, tokenizer):
    asked = ["--dataset_name", str(files / "odd.csv"), "--dataset_columns", "prompt=Frage", "completion=Antwort"]
    args, *_ = parse([*asked, "--eval_fraction", "0.2", "--use_cpu", "true", "--bf16", "false"])
    train, held_out = load_data(args, tokenizer)
    assert len(train) + len(held_out) == 20 and train[0]["prompt"][0]["content"].startswith("what is the ")
    assert args.dataset_columns == {"prompt": "Frage", "completion": "Antwort"}


def test_a_list_of_columns_selects_as_in_trl(files):
    assert load_split(str(files / "answers.jsonl"), columns=["prompt", "completion"]).column_names == [
        "prompt",
        "completion",
    ]


def test_what_is_mixed_is_named_in_a_run(files):
    args = arguments(
        files, ("answers.jsonl", {"fraction": 0.5}), ("notes.jsonl", {"fraction": 0.5}), replay_dataset="old/rows"
    )
    told = sources(args, trl.ModelConfig("model"))["data"]
    assert (
        told
        == f"{files}/answers.jsonl (share 0.5), {files}/notes.jsonl (share 0.5), old/rows (replayed, 0.1 of all rows)"
    )


def test_held_out_rows_of_one_kind_are_measured_together_elsewhere(files, tokenizer):
    args = arguments(
        files, ("answers.jsonl", {}), ("odd.csv", {"columns": {"prompt": "Frage", "completion": "Antwort"}})
    )
    parts = load_parts(args, tokenizer)
    with changed(args, replay_dataset="gone.jsonl"):  # its rows are not of the domain
        found = load_held_out(args, tokenizer)
    assert len(found) == sum(len(part.held_out) for part in parts)
    with pytest.raises(ValueError, match=r"rows of different kinds \(\['completion', 'prompt'\]; \['text'\]\)"):
        load_held_out(arguments(files, ("answers.jsonl", {}), ("notes.jsonl", {})), tokenizer)
    with pytest.raises(ValueError, match="Use `load_parts` and `training_sets`"):
        load_data(args, tokenizer)


def test_columns_that_a_model_does_not_see_do_not_part_the_held_out_rows_of_a_mixture(files, tokenizer):
    numbered = rows(30, seed=4).map(lambda row, i: {"id": i, "source": "ward"}, with_indices=True)
    numbered.to_json(files / "numbered.jsonl")
    args = arguments(files, ("answers.jsonl", {}), ("numbered.jsonl", {}))
    found, parts = load_held_out(args, tokenizer), load_parts(args, tokenizer)
    assert parts[1].held_out.column_names == ["prompt", "completion", "id", "source"]
    expected = [row for part in parts for row in part.held_out.select_columns(["prompt", "completion"])]
    assert sorted(found.column_names) == ["completion", "prompt"] and len(found) == 18
    assert tokenize_rows(found, tokenizer)["labels"] == tokenize_rows(Dataset.from_list(expected), tokenizer)["labels"]


def test_rows_to_replay_need_no_split_of_the_name_that_figures_are_measured_on(files, tokenizer):
    folder = files / "folder"
    folder.mkdir()
    for seed, split in enumerate(("train", "validation")):
        rows(20, seed=seed).to_json(folder / f"{split}.jsonl")
    options = dict(dataset_test_split="validation", eval_fraction=0.2)
    args = TrainingScriptArguments(str(folder), replay_dataset=str(files / "notes.jsonl"), **options)
    own, replayed = load_parts(args, tokenizer)
    assert (len(own.train), len(own.held_out)) == (20, 20)
    assert (len(replayed.train), len(replayed.held_out)) == (40, 10)
    own, replayed = load_parts(TrainingScriptArguments(str(folder), replay_dataset=str(folder), **options), tokenizer)
    assert (len(replayed.train), len(replayed.held_out)) == (20, 20)  # where there is one it is taken
    with pytest.raises(ValueError, match="has no split 'validation', only 'train'"):
        load_parts(
            TrainingScriptArguments(str(files / "notes.jsonl"), replay_dataset=str(folder), **options), tokenizer
        )


# Rows that several of them have


def pairs(*given):
    return Dataset.from_list([{"prompt": p, "completion": c} for p, c in given])


@pytest.mark.parametrize("streaming", [False, True])
def test_what_one_data_set_holds_out_no_other_one_trains_on(tmp_path, tokenizer, caplog, streaming):
    (tmp_path / "cards").mkdir()
    own, held, others = list(rows(30)), list(rows(6, seed=1)), list(rows(20, seed=2))
    for name, found in (("cards/train", own), ("cards/test", held), ("talks", [*held[:4], *others, *own[:3]])):
        Dataset.from_list(found).to_json(tmp_path / f"{name}.jsonl")
    # As conversations, which the rows of the first data set become.
    talks = as_chat(load_split(str(tmp_path / "talks.jsonl")), tokenizer)
    talks = talks.map(lambda row: {"messages": row["prompt"] + row["completion"]}, remove_columns=talks.column_names)
    talks.to_json(tmp_path / "talks.jsonl")
    entries = ("cards", {"fraction": 0.5}), ("talks.jsonl", {"fraction": 0.5})
    cards, both = load_parts(arguments(tmp_path, *entries, streaming=streaming, eval_samples=6), tokenizer)
    questions = [[row["messages"][0]["content"] for row in side] for side in (both.train, both.held_out)]
    measured = [row["prompt"][0]["content"] for row in cards.held_out]
    assert sorted(measured) == sorted(row["prompt"] for row in held)
    assert len(list(cards.train)) == 30 - sum(row["prompt"] in questions[1] for row in own)
    assert not {*measured, *questions[1]} & {*questions[0]}
    assert {*questions[0], *questions[1], *measured} == {row["prompt"] for row in (*held, *own[:3], *others)}
    if streaming:
        assert both.shared == [] or [*both.shared[0]][:2] == ["held_out", "also_held_out"]
        return
    trained = sum(row["prompt"] in questions[0] for row in own[:3])
    left_out = 4 - sum(row["prompt"] in questions[1] for row in held[:4])
    first, *_, last = [entry for entry in both.shared if "also_held_out" not in entry]
    assert first == {"trained": "talks", "held_out": "cards", "rows": left_out, "of": len(questions[0]) + left_out}
    assert last == {"trained": "cards", "also_trained": "talks", "rows": trained, "of": len(questions[0])}
    assert (
        f"{left_out} of the {first['of']} training rows of 'talks' are left out: they are held out of 'cards', or"
        in caplog.text
    )
    assert f"{trained} of the {last['of']} training rows of 'talks' are training rows of 'cards' too" in caplog.text
    told = SimpleNamespace(
        train_dataset=[],
        args=MeanTeacherConfig(str(tmp_path), use_cpu=True, bf16=False),
        state=SimpleNamespace(global_step=0),
    )
    said = describe_run(told, arguments(tmp_path, *entries), trl.ModelConfig("model"), [cards, both])
    assert said["shared_rows"] == [*cards.shared, *both.shared]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_data_set_does_not_train_on_rows_that_its_own_test_split_repeats(tmp_path, tokenizer, caplog, streaming):
    own, held = list(rows(30)), list(rows(6, seed=1))
    for split, found in (("train", own), ("test", [*held, *own[:4]])):
        Dataset.from_list(found).to_json(tmp_path / f"{split}.jsonl")
    args = TrainingScriptArguments(str(tmp_path), dataset_streaming=streaming)
    (part,) = load_parts(args, tokenizer)
    assert sorted(row["prompt"][0]["content"] for row in part.train) == sorted(row["prompt"] for row in own[4:])
    assert len(part.held_out) == 10
    if streaming:
        return
    assert part.shared == [{"trained": part.name, "held_out": part.name, "rows": 4, "of": 30}]
    assert f"4 of the 30 training rows of {part.name!r} are left out: they are held out of" in caplog.text
    told = SimpleNamespace(
        train_dataset=[],
        args=MeanTeacherConfig(str(tmp_path), use_cpu=True, bf16=False),
        state=SimpleNamespace(global_step=0),
    )
    assert describe_run(told, args, trl.ModelConfig("model"), [part])["shared_rows"] == part.shared
    Dataset.from_list(own).to_json(tmp_path / "test.jsonl")
    with pytest.raises(ValueError, match="all of its 30 are held out too, .* another one with `--dataset_test_split`"):
        load_parts(args, tokenizer)


def test_questions_of_held_out_rows_are_no_other_ones_to_train_on_but_preambles_are():
    first = pairs(("q1", "a"), ("sum up", "b")), pairs(("q2", "c"), ("sum up", "d"))
    second = (
        pairs(("q2", "other"), ("sum up", "e"), ("sum up", "d"), ("q3", "c"), ("q1", "a")),
        pairs(("q4", "f"), ("q2", "c")),
    )
    (one, other), shared = without_held_out(["one", "other"], *zip(first, second, strict=True))
    assert list(one) == list(first[0])
    assert [*other["completion"]] == ["e", "c", "a"]
    assert shared == [
        [],
        [
            {"held_out": "one", "also_held_out": "other", "rows": 1, "of": 2},
            {"trained": "other", "held_out": "one", "rows": 2, "of": 5},
            {"trained": "one", "also_trained": "other", "rows": 1, "of": 3},
        ],
    ]
    texts = Dataset.from_dict({"text": ["a", "b"]}), Dataset.from_dict({"text": ["c"]})
    (_, left), _ = without_held_out(["one", "texts"], [first[0], texts[0]], [first[1], texts[1]])
    assert left is texts[0]  # which answer no question, all of them


def test_messages_are_the_same_whatever_keys_others_of_their_data_set_have():
    talks = [[{"role": "user", "content": q}, {"role": "assistant", "content": "yes"}] for q in ("pain", "fever")]
    named = [{"messages": [talks[0][0] | {"name": "Ann"}, talks[0][1]]}, {"messages": talks[1]}]
    plain, apart = Dataset.from_list([{"messages": one} for one in talks]), pairs(("q", "a"))
    train, held_out = [apart, Dataset.from_list(named)], [plain, pairs(("x", "y"))]
    (_, left), _ = without_held_out(["plain", "named"], train, held_out)
    assert len(left) == 1 and left[0]["messages"][0]["name"] == "Ann"


def test_a_data_set_that_another_one_holds_out_whole_is_refused():
    told = "No training row of 'copy' is left: all of its 1 are held out of another data set of the mixture"
    with pytest.raises(ValueError, match=told):
        without_held_out(
            ["own", "copy"], [pairs(("a", "b")), pairs(("c", "d"))], [pairs(("c", "d")), pairs(("e", "f"))]
        )


def test_parts_stand_in_the_table_of_figures():
    long = "ChatDoctor_HealthCareMagic_100k"
    figures = {
        who: {name: {"loss": 2.5, "kl_base_model": 0.1} for name in ("domain", "general", "notes", long)}
        for who in ("before", "student")
    }
    head, *_, notes, last = samples_and_table(figures | {"generations": []}).splitlines()[1:]
    assert notes == "held-out loss, notes" + " " * 26 + "    2.5000    2.5000"
    assert last == f"held-out loss, {long}    2.5000    2.5000" and len(head) == len(last)


# As they are written


def test_the_block_of_trl_is_read_from_yaml(files):
    block = {
        "datasets": [
            {"path": "json", "data_files": str(files / "answers.jsonl"), "fraction": 0.75},
            {"path": str(files / "odd.csv"), "columns": {"prompt": "Frage", "completion": "Antwort"}, "fraction": 0.25},
        ],
        "test_split_size": 0.1, "streaming": True, "use_cpu": True, "bf16": False,
    }  # fmt: skip
    (files / "config.yaml").write_text(yaml.safe_dump(block))
    args, training_args, _ = parse(["--config", str(files / "config.yaml")])
    assert [part.fraction for part in args.datasets] == [0.75, 0.25] and args.datasets[0].data_files.endswith(
        "answers.jsonl"
    )
    assert (args.eval_fraction, args.dataset_streaming, args.is_mixture) == (0.1, True, True)
    assert training_args.completion_only_loss is True
    # As `metrics.json` keeps them.
    again = TrainingScriptArguments(**json.loads(json.dumps(asdict(args))))
    assert again == args


def test_paths_can_be_mixed_on_the_command_line(files, tokenizer):
    args, *_ = parse(
        [
            "--datasets",
            *(str(files / f"{n}.jsonl") for n in ("answers", "notes")),
            f"{{path: {files / 'odd.csv'}, columns: {{prompt: Frage, completion: Antwort}}}}",
            "--use_cpu",
            "true",
            "--bf16",
            "false",
        ]
    )
    assert [part.name for part in load_parts(args, tokenizer)] == ["answers", "notes", "odd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(dataset_name="a", datasets=[{"path": "b"}]),
            "`dataset_name='a'` and `datasets` both say what is trained on",
        ),
        (
            dict(datasets=[{"fraction": 1}]),
            "An entry of `datasets` is {'fraction': 1}; expected a mapping with a `path`",
        ),
        (dict(datasets=[3]), "An entry of `datasets` is 3; expected a mapping with a `path`"),
        (
            dict(datasets=[{"path": "a", "fractoin": 1}]),
            "The entry 'a' of `datasets` has unknown keys ['fractoin']; known are",
        ),
        (dict(datasets=[{"path": "a", "fraction": 1.5}]), "`fraction` of 'a' must be in (0, 1], got 1.5"),
        (
            dict(datasets=[{"path": "a", "fraction": 0.5}, {"path": "b"}]),
            "'b' of `datasets` has no `fraction`, others have one",
        ),
        (
            dict(datasets=[{"path": "a"}, {"path": "b"}], streaming=True),
            "Streams of unknown size can be mixed by shares alone",
        ),
        (dict(replay_dataset="a", replay_fraction=1.0), "`replay_fraction` must be in (0, 1), got 1.0"),
        (dict(replay_fraction=0.2), "`replay_fraction=0.2`, but there is nothing to replay"),
        (dict(dataset_columns=["prompt=a"]), "`dataset_columns` is of a `dataset_name`, and none is given"),
        (dict(dataset_name="a", dataset_columns=["prompt"]), "`dataset_columns` is ['prompt']; expected pairs such as"),
        (dict(test_split_size=1.5), "`test_split_size=1.5` must be in (0, 1)"),
        (dict(test_split_size=0.1, eval_fraction=0.3), "not beside another `eval_fraction`"),
    ],
)
def test_options_of_a_mixture_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError) as error:
        TrainingScriptArguments(**options)
    assert message in str(error.value)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(files):
    path = str(files / "odd.csv")
    with pytest.raises(
        ValueError, match=r"odd.csv has no column 'frage', only \['Antwort', 'Frage', 'Nr.'\]. Correct `columns`"
    ):
        load_split(path, columns={"prompt": "frage", "completion": "Antwort"})
    with pytest.raises(ValueError, match="odd.csv names a column twice"):
        load_split(path, columns={"prompt": "Frage", "completion": "Frage"})
    with pytest.raises(ValueError) as error:
        load_split(path)
    assert "Unknown data set columns ['Antwort', 'Frage', 'Nr.']" in str(error.value)
    assert "question, answer" in str(error.value).replace("answer, question", "question, answer")
    assert "`trl_ema.data.load_split(path, columns={'prompt': 'YOURS', 'completion': 'YOURS'})`" in str(error.value)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"prompt": "Frage"},
            "has `prompt` and no `completion`. Its columns are ['Antwort', 'Frage', 'Nr.']: say which",
        ),
        (
            {"completion": "Antwort"},
            "has `completion` and no `prompt`. Its columns are ['Antwort', 'Frage', 'Nr.']: say",
        ),
        (
            {"body": "Frage"},
            "has `body` and no `prompt` and `completion`, no `messages` and no `text`. Its columns are [",
        ),
        (["Frage", "Nr."], "has `Frage`, `Nr.` and no `prompt` and `completion`, no `messages` and no `text`. Its"),
    ],
)
def test_a_mapping_that_lacks_a_column_is_refused_with_those_that_are_there(files, told, message):
    path = str(files / "odd.csv")
    with pytest.raises(ValueError) as error:
        load_split(path, columns=told, option="dataset_name")
    assert f"`dataset_columns` of {path} {message}" in str(error.value)
    assert "`--dataset_columns prompt=YOURS completion=YOURS`, or `text` alone for plain texts." in str(error.value)
    assert load_split(path, columns={"text": "Frage"}).column_names == ["text"]


def test_a_row_that_cannot_be_tokenized_is_named_and_of_a_stream_raised(tokenizer, make_trainer):
    tokenizer.chat_template = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' else 'what' }}"
    bad = Dataset.from_list([{"messages": [{"role": "system", "content": "a"}]}])
    args = make_trainer(data=rows(8, kind="text")).args
    with pytest.raises(ValueError, match="Row 0 cannot be tokenized"):
        rows_to_mix(bad, tokenizer, args)
    with pytest.raises(Exception, match="no system turn"):
        list(rows_to_mix(bad.to_iterable_dataset(), tokenizer, args))


def test_a_template_of_another_model_is_refused_in_a_mixture(files, tokenizer, make_trainer):
    args = arguments(files, ("answers.jsonl", {}), ("notes.jsonl", {}))
    training_args = make_trainer().args
    for option, message in (
        ({"chat_template_path": "some/model"}, "`chat_template_path='some/model'` is no .jinja file"),
        ({"eos_token": "<none>"}, "`eos_token='<none>'` is no token of the model"),
    ):
        with changed(training_args, **option), pytest.raises(ValueError, match=message):
            made(args, tokenizer, training_args)
