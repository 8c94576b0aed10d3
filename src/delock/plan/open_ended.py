"""Unrolls a method batch by batch, for a run that does not know when it will end: no tick needs a batch that is yet to come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from delock.methods.base import Method
from delock.ops import Evaluate, Forward, Update
from delock.plan.pattern import Made, patterns
from delock.plan.steps import Plan, RunLength, Step
from delock.plan.unroll import Column

COUNTS = ("batches", "tested", "first")


class OpenPlan:
    """Gives the windows of a run one after the other: one per batch, and for the end one with all that is left.

    They are those of `windows` for a run of as many batches. stages: those whose columns are wanted; the others are empty. After `rest`
    further batches are those of a run that begins with the next one, at the tick of its number, and counts on.
    """

    def __init__(self, method: Method, K: int, clip: float | None = None, stages: Sequence[int] | None = None) -> None:
        self.method, self.K, self.clip = method.fitted(K), K, clip
        self.stages = range(K) if stages is None else stages
        self.batches = self.tested = self.first = 0  # batches of training and of evaluations so far; the first since the last `rest`
        self.made = [Made() for _ in self.stages]
        self.columns = self._columns()

    def batch(self) -> Plan:
        """Returns the steps of the tick at which the next batch comes."""
        self.batches += 1
        return self._ticks(self.batches - 1, self.batches)

    def rest(self) -> Plan:
        """Returns the steps that are left when no further batch comes for now."""
        left = self._ticks(self.batches, self.batches + self.method.span(self.K))
        for made in self.made:
            made.begun = made.version
        self.first = self.batches
        self.columns = self._columns()
        return left

    def evaluation(self, batches: int) -> Plan:
        """Returns steps that evaluate the network on so many batches as it is now, at all stages."""
        first, self.tested = self.tested, self.tested + batches
        return self._plan(
            [
                [Step(Evaluate(b), self.batches, made.version, up=column.pattern.k + 1 < self.K) for b in range(first, self.tested)]
                for column, made in zip(self.columns, self.made, strict=True)
            ]
        )

    def state(self) -> dict[str, Any]:
        """Returns its place, as plain values: `made` by the number of the stage."""
        made = {str(k): [one.version, one.pending, one.begun] for k, one in zip(self.stages, self.made, strict=True)}
        return {"made": made, **{name: getattr(self, name) for name in COUNTS}}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`, or from those of several plans, with `made` of all."""
        for name in COUNTS:
            setattr(self, name, state[name])
        self.made = [Made(*state["made"][str(k)]) for k in self.stages]
        self.columns = self._columns()

    def _columns(self) -> list[Column]:
        return [Column(one, RunLength(1, clip=self.clip)) for one in patterns(self.method, self.K, self.stages)]

    def _ticks(self, begin: int, end: int) -> Plan:
        return self._plan([[*self._steps(*one, begin, end)] for one in zip(self.columns, self.made, strict=True)])

    def _steps(self, column: Column, made: Made, begin: int, end: int) -> Iterator[Step]:
        for tick in range(begin - self.first, end - self.first):
            for t, one, batch, version in column.pattern.at(tick, self.batches - self.first, made):
                step = _since(column.step(one, batch, t, version), made.begun)
                yield _later(step, self.first, self.method.micro_batches)

    def _plan(self, steps: Sequence[Sequence[Step]]) -> Plan:
        drawn = dict(zip(self.stages, map(tuple, steps), strict=True))
        return Plan(tuple(drawn.get(k, ()) for k in range(self.K)))


def _since(step: Step, begun: int) -> Step:
    """Returns the step of a run that began with version `begun`: a Forward uses no weights from before, and draws none out by them."""
    if not begun or not isinstance(step.op, Forward):
        return step
    return replace(step, op=replace(step.op, weights=step.op.weights.since(step.version - begun)))


def _later(step: Step, batches: int, parts: int) -> Step:
    """Returns the step with its tick, batch and slot moved by `batches` batches of `parts` parts."""
    if not batches:
        return step
    if isinstance(step.op, Update):
        return replace(step, tick=step.tick + batches)
    op = replace(step.op, batch=step.op.batch + batches * parts)
    return replace(step, op=op, tick=step.tick + batches, slot=step.slot + batches * parts)
