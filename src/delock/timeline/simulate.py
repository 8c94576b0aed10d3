"""Puts a plan on the clock: every op starts as soon as its stage is free and its needs are met."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf

from delock.errors import PlanError, UsageError
from delock.ops import DERIVATIVES, Backward, Forward, Op, Update, label
from delock.plan import Plan, Step, chart, gives, named, received, unroll
from delock.plan.pattern import Pattern
from delock.timeline.clock import Clock, Queue, Queues, Stuck, Work
from delock.timeline.costs import Costs
from delock.timeline.repeat import draw_out, shorter
from delock.timeline.spans import Span, Timeline


def simulate(plan: Plan, costs: Costs) -> Timeline:
    """Returns the timeline of a whole plan under a cost model; times are in the unit of the costs, from 0.

    A message arrives its link's delay after it was sent. It is sent when its op ends, but not before the receiver has taken the message
    sent `capacity` messages earlier; until then its sender is not free. Raises UsageError if the costs have another number of stages,
    PlanError if the plan cannot go on, for example because a link holds too few messages.
    """
    if costs.K != plan.K:
        raise UsageError(f"costs of {costs.K} stages cannot time a plan of {plan.K} stages")
    queues = _queues(costs)
    ticks = sorted({step.tick for column in plan.columns for step in column})
    clock = Clock([_planned(k, column, costs, queues) for k, column in enumerate(plan.columns)], queues)
    _run(clock, costs, ticks, lambda: plan)
    return Timeline(tuple(tuple(_spans(k, column, clock)) for k, column in enumerate(plan.columns)))


def clocked(stages: Sequence[Pattern], batches: int, costs: Costs) -> Clock:
    """Returns the times that `simulate` finds for a run of `batches` without evaluation, from the patterns of all stages; no step is made.

    Raises UsageError if the costs have another number of stages, PlanError if the run cannot go on.
    """
    if len(stages) != costs.K:
        raise UsageError(f"costs of {costs.K} stages cannot time a plan of {len(stages)} stages")
    short = shorter(stages, batches, costs)
    clock = _followed(stages, short, costs)
    return clock if short == batches or draw_out(clock.times, stages, batches - short, costs) else _followed(stages, batches, costs)


def _followed(stages: Sequence[Pattern], batches: int, costs: Costs) -> Clock:
    queues = _queues(costs)
    clock = Clock([_repeated(k, pattern, batches, costs, queues) for k, pattern in enumerate(stages)], queues)
    _run(clock, costs, range(batches + stages[0].span), lambda: unroll(stages[0].method, costs.K, batches))
    return clock


def _run(clock: Clock, costs: Costs, ticks: Iterable[int], plan: Callable[[], Plan]) -> None:
    """Runs the clock, in lock-step if the costs say so. Raises PlanError; `plan` is called for its text."""
    try:
        clock.run(ticks if costs.barrier else (inf,))
    except Stuck as stuck:
        lines = [_why(plan(), k, done, room) for k, done, room in stuck.stages]
        raise PlanError("on the clock this plan cannot go on:\n" + "\n".join(lines) + "\n" + chart(plan())) from None


def _why(plan: Plan, k: int, done: int, room: bool) -> str:
    if room:
        return f"  stage {k}: {label(plan.columns[k][done - 1].op)} finds its link full"
    op = plan.columns[k][done].op
    return f"  stage {k}: {label(op)} waits for " + " and ".join(f"{named(what)} on stage {stage}" for stage, what in received(k, op))


def _queues(costs: Costs) -> Queues:
    found: dict[tuple[int, str], Queue] = {}
    for k in range(costs.K - 1):
        up, down = (deque([0.0] * costs.capacity[k]) if costs.capacity else None for _ in range(2))
        found[k, "up"] = Queue(k, k + 1, costs.delay(k, up=True), up)
        found[k, "norm"] = Queue(k, k + 1, costs.delay(k, up=True))
        found[k + 1, "down"] = Queue(k + 1, k, costs.delay(k, up=False), down)
    return found


def _route(k: int, op: Op, sent: bool, queues: Queues) -> tuple[Queue | None, Queue | None]:
    """Returns the queues from which an op takes a message, and into which it sends one."""
    way = "down" if isinstance(op, Backward) else "norm" if isinstance(op, Update) else "up"
    took = received(k, op)
    return queues[took[0][0], way] if took else None, queues.get((k, way)) if sent else None


def _replays(op: Op) -> bool:
    return isinstance(op, Backward) and DERIVATIVES[op.at, False].recomputes


def _planned(k: int, column: Sequence[Step], costs: Costs, queues: Queues) -> Iterator[Work]:
    """Yields the steps of stage k."""
    inputs: set[int] = set()  # batches whose graph was not kept
    for step in column:
        op, products = step.op, [*received(k, step.op), *gives(k, step.op)]
        if isinstance(op, Forward) and step.keep == "input":
            inputs.add(op.batch)
        ahead, rest = costs.work(k, op, _replays(op) and getattr(op, "batch", None) in inputs)
        scale = costs.scale(k, step.tick)
        sent = step.up or step.down or (isinstance(op, Update) and op.over == "network")
        yield step.tick, op, scale * ahead, scale * rest, products[-1][1] if products else None, *_route(k, op, sent, queues)


def _repeated(k: int, pattern: Pattern, batches: int, costs: Costs, queues: Queues) -> Iterator[Work]:
    """Yields the ops of stage k in a run without evaluation; a message is named by a number."""
    known = {}  # what is the same every time
    for one in (one for ops in pattern.ticks for one in ops):
        replays = _replays(one.op)
        known[id(one)] = replays, *costs.work(k, one.op, replays), getattr(one.op, "loss", 0), *_route(k, one.op, one.sent, queues)
    tick, scale = -1, 1.0
    for t, one, batch, _ in pattern.occurrences(batches):
        replays, ahead, rest, loss, takes, sends = known[id(one)]
        if replays and pattern.keeps(one, batch)[0] != "input":
            ahead = 0.0
        if costs.slow:
            tick, scale = t, scale if t == tick else costs.scale(k, t)
            ahead, rest = scale * ahead, scale * rest
        yield t, one.op, ahead, rest, batch * costs.K + loss, takes, sends


def _spans(k: int, column: Sequence[Step], clock: Clock) -> Iterator[Span]:
    free = 0.0
    for i, (step, (op, start, end)) in enumerate(zip(column, clock.times.column(k), strict=True)):
        waited = max(0.0, start - free)
        yield Span(k, op, start, end, step.version, step.tick, waited, full=min(waited, clock.full[k].get(i, 0.0)), slot=step.slot)
        free = end
