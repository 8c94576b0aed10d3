"""The clock in its simplest form: over and over, each stage does its next op if all that it waits for has been done."""

from __future__ import annotations

from delock.ops import Backward, Forward, Op
from delock.plan import Plan, Product, gives, received
from delock.timeline import Costs

Row = tuple[Op, float, float, float, float]
"""(op, start, end, waited, full), as in a Span."""


class PlainClock:
    """All stages of a plan, and what has happened so far."""

    def __init__(self, plan: Plan, costs: Costs) -> None:
        self.plan, self.costs = plan, costs
        self.rows: list[list[Row]] = [[] for _ in plan.columns]
        self.free = [0.0] * plan.K
        self.full = [0.0] * plan.K
        self.sent: dict[Product, float] = {}
        self.taken: dict[Product, float] = {}
        self.queues: dict[tuple[int, bool], list[Product]] = {(k, up): [] for k in range(plan.K) for up in (True, False)}

    def run(self) -> list[list[Row]]:
        ticks = sorted({step.tick for column in self.plan.columns for step in column})
        for until in ticks if self.costs.barrier else ticks[-1:]:
            while any(self.advance(k, until) for k in range(self.plan.K)):
                pass
            if self.costs.barrier:
                self.free = [max(self.free)] * self.plan.K
        return self.rows

    def advance(self, k: int, until: int) -> bool:
        """Sends what stage k has made last, then does its next op; False if there is nothing that it can do."""
        if (moved := self.send(k)) is not None:
            return moved
        column = self.plan.columns[k]
        if len(self.rows[k]) == len(column) or column[len(self.rows[k])].tick > until:
            return False
        step = column[len(self.rows[k])]
        wanted = received(k, step.op)
        if not all(name in self.sent for name in wanted):
            return False
        ahead, rest = self.work(k, len(self.rows[k]))
        arrivals = [self.sent[name] + self.costs.delay(min(k, name[0]), up=name[0] < k) for name in wanted]
        begin = max([self.free[k] + ahead, *arrivals])
        self.taken.update(dict.fromkeys(wanted, begin))
        start, end = begin - ahead, begin + rest
        waited = max(0.0, start - (self.rows[k][-1][2] if self.rows[k] else 0.0))
        self.rows[k].append((step.op, start, end, waited, min(waited, self.full[k])))
        self.free[k], self.full[k] = end, 0.0
        return True

    def work(self, k: int, i: int) -> tuple[float, float]:
        step, before = self.plan.columns[k][i], self.plan.columns[k][:i]
        replayed = isinstance(step.op, Backward) and step.op.at == "replay"
        if replayed:
            [forward] = [other for other in before if isinstance(other.op, Forward) and other.op.batch == step.op.batch]  # type: ignore[union-attr]
            replayed = forward.keep == "input"
        scale = self.costs.scale(k, step.tick)
        ahead, rest = self.costs.work(k, step.op, replayed)
        return scale * ahead, scale * rest

    def send(self, k: int) -> bool | None:
        """None: there is nothing to send."""
        if not self.rows[k]:
            return None
        step = self.plan.columns[k][len(self.rows[k]) - 1]
        names = [name for name in gives(k, step.op) if name not in self.sent]
        if not names:
            return None
        if step.up or step.down:
            queue, link = self.queues[k, step.up], k if step.up else k - 1
            room = self.costs.capacity[link] if self.costs.capacity else len(queue) + 1
            if len(queue) >= room and queue[-room] not in self.taken:
                return False
            if len(queue) >= room:
                self.full[k] = max(0.0, self.taken[queue[-room]] - self.free[k])
                self.free[k] += self.full[k]
            queue += names
        self.sent.update(dict.fromkeys(names, self.free[k]))
        return True
