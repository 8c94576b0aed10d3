"""Chooses the cuts that minimise the cost of the most expensive stage, where some stages are not allowed: they would need too much memory.

To find out if a stage is allowed takes a while, so it is asked only of stages that may be part of the answer.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence

from delock.errors import UsageError

Path = tuple[int, ...]
"""The ends of the stages so far."""


def balance_within(costs: Sequence[float], K: int, fits: Callable[[int, int, int], bool], params: Sequence[int]) -> list[int] | None:
    """Returns the K - 1 cuts with the cheapest most expensive stage among those whose stages all fit; None if there are none. Exact.

    fits(k, a, b): stage k may be made of the layers a .. b - 1. As in `balance`, stages without parameters are avoided first, and ties go
    to the smallest sum of squares.
    """
    n = len(costs)
    prefix, learned = [0.0, *itertools.accumulate(costs)], [0, *itertools.accumulate(int(p > 0) for p in params)]

    def bare(a: int, b: int) -> int:
        return int(learned[a] == learned[b])

    found = None
    heap: list[tuple[int, float, int, int, int]] = [(0, 0.0, 0, 0, 0)]  # stages without parameters, largest cost, -stages, begin, end
    settled = set[tuple[int, int]]()
    while heap and found is None:
        few, most, done, a, b = heapq.heappop(heap)
        if (done, b) in settled or (done and not fits(-done - 1, a, b)):
            continue
        settled.add((done, b))
        if (-done, b) == (K, n):
            found = few, most
        for end in _ends(-done, b, K, n):
            heapq.heappush(heap, (few + bare(b, end), max(most, prefix[end] - prefix[b]), done - 1, b, end))
    if found is None:
        return None
    best: dict[int, tuple[int, float, Path]] = {0: (0, 0.0, ())}
    for k in range(K):
        after: dict[int, tuple[int, float, Path]] = {}
        for a, (few, squares, path) in sorted(best.items()):
            for b in _ends(k, a, K, n):
                cost = prefix[b] - prefix[a]
                one = few + bare(a, b), squares + cost**2, (*path, b)
                if cost <= found[1] and one[0] <= found[0] and (b not in after or one[:2] < after[b][:2]) and fits(k, a, b):
                    after[b] = one
        best = after
    return list(best[n][2][:-1])


def smallest_need(K: int, n: int, least: Callable[[int, int, int], float], need: Callable[[int, int, int], float]) -> list[int]:
    """Returns the K - 1 cuts of n layers that minimise the largest need of a stage. Exact.

    need(k, a, b): of stage k made of the layers a .. b - 1; least: a bound below it, which takes no time.
    """
    heap: list[tuple[float, bool, int, int, Path]] = [(0.0, True, 0, 0, ())]
    settled = set[tuple[int, int]]()
    while heap:
        most, known, done, a, path = heapq.heappop(heap)
        b = path[-1] if path else 0
        if (done, b) in settled:
            continue
        if not known:
            heapq.heappush(heap, (max(most, need(-done - 1, a, b)), True, done, a, path))
            continue
        settled.add((done, b))
        if (-done, b) == (K, n):
            return list(path[:-1])
        for end in _ends(-done, b, K, n):
            heapq.heappush(heap, (max(most, least(-done, b, end)), False, done - 1, b, (*path, end)))
    raise UsageError(f"cannot make {K} stages of {n} layers: use 1 to {n} stages")


def _ends(k: int, a: int, K: int, n: int) -> Iterator[int]:
    """Yields where stage k may end if it begins at layer a: every later stage needs a layer."""
    return iter(range(n, n + 1) if k == K - 1 else range(a + 1, n - (K - 1 - k) + 1) if k < K else ())
