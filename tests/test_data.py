import pytest
from conftest import rows
from datasets import Dataset, IterableDataset

from trl_ema.data import FORMATS, as_conversation, check_columns, held_out_split, load_rows, to_prompt_completion


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


def test_conversation_has_a_user_and_an_assistant_message():
    (row,) = as_conversation(Dataset.from_list([{"prompt": "What is ptosis?", "completion": "A drooping eyelid."}]))
    assert row == {"prompt": CONVERSATION[:1], "completion": CONVERSATION[1:]}


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


@pytest.mark.parametrize("name", ["no/such.jsonl", "no-such.PARQUET", "/no/such/folder", "./no-such", "~/no-such"])
def test_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(FileNotFoundError, match=f"no data file '{name}'. Give the path"):
        load_rows(name)


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
