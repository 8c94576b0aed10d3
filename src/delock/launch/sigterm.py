"""Tells a user's SIGTERM from the one that torchrun sends to the ranks that survive another."""

from __future__ import annotations

import _thread
import os
import signal
import socket
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from types import FrameType
from typing import Self

from delock.launch.failure import Ended

CODE = 128 + signal.SIGTERM  # as shells have it
_MOMENT = 3.0  # seconds for a judgement
_SOON = 0.5  # seconds for the main thread to leave, if it does not wait
_LINKS = (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX)  # of gloo, and of shared memory
_DESCRIPTORS = "/proc/self/fd"


class Sigterm:
    """Judges SIGTERM within the block, on a thread of its own: the main thread may wait in C++ for a peer, where no handler runs.

    `judge()` returns the reason if another stage is at fault, else "". With a reason the main thread raises Ended. Without one the handler
    that was there is called, or this process ends as usual. Only the main thread can have a handler; elsewhere the block changes nothing.
    """

    def __init__(self, judge: Callable[[], str]) -> None:
        self._judge = judge
        self._reason, self._judged, self._left = "", threading.Event(), threading.Event()
        self._before = signal.getsignal(signal.SIGTERM)
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._thread = threading.Thread(target=self._listen, name="delock-sigterm", daemon=True)
        self._handles = threading.current_thread() is threading.main_thread() and self._before not in (None, signal.SIG_IGN)

    def __enter__(self) -> Self:
        self._thread.start()
        if self._handles:
            self._other = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
            signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        self._left.set()
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)
            signal.set_wakeup_fd(self._other)
        self._mouth.close()  # so the thread reads the end
        self._thread.join(_MOMENT)
        self._ear.close()

    def rouse(self, reason: str) -> None:
        """Raises Ended on the main thread. If that waits for a peer, it closes this process' connections, so that the wait ends."""
        self._reason = reason
        self._judged.set()
        if self._handles:
            _thread.interrupt_main(signal.SIGTERM)
            if not self._left.wait(_SOON):
                _hang_up({self._ear.fileno(), self._mouth.fileno()})

    def _listen(self) -> None:
        while heard := self._ear.recv(1):
            if heard[0] == signal.SIGTERM and not self._judged.is_set():
                self._reason = self._judge()
                self._judged.set()
                if self._before is signal.SIG_DFL and not self._reason:
                    os._exit(CODE)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._judged.wait(_MOMENT)
        if self._reason:
            raise Ended(1, self._reason)
        self._judged.clear()
        if not callable(self._before):
            os._exit(CODE)
        self._before(number, frame)


def _hang_up(but: Collection[int]) -> None:
    """Shuts down all connections of this process `but` those. It leaves sockets that listen, because gloo aborts if its own ends."""
    with suppress(FileNotFoundError):  # there is no /proc
        for descriptor in {*map(int, os.listdir(_DESCRIPTORS))} - {*but}:
            with suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                if connection.family in _LINKS and not connection.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    connection.shutdown(socket.SHUT_RDWR)
