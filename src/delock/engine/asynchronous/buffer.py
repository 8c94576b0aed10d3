"""The replay buffer of asynchronous DGL: which mini-batch a stage learns from next."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from delock.errors import UsageError

T = TypeVar("T")


@dataclass
class ReuseStatistics:
    """How old what was read was, and how often it was: each a histogram."""

    reuse: Counter[int] = field(default_factory=Counter)  # times that a batch was read -> batches
    visits: Counter[int] = field(default_factory=Counter)  # Forwards of the stage below between the batch read and the newest put -> reads
    versions: Counter[int] = field(default_factory=Counter)  # its Updates between them -> reads


@dataclass(slots=True)
class Entry(Generic[T]):
    """A mini-batch in the buffer: what it is, which Forward of the stage below made it, at which version, and how often it was read."""

    item: T
    ordinal: int
    version: int
    uses: int = 0


class ReplayBuffer(Generic[T]):
    """At most `size` mini-batches, between a stage that puts and one that gets, each at its own pace.

    Source: Belilovsky et al., ICML 2020 and arXiv 2106.06401; the rule as in their text (the released code counts a put as a use).
    put: into the oldest slot, even if it was never read. get: among the least used the newest. With `max_reuse` > 0 a batch is read at
    most so many times. What comes out depends on the order of puts and gets alone. Raises UsageError for a size or reuse out of range.
    """

    def __init__(self, size: int, max_reuse: int = 0) -> None:
        if size < 1:
            raise UsageError(f"a replay buffer of {size} mini-batches cannot hold anything: the least is 1")
        if max_reuse < 0:
            raise UsageError(f"max-reuse is {max_reuse}, but it must be at least 0; 0 sets no limit")
        self.size, self.max_reuse = size, max_reuse
        self.entries: list[Entry[T]] = []  # oldest first
        self.account = ReuseStatistics()

    def put(self, item: T, ordinal: int, version: int = 0) -> None:
        """A new mini-batch, in place of the oldest where there is no free slot."""
        if len(self.entries) == self.size:
            self.account.reuse[self.entries.pop(0).uses] += 1
        self.entries.append(Entry(item, ordinal, version))

    def get(self) -> Entry[T] | None:
        """The entry to read now, its use counted; None where there is nothing, or nothing that may be read again."""
        best = min(reversed(self.entries), key=lambda entry: entry.uses, default=None)  # the first of equals is the newest
        if best is None or (self.max_reuse and best.uses >= self.max_reuse):
            return None
        best.uses += 1
        newest = self.entries[-1]
        self.account.visits[newest.ordinal - best.ordinal] += 1
        self.account.versions[newest.version - best.version] += 1
        return best

    def close(self) -> ReuseStatistics:
        """What was read in all, once nothing more will be."""
        while self.entries:
            self.account.reuse[self.entries.pop(0).uses] += 1
        return self.account
