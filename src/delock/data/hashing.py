"""Computes counter-based random numbers on whole arrays: the i-th number depends on (key, i) alone, not on earlier draws."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: successive counters land far apart
MIX1 = np.uint64(0xBF58476D1CE4E5B9)
MIX2 = np.uint64(0x94D049BB133111EB)


def splitmix64(key: int, counters: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Returns 64 random bits for each counter: entry i is output counters[i] of the generator SplitMix64 started at `key`.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. The state of the generator only counts up
    by GOLDEN, so any output can be computed without those before it. Keys come from `delock.keys.key`, which spreads them over the state
    space.
    """
    z = (counters.astype(np.uint64) + np.uint64(1)) * GOLDEN + np.uint64(key)  # arrays of uint64 wrap around, as they should
    z = (z ^ (z >> np.uint64(30))) * MIX1
    z = (z ^ (z >> np.uint64(27))) * MIX2
    return z ^ (z >> np.uint64(31))


def permutation(key: int, n: int) -> NDArray[np.int64]:
    """Returns a random order of 0 .. n-1, (n,): that of n hashes. Unlike a library's shuffle, it is the same under every version."""
    return np.argsort(splitmix64(key, np.arange(n)), kind="stable")
