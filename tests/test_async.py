"""Asynchronous greedy learning: the replay buffer on sequences worked by hand, and runs whose turns are drawn, against an oracle."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from delock.engine.asynchronous.buffer import ReplayBuffer
from delock.engine.asynchronous.schedule import drawn
from delock.errors import UsageError
from delock.methods import DGL, AsyncDGL
from delock.ops import Evaluate, Forward, Update
from delock.plan import Plan, RunLength, Step, check
from delock.records import Visit

import oracles
import oracles_async
from harness import assert_equal, enough, inline, jobs, same_tree
from oracles_local import tiny_heads
from workloads import WORK, Samples, sgd, warm_up

SEED = 7  # of the jobs


# -- the buffer's rule -------------------------------------------------------------------------------------------------------------


def play(size: int, max_reuse: int, moves: str) -> tuple[list[str | None], ReplayBuffer[str]]:
    """Do the moves, a letter to put a batch of that name, "." to get one; what came out. Ordinals count the puts, versions every other."""
    buffer: ReplayBuffer[str] = ReplayBuffer(size, max_reuse)
    got: list[str | None] = []
    puts = itertools.count()
    for move in moves:
        if move == ".":
            entry = buffer.get()
            got.append(entry.item if entry else None)
        else:
            n = next(puts)
            buffer.put(move, n, n // 2)
    return got, buffer


@pytest.mark.parametrize(
    ("size", "max_reuse", "moves", "expected"),
    [
        (3, 0, ".", "-"),  # nothing there
        (1, 0, "a...b.", "aaab"),  # one slot: the newest, again and again
        (1, 1, "a..b..", "a-b-"),  # at most once each
        (1, 2, "a...bc...", "aa-cc-"),  # b was overwritten before anybody read it
        (2, 0, "ab...", "bab"),  # the newest of the unread, then the other, then of two read once the newest
        (3, 0, "abc......", "cbacba"),
        (3, 0, "abc..d...", "cbddc"),  # d takes the place of a, unread; once all have been read once, the newest again, then c
        (2, 1, "abc...", "cb-"),  # a was overwritten unread
        (2, 1, "ab..c..", "bac-"),
        (3, 2, "ab....c...", "babacc-"),
        (2, 0, "a...b..c.", "aaabbc"),  # a was used three times: b is the least used until it has caught up
        (2, 0, "a..b....", "aabbba"),  # at two uses each the newer, b, and then a
    ],
)
def test_least_used_then_newest(size: int, max_reuse: int, moves: str, expected: str) -> None:
    assert "".join(item or "-" for item in play(size, max_reuse, moves)[0]) == expected


def test_the_account_of_a_buffer() -> None:
    """Puts 0 .. 4 at versions 0, 0, 1, 1, 2; b is overwritten unread, and what is left at the end counts, too."""
    got, buffer = play(2, 0, "a..bc.d.e...")
    assert got == ["a", "a", "c", "d", "e", "e", "d"]
    account = buffer.close()
    assert account.reuse == {0: 1, 1: 1, 2: 3}  # b; c; a, d and e
    assert account.visits_behind == {0: 6, 1: 1}  # d for the second time, when e was the newest
    assert account.versions_behind == {0: 6, 1: 1}
    assert buffer.entries == []
    assert play(3, 0, "")[1].close().reuse == {}


@pytest.mark.parametrize("size", [1, 2, 3, 7])
@pytest.mark.parametrize("max_reuse", [0, 1, 2, 5])
def test_it_is_the_ring_of_the_spec(size: int, max_reuse: int) -> None:
    """Against slots that are overwritten in turn, over long random sequences."""
    buffer: ReplayBuffer[int] = ReplayBuffer(size, max_reuse)
    ring = oracles_async.Ring(size, max_reuse)
    draws = torch.randint(3, (2000,), generator=torch.Generator().manual_seed(10 * size + max_reuse))
    puts = 0
    for draw in draws.tolist():
        if draw == 0:
            buffer.put(puts, puts, puts // 3)
            ring.put(puts, puts, puts // 3)
            puts += 1
        else:
            got, want = buffer.get(), ring.get()
            assert (got and (got.item, got.uses)) == (want and (want.content, want.used))
            assert not (got and max_reuse) or got.uses <= max_reuse
    assert_account(buffer.close(), ring)


def assert_account(account: Any, ring: oracles_async.Ring) -> None:
    left = Counter(slot.used for slot in ring.slots if slot)
    assert account.reuse == ring.reuse + left
    assert (account.visits_behind, account.versions_behind) == (ring.behind, ring.versions)


@pytest.mark.parametrize(("size", "max_reuse"), [(0, 0), (-1, 0), (1, -1)])
def test_sizes_that_are_refused(size: int, max_reuse: int) -> None:
    with pytest.raises(UsageError, match=r"a replay buffer of|max-reuse is"):
        ReplayBuffer(size, max_reuse)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"buffer": 0}, "buffer is 0, but it must be at least 1"),
        ({"max_reuse": -1}, "max_reuse is -1"),
        ({"noise": 1.0}, r"noise is 1.0, but it must lie in \[0, 1\)"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"noise": float("nan")}, "noise is nan"),
        ({"slow_stage": -1}, "slow_stage is -1"),
        ({"order": "fair"}, "order is 'fair', but it must be one of free, sampled, round-robin"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UsageError, match=expected):
        AsyncDGL(**options)


def test_a_slow_stage_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"slow_stage is 3, but the stages are 0 .. 2"):
        drawn(AsyncDGL(slow_stage=3, order="sampled"), 3, RunLength(2))


# -- who acts, and what is read ----------------------------------------------------------------------------------------------------

SAMPLED = [
    AsyncDGL(1, order="sampled"),
    AsyncDGL(1, 1, order="sampled", slow_stage=0, noise=0.5),
    AsyncDGL(3, order="sampled", slow_stage=1, noise=0.6),
    AsyncDGL(5, 2, order="sampled", slow_stage=2, noise=1 / 3),
]


def oracle(method: AsyncDGL, K: int, updates: int, seed: int = SEED) -> oracles_async.Course:
    size, slow = method.buffer, method.slow_stage
    return oracles_async.Course(K, updates, size=size, max_reuse=method.max_reuse, slow=slow, noise=method.noise, seed=seed)


def visits(column: tuple[Step, ...]) -> list[tuple[int, int, int, bool]]:
    """Tick, own ordinal, source and whether it trains, of every turn that is no evaluation."""
    forwards = [(step.tick, step.op) for step in column if isinstance(step.op, Forward)]
    return [(tick, op.batch, op.source, op.train) for tick, op in forwards if op.source is not None]


@pytest.mark.parametrize("K", [3, 5])
@pytest.mark.parametrize("method", SAMPLED, ids=str)
def test_a_drawn_plan_is_the_naive_loop(method: AsyncDGL, K: int) -> None:
    plan, accounts = drawn(method, K, RunLength(60), seed=3)
    length = oracle(method, K, 60, seed=3)
    want = list(length)
    for k, column in enumerate(plan.columns):
        assert visits(column) == [(v.tick, v.number, v.read, v.trains) for v in want if v.k == k]
    for account, ring in zip(accounts, length.rings, strict=True):
        assert_account(account, ring)


@pytest.mark.parametrize("every", [0, 4])
@pytest.mark.parametrize("K", range(1, 5))
@pytest.mark.parametrize("method", [*SAMPLED, AsyncDGL(2, order="round-robin")], ids=str)
def test_a_drawn_plan_can_run_and_every_stage_makes_its_updates(method: AsyncDGL, K: int, every: int) -> None:
    method = replace(method, slow_stage=min(method.slow_stage, K - 1))
    plan, _ = drawn(method, K, RunLength(30, every, 2), seed=1)
    check(plan)
    for k, column in enumerate(plan.columns):
        assert sum(isinstance(step.op, Update) for step in column) == 30
        assert [n for _, n, _, _ in visits(column)] == list(range(len(visits(column))))
        assert len({trains for _, _, _, trains in visits(column)[:30]}) == 1, "it stopped learning before it was done"
        read = Counter(source for _, _, source, _ in visits(column))
        assert k == 0 or not method.max_reuse or max(read.values()) <= method.max_reuse
        assert k > 0 or list(read) == list(range(len(read)))
    assert len(visits(plan.columns[-1])) == 30, "the last stage has nobody to go on for"


def test_max_reuse_costs_a_stage_its_turns() -> None:
    """Two stages with a buffer of one batch, to be read once: the upper one acts at its first turn after each of the lower one's."""
    length = oracle(AsyncDGL(1, 1, order="sampled"), 2, 50, seed=0)
    turns = [length.draw(tick) for tick in range(1000)]
    plan, _ = drawn(AsyncDGL(1, 1, order="sampled"), 2, RunLength(50), seed=0)
    lower, upper = ([tick for tick, *_ in visits(column)] for column in plan.columns)
    assert lower == [tick for tick in range(lower[-1] + 1) if turns[tick] == 0]
    wanted = [tick for tick in range(1, upper[-1] + 1) if turns[tick] == 1 and turns[tick - 1] == 0]
    assert upper == wanted
    assert sum(turn == 1 for turn in turns[: upper[-1]]) > len(upper), "no turn was lost"


