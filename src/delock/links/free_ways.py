"""The ways of a free-running stage to its neighbours: several threads use them, each its own."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class WaySender(Protocol):
    """The end of a way at which packed messages, rows of uint8, go in."""

    def send(self, packed: Tensor) -> float:
        """Starts sending a message; returns the seconds that it waited."""

    def flush(self) -> None:
        """Waits until everything has arrived."""

    def close(self) -> None:
        """Lets everything arrive, and says that no more will come."""


class WayReceiver(Protocol):
    """The end of a way at which they come out, in order."""

    def receive(self) -> Tensor:
        """Returns the next message, waiting for it without a limit."""

    def close(self) -> None:
        """Waits until the other end has nothing more to send."""


class Ways(Protocol):
    """The ways of a stage to its neighbours and from them."""

    def sender(self, peer: int) -> WaySender:
        """Returns the way to a neighbour."""

    def receiver(self, peer: int) -> WayReceiver:
        """Returns the way from a neighbour."""

    def abandon(self) -> None:
        """Ends every wait of this stage, when the program ends."""
