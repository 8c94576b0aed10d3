"""Defines ZB1P, the strongest synchronous schedule with 1F1B's memory: 1F1B with the backward in two halves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from delock.methods.synchronous import OneFOneB
from delock.ops import Backward, Forward, Op, Update


@dataclass(frozen=True)
class ZB1P(OneFOneB):
    """Sends an error down as soon as it is computed, and puts the gradients of weights off into the bubble of 1F1B.

        stage 0 |F0 F1 F2 .. .. B0 F3 B1 .. B2 .. B3 U      K = 3, M = 4; b: the error passed on, w: the weight gradient;
        stage 1 |   F0 F1 .. b0 F2 b1 w0 F3 b2 w1 b3 w2 w3 U      stage 0 passes nothing on, so its B is never split
        stage 2 |      F0 b0 F1 b1 F2 b2 w0 F3 b3 w1 w2 w3 U

    Source: Qi, Wan, Huang, Lin, "Zero Bubble Pipeline Parallelism", ICLR 2024: the schedule ZB-H1. Update: that of BP with accumulate = M,
    bit for bit (weight gradients are added in order 0 .. M-1).

    symbol in the paper | here
    m                   | micro_batches
    B, W                | b and w

    Deviations: none. Staleness of the gradient: 0. Layer-wise staleness: 0. Memory of stage k: min(M, K) graphs of one micro-batch: K-k as
    in 1F1B, and k whose weight gradient has been put off. Idle time, for M >= K and F = b = w: K-1, a third of 1F1B's 3 (K-1).
    """

    name: ClassVar[str] = "zb1p"

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        first, M = t * self.micro_batches, self.micro_batches
        warm = min(M, K - 1 - k)
        yield from (Forward(first + j) for j in range(warm))
        for j in range(M + k):
            if warm + j < M:
                yield Forward(first + warm + j)
            if j < M:
                yield Backward(first + j, loss=K - 1, part="input" if k else "both")
            if k and j >= k:
                yield Backward(first + j - k, loss=K - 1, part="weights")
        yield Update()
