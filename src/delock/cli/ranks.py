"""What torchrun says about this process: how many ranks there are, and whether this one speaks and writes."""

from __future__ import annotations

import os


def ranks() -> int | None:
    """Number of ranks that torchrun gives; None without torchrun."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def is_rank_zero() -> bool:
    """Whether this process speaks and writes: under torchrun rank 0 alone does."""
    return ranks() is None or os.environ["RANK"] == "0"
