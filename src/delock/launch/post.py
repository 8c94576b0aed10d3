"""Carries the events of torchrun's ranks to rank 0, through the store of the rendezvous."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from delock.errors import StageFailed

OnEvent: TypeAlias = Callable[[int, object], None]


class Telling(Protocol):
    """The form in which ranks tell each other values. What is read must not be able to run code: others may have written it."""

    def pack(self, value: object) -> bytes:
        """Returns a value as bytes."""

    def unpack(self, data: bytes) -> Any:
        """Returns the value. Raises an error for bytes that `pack` has not made."""


_POLL = 0.05  # seconds between two looks for events
_LAST = 2.0  # seconds for the thread to end, if it does not wait in C++
_DRAIN = 30.0  # seconds for the last events to arrive after the results


class Post:
    """Sends events to rank 0 through the store of the rendezvous, over a connection that no other call holds up.

    `error`: what on_event has raised; it is called no more after that. Where this is not in `emit`, failed() is called, on another thread.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        space: str,
        limit: timedelta,
        telling: Telling,
        on_event: OnEvent | None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = PrefixStore(f"{space}/post", TCPStore(host, port, is_master=False, timeout=limit))
        self._rank, self._telling, self._on_event, self._failed = rank, telling, on_event, failed
        self._lock = threading.Lock()  # one on_event at a time
        self._read, self._expected = [0] * world, [-1] * world
        self.error: BaseException | None = None
        self._lost: Exception | None = None  # events of other ranks could not be read
        self._over = threading.Event()
        self.emitted = 0
        self._reader = threading.Thread(target=self._follow, daemon=True)
        if rank == 0:
            self._reader.start()

    def emit(self, event: object) -> None:
        """Hands an event to on_event on rank 0, or sends it there."""
        self.emitted += 1
        if self._rank == 0:
            self._raise()
            self._hear(0, event)
        else:
            self.store.set(f"{self._rank}/{self.emitted}", self._telling.pack(event))  # type: ignore[arg-type]  # takes bytes

    def abandon(self) -> None:
        """Reads no more events: a thread that is in C++ when Python ends aborts the process."""
        self._over.set()
        if self._rank == 0:
            self._reader.join(_LAST)

    def close(self, emitted: Sequence[int]) -> None:
        """Waits on rank 0 until all events have arrived, `emitted` by each rank; raises the exception of on_event, if any."""
        self._expected = list(emitted)
        self._reader.join(_DRAIN)
        self._raise()
        if self._reader.is_alive():
            raise StageFailed(f"the stages' last messages did not arrive within {_DRAIN:g} s")

    def _follow(self) -> None:
        """Reads the other ranks' events on rank 0, in the order of each, until all expected ones have arrived."""
        try:
            while self._read[1:] != self._expected[1:] and not self._over.is_set():
                if not sum([self._take(rank) for rank in range(1, len(self._read))]):
                    self._over.wait(_POLL)
        except BaseException as error:
            if self.error is not None:
                self._failed()
            elif isinstance(error, Exception):
                self._lost = error  # raised on rank 0's own thread

    def _take(self, rank: int) -> bool:
        key = f"{rank}/{self._read[rank] + 1}"
        if not self.store.check([key]):
            return False
        event = self._telling.unpack(self.store.get(key))
        self.store.delete_key(key)
        self._read[rank] += 1
        self._hear(rank, event)
        return True

    def _hear(self, rank: int, event: object) -> None:
        with self._lock:
            if self._on_event is not None and self.error is None:
                try:
                    self._on_event(rank, event)
                except BaseException as error:
                    self.error = error
                    raise

    def _raise(self) -> None:
        if error := self.error or self._lost:
            raise error
