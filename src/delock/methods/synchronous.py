"""Defines the synchronous baselines: backpropagation, GPipe and 1F1B compute the same gradient in a different order of work."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from delock.errors import UsageError
from delock.methods.base import Method, whole
from delock.methods.delay_line import refuse_ahead
from delock.ops import Backward, Forward, Op, Update, Weights

MOST_BEHIND = 1000  # every update that the weights are behind is a copy of them


@dataclass(frozen=True)
class BP(Method):
    """Sends one (micro-)batch at a time through all stages and back: backpropagation, as naive model parallelism on K workers.

    Source: Rumelhart, Hinton, Williams 1986. Update: w <- step(w, sum_j (n_j / n) grad L(x_j; w)) over the M micro-batches x_j of a
    batch, of n_j and n samples.

    symbol in the paper | here
    M (accumulation)    | accumulate

    behind = n, for measurements, takes the gradient at the weights of n updates ago on all stages: w <- step(w, grad L(x; w[v - n])). Then
    K = 1 is plain training with a delay of n. With ahead, "part" or "mean", it is taken at w[v - n] + n (w[v - n] - w[v - n - 1]).

    Deviations: none. Staleness of the gradient: 0; with behind = n it is min(n, updates made). Layer-wise staleness: 0.
    Memory of stage k: one graph of one micro-batch, and `behind` older versions of the weights.
    """

    name: ClassVar[str] = "bp"
    synchronous: ClassVar[bool] = True
    accumulate: int = 1
    behind: int = 0
    ahead: Literal["part", "mean"] | None = None

    def __post_init__(self) -> None:
        whole("accumulate", self.accumulate, 1)
        whole("behind", self.behind, 0, MOST_BEHIND)
        refuse_ahead(self.ahead)
        if self.ahead and not self.behind:
            raise UsageError("bp is not late, so nothing can be ahead: leave ahead out, or set behind")

    @property
    def micro_batches(self) -> int:
        return self.accumulate

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        weights = Weights(self.behind, float(self.behind) if self.ahead else 0.0)
        for b in range(t * self.micro_batches, (t + 1) * self.micro_batches):
            yield Forward(b, weights=weights)
            yield Backward(b, loss=K - 1)
        yield Update()

    def delay(self, k: int, K: int) -> int:
        return 0


@dataclass(frozen=True)
class GPipe(Method):
    """Runs all M micro-batches forward, then all backward, then one update.

    Source: Huang et al., NeurIPS 2019. Update: that of BP with accumulate = M, bit for bit (backward in order 0 .. M-1).

    symbol in the paper | here
    M                   | micro_batches

    Deviations: backwards run first to last, where the paper runs them last to first; no recomputation.
    Staleness of the gradient: 0. Layer-wise staleness: 0.
    Memory of stage k: M graphs of one micro-batch. Idle share (bubble): (K-1) / (M+K-1).
    """

    name: ClassVar[str] = "gpipe"
    synchronous: ClassVar[bool] = True
    micro_batches: int = 4

    def __post_init__(self) -> None:
        whole("micro_batches", self.micro_batches, 1)

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        batches = range(t * self.micro_batches, (t + 1) * self.micro_batches)
        yield from (Forward(b) for b in batches)
        yield from (Backward(b, loss=K - 1) for b in batches)
        yield Update()

    def delay(self, k: int, K: int) -> int:
        return 0


@dataclass(frozen=True)
class OneFOneB(Method):
    """Runs min(M, K-1-k) forwards, then a forward and a backward in turn, then one update (1F1B, PipeDream-flush).

        stage 0 |F0 F1 F2 .. B0 F3 B1 .. B2 .. B3 U      K = 3, M = 4
        stage 1 |   F0 F1 B0 F2 B1 F3 B2 .. B3 U
        stage 2 |      F0 B0 F1 B1 F2 B2 F3 B3 U

    Source: Narayanan et al., SOSP 2019 and ICML 2021. Update: that of BP with accumulate = M, bit for bit.

    symbol in the paper | here
    m                   | micro_batches

    Deviations: none. Staleness of the gradient: 0. Layer-wise staleness: 0.
    Memory of stage k: min(M, K-k) graphs of one micro-batch. Idle share (bubble): (K-1) / (M+K-1).
    """

    name: ClassVar[str] = "1f1b"
    synchronous: ClassVar[bool] = True
    micro_batches: int = 4

    def __post_init__(self) -> None:
        whole("micro_batches", self.micro_batches, 1)

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        first, M = t * self.micro_batches, self.micro_batches
        warm = min(M, K - 1 - k)
        yield from (Forward(first + j) for j in range(warm))
        for j in range(M):
            if warm + j < M:
                yield Forward(first + warm + j)
            yield Backward(first + j, loss=K - 1)
        yield Update()

    def delay(self, k: int, K: int) -> int:
        return 0
