"""Defines Loader, the form in which training reads data: every batch is a function of (the loader's seed, the epoch, the batch)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from delock.data.arrays import refuse_sparse
from delock.data.call import Call
from delock.errors import UsageError
from delock.tensors import Tree, lengths

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


@dataclass(frozen=True)
class LoadedBatch:
    """Holds a batch as a loader gives it, and the number of its samples where a rule says it."""

    inputs: Inputs
    targets: Tree = None
    counted: int | None = None

    @property
    def samples(self) -> int:
        """Returns the number of samples. Raises UsageError where neither a rule nor the rows say it."""
        return samples(self.inputs, self.targets) if self.counted is None else self.counted


class Reader:
    """The base of the loaders that know more of a batch than its inputs and targets.

    call: how a model is called with the inputs, once a batch was read; None: with the inputs, as a chain is.
    """

    call: Call | None = None

    def loaded(self, e: int) -> Iterator[LoadedBatch]:
        """Yields the batches of epoch e."""
        raise NotImplementedError

    def epoch(self, e: int) -> Iterator[tuple[Inputs, Any]]:
        """Yields the batches of epoch e as pairs."""
        return ((batch.inputs, batch.targets) for batch in self.loaded(e))


def loaded(loader: Loader, e: int) -> Iterator[LoadedBatch]:
    """Yields the batches of epoch e of any loader, with the number of their samples."""
    if isinstance(loader, Reader):
        return loader.loaded(e)
    return (_dense(LoadedBatch(inputs, targets)) for inputs, targets in loader.epoch(e))


def _dense(batch: LoadedBatch) -> LoadedBatch:
    refuse_sparse({"a batch of the data holds as inputs": batch.inputs, "a batch of the data holds as targets": batch.targets})
    return batch


def call_of(loader: Loader) -> Call | None:
    """Returns how a model is called with the inputs of the loader's batches, once one was read; None: with the inputs, as a chain is.

    With a Call the inputs are all its tensors in order, in a tuple, or the one alone: model(*args, **kwargs) where
    args, kwargs = call.arguments(delock.tensors.tensors(inputs)).
    """
    return loader.call if isinstance(loader, Reader) else None


def place(loader: Any) -> dict[str, Any] | None:
    """Returns the place of data, if it knows one (`state_dict`)."""
    known = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
    return loader.state_dict() if known else None


def put(loader: Any, state: dict[str, Any]) -> None:
    """Lets data go on from a place."""
    loader.load_state_dict(state)


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
            "not known: give the targets one row per sample, keep what has none, such as a mask, in the model as a buffer, or say it with "
            "delock.data.Batches(loader, samples=...)"
        )
    return next(iter(both if len(own) > 1 else own))


@dataclass(frozen=True)
class Data:
    """Holds a named data set, ready to train on: images (B, channels, image_size, image_size) float32, labels (B,) int64."""

    train: Loader
    test: Loader
    classes: int
    channels: int
    image_size: int
    name: str
