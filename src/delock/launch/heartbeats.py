"""Watches ranks without a parent: the ranks of torchrun report their positions, and that they live, through a store."""

from __future__ import annotations

import itertools
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable

from torch.distributed import Store  # type: ignore[attr-defined]

from delock.launch.progress import Progress
from delock.launch.roll import Roll, Verdict
from delock.launch.watchdog import Stillness, Watchdog

BEAT = 0.5  # seconds between two heartbeats
GRACE = 3.0  # seconds that a rank may take to end by itself, once it has learnt that the run is over
LEEWAY = 4.0  # seconds by which the store may answer later than the patience; in them a rank may ask for stacks, too
_MOMENTS = 5  # looks for a verdict between two heartbeats: the store may go soon after
_HEAD = struct.Struct("=Q?")  # heartbeats so far; the rank is done
_ANSWER = 2.0  # seconds that a culprit has to show its stack, and the first thread to look for a death
_JOIN = 2.0  # seconds for the threads to end, if they do not wait in C++


class Heartbeats:
    """Runs two threads in every rank: one writes this rank's heartbeat and reads those of the others, and one watches that one.

        every rank, every BEAT seconds     writes number, done or not, progress; reads the others', and looks for a hang
        the first that sees a hang         announces it, asks the culprits for their stacks, and calls `leave(culprit, message)`
        a culprit that is asked            shows its stack, if its interpreter still runs
        who reads an announcement          calls `leave` unless it ends by itself within GRACE seconds
        who has lost the store             does the same; calls `leave` after `patience` and LEEWAY, if the store only does not answer

    A rank without heartbeats is stopped by a signal, cut off, or one of its ops holds Python's lock. `patience` is in seconds; 0 switches
    the watch off. `name`: the store's, for messages.
    """

    def __init__(
        self,
        rank: int,
        world: int,
        store: Store,
        progress: Progress,
        patience: float,
        leave: Callable[[int, str], None],
        name: str = "the store",
    ) -> None:
        self._rank, self._store, self._leave, self.name = rank, store, leave, name
        self.roll = Roll(rank, world, store)
        self.ranks = range(world)
        self._copies = [bytearray(Progress.SIZE) for _ in range(world)]
        self._records = [progress if other == rank else Progress(copy) for other, copy in enumerate(self._copies)]
        self._numbers, self._done = [0] * world, [False] * world
        self._still = Stillness(world, BEAT)  # of the numbers
        self._watch = Watchdog(self._records, patience, self._silent, BEAT)
        self._over, self._now, self._asked, self._answered = (threading.Event() for _ in range(4))
        self.verdict: Verdict | None = None
        self._read_at = 0.0  # when the verdict was read
        self._write()  # from now on this rank is missed
        self._threads = [threading.Thread(target=run, name="delock-heartbeats", daemon=True) for run in (self._follow, self._time)]
        for thread in self._threads:
            thread.start()

    def be_patient(self, seconds: float) -> None:
        """Sets `patience` to this number of seconds, because an op may take that long."""
        self._watch.patience = seconds

    def done(self) -> None:
        """Marks this rank as done: a rank that waits for it does not wait for an op."""
        self._done[self._rank] = True

    def close(self) -> None:
        """Ends the threads; one that waits for a store without an answer is left behind."""
        self._over.set()
        self._now.set()
        deadline = time.monotonic() + _JOIN
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def ends_within(self, seconds: float) -> bool:
        """Returns True once `close` has been called, or False after these seconds."""
        return self._over.wait(seconds)

    def place(self, rank: int) -> str:
        """Returns the position of a rank as it was last heard of, such as "in F12 (epoch 1, batch 3)"."""
        return str(self._records[rank].read())

    def silent_for(self, rank: int) -> float:
        """Returns the seconds since the last heartbeat of a rank; 0 if there has been none."""
        return self._still.seconds[rank] if self._numbers[rank] else 0.0

    def bury(self) -> Verdict | None:
        """Announces the first rank whose process is gone, if there is one."""
        return next((self.roll.bury(rank, "its process is gone", self.place(rank)) for rank in self.roll.dead()), None)

    def judge(self) -> Verdict | None:
        """Notes that this rank was told to end, and returns the verdict on the run, if there is one, or if a dead rank is found."""
        if self.verdict is None:
            self._answered.clear()
            self._asked.set()
            self._now.set()
            self._answered.wait(_ANSWER)
        return self.verdict

    def _follow(self) -> None:
        try:
            for moment in itertools.cycle(range(_MOMENTS)):
                if self._rest():
                    return
                if moment == 0:
                    self._write()
                    self._read()
                if self._hear() or (moment == 0 and self._look()):
                    return
        except RuntimeError as error:
            if not self._over.wait(GRACE):  # the store is gone, and so is the run
                lost = Verdict(self._rank, self._rank, f"it has lost {self.name}: {str(error).partition(chr(10))[0]}")
                self._stop(self.verdict or lost)

    def _time(self) -> None:
        """Ends this rank if the other thread gets no answer from the store, which may wait in C++ for ever."""
        still = Stillness(1, BEAT)
        while not self._over.wait(BEAT) and self._threads[0].is_alive():
            late, patience = still.look([self._numbers[self._rank]])[0], self._watch.patience
            if patience and late >= patience + LEEWAY:
                cut = f"stage {self._rank} has had no answer from {self.name} for {late:.0f} s"
                self._leave(self._rank, f"{cut}; it stops {self._records[self._rank].read().told()}")
                return

    def _rest(self) -> bool:
        """Waits for the next moment, or for news, and returns True when the watch is over."""
        self._now.wait(BEAT / _MOMENTS)
        self._now.clear()
        return self._over.is_set()

    def _write(self) -> None:
        beat = _HEAD.pack(self._numbers[self._rank] + 1, self._done[self._rank]) + self._records[self._rank].raw()
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
        self._numbers[self._rank] += 1  # the store has answered

    def _hear(self) -> bool:
        """Reads the verdict on the run, and finds it if a signal has told this rank to end; returns True if this rank has left."""
        if self.verdict is None:
            self.verdict, self._read_at = self.roll.failed(), time.monotonic()
        if self._asked.is_set():
            self._asked.clear()
            self.roll.leave()
            self.verdict = self.verdict or self.bury()
            self._answered.set()
        if self.verdict is None or time.monotonic() < self._read_at + GRACE:
            return False
        self._stop(self.verdict)
        return True

    def _stop(self, verdict: Verdict) -> None:
        self._leave(verdict.culprit, f"stage {self._rank} stops {self.place(self._rank)}, because {verdict.message}")

    def _look(self) -> bool:
        """Looks for a hang, and returns True if this rank was the first to report one, which ends its watch."""
        self._still.look(self._numbers)
        at_work = [rank for rank, done in enumerate(self._done) if not done or self._silent(rank)]
        culprits = self._watch.look(at_work)
        if not culprits or self.roll.claim(culprits[0], self._watch.head(culprits[0])).finder != self._rank:
            return False
        message = self._watch.tell(culprits, at_work, self._stack)
        self._over.wait(2 * BEAT)  # the others read it before the store may go with this rank
        self._leave(culprits[0], message)
        return True

    def _silent(self, rank: int) -> str:
        """Returns a complaint after half of the patience without a heartbeat, before the ranks that wait for it are as late as it is."""
        enough = self._watch.patience / (2 if self._records[rank].read().begun else 1)  # setting up may hold Python's lock for a while
        return "gives no sign of life" if self.silent_for(rank) >= enough else ""

    def _stack(self, rank: int) -> str:
        if rank == self._rank:
            return _main_stack()
        try:
            self._store.set(f"asked/{rank}", "")
            deadline = time.monotonic() + _ANSWER
            while not self._store.check([f"stack/{rank}"]):
                if self._over.wait(BEAT / 10) or time.monotonic() > deadline:
                    return "(it does not answer)"
            return self._store.get(f"stack/{rank}").decode()
        except RuntimeError:
            return f"({self.name} is gone, so it cannot be asked)"


def _main_stack() -> str:
    """Returns the stack of this process' main thread."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    return "".join(traceback.format_stack(frame))
