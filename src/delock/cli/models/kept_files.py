"""Keeps in a run's folder the checksums of the user's files that its model and data were made from, and sees if they have changed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from delock.cli.config.small_file import json_object
from delock.cli.models.names import source_files

FILES = "files.json"  # path -> CRC32
_PIECE = 1 << 22  # bytes that are read at a time


def checksum(path: Path) -> str:
    """Returns the CRC32 of a file, which may be large."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
    return f"{crc:08x}"


def checksums(model: str | None, data: str | None, text: Path | None) -> dict[str, str]:
    """Returns those of the files behind a model and data of these names, and of a text, by path."""
    files = [*source_files(model, data), *([text] if text and text.is_file() else [])]  # a pipe can be read once
    return {str(path): checksum(path) for path in files}


def kept(run: Path) -> Mapping[str, object]:
    """Returns the checksums that a run has kept; none, if it is made from no such files."""
    try:
        return json_object(run / FILES)
    except (OSError, ValueError):
        return {}


def changed(run: Path) -> list[str]:
    """Returns in a sentence each of the files that are there and are not as they were when the run began."""
    return [
        f"{name} has changed since the run in {run} began (its CRC32 was {then}, and is {checksum(Path(name))} now)"
        for name, then in kept(run).items()
        if Path(name).is_file() and checksum(Path(name)) != then
    ]
