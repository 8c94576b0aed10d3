"""Runs one process per rank on this host: starts them, passes on their messages, and always ends them all."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TypeAlias, TypeVar

from delock.errors import StageFailed
from delock.launch.child import RankConfig, main
from delock.launch.context import RankContext, context
from delock.launch.cores import share_cores
from delock.launch.failure import Failure, died, first
from delock.launch.main_program import not_run_again
from delock.launch.parcel import Arriving, Parcel
from delock.launch.pickling import pack
from delock.launch.private_folder import private_folder
from delock.launch.progress import Progress
from delock.launch.rank import TIMEOUT, Rank, backend_for
from delock.launch.stopping import StopRequest
from delock.launch.watchdog import POLL, Watchdog, own_frames, show_stack, stopped_by_signal

P = TypeVar("P")
R = TypeVar("R")
OnEvent: TypeAlias = Callable[[int, object], None]

_GRACE = 0.2  # seconds after a failure to notice the death that caused it
_GRACE_ECHO = 1.0  # the same if all failures look like echoes of an unknown one
_LEAVE, _TERM, _KILL = 5.0, 1.0, 3.0  # seconds that a process has to end by itself, after SIGTERM, after SIGKILL


def run_processes(
    target: Callable[[Rank, P], R],
    payloads: Sequence[P],
    *,
    threads: int = 1,
    pin: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    patience: float = 60.0,
    timeout: float = TIMEOUT,
    on_event: OnEvent | None = None,
    stop: StopRequest | None = None,
) -> list[R]:
    """Runs target(rank, payloads[rank]) in one process per payload, and returns the results in rank order.

    Neighbours are joined by sockets that nobody else can reach; nothing listens unless a target opens the process group.

    Target, payloads and results travel by value, with the functions and classes that no process can import. The memory of tensors is sent
    one rank after the other from where it is, and that of results is read from a file when it is used, once every rank has ended well:
    letting go of each result before the next one is used keeps this process small.
    threads: per process, bound to cores of their own if `pin` and there are enough cores (CPU only); the workers of a DataLoader are not.
    device: "cuda" gives rank r GPU r.
    patience: seconds after which the run is ended if a rank is still at one op, or all ranks wait for each other; 0 means never.
    timeout, backend: of the process group, if a target opens one; the time in seconds.
    stop: ends the run as signals do where nothing asks for it, when it is overdue; the targets see it in `Rank.asked`.
    on_event: called here as on_event(rank, event) for every event that a rank emits.
    No process is left when this returns or raises. Raises UsageError for a payload that cannot be pickled or a missing device, and if the
    target raised one; StageFailed if a rank raised, died or hung. KeyboardInterrupt ends all ranks and propagates.
    """
    if not payloads:
        return []
    with started(
        target, payloads, threads=threads, pin=pin, device=device, backend=backend, patience=patience, timeout=timeout, stop=stop
    ) as team:
        arrived = team.follow(on_event)
    return [one.open() for one in arrived]


@contextmanager
def started(
    target: Callable[[Rank, P], R],
    payloads: Sequence[P],
    *,
    threads: int = 1,
    pin: bool = True,
    device: str = "cpu",
    backend: str | None = None,
    patience: float = 60.0,
    timeout: float = TIMEOUT,
    stop: StopRequest | None = None,
    hand: bool = False,
) -> Iterator[Team]:
    """Starts the processes of `run_processes`, and ends them all behind the block. hand: the block has a socket to rank 0, its peer -1."""
    world = len(payloads)
    group = backend_for(device, backend, world)
    parcels = [pack(target, payload, rank) for rank, payload in enumerate(payloads)]
    cores = share_cores(world, threads) if pin and device == "cpu" else [None] * world
    own = [target.__module__] if target.__module__.startswith("delock.") else []
    ranks = context(own)
    environ, start_method = dict(os.environ), multiprocessing.get_start_method(allow_none=True)
    with private_folder() as folder:
        configs = [
            RankConfig(rank, world, folder, device, group, timeout, threads, cores[rank], environ, start_method, stop is not None)
            for rank in range(world)
        ]
        team = Team(ranks, configs, patience, stop, hand)
        try:
            team.start(parcels)
            yield team
        finally:
            team.stop()


class Team:
    """Holds the processes of one run."""

    def __init__(
        self, ranks: RankContext, configs: Sequence[RankConfig], patience: float, stop: StopRequest | None, hand: bool = False
    ) -> None:
        self._ranks, self._configs = ranks, configs
        self._memory = [ranks.RawArray("c", Progress.SIZE) for _ in configs]
        self._records = [Progress(memoryview(memory).cast("B")) for memory in self._memory]
        self._stop, self._stopping = stop, ranks.RawArray("c", 1)
        if stop:
            stop.share(memoryview(self._stopping).cast("B"))
        self._watch = Watchdog(self._records, patience, lambda rank: stopped_by_signal(self._pid(rank)))
        self._processes: list[BaseProcess] = []
        self._downs: list[Connection] = []
        self._ups: dict[Connection, int] = {}
        self._arriving: dict[int, Arriving | None] = {}  # None: its first message is still to come
        self._results: dict[int, Arriving] = {}
        self._failures: list[Failure] = []
        self._here = 0  # ranks that have come to where they all meet
        self._sentinels: dict[int, int] = {}  # of processes that have not been seen to end -> ranks
        self._over = float("inf")  # the time at which a failure is raised; its cause may show before
        self._ends: tuple[socket.socket, ...] = socket.socketpair() if hand else ()  # ours, and that of rank 0
        self._sender: threading.Thread | None = None

    def start(self, parcels: list[Parcel]) -> None:
        """Starts all ranks; the parcels are used up."""
        for config, memory, peers in zip(self._configs, self._memory, _joined(len(self._configs), self._ends[1:]), strict=True):
            theirs, down = self._ranks.Pipe(duplex=False)
            up, ours = self._ranks.Pipe(duplex=False)
            process = self._ranks.Process(
                target=main, args=(config, memory, self._stopping, peers, theirs, ours), name=f"delock-stage-{config.rank}"
            )
            self._processes.append(process)
            self._downs.append(down)
            self._ups[up] = config.rank
            with not_run_again():
                process.start()
            theirs.close()
            ours.close()
            for peer in peers.values():
                peer.close()
        self._sentinels = {process.sentinel: rank for rank, process in enumerate(self._processes)}
        # In a thread: a rank reads its target only when it has begun, and the others begin meanwhile.
        self._sender = threading.Thread(target=_send_all, args=(self._downs, parcels), daemon=True)
        self._sender.start()

    def follow(self, on_event: OnEvent | None) -> list[Arriving]:
        """Passes on events and notices failures and hangs until the results of all ranks have come; returns them."""
        while len(self._results) < len(self._configs):
            self.turn(on_event)
        self._release()
        return [self._results.pop(rank) for rank in range(len(self._configs))]

    def turn(self, on_event: OnEvent | None, seconds: float = POLL) -> None:
        """Waits for something to come from the ranks, for so long at most, and passes events on.

        Raises StageFailed, or UsageError, for a rank that has failed or hangs.
        """
        wait = min(seconds, max(0.0, self._over - time.monotonic()))
        for ready in connection.wait([*self._ups, *self._sentinels], wait):
            if isinstance(ready, Connection) and ready in self._ups:
                self._watch.moved(self._ups[ready])
                self._hear(ready, on_event)
            elif isinstance(ready, int):
                self._bury(self._sentinels.pop(ready), on_event)
        if self._failures:
            grace = _GRACE_ECHO if all(failure.echo for failure in self._failures) else _GRACE
            self._over = min(self._over, time.monotonic() + grace)
        else:
            self._check()
        if self._stop and self._stop.overdue:
            self._stop.have_effect()
        if self._failures and (time.monotonic() >= self._over or len(self._results) == len(self._configs)):
            raise first(self._failures).error()

    @property
    def hand(self) -> socket.socket:
        """Returns the socket to rank 0 of a run that has one."""
        return self._ends[0]

    def tell(self, rank: int, message: bytes) -> None:
        """Sends a rank a message, which it reads by `Rank.hear`."""
        _send(self._downs[rank], message)

    def _hear(self, up: Connection, on_event: OnEvent | None) -> None:
        rank = self._ups[up]
        try:
            message = up.recv_bytes()
        except (EOFError, OSError):
            del self._ups[up]
            up.close()
            return
        if rank in self._arriving:
            self._take(rank, message)
            return
        kind, body = pickle.loads(message)
        if kind == "event":
            if on_event is not None:
                on_event(rank, body)
        elif kind == "notice":
            for down in self._downs:
                _send(down, pickle.dumps(body))
        elif kind == "here":
            self._here += 1
            if self._here % len(self._configs) == 0:
                for down in self._downs:
                    _send(down, b"")
        elif kind == "result":
            self._arriving[rank] = None
        else:
            self._failures.append(body)

    def _take(self, rank: int, message: bytes) -> None:
        """Takes a message of a result."""
        arriving = self._arriving[rank]
        if arriving is None:
            self._arriving[rank] = Arriving(message)
        elif arriving.take(message):
            self._results[rank] = arriving
            del self._arriving[rank]

    def _bury(self, rank: int, on_event: OnEvent | None) -> None:
        """Handles the end of a process; messages that it sent before still count."""
        for up in [up for up, of in self._ups.items() if of == rank]:
            while up in self._ups and up.poll():
                self._hear(up, on_event)
        process, at = self._processes[rank], self._records[rank].read()
        process.join()
        code = process.exitcode if process.exitcode is not None else 255
        if rank in self._results or any(failure.rank == rank for failure in self._failures):
            return
        self._failures.append(died(rank, code, at, own_frames(Path(self._configs[rank].stacks).read_text()) if at.born else ""))

    def _check(self) -> None:
        at_work = [config.rank for config in self._configs if config.rank not in self._results]
        culprits = self._watch.look(at_work)
        if culprits:
            raise StageFailed(self._watch.tell(culprits, at_work, self._stack))

    def _stack(self, rank: int) -> str:
        return show_stack(self._pid(rank), Path(self._configs[rank].stacks))

    def _pid(self, rank: int) -> int:
        pid = self._processes[rank].pid
        assert pid is not None
        return pid

    def _release(self) -> None:
        for down in self._downs:
            _send(down, b"")
        self._join(_LEAVE)

    def stop(self) -> None:
        """Ends all processes that still run, quickly, and closes everything."""
        try:
            if not self._stop:  # else the ranks ignore SIGTERM
                self._end(BaseProcess.terminate, _TERM)
        finally:  # also after a second Ctrl-C: this program cannot exit before its processes have
            self._end(BaseProcess.kill, _KILL)
        if self._sender is not None:
            self._sender.join(_KILL)
        for pipe in [*self._downs, *self._ups]:
            pipe.close()
        for end in self._ends:
            end.close()
        for one in (*self._arriving.values(), *self._results.values()):
            if one:
                one.close()
        for process in self._started():
            if not process.is_alive():
                process.close()

    def _end(self, how: Callable[[BaseProcess], None], seconds: float) -> None:
        for process in self._started():
            if process.is_alive():
                how(process)
        self._join(seconds)

    def _join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for process in self._started():
            process.join(max(0.0, deadline - time.monotonic()))

    def _started(self) -> list[BaseProcess]:
        return [process for process in self._processes if process.pid is not None]


def _joined(world: int, hand: Sequence[socket.socket]) -> Iterator[dict[int, socket.socket]]:
    """Yields each rank's ends of the sockets between neighbours, neighbour -> socket, which are made as they are needed.

    hand: the socket of rank 0 to a neighbour below it, if it has one.
    """
    down = hand[0] if hand else None
    for rank in range(world):
        ends = {rank - 1: down} if down else {}
        down = None
        if rank + 1 < world:
            ends[rank + 1], down = socket.socketpair()
        yield ends


def _send_all(downs: Sequence[Connection], parcels: list[Parcel]) -> None:
    for down in downs:
        with suppress(OSError):  # the rank is gone, as its sentinel will show
            parcels.pop(0).send(down.send_bytes)


def _send(down: Connection, message: bytes) -> None:
    with suppress(OSError):
        down.send_bytes(message)
