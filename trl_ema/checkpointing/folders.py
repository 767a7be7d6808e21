"""Folders of checkpoints: the newest one, one that is just written, and those that go for it."""

import logging
import os
import shutil
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from ..files import finish_replacing, remove_folder, replace_folder


logger = logging.getLogger(__name__)

# A checkpoint that is being written. Pushes to the hub leave out what begins with an underscore.
STAGING = "_checkpoint.part"
TRAINER_STATE = "trainer_state.json"


def last_checkpoint(args: TrainingArguments) -> str | None:
    """The newest whole checkpoint in `args.output_dir`, the same on all ranks. Called on all ranks."""
    folder = str(args.output_dir)
    if args.local_process_index == 0:
        finish_replacing(folder)
    found = None
    if args.process_index == 0 and os.path.isdir(folder):
        found = get_last_checkpoint(folder)
        _warn_of_another_branch(folder, found)
    return broadcast_object_list([found])[0]


def _warn_of_another_branch(output_dir: str, latest: str | None) -> None:
    """A run that went on from an earlier checkpoint has written since, but not as far."""
    states = list(Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{TRAINER_STATE}"))
    newest = max(states, key=lambda path: path.stat().st_mtime, default=None)
    if latest is not None and newest is not None and newest.parent != Path(latest):
        logger.warning(
            "%s is the latest step in %s, but %s was written after it. To go on from that one give "
            "`resume_from_checkpoint` its path.", os.path.basename(latest), output_dir, newest.parent.name,
        )  # fmt: skip


def publish(run_dir: str, name: str, limit: int | None, best: str | None) -> None:
    """The whole checkpoint `name` leaves the staging folder; of the older ones so many stay as `limit` says, and the `best`."""
    replace_folder(os.path.join(run_dir, STAGING, name), os.path.join(run_dir, name))
    shutil.rmtree(os.path.join(run_dir, STAGING))
    if not limit or limit < 0:
        return
    checkpoints = sort_checkpoints(run_dir, use_mtime=True)
    old = [path for path in checkpoints[:-1] if best is None or path != str(Path(best))]
    # As Transformers rotates them, but no half of one keeps its name when a kill comes in between.
    for path in old[: max(0, len(checkpoints) - limit)]:
        remove_folder(path)
