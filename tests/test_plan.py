"""Plans of every method with every option: they run, windows do not matter, and staleness is what the papers' formulas say."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import product
from random import Random
from statistics import fmean
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from delock.errors import PlanError, UsageError
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, METHODS, AsyncDGL, GPipe, Method, PipeDream2BW, make
from delock.methods.delay_line import Ahead
from delock.ops import NEWEST, Backward, Evaluate, Forward, Update, label
from delock.plan import OpenPlan, Plan, RunLength, Step, chart, check, needs, unroll, walk, windows
from delock.timeline import gradient_staleness, layer_staleness, warm_group

import papers

COURSE = RunLength(batches=11, every=4, evaluation=2)  # the last stretch is shorter, and 11 leaves incomplete groups for M = 2, 3, 4
STAGES = pytest.mark.parametrize("K", [1, 3, pytest.param(6, marks=pytest.mark.slow)])


def cases(K: int) -> Iterator[Method]:
    """Every method that fits K stages, with combinations of its options (numbers: a few): all, or 16 drawn from all."""
    for method in dict.fromkeys(METHODS.values()):  # without aliases
        if method is AsyncDGL:  # its plan here is that of DGL, whatever the options
            yield AsyncDGL()
            continue
        hints = get_type_hints(method)
        names = [field.name for field in fields(method)]  # type: ignore[arg-type]
        every = list(product(*(values(hints[name], K) for name in names)))
        for given in Random(K).sample(every, min(16, len(every))):
            options = dict(zip(names, given, strict=True))
            if options.get("n_wise", 1) <= K and (method is not PipeDream2BW or options["micro_batches"] >= K - 1):
                yield method(**options)


def values(hint: Any, K: int) -> Sequence[Any]:
    if get_origin(hint) is Literal:
        return get_args(hint)
    if hint is int:
        return (1, 2, 3, 4)
    if hint == Ahead | None:
        return (None, "part", "mean")
    if hint is float:
        return (0.5,)
    return (1, 2, tuple(1 + (2 * link) % 3 for link in range(K - 1)))  # lags


def shown(column: Sequence[Step], updates: bool = False) -> list[str]:
    """A column's ops as charts write them."""
    used = {step: step.op.weights.used(step.version) if isinstance(step.op, Forward) else step.version for step in column}
    return [f"{label(step.op)}.{version}" for step, version in used.items() if updates or not isinstance(step.op, Update)]


@STAGES
def test_every_plan_passes_its_check(K: int) -> None:
    for method in cases(K):
        plan = unroll(method, K, COURSE)
        check(plan)
        done: set[tuple[int, Any]] = set()
        at = [0] * K
        for k, step in walk(plan):
            assert step == plan.columns[k][at[k]], method
            assert all(name in done for name in needs(k, step.op)), method
            done |= {(k, replace(step.op, weights=NEWEST) if isinstance(step.op, Forward) else step.op)}
            done |= {(k, (step.op.batch, step.op.loss))} if isinstance(step.op, Backward) else set()
            at[k] += 1
        assert at == [len(column) for column in plan.columns], method


@STAGES
def test_any_window_size_gives_the_same_steps(K: int) -> None:
    for method in cases(K):
        whole = unroll(method, K, COURSE).columns
        for size in (1, 3, 8):
            parts = list(windows(method, K, COURSE, size))
            joined = tuple(tuple(step for part in parts for step in part.columns[k]) for k in range(K))
            assert joined == whole, (method, size)


