"""How a rank's process is set up to compute: threads, cores, and its heap."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from delock.launch import allocator


def share_cores(world: int, threads: int) -> list[set[int] | None]:
    """The cores for each of `world` ranks, `threads` each, among those this process may use; all None where they do not go round."""
    cores = _cores()
    if world * threads > len(cores):
        return [None] * world
    return [set(cores[rank * threads : (rank + 1) * threads]) for rank in range(world)]


def settle(threads: int, cores: set[int] | None) -> None:
    """Bind this process to `cores` (None: not at all), give torch `threads` threads, keep freed memory. First of all: threads inherit."""
    if cores is not None:
        os.sched_setaffinity(0, cores)
    torch.set_num_threads(threads)
    allocator.keep()


def _cores() -> list[int]:
    """The cores this process may use, one hyperthread of every physical core first; none where the system does not tell."""
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
