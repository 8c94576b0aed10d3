"""Anybody's own batches as a Loader: a torch DataLoader, a list, or any other iterable of (inputs, targets)."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from delock.data.loader import Inputs, Loader
from delock.errors import UsageError
from delock.keys import key


def as_loader(obj: Any, seed: int = 0, *, batches_per_epoch: int | None = None) -> Loader:
    """`obj` itself if it is a Loader already, else a Loader over what iterating it gives, batch by batch.

    Its data is made a function of (seed, epoch, batch): the default random generators are seeded before `iter` and before each
    batch and put back afterwards, own generators of a DataLoader and its sampler are seeded at the start of an epoch, and
    `set_epoch` is called on `obj` and its samplers where it exists. So nothing that happens elsewhere in the process changes the
    data. Workers of a DataLoader follow, except with persistent_workers, whose generators run on across epochs.
    batches_per_epoch: read only so many; needed where `obj` has no length.
    Raises UsageError for what cannot be iterated and for a missing or impossible length. While reading, it is raised for an item
    that is no pair, inputs that are no tensor or tuple of tensors, and an epoch with fewer batches than promised.
    """
    if isinstance(obj, Loader):
        return obj
    if not isinstance(obj, Iterable):
        raise UsageError(f"data must be an iterable of (inputs, targets), such as a DataLoader, not {type(obj).__name__}")
    length = _length(obj) if batches_per_epoch is None else batches_per_epoch
    if length is None:
        raise UsageError(f"the data ({type(obj).__name__}) has no length: say how many batches an epoch has with batches_per_epoch")
    if length < 1:
        raise UsageError(f"an epoch must have at least one batch, not {length}")
    return Plain(obj, seed, length)


class Plain:
    """The Loader that `as_loader` makes. Picklable if the object is."""

    def __init__(self, obj: Iterable[Any], seed: int, batches: int) -> None:
        self.obj = obj
        self.seed = seed
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> list[int] | None:
        """Known for a list of batches and for a DataLoader over a map-style data set with the usual batching; else None."""
        sizes = _sizes(self.obj)
        return sizes[: self.batches] if sizes is not None and len(sizes) >= self.batches else None

    def epoch(self, e: int) -> Iterator[tuple[Inputs, Any]]:
        start = key(self.seed, "data", e, "iter")
        _start_epoch(self.obj, e, start)
        with seeded(start):
            items = iter(self.obj)
        for b in range(self.batches):
            with seeded(key(self.seed, "data", e, b)):
                item = next(items, self)  # self: a mark that no data set can yield
            if item is self:
                raise UsageError(f"epoch {e} of the data ended after {b} batches, where its length promised {self.batches}")
            yield _pair(item, e, b)


@contextmanager
def seeded(k: int) -> Iterator[None]:
    """Within: torch's default CPU generator, numpy's and Python's start from `k`. After: they go on where they were."""
    torch_state, numpy_state, python_state = torch.default_generator.get_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(k)  # not torch.manual_seed, which would seed the GPUs as well
    np.random.seed(k % 2**32)
    random.seed(k)
    try:
        yield
    finally:
        torch.default_generator.set_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)


def _start_epoch(obj: Any, e: int, k: int) -> None:
    samplers = [getattr(obj, name, None) for name in ("sampler", "batch_sampler")]
    for part in [obj, *samplers]:
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(e)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(k)


def _length(obj: Any) -> int | None:
    try:
        return len(obj)
    except (TypeError, NotImplementedError):
        return None


def _sizes(obj: Any) -> list[int] | None:
    if isinstance(obj, (list, tuple)):
        sizes = [len(first) for item in obj if (first := _first(item)) is not None]
        return sizes if len(sizes) == len(obj) else None
    if not isinstance(obj, DataLoader) or isinstance(obj.dataset, IterableDataset) or type(obj.batch_sampler) is not BatchSampler:
        return None
    samples = _length(obj.sampler)
    if samples is None:
        return None
    size = obj.batch_sampler.batch_size
    left = 0 if obj.batch_sampler.drop_last else samples % size
    return [size] * (samples // size) + [left] * (left > 0)


def _first(item: Any) -> Tensor | None:
    """The tensor of a batch whose first dimension counts its samples, if it has one."""
    inputs = item[0] if isinstance(item, (list, tuple)) and item else None
    inputs = inputs[0] if isinstance(inputs, (list, tuple)) and inputs else inputs
    return inputs if isinstance(inputs, Tensor) and inputs.dim() else None


def _pair(item: Any, e: int, b: int) -> tuple[Inputs, Any]:
    where = f"batch {b} of epoch {e}"
    if not isinstance(item, (list, tuple)) or len(item) != 2:
        shape = f"{type(item).__name__} of {len(item)}" if isinstance(item, (list, tuple, dict)) else type(item).__name__
        raise UsageError(f"{where} of the data is a {shape}, not a pair (inputs, targets)")
    inputs, targets = item
    if isinstance(inputs, Tensor):
        return inputs, targets
    if isinstance(inputs, (list, tuple)) and inputs and all(isinstance(x, Tensor) for x in inputs):
        return tuple(inputs), targets
    raise UsageError(f"the inputs of {where} of the data are a {type(inputs).__name__}, not a tensor or a tuple of tensors")
