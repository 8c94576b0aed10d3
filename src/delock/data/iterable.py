"""Makes a Loader from the user's own batches: a torch DataLoader, a list, or any other iterable of (inputs, targets); weighs them."""

from __future__ import annotations

import copy
import math
import random
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Real
from types import GeneratorType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from delock.data.loader import Inputs, Loader
from delock.errors import UsageError
from delock.keys import key


def as_loader(obj: Any, seed: int = 0, *, batches_per_epoch: int | None = None) -> Loader:
    """Returns `obj` itself if it is a Loader already, else a Loader over the batches that iterating it gives.

    The Loader makes the data a function of (seed, epoch, batch), so that nothing that happens elsewhere in the process changes it. It seeds
    the default random generators before `iter` and before each batch, and restores them afterwards. It seeds the generators that a
    DataLoader and its sampler own at the start of an epoch, and calls `set_epoch` on `obj` and its samplers where it exists. The workers of
    a DataLoader follow, except with persistent_workers, whose generators run on across epochs.
    batches_per_epoch: read only this number of batches; required if `obj` has no length.
    Raises UsageError if `obj` cannot be iterated, or only once, or if its length is missing or below 1. Reading raises it for an item that
    is not a pair, for inputs that are not a tensor or a tuple of tensors, and for an epoch with fewer batches than promised.
    """
    if isinstance(obj, Batches):
        return Batches(as_loader(obj.loader, seed, batches_per_epoch=batches_per_epoch), weight=obj.weight)
    if isinstance(obj, Loader):
        return obj
    if not isinstance(obj, Iterable):
        raise UsageError(f"data must be an iterable of (inputs, targets), such as a DataLoader, not {type(obj).__name__}")
    if isinstance(obj, Iterator) and iter(obj) is obj:
        raise _once(obj)
    length = _length(obj) if batches_per_epoch is None else batches_per_epoch
    if length is None:
        raise UsageError(f"the data ({type(obj).__name__}) has no length: say how many batches an epoch has with batches_per_epoch")
    if length < 1:
        raise UsageError(f"an epoch must have at least one batch, not {length}")
    return Plain(obj, seed, length)


class Plain:
    """Loads the batches of any iterable, for `as_loader`. It can be pickled if the iterable can."""

    def __init__(self, obj: Iterable[Any], seed: int, batches: int) -> None:
        self.obj = obj
        self.seed = seed
        self.batches = batches
        self.at = (0, 0)  # epoch and batch that come next, as far as it has been read
        self.resumed: tuple[int, int] | None = None  # where an iteration begins that goes on from a place
        self.before_last: dict[str, Any] | None = None  # the place in front of the last batch of the epoch
        self.last: weakref.ref[GeneratorType[Any, Any, Any]] | None = None  # that it was read from, if it was one

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the place of an iterable that has a `state_dict` and a `load_state_dict`, as torchdata's loader; None for others.

        At the end of an epoch that is the place in front of its last batch, which is read again: what a loader makes of a place at its end
        is its own affair, to begin the next epoch there or to have nothing more to give.
        """
        return self.before_last if self.at[1] == self.batches else self._place()

    def _place(self) -> dict[str, Any] | None:
        inner = place(self.obj)
        return None if inner is None else {"epoch": self.at[0], "batch": self.at[1], "loader": inner}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from that place with the next iteration."""
        put(self.obj, state["loader"])
        self.at = self.resumed = state["epoch"], state["batch"]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "obj": _at_rest(self.obj), "last": None}

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> list[int] | None:
        """Returns the samples of each batch for a list of batches and a map-style DataLoader with the usual batching; else None."""
        sizes = _sizes(self.obj)
        return sizes[: self.batches] if sizes is not None and len(sizes) >= self.batches else None

    def _refuse_read(self, items: Iterator[Any]) -> None:
        """Raises UsageError for a generator that an epoch before has read from."""
        if isinstance(items, GeneratorType):
            if self.last is not None and self.last() is items:
                raise _once(self.obj)
            self.last = weakref.ref(items)

    def epoch(self, e: int) -> Iterator[tuple[Inputs, Any]]:
        if self.resumed and self.resumed[0] < e:
            deque(self.epoch(self.resumed[0]), maxlen=0)
        start = key(self.seed, "data", e, "iter")
        _start_epoch(self.obj, e, start)
        with seeded(start):
            items = iter(self.obj)
        self._refuse_read(items)
        first = self.resumed[1] if self.resumed and self.resumed[0] == e else 0
        self.resumed, self.at = None, (e, first)
        for b in range(first, self.batches):
            if b + 1 == self.batches:
                self.before_last = self._place()
            with seeded(key(self.seed, "data", e, b)):
                item = next(items, self)  # self: a mark that no data set can yield
            if item is self:
                raise UsageError(f"epoch {e} of the data ended after {b} batches, where its length promised {self.batches}")
            self.at = (e, b + 1)
            yield _pair(item, e, b)


