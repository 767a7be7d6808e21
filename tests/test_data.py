import gzip
import json
from collections import Counter
from types import SimpleNamespace

import pandas as pd
import pytest
from conftest import rows
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from trl_ema.data import (
    FORMATS,
    IncompleteRowsError,
    NoAnswersError,
    as_chat,
    as_conversation,
    check_columns,
    held_out_split,
    load_rows,
    loading,
    to_prompt_completion,
)
from trl_ema.data.faults import FILE_FORMATS
from trl_ema.inputs import load_data, load_held_out
from trl_ema.script import TrainingScriptArguments


# One row each, in the columns of the hub.
MEDICAL_O1 = {
    "Question": "Which hormone is lacking in Addison's disease?",
    "Complex_CoT": "The adrenal cortex fails, so...",
    "Response": "Cortisol, and often aldosterone.",
}
MEDMCQA = {
    "id": "e9ad821a-c438-4965-9f77-760819dfa155",
    "question": "Chronic urethral obstruction due to benign prostatic hyperplasia can lead to",
    "opa": "Hyperplasia",
    "opb": "Hyperophy",
    "opc": "Atrophy",
    "opd": "Dyplasia",
    "cop": 2,
    "choice_type": "single",
    "exp": "Increased pressure causes atrophy.",
    "subject_name": "Anatomy",
    "topic_name": "Urinary tract",
}
MEDMCQA_QUESTION = f"{MEDMCQA['question']}\nA. Hyperplasia\nB. Hyperophy\nC. Atrophy\nD. Dyplasia"
MEDQA = {
    "question": "A pregnant woman has burning on urination. What is the best treatment?",
    "answer": "Nitrofurantoin",
    "options": {"A": "Ampicillin", "B": "Ceftriaxone", "C": "Doxycycline", "D": "Nitrofurantoin"},
    "meta_info": "step2&3",
    "answer_idx": "D",
    "metamap_phrases": ["pregnant woman", "burning", "urination"],
}
PUBMEDQA = {
    "pubid": 21645374,
    "question": "Do mitochondria play a role in remodelling lace plant leaves during programmed cell death?",
    "context": {
        "contexts": ["Programmed cell death is regulated.", "The following paper elucidates it."],
        "labels": ["BACKGROUND", "RESULTS"],
        "meshes": ["Mitochondria"],
        "reasoning_required_pred": ["y"],
        "reasoning_free_pred": ["y"],
    },
    "long_answer": "Results depicted mitochondrial dynamics in vivo.",
    "final_decision": "yes",
}
FLASHCARD = {
    "instruction": "Answer this question truthfully",
    "input": "What is ptosis?",
    "output": "Ptosis is a drooping eyelid.",
}
MEDQUAD = {"question": "What causes gout?", "answer": "Crystals of uric acid.", "qtype": "causes"}

MAPPED = {
    "medical-o1": (MEDICAL_O1, MEDICAL_O1["Question"], MEDICAL_O1["Response"]),
    "medmcqa": (MEDMCQA, MEDMCQA_QUESTION, "C. Atrophy\nIncreased pressure causes atrophy."),
    "medmcqa without explanation": (MEDMCQA | {"exp": None}, MEDMCQA_QUESTION, "C. Atrophy"),
    "medqa": (
        MEDQA,
        f"{MEDQA['question']}\nA. Ampicillin\nB. Ceftriaxone\nC. Doxycycline\nD. Nitrofurantoin",
        "D. Nitrofurantoin",
    ),
    "pubmedqa": (
        PUBMEDQA,
        f"Programmed cell death is regulated.\nThe following paper elucidates it.\n\n{PUBMEDQA['question']}",
        "Yes. Results depicted mitochondrial dynamics in vivo.",
    ),
    "flashcards": (FLASHCARD, "Answer this question truthfully\n\nWhat is ptosis?", "Ptosis is a drooping eyelid."),
    "alpaca without input": (FLASHCARD | {"input": ""}, "Answer this question truthfully", FLASHCARD["output"]),
    "question and answer": (MEDQUAD, "What causes gout?", "Crystals of uric acid."),
}
CONVERSATION = [{"role": "user", "content": "What is ptosis?"}, {"role": "assistant", "content": "A drooping eyelid."}]


# Formats


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("streaming", [False, True])
def test_known_format_becomes_prompt_and_completion(name, streaming):
    row, prompt, completion = MAPPED[name]
    dataset = Dataset.from_list([row, row])
    converted = to_prompt_completion(dataset.to_iterable_dataset() if streaming else dataset)
    assert isinstance(converted, IterableDataset) == streaming
    assert list(converted) == [{"prompt": prompt, "completion": completion}] * 2


def test_every_known_format_is_tested():
    # The first whose columns are all there, as the module chooses.
    taken = {
        next(i for i, (needed, _) in enumerate(FORMATS.values()) if needed <= set(row)) for row, *_ in MAPPED.values()
    }
    assert taken == set(range(len(FORMATS)))


@pytest.mark.parametrize("cop", [-1, None])
def test_medmcqa_rows_without_an_answer_are_refused(cop):
    with pytest.raises(ValueError, match=f"no answer .`cop={cop}`.; expected 0 to 3.* use `train` or `validation`"):
        to_prompt_completion(Dataset.from_list([MEDMCQA | {"cop": cop}]))


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Ptosis is a drooping eyelid."},
        {"messages": CONVERSATION},
        {"conversations": [{"from": "human", "value": "What is ptosis?"}]},
        {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]},
        {"input_ids": [1, 2, 3]},
        # Also has the columns of a known format.
        {"prompt": "What is ptosis?", "completion": "A drooping eyelid.", "question": "?", "answer": "!"},
    ],
)
def test_trl_formats_come_back_unchanged(row):
    dataset = Dataset.from_list([row])
    assert to_prompt_completion(dataset) is dataset
    check_columns(set(dataset.column_names))


def test_unknown_columns_error_lists_what_is_known():
    with pytest.raises(ValueError) as error:
        to_prompt_completion(Dataset.from_list([{"query": "?", "reply": "!"}]))
    assert "['query', 'reply']" in str(error.value)
    assert "`messages`; `prompt`, `completion`; `text`" in str(error.value)
    assert "Rename your columns" in str(error.value)
    for name, (needed, _) in FORMATS.items():
        assert f"{', '.join(sorted(needed))} ({name})" in str(error.value)


