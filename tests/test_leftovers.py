"""The check after every test can fail: it notices each kind of change, and each kind of leftover."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from delock.launch.context import context

import leftovers
from leftovers import State
from workloads import drawn


@pytest.mark.usefixtures("own_random")
def test_a_drawn_number_is_noticed() -> None:
    before = State()
    drawn(3)
    assert not before.changed()
    for draw, what in ((lambda: torch.rand(1), "torch's"), (np.random.rand, "numpy's"), (random.random, "of `random`")):
        before = State()
        draw()
        [found] = before.changed()
        assert what in found


def test_a_changed_setting_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = State()
    monkeypatch.setenv("DELOCK_TEST_NAME", "1")
    torch.set_num_threads(2)
    torch.set_default_dtype(torch.float64)
    found = before.changed()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    assert found == ["the environment", "the number of threads that torch computes with", "torch's default dtype"]
    monkeypatch.undo()
    assert not before.changed()


def test_a_process_group_is_noticed(tmp_path: Path) -> None:
    before = State()
    dist.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", world_size=1, rank=0)
    found = before.changed()
    dist.destroy_process_group()
    assert "a process group" in found


def test_a_thread_is_noticed_and_given_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    before, end = State(), threading.Event()
    thread = threading.Thread(target=end.wait, args=(20,))
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "PATIENCE", 0.05)
        assert before.changed() == ["a thread"]
    threading.Timer(0.05, end.set).start()
    assert not before.changed()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not list a process's children in /proc")
def test_a_process_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = State()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        with monkeypatch.context() as patch:
            patch.setattr(leftovers, "PATIENCE", 0.05)
            assert before.changed() == ["a child process"]
        process.communicate(b"\n")
    assert not before.changed()


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="this system does not list a process's children in /proc")
def test_a_rank_of_the_fork_server_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = State()
    rank = context().Process(target=time.sleep, args=(60,))
    rank.start()
    with monkeypatch.context() as patch:
        patch.setattr(leftovers, "PATIENCE", 0.05)
        found = before.changed()
    rank.kill()
    rank.join()
    assert found == ["a child process"]
