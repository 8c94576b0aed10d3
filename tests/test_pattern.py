"""A plan read off a period of its method: the same as one that was looked through, and nothing is drawn for another's sake."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from delock.methods import ADL, BP, DSP, FDG, FR, Interlocking, Method, OneFOneB
from delock.ops import Backward, Forward, Op, Update
from delock.plan import PlanError, RunLength, unroll, windows
from test_plan import cases

from oracles_plan import plain

# 11 leaves incomplete groups for M = 2, 3, 4; a run that begins with batch 5 begins in the middle of one
LENGTHS = (
    RunLength(11, every=4, evaluation=2, clip=1.0),
    RunLength(3),
    RunLength(15, every=4, evaluation=2, clip=1.0, first=5),
    RunLength(10, first=6),
)


@pytest.mark.parametrize("K", [1, 3, *(pytest.param(K, marks=pytest.mark.slow) for K in (2, 5))])
def test_a_plan_equals_one_that_was_looked_through(K: int) -> None:
    for method in cases(K):
        for length in LENGTHS:
            for k, (column, expected) in enumerate(zip(unroll(method, K, length).columns, plain(method, K, length), strict=True)):
                assert list(column) == expected, (method, k, length)


@dataclass(frozen=True)
class Mixed(Method):
    """A method that nobody would think of: two Updates in three ticks, replay and stash of one batch, parts of it with no error below."""

    name = "mixed"

    @property
    def batches_per_update(self) -> int:
        return 3

    @property
    def micro_batches(self) -> int:
        return 2

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        for b in (2 * t, 2 * t + 1):
            yield Forward(b)
        for b in range(2 * t - self.delay(k, K), 2 * (t + 1) - self.delay(k, K)):
            if b % 6 < 3:
                yield Backward(b, K - 1, at="replay", part="input")
                yield Backward(b, K - 1, at="stash" if b % 6 < 2 else "replay", part="weights")
            else:
                yield Backward(b, k, at="replay")
        if t % 3 < 2:
            yield Update()

    def delay(self, k: int, K: int) -> int:
        return 4 * (K - 1 - k)


@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("batches", [1, 7, 12])
@pytest.mark.parametrize("first", [0, 1, 8])
def test_a_method_of_any_make(K: int, batches: int, first: int) -> None:
    length = RunLength(first + batches, every=5, evaluation=1, first=first)
    assert [list(column) for column in unroll(Mixed(), K, length).columns] == plain(Mixed(), K, length)


@dataclass(frozen=True)
class Counted(FDG):
    """FDG that counts how often its ticks are drawn, by stage."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "drawn", Counter())

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        self.drawn[k] += 1  # type: ignore[attr-defined]
        return super().tick(t, k, K)


def test_a_rank_draws_no_foreign_columns_and_no_tick_twice() -> None:
    method = Counted()
    for plan in windows(method, 16, RunLength(1000), 64, stages=range(6, 9)):
        assert {k for k, column in enumerate(plan.columns) if column} <= {6, 7, 8}
    assert method.drawn == dict.fromkeys(range(5, 10), 2)  # type: ignore[attr-defined]  # one period, and the next to compare


@pytest.mark.parametrize("method", [BP(), OneFOneB(3), FR(), FDG(), ADL(3), DSP(2, (1, 3, 1, 2)), Interlocking(3, "sum")], ids=str)
def test_a_ranks_columns_are_the_plans(method: Method) -> None:
    K, length = 5, RunLength(23, every=6, evaluation=2, clip=1.0)
    for k in range(K):
        near = range(max(0, k - 1), min(K, k + 2))
        for rank, whole in zip(windows(method, K, length, 4, near), windows(method, K, length, 4), strict=True):
            assert rank.columns == tuple(column if j in near else () for j, column in enumerate(whole.columns))


def test_a_method_that_does_not_repeat_itself_is_refused() -> None:
    class Growing(FDG):
        def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
            yield Forward(t)
            yield Backward(t - t * t, K - 1)
            yield Update()

    with pytest.raises(PlanError, match="fdg does not repeat itself: tick 1 of stage 0 is not tick 0 with all batches 1 later"):
        unroll(Growing(), 2, 5)
