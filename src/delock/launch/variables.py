"""Reads the variables by which torchrun, or a program that sets the same ones, tells a process which rank it is. It loads no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from delock.errors import UsageError

_MANY = 1 << 20


@dataclass(frozen=True)
class RankOfTorchrun:
    """Holds the place of a rank among all, and among those of its host."""

    rank: int
    world: int
    local_rank: int
    local_world: int


def under_torchrun() -> bool:
    """Returns True if torchrun, or a program that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def rank_of_torchrun() -> RankOfTorchrun:
    """Returns the place of this process. Raises UsageError if a variable is no whole number, or if there is no such place."""
    world = _number("WORLD_SIZE", 1, _MANY)
    rank = _number("RANK", 0, world - 1)
    local_world = min(_number("LOCAL_WORLD_SIZE", 1, _MANY, world), world)  # a script may say what a host has room for
    _number("MASTER_PORT", 0, 65535, 0)
    return RankOfTorchrun(rank, world, _number("LOCAL_RANK", 0, local_world - 1, rank % local_world), local_world)


def _number(name: str, least: int, most: int, usual: int | None = None) -> int:
    text = os.environ[name] if usual is None else os.environ.get(name, str(usual))
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UsageError(
            f"the variable {name} is {text!r}, but it must be a whole number, {least} to {most}: start with torchrun, or unset it"
        )
    return int(text)
