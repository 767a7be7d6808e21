"""
SIGKILL at random moments, again and again: does each run still end with the weights of one that nobody disturbed?

    python tests/distributed/kill_test.py --kills 12 --modes one ddp zero3      about 20 minutes on 2 cores

Every run is the real recipe on a tiny model, launched by accelerate. All its processes are killed together at a random
moment (importing, training, in the middle of a save, resuming), and it is started again with `--resume_from_checkpoint
true`, until it ends. Prints a JSON line for each run.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from conftest import make_tiny_folder  # noqa: E402
from launching import CONFIGS, STAGING, command, launch, weights  # noqa: E402


RUN = dict(
    max_steps=24, save_steps=1, save_total_limit=2, measure=False, generations=0, eval_strategy="no",
    load_best_model_at_end=False,
)  # fmt: skip


def disturbed(mode: str, folder: Path, output: str, seconds: float, kills: int, dice: random.Random) -> dict:
    """One run that is killed `kills` times, unless it ends before; where each kill fell."""
    line, environment = command(mode, folder, output, resume_from_checkpoint="true", **RUN)
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    moments, starts = [], 0
    while True:
        starts += 1
        first, leftover = _last_step(folder / output), _staging(folder / output)  # what the last kill left
        # PyTorch waits for ever for a process that was killed while it built DeepSpeed's kernel.
        for lock in (folder / "extensions").glob("**/lock"):
            lock.unlink()
        process = subprocess.Popen(
            line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        if len(moments) < kills and _wait_for_moment(process, folder / output, seconds, dice):
            one_rank = mode != "one" and dice.random() < 0.5
            moments.append(_moment(folder / output, first, leftover) + (", one rank first" if one_rank else ""))
            kill(process, dice if one_rank else None)
            continue
        _, errors = process.communicate()
        if process.returncode == 0:
            return {"mode": mode, "kills": moments, "starts": starts}
        raise RuntimeError(f"The run did not resume:\n{errors[-4000:]}")


def _wait_for_moment(process: subprocess.Popen, output: Path, seconds: float, dice: random.Random) -> bool:
    """Wait for a random moment: one in four while it starts, the others a few steps on. False when it has ended."""
    start, last = time.perf_counter(), _last_step(output)
    if dice.random() < 0.25:
        target, pause = last, dice.uniform(0, 0.6) * seconds
    else:
        target, pause = last + dice.randint(1, 5), dice.uniform(0, 0.03) * seconds
    while process.poll() is None:
        if _last_step(output) >= target:
            if target > last:
                start, target = time.perf_counter(), last
            if time.perf_counter() - start >= pause:
                return True
        time.sleep(0.002)
    return False


def kill(process: subprocess.Popen, dice: random.Random | None) -> None:
    """
    SIGKILL to the launcher and to its ranks, which lead sessions of their own. With `dice` to one rank alone, and to the
    others when they have had a second to go on without it.
    """
    launcher = psutil.Process(process.pid)
    family = [*launcher.children(recursive=True), launcher]
    if dice is not None and len(family) > 1:
        _kill(dice.choice(family[:-1]))
        time.sleep(1)
    for member in family:
        _kill(member)
    process.communicate()
    psutil.wait_procs(family)


def _kill(member: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        member.kill()


def _last_step(output: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)


def _staging(output: Path) -> int | None:
    """Which staging folder there is."""
    try:
        return (output / STAGING).stat().st_ino
    except FileNotFoundError:
        return None


def _moment(output: Path, first: int, leftover: int | None) -> str:
    """`first`: the newest step when the run was started."""
    step = _last_step(output)
    if _staging(output) not in (None, leftover):
        return f"after step {step}, in a save"
    return f"after step {step}, {'between saves' if step > first else 'before its first save'}"


def differences(one: Path, other: Path) -> int:
    """Tensors of student and teacher that are not bit for bit the same."""
    count = 0
    for who in ("student", "teacher"):
        ours, theirs = weights(one, who), weights(other, who)
        assert ours.keys() == theirs.keys()
        count += sum(not torch.equal(ours[name], theirs[name]) for name in theirs)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=12, help="for each mode")
    parser.add_argument("--modes", nargs="+", default=["one", "ddp", "zero3"], choices=list(CONFIGS))
    parser.add_argument("--kills_per_run", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    dice, different, total = random.Random(args.seed), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_folder(Path(scratch))
        for mode in args.modes:
            start = time.perf_counter()
            whole = launch(mode, folder, f"{mode}_whole", **RUN)
            seconds = time.perf_counter() - start
            kills = runs = 0
            while kills < args.kills:
                runs += 1
                output = f"{mode}_{runs}"
                run = disturbed(mode, folder, output, seconds, min(args.kills_per_run, args.kills - kills), dice)
                run["tensors_that_differ"] = differences(folder / output, whole)
                kills += len(run["kills"])
                total += len(run["kills"])
                different += bool(run["tensors_that_differ"])
                print(json.dumps(run), flush=True)
    print(f"{total} kills; {different} runs ended with other weights than an undisturbed one.")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
