"""`delock` under signals, as in a terminal of its own: it ends in order, nothing recorded is lost, no process is left."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from commands import Program
from ranks import wait_until

TRAIN = ["train", "--model", "mlp", "--limit", "128", "--batch-size", "32", "--epochs", "100000", "--log-every", "1", "--out", "a"]
UNSAVED = [*TRAIN, "--no-checkpoint"]


COMPARE = ["compare", *TRAIN[1:], "--methods", "bp,fdg"]


def status(folder: str) -> str:
    return str(json.loads(Path(folder, "summary.json").read_text())["status"])


@pytest.mark.parametrize(
    ("sent", "group", "code"),
    [
        pytest.param([signal.SIGINT], True, 130, marks=pytest.mark.slow),
        ([signal.SIGINT] * 3, True, 130),
        pytest.param([signal.SIGINT, signal.SIGTERM], False, 143, marks=pytest.mark.slow),
    ],
    ids=["once", "impatient", "in the background"],
)
def test_a_signal_ends_training_in_order(start: Callable[..., Program], sent: list[signal.Signals], group: bool, code: int) -> None:
    program = start(*UNSAVED, ignoring=code == 143)
    program.until("epoch 2")
    assert len(program.stages()) == 2
    for number in sent:
        (os.killpg if group else os.kill)(program.process.pid, number)  # a terminal sends it to all of the group
    assert program.ends(5) == (code, "interrupted; what was recorded is in a\n")
    assert status("a") == "interrupted"
    lines = Path("a/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines].count("evaluation") >= 2
    assert {path.name for path in Path("a").iterdir()} == {"config.toml", "metrics.jsonl", "summary.json"}


@pytest.mark.slow
def test_ctrl_c_ends_a_comparison_in_order(start: Callable[..., Program]) -> None:
    program = start(*COMPARE, "--no-plain")
    program.until("epoch 2")
    os.killpg(program.process.pid, signal.SIGINT)
    assert program.ends(5) == (130, "interrupted; what was recorded is in a\n")
    told = json.loads(Path("a/compare.json").read_text())
    assert [(row["name"], row["summary"]["status"]) for row in told["rows"]] == [("bp", "interrupted")]
    assert status("a/bp") == "interrupted"
    assert Path("a/bp/metrics.jsonl").read_text().endswith("}\n")


@pytest.mark.parametrize("there", ["servers", pytest.param("stages", marks=pytest.mark.slow)])
def test_ctrl_c_while_starting(start: Callable[..., Program], here: Path, there: str) -> None:
    program = start(*UNSAVED)
    if there == "stages" or sys.platform == "linux":
        wait_until(lambda: bool(getattr(program, there)()) or program.process.poll() is not None, 60)
    os.killpg(program.process.pid, signal.SIGINT)
    code, error = program.ends(5)
    assert code == 130
    assert error.startswith("interrupted")
    assert error.count("\n") == 1
    assert not list(here.iterdir()) or status("a") == "interrupted"


def test_a_killed_stage_ends_training(start: Callable[..., Program]) -> None:
    program = start(*TRAIN)
    program.until("epoch 2")
    os.kill(program.stages()[1], signal.SIGKILL)
    code, error = program.ends(10)
    assert code == 1
    assert re.match(r"error: stage [01] was killed by SIGKILL .*in [FBUE]", error)
    assert error.endswith("what was recorded is in a\n")
    assert status("a") == "failed"
    assert "evaluation" in Path("a/metrics.jsonl").read_text()


def test_bad_input_leaves_no_process(start: Callable[..., Program], here: Path) -> None:
    program = start(*TRAIN, "--stages", "6")  # found out when the server of the stages' processes has been started
    code, error = program.ends(60)
    assert (code, error.count("\n"), list(here.iterdir())) == (2, 1, [])
