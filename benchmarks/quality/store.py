"""Keeps the records of runs, one JSON file each, so that no reader sees half of one and no run is made twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rows import Run
from todo import Set, grid

from delock.errors import UsageError


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Writes a record, a line for each of its entries, under another name first."""
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value, allow_nan=False)}" for name, value in record.items())
    fresh = path.with_suffix(".fresh")
    fresh.write_text(f"{{\n{lines}\n}}\n")
    os.replace(fresh, path)


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the records in a folder by the names of their runs."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def refuse_stale(wanted: Set, folder: Path) -> None:
    """Raises UsageError if a record was made with other settings than the set has today."""
    records = read(folder)
    for row in wanted.rows:
        for run in [Run(row, rate, seed) for rate in grid(row, records) for seed in range(wanted.seeds)]:
            today = json.loads(json.dumps(wanted.task.settings(run)))
            if run.name in records and records[run.name]["settings"] != today:
                raise UsageError(f"{run.name} in {folder} was made with other settings than today's: delete its file, or undo the change")


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Makes the folder and keeps other runners out of it; drops what a killed one was writing. Raises UsageError if there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for half in folder.glob("*.fresh"):
            half.unlink()
        yield
    except BlockingIOError as error:
        raise UsageError(f"another runner is at work in {folder}: let it end, or stop it") from error
    finally:
        os.close(handle)
