"""Loads a run's batches from data without a length."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

from delock.data.call import Call
from delock.data.loader import LoadedBatch, Reader
from delock.data.plain import Plain
from delock.data.reading import Reading
from delock.errors import UsageError


class Stream(Reader):
    """Loads a run's batches from data without a length: when an iteration ends, the next begins. It is one epoch, as long as the run.

    Raises UsageError, while it is read, for an iteration without a batch.
    """

    def __init__(self, plain: Plain, batches: int) -> None:
        self.plain, self.batches = plain, batches

    @property
    def reading(self) -> Reading:
        """Returns the rule by which the batches are read."""
        return self.plain.reading

    def read_as(self, reading: Reading) -> Stream:
        """Returns a stream of the same batches, read by another rule."""
        return self if reading == self.plain.reading else Stream(self.plain.read_as(reading), self.batches)

    @property
    def call(self) -> Call | None:  # type: ignore[override]
        """Returns how the batches call the model."""
        return self.plain.call

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> None:
        """Returns None: a stream is read once."""

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the place of the data, if it knows one."""
        return self.plain.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from that place."""
        self.plain.load_state_dict(state)

    def loaded(self, e: int) -> Iterator[LoadedBatch]:
        """Yields the batches of the run."""
        given, (first, skipped) = 0, self.plain.resumed or (0, 0)
        for iteration in count(first):
            before = given
            for batch in self.plain.loaded(iteration):
                yield batch
                given += 1
                if given == self.batches:
                    return
            if given == before and not (skipped and iteration == first):
                raise UsageError(f"epoch {iteration} of the data has no batch: let __iter__ begin anew every time that it is called")
