"""Reads what a run has kept: its config, and the weights of its end or of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from delock.cli.config import TrainConfig, build, resolve, toml
from delock.cli.ranks import ranks
from delock.cli.run_folder import CHECKPOINTS, CONFIG, MODEL, SUMMARY
from delock.errors import UsageError

if TYPE_CHECKING:
    from delock.checkpoints.manifest import Manifest

FINAL = "final"


@dataclass(frozen=True)
class Kept:
    """Holds the place of weights: a checkpoint's folder, or the file that a run has left at its end."""

    path: Path
    batches: int | None  # trained; None if that is not known any more
    manifest: Manifest | None = None  # of a checkpoint
    notes: tuple[str, ...] = ()  # damaged ones that were passed over


def named(words: Sequence[str], command: str) -> tuple[Path | None, Sequence[str]]:
    """Returns the folder that the words begin with, if they do, and the other words. Raises UsageError under torchrun."""
    if ranks():
        raise UsageError(f"{command} does everything in one process: start it without torchrun")
    return (Path(words[0]), words[1:]) if words and not words[0].startswith("-") else (None, words)


def found(path: Path | None, name: str | None, command: str) -> tuple[Path, str | None]:
    """Returns the run's folder and the checkpoint's name, for the folder of a run or of one of its checkpoints."""
    if path is None:
        raise UsageError(f"say first which run: delock {command} RUN, with the folder that delock train has made")
    if name is None and path.name.startswith("batch-") and path.parent.name == CHECKPOINTS:
        return path.parent.parent, path.name
    return path, name


def read_config(run: Path) -> TrainConfig:
    """Returns the config of a run. Raises UsageError for any other folder."""
    if not (run / CONFIG).is_file():
        rows = sorted(path.parent for path in run.glob(f"*/{CONFIG}"))
        hint = f"it holds several, such as {rows[0]}" if rows else f"it has no {CONFIG}; give a folder that delock train has made"
        raise UsageError(f"{run} is not the folder of a run: {hint}" if run.exists() else f"there is no run {run}")
    return resolve(build(TrainConfig, toml.read(run / CONFIG), str(run / CONFIG)))


def finished(run: Path) -> int | None:
    """Returns the batches of a run that has come to its end; None for any other."""
    try:
        told = json.loads((run / SUMMARY).read_text(encoding="utf-8"))
        return int(told["batches"]) if told["status"] == "finished" and (run / MODEL).is_file() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def weights(run: Path, name: str | None) -> Kept:
    """Returns the weights of that name, by default the latest ones that are not damaged.

    name: of a checkpoint, or "final" for those of the run's end. Raises UsageError if there are none.
    """
    if name is not None:
        return _named(run, name)
    from delock.checkpoints.directory import newest_first, verified

    end, notes = finished(run), list[str]()
    for path in newest_first(run / CHECKPOINTS):
        try:
            manifest = verified(path)
        except UsageError as error:
            notes.append(f"passed over: {error}")
            continue
        if end is None or manifest.batches > end:  # a run that was made longer, and has not come to its new end
            return Kept(path, manifest.batches, manifest, tuple(notes))
        break
    if (run / MODEL).is_file():
        return Kept(run / MODEL, end)
    why = notes[0] if notes else "it has no checkpoint"
    raise UsageError(f"{run} has no {MODEL}: it did not run to its end; {why}; train it again")


def _named(run: Path, name: str) -> Kept:
    from delock.checkpoints.directory import newest_first, verified

    if name == FINAL:
        if not (run / MODEL).is_file():
            raise UsageError(f"{run} did not run to its end, so it has no final weights: delock checkpoints {run} lists others")
        return Kept(run / MODEL, finished(run))
    names = [path.name for path in newest_first(run / CHECKPOINTS)]
    if name not in names:
        there = f"it has {', '.join(names)}" if names else "it has none"
        raise UsageError(f"{run} has no checkpoint {name!r}: {there}")
    manifest = verified(run / CHECKPOINTS / name)
    return Kept(run / CHECKPOINTS / name, manifest.batches, manifest)
