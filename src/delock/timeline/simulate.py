"""The clock as a pass over a plan: every op starts as soon as its stage is free and its needs are met."""

from __future__ import annotations

from delock.errors import PlanError, UsageError
from delock.ops import Backward, Forward, label
from delock.plan import Plan, Product, Step, chart, gives, named, needs
from delock.timeline.costs import Costs
from delock.timeline.spans import Span, Timeline


def simulate(plan: Plan, costs: Costs) -> Timeline:
    """A whole plan, timed op by op under a cost model; times in the unit of the costs, from 0.

    A message arrives its link's delay after it was sent. It is sent when its op ends, but not before the message `capacity` places
    earlier was taken; until then its sender is not free. Raises UsageError when the costs are of another number of stages, PlanError
    when the plan cannot go on, for example because a link holds too few messages.
    """
    if costs.K != plan.K:
        raise UsageError(f"costs of {costs.K} stages cannot time a plan of {plan.K} stages")
    clock = _Clock(plan, costs)
    ticks = sorted({step.tick for column in plan.columns for step in column})
    for t in ticks if costs.barrier else ticks[-1:]:
        clock.run(t)
        if costs.barrier:
            clock.free = [max(clock.free)] * plan.K
    return Timeline(tuple(map(tuple, clock.spans)))


class _Clock:
    """All stages at their places in the plan. Stages read named messages only, so the order in which they are advanced is of no account."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan, self.costs = plan, costs
        self.missing = {name for k, column in enumerate(plan.columns) for step in column for name in gives(k, step.op)}
        self.spans: list[list[Span]] = [[] for _ in plan.columns]
        self.at = [0] * plan.K
        self.free = [0.0] * plan.K
        self.sent: dict[Product, float] = {}
        self.taken: dict[Product, float] = {}
        self.queues: dict[tuple[int, bool], list[Product]] = {(k, up): [] for k in range(plan.K) for up in (True, False)}
        self.inputs: list[set[int]] = [set() for _ in plan.columns]  # batches whose graph was not kept
        self.full = [0.0] * plan.K  # seconds that a stage has just waited for room in a link
        self.unsent: list[tuple[int, bool] | None] = [None] * plan.K  # the full link, if any, that a stage's last message waits for

    def run(self, until: int) -> None:
        """Advance every stage to the end of tick `until`."""
        moved = True
        while moved:
            moved = False
            for k in range(self.plan.K):
                before = self.at[k], self.unsent[k]
                while self.send(k) and self.do(k, until):
                    pass
                moved = moved or before != (self.at[k], self.unsent[k])
        stuck = [k for k in range(self.plan.K) if self.unsent[k] or self.next(k, until)]
        if stuck:
            raise PlanError("on the clock this plan cannot go on:\n" + "\n".join(map(self.why, stuck)) + "\n" + chart(self.plan))

    def next(self, k: int, until: int) -> Step | None:
        column = self.plan.columns[k]
        return column[self.at[k]] if self.at[k] < len(column) and column[self.at[k]].tick <= until else None

    def do(self, k: int, until: int) -> bool:
        """Do the next op of stage k, if there is one and its needs are met."""
        step = self.next(k, until)
        if step is None:
            return False
        wanted = needs(k, step.op)
        if not self.missing.isdisjoint(wanted):
            return False
        replayed = isinstance(step.op, Backward) and step.op.at == "replay" and step.op.batch in self.inputs[k]
        ahead, rest = self.costs.work(k, step.op, step.tick, replayed)
        messages = [name for name in wanted if name in self.sent and name[0] != k]
        arrivals = [self.sent[name] + self.costs.delay(min(name[0], k), up=name[0] < k) for name in messages]
        taken = max([self.free[k] + ahead, *arrivals])
        self.taken.update(dict.fromkeys(messages, taken))
        self.record(k, step, taken - ahead, taken + rest)
        return True

    def record(self, k: int, step: Step, start: float, end: float) -> None:
        before = self.spans[k][-1].end if self.spans[k] else 0.0
        waited = max(0.0, start - before)
        self.spans[k].append(Span(k, step.op, start, end, step.version, step.tick, waited, full=min(waited, self.full[k])))
        self.free[k], self.full[k] = end, 0.0
        self.at[k] += 1
        for name in gives(k, step.op):
            if step.up or step.down:
                self.queues[k, step.up].append(name)
                self.unsent[k] = (k, step.up)
            else:
                self.sent[name] = end
                self.missing.discard(name)
        if isinstance(step.op, Forward) and step.keep == "input":
            self.inputs[k].add(step.op.batch)

    def send(self, k: int) -> bool:
        """Send what stage k has made, if its link has room; whether the stage is free again."""
        if (link := self.unsent[k]) is None:
            return True
        queue = self.queues[link]
        name = queue[-1]
        capacity = self.costs.capacity[k if link[1] else k - 1] if self.costs.capacity else len(queue)
        if len(queue) > capacity:
            earlier = queue[-1 - capacity]
            if earlier not in self.taken:
                return False
            self.full[k] = max(0.0, self.taken[earlier] - self.free[k])
            self.free[k] += self.full[k]
        self.sent[name] = self.free[k]
        self.missing.discard(name)
        self.unsent[k] = None
        return True

    def why(self, k: int) -> str:
        if self.unsent[k]:
            return f"  stage {k}: {label(self.spans[k][-1].op)} finds its link full"
        step = self.plan.columns[k][self.at[k]]
        waits = [f"{named(what)} on stage {stage}" for stage, what in needs(k, step.op) if (stage, what) in self.missing]
        return f"  stage {k}: {label(step.op)} waits for {' and '.join(waits)}"
