"""The examples run as their first lines say, in one process and in several, and learn."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from delock.records import Result

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LENGTH = {"regression": ("--epochs", "12"), "tokens": ("--batches", "40")}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_is_a_test_of_every_example() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(LENGTH)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "regression" else []) for name in LENGTH])
def test_the_same_in_one_process_and_in_many(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a user starts it, and called from here: the same losses in print, and they fall."""
    with torch.random.fork_rng(devices=[]):
        result: Result = load(name).main(["--workers", "inline", *LENGTH[name]])
    losses = [record.test_loss for record in result.evaluations]
    assert losses[-1] < 0.9 * losses[0]
    per_stage = [stage.updates for stage in result.stages]
    assert per_stage == [len(result.losses)] * len(per_stage)
    here = capsys.readouterr().out

    started = [sys.executable, str(EXAMPLES / f"{name}.py"), *LENGTH[name]]
    done = subprocess.run(started, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert told(done.stdout) == told(here) != []


def told(out: str) -> list[str]:
    """The lines that do not depend on time."""
    return [line for line in out.splitlines() if "idle" not in line]


def test_the_regression_holds_the_trained_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """It evaluates its model once more and finds the loss that was reported."""
    with torch.random.fork_rng(devices=[]):
        result: Result = load("regression").main(["--workers", "inline", "--method", "adl", "--epochs", "1"])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith(f" {result.evaluations[-1].test_loss:.3f}")
