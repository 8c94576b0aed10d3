"""The link of a rank to its neighbours: a channel to each, which may go through shared memory to one and over a network to the other."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Protocol

from delock.launch.progress import Progress
from delock.links import Resumable
from delock.links.message import Message, MessageName, expect
from delock.links.recorder import Recorder
from delock.links.traffic import SentBytes


class Channel(Protocol):
    """One end of the connection between two neighbouring ranks, both ways; messages arrive whole and in order."""

    def pack(self, name: MessageName, message: Message) -> tuple[Any, int]:
        """Lays a message out as it will travel; also returns its bytes. What is packed is posted before the next one is packed."""

    def post(self, packed: Any) -> float:
        """Lets it go its way. Waits while the peer is too far behind (back-pressure), and returns the seconds of that."""

    def receive(self) -> tuple[MessageName, Message]:
        """Returns the next message, waiting for it."""

    def close(self) -> None:
        """Lets what was sent arrive, and ends the connection."""


class RankLink(Resumable):
    """A rank's link by its channels, neighbour -> channel. `progress` notes every wait; one that raises is left standing there."""

    def __init__(self, channels: Mapping[int, Channel], progress: Progress) -> None:
        self.channels, self.progress = channels, progress
        self.ahead: dict[int, deque[tuple[MessageName, Message]]] = {peer: deque() for peer in channels}
        self.sent, self.recorder = SentBytes(), Recorder()

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Packs the message, and posts it as soon as there is room."""
        packed, length = self.channels[to].pack(name, message)
        self.sent.count(to, name, message, length)
        self.progress.wait_for(to)
        waited = self.channels[to].post(packed)
        self.progress.go_on()
        return waited

    def receive(self, source: int, name: MessageName) -> Message:
        """Returns a message that was pulled or pushed before, if there is one, else the next that comes."""
        got, message = self.ahead[source].popleft() if self.ahead[source] else self._next(source)
        expect(got, name, source)
        self.recorder.note(source, got, message)
        return message

    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Waits for as many messages as are under way, and keeps them for `receive`."""
        while len(self.ahead[source]) < count:
            self.ahead[source].append(self._next(source))
        return list(self.ahead[source])[:count]

    def take(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Waits for the messages that are under way, and takes them."""
        self.pull(source, count)
        return [self.ahead[source].popleft() for _ in range(count)]

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """Puts messages in front of those that were pulled."""
        self.ahead[source].extendleft(reversed(messages))

    def _next(self, source: int) -> tuple[MessageName, Message]:
        self.progress.wait_for(source)
        named = self.channels[source].receive()
        self.progress.go_on()
        return named

    def close(self) -> None:
        """Closes the channels. All ranks close upwards, the lower neighbour first, so that none waits in a circle."""
        for peer, channel in sorted(self.channels.items()):
            self.progress.wait_for(peer)
            channel.close()
