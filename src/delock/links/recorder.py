"""Records messages that were under way at an instant, as they are received afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from threading import Event

import torch

from delock.links.message import Message, MessageName
from delock.tensors import map_tensors


@dataclass
class Record:
    """Holds the messages that were under way at one instant, by neighbour, as far as they have come."""

    due: Counter[int]  # by neighbour, how many have not
    found: dict[int, list[tuple[MessageName, Message]]]
    done: Event = field(default_factory=Event)  # is set when the last has come

    @property
    def complete(self) -> bool:
        """True if no message is missing any more."""
        return not any(self.due.values())


class Recorder:
    """Keeps copies of the next messages from each neighbour, as many as were under way; links deliver in order, so those are the ones."""

    def __init__(self) -> None:
        self.open: list[Record] = []

    def start(self, counts: Mapping[int, int]) -> Record:
        """Begins a record of these numbers of messages by neighbour; it fills as they come. Earlier ones go on."""
        record = Record(Counter(counts), {source: [] for source in counts})
        self.open.append(record)
        self._close()
        return record

    def note(self, source: int, name: MessageName, message: Message) -> None:
        """Keeps a copy of a message that has been received, where it was under way: its memory may be another's soon."""
        wanting = [record for record in self.open if record.due[source] > 0]
        if not wanting:
            return
        values, targets = map_tensors(torch.clone, (message.values, message.targets))
        for record in wanting:
            record.due[source] -= 1
            record.found[source].append((name, replace(message, values=values, targets=targets)))
        self._close()

    def _close(self) -> None:
        for record in self.open:
            if record.complete:
                record.done.set()
        self.open = [record for record in self.open if not record.complete]
