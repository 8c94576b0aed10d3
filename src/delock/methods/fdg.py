"""Defines FDG: fully decoupled learning with delayed gradients and gradient shrinking."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

from delock.methods.base import Order, fraction, one_of
from delock.methods.delay_line import Ahead, DelayLine


@dataclass(frozen=True)
class FDG(DelayLine):
    """Delays activations and errors by one tick per link, so that all stages work at once (fully decoupled delayed gradients).

        stage 0 |F0.0 F1.0 F2.0 F3.0 F4.0 B0.0 F5.1 B1.1      K = 3; cell = op, batch . version
        stage 1 |     F0.0 F1.0 F2.0 B0.0 F3.1 B1.1
        stage 2 |          F0.0 B0.0 F1.1 B1.1

    Source: Zhuang, Wang, Liu, Lin, arXiv 1906.09108, IEEE TNNLS 2021. Update: w_k^{t+1} = step(w_k^t, g), where
    g = beta^(K-1-k) grad_k f(w^{t-D_k}; x_{b}), b = t - 2(K-1) + k; weight decay is not shrunk.

    symbol in the paper | here
    beta                | beta, the factor of every error received; 1 turns shrinking off
    K-1-k (module lag)  | half of D_k

    Options: at = "stash" (default, as in the paper's equations) or "mixed" (as the released code computed); order = "forward-first"
    (default, as in the paper's figures) or "backward-first" (as in the released code); micro_batches and ahead as in DelayLine.
    Deviations: none.
    Staleness of the gradient: D_k = 2(K-1-k) updates; backward-first D_k - 1 for k < K-1, and 0 for the last stage.
    Layer-wise staleness: D_k batches. Memory of stage k: D_k + 1 graphs (backward-first: D_k), with stash as many versions of the weights.
    """

    name: ClassVar[str] = "fdg"
    elsewhere: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"accumulate": "adl is fdg with the gradients of several batches in an update, so use adl"}
    )
    beta: float = 1.0
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
