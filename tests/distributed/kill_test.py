"""
SIGKILL at random moments, again and again: does each run still end with the weights of one that nobody disturbed?

    python tests/distributed/kill_test.py --kills 12 --modes one ddp zero3      about 20 minutes on 2 cores
    python tests/distributed/kill_test.py --kills 20 --rehearsal                with texts, whose weight keeps a budget

Every run is the real recipe on a tiny model, launched by accelerate. All its processes are killed together at a random
moment (importing, writing texts, training, in the middle of a save, resuming), and it is started again with
`--resume_from_checkpoint true`, until it ends. Prints a JSON line for each run.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from conftest import make_tiny_folder  # noqa: E402
from launching import CONFIGS, STAGING, command, launch, weights  # noqa: E402

from trl_ema.evaluation.models import load_base  # noqa: E402
from trl_ema.texts import Sampling, write_texts  # noqa: E402


RUN = dict(
    max_steps=24, save_steps=1, save_total_limit=2, measure=False, generations=0, eval_strategy="no",
    load_best_model_at_end=False,
)  # fmt: skip
# Texts in four batches, more than one pass through them, and a weight that moves at each step.
TEXTS = dict(num_texts=130, num_tokens=40)
REHEARSAL = dict(rehearsal_weight=1.0, rehearsal_fraction=0.6, drift_budget=0.01)
REHEARSAL |= {f"rehearsal_{name}": value for name, value in TEXTS.items()}


def options_of(mode: str, folder: Path, rehearsal: bool) -> dict:
    """Of every run of this mode. A sharded model cannot write texts: they are written before."""
    if not rehearsal:
        return RUN
    if "zero3" not in mode and "fsdp2" not in mode:
        return RUN | REHEARSAL
    texts = folder / "texts.safetensors"
    model, tokenizer = load_base(str(folder / "model"), dtype=torch.float32)
    write_texts(model, tokenizer, Sampling(**TEXTS), texts, progress=False)  # as `trl-ema rehearse`
    return RUN | REHEARSAL | {"rehearsal_texts": str(texts)}


def disturbed(
    mode: str, folder: Path, output: str, seconds: float, kills: int, dice: random.Random, options: dict
) -> dict:
    """One run that is killed `kills` times, unless it ends before; where each kill fell."""
    line, environment = command(mode, folder, output, resume_from_checkpoint="true", **options)
    environment["TORCH_EXTENSIONS_DIR"] = str(folder / "extensions")
    cache = folder / f"{output}_cache"  # its own: each run writes its texts
    environment["TRL_EMA_CACHE"] = str(cache)
    writes = bool(options.get("rehearsal_weight")) and "rehearsal_texts" not in options
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
        if len(moments) == kills:
            reached = False
        elif writes and not moments:  # the first kill, while texts are written
            reached = _wait_for_texts(process, cache, dice.randint(0, 4))
        else:
            reached = _wait_for_moment(process, folder / output, seconds, dice)
        if reached:
            one_rank = mode != "one" and dice.random() < 0.5
            moment = _moment(folder / output, first, leftover)
            if list(cache.glob("texts/*.parts")):
                moment = f"while texts are written, {len(_parts(cache))} batches done"
            moments.append(moment + (", one rank first" if one_rank else ""))
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


def _wait_for_texts(process: subprocess.Popen, cache: Path, number: int) -> bool:
    """Wait until so many batches of texts are written. False when the run has ended."""
    while process.poll() is None:
        if list(cache.glob("texts/*")) and (len(_parts(cache)) >= number or list(cache.glob("texts/*.safetensors"))):
            return True
        time.sleep(0.002)
    return False


def _parts(cache: Path) -> list[Path]:
    return list(cache.glob("texts/*.parts/*.safetensors"))


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
    parser.add_argument("--rehearsal", action="store_true", help="beside the teacher, with a `drift_budget`")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = make_tiny_folder(Path(scratch))
        for mode in args.modes:
            for run in kills_of(mode, folder, args.kills, args.kills_per_run, args.seed, args.rehearsal):
                print(json.dumps(run), flush=True)
                results.append(run)
    total = sum(len(run["kills"]) for run in results)
    different = sum(bool(run["tensors_that_differ"]) for run in results)
    print(f"{total} kills; {different} runs ended with other weights than an undisturbed one.")
    sys.exit(bool(different))


def kills_of(mode: str, folder: Path, kills: int, kills_per_run: int, seed: int, rehearsal: bool) -> Iterator[dict]:
    """Runs until they were killed so many times, each beside one that was not."""
    dice, options = random.Random(f"{seed} {mode}"), options_of(mode, folder, rehearsal)
    start = time.perf_counter()
    whole = launch(mode, folder, f"{mode}_whole", **options)
    seconds = time.perf_counter() - start
    done = runs = 0
    while done < kills:
        runs += 1
        output = f"{mode}_{runs}"
        run = disturbed(mode, folder, output, seconds, min(kills_per_run, kills - done), dice, options)
        run["tensors_that_differ"] = differences(folder / output, whole)
        done += len(run["kills"])
        yield run


if __name__ == "__main__":
    main()