@pytest.mark.parametrize(
    ("columns", "mend"),
    [({"query", "reply"}, "pass a `formatting_func`"), ({"question", "answer"}, "`trl_ema.data.to_prompt_completion")],
)
def test_columns_that_trl_cannot_train_on_are_refused_with_a_mend(columns, mend):
    with pytest.raises(ValueError, match=r"The eval data set has columns \['.*expected `messages`.*`body`") as error:
        check_columns(columns, "eval", text_field="body")
    assert mend in str(error.value)


def test_own_text_field_is_a_trl_format():
    check_columns({"body"}, text_field="body")
    with pytest.raises(ValueError, match="columns"):
        check_columns({"body"})


@pytest.mark.parametrize("stream", [False, True])
def test_plain_rows_become_chats_where_the_tokenizer_has_a_template(tokenizer, stream):
    def chats(dataset):
        return as_chat(dataset.to_iterable_dataset() if stream else dataset, tokenizer)

    plain = Dataset.from_list([{"prompt": "What is ptosis?", "completion": "A drooping eyelid."}])
    assert list(chats(plain)) == [{"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}]
    others = [{"messages": CONVERSATION}, {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}, {"text": "a"}]
    for row in others:
        assert list(chats(Dataset.from_list([row]))) == [row]
    tokenizer.chat_template = None
    assert list(chats(plain)) == list(plain)


def test_conversation_has_a_user_and_an_assistant_message():
    (row,) = as_conversation(Dataset.from_list([{"prompt": "What is ptosis?", "completion": "A drooping eyelid."}]))
    assert row == {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}


# What is no data set


NO_DATA_SETS = {
    "DatasetDict": (lambda r: DatasetDict(train=r, test=r), "a `DatasetDict` of ['train', 'test']", "dataset['train']"),
    "IterableDatasetDict": (lambda r: IterableDatasetDict(a=r.to_iterable_dataset()), "of ['a']", "dataset['a']"),
    "dict of data sets": (lambda r: {"train": r}, "a `dict` of ['train']", "dataset['train']"),
    "dict of columns": (Dataset.to_dict, "a `dict` of ['prompt', 'completion']", "Dataset.from_dict"),
    "DataFrame": (Dataset.to_pandas, "`DataFrame`", "Dataset.from_pandas"),
    "Table": (lambda r: r.data.table, "`Table`", "Dataset(table)"),
    "list": (list, "`list`", "Dataset.from_list(rows)"),
    "generator": (lambda r: (row for row in r), "`generator`", "Dataset.from_generator"),
    "name": (lambda r: "data.jsonl", "`str`", "load_rows(path)"),
    "number": (lambda r: 3, "`int`", "Dataset.from_list"),
}


@pytest.mark.parametrize("kind", NO_DATA_SETS)
def test_what_is_no_data_set_is_refused_with_what_makes_one(make_trainer, kind):
    make, got, mend = NO_DATA_SETS[kind]
    with pytest.raises(TypeError) as error:
        make_trainer(data=make(rows(4)))
    for part in ("`train_dataset` must be a `Dataset` or `IterableDataset`", got, mend):
        assert part in str(error.value)
    if "dict" in kind.lower() and "columns" not in kind:
        return  # for the evaluation several are allowed
    with pytest.raises(TypeError, match="`eval_dataset"):
        make_trainer(eval_dataset=make(rows(4)))


@pytest.mark.parametrize("no_data_set", [lambda r: r.to_pandas(), lambda r: DatasetDict(train=r), lambda r: list(r)])
def test_each_of_several_evaluation_sets_must_be_a_data_set(make_trainer, no_data_set):
    with pytest.raises(TypeError, match=r"`eval_dataset\['mine'\]` must be"):
        make_trainer(eval_dataset={"good": rows(4), "mine": no_data_set(rows(4))})


EMPTY = {
    "filtered": lambda: rows(4).select([]),
    "without columns": lambda: Dataset.from_dict({}),
    "stream": lambda: rows(4).to_iterable_dataset().take(0),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_an_empty_data_set_is_refused_as_such(make_trainer, kind):
    for name, sets in {
        "`train_dataset`": dict(data=EMPTY[kind]()),
        "`eval_dataset`": dict(eval_dataset=EMPTY[kind]()),
        "`eval_dataset['mine']`": dict(eval_dataset={"good": rows(4), "mine": EMPTY[kind]()}),
    }.items():
        with pytest.raises(ValueError) as error:
            make_trainer(**sets)
        assert f"{name} has no row" in str(error.value) and "Rename" not in str(error.value)


@pytest.mark.parametrize("several", [lambda r: {"a": r}, lambda r: DatasetDict(a=r), lambda r: {}])
def test_several_evaluation_sets_are_allowed(make_trainer, several):
    make_trainer(eval_dataset=several(rows(4)))


# Rows without text, and numbers


def of_parquet(*_, **__):
    """In the place of `load_dataset_builder`, for data sets of the hub."""
    return SimpleNamespace(info=SimpleNamespace(builder_name="parquet"))


def csv_file(tmp_path, lines):
    (tmp_path / "data.csv").write_text("\n".join(lines) + "\n")
    return str(tmp_path / "data.csv")


def jsonl_file(tmp_path, found, name="data.jsonl"):
    (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in found))
    return str(tmp_path / name)


def load(path, tokenizer, **options):
    return load_data(TrainingScriptArguments(path, eval_fraction=0.2, **options), tokenizer)


def test_a_blank_csv_cell_is_named_by_row_and_line_and_can_be_dropped(tmp_path, tokenizer):
    # A cell of two lines, and an empty line: rows and lines part.
    lines = ["question,answer", '"what\nis a",b', "", "what is c,d", "what is e,", 'what is g,"  "', "what is i,j"]
    path = csv_file(tmp_path, lines)
    with pytest.raises(IncompleteRowsError) as error:
        load(path, tokenizer)
    for part in (
        f"Row 3 of {path} (line 6)", "column `answer` is blank", "one of 2 such rows of 5: 3, 4", "--drop_incomplete_rows true",
    ):  # fmt: skip
        assert part in str(error.value)
    train, held_out = load(path, tokenizer, drop_incomplete_rows=True)
    prompts = {row["prompt"][0]["content"] for row in [*train, *held_out]}
    assert prompts == {"what\nis a", "what is c", "what is i"}


def texts(prompt="a", completion="b"):
    return {"prompt": prompt, "completion": completion}


def answered(content):
    return texts(CONVERSATION[:1], [{"role": "assistant", "content": content}])


def conversation(content):
    return {"messages": [CONVERSATION[0], {"role": "assistant", "content": content}]}


def gpt(content):
    return {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": content}]}


PART = [{"type": "text", "text": "a"}]


@pytest.mark.parametrize(
    ("first", "second", "column", "fault"),
    [
        (texts(), texts(completion=None), "completion", "is blank"),
        (texts(), texts(completion=""), "completion", "is blank"),
        (texts(), texts(prompt=None), "prompt", "is blank"),
        (texts(completion="b"), texts(completion=0.5), "completion", "is no text but 0.5 .float."),
        (texts(completion="b"), texts(completion=True), "completion", "is no text but True .bool."),
        ({"text": "a"}, {"text": None}, "text", "is blank"),
        ({"messages": CONVERSATION}, {"messages": [CONVERSATION[0], {"role": "assistant"}]}, "messages", "no content in message 2"),
        ({"messages": CONVERSATION}, {"messages": []}, "messages", "has no message"),
        ({"conversations": [{"from": "human", "value": "a"}]}, {"conversations": [{"from": "human"}]}, "conversations", "message 1"),
        (answered("a"), answered(" "), "completion", "has a blank content in message 1"),
        (answered("a"), answered([]), "completion", "has a blank content in message 1"),
        (answered(PART), answered([PART[0] | {"text": " "}]), "completion", "has a blank content in message 1"),
        (answered(PART), answered([PART[0] | {"text": None}]), "completion", "has no content in message 1"),
        (conversation(PART), conversation([PART[0] | {"text": ""}]), "messages", "has a blank content in message 2"),
        (conversation("a"), conversation(" "), "messages", "has a blank content in message 2"),
        (conversation("a"), {"messages": conversation("")["messages"] + CONVERSATION[:1]}, "messages", "blank content in message 2"),
        (gpt("a"), gpt(""), "conversations", "has a blank content in message 2"),
        (answered("a"), answered(3), "completion", "has no text in message 1 but 3 .int."),
        (FLASHCARD, FLASHCARD | {"instruction": None}, "instruction", "is blank"),
        (FLASHCARD, FLASHCARD | {"output": " "}, "output", "is blank"),
        (MEDICAL_O1, MEDICAL_O1 | {"Response": None}, "Response", "is blank"),
        (MEDMCQA, MEDMCQA | {"opb": None}, "opb", "is blank"),
        (MEDMCQA, MEDMCQA | {"cop": None}, "cop", r"holds no answer \(`cop=None`\); expected 0 to 3"),
        (MEDMCQA, MEDMCQA | {"cop": -1}, "cop", "holds no answer .`cop=-1`"),
        (MEDMCQA, MEDMCQA | {"cop": "C"}, "cop", "holds no answer .`cop=C`"),
        (MEDQA, MEDQA | {"options": MEDQA["options"] | {"B": None}}, "options", "is blank in part"),
        (PUBMEDQA, PUBMEDQA | {"final_decision": None}, "final_decision", "is blank"),
    ],
)  # fmt: skip
def test_a_missing_text_is_refused_by_row_and_column(tmp_path, first, second, column, fault):
    dataset = load_rows(jsonl_file(tmp_path, [first, second]))
    with pytest.raises(IncompleteRowsError, match=f"Row 2 of .* column `{column}` .*{fault}"):
        to_prompt_completion(dataset)
    assert len(to_prompt_completion(dataset, drop_incomplete=True)) == 1


def test_a_stream_is_refused_at_the_row_when_it_is_read():
    stream = Dataset.from_list([FLASHCARD, FLASHCARD, FLASHCARD | {"output": None}]).to_iterable_dataset()
    read = iter(to_prompt_completion(stream))
    next(read), next(read)
    with pytest.raises(IncompleteRowsError, match="Row 3 of .* column `output` is blank"):
        next(read)
    assert len(list(to_prompt_completion(stream, drop_incomplete=True))) == 2


def test_the_trainer_refuses_missing_texts_before_it_tokenizes(make_trainer):
    blank = Dataset.from_list([*rows(3), {"prompt": "a", "completion": None}])
    for sets, name in ((dict(data=blank), "train"), (dict(eval_dataset=blank), "eval")):
        for as_given in (Dataset.to_iterable_dataset, lambda d: d):
            given = {key: as_given(value) for key, value in sets.items()}
            with pytest.raises(IncompleteRowsError, match=f"Row 4 of the {name} data set .*`completion` is blank"):
                make_trainer(**given)
    numbers = Dataset.from_list([{"prompt": "a", "completion": 3}])
    with pytest.raises(IncompleteRowsError, match=r"`completion` is no text but 3 \(int\)"):
        make_trainer(data=numbers)


def test_content_may_be_missing_beside_a_tool_call_or_a_thought():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "a", "arguments": {"b": 1}}}]}
    thought = {"role": "assistant", "content": "", "thinking": "hm"}
    parts = [{"role": role, "content": [{"type": "text", "text": "a"}]} for role in ("user", "assistant")]
    for row in (
        {"messages": [CONVERSATION[0], call]},
        {"prompt": CONVERSATION[:1], "completion": [call]},
        {"prompt": CONVERSATION[:1], "completion": [thought]},
        {"messages": parts},
        {"messages": [CONVERSATION[0], thought]},
        {"messages": [CONVERSATION[0], call, {"role": "tool", "content": ""}, CONVERSATION[1]]},
        {"messages": [*CONVERSATION[:1], {"role": "assistant", "content": ""}, *CONVERSATION]},  # answered at last
        {"text": ""},  # as between the paragraphs of many a corpus
    ):
        dataset = Dataset.from_list([row])
        assert to_prompt_completion(dataset) is dataset


