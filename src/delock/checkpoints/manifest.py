"""Defines the manifest of a checkpoint: its instant, what it was made with, and the size and CRC32 of each of its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from delock.errors import UsageError

FORMAT = 1
CHECKSUM = "checksum"


@dataclass(frozen=True, slots=True)
class Manifest:
    """Describes a checkpoint. It is written last, so a folder without it is not one.

    tick: the tick before which every stage was saved. batches: those that stage 0 had begun. updates: of every stage.
    trained: batches whose losses were known. evaluations: made. measures: of the last one, without those that are no number.
    made_with: torch, threads, kind of processor. options: those of the run, flat, with the cuts that were used.
    first: the batch with which these stages began: 0, or where the run went on in other stages than before.
    """

    tick: int
    batches: int
    trained: int
    evaluations: int
    measures: Mapping[str, float]
    updates: tuple[int, ...]
    made_with: Mapping[str, str | int]
    options: Mapping[str, Any]
    files: Mapping[str, tuple[int, int]]  # bytes, CRC32
    first: int = 0
    format: int = FORMAT

    @property
    def K(self) -> int:
        """Returns the number of stages."""
        return len(self.updates)

    @property
    def size(self) -> int:
        """Returns the bytes of all files."""
        return sum(size for size, _ in self.files.values())

    def dumps(self) -> str:
        """Returns the manifest as JSON."""
        entries = asdict(self)
        return json.dumps({**entries, CHECKSUM: _checksum(entries)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def loads(cls, text: str) -> Manifest:
        """Returns the manifest that `dumps` wrote. Raises UsageError for anything else, and for a format of a later Delock."""
        try:
            given = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"the manifest is no JSON: {error}") from error
        if not isinstance(given, dict) or set(given) != {CHECKSUM, *(field.name for field in fields(cls))}:
            raise UsageError("the manifest has not the entries of one")
        if given["format"] != FORMAT:
            raise UsageError(f"the checkpoint has format {given['format']!r}, and this Delock reads format {FORMAT}: update Delock")
        if given.pop(CHECKSUM) != _checksum(given):
            raise UsageError("the manifest is not as it was written")
        _refuse(given)
        files = {name: (size, crc) for name, (size, crc) in given.pop("files").items()}
        return cls(**{**given, "updates": tuple(given["updates"])}, files=files)


def _refuse(given: Mapping[str, Any]) -> None:
    """Raises UsageError for an entry of another kind than `dumps` writes."""
    updates = given["updates"]
    counts = [given[name] for name in ("tick", "batches", "trained", "evaluations", "first")]
    sound = isinstance(updates, list) and len(updates) > 0 and all(map(_is_count, [*counts, *updates]))
    sound = sound and all(isinstance(given[name], dict) for name in ("measures", "made_with", "options", "files"))
    sound = sound and all(isinstance(one, int | float) for one in given["measures"].values())
    if not sound or not all(isinstance(one, list) and len(one) == 2 and all(map(_is_count, one)) for one in given["files"].values()):
        raise UsageError("the manifest has an entry of the wrong kind")
    for name in given["files"]:
        if "/" in name or name.startswith("."):
            raise UsageError(f"the manifest names a file outside its folder: {name!r}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _checksum(entries: Mapping[str, Any]) -> int:
    """Returns the CRC32 of entries, however they are laid out."""
    return zlib.crc32(json.dumps(entries, sort_keys=True, allow_nan=False).encode())
