"""Every method against its oracle, the paper's equation as running code: the engine computes what is written."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Method, OneFOneB
from delock.run.job import StageResult

import oracles
import oracles_ticks
import papers
from harness import assert_equal, enough, inline, jobs, options_of
from oracles import OracleRun
from papers import ORDERS
from workloads import WORK, batches, sgd, warm_up

N = 30  # batches of 5 samples and a last one of 3: ten epochs of 13 samples
SAMPLES, BATCH, EPOCHS = 13, 5, 10


def run(method: Method, K: int, work: str, dtype: torch.dtype = torch.float64) -> list[StageResult]:
    return inline(jobs(work, K, method, samples=SAMPLES, batch=BATCH, epochs=EPOCHS, dtype=dtype, evaluate=False))


def oracle(method: Method, K: int, work: str, dtype: torch.dtype = torch.float64, **options: object) -> OracleRun:
    net, kind, loss = WORK[work]
    made = batches(SAMPLES, BATCH, EPOCHS, kind, dtype)
    assert len(made) == N
    compute = oracles.backprop if method.synchronous else oracles.delayed
    return compute(net(K, dtype), made, loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=7, **options)  # type: ignore[operator]


def assert_close(got: list[StageResult], want: OracleRun) -> None:
    """To 1e-10 of each tensor's largest entry."""
    assert oracles.gap([stage.state for stage in got], want.states) <= 1e-10
    momenta = [[entry["momentum_buffer"] for entry in stage.optimizer["state"].values()] for stage in got if stage.optimizer]
    wanted = [[entry["momentum_buffer"] for entry in state["state"].values()] for state in want.optimizer_states if state]
    assert oracles.gap(momenta, wanted) <= 1e-10
    assert oracles.gap(torch.tensor(got[-1].losses, dtype=torch.float64), torch.stack(want.losses).double()) <= 1e-10


