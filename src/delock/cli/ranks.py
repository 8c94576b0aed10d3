"""Reads torchrun's variables: the number of ranks, and the rank that prints and writes."""

from __future__ import annotations

import os

from delock.launch.variables import rank_of_torchrun


def ranks() -> int | None:
    """Returns torchrun's number of ranks; None without torchrun. Raises UsageError if its variables make no sense."""
    return rank_of_torchrun().world if _is_a_rank() else None


def is_rank_zero() -> bool:
    """Returns True if this process prints and writes; under torchrun only rank 0 does."""
    return not _is_a_rank() or os.environ["RANK"] == "0"


def _is_a_rank() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ
