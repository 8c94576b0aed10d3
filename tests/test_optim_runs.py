"""Optimizers that ask for their stage in whole runs: the staleness handed to them, an oracle, processes, and an interrupted run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import AdamW, Optimizer

from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, PACI, AsyncDGL, GPipe, Interlocking, Method, OneFOneB, PipeDream2BW
from delock.optim.feedback import ErrorFeedback
from delock.optim.spike import SCAdamW
from delock.optim.stage_facts import StageFacts
from delock.recipes import SGD, PipeMare, Schedule, error_feedback, muon, scadamw, scsgd, soap
from delock.run.job import StageJob, StageResult
from delock.timeline import stage_facts

import oracles
import oracles_parts
import papers
from harness import assert_equal, enough, in_the_same_processes, inline, jobs, plainly, same_tree, whole_and_resumed
from oracles import MakeOptimizer
from workloads import WORK, batches, warm_up

SLOW_START = PipeMare(5, Schedule("cosine", 20))


@pytest.mark.parametrize("K", range(1, 6))
def test_staleness_is_the_age_of_the_forwards_weights(K: int) -> None:
    """(D_k - e) / M updates, also with replay; e = 1 for backward-first below the last stage."""
    whole = (DDG(), FR(), FDG(), FDG(at="mixed"), FDG(order="backward-first"), ADL(4), ADL(3, order="backward-first"), DSP(2, 1))
    parts = (DDG(4), FR(3), FDG(order="backward-first", micro_batches=4), ADL(2, micro_batches=3), DSP(2, 1, 4), PACI(4), DDG(4, "mean"))
    for method in (*whole, *parts):
        late = [d - papers.early(method, k, K) for k, d in enumerate(papers.delays(method, K))]
        N = papers.parts_of_update(method)
        wanted = [StageFacts(k, K, pytest.approx(d / N), -(-d // N)) for k, d in enumerate(late)]
        assert stage_facts(method, K) == wanted, method
    late_alike = ((PipeDream2BW(5), 1), (PipeDream2BW(4, "part"), 1), (BP(2, behind=3), 3), (BP(behind=1, ahead="mean"), 1))
    for uniform, n in (*late_alike, (BP(2, behind=25), 25)):
        assert stage_facts(uniform, K) == [StageFacts(k, K, float(n), n) for k in range(K)]
    for fresh in (BP(3), GPipe(3), OneFOneB(2), DGL(), Interlocking(1), AsyncDGL()):
        assert stage_facts(fresh, K) == [StageFacts(k, K, 0.0, 0) for k in range(K)]


def spiked(params: Any, *, stage: StageFacts) -> Optimizer:
    return SCAdamW([w for _, w in params], 0.01, tau=stage.staleness)


def fed_back(params: Any, *, stage: StageFacts) -> Optimizer:
    made = AdamW([w for _, w in params], 0.01)
    return ErrorFeedback(made, tau=stage.staleness) if stage.staleness else made


def one_by_one(taus: list[float], make: Callable[[Any, float], Optimizer]) -> MakeOptimizer:
    """Makes the optimizer of stage 0, then that of stage 1, and so on."""
    left = iter(taus)
    return lambda weights: make(weights, next(left))


BY_HAND = [(spiked, oracles_parts.SpikedAdam), (fed_back, oracles_parts.FedBackAdam)]
RUNS = [
    *(DDG(), FR(), ADL(4), FDG(at="mixed")),
    *(DDG(4, ahead) for ahead in (None, "part", "mean")),  # type: ignore[arg-type]
    *(FDG(order="backward-first", micro_batches=3), FDG(micro_batches=3, ahead="mean"), FR(2), PACI(4), ADL(2, micro_batches=3)),
]


@pytest.mark.parametrize(
    ("method", "factory", "make"), enough(((method, *case) for method in RUNS for case in BY_HAND), together=1), ids=plainly
)
def test_a_run_is_its_oracle_with_the_optimizer_of_every_stage(method: Method, factory: Any, make: Any) -> None:
    """tau_k = (D_k - e) / N, with N the parts of an update: at K = 3 from 0.25 to 4."""
    got = inline(jobs("conv", 3, method, samples=13, batch=5, epochs=4, dtype=torch.float64, evaluate=False, optimizer=factory))
    net, kind, loss = WORK["conv"]
    N, late = papers.parts_of_update(method), [d - papers.early(method, k, 3) for k, d in enumerate(papers.delays(method, 3))]
    optimizers = one_by_one([d / N for d in late], lambda weights, tau: make(weights, 0.01, tau))
    paper = papers.oracle_options(method, 3)
    paper |= {"A": paper.pop("M"), "M": method.micro_batches, "ahead": method.ahead}  # type: ignore[attr-defined]
    want = oracles_parts.delayed_in_parts(
        net(3, torch.float64),
        batches(13, 5, 4, kind, torch.float64),
        loss=loss,
        make_optimizer=optimizers,
        make_schedule=lambda made: warm_up(made.rate),
        seed=7,
        **paper,
    )
    assert oracles.gap([stage.state for stage in got], want.states) <= 1e-10


APART = {
    "muon": (muon(), warm_up),
    "soap": (soap(precondition_frequency=2), warm_up),
    "scadamw": (scadamw(0.01), SLOW_START),
    "feedback, sgd": (error_feedback(scsgd(0.01)), SLOW_START),
    "feedback, muon": (error_feedback(muon()), SLOW_START),
}
LATE = (DDG(3, "part"), ADL(4))


def apart(name: str, method: Method) -> list[StageJob]:
    optimizer, schedule = APART[name]
    return jobs("tuple", 3, method, optimizer=optimizer, schedule=schedule)


@pytest.fixture(scope="module")
def there() -> dict[Any, list[StageResult]]:
    return in_the_same_processes({case: apart(*case) for case in itertools.product(APART, LATE)})


@pytest.mark.parametrize(("name", "method"), enough(itertools.product(APART, LATE), together=1), ids=str)
def test_processes_equal_one_process(name: str, method: Method, there: Any) -> None:
    assert_equal(there[name, method], inline(apart(name, method)))


@pytest.mark.parametrize("make", [scadamw, muon, lambda lr: partial(torch.optim.SGD, lr=lr)], ids=["scadamw", "muon", "torch's"])
def test_a_rate_that_is_a_tensor_is_every_stages_own(make: Any) -> None:
    """A schedule writes to it: not to that of the next stage, nor to that of the next run."""
    rate = torch.tensor(0.01, dtype=torch.float64)
    factory = make(rate)
    runs = [inline(jobs("tuple", 3, ADL(4), optimizer=one, schedule=SLOW_START)) for one in (make(0.01), factory, factory)]
    number, *tensors = [[stage.state for stage in run] for run in runs]
    for tensor in tensors:
        same_tree(tensor, number)
    assert rate == 0.01


SAVED = (muon(), soap(), scadamw(0.01), error_feedback(SGD(0.01)), error_feedback(muon()))


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("optimizer", "method", "stop"),
    enough(itertools.product(SAVED, (FDG(micro_batches=3, ahead="part"), ADL(4)), (2, 5)), together=1),
    ids=plainly,
)
def test_a_resumed_run_equals_an_uninterrupted_one(method: Method, optimizer: Any, stop: int) -> None:
    whole, second, losses = whole_and_resumed(lambda: jobs("tuple", 3, method, optimizer=optimizer, schedule=SLOW_START, window=2), stop)
    for a, b in zip(second.engines, whole.engines, strict=True):
        same_tree(a.stage.module.state_dict(), b.stage.module.state_dict())
        assert a.stage.optimizer
        assert b.stage.optimizer
        same_tree(a.stage.optimizer.state_dict(), b.stage.optimizer.state_dict())
    assert losses == whole.losses
