"""Defines the methods that break only the backward lock: DDG and features replay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from delock.methods.delay_line import Ahead, DelayLine
from delock.ops import Reduce


@dataclass(frozen=True)
class DDG(DelayLine):
    """Delays errors: the error of a batch arrives K-1-k ticks late at stage k (decoupled parallel backpropagation, delayed gradients).

        stage 0 |F0 F1 .. F2 .. B0.0 F3 .. B1.1         K = 3; cell = op, batch . version
        stage 1 |   F0 F1 B0.0 F2 B1.1 ..
        stage 2 |      F0 B0.0 F1 B1.1 F2 B2.2

    Source: Huo, Gu, Yang, Huang, ICML 2018. Update: w_k^{t+1} = w_k^t - lr grad_k f(w^{t-d}; x_{t-d}), d = K-1-k.

    symbol in the paper | here
    d                   | K-1-k = D_k

    Deviations: none. Staleness of the gradient: K-1-k updates. Layer-wise staleness: K-1-k batches.
    Memory of stage k: K-k graphs and K-k versions of the weights.

    In M parts (micro_batches) this is PipeDream, 1F1B without a flush (Narayanan et al., SOSP 2019): part j is max(0, ceil((K-1-k-j) / M))
    updates old, D_k counts parts, and there are ceil((K-1-k) / M) + 1 versions of the weights. ahead: see DelayLine. With accumulate, A
    batches make an update, of the mean or the sum (reduce) of their gradients, as for ADL; M is the parts of an update then.
    """

    name: ClassVar[str] = "ddg"
    micro_batches: int = 1
    ahead: Ahead | None = None
    accumulate: int = 1
    reduce: Reduce = "mean"

    def delay(self, k: int, K: int) -> int:
        return K - 1 - k


@dataclass(frozen=True)
class FR(DelayLine):
    """Replays features: DDG's schedule, but a stage keeps only its inputs and recomputes its forward at the current weights.

    Source: Huo, Gu, Huang, NeurIPS 2018. Update: g_k = [df_k(h_k^{t-d}; w_k^t)/dw_k]^T delta_{k+1}, d = K-1-k.

    symbol in the paper | here
    d                   | K-1-k = D_k

    Deviations: none. Staleness of the gradient: 0. Layer-wise staleness: K-1-k batches.
    Memory of stage k: K-k inputs and one graph, no copy of the weights. In parts (micro_batches), D_k counts parts, and one that no Update
    comes between keeps its graph. ahead, see DelayLine, acts on the Forward alone. accumulate and reduce as in DDG.
    """

    name: ClassVar[str] = "fr"
    micro_batches: int = 1
    ahead: Ahead | None = None
    accumulate: int = 1
    reduce: Reduce = "mean"
    at = "replay"

    def delay(self, k: int, K: int) -> int:
        return K - 1 - k
