"""Runs a rank's process from its first line to its last."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist
from torch.distributed import FileStore  # type: ignore[attr-defined]

from delock.launch import allocator
from delock.launch.context import OF_THE_PARENT
from delock.launch.cores import settle
from delock.launch.failure import Failure, raised
from delock.launch.main_program import never_run_again
from delock.launch.notices import NoticesThroughParent
from delock.launch.parcel import Parcel, receive
from delock.launch.pickling import unpack
from delock.launch.progress import Progress
from delock.launch.rank import Rank, device_of


@dataclass(frozen=True)
class RankConfig:
    """Holds what a process needs to become a rank.

    folder: a private one for all ranks, with the files `stacks`, for its Python stack on demand and on a fatal signal, and `store`, where
    a process group meets. start_method: by which the program starts processes, and so the workers of its DataLoaders, if it has said so.
    saves: a SIGTERM is to save the run, so it does not end a rank.
    """

    rank: int
    world: int
    folder: str
    device: str
    backend: str
    timeout: float
    threads: int
    cores: set[int] | None
    environ: Mapping[str, str]
    start_method: str | None
    saves: bool = False

    @property
    def stacks(self) -> str:
        """Returns the file for the stack of this rank."""
        return f"{self.folder}/{self.rank}"


class ParentPipe:
    """Sends messages (kind, body) from the rank to its parent, whole and in order.

    The kind is "event", "notice", "here", "result" or "failure". A result's messages follow its kind.
    """

    def __init__(self, up: Connection) -> None:
        self._up, self._lock = up, threading.Lock()

    def send(self, kind: str, body: object) -> None:
        message = pickle.dumps((kind, body), protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._up.send_bytes(message)

    def emit(self, event: object) -> None:
        self.send("event", event)

    def bring(self, result: object) -> None:
        """Sends the result. Raises whatever pickling it raises."""
        parcel = Parcel(result, returns=True)
        with self._lock:
            self._up.send_bytes(pickle.dumps(("result", None)))
            parcel.send(self._up.send_bytes)


def main(config: RankConfig, memory: Any, stop: Any, peers: dict[int, socket.socket], down: Connection, up: Connection) -> None:
    """Runs one target.

    memory: shared bytes of its Progress; stop: a shared byte that says if the run is to end; peers: a socket to each neighbour; down:
    brings the pickled target and payload, then what lets it go on where ranks meet, and at its end.
    """
    _prepare(config)
    report, progress = ParentPipe(up), Progress(memoryview(memory).cast("B"))
    progress.born()
    try:
        target, payload = unpack(*receive(down))
        settle(config.threads, config.cores)

        def meet() -> None:
            report.send("here", None)
            down.recv_bytes()

        rank = Rank(
            config.rank,
            config.world,
            device_of(config.device, config.rank),
            report.emit,
            progress,
            asked=lambda: stop[0] != b"\0",
            peers=peers,
            open_group=partial(_open_group, config),
            meet=meet,
            hear=down.recv_bytes,
            notices=NoticesThroughParent(partial(report.send, "notice"), down.recv_bytes, progress),
        )
        result = target(rank, payload)
        allocator.give_back()  # what training took, before the parent keeps the result beside it
        report.bring(result)
    except BaseException as error:
        _tell(report, raised(config.rank, error, progress.read()))
        threading.Event().wait()  # until the parent ends this process: leaving would raise an error in every peer
    while down.recv_bytes():  # notices that nobody took
        pass  # peers may still need this rank's connections; all end at the same time
    if dist.is_initialized():
        dist.destroy_process_group()


def _prepare(config: RankConfig) -> None:
    """Sets signals and environment, and makes sure that the rank dies with its parent and can show its stack at any time."""
    for number in (signal.SIGINT, signal.SIGTERM) if config.saves else (signal.SIGINT,):
        signal.signal(number, signal.SIG_IGN)  # the parent handles what comes to the whole group
    os.environ.clear()  # the fork server still has the environment of its start
    os.environ.update(config.environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    multiprocessing.set_start_method(config.start_method, force=True)  # None: as on every system
    threading.Thread(target=die_with_parent, daemon=True).start()
    never_run_again()
    try:
        stacks = open(config.stacks, "a")  # noqa: SIM115  open as long as the process lives
    except FileNotFoundError:  # the run was given up while this rank was starting, and has removed the folder
        os._exit(1)
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, OF_THE_PARENT)


def die_with_parent() -> None:
    """Ends this process when the parent is gone, even by SIGKILL; its OS parent is the fork server, which would not notice."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _loopback() -> str:
    return next((name for _, name in socket.if_nameindex() if name.startswith("lo")), "lo")


def _open_group(config: RankConfig) -> None:
    """Opens the process group, which listens on the loopback interface; its ranks meet in a file that nobody else can read."""
    if not dist.is_initialized():
        limit, store = timedelta(seconds=config.timeout), FileStore(f"{config.folder}/store", config.world)
        dist.init_process_group(config.backend, store=store, rank=config.rank, world_size=config.world, timeout=limit)


def _tell(report: ParentPipe, failure: Failure) -> None:
    try:
        report.send("failure", failure)
    except OSError:
        os._exit(1)  # the parent is gone
