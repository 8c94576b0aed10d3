"""Watches ranks without a parent: the ranks of torchrun report their positions, and that they live, through a store."""

from __future__ import annotations

import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

from delock.launch.progress import Progress
from delock.launch.watchdog import Stillness, Watchdog

BEAT = 0.5  # seconds between two heartbeats
_HEAD = struct.Struct("=Q?")  # heartbeats so far; the rank is done
_ANSWER = 4.0  # seconds that a culprit has to show its stack
_JOIN = 5.0  # seconds for the thread to end


class Heartbeats:
    """Runs a thread in every rank that writes this rank's heartbeat and reads those of the others.

        every rank, every BEAT seconds     writes number, done or not, progress; reads the others', and looks for a hang
        the first that sees a hang         asks the culprits for their stacks, and calls `leave(culprit, message)`
        a culprit that is asked            shows its stack, if its interpreter still runs

    A rank without heartbeats is stopped by a signal, or one of its ops holds Python's lock. `patience` is in seconds; 0 switches the watch
    off.
    """

    def __init__(self, rank: int, world: int, store: Store, progress: Progress, patience: float, leave: Callable[[int, str], None]) -> None:
        self._rank, self._store, self._leave = rank, store, leave
        self._copies = [bytearray(Progress.SIZE) for _ in range(world)]
        self._records = [progress if other == rank else Progress(copy) for other, copy in enumerate(self._copies)]
        self._numbers, self._done = [0] * world, [False] * world
        self._still = Stillness(world, BEAT)  # of the numbers
        self._watch = Watchdog(self._records, patience, self._silent, BEAT)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="delock-heartbeats", daemon=True)
        self._thread.start()

    def be_patient(self, seconds: float) -> None:
        """Sets `patience` to this number of seconds, because an op may take that long."""
        self._watch.patience = seconds

    def done(self) -> None:
        """Marks this rank as done: a rank that waits for it does not wait for an op."""
        self._done[self._rank] = True

    def close(self) -> None:
        """Ends the thread."""
        self._over.set()
        self._thread.join(_JOIN)

    def _follow(self) -> None:
        try:
            while not self._over.wait(BEAT):
                self._write()
                self._read()
                if self._look():
                    return
        except RuntimeError:
            return  # the store is gone, and so is the run

    def _write(self) -> None:
        self._numbers[self._rank] += 1
        beat = _HEAD.pack(self._numbers[self._rank], self._done[self._rank]) + self._records[self._rank].raw()
        self._store.set(f"beat/{self._rank}", beat)  # type: ignore[arg-type]  # takes bytes

    def _read(self) -> None:
        """Reads the others' heartbeats, and answers if a rank asks for this rank's stack."""
        for rank, copy in enumerate(self._copies):
            if rank != self._rank and self._store.check([f"beat/{rank}"]):
                beat = self._store.get(f"beat/{rank}")
                self._numbers[rank], self._done[rank] = _HEAD.unpack_from(beat)
                copy[:] = beat[_HEAD.size :]
        if self._store.check([f"asked/{self._rank}"]):
            self._store.set(f"stack/{self._rank}", _main_stack())

    def _look(self) -> bool:
        """Looks for a hang, and returns True if this rank was the first to report one, which ends its watch."""
        self._still.look(self._numbers)
        at_work = [rank for rank, done in enumerate(self._done) if not done]
        culprits = self._watch.look(at_work)
        first = bool(culprits) and int(self._store.compare_set("watch", "", str(self._rank))) == self._rank
        if first:
            self._leave(culprits[0], self._watch.tell(culprits, at_work, self._stack))
        return first

    def _silent(self, rank: int) -> str:
        """Returns a complaint after half of the patience without a heartbeat, before the ranks that wait for it are as late as it is."""
        late = self._still.seconds[rank] >= self._watch.patience / 2
        return "gives no sign of life" if late and self._records[rank].read().begun else ""

    def _stack(self, rank: int) -> str:
        if rank == self._rank:
            return _main_stack()
        self._store.set(f"asked/{rank}", "")
        deadline = time.monotonic() + _ANSWER
        while not self._store.check([f"stack/{rank}"]):
            if self._over.wait(BEAT / 10) or time.monotonic() > deadline:
                return "(it does not answer)"
        return self._store.get(f"stack/{rank}").decode()


def _main_stack() -> str:
    """Returns the stack of this process' main thread."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame))
