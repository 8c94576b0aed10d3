"""Tries the user's loss, metrics and weights of batches before the start; refuses those that fail, or would read old state of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from delock.data.call import Call
from delock.data.iterable import functions_of, weigher
from delock.data.loader import LoadedBatch
from delock.data.named_sets import sets_of
from delock.errors import DelockError, UsageError, said
from delock.execution import apply, lay_out_input, lay_out_weights, precision
from delock.options import Execution
from delock.partition.graph.python_state import changed, marks
from delock.partition.graph.root import in_mode
from delock.partition.holdings import reaches
from delock.partition.measure import own_copy
from delock.partition.trial_state import state_kept
from delock.run.history import measured
from delock.run.request import Request
from delock.tensors import Value, address, map_tensors, same, shown, tensors, tree_tensors


@contextmanager
def functions_as_given(request: Request) -> Iterator[None]:
    """Lets the user's functions have the state in which they were given behind the block, which may call them on trial."""
    loaders = [one for one in (request.train, request.test) if one is not None]
    own = [request.loss, *request.metrics.values(), *(function for loader in loaders for function in functions_of(loader))]
    with state_kept(own, [request.network.whole]):
        yield


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


def try_user_functions(request: Request, execution: Execution, first: LoadedBatch, tests: Mapping[str, LoadedBatch]) -> None:
    """Evaluates the first batch of each test set, and weighs the first batch of all data. Raises UsageError for what fails.

    first: a batch of the training data, on which the loss has been tried; tests: of test sets, by what an error calls them.
    """
    sets = sets_of(request.test).values() if request.test is not None else ()
    for which, loader in [("training data", request.train), *zip(tests, sets, strict=False)]:
        batch = tests.get(which, first)
        if weights := weigher(loader):
            with _told(f"the weight of batches fails on the first batch of the {which}, whose targets are {shown(batch.targets)}"):
                weights.count(batch.targets)
    for which, batch in tests.items():
        what = f"the first batch of the {which}, whose inputs are {shown(batch.inputs)} (in the training data {shown(first.inputs)})"
        with torch.random.fork_rng(devices=[]), torch.no_grad(), precision(execution, torch.device(request.device)):
            try:
                outputs, targets = _evaluated(request, execution, batch)
            except Exception as error:
                if not _evaluates(request, execution, first):
                    return  # before it has been trained, as a model that makes its buffers then
                with _told(f"the model fails in evaluation on {what}"):
                    raise error
            for name, measure in {"": request.criterion, **request.metrics}.items():
                given = f"it was called with outputs {shown(outputs)} and targets {shown(targets, values=True)}"
                with _told(f"{f'the metric {name!r}' if name else 'the loss'} fails on {what}; {given}"):
                    measured(name, measure, outputs, targets)


def _evaluates(request: Request, execution: Execution, batch: LoadedBatch) -> bool:
    """Returns True if the model can be evaluated at all as it is now."""
    try:
        _evaluated(request, execution, batch)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return False
    return True


def _evaluated(request: Request, execution: Execution, batch: LoadedBatch) -> tuple[Any, Any]:
    """Returns the output of the model in evaluation, and the targets. One layer at a time is copied: some write to buffers."""
    device, plain = torch.device(request.device), replace(execution, compile=False)
    value = map_tensors(lambda x: lay_out_input(plain, x.to(device, copy=True)), batch.inputs)  # a model may write to its input
    for layer in request.network.layers():
        value = apply(plain, lay_out_weights(plain, own_copy(layer.module).to(device)).eval(), value, device)
    return value, map_tensors(lambda x: x.to(device, copy=True), batch.targets)


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Turns what is raised within the block into a UsageError that begins with `what`."""
    try:
        yield
    except (torch.OutOfMemoryError, DelockError):
        raise
    except Exception as error:
        raise UsageError(f"{what}: {said(error)}") from error


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
