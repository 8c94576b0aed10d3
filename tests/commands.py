"""Commands run in this process, and the folder they run in."""

from __future__ import annotations

from pathlib import Path

import pytest

from delock.cli import main

SMALL = ["--model", "mlp", "--workers", "inline", "--limit", "128", "--batch-size", "32", "--test-batch-size", "512"]


def content(folder: Path) -> dict[Path, bytes | None]:
    """Everything in a folder; None for a folder in it."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


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