def test_numbers_and_words_of_a_csv_file_are_the_text_that_they_are(tmp_path):
    answers = ["3", "007", "3.10", "1e5", "None", "NA", "null", "nan", "true", "2024-01-01"]
    path = csv_file(tmp_path, ["prompt,completion", *(f"{i},{answer}" for i, answer in enumerate(answers))])
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.csv").write_text((tmp_path / "data.csv").read_text())
    for name in (path, str(tmp_path / "folder")):
        for streaming in (False, True):
            read = list(to_prompt_completion(load_rows(name, streaming=streaming)))
            assert [row["completion"] for row in read] == answers
            assert [row["prompt"] for row in read] == [str(i) for i in range(len(answers))]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("place", ["address", "tabs", "compressed"])
def test_so_they_are_where_only_the_reader_knows_that_it_is_a_table(tmp_path, place, streaming):
    answers = ["7", "3.10", "None", "NA", "true", "2024-01-01"]
    text = "prompt,completion\n" + "".join(f"{i},{answer}\n" for i, answer in enumerate(answers))
    (tmp_path / "folder").mkdir()
    if place == "tabs":
        (tmp_path / "folder" / "train.tsv").write_text(text.replace(",", "\t"))
    elif place == "compressed":
        (tmp_path / "folder" / "train.csv.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (tmp_path / "x.csv").write_text(text)
    own = {"data_files": f"file://{tmp_path / 'x.csv'}"} if place == "address" else {}
    read = loading.load_split("csv" if own else str(tmp_path / "folder"), streaming=streaming, **own)
    assert [row["completion"] for row in read] == answers


def test_a_column_of_numbers_may_go_on_with_words_and_have_empty_cells(tmp_path):
    """By address: `datasets` guesses types 10,000 rows at a time, and makes 7.0 of a 7 that has an empty cell below it."""
    lines = [*(f"{i},{i}" for i in range(10_001)), "x,word", "y,"]
    path = csv_file(tmp_path, ["prompt,completion", *lines])
    read = loading.load_split("csv", data_files=f"file://{path}", drop_incomplete=True)
    assert list(read["completion"]) == [*map(str, range(10_001)), "word"]


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        (
            "messages",
            "\"[{'role': 'user'}]\"",
            "Column `messages` of .*data.csv holds text .*; expected messages. Save the rows as",
        ),
        ("input_ids", '"[1, 2]"', "Column `input_ids` of .* expected tokens"),
        (
            "question,options,answer_idx",
            "q,\"{'A': 'x'}\",A",
            "Column `options` of .* expected options by their letters",
        ),
        (
            "question,context,long_answer,final_decision",
            "q,\"{'contexts': []}\",l,yes",
            "`context` of .* expected paragraphs",
        ),
    ],
)
def test_what_no_cell_can_hold_is_refused(tmp_path, header, cells, message):
    for streaming in (False, True):
        with pytest.raises(ValueError, match=message):
            loading.load_split(csv_file(tmp_path, [header, cells, cells]), streaming=streaming)
    # A text has any name.
    rows = Dataset.from_dict({"messages": ["the drug"]})
    assert to_prompt_completion(rows, text_field="messages") is rows


