"""Unrolls a method into a plan: repeats its patterns, and adds evaluations and clipping."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

from delock.errors import UsageError
from delock.methods.base import Method
from delock.ops import Evaluate, Forward, Update
from delock.plan.pattern import Pattern, Recurring, patterns
from delock.plan.steps import Plan, RunLength, Step


def unroll(method: Method, K: int, length: RunLength | int) -> Plan:
    """Returns the whole plan of a short run. `length` may be a number of batches without evaluation."""
    length = RunLength(length) if isinstance(length, int) else length
    return next(windows(method, K, length, size=sys.maxsize))


def windows(
    method: Method, K: int, length: RunLength, size: int = 256, stages: Sequence[int] | None = None, *, start: int = 0
) -> Iterator[Plan]:
    """Yields the run as consecutive plans of `size` ticks; any size gives the same steps.

    stages: those whose columns are wanted, by default all; the other columns are empty. start: the tick at which to begin. Raises
    UsageError if the method does not fit K stages.
    """
    if length.batches < 1:
        raise UsageError(f"a run of {length.batches} batches has no plan; the least is 1")
    method, stages = method.fitted(K), range(K) if stages is None else stages
    columns = [column(pattern, length) for pattern in patterns(method, K, stages, length.first)]
    ticks, start = length.batches + method.span(K), max(start, length.first)
    for i, window in enumerate(zip(*(_cut(steps, start, ticks, size) for steps in columns), strict=True)):
        drawn = dict(zip(stages, window, strict=True))
        yield Plan(tuple(drawn.get(k, ()) for k in range(K)), start + i * size)


def rest(method: Method, K: int, length: RunLength, begin: int, stages: Sequence[int] | None = None) -> Plan:
    """Returns all steps of the run from a tick on, as one window. Where a run ends earlier than was planned, its steps so far are these."""
    return next(windows(method, K, length, sys.maxsize, stages, start=begin))


def column(pattern: Pattern, length: RunLength) -> Iterator[Step]:
    """Yields all steps of one stage."""
    return Column(pattern, length).steps()


def _cut(steps: Iterator[Step], start: int, ticks: int, size: int) -> Iterator[tuple[Step, ...]]:
    """Yields the steps of every `size` ticks from `start` on; an evaluation at the end has a tick of its own."""
    waiting = next((step for step in steps if step.tick >= start), None)
    for stop in chain(range(start + size, ticks, size), [ticks + 1]):
        taken = []
        while waiting and waiting.tick < stop:
            taken.append(waiting)
            waiting = next(steps, None)
        yield tuple(taken)


class Column:
    """Makes the steps of one stage."""

    def __init__(self, pattern: Pattern, length: RunLength) -> None:
        self.pattern, self.length = pattern, length
        self.every = length.every * pattern.method.micro_batches
        self.over_network = pattern.method.synchronous and length.clip is not None
        self.tested = 0  # batches of evaluations so far

    def steps(self) -> Iterator[Step]:
        t = version = 0
        for t, one, batch, version in self.pattern.occurrences(self.length.batches):
            if self.every and isinstance(one.op, Forward) and batch and batch % self.every == 0:
                yield from self.evaluation(t, version)
            yield self.step(one, batch, t, version)
        if self.every:
            yield from self.evaluation(self.length.batches + self.pattern.span, version + 1)  # behind the last Update

    def evaluation(self, t: int, version: int) -> Iterator[Step]:
        first, self.tested = self.tested, self.tested + self.length.evaluation
        up = self.pattern.k + 1 < self.pattern.K
        return (Step(Evaluate(b), t, version, up=up) for b in range(first, self.tested))

    def step(self, one: Recurring, batch: int, t: int, version: int) -> Step:
        op = one.of(batch)
        slot = t * self.pattern.method.micro_batches + one.slot
        match op:
            case Forward():
                return Step(op, t, version, *self.pattern.keeps(one, batch), up=one.sent, slot=slot)
            case Update():
                return Step(self.clipped(op, version), t, version, banks=self.pattern.banks)
            case _:
                norms = self.over_network and one.closes
                return Step(op, t, version, last=one.last, down=one.sent, sends_norms=norms, weights_later=one.weights_later, slot=slot)

    def clipped(self, op: Update, version: int) -> Update:
        if self.over_network:
            return replace(op, clip=self.length.clip, over="network", number=version)
        return op if self.length.clip is None else replace(op, clip=self.length.clip)


def sends_errors(method: Method, K: int) -> bool:
    """Returns True if a stage sends an error to the one below: else each learns from the loss of its own head alone."""
    return any(step.down for column in unroll(method, K, 1).columns for step in column)
