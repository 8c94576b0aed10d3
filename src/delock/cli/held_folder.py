"""Makes, holds and clears the folder of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from delock.checkpoints.folder_lock import LOCK, TRIES, FolderLock
from delock.errors import UsageError


class HeldFolder:
    """Holds a folder for one run, from `take` to `release`. `new`: under a name of its own, with a number if `path` exists.

    Raises UsageError if no folder can be made there, if `path` is a file, if another run has it, and if it holds anything, unless that may
    be overwritten.
    """

    def __init__(self, path: Path, *, new: bool, overwrite: bool) -> None:
        self.path, self.new, self.overwrite = path, new, overwrite
        self._made: list[Path] = []  # the outermost first
        self._lock: FolderLock | None = None

    def take(self) -> None:
        """Makes the folder if it does not exist, and keeps other runs out."""
        try:
            _refuse(self.path)
            self._take()
            if not self.overwrite and any(path.name != LOCK for path in self.path.iterdir()):
                raise UsageError(f"the run folder {self.path} exists: give another --out, or --overwrite to replace the run in it")
        except OSError as error:
            self.release(keep=False)
            raise UsageError(f"cannot use the run folder {self.path}: {error.strerror}; give another --out") from None
        except UsageError:
            self.release(keep=False)
            raise

    def _take(self) -> None:
        for number in range(TRIES):
            try:
                self._make()
                lock = FolderLock(self.path)
                lock.take()
            except FileNotFoundError:  # another run has just removed the folder, or one above it, as it kept nothing there
                if number == TRIES - 1:
                    raise
            else:
                self._lock = lock
                return

    def _make(self) -> None:
        missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
        for path in reversed(missing[1:]):
            self._make_one(path)
        if self.new:
            self.path = _free(self.path)
            self._made.append(self.path)
        elif missing:
            self._make_one(self.path)

    def _make_one(self, path: Path) -> None:
        with suppress(FileExistsError):  # another run was faster, and it is that one's to remove
            path.mkdir()
            self._made.append(path)

    def holds(self) -> bool:
        """Returns True if the folder is still the one that was taken."""
        return self._lock is not None and self._lock.holds()

    def release(self, *, keep: bool) -> None:
        """Lets other runs in. Without `keep` the folders that were made are removed, where they are empty."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        if not keep:
            for path in reversed(self._made):
                with suppress(OSError):  # another run has something there
                    path.rmdir()


def _refuse(path: Path) -> None:
    """Raises UsageError if a folder cannot be made: before hours of work rather than after."""
    place = next((place for place in (path, *path.parents) if place.exists()), None)
    if place is not None and not place.is_dir():
        where = "it" if place == path else place
        raise UsageError(f"cannot use the run folder {path}: {where} is a file; give another --out")
    if place is None or not os.access(place, os.W_OK):
        raise UsageError(f"cannot use the run folder {path}: {place or 'the place'} may not be written to; give another --out")


def _free(path: Path) -> Path:
    """Makes a folder that did not exist before."""
    for number in range(1, 1000):
        candidate = path if number == 1 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            continue
        return candidate
    raise UsageError(f"there are too many run folders called {path}: give another --out")


def clear(path: Path, files: Collection[str], folders: Collection[str], sign: str) -> None:
    """Removes the files and folders of a run, and of the runs of a comparison in it: folders with the file `sign`."""
    for name in files:
        (path / name).unlink(missing_ok=True)
    for name in folders:
        shutil.rmtree(path / name, ignore_errors=True)
    for inner in [config.parent for config in path.glob(f"*/{sign}")]:
        clear(inner, files, folders, sign)
        if not any(inner.iterdir()):
            inner.rmdir()
