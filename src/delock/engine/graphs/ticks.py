"""A run as captured ticks: record the cycle once, then per tick copy a batch in, replay, and keep the books on the host."""

from __future__ import annotations

from collections.abc import Sequence
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
from delock.ops import DERIVATIVES, Backward, Evaluate, Forward, Update
from delock.plan import Plan, Step, walk

WARM = 3  # rounds through all slots before anything is recorded: libraries choose their kernels, optimizers make their state


class Ticks:
    """All stages of a run on one device. `engines` give stage, feed and log of each, and do the evaluations, between ticks.

    `every`: batches between two looks at the losses, each of which waits for the device; `batches`: of the run. Raises UsageError where
    these end within a group.
    """

    def __init__(self, engines: Sequence[Engine], cycle: Period, lanes: Streams, *, batches: int, every: int = 1) -> None:
        if left := batches % cycle.group:
            raise UsageError(f"captured ticks take {cycle.group} batches an update, so {batches} batches leave {left}: train {left} fewer")
        self.engines, self.cycle, self.lanes, self.batches, self.every = engines, cycle, lanes, batches, every
        self.branches = [StaticStage(engine.stage, cycle.group) for engine in engines]
        self.phases: list[list[Work]] = []
        self.ahead: list[dict[int, Step]] = [{} for _ in engines]  # per stage: batch -> its Forward
        self.losses: list[tuple[Engine, Step, Tensor]] = []  # not looked at yet

    def run(self, plan: Plan) -> None:
        """Execute a plan, or the next window of one. Raises NonFinite, and UsageError for a batch of another shape."""
        for t, steps in groupby(walk(plan), key=lambda pair: pair[1].tick):
            self._tick(t, list(steps))
        self._look()

    def _tick(self, t: int, steps: list[tuple[int, Step]]) -> None:
        for k, step in steps:
            if isinstance(step.op, Evaluate):
                self._look()
                self.engines[k].execute(step)
        steps = [(k, step) for k, step in steps if not isinstance(step.op, Evaluate)]
        if not steps:
            return
        self._feed(steps)
        done = {(k, type(step.op)) for k, step in steps}
        with ExitStack() as stack:
            for k, branch in enumerate(self.branches):
                stack.enter_context(branch.without(forward=(k, Forward) not in done, backward=(k, Backward) not in done))
            for replay in self.phases[t % self.cycle.slots]:
                replay()
        for k, step in steps:
            self._note(k, step)

    def _feed(self, steps: list[tuple[int, Step]]) -> None:
        """Copy the batch in that stage 0 forwards in this tick; the very first one is also what the cycle is recorded with."""
        feed = self.engines[0].feed
        assert feed is not None
        for k, step in steps:
            if k == 0 and isinstance(step.op, Forward):
                message = feed(step.op)
                if not self.phases:
                    self._record(message)
                self.branches[0].inputs.put(step.op.batch % self.cycle.slots, message)

    def _note(self, k: int, step: Step) -> None:
        """What the host keeps of an op that has been asked for."""
        engine, branch, op = self.engines[k], self.branches[k], step.op
        match op:
            case Forward(b):
                self.ahead[k][b] = step
            case Backward(b, loss):
                if loss == k:
                    assert branch.loss is not None
                    self.losses.append((engine, step, branch.loss.clone()))
                    if (b + 1) % self.every == 0 or b + 1 == self.batches:
                        self._look()
                forward = self.ahead[k].pop(b)
                derivative = DERIVATIVES[op.at, forward.version == step.version]
                taken = (forward if derivative.counts_from == "forward" else step).version
                engine.log.count_staleness(step.version - taken, step.tick - forward.tick)
            case Update():
                branch.updated()

    def _look(self) -> None:
        """Wait for the device, and tell the losses in the order of the batches."""
        self.lanes.join()
        now = perf_counter()
        for engine in self.engines:
            engine.log.last = now
        losses, self.losses = self.losses, []
        for engine, step, loss in losses:
            assert isinstance(step.op, Backward)
            engine.check_loss(step, step.op, loss, self.branches[engine.stage.k].inputs.samples)

    # ---- recording -----------------------------------------------------------------------------------------------------------------

    def _record(self, message: Message) -> None:
        """Allocate and warm up with a first batch, record every tick of the cycle, and begin again from the initial weights.

        The order matters. Where a graph outlives its tick, the forwards of the whole cycle are recorded first, then the backwards, each of
        which takes the graph that its forward's recording made. When a run begins, every slot holds a batch that went forward.
        """
        for slot in range(self.cycle.slots):
            self.branches[0].inputs.put(slot, message)
        for branch in self.branches:
            branch.upload_rates()
        for _ in range(WARM):
            for chain in self.cycle.warm_up_passes:
                self.lanes.run(partial(self._work, chain, self._carefully))
        if not self.cycle.halved:
            self._fill()
        phases_of_tick = [
            [self.lanes.record(partial(self._work, phase[i], self._do), apart=self.cycle.halved and i == 0) for phase in self.cycle.phases]
            for i in range(len(self.cycle.phases[0]))
        ]
        self.phases = [list(parts) for parts in zip(*phases_of_tick, strict=True)]
        if self.cycle.halved:
            for forwards, _ in self.phases:
                forwards()
        self.lanes.join()
        for branch in self.branches:
            branch.reset()
        now = perf_counter()
        for engine in self.engines:
            engine.log.first = now

    def _fill(self) -> None:
        """Forward a batch in every slot."""
        for chain in self.cycle.warm_up_passes:
            ahead = tuple(turn for turn in chain if isinstance(turn.step.op, Forward))
            self.lanes.run(partial(self._work, ahead, self._do))

    def _work(self, phase: Phase, do: Any) -> None:
        """Ops, each in its stage's lane and after what it waits for."""
        awaited = {place for turn in phase for place in turn.after}
        marks: dict[int, Any] = {}
        for place, turn in enumerate(phase):
            for before in turn.after:
                self.lanes.wait(turn.k, marks[before])
            with self.lanes.on(turn.k):
                do(turn.k, turn.step)
            if place in awaited:
                marks[place] = self.lanes.mark(turn.k)

    def _do(self, k: int, step: Step) -> None:
        branch, op = self.branches[k], step.op
        match op:
            case Forward(slot):
                outputs = branch.forward(step, slot)
                if step.up:
                    self.branches[k + 1].inputs.put(slot, outputs)
            case Backward(slot):
                errors = branch.backward(step, slot)
                if step.down:
                    assert errors is not None
                    self.branches[k - 1].errors.put(slot, errors)
            case Update():
                branch.update(op)

    def _carefully(self, k: int, step: Step) -> None:
        """With a look at what may not be in a recording."""
        device = self.engines[k].stage.device
        before = random_state(device)
        self._do(k, step)
        refuse_draws(k, before, random_state(device))
