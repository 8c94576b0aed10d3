"""Defines interlocking backpropagation: local losses whose gradients reach N stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from delock.errors import UsageError
from delock.methods.base import Method, one_of, whole
from delock.ops import Backward, Forward, Op, Update


@dataclass(frozen=True)
class Interlocking(Method):
    """Trains stage k on the loss of stage min(k + N - 1, K - 1), N-wise; errors come down one by one, nearest loss first.

        stage 0 |F0.0           B0.0 F1.1           B1.1     K = 4, N = 2; b: the error passed on, w: the weight gradient, B: both
        stage 1 |     F0.0 b0.0      B0.0 F1.1 b1.1          b0.0 is the error of L_1, for stage 0; B0.0 that of L_2
        stage 2 |          F0.0 b0.0      B0.0 F1.1 b1.1     b0.0 is the error of L_2, for stage 1; B0.0 that of L_3
        stage 3 |               F0.0 b0.0 w0.0      F1.1     b0.0 is the error of L_3, for stage 2; w0.0 its weight gradient

    Source: Gomez, Key, Perlin, Gou, Frosst, Dean, Gal, JMLR 23(171), 2022; arXiv 2010.04116. Update: w_k <- step(w_k, dL_j / dw_k) with
    j = min(k + N - 1, K - 1); u_k <- step(u_k, dL_k / du_k), h_{k+1} taken as data. combine="sum": the sum of dL_i / dw_k over
    i = k .. j; "mean": their mean.

    symbol in the paper | here
    N                   | n_wise (1: local learning, 2: pairwise, K: backpropagation)
    auxiliary network   | head of stage k < K-1; with "furthest" the heads of stages k < N-1 train no stage and are left out

    send="early" sends an error before the weight gradient is computed, "late" after it; the numbers are the same.
    Deviations: none. Staleness of the gradient: 0. Layer-wise staleness: 0. Memory of stage k: one graph, and its head.
    Steady period, if forward, input gradient and weight gradient take 1 each, heads nothing, and K > N: 2(N-1) + 3 early, 3N late.
    """

    name: ClassVar[str] = "interlocking"
    local_losses: ClassVar[bool] = True
    n_wise: int = 2
    combine: Literal["furthest", "sum", "mean"] = "furthest"
    send: Literal["early", "late"] = "early"

    def __post_init__(self) -> None:
        whole("n_wise", self.n_wise, 1)
        one_of("combine", self.combine, ("furthest", "sum", "mean"))
        one_of("send", self.send, ("early", "late"))

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        yield Forward(t)
        trainers, heard = self._trainers(k, K), self._passed_on(k, K)
        weight = 1 / len(trainers) if self.combine == "mean" else 1.0
        for loss in sorted({*heard, *trainers}):  # near losses first: their errors are ready first
            if loss not in trainers:
                yield Backward(t, loss, part="input")
            elif loss in heard and self.send == "early":
                yield Backward(t, loss, part="input", weight=weight)
                yield Backward(t, loss, part="weights", weight=weight)
            else:
                yield Backward(t, loss, weight=weight)
        yield Update()

    def _furthest(self, k: int, K: int) -> int:
        return min(k + self.n_wise - 1, K - 1)

    def _trainers(self, k: int, K: int) -> range:
        """Returns the losses that train w_k."""
        furthest = self._furthest(k, K)
        return range(furthest if self.combine == "furthest" else k, furthest + 1)

    def _passed_on(self, k: int, K: int) -> range:
        """Returns the losses of stage k and above whose errors stage k sends down."""
        if k == 0:
            return range(0)
        first = min(self.n_wise, K) - 1 if self.combine == "furthest" else 0
        return range(max(k, first), self._furthest(k - 1, K) + 1)

    def delay(self, k: int, K: int) -> int:
        return 0

    def headed(self, K: int) -> range:
        return range(self.n_wise - 1 if self.combine == "furthest" else 0, K - 1)

    def capacity(self, k: int, K: int) -> int:
        return max(2, self.n_wise)

    def fits(self, K: int) -> None:
        if self.n_wise > K:
            raise UsageError(f"n_wise is {self.n_wise}, but the gradient of a loss reaches at most all {K} stages: it must lie in 1 .. {K}")
