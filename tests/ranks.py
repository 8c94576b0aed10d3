"""Targets that the tests of launch give to their ranks, and a watch over the ranks' processes."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from delock.errors import UsageError
from delock.launch.rank import Rank


class Pids(list[int]):
    """on_event that notes the pids the ranks emit, and everything else beside."""

    def __init__(self) -> None:
        self.others: list[tuple[int, object]] = []

    def __call__(self, rank: int, event: object) -> None:
        match event:
            case ("pid", int(pid)):
                self.append(pid)
            case _:
                self.others.append((rank, event))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def tell_pid(rank: Rank) -> None:
    rank.emit(("pid", os.getpid()))


def greet(rank: Rank, payload: Any) -> tuple[int, int, Any]:
    tell_pid(rank)
    for i in range(3):
        rank.emit(("step", i))
    rank.open_group()
    ranks = torch.tensor([rank.rank])
    dist.all_reduce(ranks)
    return rank.rank, int(ranks), payload


def of_this_module() -> Callable[[Rank, object], bool]:
    return lambda rank, payload: globals() is vars(sys.modules[__name__])


def raise_in_one(rank: Rank, how: str) -> None:
    """Rank 1 raises; the others block in a receive from it that never comes."""
    tell_pid(rank)
    rank.open_group()
    rank.progress.at("F12", "epoch 1, batch 3")
    dist.barrier()
    if rank.rank != 1:
        rank.progress.wait_for(1)
        dist.recv(torch.empty(3), 1)
    match how:
        case "error":
            raise ZeroDivisionError("the culprit's own words")
        case "usage":
            raise UsageError("the batch holds one sample; give it two")
        case "leave":
            os._exit(3)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang":
            a_loop_without_end()
    rank.progress.wait_for(0)
    dist.recv(torch.empty(3), 0)


def a_loop_without_end() -> None:
    while True:
        time.sleep(0.01)


def block(rank: Rank, payload: object) -> None:
    tell_pid(rank)
    rank.progress.at("F0")
    a_loop_without_end()


def environment(rank: Rank, name: str) -> tuple[str | None, int, set[int]]:
    return os.environ.get(name), torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()


def born_with(rank: Rank, payload: object) -> str:
    return Path("/proc/self/environ").read_text()


def slow_set_up(rank: Rank, seconds: float) -> int:
    tell_pid(rank)
    rank.open_group()
    if rank.rank == 0:
        time.sleep(seconds)  # stands for the decoding of a data set
    rank.progress.at("F0")
    rank.progress.wait_for(1 - rank.rank)
    dist.barrier()
    return rank.rank


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Processes of which this one is no parent can only be polled."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "too late"
        time.sleep(0.05)
