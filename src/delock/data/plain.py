"""Loads the batches of any iterable: a torch DataLoader, a list, or an object of the user's own whose __iter__ begins anew."""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import count
from types import GeneratorType
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from delock.data.interpreted import Remembering
from delock.data.loader import LoadedBatch, place, put
from delock.data.reading import Reading
from delock.data.seeding import seeded
from delock.errors import UsageError, users_own
from delock.keys import key
from delock.launch.cores import unbound


class Plain(Remembering):
    """Loads the batches of an iterable, for `as_loader`. It can be pickled if the iterable can.

    batches: the number that an epoch has; None: those that it gives before it ends, which are counted when they are asked for.
    """

    def __init__(self, obj: Iterable[Any], seed: int, batches: int | None, reading: Reading) -> None:
        super().__init__(reading)
        self.obj = obj
        self.seed = seed
        self.batches = batches
        self.at = (0, 0)  # epoch and batch that come next, as far as it has been read
        self.counted: list[int] | None = None  # samples of the batches, where it had to be read for their number
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
        if self.batches is None:
            with users_own("the test data"):
                self.counted = [batch.samples for batch in self.loaded(0)]
            self.batches = len(self.counted)
        return self.batches

    def sizes(self) -> list[int] | None:
        """Returns the samples of each batch for a list of batches and a map-style DataLoader with the usual batching; else None."""
        sizes = self._sizes() if self.counted is None else self.counted
        return sizes[: len(self)] if sizes is not None and len(sizes) >= len(self) else None

    def _sizes(self) -> list[int] | None:
        if not isinstance(self.obj, list | tuple):
            return _batched(self.obj) if self.reading.chosen.samples is None else None
        if self.reading.calls:  # the user's functions are called once for every batch, when it is read
            return None
        try:
            return [self.reading.read(item, "")[1].samples for item in self.obj]
        except UsageError:
            return None

    def _refuse_read(self, items: Iterator[Any]) -> None:
        """Raises UsageError for a generator that an epoch before has read from."""
        if isinstance(items, GeneratorType):
            if self.last is not None and self.last() is items:
                raise once(self.obj)
            self.last = weakref.ref(items)

    def loaded(self, e: int) -> Iterator[LoadedBatch]:
        """Yields the batches of epoch e; what reads them draws the same numbers every time."""
        if self.resumed and self.resumed[0] < e:
            deque(self.loaded(self.resumed[0]), maxlen=0)
        start = key(self.seed, "data", e, "iter")
        _start_epoch(self.obj, e, start)
        with seeded(start), unbound():
            items = iter(self.obj)
        self._refuse_read(items)
        first = self.resumed[1] if self.resumed and self.resumed[0] == e else 0
        self.resumed, self.at = None, (e, first)
        for b in count(first) if self.batches is None else range(first, self.batches):
            if b + 1 == self.batches:
                self.before_last = self._place()
            with seeded(key(self.seed, "data", e, b)):
                item = next(items, self)  # self: a mark that no data set can yield
                batch = None if item is self else self.read(item, e, b)
            if batch is None:
                if self.batches is None:
                    return
                raise UsageError(f"epoch {e} of the data ended after {b} batches, where its length promised {self.batches}")
            self.at = (e, b + 1)
            yield batch


def once(obj: Any) -> UsageError:
    """Returns the error for data that can be read only once."""
    return UsageError(
        f"the data ({type(obj).__name__}) can be read only once, but every epoch reads it from its beginning, and so does the look at a "
        "first batch before the start: give a list, a DataLoader, or an object whose __iter__ begins anew"
    )


def length_of(obj: Any) -> int | None:
    """Returns len(obj), or None."""
    try:
        return len(obj)
    except (TypeError, NotImplementedError):
        return None


def _at_rest(obj: Any) -> Any:
    """Returns a DataLoader without the iterator that some keep once they have been read, which could not travel to a process."""
    if isinstance(obj, DataLoader) and getattr(obj, "_iterator", None) is not None:
        obj = copy.copy(obj)
        obj._iterator = None
    return obj


def _start_epoch(obj: Any, e: int, k: int) -> None:
    samplers = [getattr(obj, name, None) for name in ("sampler", "batch_sampler")]
    for part in [obj, getattr(obj, "dataset", None), *samplers]:
        if callable(set_epoch := getattr(part, "set_epoch", None)):
            set_epoch(e)
    for part in [obj, *samplers]:
        if isinstance(generator := getattr(part, "generator", None), torch.Generator):
            generator.manual_seed(k)


def _batched(obj: Any) -> list[int] | None:
    """Returns the samples that a map-style DataLoader with the usual batching puts into each batch; None for anything else."""
    if not isinstance(obj, DataLoader) or isinstance(obj.dataset, IterableDataset) or type(obj.batch_sampler) is not BatchSampler:
        return None
    samples = length_of(obj.sampler)
    if samples is None:
        return None
    size = obj.batch_sampler.batch_size
    left = 0 if obj.batch_sampler.drop_last else samples % size
    return [size] * (samples // size) + [left] * (left > 0)
