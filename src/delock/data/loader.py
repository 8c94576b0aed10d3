"""What training needs of a data set: a Loader, whose batches are a function of (its own seed, the epoch, the batch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]


@runtime_checkable
class Loader(Protocol):
    """Batches of (inputs, targets), epoch by epoch. Picklable: under the process launcher it travels to the worker of stage 0."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def sizes(self) -> list[int] | None:
        """Samples in each batch of an epoch, in order; None where that is not known before the batches are read."""
        ...

    def epoch(self, e: int) -> Iterator[tuple[Inputs, Any]]:
        """The batches of epoch e = 0, 1, ...: inputs a tensor or a tuple of tensors, targets any pytree of tensors.

        Calling it again, in any order and from any process, gives the same batches.
        """
        ...


@dataclass(frozen=True)
class Data:
    """A named data set, ready to train on; images are (B, channels, image_size, image_size) float32, labels (B,) int64."""

    train: Loader
    test: Loader
    classes: int
    channels: int
    image_size: int
    name: str
