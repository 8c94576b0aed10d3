"""Defines PACI: DDG's lags with every batch in parts, and one copy of the weights, which updates overwrite under live graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from delock.methods.delay_line import IN_PARTS, Ahead, DelayLine


@dataclass(frozen=True)
class PACI(DelayLine):
    """Runs 1F1B without a flush: each stage updates after its last part of a batch, and keeps no older weights (at = "mixed").

        stage 0 |F0.0 F1.0 F2.0 ..   B0.0 F3.0 ..   B1.0     K = 3, M = 4; cell = op, part . version
        stage 1 |     F0.0 F1.0 B0.0 F2.0 B1.0 ..
        stage 2 |          F0.0 B0.0 F1.0 B1.0 F2.0

    Source: Elam et al., arXiv 2606.07881: asynchronous 1F1B with local accumulation. Update: w_k <- step(w_k, sum_j (n_j / n) g_k(part j)),
    g_k(part j) with the activations of its Forward and the weights of its Backward.

    symbol in the paper | here
    gradient accumulation | micro_batches, M

    Deviations: none. Staleness of the gradient: at most ceil((K-1) / M), for part j max(0, ceil((K-1-k-j) / M)).
    Layer-wise staleness: K-1-k parts. Memory of stage k: K-k graphs, no copy of the weights.
    """

    name: ClassVar[str] = "paci"
    elsewhere: ClassVar[Mapping[str, str]] = IN_PARTS
    micro_batches: int = 4
    ahead: Ahead | None = None
    at = "mixed"

    def delay(self, k: int, K: int) -> int:
        return K - 1 - k
