"""Clipping over the whole network: the norms of all gradients go down the stages, and the norm of them all goes up.

With its last Backward before an Update a stage sends the norms of its gradients down, with those that came from above behind them. Stage 0
then knows every norm in the order of the layers, wherever the network is cut, so |g| has the same bits for any number of stages. It goes
up with the Updates, one stage after the other.

    stage 2   B  norms of stage 2 -----.                                   .--> U
    stage 1   B   `--> norms of stages 1, 2 -----.               .--> U ---'
    stage 0   B             `--> norms of stages 0, 1, 2 : |g| U-'
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from delock.links.message import Message, MessageKind, MessageName


class Exchange(Protocol):
    """The engine's side of its links."""

    def receive(self, source: int, name: MessageName) -> Message:
        """Waits for the message of that name from that stage."""

    def send(self, to: int, name: MessageName, message: Message) -> None:
        """Sends a message to that stage."""


class NetworkNorm:
    """Computes |g|, the norm of the whole network's gradient, together with the other stages; this is stage k of K."""

    def __init__(self, k: int, K: int) -> None:
        self.k, self.K = k, K
        self.norms = torch.zeros(0)  # stage 0: of all gradients of the network, for the coming Update

    def pass_down(self, number: int, own: Tensor, exchange: Exchange) -> None:
        """Sends the norms of this stage's gradients, (number of weights,), down with those from above; `number`: of the coming Update."""
        name = MessageName(MessageKind.GRADIENT_NORMS, number)
        above = exchange.receive(self.k + 1, name).values if self.k + 1 < self.K else ()
        norms = (own, *above)
        if self.k > 0:
            exchange.send(self.k - 1, name, Message(norms))
        else:
            self.norms = torch.cat([row for row in norms if len(row)] or [self.norms])

    def pass_up(self, number: int, exchange: Exchange) -> Tensor:
        """Returns |g|, a scalar: stage 0 computes it, the others receive it from below, and all but the last send it up."""
        name = MessageName(MessageKind.TOTAL_NORM, number)
        norm: Tensor = exchange.receive(self.k - 1, name).values if self.k > 0 else torch.linalg.vector_norm(self.norms)
        if self.k + 1 < self.K:
            exchange.send(self.k + 1, name, Message(norm))
        return norm
