"""Makes a Loader from the user's own batches: a torch DataLoader, a list, a stream, any other iterable; takes what is said of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from numbers import Real
from typing import Any

from torch import Tensor

from delock.data.call import Call, Takes
from delock.data.endless import Stream
from delock.data.interpreted import Interpreted
from delock.data.loader import LoadedBatch, Loader, Reader, call_of, loaded, place, put
from delock.data.named_sets import NamedSets
from delock.data.plain import Plain, length_of, once
from delock.data.reading import Choice, Chosen, Reading
from delock.errors import UsageError, users_own


def as_loader(obj: Any, seed: int = 0, *, batches_per_epoch: int | None = None) -> Loader:
    """Returns `obj` itself if it is a Loader already, else a Loader over the batches that iterating it gives.

    The Loader makes the data a function of (seed, epoch, batch), so that nothing that happens elsewhere in the process changes it. It seeds
    the default random generators before `iter` and before each batch, and restores them afterwards. It seeds the generators that a
    DataLoader and its sampler own at the start of an epoch, and calls `set_epoch` on `obj`, its data set and its samplers where it exists.
    The workers of a DataLoader follow, except with persistent_workers, whose generators run on across epochs.
    batches_per_epoch: read only this number of batches; required if `obj` has no length.
    Raises UsageError if `obj` cannot be iterated, or only once, or if its length is missing or below 1. Reading raises it for a batch in
    which inputs and targets cannot be told, and for an epoch with fewer batches than promised.
    """
    return _loader(obj, seed, batches=batches_per_epoch)


def train_loader(obj: Any, seed: int, takes: Takes, batches: int | None) -> Loader:
    """Returns a Loader of training data for a model that takes `takes`. Without a length it is a stream of the run's batches."""
    return _loader(obj, seed, takes, unsized=None if batches is None else lambda plain: Stream(plain, batches))


def evaluation_loader(obj: Any, seed: int, takes: Takes) -> Loader:
    """Returns a Loader of test data, or of several sets by name. Without a length it is read to be counted."""
    if isinstance(obj, Mapping):
        return NamedSets({name: evaluation_loader(one, seed, takes) for name, one in obj.items()})
    return _loader(obj, seed, takes, unsized=lambda plain: plain)


def _loader(
    obj: Any,
    seed: int,
    takes: Takes | None = None,
    chosen: Chosen | None = None,
    batches: int | None = None,
    unsized: Callable[[Plain], Loader] | None = None,
) -> Loader:
    """Returns the Loader of data; unsized: makes that of data without a length, which is refused without it."""
    chosen = chosen or Chosen()
    if isinstance(obj, Batches):
        return _weighed(_loader(obj.loader, seed, takes, chosen.over(obj.chosen), batches, unsized), obj.weight)
    if isinstance(obj, Plain | Stream | Interpreted):
        return obj.read_as(Reading(takes or obj.reading.takes, chosen.over(obj.reading.chosen)))
    reading = Reading(takes or Takes(), chosen)
    if isinstance(obj, Loader):
        return obj if reading == Reading() else Interpreted(obj, reading)
    if not isinstance(obj, Iterable) or isinstance(obj, Mapping):
        raise UsageError(f"data must be an iterable of batches, such as a DataLoader, not {type(obj).__name__}")
    if isinstance(obj, Iterator) and iter(obj) is obj:
        raise once(obj)
    length = length_of(obj) if batches is None else batches
    if length is not None and length < 1:
        raise UsageError(f"an epoch must have at least one batch, not {length}")
    plain = Plain(obj, seed, length, reading)
    if length is not None:
        return plain
    if unsized is None:
        raise UsageError(
            f"the data ({type(obj).__name__}) has no length, so its epochs cannot be counted: give fit batches in place of epochs, or say "
            "how many batches an epoch has with delock.data.as_loader(data, batches_per_epoch=...)"
        )
    return unsized(plain)


def _weighed(loader: Loader, weight: Callable[[Any], Any] | None) -> Loader:
    inner, other = (loader.loader, loader.weight) if isinstance(loader, Batches) else (loader, None)
    found = other if weight is None else weight
    return inner if found is None else Batches(inner, weight=found)


