"""The real recipe on two processes: the same losses, student and teacher as one process gives."""

import itertools
import json
import signal
import socket
import subprocess
import time

import psutil
import pytest
import torch
from launching import OPTIONS, STAGING, command, launch, logged, weights


pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def runs(tiny_folder):
    """`runs(mode)` is the folder of an undisturbed run, made once."""
    made = {}

    def run(mode):
        if mode not in made:
            made[mode] = launch(mode, tiny_folder, mode)
        return made[mode]

    return run


def assert_same(folder, other, rtol=0.0, atol=0.0):
    for key in ("loss", "ce_loss", "kl_loss", "teacher_distance", "mean_token_accuracy"):
        found, expected = logged(folder, key), logged(other, key)
        assert len(found) == OPTIONS["max_steps"]
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=atol or 1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    last = f"checkpoint-{OPTIONS['max_steps']}"
    for who, at in itertools.product(("student", "teacher"), (".", last)):
        ours, theirs = weights(folder / at, who), weights(other / at, who)
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=rtol, atol=atol)
    # In the end there is the best student, with its own teacher.
    state = json.loads((folder / last / "trainer_state.json").read_text())
    best = folder.parent / state["best_model_checkpoint"]
    assert best.name != last
    for who in ("student", "teacher"):
        kept = weights(best, who)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(folder, who).items())


MODES = ["ddp", "zero2", "zero3", "fsdp2", "fsdp2_sharded"]


@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does(runs, mode):
    assert_same(runs(mode), runs("one"), rtol=1e-3, atol=1e-4)
    figures = [json.loads((runs(name) / "metrics.json").read_text()) for name in (mode, "one")]
    for who in ("before", "student", "teacher"):
        for group in ("domain", "general"):
            assert figures[0][who][group]["loss"] == pytest.approx(figures[1][who][group]["loss"], abs=1e-3)
            assert figures[0][who][group]["tokens"] == figures[1][who][group]["tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_like_an_undisturbed_one(runs, tiny_folder, mode):
    resumed = launch(
        mode, tiny_folder, f"{mode}_resumed", resume_from_checkpoint=str(runs(mode) / "checkpoint-3"), measure=False
    )
    assert_same(resumed, runs(mode))


@pytest.mark.parametrize(("mode", "to"), [("ddp", "a rank"), ("zero3", "a rank"), ("ddp", "the launcher")])
def test_a_signal_stops_all_ranks_at_one_step(runs, tiny_folder, mode, to):
    output = f"{mode}_signalled_{to.split()[-1]}"
    line, environment = command(mode, tiny_folder, output, enable_jit_checkpoint=True, measure=False)
    launcher = subprocess.Popen(line, cwd=tiny_folder, env=environment, stderr=subprocess.PIPE, text=True)
    while launcher.poll() is None and not (tiny_folder / output / STAGING).exists():
        time.sleep(0.005)
    if to == "a rank":
        # Whichever of the launcher's descendants is the second rank.
        ranks = [p for p in psutil.Process(launcher.pid).children(recursive=True) if p.environ().get("RANK") == "1"]
        ranks[0].send_signal(signal.SIGTERM)
    else:
        launcher.send_signal(signal.SIGTERM)
    _, errors = launcher.communicate()
    stopped = [
        path
        for path in (tiny_folder / output).glob("checkpoint-*")
        if path.name not in ("checkpoint-3", "checkpoint-6")
    ]
    assert len(stopped) == 1, errors[-5000:]
    resumed = launch(mode, tiny_folder, output, resume_from_checkpoint="true", measure=False)
    assert_same(resumed, runs(mode))


def test_two_machines_train_as_one_process_does(runs, tiny_folder):
    """Each machine with a launcher of its own, as the README has it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, environment = command("ddp", tiny_folder, "machines")
    at = line.index("--main_process_port")
    line[at + 1] = str(port)
    line[at:at] = ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "127.0.0.1"]
    machines = [
        subprocess.Popen([*line[:at], "--machine_rank", rank, *line[at:]], cwd=tiny_folder, env=environment)
        for rank in ("0", "1")
    ]
    assert [machine.wait() for machine in machines] == [0, 0]
    assert_same(tiny_folder / "machines", runs("one"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ddp", "one"),
        ("one", "ddp"),
        ("zero2", "one"),
        ("one", "zero3"),
        ("zero3", "zero2"),
        ("zero2", "zero3_alone"),
        ("fsdp2", "one"),
        ("one", "fsdp2"),
        ("zero2", "fsdp2_sharded"),
    ],
)
def test_a_checkpoint_resumes_under_another_launch(runs, tiny_folder, before, after):
    output = f"{before}_to_{after}"
    launch(after, tiny_folder, output, resume_from_checkpoint=str(runs(before) / "checkpoint-3"), measure=False)
    assert_same(tiny_folder / output, runs("one"), rtol=1e-3, atol=1e-4)


def test_four_bit_weights_on_two_processes_train_as_on_one(tiny_folder):
    """QLoRA: what `recipes/configs/qwen2_1.5b_qlora_ddp.yaml` launches."""
    options = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True, measure=False)
    two, one = (launch(mode, tiny_folder, f"{mode}_nf4", **options) for mode in ("ddp", "one"))
    assert_same(two, one, rtol=1e-3, atol=1e-4)


def test_fsdp2_in_bfloat16_keeps_its_figures_in_float32(tiny_folder):
    """Accelerate has FSDP2 cast what a forward returns; sums of losses and counts of tokens do not bear it."""
    ours, one = (launch(mode, tiny_folder, f"{mode}_bf16", bf16=True, dtype="bfloat16") for mode in ("fsdp2", "one"))
    for key in ("loss", "ce_loss", "kl_loss"):
        found = logged(ours, key)
        torch.testing.assert_close(found, logged(one, key), rtol=0.05, atol=0.02)
        assert key == "loss" or not torch.equal(found, found.bfloat16().double())
    figures = [json.loads((folder / "metrics.json").read_text()) for folder in (ours, one)]
    for group in ("domain", "general"):
        assert figures[0]["student"][group]["tokens"] == figures[1]["student"][group]["tokens"]
        assert figures[0]["before"][group]["loss"] == pytest.approx(figures[1]["before"][group]["loss"], rel=1e-3)


@pytest.mark.slow  # DeepSpeed compiles its optimizer for the CPU
def test_offloading_trains_and_resumes(runs, tiny_folder):
    whole = launch("zero3_offload", tiny_folder, "offload")
    assert_same(whole, runs("one"), rtol=1e-3, atol=1e-4)
    resumed = launch(
        "zero3_offload",
        tiny_folder,
        "offload_resumed",
        resume_from_checkpoint=str(whole / "checkpoint-3"),
        measure=False,
    )
    assert_same(resumed, whole)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["ddp", "zero2", "zero3", "fsdp2"])
def test_every_launch_trains_and_resumes_on_gpus(tiny_folder, mode):
    options = dict(on_gpu=True, gradient_accumulation_steps=1, per_device_train_batch_size=2)
    whole = launch(mode, tiny_folder, f"{mode}_gpu", **options)
    options |= dict(resume_from_checkpoint=str(whole / "checkpoint-3"), measure=False)
    assert_same(launch(mode, tiny_folder, f"{mode}_gpu_resumed", **options), whole, rtol=1e-3, atol=1e-4)
