"""Saves a stage at the ticks that all stages agree on: it copies at once, a thread writes behind, and nobody waits for the others.

Stages that run freely agree on no tick: see `free_checkpointing`.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event as Flag
from threading import Thread
from traceback import format_exception_only
from typing import Any

from safetensors import SafetensorError

from delock.checkpoints.directory import Writer, name_of, prune
from delock.checkpoints.encoding import copied, encode
from delock.engine.agreement import Agreement, Wish
from delock.engine.engine import Engine
from delock.engine.feed import Feed
from delock.engine.log import StageLog
from delock.errors import Stopped, UsageError
from delock.links.traffic import ByteCounts, SentBytes
from delock.options import Checkpoint
from delock.plan import Step
from delock.records import CheckpointRecord, EvaluationRecord, Event
from delock.run.acting import Acting, measures_of
from delock.run.history import History
from delock.run.job import StageJob
from delock.run.survival import parts, restage
from delock.run.survival.made_with import made_with
from delock.stage import Stage, checkpoint

PROBLEMS = (OSError, UsageError, SafetensorError)


@dataclass
class Part:
    """Holds this stage's part of a checkpoint that is being written."""

    come: Flag  # the last message that was under way has come
    thread: Thread = field(default_factory=Thread)
    given_up: bool = False


@dataclass(frozen=True)
class Instant:
    """Names a checkpoint: the tick before which every stage is saved, the batches that stage 0 has begun, and if the run ends there."""

    tick: int
    batches: int
    last: bool = False


