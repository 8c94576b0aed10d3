"""Refuses a folder that checkpoints cannot be written into, or whose disk has no room for them, before anything is trained."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import nn

from delock.checkpoints.directory import newest_first
from delock.errors import UsageError
from delock.options import Checkpoint
from delock.run.prepared import PreparedRun


def refuse_folder(options: Checkpoint) -> None:
    """Raises UsageError if the folder is a file, or cannot be made or written into. It makes none."""
    folder = Path(options.folder)
    place = nearest(folder)
    if not place.is_dir():
        raise UsageError(f"the checkpoints are to go into {folder}, but {place} is not a folder: give another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UsageError(f"the checkpoints are to go into {folder}, but nothing can be written into {place}: give another folder")


def make_folder(prepared: PreparedRun) -> None:
    """Makes the folder. Raises UsageError if the disk has no room for the checkpoints that are kept and one that is written beside them.

    Of stages whose memory is not predicted, the weights alone are counted.
    """
    options = prepared.request.checkpoint
    assert options is not None
    folder = Path(options.folder)
    place, one = nearest(folder), forecast(prepared)
    usage = shutil.disk_usage(place)
    own = sum(path.stat().st_size for checkpoint in newest_first(folder) for path in checkpoint.iterdir())  # they go as new ones come
    count = options.keep + (options.best is not None) if options.every else 0
    need = max(own, count * one) + one - own
    if usage.total and need > usage.free:  # some file systems do not know
        raise UsageError(
            f"the disk of {folder} has {_said(usage.free)} free, but the checkpoints need about {_said(need)} more, {_said(one)} each: "
            "keep fewer (keep, --checkpoint-keep), give another folder, or leave them out (checkpoint, --no-checkpoint)"
        )
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder of checkpoints {folder} cannot be made: {error.strerror}: give another folder") from error
    for path in missing:  # until the run begins
        path.rmdir()


def forecast(prepared: PreparedRun) -> int:
    """Returns the bytes of a checkpoint."""
    heads = prepared.heads
    weights = [_bytes(module) + (_bytes(heads[k]) if k in heads else 0) for k, module in enumerate(prepared.modules)]
    return sum(peak.saved if peak else least for peak, least in zip(prepared.memory(), weights, strict=True))


def nearest(folder: Path) -> Path:
    """Returns the folder, or of what leads to it the nearest that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _bytes(module: nn.Module) -> int:
    return sum(one.nbytes for one in (*module.parameters(), *module.buffers()))


def _said(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"
