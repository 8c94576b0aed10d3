"""Watches ranks that have stopped moving: it names the rank that hangs, its op, and its Python stack."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from delock.launch.progress import Progress

POLL = 0.25  # seconds between two looks
_DUMP = 2.0  # seconds that a rank has to show its stack


class Watchdog:
    """Looks at the ranks' progress; `look` names the culprits once they have not moved for `patience` seconds (0: never).

    `stopped(rank)`: returns the reason why that process cannot run, such as "is stopped by a signal", or "". `step`: seconds between two
    looks.
    """

    def __init__(self, records: Sequence[Progress], patience: float, stopped: Callable[[int], str], step: float = POLL) -> None:
        self._records, self.patience, self._stopped = records, patience, stopped
        self._still = Stillness(len(records), step)  # of their moves

    def moved(self, rank: int) -> None:
        """Notes a sign of life of a rank that came another way."""
        self._still.seconds[rank] = 0.0

    def look(self, at_work: Sequence[int]) -> list[int]:
        """Returns the ranks, of those still at work, that keep the others waiting; none if all is well.

        A stopped process is a culprit; else every rank that computes after its first op has begun, because setting up may take any time;
        else all, if they wait for each other. If no rank waits for the culprit, as in a free-running run, the others may move.
        """
        seconds = self._still.look([record.moves for record in self._records])
        still = [rank for rank in at_work if self.patience and seconds[rank] >= self.patience]
        at = {rank: self._records[rank].read() for rank in still}
        stopped = [rank for rank in still if self._stopped(rank)]
        computing = [rank for rank in still if at[rank].begun and at[rank].waits_for is None]
        waiting = [rank for rank in still if at[rank].waits_for is not None]
        all_still = min(seconds) >= self.patience  # ranks that are done count too: others may have waited for their last op
        if stopped or computing:
            return stopped or computing
        peers = {rank: at[rank].waits_for for rank in waiting}
        each_other = [rank for rank, peer in peers.items() if peer in peers and peers[peer] == rank]  # the others wait for these
        return sorted(waiting, key=lambda rank: rank not in each_other) if all_still and len(waiting) == len(at_work) else []

    def tell(self, culprits: Sequence[int], at_work: Sequence[int], stack: Callable[[int], str]) -> str:
        """Returns the message: which rank hangs at which op, what the others wait for, and the stacks; `stack(rank)` returns one."""
        lines = [self._place(rank, rank in culprits) for rank in [*culprits[1:], *(r for r in at_work if r not in culprits)]]
        shown = [f"stage {rank}:\n{stack(rank)}" for rank in culprits if not self._stopped(rank)]
        remedy = ["If an op may take that long, raise `patience` (0 turns this watch off)."] if shown else []
        return "\n\n".join(["\n".join([self.head(culprits[0]), *lines, *remedy]), *shown])

    def head(self, culprit: int) -> str:
        """Returns the first line of that message."""
        return f"{self._place(culprit, True)}: it has not moved for {self.patience:g} s"

    def _place(self, rank: int, culprit: bool) -> str:
        at = self._records[rank].read()
        if reason := self._stopped(rank):
            return f"stage {rank} {reason} {at}"
        if at.waits_for is not None:
            return f"stage {rank} waits for stage {at.waits_for} {at}"
        return f"stage {rank} {'hangs' if culprit else 'is'} {at}"


class Stillness:
    """Counts for each of several counters the seconds since it last moved, as seen by a process that looks every `step` seconds.

    Only time in which this process itself ran counts: after Ctrl-Z, or a long on_event, no counter is late.
    """

    def __init__(self, count: int, step: float) -> None:
        self.seconds = [0.0] * count
        self._counters, self._step = [-1] * count, step
        self._seen = time.monotonic()

    def look(self, counters: Sequence[int]) -> list[float]:
        """Returns these seconds, given the counters as they are now."""
        now = time.monotonic()
        passed = min(now - self._seen, 2 * self._step)
        self.seconds = [s + passed if a == b else 0.0 for s, a, b in zip(self.seconds, counters, self._counters, strict=True)]
        self._seen, self._counters = now, list(counters)
        return self.seconds


def show_stack(pid: int, file: Path) -> str:
    """Asks a rank for its Python stack and returns it, or the part written so far if it does not finish in time."""
    before = file.stat().st_size
    os.kill(pid, signal.SIGUSR1)
    deadline, size = time.monotonic() + _DUMP, before
    while time.monotonic() < deadline:
        time.sleep(0.05)
        size, last = file.stat().st_size, size
        if size == last > before:  # written, and no longer growing
            break
    return own_frames(file.read_text(errors="replace"))


def own_frames(dump: str) -> str:
    """Returns faulthandler's dump without the parts that all ranks share: the thread that waits for the parent, and the start."""
    parts = [part for part in dump.strip().split("\n\n") if not re.search(r"in die_with_parent|^Extension modules", part)]
    return "\n\n".join(re.sub(r'\n  File "[^"]*child\.py", line \d+ in main\n(  .*\n?)*$', "", part) for part in parts)


def stopped_by_signal(pid: int) -> str:
    """Returns a reason for state T (SIGSTOP, Ctrl-Z), if the system has /proc; else ""."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return "is stopped by a signal" if stat.rpartition(")")[2].split()[0] == "T" else ""
