"""Lets one run at a time train a weight: at its end each would put its own into the model, over that of the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import nn

from delock.errors import UsageError

_TRAINED: ContextVar[frozenset[int]] = ContextVar("trained", default=frozenset())  # ids of weights that some run here trains


@contextmanager
def trained_alone(model: nn.Module) -> Iterator[None]:
    """Notes the weights that learn as those of one run. Raises UsageError if another run of this process has some of them."""
    weights = frozenset(id(weight) for weight in model.parameters() if weight.requires_grad)
    if weights & _TRAINED.get():
        raise UsageError(
            "the model is being trained by another run, and each would put its weights into it: end the session or fit that has it, or "
            "train copy.deepcopy(model)"
        )
    _TRAINED.set(_TRAINED.get() | weights)
    try:
        yield
    finally:
        _TRAINED.set(_TRAINED.get() - weights)  # runs may end in any order
