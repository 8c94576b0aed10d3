"""The link between stages of one process: a queue per direction."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from itertools import islice

from delock.links.errors import expect
from delock.links.message import Message, Name, packed_length, settle
from delock.links.values import Sent, lean


class Mailbox:
    """All links of an in-process run; `end(k)` is the link as stage k sees it."""

    def __init__(self) -> None:
        self.queues: dict[tuple[int, int], deque[tuple[Name, Message]]] = {}

    def end(self, k: int) -> MailboxEnd:
        """Stage k's end."""
        return MailboxEnd(self, k)

    def queue(self, source: int, to: int) -> deque[tuple[Name, Message]]:
        """Messages under way from one stage to another, oldest first."""
        return self.queues.setdefault((source, to), deque())


class MailboxEnd:
    """One stage's end of a Mailbox."""

    def __init__(self, box: Mailbox, k: int) -> None:
        self.box, self.k = box, k
        self.sent = Sent()

    def send(self, to: int, name: Name, message: Message) -> float:
        """See Link; there is always room."""
        self.sent.count(to, name, message, packed_length(lean(message)))
        settled = replace(message, values=settle(message.values), targets=settle(message.targets))
        self.box.queue(self.k, to).append((name, settled))
        return 0.0

    def receive(self, source: int, name: Name) -> Message:
        """See Link."""
        got, message = self.box.queue(source, self.k).popleft()
        expect(got, name, source)
        return message

    def pull(self, source: int, count: int) -> list[tuple[Name, Message]]:
        """See Link."""
        return list(islice(self.box.queue(source, self.k), count))

    def push(self, source: int, messages: list[tuple[Name, Message]]) -> None:
        """See Link."""
        self.box.queue(source, self.k).extendleft(reversed(messages))

    def state(self) -> None:
        """See Link: nothing."""

    def load(self, state: None) -> None:
        """See Link."""

    def close(self) -> None:
        """See Link."""
