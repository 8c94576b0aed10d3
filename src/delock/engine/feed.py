"""The feed of stage 0: the batches of a loader by their running number, split into micro-batches, as messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from delock.checkpoints.encoding import copied
from delock.data.iterable import Batches, weigher
from delock.data.loader import LoadedBatch, Loader, loaded, place, put
from delock.data.named_sets import sets_of
from delock.errors import UsageError, users_own
from delock.links.message import Message
from delock.ops import Evaluate, Forward
from delock.tensors import Tree, lengths, map_tensors, rows, split_bounds

T = TypeVar("T")


class Feed:
    """Answers stage 0's Forwards, which ask for batches in order: 0, 1, 2, ... running on across epochs.

    A batch is split as `Tensor.tensor_split` does; a micro-batch without samples is a message without values. A micro-batch weighs its
    share of what the batch counts: samples, or what the training loader's `Batches` say. So do evaluations, unless their own say otherwise.
    """

    def __init__(self, train: Loader, test: Loader | None, micro_batches: int, device: torch.device) -> None:
        self.train, self.test, self.micro_batches, self.device = train, test, micro_batches, device
        self.weights = weigher(train)
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
            self.split = self._split(batch, self._batch(batch))
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
        n = batch.samples
        if not n:  # it has no mean, so the means are over the others
            return Message(None)
        count = weights.count(batch.targets) if weights else n
        return Message(*self._moved((batch.inputs, batch.targets)), samples=n, count=count)

    def _tested(self) -> Iterator[tuple[LoadedBatch, Batches | None]]:
        """Yields the batches of the test sets, each with what weighs it."""
        for test in self.tests:
            for batch in loaded(test, 0):
                yield batch, weigher(test) or self.weights

    def _moved(self, batch: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        inputs, targets = map_tensors(lambda leaf: leaf.to(self.device, non_blocking=True), batch)
        return tuple(inputs) if isinstance(inputs, list) else inputs, targets

    def _split(self, number: int, batch: LoadedBatch) -> list[Message]:
        """Splits a batch. What it counts is asked of the targets where the loader has them: on a GPU the answer would be waited for."""
        n, inputs, targets = batch.samples, batch.inputs, batch.targets
        if not n:
            raise UsageError(f"batch {number} has no samples, so it has no mean: leave empty batches out of the data")
        whole = self.weights.count(targets) if self.weights else n
        moved = self._moved((inputs, targets))
        if self.micro_batches == 1:
            return [Message(*moved, 1.0 if whole else 0.0, n, whole)]
        _refuse_unsplit(number, inputs, targets, n)
        bounds = split_bounds(n, self.micro_batches)
        sizes = [end - begin for begin, end in bounds]
        counts = self._counts(number, targets, whole, n, bounds) if self.weights else sizes
        pieces = [rows(moved, begin, end, n) for begin, end in bounds]
        return [
            Message(x if size else None, y, count / whole if whole else 0.0, size, count)
            for (x, y), size, count in zip(pieces, sizes, counts, strict=True)
        ]

    def _counts(self, number: int, targets: Tree, whole: float, n: int, bounds: list[tuple[int, int]]) -> list[float]:
        """Returns what each part of a batch counts. Raises UsageError unless that adds up to what the batch counts."""
        assert self.weights is not None
        counts = [self.weights.count(rows(targets, begin, end, n)) if end > begin else 0.0 for begin, end in bounds]
        if not math.isclose(sum(counts), whole, rel_tol=1e-4):
            raise UsageError(
                f"weight(targets) of the parts of batch {number} adds up to {sum(counts):g}, but that of the whole batch is {whole:g}: it "
                "must be a sum over the samples, as the number of tokens that are not ignored, and not a mean"
            )
        return counts


def _read(iterator: Iterator[T], what: str) -> T:
    with users_own(what):
        return next(iterator)


def _refuse_unsplit(number: int, inputs: Tree, targets: Tree, n: int) -> None:
    """Raises UsageError for inputs or targets that would go whole to every part of a batch."""
    if n not in lengths(inputs):
        raise UsageError(
            f"batch {number} has {n} samples, but none of its inputs has a row for each, so it cannot be split into parts: use a method "
            "that does not split batches"
        )
    if (found := lengths(targets)) and n not in found:
        raise UsageError(
            f"batch {number} has {n} samples, but its targets have {' and '.join(map(str, sorted(found)))} rows, so they cannot be split "
            "into the parts of the batch: give them one row per sample, and flatten them in the loss"
        )
