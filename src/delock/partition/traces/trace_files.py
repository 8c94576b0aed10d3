"""Keeps traces in a folder of the user's own: a file each, and never more than fit. Whoever could change a file could run code."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from delock.data.cache import cache_dir

OFF = "DELOCK_TRACE_CACHE"  # set to 0: nothing is kept, and nothing is read
MOST, LARGEST = 64, 64 << 20  # files, bytes of a file
SUFFIX = ".trace"


def folder() -> Path | None:
    """Returns the folder of the traces; None if there are to be none, or none that is this user's alone."""
    if os.environ.get(OFF) == "0":
        return None
    found = cache_dir() / "traces"
    try:
        found.mkdir(mode=0o700, parents=True, exist_ok=True)
        return found if _is_own(found.lstat(), stat.S_ISDIR) else None
    except OSError:
        return None


def write_trace(place: Path, key: str, form: Mapping[str, Any], constants: Mapping[str, Tensor]) -> None:
    """Writes a trace under its key, or nothing if it is too large or there is no room. The oldest of too many go."""
    content = json.dumps(form).encode() + b"\n" + safetensors.torch.save({name: one.detach().cpu() for name, one in constants.items()})
    if len(content) > LARGEST:
        return
    with suppress(OSError):
        handle, temporary = tempfile.mkstemp(dir=place, prefix=f".{key[:8]}.")  # of mode 0600
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(f"{_checksum(key, content)}\n".encode() + content)
            os.replace(temporary, place / f"{key}{SUFFIX}")
        finally:
            Path(temporary).unlink(missing_ok=True)
        _drop_oldest(place)


def read_trace(place: Path, key: str) -> tuple[Any, dict[str, Tensor]] | None:
    """Returns what was written under a key; None if there is nothing, or it is damaged, or others could have written it."""
    path = place / f"{key}{SUFFIX}"
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(handle, "rb") as file:
            if not _is_own(os.fstat(handle), stat.S_ISREG):
                return None
            checksum, _, content = file.read().partition(b"\n")
        if checksum.decode("ascii", "replace") != _checksum(key, content):
            return None
        os.utime(path)  # what is used stays
    except OSError:
        return None
    text, _, values = content.partition(b"\n")
    return json.loads(text), safetensors.torch.load(values)


def _is_own(found: os.stat_result, kind: Any) -> bool:
    """Returns True if nobody but this user can write there."""
    return bool(kind(found.st_mode)) and (not hasattr(os, "getuid") or (found.st_uid == os.getuid() and not found.st_mode & 0o077))


def _checksum(key: str, content: bytes) -> str:
    return hashlib.sha256(key.encode() + content).hexdigest()


def _drop_oldest(place: Path) -> None:
    ages = dict[Path, float]()
    for path in place.glob(f"*{SUFFIX}"):
        with suppress(FileNotFoundError):  # another run has dropped it
            ages[path] = path.stat().st_mtime
    for path in sorted(ages, key=lambda one: ages[one])[: max(0, len(ages) - MOST)]:
        path.unlink(missing_ok=True)
