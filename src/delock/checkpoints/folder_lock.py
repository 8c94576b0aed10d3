"""Keeps a folder for one run: others are refused until it has ended, however it ends."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from delock.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has no such locks: there all are let in
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
TRIES = 20  # the file may be removed by another run's end between two steps here


class FolderLock:
    """Holds a folder by a lock on a file in it, which the operating system takes away with the process, even a killed one.

    A file system without locks lets all in. what, remedy: for errors.
    """

    def __init__(self, folder: Path, what: str = "run folder", remedy: str = "give another --out") -> None:
        self.folder, self.path, self.what, self.remedy = folder, folder / LOCK, what, remedy
        self._handle = -1

    def take(self) -> None:
        """Raises UsageError if another run holds the folder, and OSError if no file can be written there."""
        for _ in range(TRIES):
            self._handle = os.open(self.path, os.O_RDONLY | os.O_CREAT, 0o666)  # a disk may become read-only while it is open
            try:
                self._lock()
            except UsageError:
                os.close(self._handle)
                raise
            if self.holds():
                return self._sign()
            os.close(self._handle)
        raise UsageError(f"the {self.what} {self.folder} is being removed by another run: {self.remedy}")

    def holds(self) -> bool:
        """Returns True if the file that is locked is still the one in the folder: neither was removed, or replaced by another's."""
        try:
            return os.path.samestat(os.fstat(self._handle), os.stat(self.path))
        except OSError:
            return False

    def release(self) -> None:
        """Removes the file and lets others in."""
        if self.holds():
            with suppress(OSError):  # a disk that has become read-only
                self.path.unlink()
        os.close(self._handle)

    def _sign(self) -> None:
        try:
            self.path.write_text(f"{os.getpid()}\n")
        except OSError:
            self.release()
            raise

    def _lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            number = os.read(self._handle, 32).decode(errors="replace").strip()
            process = f" (process {number})" if number.isdecimal() else ""  # it may not have written it yet
            raise UsageError(f"the {self.what} {self.folder} is in use by another run{process}: {self.remedy}") from None
        except OSError:  # a file system without locks
            pass
