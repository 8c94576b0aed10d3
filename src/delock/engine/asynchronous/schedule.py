"""Plans of runs with replay buffers: drawn here (sampled, round-robin), or recorded by processes that ran freely."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, count

from delock.engine.asynchronous.buffer import ReuseStatistics, replay_buffer
from delock.keys import key
from delock.methods import AsyncDGL, Method
from delock.ops import Backward, Evaluate, Forward, Update
from delock.plan.steps import Plan, RunLength, Step
from delock.records import Cut, Visit


def drawn(method: Method, K: int, length: RunLength, seed: int = 0) -> tuple[Plan, list[ReuseStatistics]]:
    """Draws the whole plan of a run in one process, a tick per turn, and returns it with the statistics of every stage's reads.

    A stage makes no visit in its turn if its buffer has nothing for it, or if it and all above it are done. After every `length.every`
    updates of stage 0 all stages evaluate. Raises UsageError when the method does not fit K stages.
    """
    assert isinstance(method, AsyncDGL)
    method.fits(K)
    buffers = [replay_buffer(method) for _ in range(K)]  # in front of each stage
    columns = [_Column(k, K, length) for k in range(K)]
    for tick, k in enumerate(_turns(method, K, seed)):
        column = columns[k]
        if all(other.done for other in columns[k:]):
            continue
        entry = buffers[k].get() if k > 0 else None
        if k > 0 and entry is None:
            continue
        if k == 0 and column.due:
            _evaluate(columns, tick)
        if k + 1 < K:
            buffers[k + 1].put(None, column.ordinal, column.updates)
        column.visit(column.ordinal if entry is None else entry.ordinal, tick)
        if all(other.done for other in columns):
            if length.every:
                _evaluate(columns, tick + 1)
            break
    return Plan(tuple(tuple(column.steps) for column in columns)), [buffer.close() for buffer in buffers]


def recorded(visits: Sequence[Sequence[Visit]], clip: float | None = None, cuts: Sequence[Cut] = ()) -> tuple[Plan, bool]:
    """Returns the plan of what K processes did, and whether it has all of their visits; a stage's ends where what it read is not on record.

    A tick is one visit of stage 0; other visits have the earliest tick at which all that was read is there.
    cuts: of a checkpoint. The plan then begins there: it leaves earlier visits out, and what the replay buffers held is there to be read.
    """
    columns: list[list[Step]] = []
    made: dict[tuple[int, bool], int] = {}  # (ordinal or evaluation batch, evaluates) of the stage below -> its tick
    whole = True
    for k, (stage, cut) in enumerate(zip(visits, cuts or [Cut(0, 0)] * len(visits), strict=True)):
        steps, own, tick = list[Step](), dict[tuple[int, bool], int](), 0
        made |= {(ordinal, False): 0 for ordinal in cut.held}
        for i, visit in enumerate(one for one in stage if not cut.keeps(one)):
            read = (visit.ordinal if visit.evaluates else visit.source, visit.evaluates)
            if k > 0 and read not in made:
                whole = False
                break
            tick = max(tick, i if k == 0 else made[read])
            own[visit.ordinal, visit.evaluates] = tick
            steps += _steps(visit, k, tick, clip)
        columns.append(steps)
        made = own
    return Plan(tuple(map(tuple, columns))), whole


def _steps(visit: Visit, k: int, tick: int, clip: float | None) -> Iterator[Step]:
    if visit.evaluates:
        yield Step(Evaluate(visit.ordinal), tick, visit.version, up=visit.sent)
        return
    forward = Forward(visit.ordinal, visit.trains, visit.source)
    yield Step(forward, tick, visit.version, keep="graph" if visit.trains else "nothing", up=visit.sent)
    if visit.trains:
        yield Step(Backward(visit.ordinal, loss=k), tick, visit.version, last=True)
        yield Step(Update(clip=clip), tick, visit.version)


class _Column:
    """One stage's visits so far."""

    def __init__(self, k: int, K: int, length: RunLength) -> None:
        self.k, self.length, self.up = k, length, k + 1 < K
        self.steps: list[Step] = []
        self.ordinal = self.updates = self.evaluations = 0  # numbers of the next visit, update and evaluation

    @property
    def done(self) -> bool:
        return self.updates == self.length.batches

    @property
    def due(self) -> bool:
        """True if an evaluation belongs before the next batch."""
        every = self.length.every
        return bool(every) and not self.done and self.updates > 0 and self.updates % every == 0

    def visit(self, source: int, tick: int) -> None:
        visit = Visit(self.ordinal, source, not self.done, self.updates, sent=self.up)
        self.steps += _steps(visit, self.k, tick, self.length.clip)
        self.ordinal += 1
        self.updates += visit.trains

    def evaluate(self, tick: int) -> None:
        first = self.evaluations * self.length.evaluation
        visits = (Visit(first + i, -1, False, self.updates, evaluates=True, sent=self.up) for i in range(self.length.evaluation))
        self.steps += [step for visit in visits for step in _steps(visit, self.k, tick, None)]
        self.evaluations += 1


def _evaluate(columns: Sequence[_Column], tick: int) -> None:
    for column in columns:
        column.evaluate(tick)


def _turns(method: AsyncDGL, K: int, seed: int) -> Iterator[int]:
    """Yields the stages in the order in which they take their turns."""
    if method.order == "round-robin":
        yield from (i % K for i in count())
    heights = list(accumulate(1 / method.slowdown(k) for k in range(K)))
    for i in count():
        yield bisect_right(heights, key("turn", seed, i) / 2**63 * heights[-1], hi=K - 1)