def by_turns(methods: Callable[[int], Sequence[Method]]) -> list[Any]:
    """Every pair of a method and a number of stages, on one workload and the other by turns: every pair of these and a workload, too.

    The fast suite has methods in two stages or in three, by turns, and enough of them for any two options to meet.
    """
    found = [(i, ("conv", "tuple")[(K + i) % 2], K, method) for K in (2, 3, 5) for i, method in enumerate(methods(K))]
    often = [case for i, *case in found if case[1] == 2 + i // 2 % 2]
    others = [pytest.param(*case, marks=pytest.mark.slow) for i, *case in found if case[1] != 2 + i // 2 % 2]
    return [*enough(map(tuple, often), of=lambda work, K, method: (*options_of(method), method.micro_batches)), *others]


def delayed(K: int) -> Sequence[Method]:
    return (
        DDG(),
        FR(),
        *(FDG(beta=beta, at=at, order=order) for beta in (1.0, 0.5) for at in ("stash", "mixed") for order in ORDERS),
        *(
            ADL(accumulate=M, reduce=reduce, order=order, at=at)
            for M in (1, 2, 3)
            for reduce in ("mean", "sum")
            for order, at in (("forward-first", "stash"), ("backward-first", "stash"), ("forward-first", "mixed"))
        ),
        papers.uneven_dsp(K),
        *(method(accumulate=A, reduce=reduce) for method in (DDG, FR, DSP) for A, reduce in ((2, "mean"), (3, "sum"))),
        *(replace(papers.uneven_dsp(K), accumulate=A) for A in (2, 5)),
    )


@pytest.mark.parametrize(("work", "K", "method"), by_turns(delayed), ids=str)
def test_delayed(work: str, K: int, method: Method) -> None:
    assert_close(run(method, K, work), oracle(method, K, work, **papers.oracle_options(method, K)))


SYNCHRONOUS = (BP(), BP(2), BP(3), GPipe(1), GPipe(3), OneFOneB(2), OneFOneB(3), OneFOneB(4))


@pytest.mark.parametrize(("work", "K", "method"), by_turns(lambda K: SYNCHRONOUS), ids=str)
def test_synchronous(work: str, K: int, method: Method) -> None:
    assert_close(run(method, K, work), oracle(method, K, work, accumulate=method.micro_batches))


LIKE_PLAIN = [*((K, BP()) for K in range(1, 6)), *((1, m) for m in (DDG(), FR(), FDG(), FDG(order="backward-first"), ADL(1), DSP()))]


@pytest.mark.parametrize(
    ("work", "dtype", "K", "method"),
    enough((work, dtype, *case) for work in ("conv", "tuple") for dtype in (torch.float32, torch.float64) for case in LIKE_PLAIN),
    ids=str,
)
def test_plain_training_bit_for_bit(work: str, dtype: torch.dtype, K: int, method: Method) -> None:
    """BP with any K, and every method with K = 1."""
    got, want = run(method, K, work, dtype), oracle(BP(), K, work, dtype, accumulate=1)
    for stage, state in zip(got, want.states, strict=True):
        assert all(torch.equal(stage.state[name], state[name]) for name in state)
    assert got[-1].losses == [loss.item() for loss in want.losses]


@pytest.mark.parametrize(
    ("work", "K", "backward_first", "beta"), enough(itertools.product(("conv", "tuple"), (2, 3, 4), (True, False), (1.0, 0.5)))
)
def test_mixed_is_what_the_released_code_computed(work: str, K: int, backward_first: bool, beta: float) -> None:
    """A hand-written loop keeps graphs in a deque while the optimizer writes in place: equal bit for bit."""
    net, kind, loss = WORK[work]
    dtype = torch.float32
    want = oracles_ticks.mixed_deque(
        net(K, dtype),
        batches(SAMPLES, BATCH, EPOCHS, kind, dtype),
        loss=loss,
        make_optimizer=sgd,
        make_schedule=warm_up,
        delays=papers.delays(FDG(), K),
        backward_first=backward_first,
        shrink=beta,
        seed=7,
    )
    method = FDG(beta=beta, at="mixed", order="backward-first" if backward_first else "forward-first")
    got = run(method, K, work, dtype)
    for stage, state in zip(got, want.states, strict=True):
        assert all(torch.equal(stage.state[name], state[name]) for name in state)


@pytest.mark.parametrize("K", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_adl_with_one_batch_is_fdg(K: int) -> None:
    for reduce in ("mean", "sum"):
        got, want = run(ADL(accumulate=1, reduce=reduce), K, "conv"), run(FDG(), K, "conv")  # type: ignore[arg-type]
        for a, b in zip(got, want, strict=True):
            assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


@pytest.mark.parametrize(("reduce", "A"), enough(itertools.product(("mean", "sum"), (2, 4)), together=1))
def test_one_stage_accumulates_alike(A: int, reduce: Any) -> None:
    """Thirty batches leave a last group of two for A = 4."""
    first, *others = (run(method(accumulate=A, reduce=reduce), 1, "conv") for method in (ADL, DDG, FR, DSP))
    for got in others:
        assert_equal(got, first)
    assert first[0].report.updates == -(-N // A)


@pytest.mark.parametrize("s", [0.0, 1.0], ids=["heavy ball", "nesterov"])
def test_dsp_with_the_papers_unified_optimizer(s: float) -> None:
    net, kind, loss = WORK["conv"]
    made = batches(SAMPLES, BATCH, EPOCHS, kind, torch.float64)
    p, m = (1, 1, 0), (4, 2, 0)
    whole = net(3, torch.float64)
    want = oracles_ticks.dsp_unified(whole, made, loss=loss, p=p, m=m, lr=0.02, momentum=0.9, s=s, weight_decay=5e-3, seed=7)
    work = jobs("conv", 3, DSP.from_paper(p, m), samples=SAMPLES, batch=BATCH, epochs=EPOCHS, dtype=torch.float64, evaluate=False)
    for job in work:
        job.schedule = None
        job.optimizer = lambda named: sgd([w for _, w in named], nesterov=s == 1.0)
    got = inline(work)
    assert oracles.gap([stage.state for stage in got], want.states) <= 1e-10
