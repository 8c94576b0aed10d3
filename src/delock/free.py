"""A free-running stage: at its own pace it reads, learns and sends, and records what it did as a plan."""

from __future__ import annotations

import time
from collections.abc import Callable

from delock.engine import Engine
from delock.links.free import FreeLink
from delock.methods.dgl_async import AsyncDGL
from delock.ops import Backward, Forward, Update
from delock.plan import Course, Step
from delock.records import Turn, TurnsRecord

TOGETHER = 32  # turns in a record


class FreeRun:
    """Stage k until all stages have made their updates. `emit` is given the turns, in order, a few at a time."""

    def __init__(self, engine: Engine, link: FreeLink, method: AsyncDGL, course: Course, emit: Callable[[TurnsRecord], None]) -> None:
        self.engine, self.link, self.method, self.course, self.emit = engine, link, method, course, emit
        self.k, self.up = engine.stage.k, engine.stage.k + 1 < engine.stage.K
        self.visits = self.evaluations = self.updates = 0
        self.turns: list[Turn] = []

    def run(self) -> None:
        """All turns; when this returns every stage is done, and the last evaluation has gone through."""
        while not (self.updates == self.course.batches and self.link.stopped):
            if self.k == 0:
                if self.due:
                    self.evaluate_all()
                self.visit(self.visits)
            elif entry := self.link.next():
                self.visit(entry.ordinal)
            else:
                self.evaluate()
        self.link.stop()
        if self.k == 0 and self.course.every:
            self.evaluate_all()
        while self.k > 0 and self.link.evaluation():
            self.evaluate()
        self.hand_over()

    @property
    def due(self) -> bool:
        """Whether stage 0 evaluates before its next batch."""
        every = self.course.every
        return bool(every) and 0 < self.updates < self.course.batches and self.updates % every == 0

    def visit(self, source: int) -> None:
        """Forward, and as long as there are updates to make, Backward and Update; a slowed stage takes longer."""
        trains, start = self.updates < self.course.batches, time.perf_counter()
        sent = self.up and self.link.ready
        n, version = self.visits, self.updates
        forward = Forward(n, trains, source)
        self.engine.execute(Step(forward, n, version, keep="graph" if trains else "nothing", up=sent))
        if trains:
            self.engine.execute(Step(Backward(n, loss=self.k), n, version, last=True))
            self.engine.execute(Step(Update(clip=self.course.clip), n, version))
        end = time.perf_counter()
        time.sleep((self.method.slowdown(self.k) - 1) * (end - start))
        self.visits += 1
        self.updates += trains
        self.note(Turn(n, source, trains, version, sent=sent, start=start, end=end))

    def evaluate_all(self) -> None:
        """The whole test set, from stage 0."""
        for _ in range(self.course.evaluation):
            self.evaluate()

    def evaluate(self) -> None:
        """One batch of an evaluation."""
        i, start = self.evaluations, time.perf_counter()
        self.engine.execute(Step(Forward(i, train=False), self.visits, self.updates, up=self.up))
        self.evaluations += 1
        self.note(Turn(i, -1, False, self.updates, evaluates=True, sent=self.up, start=start, end=time.perf_counter()))

    def note(self, turn: Turn) -> None:
        """Put a turn on record."""
        self.turns.append(turn)
        if len(self.turns) == TOGETHER:
            self.hand_over()

    def hand_over(self) -> None:
        """Emit the turns that have not been."""
        if self.turns:
            self.emit(TurnsRecord(self.k, tuple(self.turns)))
        self.turns = []
