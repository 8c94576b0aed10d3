"""Loads several named test sets as one: an evaluation reads them one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain

from delock.data.loader import LoadedBatch, Loader, Reader, loaded
from delock.errors import UsageError


class NamedSets(Reader):
    """Loads the batches of test sets in the order of their names. It can be pickled if the loaders can.

    Raises UsageError for no set at all, and for a name that could not stand in front of a metric's.
    """

    def __init__(self, sets: Mapping[str, Loader]) -> None:
        if not sets:
            raise UsageError("test is an empty dict: give it a loader for every name, or leave test out")
        for name in sets:
            if not isinstance(name, str) or not name or "/" in name:
                raise UsageError(
                    f"a test set is called {name!r}, but its name must be a text without a slash, as metrics are called NAME/loss"
                )
        self.sets = dict(sets)

    def __len__(self) -> int:
        return sum(map(len, self.sets.values()))

    def sizes(self) -> list[int] | None:
        """Returns those of all sets, if they are all known."""
        known = [sizes for one in self.sets.values() if (sizes := one.sizes()) is not None]
        return [*chain(*known)] if len(known) == len(self.sets) else None

    def loaded(self, e: int) -> Iterator[LoadedBatch]:
        """Yields the batches of epoch e of all sets."""
        return chain.from_iterable(loaded(one, e) for one in self.sets.values())


def sets_of(test: Loader) -> dict[str, Loader]:
    """Returns the named sets of test data; one without a name is called ""."""
    return test.sets if isinstance(test, NamedSets) else {"": test}
