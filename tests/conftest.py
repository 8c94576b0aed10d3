"""What holds for every test: one thread, as in a stage, and nothing left behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ranks import Pids, alive

# A background job ignores Ctrl-C from birth, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The same number of threads everywhere: sums are taken in the same order, and two cores are enough."""
    torch.set_num_threads(1)
    yield
    assert torch.get_num_threads() == 1, "the test left another number of threads behind"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Torch's random state and process group are the caller's."""
    yield
    assert not dist.is_initialized(), "the test left a process group open"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded or downloaded goes into a folder of the test's own."""
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and a cache of its own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("DELOCK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "here"


@pytest.fixture
def pids() -> Iterator[Pids]:
    """Afterwards none of the processes that reported their pid is alive."""
    reported = Pids()
    yield reported
    assert reported, "no rank reported its pid"
    assert [pid for pid in reported if alive(pid)] == []
