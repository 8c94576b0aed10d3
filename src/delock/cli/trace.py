"""Keeps the trace of a run: the measured timeline for Perfetto, a picture of it below the predicted one, and the shares of time."""

from __future__ import annotations

from delock.cli.config import make_method
from delock.cli.run_folder import TIMELINE, RunFolder
from delock.cli.summary import RunReport
from delock.cli.tables import Cells, percent1
from delock.cli.terminal import Terminal
from delock.draw import chrome, gantt
from delock.plan import unroll
from delock.records import Started
from delock.timeline import KINDS, Costs, Timeline, capacities, period, reasons, simulate, steady

SHOWN = 3  # batches of backpropagation that fit into the picture


def keep(report: RunReport, folder: RunFolder, screen: Terminal) -> None:
    """Writes and shows the trace of a run that has finished."""
    assert report.result is not None
    assert report.started is not None
    measured = Timeline(report.result.spans)
    written = [chrome(measured, folder.path / TIMELINE)]
    panels = {"measured": _from(measured, steady(measured)[0])}
    if report.started.workers != "inline":
        predicted = forecast(report, report.started)
        panels = {"predicted": _from(predicted, steady(predicted)[0]), **panels}
    written += gantt(panels, folder.path / "timeline", window=(0.0, SHOWN * _batch(report.started)))
    screen.line("\nwhere the time of the steady stretch went, per stage:")
    screen.table(*_table(measured))
    screen.line(f"timeline: {written[0]} (open it in ui.perfetto.dev), {written[1]}")


def forecast(report: RunReport, started: Started) -> Timeline:
    """Returns the plan on the clock, with the costs measured before the run; free-running stages as if they waited for each other."""
    method, K = make_method(report.config.algorithm), len(started.stages)
    batches = min(started.batches, 2 * method.span(K) + 12)
    scale = [method.slowdown(k) for k in range(K)]
    forward, backward, head = (
        tuple(s * getattr(stage, name) for s, stage in zip(scale, started.stages, strict=True)) for name in ("forward", "backward", "head")
    )
    costs = Costs(forward, backward, head=head, capacity=capacities(method, K), slow=started.slow)
    return simulate(unroll(method, K, batches), costs)


def _from(timeline: Timeline, begin: float) -> Timeline:
    """Returns the spans that end after a moment."""
    return Timeline(tuple(tuple(span for span in column if span.end > begin) for column in timeline.columns))


def _batch(started: Started) -> float:
    """Returns the seconds of a batch in all stages, one after the other."""
    return sum(stage.forward + stage.backward + stage.head for stage in started.stages)


def _table(timeline: Timeline) -> tuple[Cells, list[Cells]]:
    shares = reasons(timeline)
    shown = [kind for kind in KINDS if any(share[kind] > 0 for share in shares)]
    head = ["stage", *(kind.replace(" ", "\n", 1) for kind in shown)]
    rows = [[str(k), *(percent1(share[kind]) for kind in shown)] for k, share in enumerate(shares)]
    return head, [*rows, ["", f"{1000 * period(timeline):.1f} ms per update", *[""] * (len(shown) - 1)]]
