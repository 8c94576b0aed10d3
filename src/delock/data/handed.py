"""Reads batches that a loop hands in one by one, by the rules that hold for data that `fit` reads."""

from __future__ import annotations

from typing import Any

from delock.data.call import Takes
from delock.data.interpreted import Remembering
from delock.data.iterable import Batches, evaluation_loader, train_loader
from delock.data.loader import LoadedBatch, Loader


class Handed:
    """Knows by an example batch how batches are read. example: a batch, or `Batches` of one, which say what cannot be guessed."""

    def __init__(self, example: Any, seed: int, takes: Takes) -> None:
        """Raises UsageError for an example that cannot be read as data."""
        self.seed, self.takes = seed, takes
        self.loader: Loader = train_loader(example.over([example.loader]) if isinstance(example, Batches) else [example], seed, takes, None)

    def one(self, batch: Any, number: int) -> LoadedBatch:
        """Returns a batch. Raises UsageError for one that calls the model otherwise than the example does."""
        inner = self.loader.loader if isinstance(self.loader, Batches) else self.loader
        assert isinstance(inner, Remembering)
        return inner.read(batch, 0, number)

    def tests(self, batches: Any) -> Loader:
        """Returns a Loader of test data, or of several sets by name."""
        return evaluation_loader(batches, self.seed, self.takes)
