"""Runs a rank's process from its first line to its last."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import parent_process
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from delock.launch.context import OF_THE_PARENT
from delock.launch.cores import settle
from delock.launch.failure import Failure, raised
from delock.launch.pickling import unpack
from delock.launch.progress import Progress
from delock.launch.rank import Rank, device_of

HOST = "127.0.0.1"


@dataclass(frozen=True)
class RankConfig:
    """Holds what a process needs to become a rank. `stacks`: the file for its Python stack, on demand and on a fatal signal.

    saves: a SIGTERM is to save the run, so it does not end a rank.
    """

    rank: int
    world: int
    port: int
    device: str
    backend: str
    timeout: float
    threads: int
    cores: set[int] | None
    stacks: str
    environ: Mapping[str, str]
    saves: bool = False


class ParentPipe:
    """Sends messages (kind, body) from the rank to its parent, whole and in order; the kind is "event", "result" or "failure"."""

    def __init__(self, up: Connection) -> None:
        self._up, self._lock = up, threading.Lock()

    def send(self, kind: str, body: object) -> None:
        message = pickle.dumps((kind, body), protocol=pickle.HIGHEST_PROTOCOL)
        with self._lock:
            self._up.send_bytes(message)

    def emit(self, event: object) -> None:
        self.send("event", event)


def main(config: RankConfig, memory: Any, stop: Any, down: Connection, up: Connection) -> None:
    """Runs one target.

    memory: shared bytes of its Progress; stop: a shared byte that says if the run is to end; down: brings the pickled target and payload,
    then the permission to end.
    """
    _prepare(config)
    report, progress = ParentPipe(up), Progress(memoryview(memory).cast("B"))
    progress.born()
    try:
        target, payload = unpack(down.recv_bytes())
        settle(config.threads, config.cores)
        device = device_of(config.device, config.rank)
        _open_group(config)
        report.send(
            "result", target(Rank(config.rank, config.world, device, report.emit, progress, asked=lambda: stop[0] != b"\0"), payload)
        )
    except BaseException as error:
        _tell(report, raised(config.rank, error, progress.read()))
        threading.Event().wait()  # until the parent ends this process: leaving would raise an error in every peer
    down.recv_bytes()  # peers may still need this rank's connections; all end at the same time
    dist.destroy_process_group()


def _prepare(config: RankConfig) -> None:
    """Sets signals and environment, and makes sure that the rank dies with its parent and can show its stack at any time."""
    for number in (signal.SIGINT, signal.SIGTERM) if config.saves else (signal.SIGINT,):
        signal.signal(number, signal.SIG_IGN)  # the parent handles what comes to the whole group
    os.environ.clear()  # the fork server still has the environment of its start
    os.environ.update(config.environ)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", _loopback())
    threading.Thread(target=die_with_parent, daemon=True).start()
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
    limit = timedelta(seconds=config.timeout)
    store = TCPStore(HOST, config.port, is_master=False, timeout=limit)
    dist.init_process_group(config.backend, store=store, rank=config.rank, world_size=config.world, timeout=limit)


def _tell(report: ParentPipe, failure: Failure) -> None:
    try:
        report.send("failure", failure)
    except OSError:
        os._exit(1)  # the parent is gone
