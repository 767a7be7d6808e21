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
from launching import OPTIONS, STAGING, command, command_in_turn, launch, logged, weights


pytestmark = pytest.mark.distributed


OTHERS = {
    # With a trained head: a frozen teacher is the base only while that is the base's own.
    "frozen": dict(teacher="frozen", measure=False),
    "none": dict(teacher="none", lora_modules_to_save=None, measure=False),
    "nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", use_bnb_nested_quant=True, measure=False),
    "bf16": dict(bf16=True, dtype="bfloat16"),
    # More texts than the three steps before a checkpoint take, and fewer than all six do
    "rehearsal": dict(
        teacher="none", lora_modules_to_save=None, measure=False, rehearsal_weight=2.0, rehearsal_num_texts=8,
        rehearsal_num_tokens=40, drift_budget=0.01,
    ),
}  # fmt: skip


# From an adapter, which the launch on one process has trained.
ON = {"on": OTHERS["none"] | dict(adapter_name_or_path="one_none")}


def plain(mode):
    return {mode: (mode, {})}


def others(mode, *kinds):
    return {f"{mode}_{kind}": (mode, (OTHERS | ON)[kind]) for kind in kinds}


def resumed(before, mode, kind=None):
    output = f"{before}_resumed" if before == mode else f"{before}_to_{mode}"
    before, output = (name + (f"_{kind}" if kind else "") for name in (before, output))
    options = OTHERS.get(kind, {}) | dict(resume_from_checkpoint=f"{before}/checkpoint-3", measure=False)
    return {output: (mode, options)}


COMPILED = {"compiled": ("fsdp2", dict(torch_compile=True, torch_compile_backend="aot_eager"))}
# A wrapper around each layer hides the adapter from PEFT: every checkpoint would be empty.
WRAPPED = {"wrapped": ("fsdp2_wrapped", dict(gradient_checkpointing=False))}

# What is trained in turn by one launch, which is of the first one's mode. One that resumes is in other processes than what it goes on
# from wherever no other test resumes bit for bit in new ones, as those of a signal do. What is refused ends its launch.
LAUNCHES = [
    plain("one") | others("one", *OTHERS) | others("one", *ON),
    plain("ddp") | others("ddp", "nf4", "rehearsal") | resumed("ddp", "ddp") | resumed("one", "ddp"),
    plain("zero2") | plain("zero1"),
    resumed("zero2", "zero2")
    | plain("zero3")
    | others("zero3", "frozen", *ON)
    | resumed("zero3", "zero3")
    | resumed("one", "zero3"),
    plain("fsdp2")
    | others("fsdp2", "frozen", "bf16")
    | plain("fsdp2_sharded")
    | others("fsdp2_sharded", "none")
    | COMPILED,
    resumed("fsdp2", "fsdp2") | resumed("one", "fsdp2") | resumed("fsdp2_sharded", "fsdp2_sharded") | WRAPPED,
    resumed("ddp", "one") | resumed("zero2", "one") | resumed("fsdp2", "one") | resumed("ddp", "one", "rehearsal"),
]


@pytest.fixture(scope="module")
def launched(tiny_folder):
    """`launched(output)` is the launch that trains it, made once, and all the outputs of that launch."""
    done = {}

    def find(output):
        number = next(i for i, outputs in enumerate(LAUNCHES) if output in outputs)
        outputs = LAUNCHES[number]
        for _, options in outputs.values():
            before = options.get("resume_from_checkpoint", options.get("adapter_name_or_path", output)).split("/")[0]
            if before not in outputs:
                find(before)
        if number not in done:
            line, environment = command_in_turn(tiny_folder, outputs)
            done[number] = subprocess.run(
                line, capture_output=True, text=True, cwd=tiny_folder, env=environment, check=False
            )
        return done[number], outputs

    return find


