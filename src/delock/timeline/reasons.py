"""Divides a stage's time: computing, by kind of op, and waiting, by the message it waited for."""

from __future__ import annotations

from collections.abc import Iterable

from delock.ops import Backward, Evaluate, Forward, Op, Update
from delock.timeline.measures import overlap, steady
from delock.timeline.spans import Span, Timeline

KINDS = ("forward", "backward", "update", "copy", "wait: activation", "wait: error", "wait: update", "wait: slot", "between ops")


def reasons(timeline: Timeline) -> list[dict[str, float]]:
    """Returns, per stage, the share of the steady stretch that each of the KINDS took; they add up to 1.

    "copy" is time for laying out, encoding and decoding messages. "wait: slot" is time in which a link was full. "between ops" is the rest,
    outside all ops: the engine, garbage collection, other programs; in a simulated timeline it is 0.
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
    """Returns the kind as which an op is counted, and the message for which it waits."""
    match op:
        case Forward() | Evaluate():
            return "forward", "activation"
        case Backward():
            return "backward", "error"
        case Update():
            return "update", "update"
