"""Defines PipeDream-2BW: DDG's lags with every batch in parts, and weights that are one update old on every stage alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from delock.errors import UsageError
from delock.methods.base import whole
from delock.methods.delay_line import IN_PARTS, Ahead, DelayLine, refuse_ahead
from delock.ops import Weights


@dataclass(frozen=True)
class PipeDream2BW(DelayLine):
    """Takes the gradient of batch g at the weights of version max(g - 1, 0) on all stages, forward and backward (double-buffered weights).

        stage 0 |F0.0 F1.0 F2.0 ..   ..   B0.0 F3.0 B1.0 F4.0 B2.0 F5.0 B3.0 F6.0     K = 3, M = 4; cell = op, part . version used
        stage 1 |     F0.0 F1.0 ..   B0.0 F2.0 B1.0 F3.0 B2.0 F4.0 B3.0 F5.0 B4.1
        stage 2 |          F0.0 B0.0 F1.0 B1.0 F2.0 B2.0 F3.0 B3.0 F4.0 B4.1 F5.0

    Source: Narayanan, Phanishayee, Shi, Chen, Zaharia, ICML 2021. Update: w^{g+1} = step(w^g, (1/M) sum_j grad L(part j; w^{max(g-1, 0)})).

    symbol in the paper | here
    m                   | micro_batches, M; at least K-1, and by default max(4, K-1)
    W^(t), W^(t-1)      | the newest weights, and the bank of the version before

    ahead draws the version out by its own last update: w^{g-1} + (w^{g-1} - w^{g-2}), for all parts of a batch and all stages; "part" and
    "mean" are the same. Deviations: none.
    Staleness of the gradient: 1 on every stage, the last one included; 0 for batch 0. Layer-wise staleness: K-1-k parts.
    Memory of stage k: K-k graphs, two versions of the weights. K = 1 is training with a delay of one update, not plain training.
    """

    name: ClassVar[str] = "2bw"
    elsewhere: ClassVar[Mapping[str, str]] = IN_PARTS
    micro_batches: int = 0  # 0: by the number of stages
    ahead: Ahead | None = None

    def __post_init__(self) -> None:
        whole("micro_batches", self.micro_batches, 0)
        refuse_ahead(self.ahead)

    def fitted(self, K: int) -> PipeDream2BW:
        return self if self.micro_batches else replace(self, micro_batches=max(4, K - 1))

    def fits(self, K: int) -> None:
        if self.micro_batches < max(1, K - 1):
            raise UsageError(
                f"2bw in {K} stages needs batches of at least {max(1, K - 1)} parts, so that a version of the weights is complete before "
                f"the batch that uses it begins: set micro_batches to {max(1, K - 1)} or more, not {self.micro_batches}"
            )

    def weights(self, b: int, delay: int, last: bool) -> Weights:
        newest = b % self.micro_batches < delay  # the Update that ends the batch before comes after this Forward
        return Weights(behind=0 if newest else 1, ahead=1.0 if self.ahead else 0.0)

    def delay(self, k: int, K: int) -> int:
        return K - 1 - k