@pytest.mark.parametrize(("slow", "noise"), enough(itertools.product((0, 2), (0.0, 0.25, 0.5, 0.8)), together=1))
def test_a_slowed_stage_acts_as_often_as_its_slowness_says(slow: int, noise: float) -> None:
    """1 - noise against 1, counted until the first stage is done."""
    plan, _ = drawn(AsyncDGL(order="sampled", slow_stage=slow, noise=noise), 4, RunLength(4000))
    stages = [visits(column) for column in plan.columns]
    until = min(stage[3999][0] for stage in stages)
    slowed, *others = [sum(tick <= until for tick, *_ in stages[k]) for k in (slow, *(k for k in range(4) if k != slow))]
    assert all(abs(count / others[0] - 1) < 0.06 for count in others)
    assert abs(slowed / others[0] - (1 - noise)) < 0.06 * (1 - noise) ** 0.5  # about three standard deviations


def test_all_evaluate_when_stage_0_has_made_so_many_updates() -> None:
    plan, _ = drawn(AsyncDGL(2, order="sampled", slow_stage=0, noise=0.5), 3, RunLength(10, every=4, evaluation=2))
    for k, column in enumerate(plan.columns):
        tests = [(step.tick, step.op.batch) for step in column if isinstance(step.op, Evaluate)]
        assert [batch for _, batch in tests] == list(range(6))
        assert [tick for tick, _ in tests] == [at for at in evaluated_at(plan) for _ in range(2)]
        assert all(step.up == (k < 2) for step in column if isinstance(step.op, Forward | Evaluate))


