"""Provides the multiprocessing context of the ranks: a fork server that has torch loaded, so that a rank starts in milliseconds.

This module loads no torch: a program that calls `context` first lets the server load it while it loads the same itself.
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

OF_THE_PARENT = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}) if sys.platform != "win32" else frozenset()
PRELOAD = ("delock.launch.preload",)


def context(preload: Sequence[str] = ()) -> RankContext:
    """Returns the context whose processes become ranks, and starts its server, without waiting, if this program has none yet.

    The server ends with this program, even while it is loading. preload: further modules for it to load; they count for the first call
    only. Only Linux forks: on other systems frameworks do not survive a fork, and every rank is started afresh (spawn).
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    ranks = multiprocessing.get_context("forkserver")
    if importing_main():
        return ranks
    ranks.set_forkserver_preload([*PRELOAD, *preload])
    # Python before 3.11.1 would let the server listen where any user can connect (CVE-2022-42919).
    util.abstract_sockets_supported = False  # type: ignore[misc]
    with _signals_blocked():
        resource_tracker.ensure_running()  # first: starting it from below would unblock SIGINT again
    before = _server()
    with _signals_blocked(), allocator.tuned():
        forkserver.ensure_running()
    if _server() not in (before, None):
        util.Finalize(None, _end, (_server(),), exitpriority=-1)  # below 0: after all processes have been joined
    return ranks


def importing_main() -> bool:
    """Returns True in a process that a program has started afresh, not by Delock, and that imports this program at its beginning."""
    return getattr(current_process(), "_inheriting", False)


def _server() -> int | None:
    """Returns the fork server's process id; None if there is none, or Python does not tell."""
    return getattr(forkserver._forkserver, "_forkserver_pid", None)


def _end(server: int) -> None:
    """Ends the server at once; by itself it would end only after loading torch, and keep this program's output open until then."""
    if _server() == server:  # else it has died, and another process may have its id
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Blocks signals for the server, and so for every rank, at its start: what comes to the whole group is for the parent alone."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, OF_THE_PARENT)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
