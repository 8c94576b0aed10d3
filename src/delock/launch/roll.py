"""Lists torchrun's ranks in their store: where each one runs, which was told to end, and which caused the end of the run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import Store  # type: ignore[attr-defined]

_FAILED = "failed"


@dataclass(frozen=True)
class Verdict:
    """Holds the cause of the run's end: the rank that failed, the rank that found out, and what it found."""

    culprit: int
    finder: int
    message: str


class Roll:
    """Holds one rank's view of the roll. Every method but `rank` reads or writes the store, and raises RuntimeError once that is gone.

    A rank that ends in order says so before its connections close. So one that is gone and has said nothing was killed, or has crashed.
    """

    def __init__(self, rank: int, world: int, store: Store) -> None:
        self.rank, self._world, self._store = rank, world, store
        self._here = _system()
        self._pids: dict[int, int | None] = {rank: None}  # of the ranks of this system
        store.set(f"place/{rank}", f"{os.getpid()} {self._here}")

    def claim(self, culprit: int, message: str) -> Verdict:
        """Announces that `culprit` ends the run, unless a verdict was there before; returns the verdict that holds."""
        return _verdict(self._store.compare_set(_FAILED, "", f"{culprit} {self.rank} {message}"))

    def failed(self) -> Verdict | None:
        """Returns the verdict that was announced, if there is one."""
        return _verdict(self._store.get(_FAILED)) if self._store.check([_FAILED]) else None

    def bury(self, rank: int, sign: str, place: str) -> Verdict:
        """Announces a dead rank: the sign of its death, and its place when it was last heard of, which may be a heartbeat ago."""
        return self.claim(rank, f"stage {rank} has died: {sign}; it was last heard of {place}")

    def leave(self) -> None:
        """Notes that this rank was told to end, or ends by the program's own will."""
        self._store.set(f"left/{self.rank}", "")

    def left(self, rank: int) -> bool:
        """Returns True if that rank has noted its end."""
        return self._store.check([f"left/{rank}"])

    def dead(self) -> list[int]:
        """Returns the ranks whose process on this system is gone without a note."""
        pids = {rank: self._pid(rank) for rank in range(self._world)}
        gone = [rank for rank, pid in pids.items() if pid is not None and _gone(pid)]
        return [rank for rank in gone if not self.left(rank)]

    def _pid(self, rank: int) -> int | None:
        """Returns the pid of another rank, or None before it has come, or if this system cannot see its processes."""
        if rank not in self._pids and self._store.check([f"place/{rank}"]):
            pid, system = self._store.get(f"place/{rank}").decode().split(" ", 1)
            self._pids[rank] = int(pid) if system == self._here else None
        return self._pids.get(rank)


def _verdict(said: bytes) -> Verdict:
    culprit, finder, message = said.decode().split(" ", 2)
    return Verdict(int(culprit), int(finder), message)


def _system() -> str:
    """Returns a name for the processes that see each other: the running kernel and its list of pids, or the host's name without /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return os.uname().nodename


def _gone(pid: int) -> bool:
    """Returns True if the process has ended, though its parent may not have noticed."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except ProcessLookupError:
        return True
    except OSError:  # no /proc
        return False
