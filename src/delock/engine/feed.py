"""The feed of stage 0: the batches of a loader by their running number, split into micro-batches, as messages."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from delock.data.loader import Loader
from delock.errors import UsageError
from delock.links.message import Message
from delock.ops import Evaluate, Forward
from delock.tensors import Tree, map_tensors, rows, split_bounds, tree_tensors


class Feed:
    """Answers stage 0's Forwards, which ask for batches in order: 0, 1, 2, ... running on across epochs.

    A batch is split as `Tensor.tensor_split` does; a micro-batch without samples is a message without values.
    """

    def __init__(self, train: Loader, test: Loader | None, micro_batches: int, device: torch.device) -> None:
        self.train, self.test, self.micro_batches, self.device = train, test, micro_batches, device
        self.per_epoch = len(train)
        self.per_evaluation = len(test) if test is not None else 0
        self.batches: tuple[int, Iterator[tuple[Tree, Tree]]] | None = None  # (number of the next, iterator)
        self.evaluation: Iterator[tuple[Tree, Tree]] | None = None
        self.split: list[Message] = []

    def __call__(self, op: Forward | Evaluate) -> Message:
        """Returns the message of one op: inputs, labels, and the micro-batch's share of its batch as weight."""
        if isinstance(op, Evaluate):
            return self._evaluation(op.batch)
        batch, place = divmod(op.batch, self.micro_batches)
        if place == 0 or not self.split:
            self.split = self._split(*self._batch(batch))
        return self.split[place]

    def _batch(self, number: int) -> tuple[Tree, Tree]:
        if self.batches is None or self.batches[0] != number or number % self.per_epoch == 0:
            epoch, skip = divmod(number, self.per_epoch)
            iterator = iter(self.train.epoch(epoch))
            for _ in range(skip):  # after a checkpoint: the loader is a function of the epoch, so the batches before are read again
                next(iterator)
            self.batches = number, iterator
        iterator = self.batches[1]
        self.batches = number + 1, iterator
        return self._moved(next(iterator))

    def _evaluation(self, index: int) -> Message:
        assert self.test is not None
        if index % self.per_evaluation == 0 or self.evaluation is None:
            self.evaluation = iter(self.test.epoch(0))
            for _ in range(index % self.per_evaluation):
                next(self.evaluation)
        inputs, targets = self._moved(next(self.evaluation))
        return Message(inputs, targets, samples=samples(inputs))

    def _moved(self, batch: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        inputs, targets = map_tensors(lambda leaf: leaf.to(self.device, non_blocking=True), batch)
        return tuple(inputs) if isinstance(inputs, list) else inputs, targets

    def _split(self, inputs: Tree, targets: Tree) -> list[Message]:
        n = samples(inputs)
        if self.micro_batches == 1:
            return [Message(inputs, targets, samples=n)]
        pieces = [rows((inputs, targets), begin, end, n) for begin, end in split_bounds(n, self.micro_batches)]
        counts = [samples(x) for x, _ in pieces]
        return [Message(x if count else None, y, count / n, count) for (x, y), count in zip(pieces, counts, strict=True)]


def samples(inputs: Tree) -> int:
    """Returns the samples in a batch: the first dimension of its first tensor. Raises UsageError for a batch without one."""
    first = next(tree_tensors(inputs), None)
    if first is None or not first.dim():
        raise UsageError("a batch of inputs must hold a tensor with one row per sample")
    return len(first)
