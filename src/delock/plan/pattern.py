"""A method repeats itself: what a stage does in one period says all about its column, however long the run is.

`Method.tick(t + M)` is `tick(t)` with every batch M later (M = batches_per_update). A column is therefore a pattern of M ticks, again and
again, less what does not happen: batches that there are not, and Updates with nothing to apply. What other ops, here and on the
neighbours, need of an op - the flags of a Step - is the same for every batch, so it is read off the patterns: no column is drawn ahead of
its time, or for another's sake. One thing changes in a run: before a stage's first Update, none lies between a Forward and its Backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TypeAlias

from delock.errors import PlanError, UsageError
from delock.methods.base import Method
from delock.ops import At, Backward, Forward, Op, Update
from delock.plan.needs import gives, needs

Place: TypeAlias = tuple[int, int]
"""(tick, place in the tick): the order of a column."""
Period: TypeAlias = Sequence[tuple[Place, Op]]
"""The ops of M ticks, each moved to where it takes place for a batch of the first M."""


@dataclass(frozen=True, slots=True)
class Recurring:
    """An op of a pattern: it comes back every period, for a later batch."""

    op: Op  # for a batch of the first period
    of: Callable[[int], Op]  # for any batch
    offset: int = 0  # from the first batch of the period in which it takes place to its own
    sent: bool = False  # a neighbour listens
    last: bool = False  # as in a Step
    weights_later: bool = False
    closes: bool = False  # the next op of the stage is an Update
    learns: bool = False  # it adds to the gradient that the next Update applies
    kept: bool = False  # its batch has Backwards
    crossing: Sequence[tuple[Place, At]] = ()  # of these, those that an Update parts from the Forward


class Pattern:
    """What stage k does in M ticks, and so in all of a run."""

    def __init__(self, method: Method, k: int, K: int, periods: Mapping[int, Period]) -> None:
        own, self.up = periods[k], k + 1 < K
        self.M, self.n, self.span = method.batches_per_update, method.batches_per_update * method.micro_batches, method.span(K)
        self.updates = [place for place, op in own if isinstance(op, Update)]
        begin = min(place for place, op in own if _learns(op))
        self.first_update = min((tick + self.M, i) for tick, i in (self._latest(place, begin) for place in self.updates))
        wanted = {name for j in (k - 1, k + 1) for _, op in periods.get(j, ()) for name in needs(j, op)}
        self.ticks: list[list[Recurring]] = [[] for _ in range(self.M)]
        for i, (place, op) in enumerate(own):
            sent = not wanted.isdisjoint(gives(k, op))
            closes = isinstance(own[(i + 1) % len(own)][1], Update)
            self.ticks[place[0] % self.M].append(self._recurring(own, place, op, sent, closes))

    def occurrences(self, batches: int) -> Iterator[tuple[int, Recurring, int, int]]:
        """A run of so many batches, in order: (tick, op, its (micro-)batch, Updates made before)."""
        end = batches * self.n // self.M
        pending = version = 0
        for t in range(batches + self.span):
            first = t // self.M * self.n
            for one in self.ticks[t % self.M]:
                batch = first + one.offset
                if isinstance(one.op, Update):
                    if pending:  # else warm-up: no step of the optimizer before the first error has come
                        yield t, one, 0, version
                        pending, version = 0, version + 1
                elif 0 <= batch < end:
                    yield t, one, batch, version
                    pending += one.learns

    def crossing(self, one: Recurring, batch: int) -> set[At]:
        """Where those Backwards of this batch derive that an Update parts from its Forward."""
        ticks = batch // self.n * self.M
        return {at for (tick, i), at in one.crossing if (tick + ticks, i) > self.first_update}

    def _recurring(self, own: Period, place: Place, op: Op, sent: bool, closes: bool) -> Recurring:
        if isinstance(op, Update):
            return Recurring(op, lambda batch: op, closes=closes)
        same = [(at, other) for at, other in own if not isinstance(other, Update) and other.batch == op.batch]
        begin = next(at for at, other in same if isinstance(other, Forward))
        backwards = sorted((at, other) for at, other in same if isinstance(other, Backward))
        return Recurring(
            op,
            partial(type(op), **{field.name: getattr(op, field.name) for field in fields(op) if field.name != "batch"}),
            offset=op.batch - place[0] // self.M * self.n,
            sent=sent,
            last=backwards[-1:] == [(place, op)],
            weights_later=_halved(op, [other for _, other in backwards]),
            closes=closes,
            learns=_learns(op),
            kept=bool(backwards),
            crossing=[(at, other.at) for at, other in backwards if any(self._latest(update, at) > begin for update in self.updates)],
        )

    def _latest(self, place: Place, before: Place) -> Place:
        """Of the places, M ticks apart, at which an op comes back: the last one before another place."""
        tick = before[0] - (before[0] - place[0]) % self.M
        return (tick, place[1]) if (tick, place[1]) < before else (tick - self.M, place[1])


def patterns(method: Method, K: int, stages: Sequence[int] | None = None) -> list[Pattern]:
    """The patterns of these stages, by default of all. Raises UsageError when the method does not fit K stages."""
    if K < 1:
        raise UsageError(f"a network cannot be cut into {K} stages; the least is 1")
    method.fits(K)
    stages = range(K) if stages is None else stages
    periods = {k: _period(method, k, K) for k in {j for k in stages for j in (k - 1, k, k + 1)} if 0 <= k < K}
    return [Pattern(method, k, K, periods) for k in stages]


def _period(method: Method, k: int, K: int) -> Period:
    M, n = method.batches_per_update, method.batches_per_update * method.micro_batches
    found = []
    for t in range(M):
        ops = list(method.tick(t, k, K))
        if [_moved(op, n) for op in ops] != list(method.tick(t + M, k, K)):
            raise PlanError(f"{method.name} does not repeat itself: tick {t + M} of stage {k} is not tick {t} with all batches {n} later")
        for i, op in enumerate(ops):
            periods = 0 if isinstance(op, Update) else op.batch // n
            found.append(((t - periods * M, i), _moved(op, -periods * n)))
    return found


def _moved(op: Op, batches: int) -> Op:
    return op if isinstance(op, Update) else replace(op, batch=op.batch + batches)


def _learns(op: Op) -> bool:
    return isinstance(op, Backward) and op.part != "input"


def _halved(op: Op, backwards: Iterable[Backward]) -> bool:
    return isinstance(op, Backward) and op.part == "input" and any((other.part, other.loss) == ("weights", op.loss) for other in backwards)
