"""Reads torchrun's variables: the number of ranks, and the rank that prints and writes."""

from __future__ import annotations

import os


def ranks() -> int | None:
    """Returns torchrun's number of ranks; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def is_rank_zero() -> bool:
    """Returns True if this process prints and writes; under torchrun only rank 0 does."""
    return ranks() is None or os.environ["RANK"] == "0"
