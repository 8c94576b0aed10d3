"""The period of a method: its ticks repeat, so batches can share slots of memory, and a tick is known before the run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from delock.errors import UsageError
from delock.methods import Method, spelled
from delock.ops import NEWEST, Backward, Forward, Op, Update
from delock.plan import Plan, Product, RunLength, Step, gives, received, unroll, walk

Phase = tuple["StaticOp", ...]


@dataclass(frozen=True, slots=True)
class StaticOp:
    """One op of a tick. Its batch is a slot: the batch's number modulo Period.slots."""

    k: int
    step: Step
    after: tuple[int, ...] = ()  # places in the same phase of ops of other stages that must be done before

    @property
    def slot(self) -> int:
        """The slot that its batch lies in; 0 for an Update."""
        return 0 if isinstance(self.step.op, Update) else self.step.op.batch


@dataclass(frozen=True, slots=True)
class Period:
    """The steady state of a method: ticks[t % slots] is tick t, in phases that are recorded and replayed one after the other.

    A tick is one phase where a graph is differentiated in the tick that made it, and two (forwards, and the rest) where it lives on. To be
    recorded, a backward needs the graph of its forward, which another tick of the period makes, whose backward needs that of a third.
    """

    slots: int
    group: int  # batches of an Update; it divides slots
    ticks: tuple[tuple[Phase, ...], ...]
    warm_up_passes: tuple[Phase, ...]  # per slot: one batch through all stages and back

    @property
    def two_phases(self) -> bool:
        """True if a tick has two phases."""
        return len(self.ticks[0]) == 2


def find_period(method: Method, K: int, clip: float | None = None) -> Period:
    """Returns the period of a method in K stages. Raises UsageError where a tick is not one forward, one backward, one update."""
    _refuse(method, K, clip)
    group = method.batches_per_update
    most = method.span(K) + 2 * group  # slots are never more
    plan = unroll(method, K, RunLength(group * 6 * most, clip=clip))
    return period_of(plan, slots_of(plan, group), group, method.span(K))


def slots_of(plan: Plan, group: int) -> int:
    """Returns how many slots it takes for no message, input or label to be overwritten before its last reader is done.

    A message lives from the tick in which it is written to that of the last op that reads it, both included, as the ops of a tick have no
    order. Each tick brings one batch, so a slot is free for the batch that comes (longest life + 1) ticks later. Rounded up to whole
    groups, so that all groups look alike.
    """
    longest = 0
    done = [{step.op: step.tick for step in column if not isinstance(step.op, Update)} for column in plan.columns]
    for k, column in enumerate(plan.columns):
        for step in column:
            match step.op:
                case Forward(b):
                    longest = max(longest, step.tick - done[max(k - 1, 0)][step.op])
                case Backward(b, loss):
                    written = done[max(k - 1, 0)][Forward(b)]
                    sent = [at for op, at in done[k + 1].items() if isinstance(op, Backward) and op.batch == b] if loss > k else []
                    longest = max(longest, step.tick - written, *(step.tick - at for at in sent))
    return -(-(longest + 1) // group) * group


def period_of(plan: Plan, slots: int, group: int, span: int) -> Period:
    """Returns the period of a plan that is warm after `span` ticks, in this number of slots."""
    drawn = {t: list(steps) for t, steps in groupby(walk(plan), key=lambda pair: pair[1].tick)}
    start = -(-span // slots) * slots
    outlives = any(
        later.tick > step.tick
        for column in plan.columns
        for step, later in zip(_of(column, Forward, start), _of(column, Backward, start), strict=True)
        if step.keep == "graph"
    )
    ticks = []
    for t in range(start, start + slots):
        phases = [drawn[t]]
        if outlives:
            forwards = [(k, step) for k, step in drawn[t] if isinstance(step.op, Forward)]
            phases = [forwards, [pair for pair in drawn[t] if pair not in forwards]]
        ticks.append(tuple(_static_ops(phase, slots) for phase in phases))
    warm_up_passes = [_static_ops(_pass(plan, b), slots, in_a_row=True) for b in range(start, start + slots)]
    return Period(slots, group, tuple(ticks), tuple(warm_up_passes))


def _of(column: Iterable[Step], kind: type[Op], batch: int) -> list[Step]:
    return [step for step in column if isinstance(step.op, kind) and getattr(step.op, "batch", None) == batch]


def _pass(plan: Plan, batch: int) -> list[tuple[int, Step]]:
    """Returns a batch's forwards up, then its backwards down, each with the Update behind it."""
    found = [(k, step) for k, column in enumerate(plan.columns) for step in _of(column, Forward, batch)]
    for k in reversed(range(plan.K)):
        column = plan.columns[k]
        at = next(i for i, step in enumerate(column) if isinstance(step.op, Backward) and step.op.batch == batch)
        found += [(k, step) for i, step in enumerate(column) if i == at or (i == at + 1 and isinstance(step.op, Update))]
    return found


def _static_ops(pairs: Sequence[tuple[int, Step]], slots: int, in_a_row: bool = False) -> Phase:
    """Returns the steps, each with what it waits for: the one before (in a row), or the steps of other stages that make what it needs."""
    made: dict[Product, int] = {}
    ops = []
    for i, (k, step) in enumerate(pairs):
        wanted = [made[product] for product in received(k, step.op) if product in made]
        ops.append(StaticOp(k, _canonical(step, slots), (i - 1,) if in_a_row and i else tuple(wanted)))
        made.update(dict.fromkeys(gives(k, step.op), i))
    return tuple(ops)


def _canonical(step: Step, slots: int) -> Step:
    op = step.op
    if not isinstance(op, Update):
        op = replace(op, batch=op.batch % slots)
    return replace(step, op=op, tick=0, version=0)


def _refuse(method: Method, K: int, clip: float | None) -> None:
    alike = method.planned and all(_plain(list(method.tick(1000 * method.batches_per_update, k, K))) for k in range(K))
    if not alike:
        raise UsageError(
            f"{spelled(method)} cannot run as captured ticks, in which every stage does one forward, then one backward of a whole batch: "
            "at the newest weights: use bp, ddg, fr, fdg or adl (forward-first), dsp or dgl, without parts, ahead and behind, "
            "or leave captured out"
        )
    if clip is not None and method.synchronous:
        raise UsageError(f"{method.name} clips over the whole network, which captured ticks do not: leave out clip, or captured")


def _plain(ops: Sequence[Op]) -> bool:
    match ops:
        case [Forward(weights=weights), Backward(part="both"), *rest]:
            return weights == NEWEST and all(isinstance(op, Update) for op in rest)
    return False
