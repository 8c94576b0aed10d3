"""The feed of stage 0: the batches of a loader by their running number, split into micro-batches, as messages."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from delock.checkpoints.encoding import copied
from delock.data.iterable import Batches, place, put
from delock.data.loader import Loader
from delock.errors import UsageError, users_own
from delock.links.message import Message
from delock.ops import Evaluate, Forward
from delock.tensors import Tree, lengths, map_tensors, rows, split_bounds


class Feed:
    """Answers stage 0's Forwards, which ask for batches in order: 0, 1, 2, ... running on across epochs.

    A batch is split as `Tensor.tensor_split` does; a micro-batch without samples is a message without values. A micro-batch weighs its
    share of what the batch counts: samples, or what the training loader's `Batches` say. So do evaluations, unless their own say otherwise.
    """

    def __init__(self, train: Loader, test: Loader | None, micro_batches: int, device: torch.device) -> None:
        self.train, self.test, self.micro_batches, self.device = train, test, micro_batches, device
        self.weights = train if isinstance(train, Batches) else None
        self.test_weights = test if isinstance(test, Batches) else self.weights
        self.per_epoch = len(train)
        self.per_evaluation = len(test) if test is not None else 0
        self.batches: tuple[int, Iterator[tuple[Tree, Tree]]] | None = None  # (number of the next, iterator)
        self.evaluation: Iterator[tuple[Tree, Tree]] | None = None
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
            self.split = self._split(batch, *self._batch(batch))
        return self.split[place]

    def _batch(self, number: int) -> tuple[Tree, Tree]:
        if self.batches is None or self.batches[0] != number or number % self.per_epoch == 0:
            epoch, skip = divmod(number, self.per_epoch)
            iterator = iter(self.train.epoch(epoch))
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
        assert self.test is not None
        if index % self.per_evaluation == 0 or self.evaluation is None:
            self.evaluation = iter(self.test.epoch(0))
            for _ in range(index % self.per_evaluation):
                _read(self.evaluation, "the test data")
        inputs, targets = _read(self.evaluation, "the test data")
        n = samples(inputs, targets)
        if not n:  # it has no mean, so the means are over the others
            return Message(None)
        count = self.test_weights.count(targets) if self.test_weights else n
        return Message(*self._moved((inputs, targets)), samples=n, count=count)

    def _moved(self, batch: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        inputs, targets = map_tensors(lambda leaf: leaf.to(self.device, non_blocking=True), batch)
        return tuple(inputs) if isinstance(inputs, list) else inputs, targets

    def _split(self, number: int, inputs: Tree, targets: Tree) -> list[Message]:
        """Splits a batch. What it counts is asked of the targets where the loader has them: on a GPU the answer would be waited for."""
        n = samples(inputs, targets)
        if not n:
            raise UsageError(f"batch {number} has no samples, so it has no mean: leave empty batches out of the data")
        whole = self.weights.count(targets) if self.weights else n
        moved = self._moved((inputs, targets))
        if self.micro_batches == 1:
            return [Message(*moved, 1.0 if whole else 0.0, n, whole)]
        _refuse_unsplit(number, targets, n)
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


def _read(iterator: Iterator[tuple[Tree, Tree]], what: str) -> tuple[Tree, Tree]:
    with users_own(what):
        return next(iterator)


def samples(inputs: Tree, targets: Tree = None) -> int:
    """Returns the samples in a batch: the rows of the tensors of its inputs; where these differ, the number that the targets have, too.

    Raises UsageError for a batch whose inputs have no rows, or where the targets leave it open.
    """
    own = lengths(inputs)
    if not own:
        raise UsageError("a batch of inputs must hold a tensor with one row per sample")
    both = own & lengths(targets)
    if len(own) > 1 and len(both) != 1:
        found, beside = " and ".join(map(str, sorted(own))), f"{len(both)} of these numbers" if both else "none of them"
        raise UsageError(
            f"the tensors in the inputs of a batch have {found} rows, and the targets have {beside}, so which one counts the samples is "
            "not known: give the targets one row per sample, or keep what has none, such as a mask, in the model as a buffer"
        )
    return next(iter(both if len(own) > 1 else own))


def _refuse_unsplit(number: int, targets: Tree, n: int) -> None:
    """Raises UsageError for targets that would go whole to every part of a batch."""
    if (found := lengths(targets)) and n not in found:
        raise UsageError(
            f"batch {number} has {n} samples, but its targets have {' and '.join(map(str, sorted(found)))} rows, so they cannot be split "
            "into the parts of the batch: give them one row per sample, and flatten them in the loss"
        )
