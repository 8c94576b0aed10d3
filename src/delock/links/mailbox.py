"""The link between stages of one process: a queue per direction."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import islice

from delock.links import Resumable
from delock.links.message import Message, MessageName, expect
from delock.links.recorder import Recorder
from delock.links.traffic import SentBytes
from delock.links.wire import make_dense, packed_length


class Mailbox:
    """All links of an in-process run; `end(k)` is the link as stage k sees it."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], deque[tuple[MessageName, Message]]] = {}

    def end(self, k: int) -> MailboxEnd:
        """Returns stage k's end."""
        return MailboxEnd(self, k)

    def queue(self, source: int, to: int) -> deque[tuple[MessageName, Message]]:
        """Returns the messages under way from one stage to another, oldest first."""
        return self.queues.setdefault((source, to), deque())


class MailboxEnd(Resumable):
    """One stage's end of a Mailbox."""

    def __init__(self, box: Mailbox, k: int) -> None:
        self.box, self.k = box, k
        self.sent, self.recorder = SentBytes(), Recorder()

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Puts the message into the neighbour's queue, as dense as a wire would make it; there is always room."""
        self.sent.count(to, name, message, packed_length(message))
        dense = replace(message, values=make_dense(message.values), targets=make_dense(message.targets))
        self.box.queue(self.k, to).append((name, dense))
        return 0.0

    def receive(self, source: int, name: MessageName) -> Message:
        """Takes the oldest message, which is there: the plan of one process says so."""
        got, message = self.box.queue(source, self.k).popleft()
        expect(got, name, source)
        self.recorder.note(source, got, message)
        return message

    def pull(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Returns the oldest messages of the queue."""
        return list(islice(self.box.queue(source, self.k), count))

    def take(self, source: int, count: int) -> list[tuple[MessageName, Message]]:
        """Takes the oldest messages out of the queue."""
        return [self.box.queue(source, self.k).popleft() for _ in range(count)]

    def push(self, source: int, messages: list[tuple[MessageName, Message]]) -> None:
        """Puts messages in front of the queue."""
        self.box.queue(source, self.k).extendleft(reversed(messages))

    def close(self) -> None:
        """Has nothing to close."""
