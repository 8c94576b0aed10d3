"""Keeps files that can be made again; a file is written so that no reader ever sees half of it."""

from __future__ import annotations

import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch

from delock.errors import UsageError


def cache_dir() -> Path:
    """Returns $DELOCK_CACHE, else delock under $XDG_CACHE_HOME, else ~/.cache/delock."""
    if own := os.environ.get("DELOCK_CACHE"):
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "delock"


def write(path: Path, content: dict[str, Any]) -> None:
    """Saves under a temporary name beside `path`, then renames: readers find either the old file or the new one, complete.

    Raises UsageError if the directory cannot be written.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        torch.save(content, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise UsageError(f"cannot write the cache {path}: {error}. Make room there, or set DELOCK_CACHE to another directory") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def read(path: Path, fingerprint: str, *, verify: bool) -> dict[str, Any] | None:
    """Returns the content, its tensors mapped from the file; None if the file is missing, damaged, or has another fingerprint.

    verify: read the whole file once to compare its checksums (0.1 s for 180 MB).
    """
    try:
        if verify:
            with zipfile.ZipFile(path) as members:  # the format of torch.save, which keeps a CRC of every member
                if members.testzip() is not None:
                    return None
        content: dict[str, Any] = torch.load(path, mmap=True, weights_only=True)
        return content if content["fingerprint"] == fingerprint else None
    except Exception:  # a file can be damaged in many ways, and there is one remedy: make it again
        return None
