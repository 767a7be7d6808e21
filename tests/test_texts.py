"""Texts that a model writes itself: the same however they are written, drawn from all that it would say, whole files or none."""

import contextlib
import errno
import json
import os
import random
import re
import shutil
import stat
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import lora, make_tokenizer, qwen2_tokenizer, tiny_model
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy import stats
from test_cli import trl_ema
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BitsAndBytesConfig

from trl_ema import texts as module
from trl_ema.adapters.starting_point import StartingPoint
from trl_ema.evaluation.models import load_base
from trl_ema.files import OutputError
from trl_ema.fingerprint import model_fingerprint
from trl_ema.texts import Sampling, Texts, draw_tokens, load_texts, texts_path, write_texts


SAMPLING = Sampling(num_texts=14, num_tokens=24)
BOS, END, USER, ASSISTANT = 1, 2, 4, 5


def write(model, folder, sampling=SAMPLING, tokenizer=None, **options):
    options = dict(batch_size=3, progress=False) | options
    return write_texts(model, tokenizer or make_tokenizer(), sampling, Path(folder) / "texts.safetensors", **options)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write(tiny_model(), tmp_path_factory.mktemp("reference"))


def without_template():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    return tokenizer


def with_template(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


# What is written


def test_half_of_the_texts_are_raw_and_half_chats(reference):
    assert reference.kinds == ["raw", "chat"] * 7
    assert reference.about["sampling"] == {
        "num_texts": 14, "num_tokens": 24, "seed": 0, "start_token": None, "chat": None,
    }  # fmt: skip
    assert reference.about["versions"].keys() == {"trl_ema", "torch", "transformers"}


def test_raw_texts_have_exactly_as_many_tokens_and_run_on_past_an_end(tmp_path):
    texts = write(tiny_model(), tmp_path, Sampling(num_texts=40, num_tokens=30, chat=False), batch_size=40)
    assert {len(row) for row in texts.ids} == {30} and {row[0] for row in texts.ids} == {BOS}
    assert any(END in row[1:-1] for row in texts.ids)


def test_a_chat_is_the_template_around_what_the_model_wrote(tmp_path):
    texts = write(tiny_model(), tmp_path, Sampling(num_texts=60, num_tokens=24, chat=True), batch_size=20)
    lengths = Counter()
    for row in texts.ids:
        assert row[0] == USER and len(row) <= 24
        end = row.index(END)
        assert row[end + 1] == ASSISTANT and end - 1 <= 8
        answer = row[end + 2 :]
        assert answer and END not in answer[:-1] and (len(row) == 24 or answer[-1] == END)
        lengths["prompt cut" if end - 1 == 8 else "prompt ended"] += 1
        lengths["answer cut" if answer[-1] != END else "answer ended"] += 1
    assert all(lengths[f"{part} {how}"] > 2 for part in ("prompt", "answer") for how in ("cut", "ended")), lengths


def test_all_are_raw_without_a_chat_template(tmp_path):
    assert set(write(tiny_model(), tmp_path, tokenizer=without_template()).kinds) == {"raw"}


@pytest.mark.parametrize(("chat", "kinds"), [(False, {"raw"}), (True, {"chat"})])
def test_one_kind_alone_can_be_asked_for(tmp_path, chat, kinds):
    tokenizer = make_tokenizer()
    if chat:
        tokenizer.bos_token = None  # that of raw texts is not needed
    assert set(write(tiny_model(), tmp_path, Sampling(6, 24, chat=chat), tokenizer).kinds) == kinds


def test_each_token_is_the_one_that_its_random_number_draws_from_the_models_own_logits(reference):
    model = tiny_model().eval()
    for number, row in enumerate(reference.ids):
        logits = model(torch.tensor([row])).logits[0].double()
        if reference.kinds[number] == "raw":
            uniforms = module._uniforms([number], 0, 23)[0]
            places = range(1, 24)
        else:
            uniforms = module._uniforms([number], 0, 8 + 24)[0]
            end = row.index(END)
            answer = range(end + 2, len(row))
            # the end of a prompt is the model's own unless the prompt was cut
            prompt = range(1, end + 1 if end - 1 < 8 else end)
            places = [*prompt, *answer]
            uniforms = torch.cat([uniforms[: len(prompt)], uniforms[8 : 8 + len(answer)]])
        for place, uniform in zip(places, uniforms, strict=True):
            cumulative = logits[place - 1].softmax(-1).cumsum(-1)
            assert row[place] == int((cumulative <= uniform).sum()), (number, place)


def test_first_tokens_are_as_frequent_as_the_model_says(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # likely and unlikely tokens
    texts = write(model, tmp_path, Sampling(num_texts=4000, num_tokens=2, chat=False), batch_size=2000)
    expected = 4000 * model.eval()(torch.tensor([[BOS]])).logits[0, -1].detach().double().softmax(-1).numpy()
    found = np.bincount([row[1] for row in texts.ids], minlength=len(expected))
    often = expected >= 5
    groups = [np.append(x[often], x[~often].sum()) for x in (found, expected)]
    assert 10 < often.sum() < len(expected) and stats.chisquare(*groups).pvalue > 0.01
    # Nothing is cut off: what nucleus sampling (0.9) or top-50 would leave out comes as well.
    order = expected.argsort()[::-1]
    tail = order[expected[order].cumsum() > 0.95 * 4000]
    assert (
        found[tail].sum() == pytest.approx(expected[tail].sum(), abs=4 * expected[tail].sum() ** 0.5) and len(tail) > 3
    )


def test_draws_are_exact_and_impossible_tokens_never_come():
    logits = torch.tensor([0.1, 0.0, 0.4, 0.5, 0.0]).log()
    uniforms = torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001, 1 - 2**-53], dtype=torch.float64)
    tokens, are_numbers = draw_tokens(logits.expand(6, -1), uniforms)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3] and are_numbers


