"""Runs on the ranks that torchrun started: each runs the same program and has all results; rank 0 receives the events."""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import timedelta
from functools import partial
from typing import TypeAlias, TypeVar

import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from delock.errors import StageFailed
from delock.launch.cores import settle
from delock.launch.failure import raised
from delock.launch.heartbeats import Heartbeats
from delock.launch.progress import Progress
from delock.launch.rank import TIMEOUT, Rank, backend_for, device_of

P = TypeVar("P")
R = TypeVar("R")
OnEvent: TypeAlias = Callable[[int, object], None]

_POLL = 0.05  # seconds between two looks for events
_DRAIN = 30.0  # seconds for the last events to arrive after the results
_GRACE = 1.0  # seconds in which an echo waits for the failure that caused it


def under_torchrun() -> bool:
    """Returns True if torchrun, or a program that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def run_torchrun(
    target: Callable[[Rank, P], R],
    payload_of: Callable[[int], P],
    *,
    device: str = "cpu",
    backend: str | None = None,
    threads: int = 1,
    patience: float = 60.0,
    timeout: float = TIMEOUT,
    on_event: OnEvent | None = None,
) -> list[R]:
    """Runs target(rank, payload_of(rank)) on this rank of torchrun, and returns the results of all ranks in rank order, on every rank.

    on_event: called as on_event(rank, event) on rank 0 only, for the events of all ranks, from one thread at a time.
    device: "cuda" is the GPU numbered LOCAL_RANK. Results and events must be picklable.

    If a target raises, its rank prints stage, op and traceback to stderr and exits with 2 for a UsageError, else with 1; torchrun then
    stops the others. An exception of `on_event` is raised on rank 0. If a rank is at one op for `patience` seconds, or all ranks wait for
    each other that long (0: never), the first rank that sees it prints the culprit and its stack, and exits with 1; a target may set
    another patience by `Rank.be_patient`.
    """
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    group, limit = backend_for(device, backend, int(os.environ.get("LOCAL_WORLD_SIZE", world))), timedelta(seconds=timeout)
    settle(threads, None)
    progress, where = Progress(), device_of(device, int(os.environ.get("LOCAL_RANK", rank)))
    store, _, _ = next(rendezvous("env://", rank, world, timeout=limit))
    store.set_timeout(limit)
    # Every run of a program needs keys of its own, or a group would read the addresses of the run before. All ranks count alike.
    space = f"delock/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{store.add(f'delock/runs/{rank}', 1)}"
    dist.init_process_group(group, store=PrefixStore(space, store), rank=rank, world_size=world, timeout=limit)
    post = _Post(rank, world, space, limit, on_event)

    def emit(event: object) -> None:
        with progress.aside():
            post.emit(event)

    try:
        with closing(Heartbeats(rank, world, post.store, progress, patience, partial(_leave, post))) as heartbeats:
            result = target(Rank(rank, world, where, emit, progress, heartbeats.be_patient), payload_of(rank))
            heartbeats.done()
            results = _gather(world, (result, post.emitted))
            if rank == 0:
                post.close([emitted for _, emitted in results])
        dist.barrier()  # rank 0 may host the store: the others end after it has heard them
    except Exception as error:
        sys.exit(_tell(rank, error, progress, post))
    dist.destroy_process_group()
    return [result for result, _ in results]


def _gather(world: int, own: tuple[R, int]) -> list[tuple[R, int]]:
    parts: list[tuple[R, int]] = [own] * world
    dist.all_gather_object(parts, own)
    return parts


def _tell(rank: int, error: BaseException, progress: Progress, post: _Post) -> int:
    """Prints the failure, unless it is the echo of another rank's, and returns the exit code."""
    failure = raised(rank, error, progress.read())
    culprit = post.claim(rank, _GRACE if failure.echo else 0.0)
    if culprit == rank or not (failure.echo or failure.usage):
        print(f"error: {failure.error()}", file=sys.stderr, flush=True)
    elif failure.echo:
        print(f"stage {rank} stops {failure.where}, because stage {culprit} has failed", file=sys.stderr, flush=True)
    return 2 if failure.usage else 1


def _leave(post: _Post, culprit: int, message: str) -> None:
    """Ends this rank at once; torchrun stops the others, which learn of the culprit before."""
    post.claim(culprit, 0.0)
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


class _Post:
    """Sends events to rank 0 through the store of the rendezvous, over a connection that no other call holds up."""

    def __init__(self, rank: int, world: int, space: str, limit: timedelta, on_event: OnEvent | None) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = PrefixStore(f"{space}/post", TCPStore(host, port, is_master=False, timeout=limit))
        self._rank, self._on_event = rank, on_event
        self._lock = threading.Lock()  # one on_event at a time
        self._read, self._expected = [0] * world, [-1] * world
        self._error: Exception | None = None
        self.emitted = 0
        self._reader = threading.Thread(target=self._follow, daemon=True)
        if rank == 0:
            self._reader.start()

    def emit(self, event: object) -> None:
        self.emitted += 1
        if self._rank == 0:
            self._hear(0, event)
            self._raise()
        else:
            message = pickle.dumps(event, protocol=pickle.HIGHEST_PROTOCOL)
            self.store.set(f"{self._rank}/{self.emitted}", message)  # type: ignore[arg-type]  # takes bytes

    def close(self, emitted: Sequence[int]) -> None:
        """Waits on rank 0 until all events have arrived, `emitted` by each rank; raises the exception of on_event, if any."""
        self._expected = list(emitted)
        self._reader.join(_DRAIN)
        self._raise()
        if self._reader.is_alive():
            raise StageFailed(f"the stages' last messages did not arrive within {_DRAIN:g} s")

    def claim(self, rank: int, seconds: float) -> int:
        """Announces that `rank` has failed, unless another rank was first or is within `seconds`; returns the rank that was first."""
        deadline = time.monotonic() + seconds
        try:
            while not self.store.check(["failed"]) and time.monotonic() < deadline:
                time.sleep(_POLL)
            return int(self.store.compare_set("failed", "", str(rank)))
        except RuntimeError:
            return rank  # the store is gone

    def _follow(self) -> None:
        """Reads the other ranks' events on rank 0, in the order of each, until all expected ones have arrived."""
        try:
            while self._read[1:] != self._expected[1:]:
                if not sum([self._take(rank) for rank in range(1, len(self._read))]):
                    time.sleep(_POLL)
        except Exception as error:
            self._error = error  # raised on rank 0's own thread

    def _take(self, rank: int) -> bool:
        key = f"{rank}/{self._read[rank] + 1}"
        if not self.store.check([key]):
            return False
        event = pickle.loads(self.store.get(key))
        self.store.delete_key(key)
        self._read[rank] += 1
        self._hear(rank, event)
        return True

    def _hear(self, rank: int, event: object) -> None:
        if self._on_event is not None:
            with self._lock:
                self._on_event(rank, event)

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
