"""Defines ADL: FDG's schedule with gradient accumulation, which divides the staleness by M."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from delock.methods.base import Order, fraction, one_of
from delock.methods.delay_line import Ahead, DelayLine
from delock.ops import Reduce


@dataclass(frozen=True)
class ADL(DelayLine):
    """Accumulates gradients: each stage updates after M of its own backwards (accumulated decoupled learning).

        stage 0 |F0.0 F1.0 F2.0 F3.0 F4.0 B0.0 F5.0 B1.0 F6.1 B2.1     K = 3, M = 2; cell = op, batch . version
        stage 1 |     F0.0 F1.0 F2.0 B0.0 F3.0 B1.0 F4.1 B2.1
        stage 2 |          F0.0 B0.0 F1.0 B1.0 F2.1 B2.1

    Source: Zhuang, Lin, Toh, ICML 2021, arXiv 2012.03747. Update n of stage k: w_k <- step(w_k, (1/M) sum_{b=nM}^{nM+M-1} g_k(b)),
    g_k(b) as in FDG; reduce="sum" leaves out 1/M. For SGD, the sum with (lr, wd) equals the mean with (M lr, wd/M).

    symbol in the paper | here
    M                   | accumulate
    beta                | beta

    Deviations: the released code takes the sum, and its last stage applies batches 0 and 1 together in its first update. Here the default
    is the mean, every update applies M batches, and when the run ends, an incomplete last group of r batches is applied as one update over
    r. Staleness of the gradient, of the j-th batch of a group: max(0, ceil((D_k - e - j) / M)), with e = 1 if backward-first and k < K-1,
    else 0; its mean is (D_k - e) / M, and with M >= 2(K-1) none is above 1. Layer-wise staleness: D_k = 2(K-1-k) batches. Memory of stage
    k: D_k + 1 graphs (backward-first: D_k), one gradient, and with stash ceil((D_k - e) / M) + 1 versions of the weights. In parts
    (micro_batches), D_k counts these and M is the parts of an update; ahead as in DelayLine.
    """

    name: ClassVar[str] = "adl"
    accumulate: int = 2
    beta: float = 1.0
    reduce: Reduce = "mean"
    at: Literal["stash", "mixed"] = "stash"
    order: Order = "forward-first"
    micro_batches: int = 1
    ahead: Ahead | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("beta", self.beta)
        one_of("at", self.at, ("stash", "mixed"))
        one_of("order", self.order, ("forward-first", "backward-first"))

    def delay(self, k: int, K: int) -> int:
        return 2 * (K - 1 - k)

    def offset(self, k: int, K: int) -> int:
        return k
