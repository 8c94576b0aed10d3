"""The link of one process for a plan that reads activations again: a message is kept until its last reader has had it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from delock.errors import LinkError
from delock.links import Link
from delock.links.coded import ReceivedCodebooks
from delock.links.message import Message, MessageKind, MessageName
from delock.links.traffic import SentBytes
from delock.links.wire import make_dense, packed_length
from delock.ops import Evaluate, Forward
from delock.plan import Plan


class Store:
    """All links of a run whose plan is known as a whole. `codebooks` are shown every message, in the order sent."""

    def __init__(self, plan: Plan, codebooks: ReceivedCodebooks) -> None:
        self.reads, self.codebooks = reads(plan), codebooks
        self.messages: dict[tuple[int, MessageName], Message] = {}  # (sending stage, name) ->

    def end(self, k: int) -> StoreEnd:
        """Returns stage k's end."""
        return StoreEnd(self, k)


class StoreEnd(Link):
    """One stage's end of a Store."""

    def __init__(self, store: Store, k: int) -> None:
        self.store, self.k = store, k
        self.sent = SentBytes()

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Keeps the message if it will be read; there is always room."""
        self.sent.count(to, name, message, packed_length(message))
        message = self.store.codebooks.with_codebooks(self.k, message)
        if self.store.reads[self.k, name]:
            dense = replace(message, values=make_dense(message.values), targets=make_dense(message.targets))
            self.store.messages[self.k, name] = dense
        return 0.0

    def load(self, state: Mapping[str, Any]) -> None:
        """Begins with what a stage that ran freely had in its replay buffer, as far as it will be read (see `FreeLink.state`)."""
        for entry in state["buffer"]["entries"]:
            place = self.k - 1, MessageName(MessageKind.ACTIVATION, entry["ordinal"])
            if self.store.reads[place]:
                self.store.messages[place] = Message(**entry["item"])
        self.store.codebooks.books.update(state["codebooks"])

    def receive(self, source: int, name: MessageName) -> Message:
        """Returns the message of that name, and forgets it with its last reader."""
        place = source, name
        if place not in self.store.messages:
            raise LinkError(f"there is no message {name} of stage {source}")
        self.store.reads[place] -= 1
        return self.store.messages[place] if self.store.reads[place] else self.store.messages.pop(place)

    def close(self) -> None:
        """Has nothing to close."""


def reads(plan: Plan) -> Counter[tuple[int, MessageName]]:
    """Counts how often each message, by sending stage and name, is received in such a plan."""
    found: Counter[tuple[int, MessageName]] = Counter()
    for k, column in enumerate(plan.columns[1:]):
        for step in column:
            match step.op:
                case Forward(source=int() as source):
                    found[k, MessageName(MessageKind.ACTIVATION, source)] += 1
                case Evaluate(batch):
                    found[k, MessageName(MessageKind.EVALUATION, batch)] += 1
    return found