@STAGES
def test_every_batch_is_forwarded_and_backwarded_once_per_stage(K: int) -> None:
    for method in cases(K):
        for k, column in enumerate(unroll(method, K, COURSE).columns):
            ops = [step.op for step in column]
            n = COURSE.batches * method.micro_batches
            assert [op.batch for op in ops if isinstance(op, Forward)] == list(range(n)), method
            backwards = [op for op in ops if isinstance(op, Backward)]
            assert [op.batch for op in backwards if op.part != "input"] == sorted(list(range(n)) * papers.trainers(method, k, K)), method
            assert ops.count(next(op for op in ops if isinstance(op, Update))) == -(-COURSE.batches // method.batches_per_update)
            assert {step.up for step in column if isinstance(step.op, Forward)} == {k < K - 1}
            down = [step.op.loss for step in column if isinstance(step.op, Backward) and step.down]
            assert down == papers.sent_down(method, k, K) * n, method
            last = [step.op.batch for step in column if isinstance(step.op, Backward) and step.last]
            assert last == list(range(n)), method


@STAGES
def test_gradient_staleness_of_every_batch(K: int) -> None:
    for method in cases(K):
        n = 4 * K + 9
        for k, column in enumerate(unroll(method, K, n).columns):
            expected = {b: papers.staleness(method, b, k, K) for b in range(n * method.micro_batches)}
            assert gradient_staleness(column) == expected, (method, k)


@STAGES
def test_layer_staleness_of_every_batch(K: int) -> None:
    for method in cases(K):
        for k, column in enumerate(unroll(method, K, COURSE).columns):
            D = papers.delays(method, K)[k]
            assert method.delay(k, K) == D
            assert layer_staleness(column) == dict.fromkeys(range(COURSE.batches * method.micro_batches), D), (method, k)


@STAGES
def test_warm_groups(K: int) -> None:
    for M, order in product(range(1, 5), papers.ORDERS):
        for k, column in enumerate(unroll(ADL(M, order=order), K, 12 * K).columns):  # type: ignore[arg-type]
            D, e = papers.delays(ADL(), K)[k], int(order == "backward-first" and k < K - 1)
            staleness = gradient_staleness(column)
            last = 12 * K // M * M - M
            assert [staleness[last + j] for j in range(M)] == [max(0, -((j - D + e) // M)) for j in range(M)]
            assert fmean(warm_group(staleness, M)) == pytest.approx((D - e) / M)
        every = [max(gradient_staleness(c).values()) for c in unroll(ADL(max(1, 2 * (K - 1)), order=order), K, 6 * K).columns]  # type: ignore[arg-type]
        assert max(every) <= 1


@pytest.mark.parametrize(
    ("method", "K", "expected"),
    [
        (ADL(2), 3, [[2, 2], [1, 1], [0, 0]]),
        (ADL(2, order="backward-first"), 3, [[2, 1], [1, 0], [0, 0]]),
        (FDG(order="backward-first"), 8, [[13], [11], [9], [7], [5], [3], [1], [0]]),
        (FDG(), 3, [[4], [2], [0]]),
        (DDG(), 4, [[3], [2], [1], [0]]),
        (FR(), 4, [[0], [0], [0], [0]]),
    ],
)
def test_published_examples(method: Method, K: int, expected: list[list[int]]) -> None:
    M = method.batches_per_update
    columns = unroll(method, K, 60).columns
    assert [[gradient_staleness(column)[60 - M + j] for j in range(M)] for column in columns] == expected


@STAGES
def test_no_update_before_the_first_error(K: int) -> None:
    for method in cases(K):
        for k, column in enumerate(unroll(method, K, COURSE).columns):
            kinds = [type(step.op) for step in column]
            assert kinds.index(Update) > kinds.index(Backward)
            before = sum(isinstance(step.op, Forward) and step.version == 0 for step in column)
            assert before >= min(COURSE.batches, papers.delays(method, K)[k]), method


def test_an_incomplete_last_group_is_applied_after_the_drain() -> None:
    for order in ("forward-first", "backward-first"):
        plan = unroll(ADL(4, order=order), 3, 10)  # type: ignore[arg-type]
        check(plan)
        for column in plan.columns:
            assert shown(column, updates=True)[-2:] == ["B9.2", "U.2"]
            assert [step.version for step in column if isinstance(step.op, Update)] == [0, 1, 2]  # batches 0-3, 4-7, 8-9
            assert gradient_staleness(column).keys() == set(range(10))


@STAGES
def test_evaluation_is_a_position_in_the_program(K: int) -> None:
    for method in cases(K):
        plain = unroll(method, K, COURSE.batches)
        for column, without in zip(unroll(method, K, COURSE).columns, plain.columns, strict=True):
            tests = [i for i, step in enumerate(column) if isinstance(step.op, Evaluate)]
            assert [column[i].op.batch for i in tests] == list(range(6))  # type: ignore[union-attr]
            for first, epoch in ((tests[0], 1), (tests[2], 2)):
                behind = column[first + 2]
                assert isinstance(behind.op, Forward)
                assert behind.op.batch == 4 * epoch * method.micro_batches
                assert column[first].version == column[first + 1].version == behind.version
            assert tests[4:] == [len(column) - 2, len(column) - 1]
            trained = [step for step in column if not isinstance(step.op, Evaluate)]
            assert trained == list(without), method  # what is in flight stays untouched


def test_the_charts_in_the_docstrings_are_true() -> None:
    drawn = 0
    for method in METHODS.values():
        rows = re.findall(r"^ *stage (\d) \|(.*?)(?:   .*)?$", re.sub(r"\|\s+", "|", method.__doc__ or ""), re.MULTILINE)
        for k, row in rows:
            cells = [cell for cell in row.split() if cell != ".."]
            column = shown(unroll(method(), len(rows), 12).columns[int(k)], updates="U" in cells)
            for cell, true in zip(cells, column, strict=False):
                assert cell in (true, true.split(".")[0]), (method, k, row)
            drawn += 1
    assert drawn >= 9


def test_the_versions_of_fdg() -> None:
    column = unroll(FDG(), 3, 20).columns
    assert shown(column[0])[:10] == ["F0.0", "F1.0", "F2.0", "F3.0", "F4.0", "B0.0", "F5.1", "B1.1", "F6.2", "B2.2"]
    assert shown(column[2])[:6] == ["F0.0", "B0.0", "F1.1", "B1.1", "F2.2", "B2.2"]
    first = unroll(FDG(order="backward-first"), 3, 20).columns
    assert shown(first[0])[:9] == ["F0.0", "F1.0", "F2.0", "F3.0", "B0.0", "F4.1", "B1.1", "F5.2", "B2.2"]
    assert shown(first[2])[:4] == ["F0.0", "B0.0", "F1.1", "B1.1"]  # the last stage is F B U in both orders
    assert chart(unroll(FDG(), 3, 20), slots=8).splitlines()[0] == "stage 0 |F0.0 F1.0 F2.0 F3.0 F4.0 B0.0 F5.1 B1.1 ..."


def test_charts_of_many_stages_are_aligned() -> None:
    rows = chart(unroll(FDG(), 11, 20), slots=4).splitlines()
    assert [row.index("|") for row in rows] == [9] * 11
    assert rows[9].startswith("stage  9 |")


def test_what_a_forward_keeps() -> None:
    def keeps(method: Method, k: int) -> set[tuple[str, bool]]:
        column = unroll(method, 3, 30).columns[k]
        return {(step.keep, step.snapshot) for step in column[len(column) // 2 :] if isinstance(step.op, Forward)}

    assert keeps(FDG(), 0) == {("graph", True)}
    assert keeps(FDG(at="mixed"), 0) == {("graph", False)}
    assert keeps(DSP(), 0) == {("input", False)}
    for method in (FDG(), DSP(), FR(), DDG()):
        assert keeps(method, 2) == {("graph", False)}  # no Update between Forward and Backward: the same numbers
    assert keeps(GPipe(), 0) == {("graph", False)}
    evaluated = unroll(FDG(), 3, COURSE).columns[0]
    assert {step.keep for step in evaluated if isinstance(step.op, Evaluate)} == {"nothing"}


def changed(plan: Plan, k: int, column: Sequence[Step]) -> Plan:
    return Plan((*plan.columns[:k], tuple(column), *plan.columns[k + 1 :]))


def test_check_tells_a_missing_forward() -> None:
    plan = unroll(FDG(), 3, 5)
    broken = changed(plan, 0, [step for step in plan.columns[0] if step.op != Forward(2)])
    with pytest.raises(PlanError, match="waits for F2 on stage 0, which never comes") as caught:
        check(broken)
    assert "stage 2 |" in str(caught.value)


def test_check_tells_a_missing_error() -> None:
    plan = unroll(FDG(), 3, 5)
    broken = changed(plan, 2, [step for step in plan.columns[2] if not (isinstance(step.op, Backward) and step.op.batch == 3)])
    with pytest.raises(PlanError, match="stage 1: B3 waits for B3 of the loss of stage 2 on stage 2, which never comes"):
        check(broken)


def test_check_tells_an_op_done_twice() -> None:
    plan = unroll(FDG(), 3, 5)
    with pytest.raises(PlanError, match="stage 1 does F0 twice") as caught:
        check(changed(plan, 1, [plan.columns[1][0], *plan.columns[1]]))
    assert "stage 0 |F0.0" in str(caught.value)


def test_check_tells_a_deadlock() -> None:
    plan = unroll(BP(), 2, 2)
    columns = (plan.columns[0], plan.columns[1][3:] + plan.columns[1][:3])  # stage 1 wants batch 1 before batch 0
    with pytest.raises(PlanError, match="cannot go on") as caught:
        check(Plan(tuple(tuple(replace(step, tick=0) for step in column) for column in columns)))
    for line in ("stage 0: B0 waits for B0 of the loss of stage 1 on stage 1", "stage 1: F1 waits for F1 on stage 0", "stage 0 |F0.0"):
        assert line in str(caught.value)


def test_check_tells_a_gradient_that_nobody_applies() -> None:
    plan = unroll(ADL(2), 2, 4)
    with pytest.raises(PlanError, match="stage 0 ends with a gradient that no Update applies"):
        check(changed(plan, 0, plan.columns[0][:-1]))


@pytest.mark.parametrize("given", [{"p": 0}, {"q": 0}, {"p": (1, 0, 1)}, {"q": (1, -1, 2)}])
def test_dsp_refuses_lags_below_one(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="at least 1"):
        make("dsp", **given)


def test_dsp_refuses_lags_of_another_number_of_links() -> None:
    with pytest.raises(UsageError, match=r"got 2 lags p = .* for 4 stages: there are 3 links"):
        unroll(DSP(p=(1, 2)), 4, 5)
    with pytest.raises(UsageError, match="got 3 lags q"):
        unroll(DSP(q=(1, 2, 3)), 3, 5)


def test_dsp_as_the_paper_writes_it() -> None:
    method = DSP.from_paper((1, 1, 0), (4, 2, 0))
    assert method == DSP((1, 1), (1, 1))
    assert [method.delay(k, 3) for k in range(3)] == [4, 2, 0]
    longer = DSP.from_paper((2, 1, 3, 0), (12, 7, 5, 0))
    assert longer == DSP((2, 1, 3), (3, 1, 2))
    assert [max(layer_staleness(column).values()) for column in unroll(longer, 4, 30).columns] == [12, 7, 5, 0]
    for p, m in (((1, 1, 0), (4, 3, 0)), ((1, 1, 0), (4, 2, 1)), ((1, 0), (4, 2, 0)), ((), ())):
        with pytest.raises(UsageError, match=r"DSP\("):
            DSP.from_paper(p, m)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("fgd", {}, "did you mean 'fdg'"),
        ("gpip", {}, "did you mean 'gpipe'"),
        ("zzz", {}, r"no method is called 'zzz' \(there are bp"),
        ("fdg", {"betta": 0.5}, "no option 'betta'; did you mean 'beta'"),
        ("adl", {"acumulate": 2}, "did you mean 'accumulate'"),
        ("ddg", {"beta": 0.5}, r"ddg has no option 'beta' \(its options are micro_batches, ahead, accumulate, reduce\)"),
        ("fdg", {"beta": 0.0}, r"beta is 0.0, but it must lie in \(0, 1\]"),
        ("fdg", {"at": "replay"}, "at is 'replay', but it must be one of stash, mixed"),
        ("adl", {"order": "forwards"}, "must be one of forward-first, backward-first"),
        ("adl", {"reduce": "max"}, "must be one of mean, sum"),
        ("adl", {"accumulate": 0}, "accumulate is 0, but it must be at least 1"),
        ("gpipe", {"micro_batches": 0}, "micro_batches is 0"),
        ("1f1b", {"micro_batches": -1}, "micro_batches is -1"),
        ("2bw", {"micro_batches": "4"}, "micro_batches is '4', but it must be a whole number"),
        ("ddg", {"micro_batches": 2.0}, "micro_batches is 2.0, but it must be a whole number"),
        ("bp", {"behind": 1.5}, "behind is 1.5, but it must be a whole number"),
        ("adl", {"accumulate": True}, "accumulate is True, but it must be a whole number"),
    ],
)
def test_make_says_what_was_wrong(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(name, **given)


def test_no_stage_is_no_plan() -> None:
    with pytest.raises(UsageError, match="cannot be cut into 0 stages"):
        unroll(BP(), 0, 1)


@pytest.mark.parametrize(
    ("K", "clip"),
    [
        (K, clip) if (K, clip) in ((1, None), (3, 1.0)) else pytest.param(K, clip, marks=pytest.mark.slow)
        for K in (1, 3, 6)
        for clip in (None, 1.0)
    ],
)
def test_a_plan_without_an_end_is_the_plan_of_as_many_batches(K: int, clip: float | None) -> None:
    """Nothing of a tick depends on a batch that is yet to come, so its steps can be said before anybody knows how many there will be."""
    for method in cases(K):
        for batches in (1, 2, 11):
            plan = OpenPlan(method, K, clip)
            found = [*(plan.batch() for _ in range(batches)), plan.rest()]
            together = tuple(tuple(step for window in found for step in window.columns[k]) for k in range(K))
            assert together == unroll(method, K, RunLength(batches, clip=clip)).columns, method


def updates_in(column: Sequence[Step]) -> int:
    return sum(isinstance(step.op, Update) for step in column)


@pytest.mark.parametrize("K", [1, 3])
def test_a_plan_goes_on_after_its_end(K: int) -> None:
    """The steps are those of two runs, of 5 batches and of 6, of which the second counts on."""
    for method in cases(K):
        plan = OpenPlan(method, K)
        found = [plan.batch() for _ in range(5)] + [plan.rest()] + [plan.batch() for _ in range(6)] + [plan.rest()]
        for k in range(K):
            column = [step for window in found for step in window.columns[k]]
            assert [s.op.batch for s in column if isinstance(s.op, Forward)] == [
                s.op.batch for s in unroll(method, K, 11).columns[k] if isinstance(s.op, Forward)
            ]
            updates = [step.version for step in column if isinstance(step.op, Update)]
            assert updates == list(range(len(updates)))
            first, second = unroll(method, K, 5).columns[k], unroll(method, K, 6).columns[k]
            assert [type(step.op) for step in column] == [type(step.op) for step in (*first, *second)]
            assert tuple(column[: len(first)]) == first
            made = updates_in(first)
            for step, own in zip(column[len(first) :], second, strict=True):
                assert (step.tick, step.version, step.keep, step.last) == (own.tick + 5, own.version + made, own.keep, own.last)
                if not isinstance(step.op, Update):
                    assert step.op.batch == own.op.batch + 5 * method.fitted(K).micro_batches