@pytest.fixture(scope="module")
def runs(launched, tiny_folder):
    """`runs(output)` is the folder of a run that nobody disturbed."""

    def run(output):
        done, outputs = launched(output)
        ended = [name for name in outputs if (tiny_folder / name / "metrics.json").exists()]
        # Where one fails, those before it count.
        assert output in ended and (done.returncode == 0 or len(ended) < len(outputs)), done.stderr[-5000:]
        return tiny_folder / output

    return run


LOGGED = ("loss", "ce_loss", "kl_loss", "teacher_distance", "mean_token_accuracy")


def assert_same(folder, other, rtol=0.0, atol=0.0, keys=LOGGED, adapters=("student", "teacher")):
    for key in keys:
        found, expected = logged(folder, key), logged(other, key)
        assert len(found) == OPTIONS["max_steps"] or key.startswith("eval")
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=atol or 1e-12, msg=lambda text, key=key: f"{key}: {text}"
        )
    last = f"checkpoint-{OPTIONS['max_steps']}"
    for who, at in itertools.product(adapters, (".", last)):
        ours, theirs = weights(folder / at, who), weights(other / at, who)
        assert ours.keys() == theirs.keys() and len(ours) > 10
        for name, tensor in theirs.items():
            torch.testing.assert_close(ours[name].float(), tensor.float(), rtol=rtol, atol=atol)
    # In the end there is the best student, with its own teacher.
    state = json.loads((folder / last / "trainer_state.json").read_text())
    best = folder.parent / state["best_model_checkpoint"]
    assert best.name != last
    for who in adapters:
        kept = weights(best, who)
        assert all(torch.equal(tensor, kept[name]) for name, tensor in weights(folder, who).items())


MODES = ["ddp", "zero2", "zero3", "fsdp2", "fsdp2_sharded"]


@pytest.mark.parametrize("mode", [*MODES, "zero1"])
def test_two_processes_train_as_one_does(runs, mode):
    assert_same(runs(mode), runs("one"), rtol=1e-3, atol=1e-4)
    figures = [json.loads((runs(name) / "metrics.json").read_text()) for name in (mode, "one")]
    for who in ("before", "student", "teacher"):
        for group in ("domain", "general"):
            assert figures[0][who][group]["loss"] == pytest.approx(figures[1][who][group]["loss"], abs=1e-3)
            assert figures[0][who][group]["tokens"] == figures[1][who][group]["tokens"]


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_run_ends_like_an_undisturbed_one(runs, mode):
    assert_same(runs(f"{mode}_resumed"), runs(mode))


KEYS = {
    "rehearsal": ("loss", "ce_loss", "rehearsal_kl", "rehearsal_weight"),
    "frozen": ("loss", "ce_loss", "kl_loss"),
    "none": ("loss", "mean_token_accuracy"),
}


@pytest.mark.parametrize(("kind", "mode"), [("frozen", "zero3"), ("frozen", "fsdp2"), ("none", "fsdp2_sharded")])
def test_other_teachers_too(runs, kind, mode):
    two = runs(f"{mode}_{kind}")
    assert_same(two, runs(f"one_{kind}"), rtol=1e-3, atol=1e-4, keys=KEYS[kind], adapters=["student"])
    assert not (two / "teacher").exists()


@pytest.mark.parametrize("output", ["ddp_rehearsal", "ddp_to_one_rehearsal"])
def test_rehearsal_on_two_processes_and_resumed_on_one_takes_the_texts_of_one(runs, output):
    """With a weight that a budget moves, in the middle of the texts and over their end."""
    assert_same(runs(output), runs("one_rehearsal"), rtol=1e-3, atol=1e-4, keys=KEYS["rehearsal"], adapters=["student"])


def test_zero3_goes_on_from_an_adapter_as_one_process_does(runs):
    """And its adapter has no embeddings: nothing has made them smaller, though a rank keeps but a part of them."""
    assert_same(runs("zero3_on"), runs("one_on"), rtol=1e-3, atol=1e-4, keys=KEYS["none"], adapters=["student"])
    assert not logged(runs("one_on"), "loss").equal(logged(runs("one_none"), "loss"))


