"""Commands run in this process, and the folder they run in."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from delock.cli import main

from ranks import wait_until

SMALL = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512"]


def content(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder but Python's caches; None for a folder in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*") if "__pycache__" not in path.parts}


def refused(words: list[str], here: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says which is refused; everything in `here` stays as it was."""
    before = content(here)
    capsys.readouterr()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert content(here) == before
    return error


class Program:
    """`delock` in a session of its own, as in a terminal of its own; `ignoring`: it is to ignore SIGINT, as shells tell background jobs."""

    def __init__(self, *words: str, ignoring: bool = False) -> None:
        shell = ["sh", "-c", 'trap "" INT; exec "$@"', "sh"] if ignoring else []
        command = [*shell, sys.executable, "-m", "delock", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def until(self, start: str) -> None:
        """Read its output up to a line that begins so."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(start):
                return
        pytest.fail(f"the program ended: {self.process.communicate(timeout=20)}")

    def ends(self, seconds: float) -> tuple[int, str]:
        """Exit code, and what it said to stderr. Its processes have closed its output, and all are gone."""
        began = time.monotonic()
        _, error = self.process.communicate(timeout=60)
        assert time.monotonic() - began < seconds
        wait_until(lambda: not self.family(), 5)
        return self.process.returncode, error

    def family(self) -> dict[int, tuple[int, str]]:
        """Processes of its session, but for those that only wait to be reaped: pid -> (parent, command)."""
        listed = subprocess.run(["ps", "-A", "-ww", "-o", "pid=,ppid=,pgid=,stat=,args="], capture_output=True, text=True, check=True)
        found = [line.split(None, 4) for line in listed.stdout.splitlines()]
        own = [line for line in found if int(line[2]) == self.process.pid and line[3][0] != "Z"]
        return {int(pid): (int(parent), args) for pid, parent, _, _, args in own}

    def stages(self) -> list[int]:
        """The processes of its stages: what its fork server has forked, elsewhere what it has spawned."""
        family = self.family()
        servers = self.servers()
        spawned = [pid for pid, (_, args) in family.items() if "multiprocessing.spawn" in args]
        return sorted(spawned or [pid for pid, (parent, _) in family.items() if parent in servers])

    def servers(self) -> list[int]:
        """Its fork server, if there is one, and the stages it has forked, which go by the same name."""
        return [pid for pid, (_, args) in self.family().items() if "multiprocessing.forkserver" in args]
