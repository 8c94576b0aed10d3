"""Explains a loss that is no number: by what its batch and those before it hold, read again, and by what cannot be the cause.

An infinite input may leave the loss of its own batch finite, and spoil the weights: the loss of a later batch is then the first to show it.
The loader gives the same batches again, so nothing is looked at, and nothing is kept, before a run has failed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from delock.data.iterable import weigher
from delock.data.loader import LoadedBatch, loaded
from delock.errors import NonFinite
from delock.methods import options
from delock.nets.gpt import IGNORED
from delock.run.request import Request
from delock.tensors import Tree, is_floating, rows, split_bounds, tree_tensors

PATIENCE = 5.0  # seconds in which the batch must be found again: nobody should wait long for an error

NEAR = 64  # batches of an epoch after which weights that the epoch before has spoilt would have shown

REST = "the loss and the initial weights"


@contextmanager
def explained(request: Request) -> Iterator[None]:
    """Adds the remedy to a NonFinite that is raised within the block."""
    try:
        yield
    except NonFinite as error:
        facts = {"batch": error.batch, "part": error.part, "parts": error.parts, "updates": error.updates}
        raise NonFinite(f"{error}; {_remedy(request, error)}", **facts) from None  # type: ignore[arg-type]


def _remedy(request: Request, error: NonFinite) -> str:
    own, before = _again(request, error)
    if own is not None and (found := _fault(request, *own)):
        return found
    if before:
        return before
    if not error.updates and request.method.planned:  # of free-running stages, those below may have made updates
        places = "look at its inputs," if own is None else "its inputs are finite, so look at"
        return f"no update was made before it, so neither the learning rate nor staleness can be the cause: {places} {REST}"
    look = (
        "look whether its inputs are finite, which a session cannot see again; else "
        if error.batch is None and request.method.planned
        else ""
    )
    beta = ", or shrink the gradients (beta)" if "beta" in options(type(request.method)) else ""
    return f"{look}lower the learning rate{',' if beta else ' or'} warm it up{beta}"


def _fault(request: Request, inputs: Tree, targets: Tree) -> str | None:
    """Returns what is wrong with the batch of the loss, or with its part of one, if that can be seen."""
    if found := _no_numbers(inputs, targets):
        return f"its {found}: clean the data"
    if not weigher(request.train) and any(_ignored(y) for y in tree_tensors(targets)):
        return (
            f"all its targets are {IGNORED}, which torch's losses leave out, so it has no mean: "
            "weigh batches by what counts, as delock.data.Batches(loader, weight=delock.nets.tokens)"
        )
    return None


def _no_numbers(inputs: Tree, targets: Tree, of: str = "") -> str | None:
    """Returns how many numbers of a batch are none, and in which of its tensors: "inputs[1] hold 2 numbers NaN or infinite"."""
    for name, tree in (("inputs", inputs), ("targets", targets)):
        found = {place: count for place, x in _places(tree, name) if (count := _nonfinite(x))}
        if found:
            count, where = sum(found.values()), " and ".join(found) if len(found) < 4 else name
            return f"{where}{of} hold {count} number{'s' if count > 1 else ''} NaN or infinite"
    return None


def _places(tree: Tree, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a tree, each with its place in it."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, tuple | list | dict):
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _places(item, f"{name}[{key!r}]")


def _nonfinite(x: Tensor) -> int:
    return int((~torch.isfinite(x)).sum()) if is_floating(x) else 0


def _ignored(y: Tensor) -> bool:
    return not is_floating(y) and y.numel() > 0 and bool((y == IGNORED).all())


def _again(request: Request, error: NonFinite) -> tuple[tuple[Any, Any] | None, str | None]:
    """Returns the batch of the loss, read again, and what is wrong with the last bad one of those before it, which may have spoilt weights.

    None for a batch that is unknown, fails to be read, or takes too long.
    """
    until = time.monotonic() + PATIENCE
    if error.batch is None or not request.method.planned:  # free-running stages: any batch may have been trained with
        return None, _before(request, 0, len(request.train), until)[1]
    epoch, place = divmod(error.batch, len(request.train))
    whole, before = _before(request, epoch, place, until)
    own = None
    if whole is not None:
        n = whole.samples
        begin, end = split_bounds(n, error.parts)[error.part]
        own = rows((whole.inputs, whole.targets), begin, end, n)
    if not before and epoch and place < NEAR:
        _, before = _before(request, epoch - 1, len(request.train), until)
    return own, before


def _before(request: Request, epoch: int, place: int, until: float) -> tuple[LoadedBatch | None, str | None]:
    """Returns the batch at that place of an epoch, and what is wrong with the last bad one of those before it."""
    found = None
    with suppress(Exception):  # the loss is what went wrong, and is reported
        for b, batch in enumerate(loaded(request.train, epoch)):
            if b == place:
                return batch, found
            number = epoch * len(request.train) + b
            if bad := _no_numbers(batch.inputs, batch.targets, f" of batch {number}"):
                found = f"the {bad}, which can spoil the weights for all batches after it: clean the data"
            if time.monotonic() > until:
                break
    return None, found
