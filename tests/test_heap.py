"""The heap of stages' processes: what they are born with, whose choice wins, and what giving back is worth."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from delock.launch import allocator, peak_memory
from delock.launch.processes import run_processes
from delock.launch.rank import Rank

CPU = torch.device("cpu")
LIBRARY = Path("/somewhere/libtcmalloc_minimal.so.4")
FOUND = allocator.installed()


def test_a_process_is_born_with_the_library_that_was_found() -> None:
    added = allocator.environment({}, LIBRARY)
    assert added["LD_PRELOAD"] == str(LIBRARY)
    assert added["GLIBC_TUNABLES"] == allocator.TUNABLES
    assert added["MALLOC_CONF"]
    assert "LD_PRELOAD" not in allocator.environment({}, None)


@pytest.mark.parametrize("preloaded", ["", "libmine.so"])
def test_what_the_user_has_said_wins(preloaded: str) -> None:
    given = {"LD_PRELOAD": preloaded, "MALLOC_CONF": "narenas:1", "GLIBC_TUNABLES": "glibc.malloc.mxfast=64"}
    added = allocator.environment(given, LIBRARY)
    assert added.keys().isdisjoint({"LD_PRELOAD", "MALLOC_CONF"})
    assert added["GLIBC_TUNABLES"] == f"{allocator.TUNABLES}:glibc.malloc.mxfast=64"  # of two the last one counts


def test_this_program_keeps_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.mxfast=64")
    before = dict(os.environ)
    with allocator.tuned():
        assert os.environ["GLIBC_TUNABLES"] == f"{allocator.TUNABLES}:glibc.malloc.mxfast=64"
    assert dict(os.environ) == before


def served(rank: Rank, payload: None) -> tuple[str, str | None]:
    """The rank's allocator, and what its own children would be told to preload."""
    return allocator.in_use(), os.environ.get(allocator.PRELOAD)


@pytest.mark.skipif(FOUND is None, reason="neither tcmalloc nor jemalloc is installed")
@pytest.mark.skipif(allocator.PRELOAD in os.environ, reason="LD_PRELOAD is set, which is then the user's choice")
def test_ranks_have_the_allocator_that_is_installed() -> None:
    assert FOUND is not None
    [(allocator, preload)] = run_processes(served, [None])
    assert allocator
    assert allocator in FOUND.name
    assert preload is None, "for ranks alone, not for what they start"


def held(rank: Rank, payload: None) -> tuple[int, int, int]:
    """Bytes that the rank holds with a hundred tensors of a megabyte, without them, and when free memory has been given back."""
    tensors = [torch.ones(1 << 18) for _ in range(100)]
    full = peak_memory.resident()
    tensors.clear()
    free = peak_memory.resident()
    return full, free, peak_memory.reset_peak(CPU)


@pytest.mark.skipif(not peak_memory.STATUS.exists(), reason="this system does not tell what a process holds")
def test_freed_memory_is_kept_until_it_is_given_back() -> None:
    [(full, free, after)] = run_processes(held, [None])
    assert full - free < 20 << 20
    assert full - after > 80 << 20
