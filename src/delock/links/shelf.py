"""The link of one process for a plan that reads activations again: a message is kept until its last reader has had it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from delock.links.errors import LinkError
from delock.links.message import Message, Name, packed_length, settle
from delock.links.unresumed import Unresumed
from delock.links.values import Sent, lean


class Shelf:
    """All links of a run whose readers are known beforehand. `reads`: how often each message (stage, name) will be received."""

    def __init__(self, reads: Counter[tuple[int, Name]]) -> None:
        self.reads = reads
        self.messages: dict[tuple[int, Name], Message] = {}

    def end(self, k: int) -> ShelfEnd:
        """Stage k's end."""
        return ShelfEnd(self, k)


class ShelfEnd(Unresumed):
    """One stage's end of a Shelf."""

    def __init__(self, shelf: Shelf, k: int) -> None:
        self.shelf, self.k = shelf, k
        self.sent = Sent()

    def send(self, to: int, name: Name, message: Message) -> float:
        """See Link; there is always room."""
        self.sent.count(to, name, message, packed_length(lean(message)))
        if self.shelf.reads[self.k, name]:
            self.shelf.messages[self.k, name] = replace(message, values=settle(message.values), targets=settle(message.targets))
        return 0.0

    def receive(self, source: int, name: Name) -> Message:
        """See Link."""
        place = source, name
        if place not in self.shelf.messages:
            raise LinkError(f"there is no message {name} of stage {source}")
        self.shelf.reads[place] -= 1
        return self.shelf.messages[place] if self.shelf.reads[place] else self.shelf.messages.pop(place)

    def close(self) -> None:
        """See Link."""
