"""A run as captured ticks: every tick of a period is recorded once; then per tick a batch is copied in, replayed, and accounted for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from time import perf_counter
from typing import Any

from torch import Tensor

from delock.engine.engine import Engine
from delock.engine.graphs.period import Period, Phase
from delock.engine.graphs.static_stage import StaticStage, random_state, refuse_draws
from delock.engine.graphs.streams import Streams, Work
from delock.errors import UsageError
from delock.links.message import Message
from delock.ops import DERIVATIVES, Backward, Evaluate, Forward, Op, Update
from delock.plan import Plan, Step, walk
from delock.stage import InFlight

WARM_UP = 3  # passes through all slots before anything is recorded: libraries choose their kernels, optimizers make their state


class Ticks:
    """All stages of a run on one device. `engines` give stage, feed and log of each, and do the evaluations, between ticks.

    every: batches between two looks at the losses, each of which waits for the device; batches: of the whole run. Raises UsageError if
    the run ends within the group of batches of an Update.
    """

    def __init__(self, engines: Sequence[Engine], period: Period, streams: Streams, *, batches: int, every: int = 1) -> None:
        if left := batches % period.group:
            raise UsageError(f"captured ticks take {period.group} batches an update, so {batches} batches leave {left}: train {left} fewer")
        self.engines, self.period, self.streams, self.batches, self.every = engines, period, streams, batches, every
        self.stages = [StaticStage(engine.stage, period.group) for engine in engines]
        self.recorded: list[list[Work]] = []  # per tick of the period, its phases
        self.ahead: list[dict[int, Step]] = [{} for _ in engines]  # per stage: batch -> its Forward
        self.losses: list[tuple[Engine, Step, Tensor]] = []  # not looked at yet

    def run(self, plan: Plan) -> None:
        """Executes a plan, or the next window of one. Raises NonFinite, and UsageError for a batch of another shape."""
        for t, steps in groupby(walk(plan), key=lambda pair: pair[1].tick):
            self._tick(t, list(steps))
        self._look()

    def _tick(self, t: int, steps: list[tuple[int, Step]]) -> None:
        training = [(k, step) for k, step in steps if not isinstance(step.op, Evaluate)]
        for k, step in steps:
            if isinstance(step.op, Evaluate):
                self._look()
                self.engines[k].execute(step)
        if training:
            self._feed(training)
            self._replay(t, {(k, type(step.op)) for k, step in training})
        for k, step in training:
            self._account(k, step)

    def _feed(self, steps: list[tuple[int, Step]]) -> None:
        """Copies in the batch that stage 0 forwards in this tick; the very first one is also what everything is recorded with."""
        feed = self.engines[0].feed
        assert feed is not None
        for k, step in steps:
            if k == 0 and isinstance(step.op, Forward):
                message = feed(step.op)
                if not self.recorded:
                    self._record(message)
                self.stages[0].inputs.put(step.op.batch % self.period.slots, message)

    def _replay(self, t: int, done: set[tuple[int, type[Op]]]) -> None:
        """Replays a tick; `done`: the ops, by stage, that are to take place. The effects of others are undone."""
        with ExitStack() as undoing:
            for k, stage in enumerate(self.stages):
                undoing.enter_context(stage.without(forward=(k, Forward) not in done, backward=(k, Backward) not in done))
            for replay in self.recorded[t % self.period.slots]:
                replay()

    def _account(self, k: int, step: Step) -> None:
        """Notes on the host what an op that was issued does."""
        engine, stage, op = self.engines[k], self.stages[k], step.op
        match op:
            case Forward(b):
                self.ahead[k][b] = step
            case Backward(b, loss):
                if loss == k:
                    assert stage.loss is not None
                    self.losses.append((engine, step, stage.loss.clone()))
                    if (b + 1) % self.every == 0 or b + 1 == self.batches:
                        self._look()
                forward = self.ahead[k].pop(b)
                derivative = DERIVATIVES[op.at, forward.version == step.version]
                taken = (forward if derivative.counts_from == "forward" else step).version
                engine.log.count_staleness(step.version - taken, step.slot - forward.slot)
            case Update():
                stage.updated()

    def _look(self) -> None:
        """Waits for the device, and reports the losses in the order of the batches."""
        self.streams.join()
        now = perf_counter()
        for engine in self.engines:
            engine.log.last = now
        losses, self.losses = self.losses, []
        for engine, step, loss in losses:
            assert isinstance(step.op, Backward)
            samples = self.stages[engine.stage.k].inputs.samples
            batch = InFlight(step, Message(None, samples=samples, count=samples), step.version)
            engine.check_loss(step, step.op, loss, batch)

    # ---- recording -----------------------------------------------------------------------------------------------------------------

    def _record(self, message: Message) -> None:
        """Allocates and warms up with a first batch, records every tick of the period, and resets the stages to their initial weights.

        The order matters. Where a graph outlives its tick, the forwards of the whole period are recorded first, then the backwards, each
        of which takes the graph that its forward's recording made. When the run begins, every slot holds a batch that went forward.
        """
        for slot in range(self.period.slots):
            self.stages[0].inputs.put(slot, message)
        for stage in self.stages:
            stage.upload_rates()
        for _ in range(WARM_UP):
            for ops in self.period.warm_up_passes:
                self.streams.run(partial(self._work, ops, self._do_checked))
        if not self.period.two_phases:
            self._fill()
        phases = list(zip(*self.period.ticks, strict=True))
        by_phase = [[self._recording(phase, outlived=i + 1 < len(phases)) for phase in ticks] for i, ticks in enumerate(phases)]
        self.recorded = [list(of_tick) for of_tick in zip(*by_phase, strict=True)]
        if self.period.two_phases:
            for forwards, _ in self.recorded:
                forwards()
        self.streams.join()
        for stage in self.stages:
            stage.reset()
        now = perf_counter()
        for engine in self.engines:
            engine.log.first = now

    def _recording(self, phase: Phase, outlived: bool) -> Work:
        return self.streams.record(partial(self._work, phase, self._do), apart=outlived)

    def _fill(self) -> None:
        """Forwards a batch in every slot."""
        for ops in self.period.warm_up_passes:
            forwards = tuple(one for one in ops if isinstance(one.step.op, Forward))
            self.streams.run(partial(self._work, forwards, self._do))

    def _work(self, phase: Phase, do: Callable[[int, Step], None]) -> None:
        """Does ops, each on the stream of its stage and after what it waits for."""
        awaited = {place for one in phase for place in one.after}
        marks: dict[int, Any] = {}
        for place, one in enumerate(phase):
            for before in one.after:
                self.streams.wait(one.k, marks[before])
            with self.streams.on(one.k):
                do(one.k, one.step)
            if place in awaited:
                marks[place] = self.streams.mark(one.k)

    def _do(self, k: int, step: Step) -> None:
        stage, op = self.stages[k], step.op
        match op:
            case Forward(slot):
                outputs = stage.forward(step, slot)
                if step.up:
                    self.stages[k + 1].inputs.put(slot, outputs)
            case Backward(slot):
                errors = stage.backward(step, slot)
                if step.down:
                    assert errors is not None
                    self.stages[k - 1].errors.put(slot, errors)
            case Update():
                stage.update(op)

    def _do_checked(self, k: int, step: Step) -> None:
        """Does an op, and refuses what may not be in a recording."""
        device = self.engines[k].stage.device
        before = random_state(device)
        self._do(k, step)
        refuse_draws(k, before, random_state(device))
