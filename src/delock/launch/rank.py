"""Defines Rank, which a target receives in every worker: its number, its device, and its ways to report."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from delock.errors import UsageError
from delock.launch.notices import Notices, NoticesHere
from delock.launch.progress import Progress

TIMEOUT = 30 * 60.0  # seconds; a wait that expires closes a gloo pair for good, so this must never happen in a healthy run


def _known(seconds: float) -> None:
    """Ignores the patience, which the parent knew before the start."""


def _never() -> bool:
    """Says that the run is not to be stopped."""
    return False


def _open() -> None:
    """Does nothing: torchrun's ranks have opened their group before they begin."""


def _nothing() -> bytes:
    """Says that nobody has anything to say: only the parent of a run on this host does."""
    raise NotImplementedError("nobody sends messages to this rank")


def _alone() -> None:
    """Does nothing: there is nobody to wait for."""


@dataclass(frozen=True)
class Rank:
    """Holds one worker.

    `emit(event)`: sends a picklable value to the parent's on_event(rank, event); a rank's events arrive in order.
    `progress`: to be written at every op; failures and hangs are reported from it.
    `be_patient(seconds)`: sets the longest time of an op, if it is only known when the target runs. A parent that watches knows it already.
    `asked()`: whether the run is to be saved and to end.
    `peers`: of a run on this host that Delock has started, a stream socket to each neighbour. Nobody else can reach it.
    `open_group()`: opens the default process group of torch.distributed, unless it is open; all ranks call it together. It is closed when
    the target has returned.
    `meet()`: waits until all ranks have called it.
    `hear()`: waits for a message of the parent, and returns it.
    `notices`: what a rank tells all of them.
    """

    rank: int
    world: int
    device: torch.device
    emit: Callable[[object], None]
    progress: Progress
    be_patient: Callable[[float], None] = _known
    asked: Callable[[], bool] = _never
    peers: Mapping[int, socket.socket] = field(default_factory=dict)
    open_group: Callable[[], None] = _open
    meet: Callable[[], None] = _alone
    hear: Callable[[], bytes] = _nothing
    notices: Notices = field(default_factory=NoticesHere)


def device_of(device: str, local_rank: int) -> torch.device:
    """Returns GPU number `local_rank` for "cuda", and any other device as given. Makes a GPU the current one, as NCCL requires."""
    asked = torch.device(device)
    if asked.type != "cuda":
        return asked
    own = asked if asked.index is not None else torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    return own


def backend_for(device: str, backend: str | None, local_world: int) -> str:
    """Returns the process group's backend: `backend` itself, or gloo, with NCCL for CUDA (labels and headers stay on the CPU).

    Raises UsageError, before anything is started, if `device` does not exist for each of `local_world` ranks on this host.
    """
    try:
        asked = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"there is no device {device!r}; write cpu or cuda") from error
    if asked.type != "cuda":
        return backend or "gloo"
    backend = backend or "cpu:gloo,cuda:nccl"
    there = torch.cuda.device_count()
    if there == 0:
        raise UsageError(f'device "{device}": torch sees no GPU here; use device "cpu"')
    if asked.index is not None and asked.index >= there:
        raise UsageError(f'device "{device}": the GPUs here are numbered 0 to {there - 1}')
    offered = there if asked.index is None else 1
    if "nccl" in backend and local_world > offered:
        raise UsageError(
            f'device "{device}" offers {offered} GPU(s) to {local_world} processes, and each needs its own; '
            f'use fewer stages, or workers="inline", which runs all stages on one GPU'
        )
    return backend