def evaluated_at(plan: Plan) -> list[int]:
    """Ticks of stage 0's Forwards after 4 and 8 updates, and the one after the last of all."""
    firsts = {step.version: step.tick for step in reversed(plan.columns[0]) if isinstance(step.op, Forward)}
    return [firsts[4], firsts[8], max(step.tick for column in plan.columns for step in column)]


# -- what is computed --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("work", "K"), enough(itertools.product(("conv", "tuple"), range(1, 5)), together=1))
def test_round_robin_is_synchronous(work: str, K: int) -> None:
    """Whatever the buffer holds: the newest batch is the least used. Weights, heads, losses, and evaluations."""
    want = inline(jobs(work, K, DGL()))
    for method in (AsyncDGL(1, order="round-robin"), AsyncDGL(4, 1, order="round-robin")):
        assert_equal(inline(jobs(work, K, method)), want)


@pytest.mark.parametrize("method", SAMPLED, ids=str)
def test_stage_0_and_an_uncut_network_learn_as_ever(method: AsyncDGL) -> None:
    """Nothing comes from above, and no batch is read twice: the order of turns does not matter to them."""
    one = replace(method, slow_stage=0)
    assert_equal(inline(jobs("conv", 1, one)), inline(jobs("conv", 1, DGL())))
    drawn_, want = inline(jobs("conv", 3, method))[0], inline(jobs("conv", 3, DGL()))[0]
    same_tree((drawn_.state, drawn_.head, drawn_.optimizer), (want.state, want.head, want.optimizer))


@pytest.mark.parametrize(
    ("work", "K", "method"),
    enough(((*cut, method) for cut in (("conv", 3), ("tuple", 4), ("conv", 5)) for method in SAMPLED), together=1),
    ids=str,
)
def test_a_sampled_run_is_the_naive_loop(work: str, K: int, method: AsyncDGL) -> None:
    """In float64, dropout and batch norm on; stages that are done go on in eval mode. Evaluation changes nothing."""
    net, kind, loss = WORK[work]
    got = inline(jobs(work, K, method, epochs=5, dtype=torch.float64))
    updates = 15
    assert [result.report.updates for result in got] == [updates] * K
    stages = net(K, torch.float64)
    data = Samples(kind, 22, 8, torch.float64)
    heads = tiny_heads(stages, next(iter(data.epoch(0)))[0], torch.float64)
    length = oracle(method, K, updates)
    want, want_heads = oracles_async.sampled(
        length, stages, heads, stream(data), loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=SEED
    )
    assert oracles.gap([result.state for result in got], want.states) <= 1e-10
    assert oracles.gap([result.head for result in got[:-1]], want_heads) <= 1e-10
    assert oracles.gap(torch.tensor(got[-1].losses, dtype=torch.float64), torch.stack(want.losses)) <= 1e-10
    for result, ring in zip(got, length.rings, strict=True):
        left = Counter(slot.used for slot in ring.slots if slot)
        assert result.report.reuse == ring.reuse + left
        assert (result.report.visits_behind, result.report.versions_behind) == (ring.behind, ring.versions)


def stream(data: Samples) -> Any:
    """Batch n of epochs that never end."""

    def batch(n: int) -> Any:
        epoch, i = divmod(n, len(data))
        return next(itertools.islice(data.epoch(epoch), i, None))

    return batch


def test_another_seed_is_another_run() -> None:
    method = AsyncDGL(2, order="sampled")
    made = [visits(drawn(method, 3, RunLength(20), seed=seed)[0].columns[2]) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


# -- what the docs say -------------------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "asynchronous.md").read_text(encoding="utf-8")


def test_the_worked_example() -> None:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if re.match(r"\| (put|get)", line)]
    assert len(rows) > 8
    buffer: ReplayBuffer[str] = ReplayBuffer(3)
    for n, (move, read, afterwards) in enumerate(rows):
        if move == "get":
            entry = buffer.get()
            assert entry
            assert entry.item == read
        else:
            buffer.put(move.removeprefix("put "), n)
        assert " ".join(f"{entry.item}({entry.uses})" for entry in buffer.entries) == afterwards


def test_the_line_of_a_trace() -> None:
    [line] = re.findall(r"```json\n(.*)\n```", PAGE)
    values = json.loads(line)
    assert list(values) == ["stage", *(field.name for field in fields(Visit)), "seal"]
    told = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", PAGE.split("## The trace")[1], re.MULTILINE))))
    assert set(values) <= told