def test_rows_of_which_none_would_be_left_are_not_left_out(tmp_path):
    path = tmp_path / "data.parquet"
    Dataset.from_dict({"prompt": ["a", "b"], "completion": [1.5, None]}).to_parquet(path)
    told = r"Row 1 of .* is no text but 1.5 \(float\).* 2 such rows of 2: 1, 2. Mend them: without such rows none is left.$"
    for drop in (False, True):
        with pytest.raises(IncompleteRowsError, match=told):
            loading.load_split(str(path), drop_incomplete=drop)


def test_whole_numbers_in_json_are_text_and_others_are_refused(tmp_path):
    def read(*answers, streaming=False):
        path = jsonl_file(tmp_path, [{"prompt": f"q{i}", "completion": a} for i, a in enumerate(answers)])
        return [row["completion"] for row in to_prompt_completion(load_rows(path, streaming=streaming))]

    for streaming in (False, True):
        assert read(3, -40, streaming=streaming) == ["3", "-40"]
        assert read("yes", 3, streaming=streaming) == ["yes", "3"]
        with pytest.raises(
            IncompleteRowsError, match=r"column `completion` is no text but 3.0 \(float\); write it as text"
        ):
            read(3, 0.5, streaming=streaming)
    with pytest.raises(IncompleteRowsError, match="Row 2 of .*`completion` is blank"):  # and 3 does not become 3.0
        read(3, None)
    with pytest.raises(ValueError, match="is no text but the date 2024-01-01"):
        read("2024-01-01", "2024-02-01")


def test_numbers_of_a_known_format_are_text_too(tmp_path):
    path = jsonl_file(
        tmp_path, [{"question": "what is 1 + 1", "answer": 2}, {"question": "what is 1 + 2", "answer": 3}]
    )
    assert list(to_prompt_completion(load_rows(path))["completion"]) == ["2", "3"]


def test_multiple_choice_in_a_csv_file_keeps_its_answer(tmp_path):
    pd.DataFrame([MEDMCQA]).to_csv(tmp_path / "data.csv", index=False)
    (row,) = to_prompt_completion(load_rows(str(tmp_path / "data.csv")))
    assert (row["prompt"], row["completion"]) == MAPPED["medmcqa"][1:]


# Named sets


NAMED = {
    # Name: a row, the configurations it must be asked for by, the splits that have answers, and those that do not.
    "FreedomIntelligence/medical-o1-reasoning-SFT": (MEDICAL_O1, ("en", "zh", "en_mix"), ("train",), ()),
    "openlifescienceai/medmcqa": (MEDMCQA, (), ("train", "validation"), ("test",)),
    "GBaker/MedQA-USMLE-4-options": (MEDQA, (), ("train", "test"), ()),
    "qiaojin/PubMedQA": (PUBMEDQA, ("pqa_artificial", "pqa_labeled", "pqa_unlabeled"), ("train",), ()),
    "medalpaca/medical_meadow_medical_flashcards": (FLASHCARD, (), ("train",), ()),
    "lavita/ChatDoctor-HealthCareMagic-100k": (FLASHCARD, (), ("train",), ()),
}


