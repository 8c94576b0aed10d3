"""Tries the user's loss and metrics before the start, and refuses those that would read old state of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph.python_state import changed, marks
from delock.partition.graph.root import in_mode
from delock.partition.holdings import reaches
from delock.run.request import Request
from delock.tensors import Value, address, same, tensors, tree_tensors


def refuse_stale(request: Request, call: Call, inputs: Value, targets: Any) -> None:
    """Raises UsageError for a loss or a metric that reads what changes in the model: stages compute with copies of it, and it stays behind.

    A copy of the model goes forward once, if a function can come to the model at all.
    """
    model = request.model if isinstance(request.model, nn.Module) else nn.Sequential(*request.model)
    own = {"the loss": request.loss, **{f"the metric {name!r}": one for name, one in request.metrics.items()}}
    reaching = {what: function for what, function in own.items() if function and reaches(function, [model])}
    if not reaching:
        return
    left, written, outputs = _after_a_forward(model, call, inputs)
    changing = {address(one): f"its parameter {name}" for name, one in model.named_parameters() if one.requires_grad}
    changing |= {address(one): f"its buffer {name}" for name, one in model.named_buffers() if name in written}
    for what, function in reaching.items():
        behind = f"its attribute {left[0]}, which its forward changes" if left else _read(function, outputs, targets, changing)
        if behind:
            raise UsageError(
                f"{what} holds the model, and with it {behind}: stages train copies of the model, so {what} would read what was there "
                f"before the run: return from forward what {what} needs, or let it not hold the model"
            )


def _after_a_forward(model: nn.Module, call: Call, inputs: Value) -> tuple[list[str], set[str], Any]:
    """Returns the attributes and the buffers that a forward in training changes, by path, and its output."""
    own = in_mode(model, True)
    before, buffers = marks(own), {name: one.clone() for name, one in own.named_buffers()}
    args, kwargs = call.arguments([x.clone() for x in tensors(inputs)])
    outputs = None
    with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):  # a model that fails is told of when it is measured
        outputs = own(*args, **kwargs)
    written = {name for name, one in own.named_buffers() if not same(one, buffers.get(name))}
    return changed(before, marks(own)), written, outputs


def _read(function: Callable[[Any, Any], Any], outputs: Any, targets: Any, changing: Mapping[int, str]) -> str:
    """Returns which changing tensor of the model a function computes with; "" if there is none."""
    given = {address(one) for one in tree_tensors((outputs, targets))}
    watch = _Reading({place: name for place, name in changing.items() if place and place not in given})
    with suppress(Exception), torch.random.fork_rng(devices=[]), watch:  # a loss that fails is told of when it is measured
        function(outputs, targets)
    return watch.found


class _Reading(TorchDispatchMode):
    """Notes the first of some tensors, by the addresses of their memory, that an operation is given."""

    def __init__(self, places: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.places, self.found = places, ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Returns False, because otherwise torch loads its compiler at the first operation, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = map(address, tree_tensors((args, kwargs or {})))
        self.found = self.found or next((self.places[at] for at in given if at in self.places), "")
        return func(*args, **(kwargs or {}))
