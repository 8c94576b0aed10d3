"""Reads small files that anybody may have written, and that may be anything."""

from __future__ import annotations

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

OPTIONS, VALUES = 2**20, 2**26  # bytes of the largest file of options, and of JSON


def text(path: Path, largest: int = OPTIONS) -> str:
    """Returns the text of a file.

    Raises OSError for what cannot be read, and ValueError for what is no file, too large, or not UTF-8; a FIFO is not waited for.
    """
    if "\0" in str(path):
        raise ValueError("a path has no NUL")
    told = path.stat()
    if stat.S_ISDIR(told.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    if not stat.S_ISREG(told.st_mode):
        raise ValueError("it is no regular file")
    if told.st_size > largest:
        raise ValueError(f"it has {told.st_size:,} bytes, and at most {largest:,} are read")
    return path.read_text(encoding="utf-8")


def json_object(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file. Raises OSError as `text`, and ValueError for any other content."""
    try:
        value = json.loads(text(path, VALUES))
    except RecursionError:
        raise ValueError("its lists are nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
