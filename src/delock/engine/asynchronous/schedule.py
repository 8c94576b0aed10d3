"""Plans of runs with replay buffers: drawn here (sampled, round-robin), or recorded by processes that ran freely."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, count

from delock.engine.asynchronous.buffer import ReplayBuffer, ReuseStatistics
from delock.keys import key
from delock.methods.dgl_async import AsyncDGL
from delock.ops import Backward, Evaluate, Forward, Update
from delock.plan.steps import Plan, RunLength, Step
from delock.records import Visit


def drawn(method: AsyncDGL, K: int, length: RunLength, seed: int = 0) -> tuple[Plan, list[ReuseStatistics]]:
    """The whole plan of a run in one process, a tick per turn, and per stage what was read.

    A stage loses its turn whose buffer has nothing for it, or that is done, as all above it are. With course.every all stages evaluate
    when stage 0 has made so many updates. Raises UsageError when the method does not fit K stages.
    """
    method.fits(K)
    buffers: list[ReplayBuffer[None]] = [ReplayBuffer(method.buffer, method.max_reuse) for _ in range(K)]  # in front of each stage
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
            buffers[k + 1].put(None, column.visits, column.updates)
        column.visit(column.visits if entry is None else entry.ordinal, tick)
        if all(other.done for other in columns):
            if length.every:
                _evaluate(columns, tick + 1)
            break
    return Plan(tuple(tuple(column.steps) for column in columns)), [buffer.close() for buffer in buffers]


def recorded(turns: Sequence[Sequence[Visit]], clip: float | None = None) -> tuple[Plan, bool]:
    """The plan of what K processes did, each stage's as far as what it read is on record, and whether that is all of their turns.

    A tick is the earliest at which all that was read is there, one per turn of stage 0.
    """
    columns: list[list[Step]] = []
    made: dict[tuple[int, bool], int] = {}  # (ordinal or evaluation batch, evaluates) of the stage below -> its tick
    whole = True
    for k, stage in enumerate(turns):
        steps, own, tick = list[Step](), dict[tuple[int, bool], int](), 0
        for i, turn in enumerate(stage):
            read = (turn.ordinal if turn.evaluates else turn.source, turn.evaluates)
            if k > 0 and read not in made:
                whole = False
                break
            tick = max(tick, i if k == 0 else made[read])
            own[turn.ordinal, turn.evaluates] = tick
            steps += _steps(turn, k, tick, clip)
        columns.append(steps)
        made = own
    return Plan(tuple(map(tuple, columns))), whole


def _steps(turn: Visit, k: int, tick: int, clip: float | None) -> Iterator[Step]:
    if turn.evaluates:
        yield Step(Evaluate(turn.ordinal), tick, turn.version, up=turn.sent)
        return
    forward = Forward(turn.ordinal, turn.trains, turn.source)
    yield Step(forward, tick, turn.version, keep="graph" if turn.trains else "nothing", up=turn.sent)
    if turn.trains:
        yield Step(Backward(turn.ordinal, loss=k), tick, turn.version, last=True)
        yield Step(Update(clip=clip), tick, turn.version)


class _Column:
    """One stage's turns so far."""

    def __init__(self, k: int, K: int, length: RunLength) -> None:
        self.k, self.length, self.up = k, length, k + 1 < K
        self.steps: list[Step] = []
        self.visits = self.updates = self.evaluations = 0

    @property
    def done(self) -> bool:
        return self.updates == self.length.batches

    @property
    def due(self) -> bool:
        """Whether an evaluation belongs before the next batch."""
        every = self.length.every
        return bool(every) and not self.done and self.updates > 0 and self.updates % every == 0

    def visit(self, source: int, tick: int) -> None:
        turn = Visit(self.visits, source, not self.done, self.updates, sent=self.up)
        self.steps += _steps(turn, self.k, tick, self.length.clip)
        self.visits += 1
        self.updates += turn.trains

    def evaluate(self, tick: int) -> None:
        first = self.evaluations * self.length.evaluation
        turns = (Visit(first + i, -1, False, self.updates, evaluates=True, sent=self.up) for i in range(self.length.evaluation))
        self.steps += [step for turn in turns for step in _steps(turn, self.k, tick, None)]
        self.evaluations += 1


def _evaluate(columns: Sequence[_Column], tick: int) -> None:
    for column in columns:
        column.evaluate(tick)


def _turns(method: AsyncDGL, K: int, seed: int) -> Iterator[int]:
    """The stages in the order in which they act."""
    if method.order == "round-robin":
        yield from (i % K for i in count())
    heights = list(accumulate(1 / method.slowdown(k) for k in range(K)))
    for i in count():
        yield bisect_right(heights, key("turn", seed, i) / 2**63 * heights[-1], hi=K - 1)
