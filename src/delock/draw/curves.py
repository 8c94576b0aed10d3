"""Draws how runs learn: loss and test metric, against epochs and against seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from delock.draw.figure import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, new, save, style
from delock.errors import UsageError
from delock.records import EvaluationRecord, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLACK, ORANGE, BLUE, GREEN, VERMILION, PURPLE, SKY, GREY)
LINES = ("-", "--", ":", "-.")
MARKERS = "osD^vPX*"
METRICS = ("accuracy", "bits_per_character", "bits_per_byte")


class Run(NamedTuple):
    """Holds one line of the picture."""

    label: str
    evaluations: Sequence[EvaluationRecord]
    steps: Sequence[StepRecord] = ()


def curves(runs: Sequence[Run | tuple[str, Sequence[EvaluationRecord], Sequence[StepRecord]]], stem: str | Path) -> list[Path]:
    """Draws training loss (above) and a test metric (below) of several runs, against epochs (left) and seconds of training (right).

    The training loss is a running mean. The metric is the accuracy, or bits per character or byte, whichever the runs have; without one it
    is the test loss. Writes STEM.png and STEM.svg and returns their paths. Raises UsageError if no run has a record.
    """
    drawn = [Run(*run) for run in runs]
    if not any(run.evaluations or run.steps for run in drawn):
        raise UsageError("there is no record to draw in these runs")
    metric = _metric_name(drawn)
    with style():
        figure = new(9.0, 6.0)
        grid = figure.subplots(2, 2, sharex="col", sharey="row")
        for i, run in enumerate(drawn):
            look = {"color": COLOURS[i % len(COLOURS)], "linestyle": LINES[i // len(COLOURS) % len(LINES)], "label": run.label}
            _loss(grid[0], run, look)
            _metric(grid[1], run, metric, look | {"marker": MARKERS[i % len(MARKERS)], "markersize": 4})
        grid[0, 0].set_ylabel("training loss")
        grid[1, 0].set_ylabel(f"test {metric.replace('_', ' ')}{' (%)' if metric == 'accuracy' else ''}" if metric else "test loss")
        grid[1, 0].set_xlabel("epochs")
        grid[1, 1].set_xlabel("seconds of training")
        for axes in grid.flat:
            axes.grid(True, color="#DDDDDD", linewidth=0.6)
        handles, labels = grid[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)))
        return save(figure, stem)


def _loss(row: Sequence[Axes], run: Run, look: dict[str, Any]) -> None:
    """Draws a running mean over the steps or, without steps, the training losses of the evaluations."""
    records: Sequence[StepRecord | EvaluationRecord] = run.steps or run.evaluations
    if run.steps:
        losses = smooth([step.loss for step in run.steps])
    else:
        losses = [record.train_loss for record in run.evaluations]
    row[0].plot([record.epoch for record in records], losses, **look, linewidth=1.3)
    row[1].plot([record.seconds for record in records], losses, **look, linewidth=1.3)


def _metric_name(runs: Sequence[Run]) -> str | None:
    """Returns the name of the metric to draw, or None."""
    found = {name for run in runs for record in run.evaluations for name in record.metrics}
    return next((name for name in METRICS if name in found), None)


def _metric(row: Sequence[Axes], run: Run, metric: str | None, look: dict[str, Any]) -> None:
    scale = 100 if metric == "accuracy" else 1
    values = [scale * record.metrics.get(metric, float("nan")) if metric else record.test_loss for record in run.evaluations]
    row[0].plot([record.epoch for record in run.evaluations], values, **look)
    row[1].plot([record.seconds for record in run.evaluations], values, **look)


def smooth(values: Sequence[float]) -> list[float]:
    """Returns the running mean over a twentieth of the values, each with those before it, so that lines do not hide each other."""
    width = max(1, len(values) // 20)
    return [sum(values[max(0, i + 1 - width) : i + 1]) / min(i + 1, width) for i in range(len(values))]
