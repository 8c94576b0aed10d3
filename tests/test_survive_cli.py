"""`delock train` that is stopped, killed and resumed: weights and records are those of a run without interruption."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from delock.cli import main
from delock.cli.survival import spelled_out
from delock.errors import UsageError

from commands import Program

pytestmark = pytest.mark.usefixtures("own_random")

SHORT = ["train", "--model", "mlp", "--limit", "128", "--batch-size", "16", "--epochs", "60", "--eval-every", "40", "--cuts", "2"]


def records(folder: str) -> list[Any]:
    """Records of a run, without times."""
    lines = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of the run without interruption."""
    folder = str(tmp_path_factory.mktemp("whole") / "run")
    assert main([*SHORT, "--out", folder, "--workers", "inline", "--no-checkpoint"]) == 0
    return folder


def saved_at(error: str) -> int:
    """The batch at which it says that it was saved."""
    found = re.fullmatch(
        r"interrupted; the run is saved in a/checkpoints/batch-(\d+); what was recorded is in a; "
        r"delock train --resume a goes on from batch (\d+)\n",
        error,
    )
    assert found, error
    assert int(found[1]) == int(found[2])
    return int(found[1])


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGUSR1, "processes"),
        pytest.param(signal.SIGINT, "processes", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "inline", marks=pytest.mark.slow),
    ],
    ids=["before the end", "ctrl-c", "the end"],
)
def test_a_signal_saves_the_run(start: Callable[..., Program], whole: str, number: signal.Signals, workers: str) -> None:
    program = start(*SHORT, "--out", "a", "--workers", workers)
    program.until("epoch 5")
    os.killpg(program.process.pid, number)  # as a terminal, `timeout` and batch systems do
    code, error = program.ends(20)
    batch = saved_at(error)
    assert code == 128 + number
    assert json.loads(Path("a/summary.json").read_text())["status"] == "interrupted"
    assert main(["train", "--resume", "a"]) == 0
    assert weights("a") == weights(whole)
    assert records("a") == records(whole)
    summary = json.loads(Path("a/summary.json").read_text())
    assert summary["resumed_at"] == [batch]
    assert summary["status"] == "finished"


@pytest.mark.parametrize("batch", [100, *(pytest.param(n, marks=pytest.mark.slow) for n in (25, 175, 300, 425))])
def test_a_killed_program_goes_on(start: Callable[..., Program], whole: str, batch: int) -> None:
    program = start(*SHORT, "--out", "a", "--checkpoint-every", "25")
    program.until(f"checkpoint at batch {batch}")
    os.killpg(program.process.pid, signal.SIGKILL)
    program.process.communicate(timeout=20)
    assert main(["train", "--out", "a", "--resume"]) == 0
    assert weights("a") == weights(whole)
    assert records("a") == records(whole)


def test_what_is_not_saved_in_time_is_said(start: Callable[..., Program]) -> None:
    program = start(*SHORT, "--out", "a", "--grace", "1")
    program.until("epoch 5")
    os.kill(program.stages()[1], signal.SIGSTOP)
    os.kill(program.process.pid, signal.SIGTERM)
    code, error = program.ends(15)
    assert code == 143
    assert error == "interrupted; the run could not be saved within 1 s; what was recorded is in a\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--resume"], "which is not said"),
        (["--resume", "nowhere"], "there is no such run or checkpoint"),
        (["--resume", "."], "is not the folder of a run"),
        (["--resume", "--out", "x", "--no-checkpoint"], "leave one of them out"),
    ],
)
def test_what_cannot_go_on_is_refused(here: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(here.iterdir())


def test_what_may_not_change_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SHORT, "--epochs", "5", "--out", "a", "--workers", "inline", "--checkpoint-every", "10"]) == 0
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    for words, message in {
        ("--seed", "1", "--epochs", "9"): "seed was 0 when the run",
        ("--method", "fdg", "--epochs", "9"): "method was ddg when",
        ("--lr", "0.5", "--epochs", "9"): "lr was 0.1 when the run",
        ("--clip", "1", "--epochs", "9"): "clip was not given when",
        ("--warmup", "3", "--epochs", "9"): "warmup was 0 when",
        ("--batch-size", "8", "--epochs", "9"): "batch-size was 16 when",
    }.items():
        assert main(["train", "--resume", "a", *words]) == 2, words
        assert message in capsys.readouterr().err
    assert main(["train", "--resume", "a"]) == 0
    assert capsys.readouterr().out == "the run in a is finished; --epochs or --batches make it longer\n"
    assert main(["train", "--resume", "a", "--batches", "20"]) == 2
    assert "but the run is to end at batch 20: let it be longer" in capsys.readouterr().err
    assert main([*SHORT, "--epochs", "1", "--model", "cnn", "--out", "b", "--workers", "inline", "--checkpoint-every", "5"]) == 0
    before |= {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file()}
    assert main(["train", "--resume", "a", "--epochs", "6", "--out", "b"]) == 2
    assert "the run folder b exists: give another --out, or --overwrite" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before
    assert main(["train", "--resume", "a", "--epochs", "6", "--out", "b", "--overwrite"]) == 0
    assert [one["batches"] for one in records("b") if one["event"] == "evaluation"] == [40, 48]
    assert main(["train", "--resume", "b", "--epochs", "7"]) == 0
    good = Path("b/metrics.jsonl").read_bytes()
    before = {path: path.read_bytes() for path in Path("b").rglob("*") if path.is_file() and path.name != "metrics.jsonl"}
    for damage in (b"[]\n", b"\xff\x00\n", b'{"event": "step"}\n', b"\n"):
        Path("b/metrics.jsonl").write_bytes(good + damage + b'{"torn')
        assert main(["train", "--resume", "b", "--epochs", "8"]) == 2
        number = good.count(b"\n") + 1
        assert re.search(rf"line {number} of b.metrics.jsonl is not a record of a run: remove it, or begin a new", capsys.readouterr().err)
        assert {path: path.read_bytes() for path in before} == before
    assert main([*SHORT, "--epochs", "5", "--out", "a", "--workers", "inline", "--overwrite"]) == 0
    assert not list(Path("a").glob("checkpoints/*"))


def test_the_words_of_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("r/checkpoints/batch-00000005").mkdir(parents=True)
    Path("r/config.toml").write_text("")
    file = ["--config", "r/config.toml"]
    assert spelled_out(["--resume", "r"]) == ["--resume", "newest", "--out", "r", *file]
    assert spelled_out(["--resume", "--out", "r", "--lr", "1"]) == ["--out", "r", "--lr", "1", "--resume", "newest", *file]
    path = "r/checkpoints/batch-00000005"
    assert spelled_out(["--resume=" + path]) == ["--resume", path, "--out", "r", *file]
    assert spelled_out(["--out", "r", "--resume", "batch-00000005"]) == ["--out", "r", "--resume", path, *file]
    assert spelled_out(["--resume", "r", "--out", "s"]) == ["--out", "s", "--resume", "r/checkpoints", *file]
    assert spelled_out(["--resume", "--out", "new"]) == ["--out", "new", "--resume", "newest"]
    with pytest.raises(UsageError, match="no such run"):
        spelled_out(["--resume", "q"])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")  # what has begun in the new folder goes on there
    assert spelled_out(["--resume", "r", "--out", "s"])[2:] == ["--resume", "r/checkpoints", *file]
    Path("s").mkdir()
    Path("s/config.toml").touch()
    assert spelled_out(["--resume", "r", "--out", "s"]) == ["--out", "s", "--resume", "newest", "--config", "s/config.toml"]