@pytest.fixture
def hub(monkeypatch):
    """Stands in for the hub: these sets in the splits and configurations that it has, each row with its own question."""

    def splits(name):
        row, configs, labelled, unlabelled = NAMED[name]
        key = next(key for key in ("Question", "question", "input") if key in row)
        numbered = {
            split: [
                row | {key: f"{split} {i}"} | ({"cop": -1, "exp": None} if split in unlabelled else {})
                for i in range(20)
            ]
            for split in (*labelled, *unlabelled)
        }
        return configs, DatasetDict({split: Dataset.from_list(found) for split, found in numbered.items()})

    def load_dataset(name, config=None, streaming=False, **options):
        configs, found = splits(name)
        if configs and config not in configs:
            raise ValueError(f"Config name is missing. Please pick one among the available configs: {list(configs)}")
        return IterableDatasetDict({s: d.to_iterable_dataset() for s, d in found.items()}) if streaming else found

    monkeypatch.setattr(loading, "load_dataset", load_dataset)
    monkeypatch.setattr(loading, "load_dataset_builder", of_parquet)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", NAMED)
def test_each_named_set_works_with_its_name_alone(hub, tokenizer, name, streaming):
    train, held_out = load_data(TrainingScriptArguments(name, eval_samples=5, dataset_streaming=streaming), tokenizer)
    questions = [{row["prompt"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert all(questions) and not set.intersection(*questions)
    split = {"openlifescienceai/medmcqa": "validation", "GBaker/MedQA-USMLE-4-options": "test"}.get(name, "train")
    assert all(f"{split} " in question for question in questions[1])
    assert len(questions[0]) == 20 or split == "train"


def test_the_named_sets_are_those_that_the_formats_name():
    hub_names = {name.split(" (")[0] for names in FORMATS for name in names.split(", ") if "/" in name}
    assert hub_names == set(NAMED)


def test_a_split_without_answers_that_was_named_is_refused(hub, tokenizer):
    args = TrainingScriptArguments("openlifescienceai/medmcqa", dataset_train_split="test")
    with pytest.raises(NoAnswersError, match="use `train` or `validation`"):
        load_data(args, tokenizer)
    args = TrainingScriptArguments("openlifescienceai/medmcqa", dataset_test_split="train")
    assert len(load_held_out(args, tokenizer)) == 20


@pytest.mark.parametrize("streaming", [False, True])
def test_one_row_without_an_answer_is_named_and_does_not_hide_its_split(monkeypatch, tokenizer, streaming):
    def questions(split, unanswered=()):
        found = [MEDMCQA | {"question": f"{split} {i}", "cop": -1 if i in unanswered else 2} for i in range(20)]
        return Dataset.from_list(found).to_iterable_dataset() if streaming else Dataset.from_list(found)

    splits = {
        name: questions(name, without) for name, without in (("train", ()), ("test", range(20)), ("validation", [7]))
    }
    made = IterableDatasetDict(splits) if streaming else DatasetDict(splits)
    monkeypatch.setattr(loading, "load_dataset", lambda *_, **__: made)
    monkeypatch.setattr(loading, "load_dataset_builder", of_parquet)
    args = TrainingScriptArguments("openlifescienceai/medmcqa", dataset_streaming=streaming)
    with pytest.raises(IncompleteRowsError, match=r"Row 8 of openlifescienceai/medmcqa \(validation\).*`cop=-1`"):
        load_data(args, tokenizer)
    args.drop_incomplete_rows = True
    train, held_out = load_data(args, tokenizer)
    assert len(list(train)) == 20 and len(held_out) == 19


def test_a_blank_answer_to_multiple_choice_in_a_csv_file_is_named_by_line(tmp_path):
    pd.DataFrame([MEDMCQA, MEDMCQA | {"cop": ""}, MEDMCQA]).to_csv(tmp_path / "data.csv", index=False)
    path = str(tmp_path / "data.csv")
    with pytest.raises(IncompleteRowsError, match=r"Row 2 of .*data.csv \(line 3\).*column `cop` holds no answer"):
        loading.load_split(path)
    assert len(loading.load_split(path, drop_incomplete=True)) == 2


def test_a_test_split_whose_answers_are_hidden_is_not_used(tmp_path, tokenizer):
    questions = [{"question": f"what is {i}", "answer": f"a {i}"} for i in range(10)]
    jsonl_file(tmp_path, questions, "train.jsonl")
    jsonl_file(tmp_path, [row | {"answer": ""} for row in questions[:4]], "test.jsonl")
    train, held_out = load(str(tmp_path), tokenizer)
    assert len(train) == 8 and len(held_out) == 2  # of the training rows
    jsonl_file(tmp_path, questions[:3], "validation.jsonl")
    train, held_out = load(str(tmp_path), tokenizer)
    assert len(train) == 7 and len(held_out) == 3


# Files and names


def write(dataset, path):
    {".jsonl": dataset.to_json, ".json": dataset.to_json, ".csv": dataset.to_csv, ".parquet": dataset.to_parquet}[
        path.suffix
    ](path)
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_rows_are_read_by_path(tmp_path, suffix, streaming):
    loaded = load_rows(write(rows(4), tmp_path / f"data{suffix}"), streaming=streaming)
    assert isinstance(loaded, IterableDataset) == streaming
    assert list(loaded) == list(rows(4))


def test_file_with_another_suffix_is_refused(tmp_path):
    path = tmp_path / "data.xlsx"
    path.touch()
    with pytest.raises(ValueError, match=r"has the suffix '.xlsx'; expected one of .json, .jsonl, .csv, .parquet"):
        load_rows(str(path))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_without_rows_is_named_as_such(tmp_path, streaming):
    rows(2).select([]).to_parquet(tmp_path / "a.parquet")
    for name, content in {"a.csv": "", "b.csv": "prompt,completion\n", "a.jsonl": "\n", "a.json": "[]\n"}.items():
        (tmp_path / name).write_text(content)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path.name} has no row"):
            load_rows(str(path), streaming=streaming)


@pytest.mark.parametrize("name", ["no/such.jsonl", "no-such.PARQUET", "/no/such/folder", "./no-such", "~/no-such"])
def test_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"no data file '{name}'. Give the path"):
        load_rows(name)


LATIN = "prompt,completion\nq1,a1\nWas ist Übelkeit?,ein Gefühl\n"
QUOTES = "A cell with a comma, a quotation mark or a line break in it has to stand between quotation marks."
DAMAGED = {
    # Name: content, and what is said of it.
    "latin.csv": (LATIN.encode("latin-1"), "line 3 is not UTF-8 (byte 0xdc). Save it as UTF-8, in Excel as `CSV UTF-8`, or convert it: "
                  "`iconv -f windows-1252 -t utf-8 {path} > utf8.csv`."),
    "utf16.csv": (LATIN.encode("utf-16"), "line 1 is not UTF-8 (byte 0xff). Save it as UTF-8, in Excel as `CSV UTF-8`, or convert it: "
                  "`iconv -f utf-16 -t utf-8 {path} > utf8.csv`."),
    "latin.jsonl": ('{"text": "ü"}\n{"text": "a"}\n'.encode("latin-1"), "line 1 is not UTF-8 (byte 0xfc). "),
    "ragged.csv": (b"prompt,completion\nq1,a1\nq2,a2,a3,a4\nq3,a3\n", "Expected 2 fields in line 3, saw 4. " + QUOTES),
    "broken.jsonl": (b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion":\n', "line 2 is no JSON (Expecting value, "),
    "broken.json": (b'[{"prompt": "a", "completion": "b"},\n\n{"prompt": "a" "completion": "b"}]\n', "line 3 is no JSON (Expecting "),
    "list.jsonl": (b'{"prompt": "a", "completion": "b"}\n["a", "b"]\n', "line 2 is no JSON object. Write one a line, or all in a list."),
    "broken.parquet": (b"PAR1 and no more", "Parquet"),
}  # fmt: skip


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_named_with_the_line_and_what_mends_it(tmp_path, name, streaming):
    content, message = DAMAGED[name]
    good, path = tmp_path / f"good{(tmp_path / name).suffix}", tmp_path / name
    write(rows(4), good)
    path.write_bytes(content)
    asked = [{"name": str(path)}]
    if not streaming:  # of which the first rows are looked at
        asked.append({"name": FILE_FORMATS[path.suffix], "data_files": [str(good), str(path)]})
    for options in asked:
        with pytest.raises(ValueError) as error:
            load_rows(streaming=streaming, **options)
        assert f"{path} cannot be read: " in str(error.value)
        assert message.format(path=path) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "prompt;completion\nq;a\n",
            "has one column, 'prompt;completion': its cells are parted by semicolons. Save it anew",
        ),
        ("prompt\tcompletion\nq\ta\n", ".*its cells are parted by tabs. Save it anew with commas between them"),
        (
            "prompt,completion\nq1,a1,x\nq2,a2,y\n",
            "has more cells in its first row than columns in its header. A cell with a comma",
        ),
        ("prompt,completion,prompt\nq,a,p\n", "has two columns of the name 'prompt'. Rename one of them, or leave"),
        ('\ufeff"prompt",completion,prompt\nq,a,p\n', "has two columns of the name 'prompt'. Rename one of them, or"),
    ],
)
def test_a_table_with_other_separators_more_of_them_or_two_columns_of_a_name_is_refused(tmp_path, content, message):
    (tmp_path / "data.csv").write_text(content)
    for name in (tmp_path / "data.csv", tmp_path):
        with pytest.raises(ValueError, match=f"data.csv {message}"):
            load_rows(str(name))


