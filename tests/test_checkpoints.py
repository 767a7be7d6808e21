"""What a checkpoint holds, that it is whole or not there, and that a damaged one is refused."""

import copy
import json
import os
import re
import shutil
import signal
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import adapter_weights, logged, lora, make_tokenizer, rows, tiny_model
from huggingface_hub.utils import filter_repo_objects
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from transformers.trainer_utils import sort_checkpoints

from trl_ema.files import finish_replacing, read_json, remove_folder, replace_folder, write_json
from trl_ema.regularizers.teacher import _sha256


SAVING = dict(save_strategy="steps", save_steps=1)


# The first of all checkpoints is the best: losses fall.
BEST = dict(
    eval_dataset=rows(5, seed=9), eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
    metric_for_best_model="eval_loss", greater_is_better=True, save_total_limit=1, learning_rate=0.3, **SAVING,
)  # fmt: skip


def folders(path):
    return sorted(child.name for child in path.iterdir() if child.is_dir())


@pytest.fixture
def checkpoint(make_trainer, tmp_path):
    """The last checkpoint of a run of four steps."""
    make_trainer(**SAVING).train()
    return tmp_path / "out" / "checkpoint-4"


def test_state_is_plain_json(checkpoint):
    state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["trl_ema"]
    teacher = json.loads((checkpoint / "teacher" / "state.json").read_text())
    assert teacher["num_updates"] == teacher["step"] == 4
    assert teacher["run_id"] == state["run_id"]
    assert state["num_tokens"] > 0


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


