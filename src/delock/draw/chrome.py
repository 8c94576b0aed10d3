"""Writes a timeline in Chrome's trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from delock.ops import Backward, Evaluate, Forward, Op, label
from delock.timeline import Span, Timeline

Event = dict[str, Any]
MICRO = 1e6  # the format counts microseconds


def chrome(timeline: Timeline, path: str | Path) -> Path:
    """Writes one thread per stage and returns the path: a box per op with its facts, and a box "wait" before an op that waited.

    Times in the file are microseconds since the timeline's begin.
    """
    place = Path(path)
    events = [event for k in range(timeline.K) for event in _events(timeline, k)]
    place.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}) + "\n", encoding="utf-8")
    return place


def _events(timeline: Timeline, k: int) -> Iterator[Event]:
    yield {"name": "thread_name", "ph": "M", "pid": 0, "tid": k, "args": {"name": f"stage {k}"}}
    for span in timeline.columns[k]:
        if span.waited > 0:
            yield _box("wait", "wait", k, span.start - span.waited - timeline.begin, span.waited, {"for": label(span.op)})
        yield _box(label(span.op), _category(span.op), k, span.start - timeline.begin, span.end - span.start, _facts(span))


def _box(name: str, category: str, k: int, start: float, seconds: float, args: Event) -> Event:
    return {"name": name, "cat": category, "ph": "X", "pid": 0, "tid": k, "ts": MICRO * start, "dur": MICRO * seconds, "args": args}


def _facts(span: Span) -> Event:
    seconds = {"waited_ms": span.waited, "of it for room_ms": span.full, "messages_ms": span.copied}
    facts: Event = {"version": span.version, "tick": span.tick, **{name: 1e3 * value for name, value in seconds.items()}}
    match span.op:
        case Forward(batch, source=source):
            return {"batch": batch, **({} if source is None else {"source": source}), **facts}
        case Evaluate(batch):
            return {"batch": batch, **facts}
        case Backward(batch, loss):
            return {"batch": batch, "loss of stage": loss, **facts}
        case _:
            return facts


def _category(op: Op) -> str:
    return "evaluation" if isinstance(op, Evaluate) else type(op).__name__.lower()
