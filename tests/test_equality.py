"""One process and K processes, one window size and another, an interrupted run and a whole one: the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, PACI, ZB1P, Interlocking, Method, OneFOneB, PipeDream2BW
from delock.recipes import SGD, error_feedback
from delock.run.job import StageJob, StageResult

from harness import assert_equal, enough, every_method, in_processes, in_the_same_processes, inline, jobs, same_tree, whole_and_resumed

WORKS = ("conv", "tuple")
SAMPLES = 18  # batches of 8, 8 and 2 samples: three parts are uneven, and of 2 samples one is empty


def cases(K: int, often: bool) -> list[tuple[str, Method]]:
    """In three stages often every method on one of the workloads, by turns; all others seldom."""
    found = enumerate(every_method(K))
    return [(work, method) for i, method in found for j, work in enumerate(WORKS) if often == (K == 3 and i % 2 == j)]


@pytest.fixture(scope="module")
def there() -> Callable[[int, bool], dict[tuple[str, Method], list[StageResult]]]:
    """Runs all cases of a number of stages in the same processes, when the first of them is asked for."""

    @cache
    def runs(K: int, often: bool) -> dict[tuple[str, Method], list[StageResult]]:
        return in_the_same_processes({case: jobs(case[0], K, case[1], samples=SAMPLES) for case in cases(K, often)})

    return runs


@pytest.mark.parametrize(
    ("K", "often", "work", "method"),
    [
        pytest.param(K, often, *case, marks=[] if often else [pytest.mark.slow])
        for K in (1, 2, 3, 4)
        for often in (True, False)
        for case in cases(K, often)
    ],
    ids=str,
)
def test_processes_equal_one_process(K: int, often: bool, work: str, method: Method, there: Any) -> None:
    assert_equal(there(K, often)[work, method], inline(jobs(work, K, method, samples=SAMPLES)))


FORMS = {method.name: method for method in every_method(4)}.values()  # one of each
OTHERS = [method for method in every_method(4) if method not in FORMS]


@pytest.mark.parametrize(
    ("method", "window"),
    [
        *enough(itertools.product(FORMS, (1, 2, 5)), together=1),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in itertools.product(OTHERS, (1, 2, 5))),
    ],
    ids=str,
)
def test_any_window_gives_the_same_run(method: Method, window: int) -> None:
    assert_equal(inline(jobs("conv", 4, method, window=window)), inline(jobs("conv", 4, method)))


def test_windows_in_processes() -> None:
    method = ADL(accumulate=3, order="backward-first")
    assert_equal(in_processes(jobs("tuple", 3, method, window=2)), inline(jobs("tuple", 3, method)))


SAVED: list[Method] = [
    *(BP(2), OneFOneB(3), DDG(), FR(), FDG(beta=0.5), FDG(at="mixed", order="backward-first"), FDG(at="mixed"), ADL(3)),
    *(DSP(p=2, q=1), DGL(), Interlocking(2)),
    *(DDG(accumulate=3), FR(accumulate=2), DSP(p=2, q=1, accumulate=4)),
]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(("work", "stop", "method"), enough(itertools.product(WORKS, (1, 4), SAVED), together=1), ids=str)
def test_a_resumed_run_equals_an_uninterrupted_one(work: str, method: Method, stop: int) -> None:
    """Stop after `stop` windows of two ticks, carry the saved state to new stages, go on: graphs, links and optimizers are as before."""
    assert_goes_on(lambda: jobs(work, 3, method), stop)


SAVED_IN_PARTS: list[Method] = [
    *(DDG(3, ahead) for ahead in (None, "part", "mean")),  # type: ignore[arg-type]
    *(FR(3, "part"), DSP(2, micro_batches=3, ahead="mean"), FDG(micro_batches=2, ahead="mean"), ADL(2, micro_batches=2, ahead="part")),
    *(PACI(3), PACI(3, "mean"), FDG(0.5, "mixed", "backward-first", 2, "part"), ZB1P(3), BP(3, 2), BP(1, 2, "part")),
    *(PipeDream2BW(3), PipeDream2BW(4, "part"), ADL(3, at="mixed", micro_batches=2, ahead="part")),
]


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("method", "work", "stop"), enough(((m, *at) for m in SAVED_IN_PARTS for at in (("conv", 1), ("tuple", 3))), together=1), ids=str
)
def test_short_delays_resumed(method: Method, work: str, stop: int) -> None:
    """Parts, of which every third batch leaves some empty, banks of weights, those ahead; fed back changes of up to 2 updates ago."""
    assert_goes_on(lambda: jobs(work, 3, method, samples=SAMPLES, epochs=3, optimizer=error_feedback(SGD(0.02, 0.9, 5e-3))), stop)


def assert_goes_on(make: Callable[[], list[StageJob]], stop: int) -> None:
    """A resumed run is the uninterrupted one, bit for bit."""
    whole, second, losses = whole_and_resumed(make, stop)
    for a, b in zip(second.engines, whole.engines, strict=True):
        same_tree(a.stage.module.state_dict(), b.stage.module.state_dict())
        assert (a.stage.head is None) == (b.stage.head is None)
        if a.stage.head and b.stage.head:
            same_tree(a.stage.head.module.state_dict(), b.stage.head.module.state_dict())
        assert a.stage.optimizer
        assert b.stage.optimizer
        same_tree(a.stage.optimizer.state_dict(), b.stage.optimizer.state_dict())
    assert losses == whole.losses
