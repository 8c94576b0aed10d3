"""Speed as read off a timeline: the steady period, throughput, idle shares, messages waiting on the links."""

from __future__ import annotations

from collections.abc import Iterable

from delock.ops import Backward, Forward, Op, Update
from delock.plan import gives, received
from delock.timeline.spans import Span, Timeline


def period(timeline: Timeline) -> float:
    """Seconds per Update once the pipeline is warm and before it drains."""
    begin, end, updates = steady(timeline)
    return (end - begin) / updates


def throughput(timeline: Timeline) -> float:
    """(Micro-)batches trained per second once the pipeline is warm and before it drains, as the last stage sees them."""
    begin, end, _ = steady(timeline)
    done = [span for span in timeline.columns[-1] if _trains(span.op) and begin < span.end <= end]
    return len(done) / (end - begin) if end > begin else 0.0


def steady(timeline: Timeline) -> tuple[float, float, int]:
    """(begin, end, updates): the ends of two Updates of the last stage, and how many lie between them (the second included).

    Warm: every stage has begun its first Backward, and a half of what follows is left for transients to die out. Draining: stage 0 has
    done its last Forward. A schedule may repeat only after several updates (FDG with slow links: three), so whole dozens of them are
    taken where there are as many. A timeline too short for that counts from its begin to its last Update.
    """
    warm = max((_first(column, Backward) for column in timeline.columns), default=0.0)
    drain = max((span.end for span in timeline.columns[0] if _forwards(span.op)), default=0.0)
    updates = [span.end for span in timeline.columns[-1] if isinstance(span.op, Update)]
    inside = [end for end in updates if warm <= end <= drain]
    inside = inside[len(inside) // 2 :]
    count = len(inside) - 1
    if count < 1:
        return timeline.begin, max(updates, default=timeline.end), max(1, len(updates))
    count -= count % 12 if count > 12 else 0
    return inside[-1 - count], inside[-1], count


def idle(timeline: Timeline, whole: bool = False) -> list[float]:
    """Share of the steady stretch (or of the whole run) in which each stage did no work."""
    begin, end = (timeline.begin, timeline.end) if whole else steady(timeline)[:2]
    if end <= begin:
        return [0.0] * timeline.K
    return [1 - sum(overlap(span.start, span.end, begin, end) for span in column) / (end - begin) for column in timeline.columns]


def messages(timeline: Timeline) -> list[tuple[int, int]]:
    """Per link, the most activations and the most errors that had been sent and not yet taken at one time."""
    made = {name: span.end for column in timeline.columns for span in column for name in gives(span.stage, span.op)}
    lives: dict[tuple[int, bool], list[tuple[float, float]]] = {}
    for column in timeline.columns:
        for span in column:
            for name in received(span.stage, span.op):
                if name in made:
                    lives.setdefault((min(name[0], span.stage), name[0] < span.stage), []).append((made[name], span.start))
    return [(at_once(lives.get((k, True), [])), at_once(lives.get((k, False), []))) for k in range(timeline.K - 1)]


def at_once(lives: Iterable[tuple[float, float]]) -> int:
    """The most intervals that hold one moment; one that ends as another begins overlaps it, as both need their place."""
    events = sorted(event for begin, end in lives for event in ((begin, -1), (max(begin, end), 1)))
    most = now = 0
    for _, step in events:
        now -= step
        most = max(most, now)
    return most


def _first(column: Iterable[Span], kind: type[Op]) -> float:
    return next((span.start for span in column if isinstance(span.op, kind)), 0.0)


def _forwards(op: Op) -> bool:
    return isinstance(op, Forward) and op.train


def _trains(op: Op) -> bool:
    return isinstance(op, Backward) and op.part != "input"


def overlap(start: float, stop: float, begin: float, end: float) -> float:
    """Seconds that two intervals have in common."""
    return max(0.0, min(stop, end) - max(start, begin))