@pytest.mark.gpu
def test_a_gpu_draws_what_a_cpu_draws_and_writes_the_same_twice(tmp_path):
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(64, 50_000, generator=generator)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        there = draw_tokens(logits.cuda(), uniforms.cuda())[0].cpu()
        texts = [write(tiny_model().cuda(), tmp_path / str(i)) for i in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert (there != draw_tokens(logits, uniforms)[0]).sum() <= 1  # the softmax may round otherwise
    assert texts[0] == texts[1]


def test_the_models_own_settings_of_generation_do_not_count(tmp_path, reference):
    model = tiny_model()
    own = dict(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, min_p=0.5, typical_p=0.2, repetition_penalty=9.0, no_repeat_ngram_size=1,
        suppress_tokens=list(range(20)), max_new_tokens=2, min_new_tokens=20, use_cache=False, num_beams=3, eos_token_id=END,
    )  # fmt: skip
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config
    assert write(model, tmp_path).ids == reference.ids
    assert model.generation_config is before and before.top_k == 1


def test_ends_of_the_models_settings_and_of_the_template_end_a_chat(tmp_path):
    model = tiny_model()
    model.generation_config.eos_token_id = [END, 40]
    tokenizer = with_template("{% for m in messages %}<user> {{ m['content'] }} <unk> {% endfor %}<assistant> ")
    texts = write(model, tmp_path, Sampling(60, 24, chat=True), tokenizer)
    assert texts.about["ends"] == [END, 3, 40] and texts.about["tail"] == [3, ASSISTANT]
    for row in texts.ids:
        end = row.index(3)
        assert not {END, 40} & {*row[1:end]} and row[end + 1] == ASSISTANT
        assert not {END, 3, 40} & {*row[end + 2 : -1]}


def test_a_template_without_a_token_that_ends_a_turn_ends_prompts_but_no_answers(tmp_path):
    tokenizer = with_template("{% for m in messages %}what {{ m['content'] }} is the {% endfor %}")
    texts = write(tiny_model(), tmp_path, Sampling(60, 24, chat=True), tokenizer, batch_size=60)
    word = tokenizer.convert_tokens_to_ids("is")
    assert texts.about["ends"] == [END] and texts.about["tail"][0] == word
    assert any(word in row[row.index(word) + 2 :] for row in texts.ids)


# The same however they are written


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_writes_the_same(tmp_path, reference, ranks):
    meet, found, done = threading.Barrier(ranks), {}, {}
    models = [tiny_model() for _ in range(ranks)]
    for rank, model in enumerate(models):
        calls, generate = done.setdefault(rank, []), model.generate
        model.generate = lambda *a, calls=calls, generate=generate, **k: calls.append(1) or generate(*a, **k)

    def run(rank):
        found[rank] = write(models[rank], tmp_path, rank=rank, world_size=ranks, barrier=meet.wait)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[rank] == reference for rank in range(ranks))
    assert all(done.values()) and [path.name for path in tmp_path.iterdir()] == ["texts.safetensors"]


