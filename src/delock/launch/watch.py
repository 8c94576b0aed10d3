"""The watch over ranks that have stopped moving: who hangs, where, and with what Python stack."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from delock.launch.progress import Progress

POLL = 0.25  # seconds between two looks
_DUMP = 2.0  # seconds a rank has for showing its stack


class Watch:
    """Looks at the ranks' progress from the parent; `look` names the culprits once nothing has moved for `patience` seconds."""

    def __init__(self, records: Sequence[Progress], patience: float) -> None:
        self._records, self._patience = records, patience
        self._moves: list[int] = []
        self._seen = time.monotonic()
        self._still = 0.0

    def moved(self) -> None:
        """A sign of life came another way."""
        self._still = 0.0

    def look(self, pids: Mapping[int, int]) -> list[int]:
        """The ranks, among those still at work (rank: process id), that keep the others waiting; empty while all is well.

        A stopped process is a culprit; else every rank that computes, an op having begun (setting up takes as long as it takes);
        else all of them, if all wait for each other.
        """
        now, moves = time.monotonic(), [record.moves for record in self._records]
        # Only time in which this process itself ran counts: after Ctrl-Z, or a long on_event, nobody is late.
        self._still = 0.0 if moves != self._moves else self._still + min(now - self._seen, 2 * POLL)
        self._seen, self._moves = now, moves
        if not self._patience or self._still < self._patience:
            return []
        at = {rank: self._records[rank].read() for rank in pids}
        stopped = [rank for rank, pid in pids.items() if _stopped(pid)]
        computing = [rank for rank in pids if at[rank].begun and at[rank].waits_for is None]
        waiting = [rank for rank in pids if at[rank].waits_for is not None]
        return stopped or computing or (waiting if len(waiting) == len(pids) else [])

    def tell(self, culprits: Sequence[int], pids: Mapping[int, int], stacks: Mapping[int, Path]) -> str:
        """The message: what hangs and where, what the others wait for, and the culprits' stacks."""
        lines = [self._place(rank, pids[rank]) for rank in [*culprits, *(rank for rank in pids if rank not in culprits)]]
        head = f"{lines[0]}: no stage has moved for {self._patience:g} s"
        shown = [f"stage {rank}:\n{show_stack(pids[rank], stacks[rank])}" for rank in culprits if not _stopped(pids[rank])]
        remedy = ["If an op may take that long, raise `patience` (0 turns this watch off)."] if shown else []
        return "\n\n".join(["\n".join([head, *lines[1:], *remedy]), *shown])

    def _place(self, rank: int, pid: int) -> str:
        at = self._records[rank].read()
        if _stopped(pid):
            return f"stage {rank} is stopped by a signal {at}"
        if at.waits_for is not None:
            return f"stage {rank} waits for stage {at.waits_for} {at}"
        return f"stage {rank} hangs {at}" if at.begun else f"stage {rank} is {at}"


def show_stack(pid: int, file: Path) -> str:
    """Ask a rank for its Python stack and return it; what it has written so far if it does not answer in time."""
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
    """faulthandler's dump without what is the same in every rank: the thread that waits for the parent's death, how ranks start."""
    parts = [part for part in dump.strip().split("\n\n") if not re.search(r"in die_with_parent|^Extension modules", part)]
    return "\n\n".join(re.sub(r'\n  File "[^"]*child\.py", line \d+ in main\n(  .*\n?)*$', "", part) for part in parts)


def _stopped(pid: int) -> bool:
    """State T (SIGSTOP, Ctrl-Z) where the system has /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "T"
