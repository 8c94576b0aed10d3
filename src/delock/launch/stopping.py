"""Turns a signal into a request: the run is to be saved at an instant that its stages agree on, and to end there."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from types import FrameType
from typing import Any, Self

from torch.distributed import TCPStore  # type: ignore[attr-defined]

POLL = 0.5  # seconds between two looks at the store
ECHO = 2.0  # seconds in which another signal belongs to the first: a launcher sends it to all, and passes on its own
SIGNALS = ("SIGINT", "SIGTERM", "SIGUSR1")  # Ctrl-C, the end, and the one that batch systems send some time before it


class StopRequest:
    """A request to end, made by the first signal within `listening`. A later one has the effect that it has elsewhere.

    grace: seconds that the run has from then on.
    """

    def __init__(self, grace: float) -> None:
        self.grace = grace
        self.flag: bytearray | memoryview = bytearray(1)
        self.number: int | None = None
        self.since = 0.0
        self.before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """True if the run is to end."""
        return self.number is not None

    @property
    def overdue(self) -> bool:
        """True if the run should have ended by now."""
        return self.asked and time.monotonic() - self.since > self.grace

    def share(self, flag: memoryview) -> None:
        """Says it in a byte that processes share."""
        flag[0] = self.flag[0]
        self.flag = flag

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens within the block; Python's signals are the main thread's, so elsewhere it hears nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        ignored = [number for number in numbers if signal.getsignal(number) in (signal.SIG_IGN, None)]
        self.before = {number: signal.signal(number, self._hear) for number in numbers if number not in ignored}
        try:
            yield
        finally:
            self._restore()

    def have_effect(self) -> None:
        """Lets the signal that was heard have the effect that it has without a request: it raises, or ends the program."""
        self._restore()
        if self.number is not None:
            signal.raise_signal(self.number)

    def heed(self) -> None:
        """Lets a signal that was heard have its effect, while there is nothing to save."""
        if self.asked:
            self.have_effect()

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if time.monotonic() - self.since > ECHO:
                self.have_effect()
            return
        self.number, self.since = number, time.monotonic()
        self.flag[0] = 1

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}


class Relay:
    """Passes a request to end from any of torchrun's ranks on to rank 0, which decides, by a key of the rendezvous' store.

    A rank that is asked and does not end within its grace ends at once.
    """

    def __init__(self, rank: int, stop: StopRequest, key: str) -> None:
        self.rank, self.stop, self.key = rank, stop, key
        self.heard = False  # by another rank
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="delock-relay", daemon=True)

    def asked(self) -> bool:
        """Returns True if the run is to end."""
        return self.heard or self.stop.asked

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join(2 * POLL)

    def _watch(self) -> None:
        with suppress(RuntimeError):  # the store is gone, of which others tell
            store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timedelta(seconds=60))
            while not self._over.wait(POLL):
                self._look(store)

    def _look(self, store: TCPStore) -> None:
        if self.stop.asked and not self.heard:
            store.set(self.key, "1")
            self.heard = True
        if self.rank == 0 and not self.heard:
            self.heard = store.check([self.key])
        if self.stop.overdue and not self._over.is_set():
            print(f"the run could not be saved within {self.stop.grace:g} s", file=sys.stderr, flush=True)
            os._exit(128 + (self.stop.number or 0))
