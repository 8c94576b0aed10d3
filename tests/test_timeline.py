"""The clock against the formulas: when ops start and end, periods, bubbles, stragglers, back-pressure, and the batches held."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import pytest

from delock.errors import PlanError, UsageError
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Interlocking, Method, OneFOneB
from delock.ops import Backward, Evaluate, Forward, Op, Update
from delock.plan import Plan, RunLength, unroll
from delock.timeline import (
    Costs,
    HeldCounts,
    Slowdown,
    Span,
    Timeline,
    capacities,
    gradient_staleness,
    idle,
    in_flight,
    layer_staleness,
    messages,
    period,
    simulate,
    steady,
    throughput,
)

from timings import EVERY, STRAGGLERS, linked


def spans(timeline: Timeline, k: int) -> list[tuple[Op, float, float]]:
    return [(span.op, span.start, span.end) for span in timeline.columns[k]]


# ---- when an op starts and ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY, ids=str)
@pytest.mark.parametrize("K", [1, 2, 4])
def test_the_clock_equals_a_recursion_over_the_rule(method: Method, K: int) -> None:
    if isinstance(method, Interlocking) and method.n_wise > K:
        method = Interlocking(K)
    plan = unroll(method, K, RunLength(9, every=4, evaluation=2))
    seconds = Costs(
        forward=tuple(1.0 + 0.3 * k for k in range(K)),
        backward=tuple(2.5 - 0.4 * k for k in range(K)),
        replay=tuple(1.1 for _ in range(K)),
        update=tuple(0.2 * k for k in range(K)),
        head=tuple(0.7 + 0.1 * k for k in range(K)),
        up=tuple(0.5 + k for k in range(K - 1)),
        down=tuple(2.0 - 0.5 * k for k in range(K - 1)),
    )
    steps = [(k, i, step) for k, column in enumerate(plan.columns) for i, step in enumerate(column)]
    upward = [(k, i, step) for k, i, step in steps if isinstance(step.op, Forward | Evaluate)]
    place = {(k, type(step.op), step.op.batch): i for k, i, step in upward}  # type: ignore[union-attr]
    kept = {(k, step.op.batch): step.keep for k, _, step in upward if isinstance(step.op, Forward)}

    @lru_cache(None)
    def end(k: int, i: int) -> float:
        if i < 0:
            return 0.0
        op, ready = plan.columns[k][i].op, end(k, i - 1)
        if isinstance(op, Forward | Evaluate):
            arrival = end(k - 1, place[k - 1, type(op), op.batch]) + seconds.up[k - 1] if k else 0.0
            return max(ready, arrival) + seconds.forward[k]
        if isinstance(op, Update):
            return ready + seconds.update[k]
        if op.at == "replay" and kept[k, op.batch] == "input":
            ready += seconds.replay[k]
        arrival, work = 0.0, seconds.backward[k] if op.part == "both" else seconds.backward[k] / 2
        if op.part != "weights":
            work += seconds.head[k] if op.loss == k else 0.0
            arrival = max((end(k + 1, i) + seconds.down[k] for i in senders(k, op)), default=0.0)
        return max(ready, arrival) + work

    def senders(k: int, op: Backward) -> list[int]:
        above = enumerate(plan.columns[k + 1]) if op.loss > k else ()
        return [i for i, step in above if isinstance(b := step.op, Backward) and (b.batch, b.loss) == (op.batch, op.loss) and step.down]

    timeline = simulate(plan, seconds)
    for k, column in enumerate(timeline.columns):
        assert [span.op for span in column] == [step.op for step in plan.columns[k]]
        assert [span.end for span in column] == pytest.approx([end(k, i) for i in range(len(column))], abs=1e-9)
        before = 0.0
        for span in column:
            assert span.start - before == pytest.approx(span.waited, abs=1e-9)
            before = span.end
    assert timeline.begin == 0
    assert timeline.end == max(column[-1].end for column in timeline.columns)


def test_a_recomputation_runs_while_its_error_is_under_way() -> None:
    timeline = simulate(unroll(FR(), 2, 2), linked(2, 5.0))
    # stage 1 has backwarded batch 0 at 1 + 5 + 1 + 2 = 9, so its error is there at 14; no Update: the graph of batch 0 was kept
    assert spans(timeline, 0)[:4] == [(Forward(0), 0, 1), (Forward(1), 1, 2), (Backward(0, 1, "replay"), 14, 16), (Update(), 16, 16)]
    # stage 1 is free at 9 and has batch 1 since 7, so its error arrives at 12 + 5 = 17, while stage 0 recomputes from 16 to 17
    assert spans(timeline, 0)[4:] == [(Backward(1, 1, "replay"), 16, 19), (Update(), 19, 19)]


def test_a_full_link_holds_its_sender() -> None:
    plan = unroll(DSP(3, 3), 2, 5)
    costs = Costs(forward=(1.0, 10.0), backward=(1.0, 10.0))
    free = simulate(plan, costs).columns[0]
    assert [span.end for span in free[:5]] == [1, 2, 3, 4, 5]
    held = simulate(plan, replace(costs, capacity=(2,))).columns[0]
    # stage 1 takes batches 0, 1, 2 at 1, 21, 41; batch 2 is put on the link of two when batch 0 is gone, batch 3 when batch 1 is
    assert [(span.end, span.waited) for span in held[:5]] == [(1, 0), (2, 0), (3, 0), (4, 0), (22, 17)]
    assert [span.full for span in held[:5]] == [0, 0, 0, 0, 17]
    assert all(span.full == 0 for span in free)


@pytest.mark.parametrize("barrier", [False, True])
@pytest.mark.parametrize("method", EVERY, ids=str)
def test_the_engines_links_are_deep_enough(method: Method, barrier: bool) -> None:
    for K in (2, 3, 5):
        plan = unroll(method, K, RunLength(20) if barrier else RunLength(20, every=6, evaluation=17))  # more evaluations than a link holds
        costs = linked(K, 0.5, barrier=barrier, capacity=capacities(method, K), slow=Slowdown(2.0, 0.3))
        done = simulate(plan, costs)
        assert [len(column) for column in done.columns] == [len(column) for column in plan.columns]


def test_a_link_that_is_too_small_is_told() -> None:
    with pytest.raises(PlanError, match=r"stage 0: F1 finds its link full(.|\n)*stage 0 \|F0.0"):
        simulate(unroll(DSP(3, 3), 2, 9), replace(Costs.unit(2), barrier=True, capacity=(1,)))


def test_a_plan_that_cannot_go_on_is_told() -> None:
    plan = unroll(BP(), 2, 2)
    with pytest.raises(PlanError, match="stage 0: B0 waits for B0 of the loss of stage 1 on stage 1"):
        simulate(Plan((plan.columns[0], plan.columns[1][3:] + plan.columns[1][:3])), Costs.unit(2))
    with pytest.raises(UsageError, match="costs of 3 stages cannot time a plan of 2 stages"):
        simulate(plan, Costs.unit(3))


# ---- speed -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.0, 0.5, 1.5, 2.0, 3.0, 7.0])
def test_steady_periods_under_latency(c: float) -> None:
    C = 3.0

    def steadily(method: Method) -> float:
        return period(simulate(unroll(method, 2, 200), linked(2, c)))

    assert steadily(FDG(order="backward-first")) == pytest.approx(C + c)
    assert steadily(FDG()) == pytest.approx(max(C, 2 * (C + c) / 3))
    assert steadily(DDG()) == pytest.approx(C + c)


@pytest.mark.parametrize("K", [2, 3, 5])
@pytest.mark.parametrize("M", [1, 2, 4, 6])
def test_the_bubble_of_synchronous_pipelines(K: int, M: int) -> None:
    for method in (GPipe(M), OneFOneB(M)):
        timeline = simulate(unroll(method, K, 8), Costs.unit(K))
        assert idle(timeline) == pytest.approx([(K - 1) / (M + K - 1)] * K), method
        assert idle(timeline, whole=True) == pytest.approx([(K - 1) / (M + K - 1)] * K), method
        assert period(timeline) == pytest.approx(3 * (M + K - 1))
        assert throughput(timeline) == pytest.approx(M / (3 * (M + K - 1)))


def test_the_forward_lock_costs_time_only_under_a_barrier_or_latency() -> None:
    def steadily(method: Method, costs: Costs) -> float:
        return period(simulate(unroll(method, 4, 60), costs))

    lockstep = replace(Costs.unit(4), barrier=True)
    assert steadily(DDG(), Costs.unit(4)) == steadily(FDG(), Costs.unit(4)) == pytest.approx(3)
    assert steadily(FDG(), lockstep) == pytest.approx(3)
    assert steadily(DDG(), lockstep) == pytest.approx(4 * 1 + 2)  # a tick is the forward through all stages, and one backward
    assert steadily(BP(), lockstep) == pytest.approx(12)
    assert steadily(FDG(), linked(4, 1.0)) < steadily(DDG(), linked(4, 1.0))


@pytest.mark.parametrize(
    ("method", "calm", "straggling"),
    [
        pytest.param(BP(), 1.00, 0.80, marks=pytest.mark.slow),
        (DDG(), 4.00, 2.47),
        pytest.param(FR(), 3.00, 1.85, marks=pytest.mark.slow),
        (FDG(), 4.00, 2.86),
        pytest.param(DSP(1, 1), 3.00, 2.14, marks=pytest.mark.slow),
        (DSP(2, 2), 3.00, 2.27),
        pytest.param(DSP(3, 3), 3.00, 2.31, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_stragglers_as_the_reference_simulation_has_them(method: Method, calm: float, straggling: float) -> None:
    """Its replays are part of every Backward, of the last stage's as well, and overlap nothing. Six seeds of ours scatter by 0.7 % around
    their mean; the reference is a run of unknown length as well, rounded: 2.5 % is three times what two such runs differ by.
    """
    replays = isinstance(method, FR | DSP)
    costs = Costs(forward=(1.0,) * 4, backward=(2.0 + replays,) * 4, replay=(0.0,) * 4)
    whole_pass = 12.0  # BP without stragglers
    assert whole_pass * throughput(simulate(unroll(method, 4, 100), costs)) == pytest.approx(calm)
    slow = simulate(unroll(method, 4, 3000), replace(costs, slow=STRAGGLERS))
    assert whole_pass * throughput(slow) == pytest.approx(straggling, rel=0.025)


@pytest.mark.parametrize("method", [FR(), pytest.param(DSP(), marks=pytest.mark.slow)], ids=str)
def test_overlapping_the_recomputation_hides_stragglers(method: Method) -> None:
    plain = Costs(forward=(1.0,) * 4, backward=(3.0,) * 4, replay=(0.0,) * 4, slow=STRAGGLERS)
    plan = unroll(method, 4, 1000)
    overlapped = throughput(simulate(plan, replace(Costs.unit(4), slow=STRAGGLERS)))
    assert overlapped > 1.01 * throughput(simulate(plan, plain))
    assert 12 * overlapped < 12 / (4 * 1.25) * 1.03  # no stage is faster than its mean tick


def test_slow_ticks_are_a_function_of_their_names() -> None:
    drawn = [[Slowdown(0.5, 0.25, seed=7).extra(t, k) for t in range(4000)] for k in range(3)]
    assert drawn == [[Slowdown(0.5, 0.25, seed=7).extra(t, k) for t in range(4000)] for k in range(3)]
    assert drawn[0] != drawn[1]
    for stage in drawn:
        assert set(stage) == {0.0, 0.5}
        assert stage.count(0.5) == pytest.approx(1000, abs=4 * (4000 * 0.25 * 0.75) ** 0.5)  # four standard deviations
    assert drawn[0] != [Slowdown(0.5, 0.25, seed=8).extra(t, 0) for t in range(4000)]
    assert [Slowdown(1.0, victim=2).extra(5, k) for k in range(4)] == [0, 0, 1, 0]
    one = simulate(unroll(FDG(), 4, 60), replace(Costs.unit(4), slow=Slowdown(1.0, victim=2)))
    assert period(one) == pytest.approx(6)


def test_speed_of_a_measured_timeline() -> None:
    column = [Span(0, Forward(0), 100.0, 101.0, 0, 0, 0.0)]
    for b in range(20):
        start = 102.0 + 4 * b
        column += [Span(0, Backward(b, 0), start, start + 2, b, b, 1.0), Span(0, Update(), start + 2, start + 2.5, b, b, 0.0)]
        column += [Span(0, Forward(b + 1), start + 2.5, start + 3, b + 1, b + 1, 0.0)]
    timeline = Timeline((tuple(column),))
    begin, end, updates = steady(timeline)
    assert (end - begin) / updates == period(timeline) == 4
    assert throughput(timeline) == 0.25
    assert idle(timeline) == pytest.approx([0.25])
    assert idle(timeline, whole=True) == pytest.approx([1 - (1 + 20 * 3) / 81])
    short = Timeline((tuple(column[:3]),))
    assert (period(short), throughput(short)) == (4.5, pytest.approx(1 / 4.5))
    assert idle(Timeline(((), ()))) == [0.0, 0.0]


# ---- what is in flight -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", [1, 4, *(pytest.param(K, marks=pytest.mark.slow) for K in (2, 3, 5))])
def test_what_stages_hold(K: int) -> None:
    def held(method: Method) -> tuple[HeldCounts, ...]:
        return in_flight(unroll(method, K, 40))

    for k in range(K):
        d, D, last = K - 1 - k, 2 * (K - 1 - k), k == K - 1
        assert held(BP())[k] == HeldCounts(1, 0, 1)
        assert held(GPipe(4))[k] == HeldCounts(4, 0, 1)
        assert held(OneFOneB(4))[k] == HeldCounts(min(4, K - k), 0, 1)
        assert held(DDG())[k] == HeldCounts(d + 1, 0, d + 1)
        assert held(FDG())[k] == HeldCounts(D + 1, 0, D + 1)
        assert held(FDG(at="mixed"))[k] == HeldCounts(D + 1, 0, 1)
        assert held(FDG(order="backward-first"))[k] == HeldCounts(max(1, D), 0, max(1, D))
        assert held(ADL(3))[k] == HeldCounts(D + 1, 0, -(-D // 3) + 1)
        assert held(DSP(2, 1))[k].inputs == (0 if last else 3 * d + 1)
        assert held(DSP(2, 1))[k].versions == 1
        assert held(DSP(2, 1))[k].graphs == 1  # that of a recomputation, or of a batch that no Update passes
        assert held(FR())[k] == HeldCounts(1, 0 if last else d + 1, 1)
        for A in (2, 3, 4):
            assert held(DDG(accumulate=A))[k] == HeldCounts(d + 1, 0, -(-d // A) + 1)
            assert held(FR(accumulate=A))[k].graphs == min(d + 1, A)
            assert held(DSP(accumulate=A))[k].graphs == min(D + 1, A)
            assert held(DSP(micro_batches=2, accumulate=A))[k].graphs == min(D + 1, 2 * A)


def test_messages_under_way() -> None:
    calm = simulate(unroll(FDG(), 4, 60), Costs.unit(4))
    assert all(up <= 2 and down <= 2 for up, down in messages(calm))
    assert messages(simulate(unroll(BP(), 3, 5), Costs.unit(3))) == [(1, 1), (1, 1)]
    plan = unroll(DSP(3, 3), 4, 400)
    jitter = replace(Costs.unit(4), slow=STRAGGLERS)
    loose, tight = messages(simulate(plan, jitter)), messages(simulate(plan, replace(jitter, capacity=(4, 4, 4))))
    assert max(max(link) for link in loose) > 4 + 1  # more than lock-step's 1 + lag: links need a stated capacity
    assert max(max(link) for link in tight) <= 4 + 1  # what the link holds, and the one that a stopped sender has in its hands
    assert messages(simulate(unroll(BP(), 1, 5), Costs.unit(1))) == []


@pytest.mark.parametrize("method", EVERY, ids=str)
def test_staleness_is_the_same_on_plans_and_timelines(method: Method) -> None:
    plan = unroll(method, 3, RunLength(15, every=6, evaluation=2))
    for steps, column in zip(plan.columns, simulate(plan, linked(3, 1.0)).columns, strict=True):
        assert gradient_staleness(column) == gradient_staleness(steps)
        assert layer_staleness(column) == layer_staleness(steps)
        assert len(gradient_staleness(column)) == len(layer_staleness(column)) == 15 * method.micro_batches
    assert gradient_staleness(plan.columns[0][-3:]) == {} or method.delay(0, 3) == 0  # a window that saw no Forward tells nothing


@pytest.mark.parametrize("combine", ["furthest", "sum", "mean"])
@pytest.mark.parametrize("N", range(1, 5))
def test_the_steady_period_of_interlocking_is_the_same_for_any_K(N: int, combine: Literal["furthest", "sum", "mean"]) -> None:
    for K in range(max(3, N), 9):
        for send, expected in (("early", 2 * (N - 1) + 3), ("late", 3 * N)):
            plan = unroll(Interlocking(N, combine, send), K, 30)  # type: ignore[arg-type]
            assert period(simulate(plan, Costs.unit(K))) == expected, (K, send)
            for k, column in enumerate(plan.columns):  # an error leaves before the weight gradient it comes with, nearest loss first
                sent = [step.op.loss for step in column if isinstance(step.op, Backward) and step.down and step.op.batch == 20]
                assert sent == sorted(sent)
                assert len(sent) <= N - 1 or k == 0
