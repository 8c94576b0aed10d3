"""One process and K processes, one window size and another, an interrupted run and a whole one: the same bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, PACI, ZB1P, Interlocking, Method, OneFOneB, PipeDream2BW
from delock.recipes import SGD, error_feedback
from delock.run.job import StageJob, StageResult

from harness import assert_equal, every_method, in_processes, in_the_same_processes, inline, jobs, same_tree, whole_and_resumed

WORKS = ("conv", "tuple")
SAMPLES = 18  # batches of 8, 8 and 2 samples: three parts are uneven, and of 2 samples one is empty


@pytest.fixture(scope="module")
def there() -> Callable[[int], dict[tuple[str, Method], list[StageResult]]]:
    """The runs of all methods in K stages, in processes that are started when the first of them is asked for."""

    @cache
    def runs(K: int) -> dict[tuple[str, Method], list[StageResult]]:
        return in_the_same_processes({(work, m): jobs(work, K, m, samples=SAMPLES) for work in WORKS for m in every_method(K)})

    return runs


@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize(
    ("K", "method"),
    [pytest.param(K, m, marks=[pytest.mark.slow] if K != 3 else []) for K in (1, 2, 3, 4) for m in every_method(K)],
    ids=str,
)
def test_processes_equal_one_process(work: str, K: int, method: Method, there: Any) -> None:
    assert_equal(there(K)[work, method], inline(jobs(work, K, method, samples=SAMPLES)))


@pytest.mark.parametrize("method", every_method(4), ids=str)
def test_any_window_gives_the_same_run(method: Method) -> None:
    whole = inline(jobs("conv", 4, method))
    for window in (1, 2, 5):
        assert_equal(inline(jobs("conv", 4, method, window=window)), whole)


def test_windows_in_processes() -> None:
    method = ADL(accumulate=3, order="backward-first")
    assert_equal(in_processes(jobs("tuple", 3, method, window=2)), inline(jobs("tuple", 3, method)))


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("work", WORKS)
@pytest.mark.parametrize(
    "method",
    [
        *(BP(2), OneFOneB(3), DDG(), FR(), FDG(beta=0.5), FDG(at="mixed", order="backward-first"), FDG(at="mixed"), ADL(3)),
        *(DSP(p=2, q=1), DGL(), Interlocking(2)),
        *(DDG(accumulate=3), FR(accumulate=2), DSP(p=2, q=1, accumulate=4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_equals_an_uninterrupted_one(work: str, method: Method, stop: int) -> None:
    """Stop after `stop` windows of two ticks, carry the saved state to new stages, go on: graphs, links and optimizers are as before."""
    assert_goes_on(lambda: jobs(work, 3, method), stop)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    "method",
    [
        *(DDG(3, ahead) for ahead in (None, "part", "mean")),  # type: ignore[arg-type]
        *(FR(3, "part"), DSP(2, micro_batches=3, ahead="mean"), FDG(micro_batches=2, ahead="mean"), ADL(2, micro_batches=2, ahead="part")),
        *(PACI(3), PACI(3, "mean"), FDG(0.5, "mixed", "backward-first", 2, "part"), ZB1P(3), BP(3, 2), BP(1, 2, "part")),
        *(PipeDream2BW(3), PipeDream2BW(4, "part"), ADL(3, at="mixed", micro_batches=2, ahead="part")),
    ],
    ids=str,
)
@pytest.mark.parametrize(("work", "stop"), [("conv", 1), ("tuple", 3)])
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
