"""From a method to a plan: ticks are drawn, what does not happen is left out, and every step learns what later steps need of it."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace

from delock.errors import UsageError
from delock.methods.base import Method
from delock.ops import Backward, Forward, Update
from delock.plan.steps import Keep, Plan, RunLength, Step


def unroll(method: Method, K: int, length: RunLength | int) -> Plan:
    """The whole plan of a short run. `course` may be a number of batches without evaluation."""
    length = RunLength(length) if isinstance(length, int) else length
    return next(windows(method, K, length, size=sys.maxsize))


def windows(method: Method, K: int, length: RunLength, size: int = 256) -> Iterator[Plan]:
    """The run as consecutive plans of `size` ticks; any size gives the same steps.

    A window looks past its end until its Forwards have had their last Backward, `method.span(K)` ticks, because a step says what
    later steps need. Raises UsageError when the method does not fit K stages.
    """
    if K < 1:
        raise UsageError(f"a network cannot be cut into {K} stages; the least is 1")
    if length.batches < 1:
        raise UsageError(f"a run of {length.batches} batches has no plan; the least is 1")
    method.fits(K)
    ticks = length.batches + method.span(K)
    columns = [_Column(method, k, K, length) for k in range(K)]
    drawn = 0
    for start in range(0, ticks, size):
        stop = min(start + size, ticks)
        for t in range(drawn, min(stop + method.span(K), ticks)):
            for column in columns:
                column.draw(t)
        drawn = max(drawn, min(stop + method.span(K), ticks))
        if stop == ticks:
            for column in columns:
                column.finish(ticks)
        yield _annotate(columns, stop if stop < ticks else ticks + 1)


class _Column:
    """One stage's steps as they are drawn from the method, before look-ahead: drops what does not happen, counts versions."""

    def __init__(self, method: Method, k: int, K: int, length: RunLength) -> None:
        self.method, self.k, self.K, self.length = method, k, K, length
        self.end = length.batches * method.parts
        self.every = length.every * method.parts
        self.pending = self.version = self.evaluations = 0
        self.steps: deque[Step] = deque()

    def draw(self, t: int) -> None:
        for op in self.method.tick(t, self.k, self.K):
            match op:
                case Update():
                    if not self.pending:  # warm-up: no step of the optimizer before the first error has come
                        continue
                case Forward(b) | Backward(b):
                    if not 0 <= b < self.end:
                        continue
            if isinstance(op, Forward) and self.every and op.batch and op.batch % self.every == 0:
                self.evaluate(t)
            if isinstance(op, Update) and self.length.clip is not None:
                op = self.clipped(op)
            self.steps.append(Step(op, t, self.version))
            match op:
                case Backward(part="both") | Backward(part="weights"):
                    self.pending += 1
                case Update():
                    self.pending, self.version = 0, self.version + 1

    def clipped(self, op: Update) -> Update:
        if not self.method.synchronous:
            return replace(op, clip=self.length.clip)
        self.steps[-1] = replace(self.steps[-1], sends_norms=True)  # its last Backward
        return replace(op, clip=self.length.clip, over="network", number=self.version)

    def evaluate(self, t: int) -> None:
        first = self.evaluations * self.length.evaluation
        self.steps.extend(Step(Forward(first + i, train=False), t, self.version) for i in range(self.length.evaluation))
        self.evaluations += 1

    def finish(self, t: int) -> None:
        if self.every:
            self.evaluate(t)

    def take(self, stop: int) -> Iterator[Step]:
        while self.steps and self.steps[0].tick < stop:
            yield self.steps.popleft()


def _annotate(columns: Sequence[_Column], stop: int) -> Plan:
    """Take the steps before tick `stop` and tell each what the steps behind it, here and on the neighbours, need of it."""
    forwards = [{step.op for step in column.steps if isinstance(step.op, Forward)} for column in columns]
    backwards = [_backwards(column.steps) for column in columns]
    listeners = [{(op.batch, op.loss) for ops in column.values() for op, _ in ops} for column in backwards]
    taken: list[tuple[Step, ...]] = []
    for k, column in enumerate(columns):
        done: list[Step] = []
        for step in column.take(stop):
            op = step.op
            if isinstance(op, Forward):
                up = k + 1 < len(columns) and op in forwards[k + 1]
                later = backwards[k].get(op.batch, []) if op.train else []
                keep, snapshot = _keep(later, step.version)
                step = replace(step, keep=keep, snapshot=snapshot, up=up)
            elif isinstance(op, Backward):
                last = backwards[k][op.batch][-1][0] == op
                down = k > 0 and (op.batch, op.loss) in listeners[k - 1] and op.part != "weights"
                weights_later = op.part == "input" and any(b.loss == op.loss and b.part == "weights" for b, _ in backwards[k][op.batch])
                step = replace(step, last=last, down=down, weights_later=weights_later)
            done.append(step)
        taken.append(tuple(done))
    return Plan(tuple(taken))


def _backwards(steps: Sequence[Step] | deque[Step]) -> dict[int, list[tuple[Backward, int]]]:
    """Batch -> its Backwards on this stage in order, each with the version at which it happens."""
    found: dict[int, list[tuple[Backward, int]]] = {}
    for step in steps:
        if isinstance(step.op, Backward):
            found.setdefault(step.op.batch, []).append((step.op, step.version))
    return found


def _keep(backwards: Sequence[tuple[Backward, int]], version: int) -> tuple[Keep, bool]:
    """What a Forward at `version` must keep. A replay with no Update in between would redo the same numbers: it keeps the graph."""
    if not backwards:
        return "nothing", False
    crossing = {op.at for op, then in backwards if then > version}
    return ("input" if crossing == {"replay"} else "graph"), "stash" in crossing
