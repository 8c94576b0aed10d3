"""Reads off one period of a method all that there is to know about a stage's column, however long the run is.

A method repeats itself: `tick(t + M)` is `tick(t)` with every batch M later (M = batches_per_update). A column is therefore a pattern of M
ticks, again and again, without the ops that do not happen: those of batches that do not exist, and Updates that have nothing to apply.

A Step says what other ops need of it: whether a neighbour listens, what a Forward must keep, which Backward is the last of its batch. These
flags are the same for every batch, so they follow from the patterns of a stage and its neighbours. No column is drawn ahead of its time,
and none for the sake of another. Only one thing changes during a run: before a stage's first Update, none lies between a Forward and its
Backward, so that a replay would compute the same numbers again and the graph is kept instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeAlias

from delock.errors import PlanError, UsageError
from delock.methods.base import Method
from delock.ops import DERIVATIVES, NEWEST, At, Backward, Forward, Op, Update
from delock.plan.needs import gives, needs
from delock.plan.steps import Keep

Place: TypeAlias = tuple[int, int]
"""(tick, place among the ops of the tick): orders a column."""
Period: TypeAlias = list[tuple[Place, Op]]
"""The ops of M ticks, each with the place at which it comes for a batch of the first M."""


@dataclass(frozen=True, slots=True)
class Recurring:
    """Describes an op of a pattern, which comes back every period for a later batch."""

    op: Op  # for a batch of the first period
    of: Callable[[int], Op]  # makes it for any batch
    offset: int = 0  # batches from the first one of the period in which it comes to its own
    slot: int = 0  # its place among the ops of its kind in a tick: that many micro-batches come before its own
    sent: bool = False  # a neighbour takes its product
    last: bool = False  # as in a Step, like the next
    weights_later: bool = False
    closes: bool = False  # the next op of the stage is an Update
    learns: bool = False  # it adds to the gradient that the next Update applies
    keep: Keep = "nothing"  # as in the Step of its batch's Forward, for batch `settled` and all later ones
    snapshot: bool = False
    settled: int = 0
    crossing: Sequence[
        tuple[Place, At]
    ] = ()  # place and derivative of its batch's Backwards that follow an Update that follows the Forward


Occurrence: TypeAlias = tuple[int, Recurring, int, int]
"""(tick, op, its (micro-)batch, Updates made before it)."""


@dataclass(slots=True)
class Made:
    """Counts on the way through a column: the Updates, and the gradients that the next one will apply. begun: Updates of earlier runs."""

    version: int = 0
    pending: int = 0
    begun: int = 0


class Pattern:
    """Holds the ops of stage k in the M ticks of a period. first: the batch of the data with which the stage begins."""

    def __init__(self, method: Method, k: int, K: int, periods: Mapping[int, Period], first: int = 0) -> None:
        own, self.method, self.k, self.K, self.first = periods[k], method, k, K, first
        self.M, self.n, self.span = method.batches_per_update, method.batches_per_update * method.micro_batches, method.span(K)
        self.updates = [place for place, op in own if isinstance(op, Update)]
        self.banks = max(op.weights.banks for _, op in own if isinstance(op, Forward))
        begin = min(self._from_first(place, _batch(op)) for place, op in own if _learns(op))
        self.first_update = min((tick + self.M, i) for tick, i in (self._latest(place, begin) for place in self.updates))
        wanted = {name for j in (k - 1, k + 1) for _, op in periods.get(j, ()) for name in needs(j, op)}
        same: dict[int, Period] = defaultdict(list)  # batch -> its ops
        for place, op in own:
            same[_batch(op)].append((place, op))
        slots: dict[tuple[int, type[Op], str], list[int]] = defaultdict(list)  # tick, kind -> batches
        self.ticks: list[list[Recurring]] = [[] for _ in range(self.M)]
        for i, (place, op) in enumerate(own):
            sent, closes = not wanted.isdisjoint(gives(k, op)), isinstance(own[(i + 1) % len(own)][1], Update)
            slot = _place(slots[place[0] % self.M, type(op), getattr(op, "part", "")], place[0] // self.M * -self.n + _batch(op))
            self.ticks[place[0] % self.M].append(self._recurring(op, place, same[_batch(op)], slot, sent, closes))

    def occurrences(self, batches: int) -> Iterator[Occurrence]:
        """Yields all ops of a run in order."""
        made = Made()
        for t in range(self.first, batches + self.span):
            yield from self.at(t, batches, made)

    def at(self, t: int, batches: int, made: Made) -> Iterator[Occurrence]:
        """Yields the ops of a tick in a run of so many batches; made: in the ticks before it, one after the other."""
        begin, end = self.first * self.method.micro_batches, batches * self.method.micro_batches
        first = t // self.M * self.n
        for one in self.ticks[t % self.M]:
            batch = first + one.offset
            if isinstance(one.op, Update):
                if made.pending:  # else warm-up: no step of the optimizer before the first error has come
                    yield t, one, 0, made.version
                    made.pending, made.version = 0, made.version + 1
            elif begin <= batch < end:
                yield t, one, batch, made.version
                made.pending += one.learns

    def keeps(self, one: Recurring, batch: int) -> tuple[Keep, bool]:
        """Returns what the Forward of a batch must keep, and whether it must copy the weights; `one` is an op of that batch."""
        if batch >= one.settled:
            return one.keep, one.snapshot
        ticks = batch // self.n * self.M
        return _keep([at for (tick, i), at in one.crossing if (tick + ticks, i) > self.first_update])

    def _recurring(self, op: Op, place: Place, same: Period, slot: int, sent: bool, closes: bool) -> Recurring:
        if isinstance(op, Update):
            return Recurring(op, lambda batch: op, sent=sent, closes=closes)
        begin, forward = next((at, other) for at, other in same if isinstance(other, Forward))
        backwards = sorted((at, other) for at, other in same if isinstance(other, Backward))
        crossing = [(at, other.at) for at, other in backwards if any(self._latest(update, at) > begin for update in self.updates)]
        if forward.weights != NEWEST:  # then no Backward finds the weights of its Forward in place, whether an Update lies between or not
            keep, snapshot, crossing = *_keep([other.at for _, other in backwards]), []
        else:
            keep, snapshot = _keep([at for _, at in crossing]) if backwards else ("nothing", False)
        return Recurring(
            op,
            partial(type(op), **{field.name: getattr(op, field.name) for field in fields(op) if field.name != "batch"}),
            offset=op.batch - place[0] // self.M * self.n,
            slot=slot,
            sent=sent,
            closes=closes,
            last=backwards[-1:] == [(place, op)],
            weights_later=_halved(op, [other for _, other in backwards]),
            learns=_learns(op),
            keep=keep,
            snapshot=snapshot,
            settled=max(((self.first_update[0] - tick) // self.M + 1 for (tick, _), _ in crossing), default=0) * self.n,
            crossing=crossing,
        )

    def _from_first(self, place: Place, batch: int) -> Place:
        """Returns where an op of the first period comes for the first time in a run that begins with batch `first`."""
        period, within = divmod(self.first * self.method.micro_batches, self.n)
        return place[0] + (period + (batch < within)) * self.M, place[1]

    def _latest(self, place: Place, before: Place) -> Place:
        """Returns the last place before another at which an op comes back, which it does every M ticks."""
        tick = before[0] - (before[0] - place[0]) % self.M
        return (tick, place[1]) if (tick, place[1]) < before else (tick - self.M, place[1])


def patterns(method: Method, K: int, stages: Sequence[int] | None = None, first: int = 0) -> list[Pattern]:
    """Returns the patterns of these stages, by default of all, in a run that begins with batch `first`.

    Raises UsageError if the method does not fit K stages, PlanError if it does not repeat itself.
    """
    if K < 1:
        raise UsageError(f"a network cannot be cut into {K} stages; the least is 1")
    method = method.fitted(K)
    method.fits(K)
    stages = range(K) if stages is None else stages
    periods = {k: _period(method, k, K) for k in {j for k in stages for j in (k - 1, k, k + 1)} if 0 <= k < K}
    return [Pattern(method, k, K, periods, first) for k in stages]


def _period(method: Method, k: int, K: int) -> Period:
    M, n = method.batches_per_update, method.batches_per_update * method.micro_batches
    found: Period = []
    for t in range(M):
        ops = list(method.tick(t, k, K))
        if [_moved(op, n) for op in ops] != list(method.tick(t + M, k, K)):
            raise PlanError(f"{method.name} does not repeat itself: tick {t + M} of stage {k} is not tick {t} with all batches {n} later")
        for i, op in enumerate(ops):
            periods = 0 if isinstance(op, Update) else op.batch // n
            found.append(((t - periods * M, i), _moved(op, -periods * n)))
    return found


def _moved(op: Op, batches: int) -> Op:
    return replace(op, batch=op.batch + batches) if batches and not isinstance(op, Update) else op


def _batch(op: Op) -> int:
    return -1 if isinstance(op, Update) else op.batch


def _place(batches: list[int], batch: int) -> int:
    """Returns the place of a batch among those of a tick, and adds it to them."""
    if batch not in batches:
        batches.append(batch)
    return batches.index(batch)


def _learns(op: Op) -> bool:
    return isinstance(op, Backward) and op.part != "input"


def _halved(op: Op, backwards: Iterable[Backward]) -> bool:
    return isinstance(op, Backward) and op.part == "input" and any((other.part, other.loss) == ("weights", op.loss) for other in backwards)


def _keep(crossing: Collection[At]) -> tuple[Keep, bool]:
    """Returns what a Forward must keep, and whether it must copy the weights; `crossing`: of its Backwards, those behind an Update."""
    behind = [DERIVATIVES[at, False] for at in crossing]
    return ("input" if {one.keeps for one in behind} == {"input"} else "graph"), any(one.copies for one in behind)
