"""The link of one process for a plan that reads activations again: a message is kept until its last reader has had it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NoReturn

from delock.errors import LinkError
from delock.links.coded import without_codebooks
from delock.links.message import Message, MessageName
from delock.links.traffic import SentBytes
from delock.links.wire import make_dense, packed_length


class Unresumed:
    """The part of a Link that checkpoints need, refused."""

    def pull(self, source: int, count: int) -> NoReturn:
        """See Link."""
        self._refuse()

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> NoReturn:
        """See Link."""
        self._refuse()

    def state(self) -> NoReturn:
        """See Link."""
        self._refuse()

    def load(self, state: None) -> NoReturn:
        """See Link."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise NotImplementedError("a run with a replay buffer is repeated from its trace, not resumed")


class Store:
    """All links of a run whose readers are known beforehand. `reads`: how often each message (stage, name) will be received."""

    def __init__(self, reads: Counter[tuple[int, MessageName]]) -> None:
        self.reads = reads
        self.messages: dict[tuple[int, MessageName], Message] = {}

    def end(self, k: int) -> StoreEnd:
        """Stage k's end."""
        return StoreEnd(self, k)


class StoreEnd(Unresumed):
    """One stage's end of a Shelf."""

    def __init__(self, shelf: Store, k: int) -> None:
        self.shelf, self.k = shelf, k
        self.sent = SentBytes()

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """See Link; there is always room."""
        self.sent.count(to, name, message, packed_length(without_codebooks(message)))
        if self.shelf.reads[self.k, name]:
            self.shelf.messages[self.k, name] = replace(message, values=make_dense(message.values), targets=make_dense(message.targets))
        return 0.0

    def receive(self, source: int, name: MessageName) -> Message:
        """See Link."""
        place = source, name
        if place not in self.shelf.messages:
            raise LinkError(f"there is no message {name} of stage {source}")
        self.shelf.reads[place] -= 1
        return self.shelf.messages[place] if self.shelf.reads[place] else self.shelf.messages.pop(place)

    def close(self) -> None:
        """See Link."""
