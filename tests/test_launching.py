"""`trl-ema train` as it is started: which file it runs, and how accelerate launches it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trl
import yaml
from test_cli import trl_ema

from trl_ema import files, launch, versions
from trl_ema.comparison.plan import load_comparison
from trl_ema.files import read_json, shipped
from trl_ema.launch import accelerate_config_file, launch_training, take_accelerate_config
from trl_ema.script import make_parser, parse


QUICK = [
    "--model_name_or_path", "model", "--dataset_name", "data.jsonl", "--eval_fraction", "0.2", "--use_cpu", "true", "--bf16",
    "false", "--max_steps", "1", "--report_to", "none", "--eval_samples", "4", "--generations", "0", "--max_length", "48",
    "--dtype", "float32", "--save_strategy", "no",
]  # fmt: skip


def train(folder, *arguments, check=True):
    environment = os.environ | {"TRL_EMA_CACHE": str(folder / "cache"), "HF_HOME": str(folder / "hf")}
    command = [sys.executable, "-m", "trl_ema", "train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


# What comes with the package


def test_what_is_shipped_lies_in_the_package_or_beside_it(tmp_path, monkeypatch):
    package = tmp_path / "site" / "trl_ema"
    monkeypatch.setattr(files, "__file__", str(package / "files.py"))
    with pytest.raises(
        FileNotFoundError, match=r"no folder `recipes`, neither in .*trl_ema, where an .* --no-deps trl_ema`"
    ):
        shipped("recipes")
    (tmp_path / "site" / "recipes").mkdir(parents=True)
    assert shipped("recipes") == tmp_path / "site" / "recipes"
    (package / "recipes").mkdir(parents=True)
    assert shipped("recipes") == package / "recipes"


def test_this_package_ships_its_recipes_and_its_configurations_of_accelerate():
    assert (shipped("recipes") / "medical_ema.py").is_file()
    found = {path.stem for path in shipped("accelerate_configs").glob("*.yaml")}
    assert found == {"cpu", "single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}


# Configurations of accelerate


def test_a_configuration_under_a_name_of_trls_is_of_the_same_kind():
    theirs = Path(trl.__file__).parent / "accelerate_configs"
    kinds = {
        path.stem: [
            yaml.safe_load((folder / path.name).read_text())["distributed_type"] for folder in (path.parent, theirs)
        ]
        for path in shipped("accelerate_configs").glob("*.yaml")
        if (theirs / path.name).is_file()
    }
    assert kinds.keys() == {"single_gpu", "multi_gpu", "zero1", "zero2", "zero3", "fsdp2"}
    assert all(ours == trls for ours, trls in kinds.values())


def test_a_configuration_is_found_by_name_or_path(tmp_path):
    assert accelerate_config_file("zero3") == str(shipped("accelerate_configs") / "zero3.yaml")
    (tmp_path / "mine.yaml").write_text("")
    assert accelerate_config_file(str(tmp_path / "mine.yaml")) == str(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["zero4", "no/such.yaml", ""])
def test_an_unknown_configuration_is_refused_with_those_that_there_are(name):
    with pytest.raises(ValueError) as error:
        launch_training(name, [])
    assert f"`accelerate_config={name!r}` is neither a file nor a packaged configuration" in str(error.value)
    assert "one of cpu, fsdp2, multi_gpu, single_gpu, zero1, zero2, zero3, zero3_offload." in str(error.value)


def test_yaml_that_is_none_is_refused_with_its_file_and_line(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text("model_name_or_path: model\ndatasets: [path: x\n")
    reads = {
        "accelerate's": lambda: launch_training(str(path), []),
        "train's": lambda: parse(["--config", str(path)]),
        "a comparison's": lambda: load_comparison(str(path)),
    }
    for read in reads.values():
        with pytest.raises(ValueError) as error:
            read()
        assert str(error.value).startswith(
            f"{path}, line 3: no valid YAML (expected ',' or ']', but got '<stream end>')."
        )
    for command in ("evaluate", "rehearse"):
        done = trl_ema(command, "--config", path, check=False)
        assert done.returncode == 1 and f'in "{path}", line 3' in done.stderr and "Traceback" not in done.stderr
    path.write_bytes("output_dir: Gefühl\n".encode("latin-1"))
    with pytest.raises(ValueError, match="bad.yaml: no valid YAML .*; the file is to be UTF-8"):
        parse(["--config", str(path)])


# The command line, parted


@pytest.mark.parametrize("given", [["--accelerate_config", "zero3"], ["--accelerate_config=zero3"]])
def test_the_configuration_is_taken_from_anywhere_on_the_command_line(given):
    others = ["--config", "c.yaml", "--max_steps", "-1", "--accelerator_config", "{}"]
    for i in range(0, len(others) + 1, 2):
        assert take_accelerate_config([*others[:i], *given, *others[i:]]) == ("zero3", others)
    assert take_accelerate_config(others) == (None, others)


@pytest.fixture
def launched(monkeypatch):
    """Stands in for the launcher, and keeps what it was to launch."""
    found = []
    monkeypatch.setattr(launch, "launch_command", found.append)
    return found


def test_each_option_goes_to_the_one_that_has_it(launched):
    of_job = ["--config", "c.yaml", "--lora_target_modules", "q_proj", "v_proj", "--max_steps", "4", "--use_cpu"]
    of_launcher = ["--num_processes", "4", "--machine_rank=1"]
    launch_training("zero3", [*of_job[:5], *of_launcher, *of_job[5:]])
    (settings,) = launched
    assert settings.config_file == accelerate_config_file("zero3")
    assert (settings.num_processes, settings.machine_rank) == (4, 1)
    assert settings.module and settings.training_script == "trl_ema"
    assert settings.training_script_args == ["train", *of_job]


@pytest.mark.parametrize("wrong", [["--lerning_rate", "3"], ["--no_such"], ["stray"]])
def test_an_option_that_nobody_has_is_refused(launched, wrong):
    with pytest.raises(
        ValueError, match=r"Of .*" + wrong[0] + ".* not everything is an option of `trl-ema train` or of"
    ):
        launch_training("cpu", ["--max_steps", "3", *wrong, "--num_processes", "2"])
    assert not launched


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_launch_of_deepspeed_without_it_names_the_extra(launched, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ImportError, match=r"needs `deepspeed`. Install it with `pip install 'trl_ema\[deepspeed\]'`"):
        launch_training(name, [])
    assert not launched


def test_a_launch_of_another_deepspeed_than_is_supported_is_refused(launched, monkeypatch):
    monkeypatch.setattr(versions, "_installed", lambda name: "0.19.2")
    wanted = re.escape(versions.TESTED["deepspeed"])
    with pytest.raises(
        ImportError, match=f"supports deepspeed{wanted}, found deepspeed 0.19.2. Install a supported one"
    ):
        launch_training("zero2", [])
    assert not launched


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu", "fsdp2"])
def test_a_launch_without_deepspeed_does_not_ask_for_it(launched, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    launch_training(name, [])
    assert launched


# The file of options


def test_a_packaged_recipe_configuration_is_found_by_name_or_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = ["--output_dir", "here", "--use_cpu", "true", "--bf16", "false"]
    _, by_name, model = parse(["--config", "qwen2_1.5b_qlora", *here])
    assert (by_name.output_dir, by_name.learning_rate, model.model_name_or_path) == ("here", 2e-4, "Qwen/Qwen2-1.5B")
    path = str(shipped("recipes") / "configs" / "qwen2_1.5b_qlora.yaml")
    assert parse([*here, "--config", path])[2] == model
    (tmp_path / "qwen2_1.5b_qlora").write_text("model_name_or_path: mine")  # a file of the user's comes first
    assert parse(["--config", "qwen2_1.5b_qlora", *here])[2].model_name_or_path == "mine"


def test_an_unknown_file_of_options_is_refused_with_those_that_there_are():
    with pytest.raises(ValueError) as error:
        parse(["--config", "qwen3"])
    assert str(error.value) == (
        "`config='qwen3'` is neither a file nor a packaged configuration. Give the path of a YAML file, or one of "
        "qwen2_1.5b_qlora, qwen2_1.5b_qlora_ddp, qwen2_1.5b_qlora_study, qwen2_7b_lora_sharded."
    )


# The job itself


def test_train_runs_the_recipe_in_its_own_process(tiny_folder, monkeypatch):
    monkeypatch.setenv("TRL_EMA_CACHE", str(tiny_folder / "cache"))
    done = trl_ema("train", *QUICK, "--output_dir", "own", cwd=tiny_folder)
    assert done.stdout.startswith("64 training rows, 4 held out.") and "held-out domain loss" in done.stdout
    assert {"adapter_model.safetensors", "teacher", "metrics.json"} <= set(os.listdir(tiny_folder / "own"))


def test_train_is_launched_with_a_packaged_configuration(tiny_folder):
    done = train(tiny_folder, "--accelerate_config", "cpu", *QUICK, "--num_processes", "1", "--output_dir", "launched")
    assert done.stdout.startswith("64 training rows, 4 held out.")
    figures = read_json(tiny_folder / "launched" / "metrics.json")
    assert figures["provenance"]["steps"] == 1 and figures["student"]["domain"]["tokens"] > 0


def test_what_goes_wrong_in_a_launched_job_is_said_in_a_line(tiny_folder):
    done = train(tiny_folder, "--accelerate_config", "cpu", *QUICK, "--kl_weight", "-1", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "trl-ema train: `kl_weight` must be at least 0 and finite, got -1.0" in done.stderr


def test_an_unknown_configuration_is_refused_in_a_line(tiny_folder):
    done = trl_ema("train", "--accelerate_config", "zero4", check=False, cwd=tiny_folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("trl-ema train: `accelerate_config='zero4'` is neither a file")


def test_the_help_names_the_option():
    assert "`trl-ema train --accelerate_config NAME ...`" in " ".join(make_parser().format_help().split())


# Slurm


@pytest.fixture
def slurm(tmp_path):
    """Commands of Slurm, and the program, that write down how they were called; the programs run until they are signalled."""
    commands = {
        "scontrol": 'echo "scontrol $*" >> calls; [ "$1" != show ] || printf "first\\nsecond\\n"',
        "scancel": 'echo "scancel $*" >> calls; kill -TERM $(cat 0.pid) $(cat 1.pid)',
        "srun": 'shift; for i in 0 1; do SLURM_NODEID=$i "$@" & done; wait',
        "trl-ema": 'printf "%s\\n" "$@" > $SLURM_NODEID.arguments; echo $$ > $SLURM_NODEID.pid; exec sleep ${RUNS_FOR:-0}',
    }
    (tmp_path / "bin").mkdir()
    for name, command in commands.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/bin/bash\ncd {tmp_path}\n{command}\n")
        path.chmod(0o755)
    variables = {
        "JOB_NAME": "job",
        "JOB_ID": "7",
        "SUBMIT_DIR": str(tmp_path / "my runs"),
        "JOB_NODELIST": "nodes",
        "NNODES": "2",
    }
    environment = {f"SLURM_{name}": value for name, value in variables.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def start(**more):
        script = shipped("recipes") / "two_nodes.slurm"
        return subprocess.Popen(["bash", str(script)], cwd=tmp_path, env=os.environ | environment | more)

    return start


def test_under_slurm_each_machine_is_launched_with_its_number(slurm, launched, tmp_path):
    assert slurm().wait(30) == 0
    for number in (0, 1):
        words = (tmp_path / f"{number}.arguments").read_text().splitlines()
        assert words[0] == "train"
        name, others = take_accelerate_config(words[1:])
        launch_training(name, others)
        settings = launched[-1]
        assert (settings.num_machines, settings.num_processes, settings.machine_rank) == (2, 16, number)
        assert (settings.main_process_ip, settings.main_process_port) == ("first", 20007)
        assert "--resume_from_checkpoint" in settings.training_script_args
        assert str(tmp_path / "my runs" / "runs" / "job-7") in settings.training_script_args  # with its blank
    assert "requeue" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("finished", [False, True])
def test_under_slurm_a_job_whose_time_is_over_saves_and_queues_again_unless_it_is_finished(slurm, tmp_path, finished):
    job = slurm(RUNS_FOR="60")
    wait_for(lambda: (tmp_path / "0.pid").is_file() and (tmp_path / "1.pid").is_file())
    if finished:
        folder = tmp_path / "my runs" / "runs" / "job-7"
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    expected = [
        "scontrol show hostnames nodes",
        "scancel --signal=TERM 7",
        *([] if finished else ["scontrol requeue 7"]),
    ]
    assert (tmp_path / "calls").read_text().splitlines() == expected


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
