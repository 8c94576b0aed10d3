"""Sets up a rank's process to compute: threads, cores, allocator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

import torch

from delock.launch import allocator

_PROGRAMS: ContextVar[frozenset[int] | None] = ContextVar("the program's cores", default=None)  # in a rank that is bound to some


def share_cores(world: int, threads: int) -> list[set[int] | None]:
    """Returns the cores for each of `world` ranks, `threads` each, of those this process may use; all None if there are too few."""
    cores = _cores()
    if world * threads > len(cores):
        return [None] * world
    return [set(cores[rank * threads : (rank + 1) * threads]) for rank in range(world)]


def settle(threads: int, cores: set[int] | None) -> None:
    """Binds this process to `cores` (None: to none), gives torch `threads` threads, and keeps freed memory.

    Call it first, because new threads inherit these settings.
    """
    if cores is not None:
        _PROGRAMS.set(frozenset(os.sched_getaffinity(0)))
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    allocator.keep()


@contextmanager
def unbound() -> Iterator[None]:
    """Lets processes that are started within the block, as the workers of a DataLoader, have all cores of the program."""
    every = _PROGRAMS.get()
    if every is None:
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, every)
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)


def _cores() -> list[int]:
    """Returns the cores that this process may use, one hyperthread of every physical core first; none if the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    firsts, seconds, seen = list[int](), list[int](), set[str]()
    for core in sorted(os.sched_getaffinity(0)):
        siblings = _siblings(core)
        (seconds if siblings in seen else firsts).append(core)
        seen.add(siblings)
    return firsts + seconds


def _siblings(core: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(core)
