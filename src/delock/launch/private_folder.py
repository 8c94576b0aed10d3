"""Makes the folder of a run's processes: nobody else can enter it, and it does not outlive the program for long."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks: there the folder of a killed program stays
    fcntl = None  # type: ignore[assignment]

PREFIX = "delock-run-"
LOCK = "lock"  # held by the program that made the folder, as long as it lives


@contextmanager
def private_folder() -> Iterator[str]:
    """Yields a new folder of mode 0700, which is removed afterwards; those of programs that were killed are removed now."""
    for old in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with suppress(OSError):
            _sweep(old)
    with tempfile.TemporaryDirectory(prefix=PREFIX) as folder:
        made = Path(folder, f".{LOCK}")
        with made.open("w") as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            made.rename(Path(folder, LOCK))  # nobody sees it before it is held
            yield folder


def _sweep(folder: Path) -> None:
    """Removes a folder of this user's that no program holds any more. Raises OSError where one does."""
    found = folder.lstat()
    if not fcntl or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        return
    with (folder / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
