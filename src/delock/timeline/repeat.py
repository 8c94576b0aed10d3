"""Draws out the times of a run that repeats itself, so that the clock need not follow it to its end.

The time of an op depends on ops of the last few ticks alone: a message is under way for so many ticks, and a link has so many places. If
all ops of that many ticks took place `seconds` after those of twelve periods before, then so will all later ones, until stage 0 has no
batch left. The clock follows a short run of that kind; the times of its last twelve periods are then repeated as often as they come in the
long run, and what follows them is moved. The numbers are those of the long run to the last bit where no sum of costs is rounded: where all
costs are multiples of 2 ** -20, as in `delock plan` without a profile. All other runs are followed to their end.
"""

from __future__ import annotations

from collections.abc import Sequence

from delock.ops import Forward, Op
from delock.plan.pattern import Pattern
from delock.timeline.costs import Costs
from delock.timeline.spans import Times

PERIODS = 12  # what repeats itself after 2, 3 or 4 periods does so after 12


def shorter(stages: Sequence[Pattern], batches: int, costs: Costs) -> int:
    """Returns the length of a run that may show the times of one of `batches`, or `batches` if no such run is much shorter."""
    M = stages[0].M
    least = stages[0].span + (3 * PERIODS + _reach(stages, costs)) * M  # a third of it for what dies out after the warm-up
    short = least + (batches - least) % (PERIODS * M)
    return short if _exact(costs) and 4 * short < 3 * batches else batches


def draw_out(times: Times, stages: Sequence[Pattern], batches: int, costs: Costs) -> bool:
    """Adds batches, as many as `shorter` left out, to the times of a run; returns False if it does not repeat itself."""
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
    """Looks at the times of one stage."""

    def __init__(self, pattern: Pattern, ops: list[Op], starts: list[float], ends: list[float]) -> None:
        self.ops, self.starts, self.ends = ops, starts, ends
        self.period = sum(map(len, pattern.ticks))  # ops
        self.size = PERIODS * self.period
        self.stop = len(ops) - next(i for i, op in enumerate(reversed(ops)) if isinstance(op, Forward))  # behind it, batches are missing

    @property
    def seconds(self) -> float:
        """Returns those between the last forward and the forward of twelve periods before."""
        return self.ends[self.stop - 1] - self.ends[self.stop - 1 - self.size]

    def repeats(self, seconds: float, periods: int) -> bool:
        """Returns True if all ops of so many periods took place `seconds` after those of twelve periods before."""
        begin = self.stop - periods * self.period
        return all(
            [second + seconds for second in column[begin - self.size : self.stop - self.size]] == column[begin : self.stop]
            for column in (self.starts, self.ends)
        )

    def repeat(self, seconds: float, times: int) -> None:
        """Puts the last twelve periods behind themselves that many times."""
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
