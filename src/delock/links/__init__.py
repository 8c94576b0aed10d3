"""Links deliver named messages in order, between the stages of one process or of many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from delock.errors import UsageError
from delock.links.message import Message, MessageKind, MessageName
from delock.links.recorder import Recorder
from delock.links.traffic import SentBytes


class Link(ABC):
    """One stage's end of the links to its neighbours."""

    sent: SentBytes
    """The bytes that went out."""
    decoding: float = 0.0
    """Seconds, of all in `receive` so far, that were spent on decoding and not on waiting."""

    @abstractmethod
    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Hands a message over, before it has arrived; returns the seconds that it waited for room, because the neighbour is behind."""

    @abstractmethod
    def receive(self, source: int, name: MessageName) -> Message:
        """Returns the next message from that neighbour, which must be the one of that name. Raises LinkError when it is another."""

    def state(self) -> Any:  # noqa: B027 - most links have nothing to save
        """Returns all that coming messages depend on beside what is under way: codecs learn and buffers fill, other links do not."""

    def load(self, state: Any) -> None:  # noqa: B027 - most links have nothing to load
        """Goes on from `state()`, before the first message."""

    @abstractmethod
    def close(self) -> None:
        """Lets everything that was sent arrive, and ends the connection."""


class Resumable(Link):
    """A link whose messages under way can be saved in a checkpoint, either by waiting for them (`pull`) or as they come (`recorder`)."""

    recorder: Recorder
    """It is shown every message that is received, encoded if the link carries it so."""

    @abstractmethod
    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Returns the next `count` messages from that neighbour, without consuming them: what is under way."""

    @abstractmethod
    def take(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Does as `pull`, and lets go of them: what is sent behind them comes first now, until they are pushed back."""

    @abstractmethod
    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """Puts messages that were taken, or those of a checkpoint, in front of what is to come from that neighbour."""


def resumable(link: Link) -> Resumable:
    """Returns the link. Raises UsageError for one with replay buffers, whose messages under way are not to be had."""
    if not isinstance(link, Resumable):
        raise UsageError("messages under way to a replay buffer cannot be saved: a checkpoint has what is in the buffer")
    return link


__all__ = ["Link", "Message", "MessageKind", "MessageName", "Resumable", "resumable"]
