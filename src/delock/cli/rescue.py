"""Finds another place for a run whose folder cannot be written any more, and says in words what has failed and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR)


def reason(error: OSError) -> str:
    """Returns why a file could not be written."""
    return "the folder is gone" if error.errno in GONE else error.strerror or str(error)


def remedy(error: OSError, place: Path) -> str:
    """Returns what a user can do so that a place can be written."""
    if error.errno in FULL:
        return f"make room on the disk of {place}"
    if error.errno in READ_ONLY:
        return f"make {place} writable"
    return f"make {place} again" if error.errno in GONE else f"look at the disk of {place}"


def warning(folder: Path, name: str, error: OSError) -> str:
    """Returns in one line that a file could not be written during the run, and what will be."""
    hope = "" if error.errno in GONE else f"{remedy(error, folder)}, else "
    return (
        f"cannot write {folder / name}: {reason(error)}. The run goes on and forgets nothing: {hope}it will be saved elsewhere at its end"
    )


def advice(error: OSError) -> str:
    """Returns the remedy to add to the message of an error that ends a command, where it is known."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "; raise the number of files that a program may have open (ulimit -n 1024)"
    known = error.filename is not None and error.errno in (*FULL, *READ_ONLY)
    return f"; {remedy(error, Path(os.fsdecode(error.filename)).parent)}" if known else ""


def rescue(name: str, fill: Callable[[Path], None]) -> tuple[Path | None, list[str]]:
    """Calls `fill` with new folders for the run `name`, one after the other, until one of them takes everything.

    They lie in the user's cache folder, then in the folder for temporary files. Returns the folder, None if there is none, and what was
    wrong with those before.
    """
    failed = []
    for make in (_in_cache, _in_temporary):
        try:
            place = make(f"{name}-{datetime.now():%Y-%m-%d-%H%M%S}-")
        except (OSError, RuntimeError) as error:  # a user without a home, a machine without a place for temporary files
            failed.append(str(error))
            continue
        try:
            fill(place)
        except OSError as error:
            shutil.rmtree(place, ignore_errors=True)
            failed.append(f"{place.parent} ({reason(error)})")
            continue
        return place, failed
    return None, failed


def _in_cache(prefix: str) -> Path:
    from delock.data.cache import cache_dir  # here: it loads torch

    folder = cache_dir() / "unsaved"
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=prefix, dir=folder))


def _in_temporary(prefix: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"delock-{prefix}"))


def told(folder: Path, unwritten: Mapping[str, OSError], place: Path | None, failed: list[str], missing: list[str]) -> str:
    """Returns in one sentence what could not be written, where the run is now, and what to do."""
    first = next(iter(unwritten.values()))
    begin = f"the run folder {folder} could not take {', '.join(unwritten)}: {reason(first)}"
    if place is None:
        others = f", nor could {' and '.join(failed)}" if failed else ""
        return f"{begin}{others}. What is not in {folder} is lost; {remedy(first, folder)} before the next run"
    if place == folder:
        return f"{begin}. All else is there; {remedy(first, folder)} before the next run"
    but = f", but for {', '.join(missing)}" if missing else ""
    return f"{begin}. The run was saved in {place}{but}; {remedy(first, folder)} and move it there"
