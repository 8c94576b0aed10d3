"""Defines Loader, the form in which training reads data: every batch is a function of (the loader's seed, the epoch, the batch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from delock.data.call import Call

Inputs: TypeAlias = Tensor | tuple[Tensor, ...]


@runtime_checkable
class Loader(Protocol):
    """Gives batches of (inputs, targets), epoch by epoch. It must be picklable, because it is sent to the process of stage 0."""

    def __len__(self) -> int:
        """Returns the number of batches in an epoch."""
        ...

    def sizes(self) -> list[int] | None:
        """Returns the number of samples of each batch of an epoch, in order; None if that is not known before the batches are read."""
        ...

    def epoch(self, e: int) -> Iterator[tuple[Inputs, Any]]:
        """Yields the batches of epoch e = 0, 1, ...: inputs are a tensor or a tuple of tensors, targets any tree of tensors.

        Another call, in any order and from any process, gives the same batches.
        """
        ...


def call_of(loader: Loader) -> Call | None:
    """Returns how a model is called with the inputs of the loader's batches, once one was read; None: with the inputs, as a chain is.

    With a Call the inputs are all its tensors in order, in a tuple, or the one alone: model(*args, **kwargs) where
    args, kwargs = call.arguments(delock.tensors.tensors(inputs)).
    """
    return getattr(loader, "call", None)


@dataclass(frozen=True)
class Data:
    """Holds a named data set, ready to train on: images (B, channels, image_size, image_size) float32, labels (B,) int64."""

    train: Loader
    test: Loader
    classes: int
    channels: int
    image_size: int
    name: str
