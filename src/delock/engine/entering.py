"""Makes messages of batches as they enter stage 0: moved to its device, and split into micro-batches."""

from __future__ import annotations

import math

import torch

from delock.data.iterable import Batches
from delock.data.loader import LoadedBatch
from delock.errors import UsageError
from delock.links.message import Message
from delock.tensors import Tree, has_list_of, lengths, map_tensors, rows, split_bounds


class Entering:
    """Makes the messages of batches. weights: of the training data, which say what a batch counts if not its samples.

    A batch is split as `Tensor.tensor_split` does; a micro-batch without samples is a message without values. A micro-batch weighs its
    share of what the batch counts: samples, or what the training loader's `Batches` say.
    """

    def __init__(self, weights: Batches | None, micro_batches: int, device: torch.device) -> None:
        self.weights, self.micro_batches, self.device = weights, micro_batches, device

    def evaluated(self, batch: LoadedBatch, weights: Batches | None) -> Message:
        """Returns the message of a batch of an evaluation; weights: those of its own data, if any."""
        n = batch.samples
        if not n:  # it has no mean, so the means are over the others
            return Message(None)
        weights = weights or self.weights
        count = weights.count(batch.targets) if weights else n
        return Message(*self._moved((batch.inputs, batch.targets)), samples=n, count=count)

    def _moved(self, batch: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        inputs, targets = map_tensors(lambda leaf: leaf.to(self.device, non_blocking=True), batch)
        return tuple(inputs) if isinstance(inputs, list) else inputs, targets

    def split(self, number: int, batch: LoadedBatch) -> list[Message]:
        """Splits a batch. What it counts is asked of the targets where the loader has them: on a GPU the answer would be waited for."""
        n, inputs, targets = batch.samples, batch.inputs, batch.targets
        refuse_empty(number, n)
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


def refuse_empty(number: int, samples: int) -> None:
    """Raises UsageError for a batch without samples."""
    if not samples:
        raise UsageError(f"batch {number} has no samples, so it has no mean: leave empty batches out of the data")


def _refuse_unsplit(number: int, inputs: Tree, targets: Tree, n: int) -> None:
    """Raises UsageError for inputs or targets that would go whole to every part of a batch."""
    if n not in lengths(inputs):
        raise UsageError(
            f"batch {number} has {n} samples, but none of its inputs has a row for each, so it cannot be split into parts: use a method "
            "that does not split batches"
        )
    if n > 1 and has_list_of(targets, n):
        raise UsageError(
            f"batch {number} has {n} samples, and a list in its targets has {n} entries, which would go whole to every part of the batch: "
            "make a tensor of them with a row per sample, or a tuple where they are not of samples"
        )
    if (found := lengths(targets)) and n not in found:
        raise UsageError(
            f"batch {number} has {n} samples, but its targets have {' and '.join(map(str, sorted(found)))} rows, so they cannot be split "
            "into the parts of the batch: give them one row per sample, and flatten them in the loss"
        )
