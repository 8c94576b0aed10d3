"""Chooses the cuts that minimise the cost of the most expensive stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from delock.errors import UsageError


def balance(costs: Sequence[float], K: int, params: Sequence[int] | None = None) -> list[int]:
    """Returns the K - 1 cuts that make the cost of the most expensive stage as small as possible; exact, by dynamic programming.

    costs: one number per layer, in any unit; the cost of a stage is the sum over its layers. Every stage gets at least one layer.
    params: the number of parameters of each layer. Given, the number of stages without parameters is minimised first, before the cost.
    Several sets of cuts may share the smallest cost. Of these, the one with the smallest sum of squared stage costs is taken, which evens
    out the other stages; if there are still several, the one whose last stages begin earliest.
    Raises UsageError for K < 1 or K > len(costs).
    """
    n = len(costs)
    if not 1 <= K <= n:
        raise UsageError(f"cannot make {K} stages of {n} layers: use 1 to {n} stages")
    prefix = np.array([0.0, *itertools.accumulate(costs)])
    learned = np.array([0, *itertools.accumulate(1 if params is None else int(p > 0) for p in (params or costs))])
    cost = prefix[None, :] - prefix[:, None]  # (n + 1, n + 1): [j, i] is the stage of layers j .. i - 1
    bare = np.where(np.tri(n + 1, dtype=bool), np.inf, (learned[None, :] == learned[:, None]).astype(float))
    _, largest = _cheapest(cost, bare, K, np.maximum)
    within = np.where(cost <= largest, bare, np.inf)
    cuts, _ = _cheapest(cost**2, within, K, np.add)
    return cuts


def _cheapest(cost: np.ndarray[Any, Any], bare: np.ndarray[Any, Any], K: int, join: np.ufunc) -> tuple[list[int], float]:
    """Returns the cuts into K stages with the smallest pair (sum of `bare`, `join` of `cost`), and their joined cost.

    cost, bare: (n + 1, n + 1), entry [j, i] for the stage of layers j .. i - 1; an infinite `bare` forbids that stage.
    """
    n = len(cost) - 1
    count, value = bare[0], cost[0]  # best of one stage over layers 0 .. i - 1, for every i
    starts = []
    for _ in range(K - 1):
        counts = count[:, None] + bare  # [j, i]: the last stage is layers j .. i - 1
        count = counts.min(axis=0)
        values = np.where(counts == count, join(value[:, None], cost), np.inf)
        starts.append(values.argmin(axis=0))
        value = values.min(axis=0)
    cuts, end = [], n
    for start in reversed(starts):
        end = int(start[end])
        cuts.append(end)
    return cuts[::-1], float(value[n])