WEIGHTS, CONFIG, STATE = "adapter_model.safetensors", "adapter_config.json", "state.json"
DAMAGES = {
    "missing": (WEIGHTS, lambda path: path.unlink(), "is missing"),
    "truncated": (WEIGHTS, lambda path: path.write_bytes(path.read_bytes()[:-50]), "is damaged"),
    "bit flipped": (WEIGHTS, flip_a_bit, "do not have their checksum"),
    "empty": (WEIGHTS, lambda path: path.write_bytes(b""), "is damaged"),
    "state missing": (STATE, lambda path: path.unlink(), "is missing"),
    "state truncated": (STATE, lambda path: path.write_text(path.read_text()[:20]), "is damaged"),
    "other count of updates": (
        STATE,
        lambda path: path.write_text(path.read_text().replace('"num_updates": 4', '"num_updates": 5')),
        "",
    ),
    "config missing": (CONFIG, lambda path: path.unlink(), "is missing"),
    "config truncated": (CONFIG, lambda path: path.write_text(path.read_text()[:20]), "is damaged"),
    "other config": (
        CONFIG,
        lambda path: path.write_text(path.read_text().replace('"fan_in_fan_out": false', '"fan_in_fan_out": true')),
        "do not have their checksum",
    ),
    "state without a checksum": (STATE, lambda path: path.write_text("{}"), "is damaged .*sha256"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_teacher_is_refused_before_anything_is_loaded(make_trainer, tmp_path, checkpoint, damage):
    name, spoil, words = DAMAGES[damage]
    spoil(checkpoint / "teacher" / name)
    trainer = make_trainer(output_dir=str(tmp_path / "other"))
    before = adapter_weights(trainer)
    with pytest.raises(ValueError, match=f"Teacher checkpoint .*{name}.*{words}.*Resume from another"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(before[n], w) for n, w in adapter_weights(trainer).items())


def test_a_teacher_of_the_first_checksum_and_one_formatted_anew_are_read(make_trainer, tmp_path, checkpoint):
    state = read_json(checkpoint / "teacher" / STATE)
    del state["sha256"]
    write_json(checkpoint / "teacher" / STATE, {"sha256": _sha256(checkpoint / "teacher", state), **state})
    resumed = make_trainer(output_dir=str(tmp_path / "other"))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    earlier = checkpoint.with_name("checkpoint-3")
    config = read_json(earlier / "teacher" / CONFIG)
    config["target_modules"].reverse()
    (earlier / "teacher" / CONFIG).write_text(json.dumps(config | {"peft_version": "another"}))
    resumed.train(resume_from_checkpoint=str(earlier))
    assert resumed.teacher.num_updates == 4


class SaveWithPeft(TrainerCallback):
    """What many projects have a callback for."""

    def __init__(self, folder, **options):
        self.folder, self.options = folder, options

    def on_save(self, args, state, control, **kwargs):
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        kwargs["model"].save_pretrained(checkpoint / self.folder, **self.options)


@pytest.mark.parametrize(
    ("folder", "options"), [("", {}), ("adapter_model", {}), ("", dict(save_embedding_layers=True))]
)
def test_a_callback_that_saves_the_model_leaves_checkpoints_whole(make_trainer, tmp_path, folder, options):
    make_trainer(callbacks=[SaveWithPeft(folder, **options)], **SAVING).train()
    resumed, whole = make_trainer(), make_trainer(output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    whole.train()
    for name in ("default", "teacher"):
        expected = adapter_weights(whole, name)
        assert all(torch.equal(expected[n], w) for n, w in adapter_weights(resumed, name).items())


@pytest.mark.parametrize("teacher", ["ema", "frozen", "none"])
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens"]])
def test_embeddings_of_another_base_are_refused_before_they_are_loaded(make_trainer, tmp_path, teacher, targets):
    def run(seed, **options):
        peft_config = lora(target_modules=targets)
        return make_trainer(model=tiny_model(seed=seed), peft_config=peft_config, teacher=teacher, **options)

    run(0, callbacks=[SaveWithPeft("", save_embedding_layers=True)], max_steps=2, **SAVING).train()
    other = run(1, output_dir=str(tmp_path / "other"))
    before = other.model.get_input_embeddings().weight.clone()
    with pytest.raises(ValueError, match="other values for '.*embed_tokens.*another base.*original base model"):
        other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    assert torch.equal(other.model.get_input_embeddings().weight, before)
    run(0, output_dir=str(tmp_path / "same")).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


# What PEFT writes of the base beside an adapter: (adapter, tokens added, model).
TIED = dict(tie_word_embeddings=True)
GPT2 = dict(model_type="gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=128)
LINEAR = ["q_proj", "v_proj"]
BESIDE = {
    "embeddings": (lora(target_modules=["q_proj", "embed_tokens"]), 0, {}),
    "tied embeddings": (lora(target_modules=["q_proj", "embed_tokens"]), 0, TIED),
    "wte": (lora(target_modules=["c_attn", "wte"], fan_in_fan_out=True), 0, GPT2),
    "new tokens": (lora(target_modules=LINEAR), 2, {}),
    "new tokens, trained": (lora(target_modules=LINEAR, trainable_token_indices=[44, 45]), 2, {}),
    "new tokens, whole": (lora(target_modules=LINEAR, modules_to_save=["embed_tokens", "lm_head"]), 2, {}),
    "new tokens, tied": (
        lora(target_modules=LINEAR, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
        2,
        TIED,
    ),
}


@pytest.fixture
def make_beside(make_trainer, tokenizer, tmp_path):
    """A run of an adapter of `BESIDE` on a base that lies in a folder, whose vocabulary was enlarged after it was loaded."""

    def make(name, **options):
        peft_config, added, changes = BESIDE[name]
        if not (tmp_path / "base").exists():
            tiny_model(**dict(vocab_size=len(tokenizer)) | changes).save_pretrained(tmp_path / "base")
            tokenizer.add_tokens(["<x>", "<y>"][:added])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer))
        return make_trainer(model=model, peft_config=copy.deepcopy(peft_config), data=rows(8), max_steps=2, **options)

    return make


def logits(model):
    ids = torch.tensor([[1, 7, 25, len(make_tokenizer()) - 1, 12]], device=model.device)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.cpu()


@pytest.mark.parametrize(
    ("name", "teacher"),
    [*((name, "ema") for name in BESIDE), ("embeddings", "none"), ("new tokens, trained", "frozen"), ("wte", "none")],
)
def test_a_run_resumes_and_loads_its_best_where_peft_writes_more_than_the_adapter(make_beside, tmp_path, name, teacher):
    whole = make_beside(name, teacher=teacher, **BEST | dict(save_total_limit=None, learning_rate=1e-2))
    whole.train()
    assert whole.state.best_model_checkpoint  # came back in the end
    resumed = make_beside(name, teacher=teacher, output_dir=str(tmp_path / "other"), **SAVING)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
    for folder in ("", "teacher") if teacher == "ema" else ("",):
        again, first = (load_file(tmp_path / run / "checkpoint-2" / folder / WEIGHTS) for run in ("other", "out"))
        assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


@pytest.mark.parametrize("name", ["embeddings", "new tokens", "new tokens, trained", "new tokens, whole"])
def test_teachers_load_by_their_folder_alone(make_beside, tmp_path, name):
    """Without a `task_type`, with new tokens: in a checkpoint, and where the model is saved."""
    trainer = make_beside(name, ema_decay=0.5, **SAVING)
    trainer.train()
    trainer.save_model()
    for run in ("out", "out/checkpoint-2"):
        student = AutoPeftModelForCausalLM.from_pretrained(tmp_path / run)
        torch.testing.assert_close(logits(student), logits(trainer.model), rtol=0, atol=1e-5)
        teacher = AutoPeftModelForCausalLM.from_pretrained(tmp_path / run / "teacher")
        with trainer.teacher.activate():
            expected = logits(trainer.model)
        torch.testing.assert_close(logits(teacher), expected, rtol=0, atol=1e-5)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / run / "teacher")
        assert len(tokenizer) == len(trainer.processing_class) and tokenizer.chat_template


@pytest.mark.parametrize("source", ["another step", "another run"])
def test_a_teacher_of_another_checkpoint_is_refused(make_trainer, tmp_path, checkpoint, source):
    if source == "another run":
        make_trainer(output_dir=str(tmp_path / "foreign"), **SAVING).train()
        foreign = tmp_path / "foreign" / "checkpoint-4" / "teacher"
    else:
        foreign = checkpoint.with_name("checkpoint-3") / "teacher"
    shutil.copytree(foreign, checkpoint / "teacher", dirs_exist_ok=True)
    trainer = make_trainer(output_dir=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="belongs to another checkpoint .*Resume from another"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_a_folder_that_is_no_checkpoint_is_refused(make_trainer, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: there is no trainer_state.json.*checkpoint-"):
        make_trainer().train(resume_from_checkpoint=str(tmp_path))


def test_resuming_from_nothing_is_refused(make_trainer):
    with pytest.raises(ValueError, match="There is no checkpoint in .* to resume from. Start without"):
        make_trainer().train(resume_from_checkpoint=True)


@pytest.mark.parametrize("method", ["_save_rng_state", "_save_optimizer_and_scheduler", "save_model"])
def test_an_interrupted_save_leaves_the_last_checkpoint_and_no_half_one(make_trainer, tmp_path, monkeypatch, method):
    trainer = make_trainer(save_total_limit=1, **SAVING)
    plain = getattr(trainer, method)

    def die_in_the_third(*args, **kwargs):
        result = plain(*args, **kwargs)
        if trainer.state.global_step == 3:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(trainer, method, die_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert folders(tmp_path / "out") == ["_checkpoint.part", "checkpoint-2"]
    resumed, whole = make_trainer(**SAVING), make_trainer(output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert all(torch.equal(w, dict(whole.model.named_parameters())[n]) for n, w in resumed.model.named_parameters())
    assert "_checkpoint.part" not in folders(tmp_path / "out")


def test_only_as_many_checkpoints_stay_as_asked(make_trainer, tmp_path):
    make_trainer(save_total_limit=2, **SAVING).train()
    assert folders(tmp_path / "out") == ["checkpoint-3", "checkpoint-4"]


@pytest.mark.parametrize("limit", [None, 0, 2])
def test_only_a_limit_has_checkpoints_sorted_by_their_time(make_trainer, tmp_path, monkeypatch, limit):
    """Transformers warns of times that it takes for unreliable, of which nobody wants to hear without need."""
    sorts = []

    def sort(folder, **options):
        sorts.append(options)
        return sort_checkpoints(folder, **options)

    monkeypatch.setattr("trl_ema.checkpointing.folders.sort_checkpoints", sort)
    make_trainer(save_total_limit=limit, **SAVING).train()
    assert len(folders(tmp_path / "out")) == (limit or 4) and len(sorts) == (4 if limit else 0)


def test_the_best_checkpoint_is_remembered_where_it_lies(make_trainer, tmp_path):
    trainer = make_trainer(**BEST)
    trainer.train()
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / "out" / f"checkpoint-{state['best_global_step']}")
    assert os.path.isdir(trainer.state.best_model_checkpoint)


def test_only_a_run_that_goes_on_finishes_what_an_earlier_one_left(make_trainer, tmp_path):
    out = tmp_path / "out"
    make_trainer(**SAVING).train()
    (out / "checkpoint-4").rename(out / "_replacing-checkpoint-4.new")  # killed before its last rename
    for name in ("_replacing-checkpoint-3.old", "_replacing-checkpoint-9.gone"):
        (out / name).mkdir()
    left = set(os.listdir(out))
    make_trainer().train()  # anew, and writes nothing
    assert set(os.listdir(out)) == left
    resumed = make_trainer(**SAVING)
    resumed.train(resume_from_checkpoint=str(out / "checkpoint-4"))
    assert resumed.state.global_step == 4
    assert folders(out) == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_an_older_folder_of_the_same_name_is_replaced(make_trainer, tmp_path):
    (tmp_path / "out" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-4" / "stale").touch()
    make_trainer(**SAVING).train()
    assert "stale" not in os.listdir(tmp_path / "out" / "checkpoint-4")
    assert folders(tmp_path / "out") == [f"checkpoint-{step}" for step in (1, 2, 3, 4)]


def test_replacing_a_folder_that_is_not_there_yet(tmp_path):
    (tmp_path / "new").mkdir()
    replace_folder(str(tmp_path / "new"), str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_is_not_moved_aside_for_one_that_is_not_there(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError):
        replace_folder(str(tmp_path / "new"), str(tmp_path / "folder"))
    assert os.listdir(tmp_path) == ["folder"]


def test_a_replacement_that_was_interrupted_is_finished(tmp_path, monkeypatch):
    for name in ("new", "checkpoint-4"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    rename, calls = os.rename, []

    def killed_at_the_third(*names):
        calls.append(names)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rename(*names)

    monkeypatch.setattr(os, "rename", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(str(tmp_path / "new"), str(tmp_path / "checkpoint-4"))
    assert not (tmp_path / "checkpoint-4").exists()
    monkeypatch.setattr(os, "rename", rename)
    finish_replacing(str(tmp_path))
    assert os.listdir(tmp_path / "checkpoint-4") == ["new"]
    assert os.listdir(tmp_path) == ["checkpoint-4"]


def test_a_kill_in_a_removal_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch):
    (tmp_path / "checkpoint-4").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path, **options: None)  # killed
    remove_folder(str(tmp_path / "checkpoint-4"))
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-4").exists() and len(os.listdir(tmp_path)) == 1
    finish_replacing(str(tmp_path))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    ("options", "kept"),
    [(SAVING, [3, 4]), (BEST | dict(learning_rate=1e-2), [1, 4])],  # the loss falls, and the highest is called best
)
def test_the_oldest_checkpoints_go_and_the_best_stays(make_trainer, tmp_path, options, kept):
    make_trainer(**options | dict(save_total_limit=2)).train()
    assert folders(tmp_path / "out") == [f"checkpoint-{step}" for step in kept]


def test_a_later_step_of_an_abandoned_branch_is_told(make_trainer, checkpoint, caplog):
    make_trainer(**SAVING).train(resume_from_checkpoint=True)
    assert "was written after it" not in caplog.text
    earlier = checkpoint.with_name("checkpoint-2") / "trainer_state.json"
    os.utime(earlier, (later := checkpoint.stat().st_mtime + 60, later))
    make_trainer(**SAVING).train(resume_from_checkpoint=True)
    assert "checkpoint-4 is the latest step in" in caplog.text and "checkpoint-2 was written after it" in caplog.text


def test_another_schedule_than_the_checkpoints_is_told(make_trainer, checkpoint, caplog):
    make_trainer(**SAVING).train(resume_from_checkpoint=str(checkpoint))
    assert "this run goes on with" not in caplog.text
    make_trainer(kl_weight=0.25, **SAVING).train(resume_from_checkpoint=str(checkpoint))
    assert re.search(r"was made with .*, this run goes on with .*'kl_weight': 0.25", caplog.text)


def test_a_signal_after_the_last_step_reaches_whoever_waits_for_it(make_trainer):
    trainer = make_trainer(enable_jit_checkpoint=True)

    class Late(TrainerCallback):
        def on_train_end(self, *args, **kwargs):
            signal.raise_signal(signal.SIGINT)

    trainer.add_callback(Late())
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stopped_run_saves_before_it_evaluates(make_trainer, tmp_path):
    trainer = make_trainer(
        enable_jit_checkpoint=True,
        eval_dataset=rows(4, seed=9),
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="no",
    )

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                signal.raise_signal(signal.SIGTERM)

        def on_evaluate(self, args, state, control, **kwargs):
            assert folders(tmp_path / "out") == ["checkpoint-2"]

    trainer.add_callback(Stop())
    trainer.train()
    state = read_json(tmp_path / "out" / "checkpoint-2" / "trainer_state.json")
    assert any("eval_loss" in entry for entry in state["log_history"])


class Hub:
    """Remembers what would have been uploaded."""

    def __init__(self):
        self.pushed = []

    def upload_folder(self, *, folder_path, ignore_patterns, **options):
        folder = Path(folder_path)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        state = read_json(folder / "teacher" / "state.json")
        # A copy: the file will be written over.
        student = {name: tensor.clone() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
        self.pushed.append((state["step"], student, set(filter_repo_objects(names, ignore_patterns=ignore_patterns))))
        done = Future()
        done.set_result(None)
        return done


def test_a_pushed_checkpoint_brings_its_own_teacher_along_and_nothing_half_written(make_trainer, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    trainer = make_trainer(**SAVING)
    trainer.args.push_to_hub, trainer.hub_model_id, trainer.push_in_progress = True, "someone/model", None
    (tmp_path / "out" / "_checkpoint.part" / "checkpoint-9").mkdir(parents=True)
    (tmp_path / "out" / "_checkpoint.part" / "checkpoint-9" / "half").touch()
    trainer.train()
    assert [step for step, _, _ in hub.pushed] == [1, 2, 3, 4]
    for step, student, names in hub.pushed:
        saved = load_file(tmp_path / "out" / f"checkpoint-{step}" / "adapter_model.safetensors")
        assert all(torch.equal(student[name], weight) for name, weight in saved.items())
        assert {"teacher/adapter_model.safetensors", "teacher/adapter_config.json"} <= names
        assert not any("part" in name for name in names)
    PeftModel.from_pretrained(trainer.model.get_base_model(), tmp_path / "out" / "teacher", adapter_name="other")


def test_a_teacher_is_not_pushed_while_an_earlier_push_runs(make_trainer, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda *args, **kwargs: hub)
    trainer = make_trainer(**SAVING)
    trainer.args.push_to_hub, trainer.hub_model_id = True, "someone/model"
    trainer.push_in_progress = SimpleNamespace(is_done=lambda: False, wait_until_done=lambda: None)
    trainer.train()
    assert not hub.pushed and not (tmp_path / "out" / "teacher").exists()


def test_a_teacher_of_an_earlier_run_in_the_folder_is_replaced(make_trainer, tmp_path):
    stale = tmp_path / "out" / "teacher"
    make_trainer(teacher_anchor=0.5).save_model()
    assert read_json(stale / "adapter_config.json")["lora_alpha"] == 4
    make_trainer().save_model()
    assert read_json(stale / "adapter_config.json")["lora_alpha"] == 8


@pytest.mark.parametrize("teacher", ["ema", "none"])
def test_a_run_that_had_ended_is_not_trained_further(make_trainer, tmp_path, teacher):
    """Three steps are no epoch: nothing but the step count says that it had ended."""
    make_trainer(max_steps=3, teacher=teacher, **SAVING).train()
    resumed = make_trainer(max_steps=3, teacher=teacher)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 3
    saved = load_file(tmp_path / "out" / "checkpoint-3" / "adapter_model.safetensors")
    resumed.save_model(str(tmp_path / "again"))
    again = load_file(tmp_path / "again" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in saved.items())
    assert teacher == "none" or resumed.teacher.num_updates == 3


class Spoil(TrainerCallback):
    """In the end, damages the teacher of the best checkpoint, or puts another's there."""

    def __init__(self, way):
        self.way = way

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == state.max_steps:
            best = Path(state.best_model_checkpoint)
            if self.way == "damaged":
                flip_a_bit(best / "teacher" / WEIGHTS)
            else:
                other = next(folder for folder in best.parent.glob("checkpoint-*") if folder != best)
                shutil.copytree(other / "teacher", best / "teacher", dirs_exist_ok=True)


@pytest.mark.parametrize(
    ("way", "match"),
    [
        ("damaged", r"is damaged \(.* do not have their checksum together\)\. Resume from another"),
        ("another", "belongs to another checkpoint .*Resume from another"),
    ],
)
def test_a_teacher_that_is_not_the_best_students_is_refused(make_trainer, way, match):
    options = BEST | dict(callbacks=[Spoil(way)], save_total_limit=None)
    with pytest.raises(ValueError, match=match):
        make_trainer(**options).train()


class Kill(TrainerCallback):
    def __init__(self, number):
        self.number = number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops_and_the_run_goes_on_as_if_nothing_had_been(make_trainer, tmp_path, number):
    before = signal.getsignal(number)
    stopped = make_trainer(enable_jit_checkpoint=True, callbacks=[Kill(number)])
    stopped.train()
    assert signal.getsignal(number) is before
    assert stopped.stopped_by == number
    assert stopped.state.global_step == 3
    assert folders(tmp_path / "out") == ["checkpoint-3"]
    resumed, whole = make_trainer(), make_trainer(output_dir=str(tmp_path / "whole"))
    resumed.train(resume_from_checkpoint=True)
    whole.train()
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert all(torch.equal(w, dict(whole.model.named_parameters())[n]) for n, w in resumed.model.named_parameters())


@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_checkpoint_of_a_signal_stays_beside_the_best(make_trainer, tmp_path, strategy):
    options = BEST | dict(save_strategy=strategy, enable_jit_checkpoint=True, callbacks=[Kill(signal.SIGTERM)])
    stopped = make_trainer(**options)
    stopped.train()
    assert stopped.state.global_step == 3
    assert "checkpoint-3" in folders(tmp_path / "out")
    assert stopped.teacher.num_updates == 3  # not the best's


def test_what_is_due_at_the_end_of_an_epoch_waits_for_it_after_a_signal(make_trainer, tmp_path):
    options = dict(
        eval_dataset=rows(4, seed=9), eval_strategy="epoch", save_strategy="epoch", enable_jit_checkpoint=True
    )
    stopped = make_trainer(callbacks=[Kill(signal.SIGTERM)], **options)
    stopped.train()
    assert 0 < stopped.state.epoch < 1 and folders(tmp_path / "out") == ["checkpoint-3"]
    assert not any("eval_loss" in entry for entry in stopped.state.log_history)
    make_trainer(**options).train(resume_from_checkpoint=True)
    whole = make_trainer(output_dir=str(tmp_path / "whole"), **options)
    whole.train()
    last = read_json(tmp_path / "out" / "checkpoint-4" / "trainer_state.json")["log_history"]
    assert [e["eval_loss"] for e in last if "eval_loss" in e] == [
        e["eval_loss"] for e in whole.state.log_history if "eval_loss" in e
    ]


class Fail(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise RuntimeError("something else")


def test_signals_are_given_back_after_an_error(make_trainer):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="something else"):
        make_trainer(enable_jit_checkpoint=True, callbacks=[Fail()]).train()
    assert signal.getsignal(signal.SIGINT) is before
