"""Makes randomness a function of names: a key depends on (seed, stage, batch) and the like, not on the process or the time."""

from __future__ import annotations

import hashlib

MOST_SEED = 2**63 - 1
"""The largest seed that torch's generators, and so a run, may have."""


def key(*parts: int | str) -> int:
    """Returns a seed for torch's generators, in 0 .. MOST_SEED; equal parts give equal seeds on every machine and Python version."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
