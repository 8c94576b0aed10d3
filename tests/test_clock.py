"""The clock and what is read off it without making a plan, against plain passes over the whole plan: all numbers are the same bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest

from delock.memory.peaks import repeating
from delock.memory.slots import slots, slots_of_any
from delock.methods import BP, DGL, DSP, FDG, FR, Interlocking, Method, OneFOneB
from delock.plan import RunLength, unroll
from delock.plan.pattern import Pattern, Recurring, patterns
from delock.timeline import (
    Costs,
    Slowdown,
    capacities,
    clocked,
    gradient_staleness,
    idle,
    in_flight,
    layer_staleness,
    messages,
    predict,
    simulate,
    speedup,
    throughput,
    warm_group,
)
from delock.timeline.measures import at_once
from test_pattern import Counted, Mixed

from harness import enough, options_of
from oracles_clock import PlainClock
from timings import EVERY

METHODS = [*EVERY, Mixed()]


def chosen(method: Method, K: int) -> Method:
    return Interlocking(K) if isinstance(method, Interlocking) and method.n_wise > K else method


def turns(method: Method, *more: Any) -> tuple[Any, ...]:
    """Values that the fast suite has each once."""
    return (*options_of(method), *more)


def drawn(method: Method, K: int, barrier: bool) -> Iterator[Costs]:
    """Random costs: without and with room in the links, without and with slow ticks."""
    draw = random.Random(f"{method} {K}")

    def some(n: int, most: float) -> tuple[float, ...]:
        return tuple(draw.choice((draw.uniform(0, most), most)) for _ in range(n))

    for slow in (None, Slowdown(1.5, 0.3, seed=K)):
        for capacity in ((), capacities(method, K), tuple(room + draw.randrange(3) for room in capacities(method, K))):
            work = [some(K, most) for most in (1.0, 2.0, 1.0, 0.2, 0.5)]
            yield Costs(*work, some(K - 1, 1.5), some(K - 1, 1.5), capacity, barrier, slow)


@pytest.mark.parametrize(
    ("method", "K", "barrier"), enough(itertools.product(METHODS, (1, 4), (False, True)), together=1, of=turns), ids=str
)
def test_a_timeline_equals_that_of_the_plain_clock(method: Method, K: int, barrier: bool) -> None:
    method = chosen(method, K)
    length = RunLength(9, clip=1.0) if barrier else RunLength(9, every=4, evaluation=5, clip=1.0)
    plan = unroll(method, K, length)
    for costs in drawn(method, K, barrier):
        found = [[(s.op, s.start, s.end, s.waited, s.full) for s in column] for column in simulate(plan, costs).columns]
        assert found == PlainClock(plan, costs).run()


@pytest.mark.parametrize(("method", "K", "barrier"), enough(itertools.product(METHODS, (5,), (False, True)), together=1, of=turns), ids=str)
def test_patterns_have_the_times_of_their_plan(method: Method, K: int, barrier: bool) -> None:
    method = chosen(method, K)
    for costs in drawn(method, K, barrier):
        timeline, clock = simulate(unroll(method, K, 14), costs), clocked(patterns(method, K), 14, costs)
        assert (clock.times.starts, clock.times.ends) == (timeline.times.starts, timeline.times.ends)
        assert [list(map(type, ops)) for ops in clock.times.ops] == [list(map(type, ops)) for ops in timeline.times.ops]
        assert messages(timeline) == [(at_once(clock.under_way(k, "up")), at_once(clock.under_way(k + 1, "down"))) for k in range(K - 1)]


def whole(draw: random.Random, K: int, most: int) -> tuple[float, ...]:
    """Costs that are added without rounding: quarters."""
    return tuple(draw.choice((draw.randrange(1, most), most)) / 4 for _ in range(K))


@pytest.mark.parametrize(("method", "K", "barrier"), enough(itertools.product(METHODS, (5,), (False, True)), together=1, of=turns), ids=str)
def test_a_run_that_is_drawn_out_equals_one_that_is_followed(method: Method, K: int, barrier: bool) -> None:
    method = chosen(method, K)
    draw = random.Random(f"{method} {K} {barrier}")
    stages, batches = patterns(method, K), 3 * method.span(K) + 60 * method.batches_per_update + 1
    for room in ((), capacities(method, K)):
        for most in (2, 9):  # stages that are nearly alike, and such as are not
            work = [whole(draw, n, most) for n in (K, K, K, K, K, K - 1, K - 1)]
            costs = Costs(*work, room, barrier)
            timeline, clock = simulate(unroll(method, K, batches), costs), clocked(stages, batches, costs)
            assert (clock.times.starts, clock.times.ends) == (timeline.times.starts, timeline.times.ends)
            assert [list(map(type, ops)) for ops in clock.times.ops] == [list(map(type, ops)) for ops in timeline.times.ops]
            assert idle(clock.times) == idle(timeline)


def test_what_is_known_is_not_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    followed: list[int] = []
    drawn_by = Pattern.occurrences

    def occurrences(self: Pattern, batches: int) -> Iterator[tuple[int, Recurring, int, int]]:
        followed.append(batches)
        return drawn_by(self, batches)

    monkeypatch.setattr(Pattern, "occurrences", occurrences)
    stages = patterns(FDG(), 4)
    clocked(stages, 1000, replace(Costs.unit(4), capacity=(2, 2, 2)))
    assert max(followed) < 60
    clocked(stages, 1000, replace(Costs.unit(4), forward=(1 / 3,) * 4))  # rounded, so that nothing is known
    clocked(stages, 1000, replace(Costs.unit(4), slow=Slowdown(1.0, 0.5)))
    clocked(patterns(DGL(), 4), 1000, replace(Costs.unit(4), forward=(1.0, 1.0, 1.0, 5.0)))  # links without end: stage 0 gets ahead
    assert followed.count(1000) == 3 * 4


@pytest.mark.parametrize(("method", "K"), enough(itertools.product(METHODS, (2, 5)), together=1), ids=str)
def test_a_prediction_is_what_the_whole_plan_says(method: Method, K: int) -> None:
    method = chosen(method, K)
    costs = list(drawn(method, K, barrier=False))[1]
    batches = 2 * method.span(K) + 6 * method.batches_per_update
    told, plan = predict(method, K, costs, batches), unroll(method, K, batches)
    timeline = simulate(plan, costs)
    assert told.period == method.micro_batches / throughput(timeline)
    assert told.messages == tuple(messages(timeline))
    for stage, column, share, held in zip(told.stages, plan.columns, idle(timeline), in_flight(plan), strict=True):
        staleness = fmean(warm_group(gradient_staleness(column), method.batches_per_update * method.micro_batches))
        assert (stage.staleness, stage.layer_staleness) == (staleness, max(layer_staleness(column).values()))
        assert (stage.idle, stage.held) == (share, held)


def test_a_speedup_is_that_of_the_prediction() -> None:
    for method in (BP(2), OneFOneB(3), FDG(), FR()):
        for costs in (Costs.unit(4), replace(Costs.unit(4), barrier=True)):
            assert speedup(method, 4, costs) == predict(method, 4, costs).speedup


@pytest.mark.parametrize(
    ("method", "decoded"), enough(itertools.product(EVERY, ((False, False), (True, False), (True, True))), together=1), ids=str
)
def test_slots_are_those_of_the_costliest_run(method: Method, decoded: tuple[bool, bool]) -> None:
    K = 4
    costs = replace(next(drawn(method, K, barrier=False)), up=(), down=())
    plan = unroll(method, K, batches := repeating(method, K))
    alike = [[sum(own) / K] * K for own in (costs.forward, costs.backward, costs.head)]
    runs = [costs]
    for slow in (None, *range(K)):
        forward, backward, head = (tuple(cost * (1.3 if k == slow else 1) for k, cost in enumerate(own)) for own in alike)
        runs.append(replace(costs, forward=forward, backward=backward, head=head))
    found = [slots(simulate(plan, replace(own, capacity=capacities(method, K))), decoded) for own in runs]
    expected = [(max(up for up, _ in link), max(down for _, down in link)) for link in zip(*found, strict=True)]
    assert slots_of_any(method, batches, costs, decoded) == expected


def test_a_prediction_draws_one_period() -> None:
    method = Counted()
    predict(method, 32, Costs.unit(32))
    assert method.drawn == dict.fromkeys(range(32), 2)  # type: ignore[attr-defined]  # it, and the next to compare


def test_replays_are_timed_as_planned() -> None:
    """A batch whose Forward used the newest weights is not recomputed: the first one, while there has been no Update."""
    costs = replace(Costs.unit(3), replay=(5.0,) * 3)
    for method in (FR(), DSP(2, 1)):
        clock = clocked(patterns(method, 3), 12, costs)
        assert clock.times.ends == simulate(unroll(method, 3, 12), costs).times.ends
        assert clock.times.ends != clocked(patterns(method, 3), 12, replace(costs, replay=(1.0,) * 3)).times.ends
