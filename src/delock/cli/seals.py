"""Seals the lines of a file: each ends with the CRC32 of itself and of all lines before it.

So a line that was lost, doubled, moved or changed is seen when the file is read. A missing end is not: for that the summary says how many
lines there are.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from pathlib import Path

from delock.errors import UsageError

_SEALED = re.compile(r'(\{.*), "seal": (\d{1,10})\}')


def sealed(lines: Iterable[str], before: int) -> tuple[str, int]:
    """Returns JSON objects, a line each, with their seals, and the last seal; before: the seal of the line in front of them, 0 if none."""
    text = []
    for line in lines:
        whole = line.rstrip("\n")
        before = zlib.crc32(whole.encode(), before)
        text.append(f'{whole[:-1]}, "seal": {before}}}\n')
    return "".join(text), before


def unsealed(line: str, before: int) -> tuple[str, int]:
    """Returns a line without its seal, and the seal. Raises ValueError if it is not the line that was written there."""
    found = _SEALED.fullmatch(line.rstrip("\n"))
    if not found:
        raise ValueError("it has no seal")
    whole, seal = found[1] + "}", int(found[2])
    if zlib.crc32(whole.encode(), before) != seal:
        raise ValueError("its seal does not fit")
    return whole, seal


def read(path: Path) -> list[str]:
    """Returns the lines of a file without their seals; an incomplete last one, of a run that was cut off, is left out.

    Raises OSError, and UsageError for a line that is not as it was written, or not where.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found, seal = [], 0
    for number, line in enumerate(lines, 1):
        try:
            whole, seal = unsealed(line, seal)
        except ValueError as error:
            if number < len(lines) or line.endswith("}"):
                raise UsageError(
                    f"line {number} of {path} is not as it was written, or not where ({error}): restore the file, or train again"
                ) from None
            break
        found.append(whole)
    return found