def interrupted_after(model, calls):
    """The model fails in the middle of a batch."""
    forward, left = model.forward, [calls]

    def failing(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.forward = failing
    return model


@pytest.mark.parametrize(("calls", "finished"), [(0, 0), (30, 1), (75, 3), (90, 4)])
def test_after_an_interruption_in_the_middle_of_a_batch_only_the_rest_is_written(tmp_path, reference, calls, finished):
    model = tiny_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(KeyboardInterrupt):
        write(interrupted_after(model, calls), tmp_path)
    assert all(m.training for m in model.modules()) and model.is_gradient_checkpointing
    parts = list(tmp_path.glob("*.parts/*"))
    assert len(parts) == finished
    again, count = tiny_model(), []
    generate = again.generate
    again.generate = lambda *a, **k: count.append(1) or generate(*a, **k)
    assert write(again, tmp_path) == reference
    # three raw batches of one pass, three of chats of two
    done = {"raw": 0, "chat": 0} | Counter("chat" if int(path.name[6:12]) % 2 else "raw" for path in parts)
    assert len(count) == 3 - done["raw"] + 2 * (3 - done["chat"])
    assert not list(tmp_path.glob("*.parts"))


def test_parts_of_other_texts_and_damaged_ones_are_written_again(tmp_path, reference):
    for model, sampling in ((tiny_model(seed=1), SAMPLING), (tiny_model(), Sampling(14, 24, seed=5))):
        with pytest.raises(KeyboardInterrupt):
            write(interrupted_after(model, 100), tmp_path, sampling)
    with pytest.raises(KeyboardInterrupt):
        write(interrupted_after(tiny_model(), 30), tmp_path)
    parts = sorted(tmp_path.glob("*.parts/*"))
    assert len(parts) > 1
    parts[0].write_bytes(parts[0].read_bytes()[:-3])
    assert write(tiny_model(), tmp_path) == reference


def test_another_batch_size_draws_the_same_texts(tmp_path, reference):
    assert write(tiny_model(), tmp_path, batch_size=7).ids == reference.ids


def test_another_seed_draws_others(tmp_path, reference):
    texts = write(tiny_model(), tmp_path, Sampling(14, 24, seed=1))
    assert not [row for row in texts.ids if row in reference.ids]


def test_texts_that_are_there_are_read_and_not_written(tmp_path, reference):
    write(tiny_model(), tmp_path)
    before = (tmp_path / "texts.safetensors").stat().st_mtime_ns
    assert write(interrupted_after(tiny_model(), 0), tmp_path) == reference
    assert (tmp_path / "texts.safetensors").stat().st_mtime_ns == before


@contextlib.contextmanager
def nothing_drawn():
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    yield
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_neither_random_states_nor_the_model_are_changed(tmp_path):
    model = get_peft_model(tiny_model(attention_dropout=0.5), lora(lora_dropout=0.5)).train()
    model.base_model.model.model.norm.eval()
    modes = [m.training for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    with nothing_drawn():
        write(model, tmp_path)
    assert [m.training for m in model.modules()] == modes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert {n for n, p in model.named_parameters() if p.requires_grad} and not any(p.grad for p in model.parameters())


# The model before its training


def test_an_adapter_is_off_meanwhile(tmp_path, reference):
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False, lora_dropout=0.3)).train()
    texts = write(model, tmp_path)
    assert texts == reference  # and of the same fingerprint
    assert model(torch.tensor([[BOS]])).logits.ne(tiny_model()(torch.tensor([[BOS]])).logits).any()


def test_a_trainers_model_writes_as_the_one_that_was_given(make_trainer, tmp_path, reference):
    trainer = make_trainer(teacher="ema", max_steps=1)
    before = StartingPoint(trainer.model).activate
    trainer.train()
    tokenizer = make_tokenizer()
    texts = write(trainer.model, tmp_path, tokenizer=tokenizer, before=before)
    assert texts.ids == reference.ids and texts.about["fingerprint"] == reference.about["fingerprint"]


def test_a_start_with_an_adapter_is_another_model(tmp_path, reference):
    model = get_peft_model(tiny_model(), lora(init_lora_weights=False))
    start = StartingPoint(model)
    first = write(model, tmp_path / "first", before=contextlib.nullcontext)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    assert write(model, tmp_path / "again", before=start.activate) == first
    assert first.about["fingerprint"] != reference.about["fingerprint"] and first.ids != reference.ids
    other = model_fingerprint(model, make_tokenizer(), contextlib.nullcontext)
    assert other not in (first.about["fingerprint"], reference.about["fingerprint"])


