"""Keeps in a run's folder the checksums of the user's files that its model and data were made from, and sees if they have changed."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

from delock.cli.config.small_file import json_object
from delock.cli.models.names import source_files

FILES = "files.json"  # path -> CRC32


def checksum(path: Path) -> str:
    """Returns the CRC32 of a file."""
    return f"{zlib.crc32(path.read_bytes()):08x}"


def checksums(*names: str | None) -> dict[str, str]:
    """Returns those of the files behind a model and data of these names, by path."""
    return {str(path): checksum(path) for path in source_files(*names)}


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
