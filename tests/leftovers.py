"""The state of this process that a test must leave as it found it, and what differs afterwards."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

SERVER, TRACKER = b"multiprocessing.forkserver", b"multiprocessing.resource_tracker"  # processes that serve the whole session
# What others write: pytest at every test, torch when it compiles, scikit-learn when it is imported.
NOT_OURS = ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_", "_TORCHINDUCTOR_", "KMP_")
PATIENCE = 5.0  # seconds that a thread or a process may take to end


@dataclass(frozen=True)
class State:
    """A snapshot of everything that tests share."""

    torch_random: torch.Tensor = field(default_factory=torch.get_rng_state)
    numpy_random: Any = field(default_factory=lambda: np.random.get_state(legacy=True))
    random: Any = field(default_factory=random.getstate)
    environment: dict[str, str] = field(default_factory=lambda: {k: v for k, v in os.environ.items() if not k.startswith(NOT_OURS)})
    threads: frozenset[threading.Thread] = field(default_factory=lambda: threads())
    processes: frozenset[int] = field(default_factory=lambda: frozenset(children()))
    number_of_threads: int = field(default_factory=torch.get_num_threads)
    dtype: torch.dtype = field(default_factory=torch.get_default_dtype)
    process_group: bool = field(default_factory=dist.is_initialized)

    def changed(self) -> list[str]:
        """The names of what is not as it was; threads and processes that are about to end are given a moment."""
        now = State()
        found = [
            (not torch.equal(self.torch_random, now.torch_random), "torch's random state"),
            (not same_numpy(self.numpy_random, now.numpy_random), "numpy's random state"),
            (self.random != now.random, "the random state of `random`"),
            (self.environment != now.environment, "the environment"),
            (self.number_of_threads != now.number_of_threads, "the number of threads that torch computes with"),
            (self.dtype != now.dtype, "torch's default dtype"),
            (self.process_group != now.process_group, "a process group"),
            (bool(now.threads - self.threads) and not soon(lambda: not threads() - self.threads), "a thread"),
            (bool(now.processes - self.processes) and not soon(lambda: not set(children()) - self.processes), "a child process"),
        ]
        return [name for differs, name in found if differs]


def same_numpy(a: Any, b: Any) -> bool:
    """States of numpy's global generator are equal: name, 624 words, position, and a number kept for the next draw."""
    return bool((a[1] == b[1]).all()) and a[2:] == b[2:]


def threads() -> frozenset[threading.Thread]:
    """The threads of this process but those that torch's compiler keeps from its first use on."""
    return frozenset(thread for thread in threading.enumerate() if not origin(thread).startswith(("torch.", "concurrent.", "tqdm.")))


def origin(thread: threading.Thread) -> str:
    """The module of the code that a thread runs."""
    return getattr(getattr(thread, "_target", None), "__module__", None) or type(thread).__module__


def children() -> set[int]:
    """Child processes, and those that the fork server has forked for us; without the server itself and its tracker. Linux only."""
    found: set[int] = set()
    for pid in children_of("self"):
        command = words_of(pid)
        if SERVER in command:
            found |= children_of(pid)
        elif TRACKER not in command:
            found.add(pid)
    return found


def children_of(pid: int | str) -> set[int]:
    found: set[int] = set()
    with suppress(OSError):  # no /proc, or the process has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            found |= set(map(int, Path(f"/proc/{pid}/task/{thread}/children").read_bytes().split()))
    return found


def words_of(pid: int) -> bytes:
    """The command line of a process; nothing of one that has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def soon(holds: Callable[[], bool]) -> bool:
    """Waits until something holds; False if it does not for PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
