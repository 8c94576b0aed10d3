"""Runs a stage freely: it reads, learns and sends at its own pace, and records its visits, which together are a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from delock.engine.agreement import Wish
from delock.engine.asynchronous.link import FreeLink
from delock.engine.asynchronous.mark import Mark
from delock.engine.engine import Engine
from delock.errors import Stopped
from delock.ops import Backward, Evaluate, Forward, Update
from delock.plan import RunLength, Step
from delock.records import Visit, VisitsRecord

COUNTERS = ("ordinal", "evaluations", "updates", "training")
VISITS, SECONDS = 32, 1.0  # a record is emitted with this number of visits, or this long after the one before


class FreeRun:
    """Runs stage k until all stages have made their updates. `emit` takes the visits, in order, a few at a time.

    A stage that has made its own updates goes on forwarding for those above, no faster than before: its cores may be theirs, too.
    wish(run): asked on stage 0 between two visits: whether the run is to be saved there, and to end. save(mark): saves this stage as it is.
    """

    def __init__(
        self,
        engine: Engine,
        link: FreeLink,
        length: RunLength,
        emit: Callable[[VisitsRecord], None],
        wish: Callable[[FreeRun], Wish] = lambda run: Wish.NOTHING,
        save: Callable[[Mark], None] = lambda mark: None,
    ) -> None:
        self.engine, self.link, self.length, self.emit, self.wish, self.save = engine, link, length, emit, wish, save
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
        """Makes all visits; when this returns every stage is done, and the last evaluation has gone through.

        Raises Stopped, with the visits of stage 0, where the run was saved to end.
        """
        self.engine.log.idle_since = time.perf_counter()
        while self.wanted():
            if self.due:
                self.evaluate()
            elif mark := self.mark():
                self.cut(mark)
            elif (source := self.link.next() if self.k > 0 else self.ordinal) is not None:
                self.visit(source)
        self.link.stop()
        self.report()  # it may wait for hours now
        if self.k == 0 and self.length.every:
            self.evaluate()
        while self.k > 0 and self.link.more():
            if self.due:
                self.evaluate()
            elif mark := self.mark():
                self.cut(mark)
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

    def mark(self) -> Mark | None:
        """Returns the mark of a checkpoint that is to be made now: one that has come, or on stage 0 one that is wished for."""
        if self.k > 0:
            return self.link.due()
        wish = self.wish(self)
        return None if wish is Wish.NOTHING else Mark(self.ordinal, self.updates, wish)

    def cut(self, mark: Mark) -> None:
        """Saves the stage and passes the mark on. Raises Stopped where the run ends."""
        self.report()  # the trace reaches as far as the checkpoint
        self.save(mark)
        self.link.pass_on(mark)
        if mark.wish is Wish.STOP:
            raise Stopped(mark.tick)

    def state(self) -> dict[str, Any]:
        """Returns the numbers of visits, evaluations and updates so far, and how long the visits that trained took."""
        return {name: getattr(self, name) for name in COUNTERS}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`."""
        for name in COUNTERS:
            setattr(self, name, state[name])

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