def test_a_4bit_model_writes_in_4_bits_and_trains_on(tiny_folder, tmp_path):
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = str(tiny_folder / "model")
    plain, tokenizer = load_base(folder, dtype=torch.float32)
    sampling = Sampling(8, 40)
    model, _ = load_base(folder, dtype=torch.float32, quantization_config=quantized)
    texts = write(model, tmp_path / "base", sampling, tokenizer)
    plain_texts = write(plain, tmp_path / "plain", sampling, tokenizer)
    assert texts.ids != plain_texts.ids and texts.about["fingerprint"] != plain_texts.about["fingerprint"]
    peft = get_peft_model(model, lora(init_lora_weights=False))
    assert write(peft, tmp_path / "peft", sampling, tokenizer) == texts
    assert model_fingerprint(peft, tokenizer) == texts.about["fingerprint"]
    ids = torch.tensor([texts.ids[0]], device=peft.device)
    peft.train()(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in peft.parameters() if p.requires_grad)


# The start of a document


def test_a_start_token_that_only_the_models_configuration_names_is_used_if_it_is_special(tmp_path):
    tokenizer = qwen2_tokenizer()
    assert tokenizer.bos_token_id is None
    model = tiny_model("qwen2", vocab_size=416, bos_token_id=tokenizer.eos_token_id)
    texts = write(model, tmp_path, Sampling(4, 40), tokenizer)
    assert texts.about["start"] == tokenizer.eos_token_id == texts.ids[0][0]


def test_an_unknown_start_names_the_option_that_gives_it(tmp_path):
    tokenizer = qwen2_tokenizer()
    model = tiny_model("qwen2", vocab_size=416, bos_token_id=17)  # an ordinary word
    with pytest.raises(ValueError, match=r"Give it as `start_token` \(`rehearsal_start` in training\)") as error:
        write(model, tmp_path, Sampling(4, 40), tokenizer)
    assert tokenizer.eos_token in str(error.value)
    texts = write(model, tmp_path, Sampling(4, 40, start_token=tokenizer.eos_token), tokenizer)
    assert texts.ids[0][0] == tokenizer.eos_token_id


def test_a_start_token_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`start_token='<doc>'` .* is no token of the tokenizer"):
        write(tiny_model(), tmp_path, Sampling(4, 24, start_token="<doc>"))


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_texts": 0}, ValueError, "`num_texts` must be a whole number of at least 1, got 0"),
        ({"num_tokens": 1}, ValueError, "`num_tokens` must be a whole number of at least 2, got 1"),
        ({"num_tokens": "8"}, TypeError, "`num_tokens` must be a number, got '8'"),
        ({"seed": -1}, ValueError, "`seed` must be a whole number of at least 0, got -1"),
        ({"start_token": 3}, TypeError, "`start_token` must be the text of a token, got 3"),
        ({"chat": "perhaps"}, TypeError, "`chat` must be a boolean, got 'perhaps'"),
    ],
)
def test_a_sampling_that_cannot_be_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        Sampling(**options)


def test_a_samplings_numbers_are_read_from_any_library():
    sampling = Sampling(np.int64(3), 8.0, torch.tensor(2), chat="false")
    assert sampling == Sampling(3, 8, 2, None, False) and type(sampling.num_tokens) is int


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no users here') }}", "cannot write a user's message (no users here)"),
        ("{% for m in messages %}<user> {{ m['role'] }}{% endfor %}", "or not the message: '<user> user'"),
        ("{% for m in messages %}{{ m['content'] }} </s>{% endfor %}", "writes nothing before a user's message"),
        ("{% for m in messages %}<user> {{ m['content'] }}{% endfor %}", "nothing after it"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        write(tiny_model(), tmp_path, tokenizer=with_template(template))
    assert "Set `chat=False` (`rehearsal_chat` in training; raw texts alone), or mend `tokenizer.chat_template`" in str(
        error.value
    )
    assert not list(tmp_path.iterdir())


def test_chats_without_a_template_are_refused(tmp_path):
    with pytest.raises(ValueError, match="`chat=True`, but the tokenizer has no chat template"):
        write(tiny_model(), tmp_path, Sampling(4, 24, chat=True), without_template())


def test_too_few_tokens_for_a_chat_are_refused_with_how_many_it_takes(tmp_path):
    with pytest.raises(ValueError, match=r"`num_tokens=4` leaves no room .* takes 3, .* Give at least 5"):
        write(tiny_model(), tmp_path, Sampling(4, 4))
    texts = write(tiny_model(), tmp_path, Sampling(4, 5))
    assert [len(row) for row in texts.ids if row[0] == BOS] == [5, 5]


def test_more_tokens_than_the_model_has_positions_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`num_tokens=129` .* is more than the 128 positions"):
        write(tiny_model(), tmp_path, Sampling(2, 129))


def test_a_sharded_model_is_told_of_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "any_sharded", lambda model: True)
    with pytest.raises(
        ValueError, match=r"cannot write texts: .* `trl-ema rehearse --num_texts 14 --num_tokens 24 --output_file FILE`"
    ):
        write(tiny_model(), tmp_path)