def test_columns_without_a_name_are_not_of_one_name(tmp_path):
    (tmp_path / "data.csv").write_text("prompt,completion,,\nq,a,,\n")  # as spreadsheets write them
    found = load_rows(str(tmp_path / "data.csv"))
    assert (found["prompt"][:], found["completion"][:]) == (["q"], ["a"])


def test_an_error_about_no_line_names_the_files(tmp_path):
    rows(2).to_csv(tmp_path / "train.csv")
    (tmp_path / "test.csv").write_text("prompt,answer\nq,a\n")
    with pytest.raises(ValueError, match=f"{tmp_path} cannot be read .*answer"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize("option", ["as one", "in a list", "by split", "by a pattern", "below a folder", "in a folder"])
def test_cells_of_csv_files_by_data_files_are_the_text_that_they_are(tmp_path, monkeypatch, option):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "x.csv").write_text("prompt,completion\n1,007\n2,010\n3,None\n")
    name, options = {
        "as one": ("csv", {"data_files": str(tmp_path / "own" / "x.csv")}),
        "in a list": ("csv", {"data_files": ["own/x.csv"]}),
        "by split": ("csv", {"data_files": {"train": "own/x.csv"}}),
        "by a pattern": ("csv", {"data_files": "own/*.csv"}),
        "below a folder": ("csv", {"data_files": "x.csv", "data_dir": "own"}),
        "in a folder": ("own", {"data_files": "x.csv"}),
    }[option]
    for streaming in (False, True):
        assert [row["completion"] for row in load_rows(name, streaming=streaming, **options)] == ["007", "010", "None"]


def test_data_files_that_are_not_there_are_no_matter_of_the_hub(tmp_path):
    for name in ("json", str(tmp_path)):
        with pytest.raises(
            FileNotFoundError, match=f"no data file 'no.jsonl' in .*, which `data_files` of '{name}' names"
        ):
            load_rows(name, data_files={"train": ["no.jsonl"]})


def test_files_have_no_configuration_and_one_has_no_others(tmp_path):
    path = jsonl_file(tmp_path, [{"text": "a"}])
    for name, options in ((path, {}), ("json", {"data_files": path})):
        with pytest.raises(ValueError, match="is read from files, which have no configuration; got 'en'. Leave it out"):
            load_rows(name, "en", **options)
    with pytest.raises(ValueError, match="is one file: leave out `data_dir` and `data_files`"):
        load_rows(path, data_files="other.jsonl")


