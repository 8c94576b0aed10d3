"""`delock train` under torchrun: a rank that is killed, and a launcher that is told to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from delock.cli import main

from commands import Program
from ranks import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_random")]

SHORT = ["train", "--model", "mlp", "--limit", "128", "--batch-size", "16", "--eval-every", "40", "--cuts", "2", "--threads", "1"]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Launched(Program):
    """A run under torchrun in a session of its own."""

    def __init__(self, *words: str, restarts: int = 0) -> None:
        command = [*LAUNCH, "--max-restarts", str(restarts), "-m", "delock", *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)

    def ranks(self) -> list[int]:
        """The processes of its ranks."""
        listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False)
        return sorted(map(int, listed.stdout.split()))

    def done(self) -> tuple[int, str, str]:
        """Exit code and output."""
        out, error = self.process.communicate(timeout=120)
        return self.process.returncode, out, error

    def gone(self) -> bool:
        """True if nothing of it is left."""
        listed = subprocess.run(["ps", "-o", "pid=", "-s", str(self.process.pid)], capture_output=True, text=True, check=False)
        return not listed.stdout.split()


@pytest.fixture
def launched() -> Iterator[list[Launched]]:
    """Launchers; whatever comes, nothing of them is left."""
    found: list[Launched] = []
    yield found
    for one in found:
        if not one.gone():
            os.killpg(one.process.pid, signal.SIGKILL)
        one.process.communicate(timeout=20)
        wait_until(one.gone, 10)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[int, bytes]:
    """The weights of runs without interruption, by their epochs."""
    found = {}
    for epochs in (60, 120):
        folder = str(tmp_path_factory.mktemp("whole") / "run")
        assert main([*SHORT, "--epochs", str(epochs), "--out", folder, "--workers", "inline", "--no-checkpoint"]) == 0
        found[epochs] = Path(folder, "model.safetensors").read_bytes()
    return found


@pytest.mark.parametrize("seed", range(10))
def test_torchrun_starts_again_what_was_killed(here: Path, whole: dict[int, bytes], launched: list[Launched], seed: int) -> None:
    launched.append(run := Launched(*SHORT, "--epochs", "120", "--out", "a", "--checkpoint-every", "20", restarts=1))
    run.until(f"checkpoint at batch {20 + 60 * seed}")
    os.kill(run.ranks()[seed % 2], signal.SIGKILL)
    code, out, error = run.done()
    assert code == 0, error
    assert "goes on from a/checkpoints/batch-" in out
    assert Path("a/model.safetensors").read_bytes() == whole[120]
    assert json.loads(Path("a/summary.json").read_text())["resumed_at"][0] > 0


@pytest.mark.parametrize("to", ["the launcher", "a terminal", "rank 1"])
def test_a_signal_under_torchrun_saves_the_run(here: Path, whole: dict[int, bytes], launched: list[Launched], to: str) -> None:
    launched.append(run := Launched(*SHORT, "--epochs", "120", "--out", "a", "--link", "gloo"))
    run.until("epoch 10")
    match to:
        case "the launcher":
            os.kill(run.process.pid, signal.SIGTERM)
        case "a terminal":
            os.killpg(run.process.pid, signal.SIGINT)
        case "rank 1":
            os.kill(run.ranks()[1], signal.SIGUSR1)
    code, out, error = run.done()
    assert code != 0
    assert "goes on from batch" in error, error
    assert json.loads(Path("a/summary.json").read_text())["status"] == "interrupted"
    launched.append(again := Launched("train", "--resume", "a", "--threads", "1"))
    code, out, error = again.done()
    assert code == 0, error
    assert "goes on from a/checkpoints/batch-" in out
    assert Path("a/model.safetensors").read_bytes() == whole[120]


def test_a_run_that_may_start_again_must_find_its_folder(here: Path, launched: list[Launched]) -> None:
    launched.append(run := Launched(*SHORT, "--epochs", "1", restarts=1))
    code, _, error = run.done()
    assert code != 0
    assert "must find its folder then: give --out" in error
    assert not list(here.iterdir())
