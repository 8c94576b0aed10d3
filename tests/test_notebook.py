"""The notebook of the examples runs as it stands, cell by cell, in a kernel of its own; and the progress of a run is shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from delock.draw.progress_bar import ProgressBar
from delock.records import EvaluationRecord, Event, Started, StepRecord

NOTEBOOK = Path(__file__).resolve().parent.parent / "examples" / "notebook.ipynb"


ENDS = """
import multiprocessing, torch, delock
def helper(x):
    if multiprocessing.parent_process():
        raise ArithmeticError("mine")  # a line of the user's
    return x
data = [(torch.ones(4, 2), torch.zeros(4, 2))] * 2
made = lambda named: torch.optim.SGD(dict(named).values(), 0.1)
parts = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]
try:
    delock.fit(parts, data, loss=lambda o, t: helper((o - t).square().mean()), optimizer=made, epochs=1)
except delock.StageFailed as failed:
    print(failed)
"""


def executed(cells: list[str]) -> Any:
    """The cells with their outputs."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()  # ends the kernel in any case
    return notebook.cells


@pytest.fixture(scope="module")
def cells() -> list[Any]:
    """The cells of the notebook, and one more, executed in one kernel: to start one takes longer than to run them."""
    kept = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in kept), "a notebook is kept without its outputs"
    return list(executed([*(cell.source for cell in kept), ENDS]))


def test_the_notebook_runs_as_it_stands(cells: list[Any]) -> None:
    *_, training, last, _ = cells
    [bar] = training.outputs
    assert bar["data"]["text/plain"].startswith("━" * 24 + " 150 of 150 batches; loss ")
    assert "; test loss " in bar["data"]["text/plain"]
    [printed] = last.outputs
    assert printed["text"].startswith("stage 0: 150 updates")


def test_an_error_in_a_cell_shows_the_line_of_the_cell(cells: list[Any]) -> None:
    told = "".join(one.get("text", "") for one in cells[-1].outputs)
    assert "stage 1 failed in B0" in told
    assert 'raise ArithmeticError("mine")  # a line of the user\'s\n' in told


# ---- progress ----------------------------------------------------------------------------------------------------------------------


def events() -> list[Event]:
    steps = [StepRecord(batches=b, epoch=b / 4, loss=1 / b, lr=0.1, samples=b, seconds=30.0 * b) for b in (2, 4, 8)]
    evaluations = [EvaluationRecord(b, b / 4, 1.0, 2 / b, {"accuracy": b / 10}, 30.0 * b, b) for b in (4, 8)]
    started = Started("fdg", "processes", 8, 2.0, (), (), 1.0)
    return [started, *steps[:2], evaluations[0], steps[2], evaluations[1]]


def test_elsewhere_every_evaluation_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    for event in events():
        bar(event)
    half, whole = "━" * 12 + "─" * 12, "━" * 24
    assert capsys.readouterr().out.splitlines() == [
        f"{half} 4 of 8 batches; loss 0.25, 2:00 left; test loss 0.5, accuracy 0.4",
        f"{whole} 8 of 8 batches; loss 0.125; test loss 0.25, accuracy 0.8",
    ]


def test_a_terminal_has_one_line_and_keeps_what_it_shows_at_the_end(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    bar = ProgressBar()
    for event in events():
        bar(event)
    *changed, end, _ = capsys.readouterr().out.replace("\n\r", "\n").split("\n")
    assert len(changed) == 1
    assert changed[0].count("\r") > 2
    assert end.startswith("━" * 24 + " 8 of 8 batches; loss 0.125")
