"""The multiprocessing context of the ranks: a fork server that has torch loaded already, so that a rank starts in milliseconds.

This module loads no torch: whoever calls `context` first thing lets the server load it while the caller does the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, SpawnContext
from multiprocessing.process import current_process
from typing import TypeAlias

from delock.launch import allocator

RankContext: TypeAlias = ForkServerContext | SpawnContext

PRELOAD = ("delock.launch.preload",)


def context(preload: Sequence[str] = ()) -> RankContext:
    """The context whose processes become ranks; starts its server, without waiting for it, if this program has none yet.

    The server ends with this program, even while it is loading. `preload` names further modules for it to load; it counts for the
    first call only.
    Linux alone forks: elsewhere the system's own frameworks do not survive a fork, and every rank is started afresh (spawn).
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    ranks = multiprocessing.get_context("forkserver")
    if importing_main():
        return ranks
    ranks.set_forkserver_preload([*PRELOAD, *preload])
    resource_tracker.ensure_running()  # first: starting it from below would unblock SIGINT again
    before = _server()
    with _interrupts_blocked(), allocator.tuned():
        forkserver.ensure_running()
    if _server() not in (before, None):
        util.Finalize(None, _end, (_server(),), exitpriority=-1)  # below 0: when all processes have been joined
    return ranks


def importing_main() -> bool:
    """Whether this is a rank about to be born, which imports the user's program and may start nothing on the way."""
    return getattr(current_process(), "_inheriting", False)


def _server() -> int | None:
    """The fork server's process id; None where there is none, or Python does not tell."""
    return getattr(forkserver._forkserver, "_forkserver_pid", None)


def _end(server: int) -> None:
    """By itself it would end too, but only after loading torch, and would keep this program's output open so long."""
    if _server() == server:  # else it has died, and its number may be another's
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


@contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """The server, and with it every rank, is born with SIGINT blocked: a Ctrl-C while ranks start is the parent's business alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
