"""`delock train` under torchrun: a killed rank is named and its run has failed; a SIGTERM from outside interrupts it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import delock.cli.interrupts
from delock.cli import main, recording
from delock.cli.interrupts import Interrupted, interruptible
from delock.cli.recording import Recording
from delock.launch.failure import Ended
from hosts import descendants

from ranks import wait_until

TRAIN = ["--model", "mlp", "--limit", "128", "--batch-size", "32", "--epochs", "100000", "--log-every", "1", "--stages", "3", "--out", "a"]


class Program:
    """`torchrun -m delock train` on three ranks, which trains."""

    def __init__(self, *more: str) -> None:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
        command = [*launcher, "-m", "delock", "train", *TRAIN, *more]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        metrics = Path("a/metrics.jsonl")
        wait_until(lambda: self.process.poll() is not None or (metrics.exists() and metrics.read_text().count("evaluation") > 1), 120)
        self.ranks = [pid for pid, words in descendants(self.process.pid) if "-m delock train" in words]

    def ends(self) -> str:
        """Returns its words and those of its ranks."""
        return self.process.communicate(timeout=40)[1]

    def kill(self) -> None:
        """Leaves none of its processes behind."""
        for pid in (self.process.pid, *self.ranks):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate(timeout=20)


@pytest.fixture
def program(here: Path) -> Iterator[Program]:
    made = Program()
    yield made
    made.kill()


@pytest.mark.usefixtures("own_random")
def test_a_signal_while_the_summary_is_written_waits_for_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes just before, and it comes while the file is written."""
    end, written = Recording.end, Recording.end.__globals__["dumps"]
    sent: list[str] = []

    def signalled(*given: Any, **more: Any) -> Any:
        if not sent:
            sent.append("SIGTERM")
            signal.raise_signal(signal.SIGTERM)
        return (end if more == {} else written)(*given, **more)

    for where, name in ((Recording, "end"), (recording, "dumps")):
        sent.clear()
        with monkeypatch.context() as patch:
            patch.setattr(where, name, signalled)
            words = ["--model", "mlp", "--limit", "64", "--epochs", "1", "--workers", "inline", "--out", "a", "--overwrite"]
            assert main(["train", *words]) == 143
        assert sent
        assert summary()["status"] == "finished"
        Path("a/summary.json").unlink()


def summary() -> dict[str, str]:
    told: dict[str, str] = json.loads(Path("a/summary.json").read_text())
    return told


@pytest.mark.parametrize("victim", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_killed_rank_is_the_reason_of_a_run_that_failed(program: Program, victim: int) -> None:
    os.kill(program.ranks[victim], signal.SIGKILL)
    said = program.ends()
    assert f"error: stage {victim} has died: its " in said
    assert said.count("error: stage ") == 1
    assert summary()["status"] == "failed"
    assert re.match(rf"stage {victim} has died: its .*; it was last heard of (in [A-Z]\d|before)", summary()["error"])


@pytest.mark.slow
def test_rank_0_killed_is_named_by_the_others(program: Program) -> None:
    os.kill(program.ranks[0], signal.SIGKILL)
    assert "error: stage 0 has died: " in program.ends()


@pytest.mark.slow
def test_a_signal_to_torchrun_interrupts(program: Program) -> None:
    program.process.send_signal(signal.SIGTERM)
    said = program.ends()
    assert "has died" not in said
    assert "interrupted; the run is saved in a/checkpoints/batch-" in said
    assert summary()["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize("link", ["shared", "gloo"])
def test_a_rank_without_a_sign_of_life_is_the_reason_in_the_summary(here: Path, link: str) -> None:
    program = Program("--link", link, "--patience", "3")
    try:
        os.kill(program.ranks[1], signal.SIGSTOP)
        assert "error: stage 1 gives no sign of life" in program.ends()
        assert summary()["status"] == "failed"
        assert "stage 1 gives no sign of life" in summary()["error"]
    finally:
        program.kill()


def fail(signals: int, written: list[str]) -> None:
    """Ends as rank 0 does after another rank's failure; SIGTERM comes while it writes."""
    with interruptible(whole_program=False):
        try:
            raise Ended(1, "stage 2 has died")
        finally:
            for _ in range(signals):
                signal.raise_signal(signal.SIGTERM)
            written.append("summary.json")


def test_a_rank_that_ends_writes_its_summary_before_it_heeds_torchruns_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    with pytest.raises(Ended, match="stage 2 has died"):
        fail(1, written)
    assert written == ["summary.json"]
    monkeypatch.setattr(delock.cli.interrupts, "SETTLE", 0.0)  # so the second comes late: the rank does not end by itself
    with pytest.raises(Interrupted):
        fail(2, written)
    assert written == ["summary.json"]
