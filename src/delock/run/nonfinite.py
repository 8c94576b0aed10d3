"""Explains a loss that is no number: by what its batch holds, read again, and by what cannot be the cause.

The loader gives the same batch again, so nothing is looked at, and nothing is kept, before a run has failed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from delock.data.iterable import Batches
from delock.engine.feed import samples
from delock.errors import NonFinite
from delock.methods import options
from delock.nets.gpt import IGNORED
from delock.run.request import Request
from delock.tensors import Tree, is_floating, rows, split_bounds, tree_tensors

PATIENCE = 5.0  # seconds in which the batch must be found again: nobody should wait long for an error

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
    batch = _again(request, error)
    if batch is not None and (found := _fault(request, *batch)):
        return found
    if not error.updates and request.method.planned:  # of free-running stages, those below may have made updates
        places = "look at its inputs," if batch is None else "its inputs are finite, so look at"
        return f"no update was made before it, so neither the learning rate nor staleness can be the cause: {places} {REST}"
    beta = ", or shrink the gradients (beta)" if "beta" in options(type(request.method)) else ""
    return f"lower the learning rate{',' if beta else ' or'} warm it up{beta}"


def _fault(request: Request, inputs: Tree, targets: Tree) -> str | None:
    """Returns what is wrong with a batch, or with a part of one, if that can be seen."""
    for name, tree in (("inputs", inputs), ("targets", targets)):
        if count := sum(_nonfinite(x) for x in tree_tensors(tree)):
            return f"its {name} hold {count} number{'s' if count > 1 else ''} NaN or infinite: clean the data"
    if not isinstance(request.train, Batches) and any(_ignored(y) for y in tree_tensors(targets)):
        return (
            f"all its targets are {IGNORED}, which torch's losses leave out, so it has no mean: "
            "weigh batches by what counts, as delock.data.Batches(loader, weight=delock.nets.tokens)"
        )
    return None


def _nonfinite(x: Tensor) -> int:
    return int((~torch.isfinite(x)).sum()) if is_floating(x) else 0


def _ignored(y: Tensor) -> bool:
    return not is_floating(y) and y.numel() > 0 and bool((y == IGNORED).all())


def _again(request: Request, error: NonFinite) -> tuple[Any, Any] | None:
    """Returns inputs and targets that the loss is of, read again; None if they are unknown, fail to be read, or take too long."""
    if error.batch is None or not request.method.planned:
        return None
    epoch, place = divmod(error.batch, len(request.train))
    until = time.monotonic() + PATIENCE
    with suppress(Exception):  # the loss is what went wrong, and is reported
        for b, (inputs, targets) in enumerate(request.train.epoch(epoch)):
            if b == place:
                n = samples(inputs, targets)
                begin, end = split_bounds(n, error.parts)[error.part]
                inputs, targets = rows((inputs, targets), begin, end, n)
                return inputs, targets
            if time.monotonic() > until:
                break
    return None