@pytest.mark.parametrize("streaming", [False, True])
def test_folder_of_files_has_their_splits(tmp_path, streaming):
    write(rows(4), tmp_path / "train.jsonl")
    write(rows(2, seed=1), tmp_path / "test.jsonl")
    assert list(load_rows(str(tmp_path), streaming=streaming)) == list(rows(4))
    assert list(load_rows(str(tmp_path), split="test", streaming=streaming)) == list(rows(2, seed=1))
    with pytest.raises(ValueError, match=r"no split 'validation', only \['test', 'train'\]"):
        load_rows(str(tmp_path), split="validation", streaming=streaming)


def test_folder_without_data_files_is_not_taken_for_a_hub_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="data files") as error:
        load_rows(str(tmp_path))
    assert "hub" not in str(error.value)


@pytest.mark.timeout(30)  # no retries, no waiting for a network
def test_hub_name_without_a_hub_names_the_offline_default():
    name = "FreedomIntelligence/medical-o1-reasoning-SFT"
    with pytest.raises(ConnectionError) as error:
        load_rows(name, "en")
    for part in (f"data set '{name}'", "give a local path", "`recipes/medical_ema.py` with no arguments"):
        assert part in str(error.value)


# Held-out rows


@pytest.mark.parametrize("other", ["messages", "text"])
def test_a_prompt_beside_messages_or_text_is_dropped(other):
    """TRL would take the row for a prompt with a completion."""
    value = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] if other == "messages" else "a b"
    dataset = Dataset.from_list([{"prompt": "a", other: value}])
    with pytest.raises(ValueError, match=r"has columns \['messages', 'prompt'\]|has columns \['prompt', 'text'\]"):
        check_columns({"prompt", other})
    assert to_prompt_completion(dataset).column_names == [other]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_file_has_no_other_split_than_train(tmp_path, streaming):
    """Its own rows as a test split would be training rows."""
    rows(2).to_json(tmp_path / "data.jsonl")
    with pytest.raises(ValueError, match=r"data.jsonl is one file and has no split 'test', only 'train'"):
        load_rows(str(tmp_path / "data.jsonl"), split="test", streaming=streaming)


def split(dataset, seed=0, fraction=0.2, key="prompt"):
    train, held_out = held_out_split(dataset, fraction, key, seed)
    return list(train), list(held_out)


def test_held_out_split_is_seeded_and_deterministic():
    data = rows(200)
    assert split(data) == split(data)
    assert split(data) != split(data, seed=1)


def test_held_out_rows_do_not_depend_on_their_order_or_neighbours():
    data = rows(200)
    _, held_out = split(data)
    _, of_half = split(data.select(range(199, 99, -1)))
    assert of_half == [row for row in list(data)[:99:-1] if row in held_out]


def test_held_out_split_parts_the_rows_by_about_the_fraction():
    data = rows(2000)
    train, held_out = split(data, fraction=0.2)
    assert len(train) + len(held_out) == 2000
    assert 330 < len(held_out) < 470  # 20% of 2000, four standard deviations to either side


@pytest.mark.parametrize("text", [str, lambda i: [{"role": "user", "content": str(i)}]], ids=["text", "messages"])
def test_equal_texts_are_held_out_together(text):
    data = Dataset.from_list([{"prompt": text(i % 50), "completion": str(i)} for i in range(200)])
    train, held_out = split(data)
    assert held_out
    assert not [row for row in train if row["prompt"] in [out["prompt"] for out in held_out]]


# Held-out rows of any answers


ANSWERS = {
    "letters": lambda i: "ABCD"[i % 4],
    "yes and no": lambda i: "yes" if i % 10 else "no",
    "labels": lambda i: ["benign", "malignant", "uncertain"][i % 3],
    "codes": lambda i: f"I{i % 40}.{i % 7}",
    "numbers": lambda i: str(i % 12),
    "texts": lambda i: f"This is answer {i}.",
    "tool calls": lambda i: [
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": f"tool_{i % 4}", "arguments": "{}"}}],
        }
    ],
}


def question(i, answer):
    return f"question {i}" if isinstance(answer, str) else [{"role": "user", "content": f"question {i}"}]


def answered_rows(answer_of, n, question_of=lambda i: i):
    return Dataset.from_list(
        [{"prompt": question(question_of(i), answer_of(i)), "completion": answer_of(i)} for i in range(n)]
    )


def parted(dataset, fraction, seed=0):
    train, held_out = held_out_split(dataset, fraction, seed=seed)
    assert len(train) + len(held_out) == len(dataset)
    return train, held_out


def counted(dataset, column):
    return Counter(map(str, dataset[column]))


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
@pytest.mark.parametrize("kind", ANSWERS)
def test_the_share_is_as_asked_and_no_frequent_answer_is_lost(kind, fraction):
    data = answered_rows(ANSWERS[kind], 1000)
    for seed in range(3):
        train, held_out = parted(data, fraction, seed)
        assert len(held_out) == 1000 * fraction
        answers = counted(data, "completion")
        assert all(answers[lost] == 1 for lost in answers.keys() - counted(train, "completion").keys())


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("n", [2, 3, 10])
def test_a_small_file_holds_out_a_row_by_default(kind, n):
    _, held_out = parted(answered_rows(ANSWERS[kind], n), 0.02)
    assert len(held_out) == 1


def test_one_row_is_not_parted():
    with pytest.raises(ValueError, match="One row cannot be parted.* Give at least two"):
        held_out_split(rows(1), 0.5)