class Batches:
    """Loads the batches of `loader`, anything that `fit` takes, and says what each of them weighs in means: weight(targets).

    weight: called with the targets of a batch, and of each part that it is split into, as the loader gave them. It returns what they weigh,
    0 or more, as a number or a tensor with one: for a loss that is a mean over the tokens that count, the number of these. It must be a sum
    over the samples. Without Batches that number is the number of samples.
    Raises UsageError for a weight that cannot be called. It can be pickled if the loader and the function can.
    """

    def __init__(self, loader: Any, *, weight: Callable[[Any], Any]) -> None:
        if not callable(weight):
            raise UsageError(
                f"the weight of batches is a {type(weight).__name__}, but it must be a function of the targets that returns what they "
                "weigh, as delock.nets.tokens"
            )
        self.loader, self.weight = loader, weight

    def __len__(self) -> int:
        return len(as_loader(self.loader))

    def sizes(self) -> list[int] | None:
        """Returns those of the loader."""
        return as_loader(self.loader).sizes()

    def epoch(self, e: int) -> Iterator[tuple[Inputs, Any]]:
        return as_loader(self.loader).epoch(e)

    def count(self, targets: Any) -> float:
        """Returns weight(targets). Raises UsageError if it is not one finite number, 0 or more."""
        found = self.weight(targets)
        number = found.item() if isinstance(found, Tensor) and found.dim() == 0 else found
        if isinstance(number, Real) and 0 <= float(number) < math.inf:
            return float(number)
        shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) and found.dim() else repr(number)
        raise UsageError(
            f"weight(targets) returned {shown}, but it must return one number, 0 or more: what the targets weigh in a mean, as the "
            "number of tokens that are not ignored"
        )


def place(loader: Any) -> dict[str, Any] | None:
    """Returns the place of a loader in its data, if it knows one (`state_dict`)."""
    loader = loader.loader if isinstance(loader, Batches) else loader
    known = all(callable(getattr(loader, name, None)) for name in ("state_dict", "load_state_dict"))
    return loader.state_dict() if known else None


def put(loader: Any, state: dict[str, Any]) -> None:
    """Lets a loader go on from a place."""
    (loader.loader if isinstance(loader, Batches) else loader).load_state_dict(state)


@contextmanager
def seeded(k: int) -> Iterator[None]:
    """Seeds the default generators of torch (CPU), numpy and Python with `k` within the block, and restores their states after it."""
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


def _at_rest(obj: Any) -> Any:
    """Returns a DataLoader without the iterator that some keep once they have been read, which could not travel to a process."""
    if isinstance(obj, DataLoader) and getattr(obj, "_iterator", None) is not None:
        obj = copy.copy(obj)
        obj._iterator = None
    return obj


def _start_epoch(obj: Any, e: int, k: int) -> None:
    samplers = [getattr(obj, name, None) for name in ("sampler", "batch_sampler")]
    for part in [obj, *samplers]:
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(e)
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(k)


def _once(obj: Any) -> UsageError:
    return UsageError(
        f"the data ({type(obj).__name__}) can be read only once, but every epoch reads it from its beginning, and so does the look at a "
        "first batch before the start: give a list, a DataLoader, or an object whose __iter__ begins anew"
    )


def _length(obj: Any) -> int | None:
    try:
        return len(obj)
    except (TypeError, NotImplementedError):
        return None


def _sizes(obj: Any) -> list[int] | None:
    if isinstance(obj, (list, tuple)):
        sizes = [n for item in obj if (n := _rows(item)) is not None]
        return sizes if len(sizes) == len(obj) else None
    if not isinstance(obj, DataLoader) or isinstance(obj.dataset, IterableDataset) or type(obj.batch_sampler) is not BatchSampler:
        return None
    samples = _length(obj.sampler)
    if samples is None:
        return None
    size = obj.batch_sampler.batch_size
    left = 0 if obj.batch_sampler.drop_last else samples % size
    return [size] * (samples // size) + [left] * (left > 0)


def _rows(item: Any) -> int | None:
    """Returns the rows that all inputs of a batch have, or None: where they differ, the targets decide, which may be any tree."""
    inputs = item[0] if isinstance(item, (list, tuple)) and item else None
    own = {len(x) for x in (inputs if isinstance(inputs, (list, tuple)) else [inputs]) if isinstance(x, Tensor) and x.dim()}
    return own.pop() if len(own) == 1 else None


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
