"""Reads batches by a rule, and sees to it that all of them call the model the same way."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, Self

from delock.data.loader import LoadedBatch, Loader, Reader, place, put
from delock.data.reading import Reading
from delock.errors import UsageError


class Remembering(Reader):
    """A Reader that reads batches by a rule, and remembers how the first of them calls the model: so must all the others."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading

    def read_as(self, reading: Reading) -> Self:
        """Returns a loader of the same batches, read by another rule."""
        if reading == self.reading:
            return self
        other = copy.copy(self)
        other.reading, other.call = reading, None
        return other

    def read(self, item: Any, e: int, b: int) -> LoadedBatch:
        """Returns batch b of epoch e. Raises UsageError for one that calls the model otherwise than the first."""
        where = f"batch {b} of epoch {e}"
        call, batch = self.reading.read(item, where)
        if call is not None and call != self.call:
            if self.call is not None:
                raise UsageError(
                    f"{where} of the data gives the model {call.words()}, but the first batch gave it {self.call.words()}: choose what is "
                    "the same in all, also in what is no tensor, with delock.data.Batches(loader, inputs=...)"
                )
            self.call = call
        return batch


class Interpreted(Remembering):
    """Loads the batches of a Loader of the user's own, read by a rule."""

    def __init__(self, loader: Loader, reading: Reading) -> None:
        super().__init__(reading)
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def sizes(self) -> list[int] | None:
        """Returns those of the loader, unless the user says what counts as a sample."""
        return self.loader.sizes() if self.reading.chosen.samples is None else None

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the place of the loader, if it knows one."""
        return place(self.loader)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the loader go on from a place."""
        put(self.loader, state)

    def loaded(self, e: int) -> Iterator[LoadedBatch]:
        """Yields the batches of epoch e of the loader."""
        return (self.read(pair, e, b) for b, pair in enumerate(self.loader.epoch(e)))
