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
    """Looks at the ranks' progress from the parent; `look` names the culprits once they have not moved for `patience` seconds."""

    def __init__(self, records: Sequence[Progress], patience: float) -> None:
        self._records, self._patience = records, patience
        self._moves = [-1] * len(records)
        self._seen = time.monotonic()
        self._still = [0.0] * len(records)  # seconds, by rank

    def moved(self, rank: int) -> None:
        """A sign of life of a rank came another way."""
        self._still[rank] = 0.0

    def look(self, pids: Mapping[int, int]) -> list[int]:
        """The ranks, among those still at work (rank: process id), that keep the others waiting; empty while all is well.

        A stopped process is a culprit; else every rank that computes, an op having begun (setting up takes as long as it takes);
        else all of them, if all wait for each other. Where nobody waits for the culprit, as in a free-running run, the others may move.
        """
        now = time.monotonic()
        # Only time in which this process itself ran counts: after Ctrl-Z, or a long on_event, nobody is late.
        passed = min(now - self._seen, 2 * POLL)
        moves, before = [record.moves for record in self._records], self._moves
        self._still = [s + passed if a == b else 0.0 for s, a, b in zip(self._still, moves, before, strict=True)]
        self._seen, self._moves = now, moves
        still = [rank for rank in pids if self._patience and self._still[rank] >= self._patience]
        at = {rank: self._records[rank].read() for rank in still}
        stopped = [rank for rank in still if _stopped(pids[rank])]
        computing = [rank for rank in still if at[rank].begun and at[rank].waits_for is None]
        waiting = [rank for rank in still if at[rank].waits_for is not None]
        nobody = min(self._still) >= self._patience  # those that are done count too: what they did last may be what was waited for
        return stopped or computing or (waiting if nobody and len(waiting) == len(pids) else [])

    def tell(self, culprits: Sequence[int], pids: Mapping[int, int], stacks: Mapping[int, Path]) -> str:
        """The message: what hangs and where, what the others wait for, and the culprits' stacks."""
        lines = [self._place(rank, pids[rank], rank in culprits) for rank in [*culprits, *(r for r in pids if r not in culprits)]]
        head = f"{lines[0]}: it has not moved for {self._patience:g} s"
        shown = [f"stage {rank}:\n{show_stack(pids[rank], stacks[rank])}" for rank in culprits if not _stopped(pids[rank])]
        remedy = ["If an op may take that long, raise `patience` (0 turns this watch off)."] if shown else []
        return "\n\n".join(["\n".join([head, *lines[1:], *remedy]), *shown])

    def _place(self, rank: int, pid: int, culprit: bool) -> str:
        at = self._records[rank].read()
        if _stopped(pid):
            return f"stage {rank} is stopped by a signal {at}"
        if at.waits_for is not None:
            return f"stage {rank} waits for stage {at.waits_for} {at}"
        return f"stage {rank} {'hangs' if culprit else 'is'} {at}"


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
