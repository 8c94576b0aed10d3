"""Where a stage's time went: computing, by kind, and idle, by what it waited for."""

from __future__ import annotations

from collections.abc import Iterable

from delock.ops import Backward, Forward, Update
from delock.timeline.measures import steady
from delock.timeline.spans import Span, Timeline

KINDS = ("forward", "backward", "update", "wait: activation", "wait: error", "wait: update", "between ops")


def reasons(timeline: Timeline) -> list[dict[str, float]]:
    """Per stage the shares of the steady stretch, which add up to 1: the KINDS above.

    "between ops" is what no op accounts for: the engine, garbage, other programs; of a simulated timeline nothing.
    """
    begin, end = steady(timeline)[:2]
    return [_shares(column, begin, end) for column in timeline.columns]


def _shares(column: Iterable[Span], begin: float, end: float) -> dict[str, float]:
    found = dict.fromkeys(KINDS, 0.0)
    for span in column:
        found[_kind(span)] += _overlap(span.start, span.end, begin, end)
        found[f"wait: {_awaited(span)}"] += _overlap(span.start - span.waited, span.start, begin, end)
    found["between ops"] = max(0.0, end - begin - sum(found.values()))
    return {kind: seconds / (end - begin) if end > begin else 0.0 for kind, seconds in found.items()}


def _kind(span: Span) -> str:
    match span.op:
        case Forward():
            return "forward"
        case Backward():
            return "backward"
        case Update():
            return "update"


def _awaited(span: Span) -> str:
    match span.op:
        case Forward():
            return "activation"
        case Backward():
            return "error"
        case Update():
            return "update"


def _overlap(start: float, stop: float, begin: float, end: float) -> float:
    return max(0.0, min(stop, end) - max(start, begin))
