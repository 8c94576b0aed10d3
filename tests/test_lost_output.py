"""Output that cannot be written, files that cannot be opened, and text that a terminal must not get as it is."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import pytest

from delock.cli import main
from delock.cli.sample import printable

from commands import SMALL, refused

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.fixture(params=["full", "gone"])
def lost(request: pytest.FixtureRequest) -> Iterator[TextIO]:
    """A standard output on a full disk, or one whose reader is gone."""
    if request.param == "full":
        file = os.fdopen(os.open("/dev/full", os.O_WRONLY), "w")
    else:
        reader, writer = os.pipe()
        os.close(reader)
        file = os.fdopen(writer, "w")
    yield file
    with suppress(OSError):
        file.close()


@pytest.mark.parametrize("command", ["train", "compare"])
def test_lost_output_costs_no_run(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lost: TextIO, command: str
) -> None:
    rows = ["--methods", "bp", "--no-plain"] if command == "compare" else []
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", lost)
        assert main([command, *SMALL, *rows, "--batches", "2", "--out", "a"]) == 0
    error = capsys.readouterr().err
    assert error.startswith("warning: cannot write to standard output: ")
    assert error.endswith("The run goes on, and shows no more\n")
    assert error.count("\n") == 1
    assert list((here / "a").rglob("model.safetensors"))


def test_a_lost_plan_is_a_failure(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with suppress(OSError), open("/dev/full", "w") as full:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            assert main(["plan"]) == 1
        assert "No space left on device" in capsys.readouterr().err


def test_too_few_files_are_refused(here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (24, 24))
    for words in (["train"], ["compare", "--methods", "bp"]):
        error = refused([*words, "--model", "mlp", "--workers", "processes"], here, capsys)
        assert "24 files open at once (ulimit -n), and 2 stages in processes need 40" in error


def test_a_terminal_gets_no_control_characters() -> None:
    assert printable("a\tb\n\x1b[31mc\x9b\r\x00\x7f é\u2028") == "a\tb\n\\x1b[31mc\\x9b\\x0d\\x00\\x7f é\u2028"


def test_text_is_printed_as_it_is_into_a_file_alone(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "a.txt").write_text("\x1b\x07" * 500)
    size = "--depth 1 --width 8 --attention-heads 1 --context 8 --batch-size 2 --batches 1 --workers inline"
    assert main(["train", "--data", "text", "--text", "a.txt", *size.split(), "--out", "a"]) == 0
    capsys.readouterr()
    assert main(["sample", "a", "--tokens", "20"]) == 0
    assert set(capsys.readouterr().out) <= set("\x1b\x07\n")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert main(["sample", "a", "--tokens", "20"]) == 0
    assert set(capsys.readouterr().out) <= set("\\x1b07\n")
