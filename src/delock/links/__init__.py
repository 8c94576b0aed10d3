"""Links deliver named messages in order, between the stages of one process or of many; they never decide."""

from __future__ import annotations

from typing import Any, Protocol

from delock.links.message import Message, MessageName
from delock.links.traffic import SentBytes


class Link(Protocol):
    """One stage's end of the links to its neighbours."""

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Hand a message over, before it has arrived; returns the seconds that it waited for room, because the neighbour is behind."""

    def receive(self, source: int, name: MessageName) -> Message:
        """The next message from that neighbour, which must be the one of that name. Raises LinkError when it is another."""

    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """The next `count` messages from that neighbour, without consuming them: what is under way, for a checkpoint."""

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """Put messages of a checkpoint back in front of what is to come from that neighbour."""

    def state(self) -> Any:
        """What coming messages depend on beside what is sent: of codecs that learn, for a checkpoint."""

    def load(self, state: Any) -> None:
        """Go on from `state()`, before the first message."""

    def close(self) -> None:
        """Let what was sent arrive, and end the connection."""


class CountingLink(Link, Protocol):
    """A link that counts what it sends."""

    sent: SentBytes


__all__ = ["CountingLink", "Link", "Message", "MessageName"]
