"""The heap of a stage's process: which allocator serves it, what it keeps, and giving back what is free.

A network asks for large blocks of several sizes in turn, and for a small one between any two. glibc's malloc takes more than it is asked
for, cuts off the rest and gives that to small requests: between those a large block that was freed is too short for the next of its size,
and the process grows by a third more than its tensors need. tcmalloc and jemalloc keep small blocks apart from large ones. They serve a
process only from its start on, so whoever starts processes asks `environment`.
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
"""What serves a process; "" for a C library of which nothing is known here."""

# the better ones first, as the distributions name their files
FILES = ("libtcmalloc_minimal.so.4", "libtcmalloc.so.4", "libjemalloc.so.2")
PRELOAD = "LD_PRELOAD"  # set by the user, to nothing even: then it is the user who chooses

# Read once, at the start of a process. Freed memory is kept for the next batch: to return it and fault it in again costs more than
# anything else that an allocator does. glibc joins its small blocks at once, so that the large ones between them fit again.
SETTINGS = (
    ("TCMALLOC_RELEASE_RATE", "0"),
    ("TCMALLOC_LARGE_ALLOC_REPORT_THRESHOLD", "0"),  # no line on stderr for every tensor of a gigabyte
    ("MALLOC_CONF", "oversize_threshold:0,dirty_decay_ms:-1,muzzy_decay_ms:-1"),
)
TUNABLES = "glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"

# malloc.h
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_ALL_ARENAS = 4096  # of jemalloc


def environment(given: Mapping[str, str], library: Path | None) -> dict[str, str]:
    """What to add to an environment for a process that trains; `library`: the allocator to be preloaded. What is given wins."""
    added = {name: value for name, value in SETTINGS if name not in given}
    before = given.get("GLIBC_TUNABLES")
    added["GLIBC_TUNABLES"] = f"{TUNABLES}:{before}" if before else TUNABLES  # of two the last one counts
    if library and PRELOAD not in given:
        added[PRELOAD] = str(library)
    return added


def installed(files: Sequence[str] = FILES) -> Path | None:
    """The first of these allocators that this system has; None: there is none but the C library's."""
    if sys.platform != "linux":
        return None
    folders = (f"/usr/lib/{platform.machine()}-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib", f"{sys.prefix}/lib")
    return next((path for file in files for folder in folders if (path := Path(folder, file)).exists()), None)


@contextmanager
def tuned() -> Iterator[None]:
    """Processes that are started within are born with the best heap there is; this one keeps its own, and its environment."""
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
    """What serves this process."""
    symbols: tuple[tuple[str, Allocator], ...] = (
        ("MallocExtension_ReleaseFreeMemory", "tcmalloc"),
        ("mallctl", "jemalloc"),
        ("gnu_get_libc_version", "glibc"),
    )
    process = ctypes.CDLL(None)
    return next((name for symbol, name in symbols if hasattr(process, symbol)), "")


def keep() -> None:
    """Tell glibc to keep freed memory, and to have it all in one piece; others have been told at their start, or know no such thing."""
    if in_use() == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # as a size_t: never
        libc.mallopt(_M_TOP_PAD, 64 << 20)


def give_back() -> None:
    """Return what is free now to the system, once: what a process holds is then what it uses."""
    process = ctypes.CDLL(None)
    match in_use():
        case "tcmalloc":
            process.MallocExtension_ReleaseFreeMemory()
        case "jemalloc":
            process.mallctl(f"arena.{_ALL_ARENAS}.purge".encode(), None, None, None, ctypes.c_size_t(0))
        case "glibc":
            process.malloc_trim(ctypes.c_size_t(0))
