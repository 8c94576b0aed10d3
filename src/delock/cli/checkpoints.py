"""`delock checkpoints`: lists the checkpoints of a run, and says which are whole and how to go on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from delock.cli.arguments import parse
from delock.cli.kept_run import finished, found, named, read_config
from delock.cli.run_folder import CHECKPOINTS
from delock.cli.tables import Cells, megabytes
from delock.cli.tables import words as spaced
from delock.cli.terminal import Terminal
from delock.errors import UsageError

if TYPE_CHECKING:
    from delock.checkpoints.manifest import Manifest

ABOUT = """List the checkpoints of a run, the newest first, and say how to go on. RUN is the run's folder.

The exit code is 1 if one of them is damaged.

examples:
  delock checkpoints runs/RUN
  delock checkpoints runs/RUN --verify"""


@dataclass(frozen=True)
class ListOptions:
    """Holds the options of the list."""

    verify: bool = False
    """Read all files and compare their checksums; without it only their sizes are compared."""


@dataclass(frozen=True)
class CheckpointsConfig:
    """Holds the options of `delock checkpoints`."""

    listing: ListOptions = field(default_factory=ListOptions)


@dataclass(frozen=True)
class Listed:
    """Holds one checkpoint of the list: it is whole if nothing is wrong with it."""

    path: Path
    manifest: Manifest | None
    wrong: str | None
    per_epoch: int = 0


def run(words: Sequence[str]) -> int:
    """Parses, shows the table and what to do next, and returns the exit code."""
    path, rest = named(words, "checkpoints")
    options = parse(CheckpointsConfig, rest, "checkpoints RUN", ABOUT).listing
    folder, _ = found(path, None, "checkpoints")
    read_config(folder)
    entries, screen = listed(folder / CHECKPOINTS, verify=options.verify), Terminal()
    if entries:
        screen.table(*_table(entries), spare=("made", "epoch"))
        screen.line()
    for entry in entries:
        if entry.wrong:
            screen.line(f"{entry.path.name} is damaged: {entry.wrong}")
    screen.line(advice(folder, entries))
    return int(any(entry.wrong for entry in entries))


def listed(folder: Path, *, verify: bool) -> list[Listed]:
    """Returns the checkpoints in a folder, the newest first, with what is wrong with them."""
    from delock.checkpoints.directory import newest_first

    return [_entry(path, verify) for path in newest_first(folder)]


def advice(run: Path, entries: Sequence[Listed]) -> str:
    """Returns what can be done with the run."""
    whole = [entry for entry in entries if not entry.wrong and entry.manifest]
    if not entries:
        return f"{run} has no checkpoints: delock train --checkpoint-every 500, or 10m, keeps some"
    if not whole or whole[0].manifest is None:
        return "none of them is whole: begin the run again"
    if (end := finished(run)) is not None and whole[0].manifest.batches <= end:
        return f"the run has come to its end; delock train --resume {run} --epochs N makes it longer"
    return f"delock train --resume {run} goes on from {whole[0].path.name}"


def _entry(path: Path, verify: bool) -> Listed:
    from delock.checkpoints.directory import manifest_of, verified

    try:
        return Listed(path, verified(path, contents=verify), None)
    except UsageError as error:
        wrong = str(error).removeprefix(f"{path} is damaged: ").removeprefix(f"{path}: ")
    try:
        return Listed(path, manifest_of(path), wrong)
    except (OSError, ValueError):
        return Listed(path, None, wrong)


def _table(entries: Sequence[Listed]) -> tuple[Cells, list[Cells]]:
    measures = sorted({name for entry in entries if entry.manifest for name in entry.manifest.measures})
    head = [
        "checkpoint",
        "batches",
        "epoch",
        "updates\nper stage",
        *(f"test\n{spaced(name)}" for name in measures),
        "size",
        "made",
        "state",
    ]
    return head, [_row(entry, measures) for entry in entries]


def _row(entry: Listed, measures: Sequence[str]) -> Cells:
    made = datetime.fromtimestamp(entry.path.stat().st_mtime)
    state = "damaged" if entry.wrong else "good"
    if (manifest := entry.manifest) is None:
        return [entry.path.name, *["-"] * (len(measures) + 4), f"{made:%Y-%m-%d %H:%M}", state]
    epoch = manifest.options.get("batches per epoch")
    return [
        entry.path.name,
        f"{manifest.batches:,}",
        f"{manifest.batches / epoch:.4g}" if isinstance(epoch, int) and epoch else "-",
        _joined(manifest.updates),
        *(f"{manifest.measures[name]:.4g}" if name in manifest.measures else "-" for name in measures),
        megabytes(manifest.size),
        f"{made:%Y-%m-%d %H:%M}",
        state,
    ]


def _joined(updates: Sequence[int]) -> str:
    """Returns 497/498/500; of many stages the first and the last."""
    shown = [f"{count}" for count in updates]
    return "/".join(shown if len(shown) <= 4 else [shown[0], "...", shown[-1]])
