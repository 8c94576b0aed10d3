"""Predictions from equal and from unequal costs, the time they take, and the costs that are refused."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import pytest

from delock.errors import UsageError
from delock.memory.peaks import repeating
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Method, OneFOneB
from delock.plan import unroll
from delock.timeline import (
    Costs,
    Slowdown,
    in_flight,
    predict,
)

from harness import one_of_each
from timings import EVERY


@pytest.mark.parametrize(
    ("method", "K", "seconds", "speedup", "staleness"),
    [
        (BP(3), 4, 36, 1, [0, 0, 0, 0]),
        (GPipe(4), 4, 21, 16 / 7, [0, 0, 0, 0]),
        (OneFOneB(8), 4, 33, 32 / 11, [0, 0, 0, 0]),
        (DDG(), 4, 3, 4, [3, 2, 1, 0]),
        (FR(), 4, 4, 3, [0, 0, 0, 0]),
        (FDG(), 4, 3, 4, [6, 4, 2, 0]),
        (ADL(4, order="backward-first"), 4, 3, 4, [5 / 4, 3 / 4, 1 / 4, 0]),
        (ADL(20), 4, 3, 4, [6 / 20, 4 / 20, 2 / 20, 0]),
        (DSP(3, 3), 4, 4, 3, [0, 0, 0, 0]),
        (FDG(), 1, 3, 1, [0]),
    ],
    ids=str,
)
def test_predictions_under_unit_costs(method: Method, K: int, seconds: float, speedup: float, staleness: list[float]) -> None:
    told = predict(method, K, Costs.unit(K))
    assert told.period == pytest.approx(seconds)
    assert told.speedup == pytest.approx(speedup)
    assert [stage.staleness for stage in told.stages] == pytest.approx(staleness)
    assert [stage.layer_staleness for stage in told.stages] == [method.delay(k, K) for k in range(K)]
    assert [stage.held for stage in told.stages] == list(in_flight(unroll(method, K, 60)))
    assert len(told.messages) == K - 1


def test_predictions_of_unequal_stages() -> None:
    told = predict(FDG(), 3, Costs(forward=(1.0, 2.0, 1.0), backward=(2.0, 4.0, 3.0), update=(0.0, 0.0, 1.0)))
    assert told.period == pytest.approx(6)
    assert told.speedup == pytest.approx(13 / 6)  # BP's update on stage 2 is done long before its next batch comes
    assert [stage.idle for stage in told.stages] == pytest.approx([0.5, 0.0, 1 / 6])


def calls(method: Method, K: int) -> int:
    """Calls of Python functions that a prediction makes: its work, the same on every machine."""
    counted: Counter[str] = Counter()
    costs = Costs.unit(K)
    sys.setprofile(lambda frame, event, argument: counted.update([event]))
    try:
        predict(method, K, costs)
    finally:
        sys.setprofile(None)
    return counted["call"]


@pytest.mark.parametrize("behind", [1, 4, 20])
def test_weights_that_are_far_behind_are_counted(behind: int) -> None:
    for stage in predict(BP(behind=behind), 2, Costs.unit(2)).stages:
        assert (stage.staleness, stage.held.versions) == (behind, behind + 1)
    assert repeating(BP(behind=behind), 2) > behind


@pytest.mark.parametrize("method", one_of_each(EVERY), ids=str)
def test_predictions_take_little_work(method: Method) -> None:
    """Under a hundredth of a second for eight stages, and not four times as much for twice as many."""
    calls(method, 2)  # what is imported when it is first used
    few = calls(method, 8)
    assert few < (60_000 if method.micro_batches > 8 else 40_000)
    assert calls(method, 16) < 3.5 * few


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"forward": (1.0,), "backward": (1.0, 1.0)}, "backward has 2 numbers for 1 stages: it needs 1"),
        ({"forward": (1.0, 1.0), "backward": ()}, "backward has 0 numbers"),
        ({"forward": (1.0, 1.0), "backward": (1.0, 1.0), "up": (0.1, 0.1)}, "up has 2 numbers for 2 stages: it needs 1"),
        ({"forward": (1.0, -1.0), "backward": (1.0, 1.0)}, "forward is .* at least 0"),
        ({"forward": (1.0, 1.0), "backward": (1.0, 1.0), "capacity": (0,)}, "capacity is .* at least 1"),
        ({"forward": (0.0,), "backward": (0.0,)}, "no stage costs anything"),
    ],
)
def test_costs_that_do_not_fit(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Costs(**given)
    for wrong in ({"factor": -0.5}, {"factor": 1.0, "probability": 1.5}):
        with pytest.raises(UsageError, match="slow-down"):
            Slowdown(**wrong)
