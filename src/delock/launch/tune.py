"""How a rank's process is set up to compute: threads, cores, and the C allocator."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

# malloc.h. Large freed blocks otherwise go back to the kernel and are faulted in again: 13 % of a ResNet-20's time, and more
# for schedules that keep few graphs alive, so an untuned comparison between methods is biased.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


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
    keep_memory()


def keep_memory() -> None:
    """Tell glibc to keep freed memory for the next batch; does nothing with another C library."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # as a size_t: never
        libc.mallopt(_M_TOP_PAD, 64 << 20)


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