@pytest.mark.parametrize("kind", ["prompt_completion", "messages"])
def test_rows_that_share_a_prompt_stay_on_one_side(kind):
    data = answered_rows(lambda i: f"answer {i}", 1000, lambda i: i // 5)
    if kind == "messages":
        data = as_conversation(data)
        data = data.map(lambda r: {"messages": r["prompt"] + r["completion"]}, remove_columns=data.column_names)
    train, held_out = parted(data, 0.05)
    assert len(held_out) == 50
    prompts = [{str(row.get("prompt") or row["messages"][:-1]) for row in side} for side in (train, held_out)]
    assert not set.intersection(*prompts)


@pytest.mark.parametrize("kind", ["prompt_completion", "text", "messages"])
def test_equal_rows_stay_on_one_side(kind):
    some = list(rows(100, kind=kind))
    train, held_out = parted(Dataset.from_list(some * 3), 0.1)
    assert len(held_out) == 30
    assert not {str(row) for row in train} & {str(row) for row in held_out}


def test_tokenized_rows_are_parted():
    _, held_out = parted(Dataset.from_list([{"prompt": "a", "input_ids": [i, i + 1]} for i in range(50)]), 0.1)
    assert len(held_out) == 5


def test_a_prompt_of_all_rows_is_no_question():
    train, held_out = parted(answered_rows(lambda i: f"answer {i % 500}", 1000, lambda i: 0), 0.05)
    assert len(held_out) == 50
    assert not set(train["completion"]) & set(held_out["completion"])  # equal rows


def test_a_class_that_has_one_prompt_is_not_held_out():
    """The rare texts beside it are."""
    classes = [{"prompt": f"say {letter}", "completion": letter} for letter in "ABCD"] * 200
    texts = list(answered_rows(ANSWERS["texts"], 200))
    _, held_out = parted(Dataset.from_list(classes + texts), 0.1)
    assert len(held_out) == 100 and not set(held_out["completion"]) & set("ABCD")
    for fraction in (0.02, 0.25, 0.5):  # and no share leads to it
        with pytest.raises(ValueError, match="of 800 rows 4 differ.*`--dataset_test_split`"):
            parted(Dataset.from_list(classes), fraction)


def test_what_is_held_out_depends_neither_on_order_nor_much_on_new_rows():
    data = answered_rows(ANSWERS["letters"], 500)
    _, held_out = parted(data, 0.1)
    _, reversed_ = parted(data.select(range(499, -1, -1)), 0.1)
    assert set(held_out["prompt"]) == set(reversed_["prompt"])
    _, later = parted(answered_rows(ANSWERS["letters"], 550), 0.1)
    assert len(set(held_out["prompt"]) & set(later["prompt"])) > 40
    assert set(held_out["prompt"]) != set(parted(data, 0.1, seed=1)[1]["prompt"])


# Few prompts, tools, copies


@pytest.mark.parametrize(("prompts", "each", "held"), [(20, 50, 50), (12, 15, 15), (5, 200, 200), (3, 40, 40)])
def test_rows_of_few_prompts_stay_on_one_side_and_another_share_is_said(caplog, prompts, each, held):
    data = answered_rows(lambda i: f"answer {i}", prompts * each, lambda i: i % prompts)
    train, held_out = parted(data, 0.02)
    assert len(held_out) == held and len(set(held_out["prompt"])) == 1
    assert not set(train["prompt"]) & set(held_out["prompt"])
    assert f"{held} of {prompts * each} rows are held out instead of" in caplog.text


@pytest.mark.parametrize("fraction", [0.02, 0.2, 0.6, 0.9])
@pytest.mark.parametrize("sizes", [(1, 50, 50, 50), (5, 5, 5), (1, 2, 4), (30, 1, 1, 1)])
def test_neither_side_is_ever_empty(fraction, sizes):
    prompts = [i for i, size in enumerate(sizes) for _ in range(size)]
    train, held_out = parted(answered_rows(lambda i: f"answer {i}", len(prompts), prompts.__getitem__), fraction)
    assert len(train) and len(held_out)
    halves = {str(i) for i, size in enumerate(sizes) if 2 * size >= len(prompts)}  # preambles
    assert {text.split()[1] for text in set(train["prompt"]) & set(held_out["prompt"])} <= halves


@pytest.mark.parametrize("column", ["tools", "chat_template_kwargs"])
@pytest.mark.parametrize("kind", ["prompt_completion", "messages"])
def test_tools_are_part_of_the_question(kind, column):
    option = {"tools": str, "chat_template_kwargs": lambda i: {"date": str(i)}}[column]
    one, other = texts(), {"messages": CONVERSATION}
    content = (lambda i: one | {"completion": "ABCD"[i % 4]}) if kind == "prompt_completion" else lambda i: other
    data = Dataset.from_list([content(i) | {column: option(i // 2)} for i in range(1000)])
    train, held_out = parted(data, 0.02)
    assert len(held_out) == 20
    assert not {str(row[column]) for row in train} & {str(row[column]) for row in held_out}


@pytest.mark.parametrize("copies", [1, 10, 11, 12])
def test_copies_of_a_row_make_no_class_of_its_answer(copies):
    data = Dataset.from_list([texts(f"question {i}", f"answer {i}") for i in range(90)] * copies)
    train, held_out = parted(data, 0.02)
    assert len(held_out) == 2 * copies
    assert not set(train["completion"]) & set(held_out["completion"])


# Of a stream


def streamed(tmp_path, tokenizer, found, **options):
    path = jsonl_file(tmp_path, found)
    return load_data(TrainingScriptArguments(path, dataset_streaming=True, **options), tokenizer)


def test_a_stream_sorted_by_class_loses_none(tmp_path, tokenizer):
    found = [texts(f"question {i}", "ABCD"[i // 100]) for i in range(400)]
    train, held_out = streamed(tmp_path, tokenizer, found)
    counts = [Counter(row["completion"][0]["content"] for row in side) for side in (train, held_out)]
    assert len(held_out) == 128 and sum(counts, Counter()) == dict.fromkeys("ABCD", 100)
    assert all(side[letter] > 10 for side in counts for letter in "ABCD")


def test_what_a_stream_holds_out_comes_not_again_later_in_it(tmp_path, tokenizer):
    found = [texts(f"question {i % 50}", f"answer {i}") for i in range(200)]
    train, held_out = streamed(tmp_path, tokenizer, found, eval_samples=5, eval_fraction=0.1)
    prompts = [{str(row["prompt"]) for row in side} for side in (train, held_out)]
    assert len(held_out) == 5 and len(prompts[0]) == 45 and not set.intersection(*prompts)
    assert len(list(train)) == 180


@pytest.mark.parametrize("kind", ["text", "messages", "prompt_completion"])
def test_a_stream_of_any_format_is_parted(tmp_path, tokenizer, kind):
    found = list(rows(60, kind=kind))
    train, held_out = streamed(tmp_path, tokenizer, found, eval_samples=6)
    sides = [{str(row) for row in side} for side in (train, held_out)]
    assert len(held_out) == 6 and not set.intersection(*sides)
    assert len(list(train)) == 54 and next(iter(train)).keys() == set(held_out.column_names)
