"""Weights can be read by whoever the umask lets read a new file: safetensors itself writes for the owner alone."""

import os
import stat

import pytest
from conftest import lora, tiny_model
from peft import get_peft_model

from trl_ema.files import follow_umask
from trl_ema.regularizers.teacher import MeanTeacher


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=["022", "027", "077"])
def new_file_mode(request):
    before = os.umask(request.param)
    yield 0o666 & ~request.param
    os.umask(before)


def modes(folder):
    return {
        str(path.relative_to(folder)): stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*") if path.is_file()
    }


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, {"adapter_model.safetensors", "teacher/adapter_model.safetensors"}),
        ({"teacher": "none"}, {"adapter_model.safetensors"}),
        ({"teacher": "none", "peft_config": None}, {"model.safetensors"}),
    ],
    ids=["ema", "none", "whole model"],
)
def test_whatever_a_run_writes_follows_the_umask(make_trainer, tmp_path, new_file_mode, options, weights):
    trainer = make_trainer(max_steps=2, save_strategy="steps", save_steps=1, **options)
    trainer.train()
    trainer.save_model()
    found = modes(tmp_path / "out")
    folders = ("", "checkpoint-1/", "checkpoint-2/")
    assert {f"{folder}{name}" for folder in folders for name in weights} <= found.keys()
    assert "checkpoint-1/optimizer.pt" in found
    assert set(found.values()) == {new_file_mode}
    assert not [name for name in found if "permissions" in name]


def test_a_teacher_saved_alone_and_further_adapters_follow_the_umask(make_trainer, tmp_path, new_file_mode):
    model = get_peft_model(tiny_model(), lora())
    MeanTeacher(model).save(str(tmp_path / "alone"))
    trainer = make_trainer(teacher="none", max_steps=1)
    trainer.model.add_adapter("another", lora())
    trainer.save_model()
    found = modes(tmp_path / "alone") | modes(tmp_path / "out")
    assert {"teacher/adapter_model.safetensors", "another/adapter_model.safetensors"} <= found.keys()
    assert set(found.values()) == {new_file_mode}


def test_other_files_and_other_folders_keep_their_permissions(tmp_path):
    kept = [tmp_path / "token.txt", tmp_path / "checkpoint-1" / "adapter_model.safetensors"]
    kept[1].parent.mkdir()
    for path in (*kept, tmp_path / "model-00001-of-00002.safetensors"):
        path.touch()
        path.chmod(0o600)
    follow_umask(tmp_path)
    assert [stat.S_IMODE(path.stat().st_mode) for path in kept] == [0o600, 0o600]
    assert stat.S_IMODE((tmp_path / "model-00001-of-00002.safetensors").stat().st_mode) != 0o600


def test_a_mount_without_permissions_loses_no_weights(tmp_path, monkeypatch):
    (tmp_path / "model.safetensors").touch()

    def refuse(*args, **kwargs):
        raise PermissionError("Operation not permitted")

    monkeypatch.setattr("pathlib.Path.chmod", refuse)
    follow_umask(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
