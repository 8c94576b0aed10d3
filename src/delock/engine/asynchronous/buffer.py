"""The replay buffer of asynchronous DGL, which decides what mini-batch a stage learns from next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from delock.errors import UsageError
from delock.methods import AsyncDGL, Method

T = TypeVar("T")


@dataclass
class ReuseStatistics:
    """Histograms of how often batches were read, and of how old they were then: how far behind the newest put."""

    reuse: Counter[int] = field(default_factory=Counter)  # times that a batch was read -> batches
    visits_behind: Counter[int] = field(default_factory=Counter)  # Forwards of the stage below from the batch read to the newest -> reads
    versions_behind: Counter[int] = field(default_factory=Counter)  # its Updates between them -> reads


@dataclass(slots=True)
class Entry(Generic[T]):
    """A mini-batch in the buffer."""

    item: T
    ordinal: int  # of the Forward of the stage below that made it
    version: int  # of that stage then
    uses: int = 0  # times that it was read


class ReplayBuffer(Generic[T]):
    """At most `size` mini-batches, between a stage that puts and one that gets, each at its own pace.

    Source: Belilovsky et al., ICML 2020 and arXiv 2106.06401; the rule as in their text (the released code counts a put as a use).
    put: into the oldest slot, even if it was never read. get: among the least used the newest. max_reuse: the most times that a batch is
    read; 0 for any number. What comes out depends on the order of puts and gets alone. Raises UsageError for a size or reuse out of range.
    """

    def __init__(self, size: int, max_reuse: int = 0) -> None:
        if size < 1:
            raise UsageError(f"a replay buffer of {size} mini-batches cannot hold anything: the least is 1")
        if max_reuse < 0:
            raise UsageError(f"max-reuse is {max_reuse}, but it must be at least 0; 0 sets no limit")
        self.size, self.max_reuse = size, max_reuse
        self.entries: list[Entry[T]] = []  # oldest first
        self.statistics = ReuseStatistics()

    def put(self, item: T, ordinal: int, version: int = 0) -> None:
        """Takes a new mini-batch in, in place of the oldest if there is no free slot."""
        if len(self.entries) == self.size:
            self.statistics.reuse[self.entries.pop(0).uses] += 1
        self.entries.append(Entry(item, ordinal, version))

    def get(self) -> Entry[T] | None:
        """Returns the entry to read now, and counts its use; None if there is nothing, or nothing that may be read again."""
        best = min(reversed(self.entries), key=lambda entry: entry.uses, default=None)  # the first of equals is the newest
        if best is None or (self.max_reuse and best.uses >= self.max_reuse):
            return None
        best.uses += 1
        newest = self.entries[-1]
        self.statistics.visits_behind[newest.ordinal - best.ordinal] += 1
        self.statistics.versions_behind[newest.version - best.version] += 1
        return best

    def state(self, plain: Callable[[T], Any]) -> dict[str, Any]:
        """Returns the entries, oldest first, and the statistics so far; plain(item): an item as plain values and tensors."""
        entries = [{"ordinal": one.ordinal, "version": one.version, "uses": one.uses, "item": plain(one.item)} for one in self.entries]
        return {"entries": entries, "statistics": {name: dict(histogram) for name, histogram in vars(self.statistics).items()}}

    def load(self, state: Mapping[str, Any], whole: Callable[[Any], T]) -> None:
        """Goes on from `state(plain)`; whole: makes an item again."""
        self.entries = [Entry(whole(one["item"]), one["ordinal"], one["version"], one["uses"]) for one in state["entries"]]
        self.statistics = ReuseStatistics(**{name: Counter(histogram) for name, histogram in state["statistics"].items()})

    def close(self) -> ReuseStatistics:
        """Returns the statistics of all reads, once there will be no more."""
        while self.entries:
            self.statistics.reuse[self.entries.pop(0).uses] += 1
        return self.statistics


def replay_buffer(method: Method) -> ReplayBuffer[Any]:
    """Returns the buffer that a method has in front of a stage."""
    assert isinstance(method, AsyncDGL)
    return ReplayBuffer(method.buffer, method.max_reuse)
