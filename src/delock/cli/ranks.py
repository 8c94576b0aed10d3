"""Reads torchrun's variables: the number of ranks, and the rank that prints and writes."""

from __future__ import annotations

import os

from delock.launch.variables import rank_of_torchrun, under_torchrun


def ranks() -> int | None:
    """Returns torchrun's number of ranks; None without torchrun. Raises UsageError if its variables make no sense."""
    return rank_of_torchrun().world if under_torchrun() else None


def is_rank_zero() -> bool:
    """Returns True if this process prints and writes; under torchrun only rank 0 does."""
    return not under_torchrun() or os.environ["RANK"] == "0"
