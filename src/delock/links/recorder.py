"""Records messages that were under way at an instant, as they are received afterwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import torch

from delock.links.message import Message, MessageName
from delock.tensors import map_tensors


class Recorder:
    """Keeps copies of the next messages from each neighbour, as many as were under way; links deliver in order, so those are the ones."""

    def __init__(self) -> None:
        self.due: Counter[int] = Counter()
        self.found: dict[int, list[tuple[MessageName, Message]]] = {}

    def start(self, counts: Mapping[int, int]) -> dict[int, list[tuple[MessageName, Message]]]:
        """Begins anew with these numbers of messages by neighbour; returns the lists that fill as they come."""
        self.due, self.found = Counter(counts), {source: [] for source in counts}
        return self.found

    @property
    def complete(self) -> bool:
        """True if no message is missing any more."""
        return not any(self.due.values())

    def note(self, source: int, name: MessageName, message: Message) -> None:
        """Keeps a copy of a message that has been received, if it was under way: its memory may be another's soon."""
        if self.due[source] > 0:
            self.due[source] -= 1
            values, targets = map_tensors(torch.clone, (message.values, message.targets))
            self.found[source].append((name, replace(message, values=values, targets=targets)))
