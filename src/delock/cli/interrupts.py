"""Handles Ctrl-C, SIGTERM and a closed terminal: each ends the command in order, once."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from delock.cli.ranks import is_rank_zero

SETTLE = 5.0  # seconds that an orderly end may take


class Interrupted(KeyboardInterrupt):
    """Raised if a signal asks the command to end; `code` is the exit code for it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.code = 128 + number  # as shells have it


@contextmanager
def interruptible(*, whole_program: bool) -> Iterator[None]:
    """Makes SIGINT, SIGTERM, SIGHUP and SIGUSR1 raise Interrupted within the block; another one in the next SETTLE seconds is ignored.

    Ending takes a moment, in which processes leave and the summary is written, and an impatient second Ctrl-C must not cut it short. For
    the `whole_program`, Ctrl-C is ignored after a signal, so that the end of the interpreter is not cut short either, and the exit code
    stays. A rank of torchrun other than the first dies of SIGTERM as usual: it has nothing to write, and may wait in C++ for a peer. The
    first one, if it ends already because another rank failed, writes its summary before it heeds the SIGTERM that torchrun then sends.
    """
    if threading.current_thread() is not threading.main_thread():  # Python's signals are the main thread's
        yield
        return
    asked: list[float] = []

    def ask(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[-1] <= SETTLE:
            return
        first = not asked
        asked.append(now)
        if not (first and _exits()):
            raise Interrupted(number)

    wanted = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) if is_rank_zero() else (signal.SIGINT,)
    usual = (signal.SIG_DFL, signal.default_int_handler)  # else another program has decided otherwise: nohup, a debugger
    before = {number: signal.signal(number, ask) for number in wanted if signal.getsignal(number) in usual}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if asked and whole_program:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a handler would not do: Python takes its own away before it unloads modules


def _exits() -> bool:
    """Returns True if the main thread, which a signal handler runs on, has a SystemExit in flight."""
    error = sys.exception()
    while error is not None and not isinstance(error, SystemExit):
        error = error.__context__
    return error is not None
