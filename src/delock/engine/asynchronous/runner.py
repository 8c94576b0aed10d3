"""Runs a stage freely: it reads, learns and sends at its own pace, and records its visits, which together are a plan."""

from __future__ import annotations

import time
from collections.abc import Callable

from delock.engine.asynchronous.link import FreeLink
from delock.engine.engine import Engine
from delock.ops import Backward, Evaluate, Forward, Update
from delock.plan import RunLength, Step
from delock.records import Visit, VisitsRecord

VISITS, SECONDS = 32, 1.0  # a record is emitted with this number of visits, or this long after the one before


class FreeRun:
    """Runs stage k until all stages have made their updates. `emit` takes the visits, in order, a few at a time.

    A stage that has made its own updates goes on forwarding for those above, no faster than before: its cores may be theirs, too.
    """

    def __init__(self, engine: Engine, link: FreeLink, length: RunLength, emit: Callable[[VisitsRecord], None]) -> None:
        self.engine, self.link, self.length, self.emit = engine, link, length, emit
        self.k, self.up = engine.stage.k, engine.stage.k + 1 < engine.stage.K
        self.ordinal = self.evaluations = self.updates = 0  # numbers of the next visit, evaluation and update
        self.begun = self.training = 0.0  # when the last visit began, and seconds of all visits that trained
        self.unreported: list[Visit] = []
        self.reported = time.perf_counter()

    @property
    def done(self) -> bool:
        """True if the stage has made its updates."""
        return self.updates == self.length.batches

    def run(self) -> None:
        """Makes all visits; when this returns every stage is done, and the last evaluation has gone through."""
        self.engine.log.idle_since = time.perf_counter()
        while self.wanted():
            if self.due:
                self.evaluate()
            elif (source := self.link.next() if self.k > 0 else self.ordinal) is not None:
                self.visit(source)
        self.link.stop()
        if self.k == 0 and self.length.every:
            self.evaluate()
        while self.k > 0 and self.link.evaluation():
            self.evaluate()
        self.report()

    def wanted(self) -> bool:
        """True if this stage has updates to make, or a stage above has; for one above, waits until it is time to go on."""
        if self.done:
            self.link.pause(self.begun + self.training / self.updates)
        return not (self.done and self.link.stopped)

    @property
    def due(self) -> bool:
        """True if an evaluation comes before the next batch; stage 0 says when."""
        every = self.length.every
        return self.link.evaluates or (self.k == 0 and bool(every) and not self.done and self.updates // every > self.evaluations)

    def visit(self, source: int) -> None:
        """Makes a visit: Forward, and as long as there are updates to make, Backward and Update."""
        trains, self.begun = not self.done, time.perf_counter()
        sent = self.up and self.link.ready
        n, version = self.ordinal, self.updates
        forward = Forward(n, trains, source)
        self.engine.execute(Step(forward, n, version, keep="graph" if trains else "nothing", up=sent))
        if trains:
            self.engine.execute(Step(Backward(n, loss=self.k), n, version, last=True))
            self.engine.execute(Step(Update(clip=self.length.clip), n, version))
        end = time.perf_counter()
        self.ordinal += 1
        self.updates += trains
        self.training += trains * (end - self.begun)
        self.note(Visit(n, source, trains, version, sent=sent, start=self.begun, end=end))

    def evaluate(self) -> None:
        """Evaluates the whole test set at the newest weights."""
        first = self.evaluations * self.length.evaluation
        for i in range(first, first + self.length.evaluation):
            start = time.perf_counter()
            self.engine.execute(Step(Evaluate(i), self.ordinal, self.updates, up=self.up))
            self.note(Visit(i, -1, False, self.updates, evaluates=True, sent=self.up, start=start, end=time.perf_counter()))
        self.evaluations += 1

    def note(self, visit: Visit) -> None:
        """Puts a visit on record; from now on the stage waits for the next one."""
        self.engine.log.idle_since = now = time.perf_counter()
        self.unreported.append(visit)
        if len(self.unreported) == VISITS or now - self.reported > SECONDS:
            self.report()

    def report(self) -> None:
        """Emits the visits that have not been emitted."""
        if self.unreported:
            self.emit(VisitsRecord(self.k, tuple(self.unreported)))
        self.unreported, self.reported = [], time.perf_counter()
