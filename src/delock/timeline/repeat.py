"""Extends the times of a run that repeats itself, so that the clock need not follow it to its end.

The time of an op depends only on ops of the last few ticks, because a message is under way for a limited number of ticks and a link has a
limited number of places. If all ops in that number of ticks took place `seconds` after those of twelve periods before, then so will all
later ones, until stage 0 has no batch left. The clock follows a short run of that kind. The times of its last twelve periods are then
repeated as often as they occur in the long run, and later times are shifted. The numbers are those of the long run to the last bit if no
sum of costs is rounded: if all costs are multiples of 2 ** -20, as in `delock plan` without a profile. All other runs are followed to their
end.
"""

from __future__ import annotations

from collections.abc import Sequence

from delock.ops import Forward, Op
from delock.plan.pattern import Pattern
from delock.timeline.costs import Costs
from delock.timeline.spans import Times

PERIODS = 12  # a schedule that repeats after 2, 3 or 4 periods repeats after 12


def shorter(stages: Sequence[Pattern], batches: int, costs: Costs) -> int:
    """Returns the length of a short run that may show the times of one of `batches`, or `batches` if none is much shorter."""
    M = stages[0].M
    least = stages[0].span + (3 * PERIODS + _reach(stages, costs)) * M  # a third of them for transients after the warm-up
    short = least + (batches - least) % (PERIODS * M)
    return short if _exact(costs) and 4 * short < 3 * batches else batches


def draw_out(times: Times, stages: Sequence[Pattern], batches: int, costs: Costs) -> bool:
    """Adds the batches that `shorter` left out to the times of a run; returns False if the run does not repeat itself."""
    periods = PERIODS + _reach(stages, costs)
    again = batches // (PERIODS * stages[0].M)
    found = [_Column(*column) for column in zip(stages, times.ops, times.starts, times.ends, strict=True)]
    seconds = found[0].seconds
    if not all(column.repeats(seconds, periods) for column in found):
        return False
    for column in found:
        column.repeat(seconds, again)
    return True


class _Column:
    """Holds the times of one stage."""

    def __init__(self, pattern: Pattern, ops: list[Op], starts: list[float], ends: list[float]) -> None:
        self.ops, self.starts, self.ends = ops, starts, ends
        self.period = sum(map(len, pattern.ticks))  # ops
        self.size = PERIODS * self.period
        self.stop = len(ops) - next(i for i, op in enumerate(reversed(ops)) if isinstance(op, Forward))  # after it, batches are missing

    @property
    def seconds(self) -> float:
        """Returns the seconds between the last forward and the forward twelve periods before."""
        return self.ends[self.stop - 1] - self.ends[self.stop - 1 - self.size]

    def repeats(self, seconds: float, periods: int) -> bool:
        """Returns True if all ops of this number of periods took place `seconds` after those of twelve periods before."""
        begin = self.stop - periods * self.period
        return all(
            [second + seconds for second in column[begin - self.size : self.stop - self.size]] == column[begin : self.stop]
            for column in (self.starts, self.ends)
        )

    def repeat(self, seconds: float, times: int) -> None:
        """Repeats the last twelve periods that many times."""
        begin, stop = self.stop - self.size, self.stop
        for column in (self.starts, self.ends):
            behind = [second + times * seconds for second in column[stop:]]
            column[stop:] = [second + i * seconds for i in range(1, times + 1) for second in column[begin:stop]] + behind
        self.ops[stop:stop] = times * self.ops[begin:stop]


def _reach(stages: Sequence[Pattern], costs: Costs) -> int:
    """Returns the number of periods on which the times of the next one depend."""
    method = stages[0].method
    places = [*costs.capacity, *(method.capacity(k, costs.K) for k in range(costs.K - 1))]
    return -(-2 * max(places, default=0) // stages[0].M)


def _exact(costs: Costs) -> bool:
    """Returns True if no sum of costs is ever rounded."""
    some = [costs.forward, costs.backward, costs.replay, costs.update, costs.head, costs.up, costs.down]
    return costs.slow is None and all((2**20 * cost).is_integer() and cost < 2**10 for costs in some for cost in costs)