def test_logits_that_are_no_numbers_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    with pytest.raises(ValueError, match="logits are not all numbers"):
        write(model, tmp_path)


def test_a_batch_size_below_one_is_refused(tmp_path):
    with pytest.raises(ValueError, match="`batch_size` must be a whole number of at least 1, got 0"):
        write(tiny_model(), tmp_path, batch_size=0)


# Files


def test_a_file_is_read_back_as_it_was_written(tmp_path, reference):
    assert write(tiny_model(), tmp_path) == reference == load_texts(tmp_path / "texts.safetensors")
    with safe_open(tmp_path / "texts.safetensors", "pt") as file:
        assert {*file.keys()} == {"ids", "lengths", "kinds"}
        assert json.loads(file.metadata()["about"]) == reference.about
        assert file.get_tensor("ids").dtype == torch.int32


def test_the_file_has_the_permissions_of_any_other(tmp_path):
    mask = os.umask(0o027)
    try:
        write(tiny_model(), tmp_path)
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "texts.safetensors").stat().st_mode) == 0o640


def test_a_missing_file_says_which_command_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no texts in .*none\. Write them with `trl-ema rehearse"):
        load_texts(tmp_path / "none")


def damaged(folder, how):
    path = folder / "texts.safetensors"
    whole = path.read_bytes()
    if how == "a bit":
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
    elif how == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        with safe_open(path, "pt") as file:
            found = file.metadata()
        save_file(load_file(path), path, found | {"about": found["about"].replace('"seed": 0', '"seed": 1')})
    return path


@pytest.mark.parametrize("how", ["a bit", "cut off", "empty", "what is said of it"])
def test_damage_is_told(tmp_path, how):
    write(tiny_model(), tmp_path)
    path = damaged(tmp_path, how)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} is damaged.* Delete it"):
        load_texts(path)
    with pytest.raises(ValueError, match="is damaged"):
        write(tiny_model(), tmp_path)


def test_other_tensors_are_no_texts(tmp_path):
    save_file({"ids": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="holds no texts that a model has written"):
        load_texts(tmp_path / "x.safetensors")


def test_texts_of_another_model_or_tokenizer_are_refused_by_name(tmp_path):
    model = tiny_model()
    model.config._name_or_path = "some/model"
    texts = write(model, tmp_path)
    ours, theirs = texts.about["fingerprint"].split("-")
    with pytest.raises(
        ValueError, match=f"by another model: 'some/model' with model fingerprint {ours}, and this one's is"
    ):
        write(tiny_model(seed=1), tmp_path)
    with pytest.raises(ValueError, match=f"by another tokenizer: 'some/model' with tokenizer fingerprint {theirs}"):
        write(model, tmp_path, tokenizer=without_template())
    path = tmp_path / "texts.safetensors"
    with pytest.raises(ValueError, match="another model"):
        load_texts(path, model_fingerprint="0-0")
    assert load_texts(path, model_fingerprint=texts.about["fingerprint"]) == texts


def test_texts_of_another_sampling_are_not_overwritten(tmp_path, reference):
    write(tiny_model(), tmp_path)
    with pytest.raises(
        ValueError, match=r"texts of another sampling: `sampling` is .*'seed': 0.* there and .*'seed': 1"
    ):
        write(tiny_model(), tmp_path, Sampling(14, 24, seed=1))
    assert load_texts(tmp_path / "texts.safetensors") == reference


@pytest.mark.parametrize("written", [0, 2, 6])
def test_a_full_disk_loses_nothing_that_was_written(tmp_path, reference, monkeypatch, written):
    write_bytes, left = Path.write_bytes, [written]

    def full(self, data):
        left[0] -= 1
        if left[0] < 0:
            write_bytes(self, data[:100])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(self, data)

    with monkeypatch.context() as patch, pytest.raises(OutputError) as error:
        patch.setattr(Path, "write_bytes", full)
        write(tiny_model(), tmp_path)
    assert "(No space left on device)" in str(error.value) and "goes on from there" in str(error.value)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == written
    assert write(tiny_model(), tmp_path) == reference


def test_parts_that_another_machine_keeps_are_missed_by_name(tmp_path):
    with pytest.raises(OutputError, match=r"is missing, .* without a common file system"):
        write(tiny_model(), tmp_path, rank=0, world_size=2)


def test_parts_that_another_job_has_joined_are_not_missed(tmp_path, reference, monkeypatch):
    path, read = tmp_path / "texts.safetensors", module._read_part

    def taken_away(part, about):
        if (tmp_path / "other" / path.name).is_file():  # all parts are written, and not joined
            shutil.copy(tmp_path / "other" / path.name, path)
            part.unlink(missing_ok=True)
        return read(part, about)

    def wait():
        write(tiny_model(), tmp_path / "other")

    monkeypatch.setattr(module, "_read_part", taken_away)
    assert write(tiny_model(), tmp_path, barrier=wait) == reference


def test_the_cache_keeps_texts_by_model_and_sampling(tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    paths = {texts_path(f, s) for f in ("a-b", "a-c") for s in (Sampling(), Sampling(seed=1), Sampling(chat=False))}
    assert len(paths) == 6 and texts_path("a-b", Sampling(256)) in paths
    assert all(path.parent == tmp_path / "texts" and path.suffix == ".safetensors" for path in paths)


# Which model


def test_a_model_is_known_in_any_precision_that_its_weights_have():
    tokenizer = make_tokenizer()
    rounded = tiny_model().bfloat16()
    assert model_fingerprint(rounded, tokenizer) == model_fingerprint(rounded.float(), tokenizer)
    assert model_fingerprint(rounded, tokenizer) != model_fingerprint(tiny_model(), tokenizer)


def test_a_4bit_model_is_known_in_any_precision_that_its_weights_had(tmp_path):
    tokenizer, found = make_tokenizer(), {}
    tiny_model().bfloat16().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for kind in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.bfloat16):
            quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype)
            model, _ = load_base(str(tmp_path), dtype=dtype, quantization_config=quantized)
            found[kind, dtype] = model_fingerprint(model, tokenizer)
            model(torch.tensor([[BOS]], device=model.device))  # where it may be repacked
            assert model_fingerprint(model, tokenizer) == found[kind, dtype]
    assert len({*found.values()}) == 2 and found["nf4", torch.float32] == found["nf4", torch.bfloat16]


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_one_weight_makes_another_model(name):
    model, tokenizer = tiny_model(), make_tokenizer()
    before = model_fingerprint(model, tokenizer)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[-1] += 1e-4
    after = model_fingerprint(model, tokenizer)
    assert before.split("-")[0] != after.split("-")[0] and before.split("-")[1] == after.split("-")[1]


def test_large_tensors_are_hashed_whole(monkeypatch):
    monkeypatch.setattr("trl_ema.fingerprint._BLOCK", 7)
    test_one_weight_makes_another_model("model.layers.1.mlp.up_proj.weight")


def test_what_a_trainer_sets_does_not_make_another_model_and_what_computes_does():
    model, tokenizer = tiny_model(), make_tokenizer()
    before = model_fingerprint(model, tokenizer)
    model.config.use_cache, model.config.pad_token_id, model.config._name_or_path = False, 3, "elsewhere"
    model.config.eos_token_id, model.config.bos_token_id = [2, 3], None
    tokenizer.pad_token = "<unk>"
    assert model_fingerprint(model, tokenizer) == before
    model.config.rms_norm_eps *= 2
    assert model_fingerprint(model, tokenizer) != before


def test_a_sharded_model_is_known_and_finds_the_texts_of_the_whole_one(tmp_path, reference):
    write(tiny_model(), tmp_path)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = tiny_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert model_fingerprint(model, make_tokenizer()) == reference.about["fingerprint"]
        assert write(model, tmp_path) == reference
        with pytest.raises(ValueError, match="cannot write texts"):
            write(model, tmp_path / "new")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"trainable_token_indices": {"embed_tokens": [3]}},
        {"target_modules": ["embed_tokens", "q_proj"], "bias": "lora_only"},
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_an_adapter_that_is_off_does_not_make_another_model(options, tied):
    tokenizer, kind = make_tokenizer(), dict(model_type="qwen2", tie_word_embeddings=tied)
    model = get_peft_model(tiny_model(**kind), lora(init_lora_weights=False, **options))
    base = model_fingerprint(tiny_model(**kind), tokenizer)
    assert model_fingerprint(model, tokenizer) == base
    on = model_fingerprint(model, tokenizer, contextlib.nullcontext)
    assert on != base
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "q_proj.lora_A" in n).view(-1)[0] += 1
    assert model_fingerprint(model, tokenizer, contextlib.nullcontext) not in (on, base)
    assert model_fingerprint(model, tokenizer) == base


# The command


def six_texts(tiny_folder):
    model = tiny_folder / "model"
    return ["--model_name_or_path", model, "--num_texts", 6, "--num_tokens", 40, "--dtype", "float32"]


def test_the_command_writes_texts_and_prints_one_of_each_kind(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    options = six_texts(tiny_folder)
    done = trl_ema("rehearse", *options)
    (path,) = tmp_path.glob("texts/*")
    texts = load_texts(path)
    assert isinstance(texts, Texts) and texts.kinds == ["raw", "chat"] * 3
    assert f"6 texts (3 raw and 3 chat; {sum(map(len, texts.ids))} tokens; " in done.stdout
    assert re.search(rf"\d\.\d\d seconds each\) are in {path}", done.stdout)
    _, tokenizer = load_base(str(tiny_folder / "model"))
    for i, kind in enumerate(("raw", "chat")):
        assert f"A {kind} one:\n{tokenizer.decode(texts.ids[i])}" in done.stdout
    assert "they were there already" in trl_ema("rehearse", *options).stdout


def test_the_command_writes_what_a_training_in_4_bits_finds(tiny_folder, tmp_path):
    options = ["--num_texts", 4, "--num_tokens", 40, "--load_in_4bit", "true", "--chat", "false", "--seed", 3]
    path = tmp_path / "own.safetensors"
    trl_ema("rehearse", "--model", tiny_folder / "model", *options, "--output_file", path)
    quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model, tokenizer = load_base(str(tiny_folder / "model"), dtype=torch.float32, quantization_config=quantized)
    peft = get_peft_model(model, lora())
    texts = write_texts(peft, tokenizer, Sampling(4, 40, 3, chat=False), path, progress=False)
    assert texts.kinds == ["raw"] * 4


def test_the_command_writes_what_a_training_with_a_template_of_its_own_finds(tiny_folder, tmp_path):
    model, tokenizer = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    tokenizer.chat_template += "{# another #}"
    template, path = tmp_path / "own.jinja", tmp_path / "texts.safetensors"
    template.write_text(tokenizer.chat_template, encoding="utf-8")
    options = ["--chat_template_path", template, "--eos_token", tokenizer.convert_ids_to_tokens(USER)]
    trl_ema("rehearse", *six_texts(tiny_folder), *options, "--output_file", path)
    texts = load_texts(path, model_fingerprint=model_fingerprint(model, tokenizer))
    assert USER in texts.about["ends"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num_texts", "0"], "`num_texts` must be a whole number of at least 1, got 0"),
        (["--start_token", "<doc>"], "`start_token='<doc>'`"),
        (["--chat", "perhaps"], "perhaps"),
        (["--chat_template_path", "of/another"], "`chat_template_path='of/another'` is no .jinja file"),
        (["--output_file", "/proc/none/texts.safetensors"], "Cannot write texts to /proc/none/texts.safetensors"),
    ],
)
def test_the_command_refuses_bad_input_in_a_line(tiny_folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tmp_path))
    options = ["--model_name_or_path", tiny_folder / "model", "--num_tokens", 40, "--num_texts", 2, *arguments]
    done = trl_ema("rehearse", *options, check=False)
    assert done.returncode != 0 and message in done.stderr and "Traceback" not in done.stderr


def test_the_command_writes_what_a_training_that_goes_on_from_an_adapter_finds(tiny_folder, tmp_path):
    base, tokenizer = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    trained = get_peft_model(base, lora(init_lora_weights=False))
    trained.save_pretrained(tmp_path / "adapter")
    options = [
        "--num_texts",
        4,
        "--num_tokens",
        40,
        "--dtype",
        "float32",
        "--output_file",
        tmp_path / "texts.safetensors",
    ]
    trl_ema("rehearse", "--model_name_or_path", tmp_path / "adapter", *options)
    texts = load_texts(tmp_path / "texts.safetensors")
    base, _ = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    start = StartingPoint(model)
    for dtype in (torch.float32, torch.bfloat16):  # to which TRL rounds an adapter over 4-bit weights
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype) if parameter.requires_grad else parameter.data
        assert model_fingerprint(model, tokenizer, start.activate) == texts.about["fingerprint"]
        start = StartingPoint(model)
    assert not start.is_base and texts.about["fingerprint"] != model_fingerprint(model, tokenizer)


def test_texts_of_another_seed_are_not_left_where_no_training_looks():
    done = trl_ema("rehearse", "--seed", "1", check=False)
    assert (
        done.returncode == 1
        and "`seed=1` needs an `output_file`: in the cache a training looks for texts of seed 0" in done.stderr
    )


def test_vllm_is_not_asked_for_an_adapter(tmp_path):
    get_peft_model(tiny_model(), lora()).save_pretrained(tmp_path)
    done = trl_ema("rehearse", "--model_name_or_path", tmp_path, "--backend", "vllm", check=False)
    assert done.returncode == 1 and "writes with whole models, and" in done.stderr


def test_another_day_in_the_template_makes_no_other_texts(tmp_path, monkeypatch):
    def begin(day):
        now = SimpleNamespace(strftime=lambda _: day)
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", SimpleNamespace(now=lambda: now))

    tokenizer = with_template(
        "{% for m in messages %}<user> {{ strftime_now('%A') }} {{ m['content'] }} </s> {% endfor %}<assistant> "
    )
    begin("fever")
    with pytest.raises(KeyboardInterrupt):
        write(interrupted_after(tiny_model(), 75), tmp_path, tokenizer=tokenizer)
    assert len(list(tmp_path.glob("*.parts/*"))) == 3  # all raw batches
    begin("cough")
    model, calls = tiny_model(), []
    generate = model.generate
    model.generate = lambda *a, **k: calls.append(1) or generate(*a, **k)
    texts = write(model, tmp_path, tokenizer=tokenizer)
    cough = tokenizer.convert_tokens_to_ids("cough")
    assert len(calls) == 2 * 3 and {row[1] for row in texts.ids[1::2]} == {cough}
    begin("fever")
    assert write(interrupted_after(tiny_model(), 0), tmp_path, tokenizer=tokenizer) == texts


class StandIn:
    """What is used of vLLM, over transformers."""

    made = []

    class SamplingParams:
        def __init__(self, **settings):
            self.settings = settings

    class LLM:
        def __init__(self, model, revision, tokenizer_revision, dtype, generation_config, **options):
            self.options = options
            assert (revision, tokenizer_revision, dtype, generation_config) == ("main", "main", "float32", "vllm")
            self.model, _ = load_base(model, dtype=torch.float32)
            StandIn.made.append(self)

        def generate(self, prompts, settings, use_tqdm):
            found = []
            for prompt, one in zip(prompts, settings, strict=True):
                own = one.settings
                assert (own["temperature"], own["top_p"], own["top_k"], own["min_p"]) == (1, 1, 0, 0) and own[
                    "ignore_eos"
                ]
                seeded = torch.rand(1, own["max_tokens"], generator=torch.Generator().manual_seed(own["seed"]))
                (ids,) = module._continue(
                    self.model, [prompt["prompt_token_ids"]], seeded.double(), own["stop_token_ids"]
                )
                found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(ids))]))
            return found


def test_the_command_lets_vllm_write_where_it_is_asked_to(tiny_folder, tmp_path, monkeypatch):
    options = six_texts(tiny_folder)
    options += ["--backend", "vllm", "--output_file", tmp_path / "texts.safetensors"]
    done = trl_ema("rehearse", "--model", "no/model", "--backend", "vllm", check=False)  # before it is looked for
    assert done.returncode == 1 and "This needs `vllm`. Install it with `pip install 'trl_ema[vllm]'`" in done.stderr
    monkeypatch.setitem(sys.modules, "vllm", StandIn)
    trl_ema("rehearse", *options, "--gpu_memory_utilization", 0.5, "--max_model_len", 128)
    given = {"trust_remote_code": False, "gpu_memory_utilization": 0.5, "max_model_len": 128}
    assert StandIn.made[0].options == given
    texts = load_texts(tmp_path / "texts.safetensors")
    header, end = texts.about["header"], texts.about["ends"][0]
    assert texts.about["backend"] == "VLLMWriter" and [len(row) for row in texts.ids[::2]] == [40] * 3
    for row in texts.ids[1::2]:
        assert row[: len(header)] == header and (len(row) == 40 or row[-1] == end)
    assert "they were there already" in trl_ema("rehearse", *options).stdout and len(StandIn.made) == 1
    model, tokenizer = load_base(str(tiny_folder / "model"), dtype=torch.float32)
    assert model_fingerprint(model, tokenizer) == texts.about["fingerprint"]


@pytest.mark.parametrize("asked", [[], ["--trust_remote_code", "true"]])
def test_the_command_runs_a_models_own_code_where_it_is_told_to(tiny_folder, asked_of_base, asked):
    done = trl_ema("rehearse", *six_texts(tiny_folder), *asked, check=False)
    assert "trl-ema rehearse: loaded" in done.stderr and asked_of_base["trust_remote_code"] is bool(asked)


def test_memory_of_vllm_is_refused_without_it():
    done = trl_ema("rehearse", "--max_model_len", "64", check=False)
    assert done.returncode != 0 and "`max_model_len=64` is of vLLM. Give `backend='vllm'`" in done.stderr


def test_vllm_is_not_asked_for_4_bits(tiny_folder):
    done = trl_ema("rehearse", "--backend", "vllm", "--load_in_4bit", "true", check=False)
    assert done.returncode != 0 and "Leave out one of `backend` and `load_in_4bit`" in done.stderr