class Saver:
    """The part of a stage in checkpoints: reading the one that the run goes on from, and writing others behind.

    `asked()`: on stage 0, whether the run is to be saved and to end. A stage whose last part is complete and not on disk yet waits for
    that, so that copies do not pile up.
    """

    def __init__(
        self,
        job: StageJob,
        engine: Engine,
        feed: Feed | None,
        log: StageLog,
        history: History,
        emit: Callable[[Event], None],
        asked: Callable[[], bool],
        acting: Acting | None,
    ) -> None:
        assert job.checkpoint is not None
        self.acting = acting
        self.job, self.engine, self.feed, self.log, self.history, self.emit = job, engine, feed, log, history, emit
        self.options: Checkpoint = job.checkpoint
        self.asked = asked
        self.made_with = made_with(engine.stage.device)
        self.latest = job.begin.tick if job.begin else 0  # tick of the last one
        self.since = time.monotonic()
        self.parts: list[Part] = []
        self.news: deque[CheckpointRecord] = deque()  # of threads, to be told by the stage's own
        self.begun: dict[str, Any] = {}  # the rest of the checkpoint that the run goes on from

    def begin(self) -> None:
        """Goes on from a checkpoint, if the run does. Raises UsageError for state that cannot be kept, and for another optimizer."""
        job, stage = self.job, self.engine.stage
        if job.restages:
            restage.take_over(job, stage, self.history, self.feed)
        elif job.begin:
            state, rest = parts.load(Path(job.begin.path), job.k, job.names, stage.device)
            self.begun = rest
            self.engine.load(state)
            self.log.load(rest["log"])
            self.history.load(rest["history"])
            _load_counts(self.engine.link.sent, rest["sent"])
            if self.feed and rest["data"] is not None:
                self.feed.load(rest["data"])
            if self.acting:
                self.acting.load(rest["acting"])
        _refuse_unsavable(stage)  # now, and not when a checkpoint is due
        if self.feed:
            self.feed.kept = True

    def save_now(self, tick: int, beside: Mapping[str, Any]) -> list[CheckpointRecord]:
        """Saves the stage between two windows, and `beside`; every stage is asked at this tick.

        The stage that is the last to write returns a record of it; one that cannot write returns the problem.
        """
        began = time.perf_counter()
        state, rest = copied(self.engine.state(), f"stage {self.job.k}"), {**self._rest(), **beside}
        self._write(Instant(tick, tick), state, rest, began)
        told = [*self.news]
        self.news.clear()
        return told

    def tell(self) -> None:
        """Emits the records of what was written."""
        while self.news:
            self.emit(self.news.popleft())

    def close(self) -> None:
        """Waits at the end of a run until everything is written."""
        self._wait(lambda part: True)
        self.tell()

    def abandon(self) -> None:
        """Gives up what cannot be completed any more, after a failure."""
        for part in self.parts:
            part.given_up = not part.come.is_set()
            part.come.set()
        self._wait(lambda part: True)

    def _wait(self, wanted: Callable[[Part], bool]) -> None:
        """Waits for the threads of some parts, which may take any time."""
        with self.engine.progress.aside() if self.engine.progress else nullcontext():
            for part in self.parts:
                if wanted(part):
                    part.thread.join()

    def _behind(self, come: Flag, write: Callable[[], None]) -> None:
        """Lets a thread write a part once the last message that was under way has come."""
        part = Part(come)
        part.thread = Thread(target=self._late, args=(part, write), daemon=True)
        self.parts = [*(one for one in self.parts if one.thread.is_alive()), part]
        part.thread.start()

    def _late(self, part: Part, write: Callable[[], None]) -> None:
        part.come.wait()
        if not part.given_up:
            write()

    def _write(self, instant: Instant, state: Mapping[str, Any], rest: Mapping[str, Any], began: float) -> None:
        folder, job = Path(self.options.folder), self.job
        writer = Writer(folder, instant.tick, job.k, job.K)
        shared: dict[str, Any] = {"tick": instant.tick, "batches": instant.batches, "first": job.length.first}
        shared |= {"made_with": self.made_with, "options": job.conditions}
        try:
            parts.write(writer, state, rest, job.names)
            known = _known(rest["history"], next(iter(job.tests), "")) if job.k == job.K - 1 else {}
            whole = writer.done(state["stage"]["learner"]["version"], shared, known)
            if whole:
                prune(folder, self.options.keep, self.options.judged)
                took = time.perf_counter() - began
                self.news.append(CheckpointRecord(instant.batches, str(writer.final), whole.size, took, last=instant.last))
        except Exception as error:  # also of a thread, which has nobody else to tell
            self._fail(instant, error)

    def _fail(self, instant: Instant, error: Exception) -> None:
        """Lets it be told that a checkpoint could not be written."""
        what = str(error) if isinstance(error, PROBLEMS) else "".join(format_exception_only(error)).strip()
        path = str(Path(self.options.folder) / name_of(instant.tick))
        self.news.append(CheckpointRecord(instant.batches, path, problem=f"stage {self.job.k}: {what}", last=instant.last))

    def _came_due(self, batches: int) -> bool:
        """Returns True if the next checkpoint is due after `batches` batches, or by the clock."""
        every, seconds = self.options.batches, self.options.seconds
        return bool(every and batches // every > self.latest // every) or bool(seconds and time.monotonic() - self.since >= seconds)

    def _rest(self) -> dict[str, Any]:
        """Returns what a checkpoint needs beside the engine's state, as values that do not change any more."""
        sent = {peer: asdict(counts) for peer, counts in self.engine.link.sent.to.items()}
        data = self.feed.state() if self.feed else None
        return {
            "log": self.log.state(),
            "history": self.history.state(),
            "sent": sent,
            "data": data,
            "made": self.engine.stage.learner.made,
            "acting": self.acting.state() if self.acting else None,
        }


class AgreedSaver(Saver, Agreement):
    """Saves a stage of a planned run at the ticks that all agree on."""

    def __init__(self, job: StageJob, *rest: Any) -> None:
        Saver.__init__(self, job, *rest)
        Agreement.__init__(self, job.method, job.k, job.K, self._wanted, self._save)

    def reached(self, step: Step) -> None:
        """Tells what threads have done, and acts if the agreed tick has come."""
        self.tell()
        super().reached(step)

    def _wanted(self, tick: int) -> Wish:
        """Says what stage 0 wants of that tick. Only up to the last batch has every stage something to do at it or behind it."""
        if tick >= self.job.length.batches:
            return Wish.NOTHING
        if self.asked():
            return Wish.STOP
        if not self._due(tick):
            return Wish.NOTHING
        self.latest, self.since = tick, time.monotonic()
        return Wish.SAVE

    def _due(self, tick: int) -> bool:
        every = self.job.length.every
        then, now = (at - 1 - self.reach for at in (self.latest, tick))  # behind an evaluation, as soon as the last stage has made it
        return self._came_due(tick) or (bool(self.options.best and every) and now // every > max(0, then // every))

    def _save(self, tick: int, wish: Wish) -> None:
        if wish is Wish.STOP:
            raise Stopped(tick)
        began = time.perf_counter()
        self._wait(lambda part: part.come.is_set())
        try:
            recorded, rest = self.engine.record(tick), self._rest()
        except UsageError as error:  # what could be kept at first, and cannot any more
            self._fail(Instant(tick, tick), error)
            return
        self._behind(recorded.late.done, lambda: self._write(Instant(tick, tick), recorded.state(), rest, began))
        self.log.seconds["saving"] += time.perf_counter() - began

    def finish(self, tick: int) -> None:
        """Saves a run that ends at an agreed tick; every stage is asked."""
        began = time.perf_counter()
        state, rest = self.engine.halt(tick), self._rest()
        self._wait(lambda part: True)
        self._write(Instant(tick, tick, last=True), state, rest, began)
        self.tell()


def _refuse_unsavable(stage: Stage) -> None:
    """Raises UsageError for state that no checkpoint can keep, as far as it can be seen before the first update."""
    state = checkpoint.state(stage)
    encode(state["learner"], f"the optimizer of stage {stage.k}")
    encode(stage.learner.first_state(), f"the optimizer of stage {stage.k}, after its first step,")
    for part in ("module", "head", "volatile"):
        encode(state[part], f"the {part if part == 'head' else 'network'} of stage {stage.k}")
    encode(state["loss"], "the loss")


def _load_counts(sent: SentBytes, saved: Mapping[int, Mapping[str, int]]) -> None:
    for peer, counts in saved.items():
        sent.to[peer] = ByteCounts(**counts)


def _known(history: Mapping[str, Any], first: str) -> dict[str, Any]:
    """Returns what the last stage alone knows: batches whose losses it has seen, and the measures of the last evaluation.

    first: the name of the first of several test sets, whose measures are found without it, too.
    """
    evaluations = history["evaluations"]
    last = measures_of(EvaluationRecord(**evaluations[-1]), first) if evaluations else {}
    counts = {"trained": len(history["losses"]), "evaluations": len(evaluations)}
    return {**counts, "measures": {name: value for name, value in last.items() if math.isfinite(value)}}
