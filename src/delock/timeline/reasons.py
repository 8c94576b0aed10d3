"""Where a stage's time went: computing, by kind, and idle, by what it waited for."""

from __future__ import annotations

from collections.abc import Iterable

from delock.ops import Backward, Forward, Op, Update
from delock.timeline.measures import overlap, steady
from delock.timeline.spans import Span, Timeline

KINDS = ("forward", "backward", "update", "copy", "wait: activation", "wait: error", "wait: update", "wait: slot", "between ops")


def reasons(timeline: Timeline) -> list[dict[str, float]]:
    """Per stage the shares of the steady stretch, which add up to 1: the KINDS above.

    "copy" is what laying out, encoding and decoding messages takes, "wait: slot" what a full link does. "between ops" is what no op
    accounts for: the engine, garbage, other programs; of a simulated timeline nothing.
    """
    begin, end = steady(timeline)[:2]
    return [_shares(column, begin, end) for column in timeline.columns]


def _shares(column: Iterable[Span], begin: float, end: float) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    for span in column:
        kind, awaited = _names(span.op)
        inside = overlap(span.start, span.end, begin, end)
        copied = inside * span.copied / (span.end - span.start) if inside else 0.0
        found[kind] += inside - copied
        found["copy"] += copied
        arrived = span.start - span.waited + span.full
        found["wait: slot"] += overlap(span.start - span.waited, arrived, begin, end)
        found[f"wait: {awaited}"] += overlap(arrived, span.start, begin, end)
    found["between ops"] = max(0.0, end - begin - sum(found.values()))
    return {kind: seconds / (end - begin) if end > begin else 0.0 for kind, seconds in found.items()}


def _names(op: Op) -> tuple[str, str]:
    """What an op is counted as, and what it waits for."""
    match op:
        case Forward():
            return "forward", "activation"
        case Backward():
            return "backward", "error"
        case Update():
            return "update", "update"
