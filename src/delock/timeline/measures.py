"""Measures speed on a timeline: the steady period, throughput, idle shares, messages waiting on the links."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from math import inf

from delock.ops import Backward, Forward, Op, Update
from delock.plan import gives, received
from delock.timeline.spans import Timed, Timeline


def period(timeline: Timed) -> float:
    """Returns the seconds per Update after the pipeline is warm and before it drains."""
    begin, end, updates = steady(timeline)
    return (end - begin) / updates


def throughput(timeline: Timed) -> float:
    """Returns the (micro-)batches that the last stage trains per second after the pipeline is warm and before it drains."""
    times = timeline.times
    begin, end, _ = steady(times)
    done = sum(_trains(op) and begin < stop <= end for op, _, stop in times.column(times.K - 1))
    return done / (end - begin) if end > begin else 0.0


def steady(timeline: Timed) -> tuple[float, float, int]:
    """Returns (begin, end, updates): the ends of two Updates of the last stage, and the number of Updates after the first of them.

    The pipeline is warm when every stage has begun its first Backward; then half of the remaining Updates are skipped, for transients to
    die out. It drains after the last Forward of stage 0. A schedule may repeat only after several updates (FDG with slow links: three), so
    the number is a multiple of twelve if there are more than twelve. A timeline that is too short for that counts from its begin to its
    last Update.
    """
    times = timeline.times
    warm = max((_first(times.column(k), Backward) for k in range(times.K)), default=0.0)
    drain = max((stop for op, _, stop in times.column(0) if _forwards(op)), default=0.0)
    updates = [stop for op, _, stop in times.column(times.K - 1) if isinstance(op, Update)]
    inside = [end for end in updates if warm <= end <= drain]
    inside = inside[len(inside) // 2 :]
    count = len(inside) - 1
    if count < 1:
        return times.begin, max(updates, default=times.end), max(1, len(updates))
    count -= count % 12 if count > 12 else 0
    return inside[-1 - count], inside[-1], count


def idle(timeline: Timed, whole: bool = False) -> list[float]:
    """Returns the share of the steady stretch, or of the whole run, in which each stage did no work."""
    times = timeline.times
    begin, end = (times.begin, times.end) if whole else steady(times)[:2]
    if end <= begin:
        return [0.0] * times.K
    return [1 - _work(starts, ends, begin, end) / (end - begin) for starts, ends in zip(times.starts, times.ends, strict=True)]


def messages(timeline: Timeline) -> list[tuple[int, int]]:
    """Returns, per link, the largest numbers of activations and of errors that were sent and not yet taken at one time."""
    made = {name: span.end for column in timeline.columns for span in column for name in gives(span.stage, span.op)}
    lives: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for column in timeline.columns:
        for span in column:
            for name in received(span.stage, span.op):
                if name in made:
                    lives.setdefault((min(name[0], span.stage), name[0] < span.stage), []).append((made[name], span.start))
    return [(at_once(lives.get((k, True), [])), at_once(lives.get((k, False), []))) for k in range(timeline.K - 1)]


def at_once(lives: Sequence[tuple[float, float]]) -> int:
    """Returns the largest number of intervals that hold one moment; one that ends as another begins overlaps it, as both need a place."""
    stops = iter(sorted(map(max, lives)))
    over, stop, most = 0, next(stops, inf), 0
    for begun, begin in enumerate(sorted(begin for begin, _ in lives), 1):
        while stop < begin:
            over, stop = over + 1, next(stops, inf)
        most = max(most, begun - over)
    return most


def _first(column: Iterable[tuple[Op, float, float]], kind: type[Op]) -> float:
    return next((start for op, start, _ in column if isinstance(op, kind)), 0.0)


def _work(starts: Sequence[float], ends: Sequence[float], begin: float, end: float) -> float:
    """Returns the seconds of ops in a stretch."""
    inside = slice(bisect_left(ends, begin), bisect_right(starts, end))
    return sum(overlap(start, stop, begin, end) for start, stop in zip(starts[inside], ends[inside], strict=True))


def _forwards(op: Op) -> bool:
    return isinstance(op, Forward) and op.train


def _trains(op: Op) -> bool:
    return isinstance(op, Backward) and op.part != "input"


def overlap(start: float, stop: float, begin: float, end: float) -> float:
    """Returns the seconds that two intervals have in common."""
    return max(0.0, min(stop, end) - max(start, begin))