class Batches(Reader):
    """Loads the batches of `loader`, anything that `fit` takes, and says what cannot be guessed of them.

    inputs: what the model is given: names of entries of the batch (its keys, places or attributes), or a function of the batch that returns
    a tensor, a tuple of arguments, or a dict of them by their names.
    targets: what loss and metrics are given: the name of an entry, several (a dict of them, or a tuple if they are places), or a function.
    samples: a function of the batch that returns how many samples it has. By default they are the rows of its inputs.
    weight: what a batch weighs in means, by default the number of its samples. It is called with the targets of a batch, and of each part
    that it is split into, and returns what they weigh, 0 or more, as a number or a tensor with one: for a loss that is a mean over the
    tokens that count, the number of these. It must be a sum over the samples.
    Raises UsageError for none of these, and for one of another kind. It can be pickled if the loader and the functions can.
    """

    def __init__(
        self,
        loader: Any,
        *,
        inputs: Choice | None = None,
        targets: Choice | None = None,
        samples: Callable[[Any], Any] | None = None,
        weight: Callable[[Any], Any] | None = None,
    ) -> None:
        if weight is not None and not callable(weight):
            raise UsageError(
                f"the weight of batches is a {type(weight).__name__}, but it must be a function of the targets that returns what they "
                "weigh, as delock.nets.tokens"
            )
        if all(one is None for one in (inputs, targets, samples, weight)):
            raise UsageError("Batches says nothing of the batches: give inputs, targets, samples or weight, or leave it out")
        self.loader, self.weight, self.chosen = loader, weight, Chosen(inputs, targets, samples)

    def over(self, loader: Any) -> Batches:
        """Returns the same choices for other data."""
        chosen = self.chosen
        return Batches(loader, inputs=chosen.inputs, targets=chosen.targets, samples=chosen.samples, weight=self.weight)

    def _made(self) -> Loader:
        made = as_loader(self)
        return made.loader if isinstance(made, Batches) else made

    @property
    def call(self) -> Call | None:  # type: ignore[override]
        """Returns how the batches call the model."""
        return call_of(self.loader)

    def __len__(self) -> int:
        return len(self._made())

    def sizes(self) -> list[int] | None:
        """Returns those of the loader."""
        return self._made().sizes()

    def loaded(self, e: int) -> Iterator[LoadedBatch]:
        """Yields the batches of epoch e."""
        return loaded(self._made(), e)

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the place of the loader, if it knows one."""
        return place(self.loader)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Lets the loader go on from a place."""
        put(self.loader, state)

    def count(self, targets: Any) -> float:
        """Returns weight(targets). Raises UsageError if it is not one finite number, 0 or more."""
        assert self.weight is not None
        with users_own("the weight of batches"):
            found = self.weight(targets)
        number = found.item() if isinstance(found, Tensor) and found.dim() == 0 else found
        if isinstance(number, Real) and 0 <= float(number) < math.inf:
            return float(number)
        shown = f"a tensor of shape {tuple(found.shape)}" if isinstance(found, Tensor) and found.dim() else repr(number)
        raise UsageError(
            f"weight(targets) returned {shown}, but it must return one number, 0 or more: what the targets weigh in a mean, as the "
            "number of tokens that are not ignored"
        )


def weigher(loader: Loader) -> Batches | None:
    """Returns what weighs the batches of a loader that was made here, if it does not weigh them by their samples."""
    return loader if isinstance(loader, Batches) and loader.weight is not None else None


def functions_of(loader: Loader) -> list[Callable[[Any], Any]]:
    """Returns the user's functions by which the batches of a loader are read and weighed."""
    if isinstance(loader, NamedSets):
        return [function for one in loader.sets.values() for function in functions_of(one)]
    if isinstance(loader, Batches):
        return [*([loader.weight] if loader.weight else []), *functions_of(loader.loader)]
    chosen = loader.reading.chosen if isinstance(loader, Plain | Stream | Interpreted) else Chosen()
    return [one for one in (chosen.inputs, chosen.targets, chosen.samples) if callable(one)]
