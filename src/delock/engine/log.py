"""The log of a stage: its time by kind, the staleness of its batches, and spans."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from delock.ops import Backward, Evaluate, Forward, Update
from delock.plan import Step
from delock.timeline import Span


@dataclass(slots=True)
class OpTime:
    """Seconds of an op that were not computing."""

    waited: float = 0.0  # for messages, and for room in a link
    full: float = 0.0  # of these, for room
    copied: float = 0.0  # on laying out, encoding and decoding messages


class StageLog:
    """Adds up the time of one stage by kind, and counts the staleness of its batches; keeps every op as a span if `spans` is given."""

    def __init__(self, *, spans: list[Span] | None = None) -> None:
        self.spans = spans
        self.seconds = dict.fromkeys(("forward", "backward", "update", "waiting", "evaluation", "saving"), 0.0)
        self.staleness: Counter[int] = Counter()
        self.layer_staleness: Counter[int] = Counter()
        self.first: float | None = None
        self.last = 0.0
        self.before = 0.0  # seconds of the run until it was interrupted, from its first op on
        self.idle_since: float | None = None  # since when the stage has waited for something to do; it ends with the op to come

    def op(self, k: int, step: Step, version: int, start: float, end: float, spent: OpTime) -> None:
        """Notes an op that took place at a version of the weights, from `start` to `end`; `spent`: of that, what was not computing."""
        waited = spent.waited
        if self.idle_since is not None:
            start, waited, self.idle_since = self.idle_since, waited + start - self.idle_since, None
        self.first = start - self.before if self.first is None else self.first
        self.last = end
        kind = kind_of(step)
        self.seconds[kind] += end - start - (0.0 if kind == "evaluation" else waited)
        self.seconds["waiting"] += 0.0 if kind == "evaluation" else waited
        if self.spans is not None:
            self.spans.append(Span(k, step.op, start + waited, end, version, step.tick, waited, spent.full, spent.copied, step.slot))

    def state(self) -> dict[str, Any]:
        """Returns all but the spans and the moments, as plain values."""
        histograms = {"staleness": dict(self.staleness), "layer_staleness": dict(self.layer_staleness)}
        return {"seconds": dict(self.seconds), "took": self.last - self.first if self.first is not None else self.before, **histograms}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`, before the first op."""
        self.seconds, self.before = dict(state["seconds"]), state["took"]
        self.staleness, self.layer_staleness = Counter(state["staleness"]), Counter(state["layer_staleness"])

    def count_staleness(self, updates: int, batches: int) -> None:
        """Counts a (micro-)batch whose last Backward is done: its gradient is `updates` old, its Forward was `batches` ago."""
        self.staleness[updates] += 1
        self.layer_staleness[batches] += 1


def kind_of(step: Step) -> str:
    """Returns the kind of time that an op counts as."""
    match step.op:
        case Forward():
            return "forward"
        case Evaluate():
            return "evaluation"
        case Backward():
            return "backward"
        case Update():
            return "update"
