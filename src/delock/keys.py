"""Randomness as a function of names: one 63-bit key for (seed, stage, batch) and the like, whoever computes it and when."""

from __future__ import annotations

import hashlib


def key(*parts: int | str) -> int:
    """A seed for torch's generators, in 0 .. 2**63 - 1; equal parts give equal keys on every machine and Python version."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
