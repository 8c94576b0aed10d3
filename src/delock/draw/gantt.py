"""Draws schedules on the clock: a row per stage, a box per op; grey is idle time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from delock.draw.figure import BLACK, GREEN, LANE, ORANGE, PALE, PURPLE, SKY, VERMILION, YELLOW, new, save, style
from delock.errors import UsageError
from delock.ops import DERIVATIVES, Backward, Evaluate, Forward, Op, Update
from delock.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

Kind = Literal["forward", "backward", "input gradient", "weight gradient", "backward with replay", "update", "evaluation"]
WIDTH = 9.0  # inches


def gantt(
    timelines: Mapping[str, Timeline],
    stem: str | Path,
    *,
    window: tuple[float, float] | None = None,
    unit: str = "seconds",
) -> list[Path]:
    """Draws one panel per timeline, by title, above each other on one time axis: {"predicted": ..., "measured": ...}.

    window: the stretch to show, in the timelines' unit since the begin of each; by default all of the longest timeline.
    unit: the label of the time axis.
    Writes STEM.png and STEM.svg and returns their paths. Raises UsageError if the timelines hold no op.
    """
    if not any(column for timeline in timelines.values() for column in timeline.columns):
        raise UsageError("there is no op to draw in these timelines")
    left, right = window or (0.0, max(timeline.end - timeline.begin for timeline in timelines.values()))
    rows = [timeline.K for timeline in timelines.values()]
    with style():
        figure = new(WIDTH, 0.75 + sum(0.3 + 0.27 * K for K in rows))
        grid = figure.subplots(len(rows), 1, sharex=True, squeeze=False, height_ratios=[K + 0.4 for K in rows])
        seen: set[Kind] = set()
        for axes, (title, timeline) in zip(grid[:, 0], timelines.items(), strict=True):
            seen |= _panel(axes, title, timeline, left, right)
        grid[-1, 0].set_xlabel(unit)
        figure.legend(handles=_legend(seen), loc="outside upper right", ncols=len(seen) + 1, handlelength=1, columnspacing=1.2)
        return save(figure, stem)


def _panel(axes: Axes, title: str, timeline: Timeline, left: float, right: float) -> set[Kind]:
    """Draws one timeline, and returns the kinds of op that it shows."""
    begin, seen = timeline.begin, set[Kind]()
    axes.set_title(title)
    axes.set_xlim(left, right)
    axes.set_ylim(timeline.K - 0.5, -0.5)
    axes.set_yticks(range(timeline.K), [f"stage {k}" for k in range(timeline.K)])
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    for k, column in enumerate(timeline.columns):
        axes.broken_barh([(0, timeline.end - begin)], (k - 0.4, 0.8), facecolor=LANE)
        shown = [(span, kind) for span, kind in _kinds(column) if span.end - begin >= left and span.start - begin <= right]
        seen |= {kind for _, kind in shown}
        for kind in sorted({kind for _, kind in shown}):
            boxes = [(span.start - begin, span.end - span.start) for span, other in shown if other == kind]
            edge = _colour(kind) if kind == "update" else "white"  # an update may be so short that a white edge would cover it
            axes.broken_barh(boxes, (k - 0.4, 0.8), facecolor=_colour(kind), edgecolor=edge, linewidth=0.8 if kind == "update" else 0.5)
        for span, _ in shown:
            _number(axes, span, begin, left, right)
    return seen


def _number(axes: Axes, span: Span, begin: float, left: float, right: float) -> None:
    """Writes the batch into its box if it fits."""
    if isinstance(span.op, Update):
        return
    text = str(span.op.batch)
    start, end = max(span.start - begin, left), min(span.end - begin, right)
    inches = (end - start) / (right - left) * 0.9 * WIDTH
    size = min(8.0, inches * 72 / (0.7 * len(text) + 0.3))
    if size >= 4.5:
        axes.text((start + end) / 2, span.stage, text, ha="center", va="center_baseline", fontsize=size, color=BLACK, clip_on=True)


def _kinds(column: Iterable[Span]) -> Iterable[tuple[Span, Kind]]:
    """Yields every span with its kind; a replayed Backward is shown as a replay only if an Update came after its Forward."""
    taken: dict[int, int] = {}
    for span in column:
        if isinstance(span.op, Forward) and span.op.train:
            taken[span.op.batch] = span.version
        yield span, _kind(span.op, same_weights=isinstance(span.op, Backward) and taken.get(span.op.batch) == span.version)


def _kind(op: Op, same_weights: bool) -> Kind:
    match op:
        case Forward():
            return "forward"
        case Evaluate():
            return "evaluation"
        case Backward(part="input"):
            return "input gradient"
        case Backward(part="weights"):
            return "weight gradient"
        case Backward(at=at):
            return "backward with replay" if DERIVATIVES[at, same_weights].recomputes else "backward"
        case Update():
            return "update"


def _colour(kind: Kind) -> str:
    match kind:
        case "forward":
            return SKY
        case "backward":
            return ORANGE
        case "input gradient":
            return PURPLE
        case "weight gradient":
            return PALE
        case "backward with replay":
            return VERMILION
        case "update":
            return GREEN
        case "evaluation":
            return YELLOW


def _legend(seen: set[Kind]) -> list[Patch]:
    from matplotlib.patches import Patch

    return [Patch(color=_colour(kind), label=kind) for kind in get_args(Kind) if kind in seen] + [Patch(color=LANE, label="idle")]
