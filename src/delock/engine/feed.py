"""The feed of stage 0: the batches of a loader by their running number, split into micro-batches, as messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from delock.checkpoints.encoding import copied
from delock.data.iterable import Batches, weigher
from delock.data.loader import LoadedBatch, Loader, loaded, place, put
from delock.data.named_sets import sets_of
from delock.engine.entering import Entering
from delock.errors import users_own
from delock.links.message import Message
from delock.ops import Evaluate, Forward

T = TypeVar("T")


class Feed:
    """Answers stage 0's Forwards, which ask for batches in order: 0, 1, 2, ... running on across epochs.

    Evaluations weigh their batches as the training data says, unless their own says otherwise.
    """

    def __init__(self, train: Loader, test: Loader | None, micro_batches: int, device: torch.device) -> None:
        self.train, self.test, self.micro_batches = train, test, micro_batches
        self.entering = Entering(weigher(train), micro_batches, device)
        self.tests = [*sets_of(test).values()] if test is not None else []
        self.per_epoch = len(train)
        self.per_evaluation = sum(map(len, self.tests))
        self.batches: tuple[int, Iterator[LoadedBatch]] | None = None  # (number of the next, iterator)
        self.evaluation: Iterator[tuple[LoadedBatch, Batches | None]] | None = None
        self.split: list[Message] = []
        self.kept = False  # the loader's place must fit into a checkpoint; it is asked once it has given a batch
        self.placed = False  # the loader has been put to its place, and need not be read up to it

    def state(self) -> dict[str, Any] | None:
        """Returns the loader's place, if it knows one: else its batches are a function of their number, and are read again."""
        return copied(place(self.train), "the state of the data loader")  # type: ignore[no-any-return]

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from `state()`."""
        put(self.train, state)
        self.placed = True

    def close(self) -> None:
        """Lets go of the batches, so that a data loader ends its processes now, and not when the collector finds this feed."""
        self.batches = self.evaluation = None

    def __call__(self, op: Forward | Evaluate) -> Message:
        """Returns the message of one op: inputs, labels, and the micro-batch's share of its batch as weight."""
        if isinstance(op, Evaluate):
            return self._evaluation(op.batch)
        batch, place = divmod(op.batch, self.micro_batches)
        if place == 0 or not self.split:
            self.split = self.entering.split(batch, self._batch(batch))
        return self.split[place]

    def _batch(self, number: int) -> LoadedBatch:
        if self.batches is None or self.batches[0] != number or number % self.per_epoch == 0:
            epoch, skip = divmod(number, self.per_epoch)
            iterator = iter(loaded(self.train, epoch))
            for _ in range(0 if self.placed else skip):  # after a checkpoint: the batches before are read again
                _read(iterator, "the training data")
            self.placed = False
            self.batches = number, iterator
        iterator = self.batches[1]
        self.batches = number + 1, iterator
        batch = _read(iterator, "the training data")
        if self.kept:
            self.kept = False
            self.state()  # raises UsageError
        return batch

    def _evaluation(self, index: int) -> Message:
        if index % self.per_evaluation == 0 or self.evaluation is None:
            self.evaluation = self._tested()
            for _ in range(index % self.per_evaluation):
                _read(self.evaluation, "the test data")
        batch, weights = _read(self.evaluation, "the test data")
        return self.entering.evaluated(batch, weights)

    def _tested(self) -> Iterator[tuple[LoadedBatch, Batches | None]]:
        """Yields the batches of the test sets, each with what weighs it."""
        for test in self.tests:
            for batch in loaded(test, 0):
                yield batch, weigher(test)


def _read(iterator: Iterator[T], what: str) -> T:
    with users_own(what):
        return next(iterator)


class HandedFeed:
    """Answers stage 0's Forwards and Evaluates with batches that it is handed one after the other: `take()` returns the next."""

    def __init__(self, take: Callable[[], LoadedBatch], weights: Batches | None, micro_batches: int, device: torch.device) -> None:
        self.take, self.micro_batches = take, micro_batches
        self.entering = Entering(weights, micro_batches, device)
        self.split: list[Message] = []

    def __call__(self, op: Forward | Evaluate) -> Message:
        """Returns the message of one op."""
        if isinstance(op, Evaluate):
            return self.entering.evaluated(self.take(), None)
        batch, place = divmod(op.batch, self.micro_batches)
        if place == 0:
            self.split = self.entering.split(batch, self.take())
        return self.split[place]
