"""Chooses the memory allocator of a stage's process, sets it to keep freed memory, and returns free memory to the system.

A network allocates large blocks of several sizes in turn, and small blocks between them. glibc's malloc gives the rest of a free large
block to small requests. The large block between two of these is then too short for the next tensor of its size, and the process grows by a
third more than its tensors need. tcmalloc and jemalloc keep small blocks apart from large ones. They serve a process only from its start,
so code that starts processes must use `environment`.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, TypeAlias

Allocator: TypeAlias = Literal["tcmalloc", "jemalloc", "glibc", ""]
"""The allocator that serves a process; "" for any other C library."""

# the better ones first, as the distributions name their files
FILES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")
PRELOAD = "LD_PRELOAD"  # if the user has set it, even to nothing, the user chooses

# Read once, at the start of a process. Freed memory is kept for the next batch: returning it and faulting it in again costs more time than
# anything else that an allocator does. glibc joins its small blocks at once, so that the large blocks between them can be used again.
SETTINGS = (
    ("TCMALLOC_RELEASE_RATE", "0"),
    ("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD", "0"),  # no line on stderr for every tensor of a gigabyte
    ("MALLOC_CONF", "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"),
)
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
_ALL_ARENAS = 4096  # of jemalloc


def environment(given: Mapping[str, str], library: Path | None) -> dict[str, str]:
    """Returns the variables to add to the environment `given` of a process that trains; `library` is preloaded. `given` wins."""
    added = {name: value for name, value in SETTINGS if name not in given}
    before = given.get("GLIBC_TUNABLES")
    added["GLIBC_TUNABLES"] = f"{TUNABLES}:{before}" if before else TUNABLES  # of two the last one counts
    if library and PRELOAD not in given:
        added[PRELOAD] = str(library)
    return added


def installed(files: Sequence[str] = FILES) -> Path | None:
    """Returns the first of these allocators that is installed, or None."""
    if sys.platform != "linux":
        return None
    folders = (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", f"{sys.prefix}/lib")
    return next((path for file in files for folder in folders if (path := Path(folder, file)).exists()), None)


@contextmanager
def tuned() -> Iterator[None]:
    """Lets processes that are started within the block have the best allocator; this process' own allocator and environment stay."""
    added = environment(os.environ, installed())
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_use() -> Allocator:
    """Returns the allocator that serves this process."""
    symbols: tuple[tuple[str, Allocator], ...] = (
        ("MallocExtension_ReleaseFreeMemory", "tcmalloc"),
        ("mallctl", "jemalloc"),
        ("gnu_get_libc_version", "glibc"),
    )
    process = ctypes.CDLL(None)
    return next((name for symbol, name in symbols if hasattr(process, symbol)), "")


def keep() -> None:
    """Sets glibc to keep freed memory in one piece; other allocators were set at their start, or have no such setting."""
    if in_use() == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # as a size_t: never
        libc.mallopt(_M_TOP_PAD, 64 << 20)


@contextmanager
def returning() -> Iterator[None]:
    """Lets glibc return every large block to the system as soon as it is free. Within the block memory counts more than time."""
    libc = ctypes.CDLL(None) if in_use() == "glibc" else None
    if libc:
        libc.mallopt(_M_MMAP_THRESHOLD, 64 << 10)
    try:
        yield
    finally:
        if libc:  # from now on as much is kept as glibc comes to keep by itself
            libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
            libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)


def give_back() -> None:
    """Returns the memory that is free now to the system, once, so that the process holds only what it uses."""
    process = ctypes.CDLL(None)
    match in_use():
        case "tcmalloc":
            process.MallocExtension_ReleaseFreeMemory()
        case "jemalloc":
            process.mallctl(f"arena.{_ALL_ARENAS}.purge".encode(), None, None, None, ctypes.c_size_t(0))
        case "glibc":
            process.malloc_trim(ctypes.c_size_t(0))
