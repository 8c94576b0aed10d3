"""The longest stable steps of Adam on a quadratic: the numbers of the specification, and the roots of the polynomials themselves."""

from __future__ import annotations

import random

import numpy as np
import pytest

from delock.cli.config.update import HORIZONS
from delock.optim.spike import scadamw, scsgd
from delock.timeline import longest_step


def mixed(mean: float) -> dict[int, float]:
    """Shares of four parts, some of which are one update late."""
    return {0: 1 - mean, 1: mean}


LATE = [mixed(0.25), mixed(0.5), mixed(0.75), {1: 1.0}, {2: 1.0}, {6: 1.0}]


def test_without_delay() -> None:
    assert longest_step({0: 1.0}, 0.9) == pytest.approx(38)
    assert longest_step({0: 1.0}, 0.0) == pytest.approx(2)  # plain gradient descent
    for b in (0.0, 0.5, 0.95, 0.9999):
        assert longest_step({0: 1.0}, b) == pytest.approx(2 * (1 + b) / (1 - b))


@pytest.mark.parametrize(("shares", "digits"), list(zip(LATE, ["4.0", "2.0", "1.33", "1.00", "0.51", "0.18"], strict=True)))
def test_late(shares: dict[int, float], digits: str) -> None:
    assert f"{longest_step(shares, 0.9):.{len(digits) - 2}f}" == digits


@pytest.mark.parametrize(("shares", "digits"), list(zip(LATE, ["18.2", "7.7", "4.5", "2.99", "1.21", "0.28"], strict=True)))
def test_late_with_spike_compensation(shares: dict[int, float], digits: str) -> None:
    tau = sum(lag * share for lag, share in shares.items())
    found = longest_step(shares, 0.9, HORIZONS["adamw"] * tau)
    assert f"{found:.{len(digits.split('.')[1])}f}" == digits


def test_the_horizon_is_that_of_the_optimizer() -> None:
    assert {"adamw": scadamw().r, "sgd": scsgd(lr=0.1).r} == HORIZONS


def radius(shares: dict[int, float], b: float, horizon: float, a: float) -> float:
    """The largest root of the polynomial, times z to the largest delay, by numpy."""
    c, most = b**horizon, max(shares)
    late = np.zeros(most + 1)  # by falling powers
    for lag, share in shares.items():
        late[lag] += share
    moved = np.polymul([1, -1], [1, -b])
    pulled = np.polymul([c * (1 - b) + 1 - c, -(1 - c) * b], late)
    return float(max(abs(np.roots(np.polyadd(np.polymul(moved, [1] + [0] * most), a * pulled)))))


def test_against_the_roots() -> None:
    """Just below the step all roots are inside, for shorter ones too; just above it one is outside."""
    draw = random.Random(5)
    for _ in range(30):
        lags = draw.sample(range(9), draw.randint(1, 3))
        weights = [draw.random() + 0.05 for _ in lags]
        shares = {lag: weight / sum(weights) for lag, weight in zip(lags, weights, strict=True)}
        b, horizon = draw.uniform(0.0, 0.98), draw.choice([0.0, 0.7, 2.0 * sum(lag * share for lag, share in shares.items())])
        step = longest_step(shares, b, horizon)
        assert radius(shares, b, horizon, 1.0001 * step) > 1
        assert all(radius(shares, b, horizon, share * step) < 1 for share in (0.01, 0.1, 0.3, 0.6, 0.9, 0.9999))
