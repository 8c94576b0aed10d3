"""Saves a stage that runs freely: at a mark that came from below, between two of its visits, with its replay buffer."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Event as Flag
from typing import Any

from delock.checkpoints.directory import read
from delock.engine.agreement import Wish
from delock.engine.asynchronous.mark import Mark
from delock.engine.asynchronous.runner import FreeRun
from delock.run.job import StageJob
from delock.run.survival.checkpointing import Instant, Saver


class FreeSaver(Saver):
    """Is asked by stage 0 before every visit, and saves a stage when its mark has come. Call `follow` before the first visit."""

    def __init__(self, job: StageJob, *rest: Any) -> None:
        super().__init__(job, *rest)
        self.run: FreeRun | None = None
        self.visits = self.evaluations = 0  # of stage 0, when the last checkpoint was made

    def follow(self, run: FreeRun) -> None:
        """Is asked by this run from now on; it goes on from the checkpoint, if there is one."""
        self.run, run.wish, run.save = run, self.wish, self.save
        if self.job.begin:
            run.load(read(Path(self.job.begin.path), "visits", self.job.k)["counters"])
        self._note(run)

    def wish(self, run: FreeRun) -> Wish:
        """Says what stage 0 wants between two of its visits, and tells what threads have done."""
        self.tell()
        if run.ordinal == self.visits:  # two marks without a visit between them would be one checkpoint by name
            return Wish.NOTHING
        if self.asked():
            return Wish.STOP
        judged = self.options.best is not None and run.evaluations > self.evaluations
        if not (judged or self._came_due(run.updates)):
            return Wish.NOTHING
        self._note(run)
        return Wish.SAVE

    def _note(self, run: FreeRun) -> None:
        self.latest, self.visits, self.evaluations, self.since = run.updates, run.ordinal, run.evaluations, time.monotonic()

    def save(self, mark: Mark) -> None:
        """Copies the stage as it is, and lets a thread write it."""
        began = time.perf_counter()
        self.tell()
        self._wait(lambda part: True)
        state, rest = {**self.engine.copy(), "in_flight": {}}, {**self._rest(), "visits": self._visits()}
        come = Flag()
        come.set()  # what is under way is left out
        instant = Instant(mark.tick, mark.batches, last=mark.wish is Wish.STOP)
        self._behind(come, lambda: self._write(instant, state, rest, began))
        took = time.perf_counter() - began
        self.log.seconds["saving"] += took
        if self.log.idle_since is not None:
            self.log.idle_since += took  # it has not waited meanwhile

    def _visits(self) -> dict[str, Any]:
        run = self.run
        assert run is not None
        held = [entry.ordinal for entry in run.link.buffer.entries]
        return {"counters": run.state(), "evaluated": run.evaluations * run.length.evaluation, "held": held}
