"""Defines DGL: every stage learns from a loss of its own, and no error crosses a link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from delock.methods.base import Method
from delock.ops import Backward, Forward, Op, Update


@dataclass(frozen=True)
class DGL(Method):
    """Minimises at every stage the loss of its own head, with its input taken as data (decoupled greedy learning, synchronous).

        stage 0 |F0.0 B0.0 F1.1 B1.1 F2.2 B2.2     K = 3; cell = op, batch . version
        stage 1 |     F0.0 B0.0 F1.1 B1.1 F2.2
        stage 2 |          F0.0 B0.0 F1.1 B1.1

    Source: Belilovsky, Eickenberg, Oyallon, ICML 2020; arXiv 2106.06401. Update: (w_k, u_k) <- step((w_k, u_k), grad L_k),
    L_k = loss(a_k(f_k(h_k; w_k); u_k), y); the last stage's head is the network's own.

    symbol in the paper | here
    theta_j, gamma_j    | w_k of the stage, u_k of its head
    x_j                 | h_k, as stage k - 1 computed it before its own update of that batch

    Deviations: none. Staleness of the gradient: 0. Layer-wise staleness: 0. Memory of stage k: one graph, and its head.
    """

    name: ClassVar[str] = "dgl"
    local_losses: ClassVar[bool] = True

    def tick(self, t: int, k: int, K: int) -> Iterator[Op]:
        yield Forward(t - k)
        yield Backward(t - k, loss=k)
        yield Update()

    def delay(self, k: int, K: int) -> int:
        return 0

    def headed(self, K: int) -> range:
        return range(K - 1)

    def offset(self, k: int, K: int) -> int:
        return k
