"""
SIGKILL at random moments, again and again: does each run still end with the weights of one that nobody disturbed?

    python tests/distributed/kill_test.py --kills 12 --modes one ddp zero3      about 20 minutes on 2 cores

Every run is the real recipe on a tiny model, launched by accelerate. All its processes are killed together at a random
moment (importing, training, in the middle of a save, resuming), and it is started again with `--resume_from_checkpoint
true`, until it ends. Prints a JSON line for each run.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from conftest import make_tiny_folder  # noqa: E402
from launching import command, launch, weights  # noqa: E402


RUN = dict(max_steps=24, save_steps=1, save_total_limit=2, measure=False, generations=0)


def disturbed(mode: str, folder: Path, output: str, seconds: float, kills: int, dice: random.Random) -> dict:
    """One run that is killed up to `kills` times; where each kill fell."""
    line, environment = command(mode, folder, output, resume_from_checkpoint="true", **RUN)
    moments, starts = [], 0
    while True:
        starts += 1
        process = subprocess.Popen(
            line, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        try:
            # The first half of a start is imports; most of what can be lost comes later.
            patience = dice.uniform(0.4, 1.1) * seconds if len(moments) < kills else None
            _, errors = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            moments.append(_moment(folder / output))
            continue
        if process.returncode == 0:
            return {"mode": mode, "kills": moments, "starts": starts}
        raise RuntimeError(f"The run did not resume:\n{errors[-4000:]}")


def _moment(output: Path) -> str:
    steps = [int(path.name.split("-")[1]) for path in output.glob("checkpoint-*") if path.name[-1].isdigit()]
    where = "in a save" if (output / "checkpoint.part").exists() else "between saves"
    return f"after step {max(steps, default=0)}, {where}"


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
    parser.add_argument("--modes", nargs="+", default=["one", "ddp", "zero3"], choices=["one", "ddp", "zero2", "zero3"])
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
            kills = 0
            while kills < args.kills:
                output = f"{mode}_{kills}"
                run = disturbed(mode, folder, output, seconds, min(args.kills_per_run, args.kills - kills), dice)
                run["tensors_that_differ"] = differences(folder / output, whole)
                kills += max(1, len(run["kills"]))
                total += len(run["kills"])
                different += bool(run["tensors_that_differ"])
                print(json.dumps(run), flush=True)
    print(f"{total} kills; {different} runs ended with other weights than an undisturbed one.")
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