@pytest.mark.slow
def test_a_teacher_on_every_token_that_is_evaluated_too(tiny_folder):
    options = dict(kl_tokens="all", eval_teacher=True, measure=False)
    two, one = (launch(mode, tiny_folder, f"{mode}_every_token", **options) for mode in ("zero3", "one"))
    assert_same(two, one, rtol=1e-3, atol=1e-4, keys=(*LOGGED, "eval_teacher_loss"))


def test_compiling_what_fsdp2_shards_is_refused(launched):
    done, _ = launched("compiled")
    assert done.returncode and "`torch_compile` under FSDP2 is not supported with a teacher" in done.stderr


def test_layers_under_another_name_are_refused(launched):
    done, _ = launched("wrapped")
    assert done.returncode and "Use `gradient_checkpointing` instead of `fsdp_activation_checkpointing`" in done.stderr
    assert "PEFT would find no adapter to save" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero2", "zero3"])
def test_deepspeed_in_bfloat16_averages_and_resumes_in_float32(tiny_folder, mode):
    """As the launch files have it: the trained weights are DeepSpeed's float32 copies."""
    half = dict(bf16=True, dtype="bfloat16", learning_rate=2e-3)
    whole = launch(mode, tiny_folder, f"{mode}_half", **half)
    last = dict(resume_from_checkpoint=str(whole / "checkpoint-3"), measure=False)
    assert_same(launch(mode, tiny_folder, f"{mode}_half_resumed", **half, **last), whole)
    assert {tensor.dtype for tensor in weights(whole, "teacher").values()} == {torch.float32}
    optimizer = torch.load(whole / "checkpoint-6" / "optimizer.pt", weights_only=True)
    student = weights(whole / "checkpoint-6", "student")
    assert len(optimizer["master"]) == len(student)
    assert any(not torch.equal(master, master.bfloat16().float()) for master in optimizer["master"].values())
    one = launch("one", tiny_folder, f"{mode}_half_to_one", **half, **last)
    for key in ("loss", "ce_loss", "kl_loss"):
        torch.testing.assert_close(logged(one, key), logged(whole, key), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("mode", "to"),
    [("ddp", "a rank"), ("zero3", "a rank"), pytest.param("ddp", "the launcher", marks=pytest.mark.slow)],
)
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
        pytest.param("zero3", "zero2", marks=pytest.mark.slow),
        pytest.param("zero2", "zero3_alone", marks=pytest.mark.slow),
        ("fsdp2", "one"),
        ("one", "fsdp2"),
        pytest.param("zero2", "fsdp2_sharded", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_resumes_under_another_launch(runs, tiny_folder, before, after):
    ((output, (mode, options)),) = resumed(before, after).items()
    if any(output in outputs for outputs in LAUNCHES):
        found = runs(output)
    else:
        runs(before)
        found = launch(mode, tiny_folder, output, **options)
    assert_same(found, runs("one"), rtol=1e-3, atol=1e-4)


def test_four_bit_weights_on_two_processes_train_as_on_one(runs):
    """QLoRA: what `recipes/configs/qwen2_1.5b_qlora_ddp.yaml` launches."""
    assert_same(runs("ddp_nf4"), runs("one_nf4"), rtol=1e-3, atol=1e-4)


def test_fsdp2_in_bfloat16_keeps_its_figures_in_float32(runs):
    """Accelerate has FSDP2 cast what a forward returns; sums of losses and counts of tokens do not bear it."""
    ours, one = runs("fsdp2_bf16"), runs("one_bf16")
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
    batch = 2 * torch.cuda.device_count()
    alone = launch("one", tiny_folder, f"{mode}_one", **options | dict(on_gpu=False, per_device_train_batch_size=batch))
    assert_same(whole, alone, rtol=1e-2, atol=1e-3)
    options |= dict(resume_from_checkpoint=str(whole / "checkpoint-3"), measure=False)
    assert_same(launch(mode, tiny_folder, f"{mode}_gpu_resumed", **options), whole, rtol=1e-3, atol=1e-4)
