"""The link of a rank to its neighbours: a channel to each, which may go through shared memory to one and over a network to the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from delock.links.coded import Library, without_codebooks
from delock.links.message import Message, MessageName, expect
from delock.links.traffic import SentBytes


class Channel(Protocol):
    """One end of the connection between two neighbouring ranks, both ways; messages arrive whole and in order."""

    def pack(self, name: MessageName, message: Message) -> tuple[Any, int]:
        """Lay a message out as it will travel; also says its bytes. What is packed is posted before the next one is packed."""

    def post(self, packed: Any) -> float:
        """Let it go its way. Waits while the peer is too far behind (back-pressure), and returns the seconds of that."""

    def receive(self) -> tuple[MessageName, Message]:
        """The next message, waiting for it."""

    def close(self) -> None:
        """Let what was sent arrive, and end the connection."""


class Progress(Protocol):
    """Who wants to know that a link blocks (a rank's progress record). A wait that raises is left standing."""

    def wait_for(self, peer: int) -> None:
        """The link waits for that peer, for a message or for room for one."""

    def go_on(self) -> None:
        """It waits no longer."""


class RankLink:
    """A rank's link by its channels, neighbour -> channel."""

    def __init__(self, channels: Mapping[int, Channel], watch: Progress) -> None:
        self.channels, self.watch = channels, watch
        self.ahead: dict[int, deque[tuple[MessageName, Message]]] = {peer: deque() for peer in channels}
        self.libraries = {peer: Library() for peer in channels}
        self.sent = SentBytes()

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """See Link."""
        packed, length = self.channels[to].pack(name, without_codebooks(message))
        self.sent.count(to, name, message, length)
        self.watch.wait_for(to)
        waited = self.channels[to].post(packed)
        self.watch.go_on()
        return waited

    def receive(self, source: int, name: MessageName) -> Message:
        """See Link."""
        got, message = self.ahead[source].popleft() if self.ahead[source] else self._next(source)
        expect(got, name, source)
        return message

    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """See Link."""
        while len(self.ahead[source]) < count:
            self.ahead[source].append(self._next(source))
        return list(self.ahead[source])[:count]

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """See Link."""
        self.ahead[source].extendleft(reversed(messages))

    def _next(self, source: int) -> tuple[MessageName, Message]:
        self.watch.wait_for(source)
        name, message = self.channels[source].receive()
        self.watch.go_on()
        return name, self.libraries[source].with_codebooks(message)

    def state(self) -> None:
        """See Link: nothing; messages that were pulled hold their codebooks."""

    def load(self, state: None) -> None:
        """See Link."""

    def close(self) -> None:
        """See Link. All ranks close upwards, the lower neighbour first, so that nobody waits in a circle."""
        for peer, channel in sorted(self.channels.items()):
            self.watch.wait_for(peer)
            channel.close()
