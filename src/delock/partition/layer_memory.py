"""Counts the bytes that one layer holds in a forward and a backward: its graph, and the peaks within each.

What PyTorch does. Between forward and backward, autograd keeps the tensors that operations saved for their gradients. Within a forward or
a backward, other tensors live for a moment: results that the next operation uses up, errors, gradients. On a CPU torch keeps no
count of either. Hooks on saved tensors (`saved_tensors_hooks`) show what the graph keeps, its profiler what was allocated and freed.

Why that is not enough. Saved tensors cannot simply be added up: one may be a weight, an input, a view of another, or be saved twice. A list
of allocations does not say which tensor each was for. And a stage consists of many layers that are measured one by one, before the cuts are
known, while inside a stage a layer behaves differently from a layer alone:
* its output is the next layer's input, so the memory of the two is one;
* the error that comes back to it is free to go as soon as it is used, where a test bench would hold on to it;
* its graph may have to survive a first backward, because a second loss or a deferred weight gradient needs it again.

What we do. `LiveBytes` counts every storage when an operation makes it and when its last reference goes; two views of a storage count once.
The layer runs once without a graph and once with one: forward, loss if it is the last layer, a backward that retains the graph, and a
backward that frees it. Inputs, weights and buffers are not counted. Each number below is the bytes at the end of an interval or the peak
within it, above what lived at its beginning. Each output names the input whose storage it shares. The hooks say which inputs and outputs
the graph holds, and which part of the graph only layers with weights hold. The error is made inside the backward, by a hook, so that
nothing else refers to it, and counted apart, so that the peak is known with and without it. `memory.compose` joins the layers to stages,
and `memory.peaks` walks a plan with the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from delock.execution import apply, precision
from delock.options import Execution
from delock.partition.live_bytes import LiveBytes, storage_bytes, storage_of
from delock.tensors import Value, like, tensors, tree_tensors


@dataclass(frozen=True, slots=True)
class Output:
    """Describes one tensor that a layer returns."""

    size: int  # bytes of its storage
    source: int | None  # index of the input whose storage it shares: it is a view of that input, or was written into it
    kept: bool  # the layer's graph holds it


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Holds the bytes of one layer on one batch.

    The graph is all that lives at the end of the forward beside weights, buffers, inputs and outputs. A peak is the most bytes alive
    within its interval, above those alive at the beginning of the interval.
    """

    weights: int  # parameters that learn
    largest: int  # the largest of these parameters
    written: int  # buffers that a forward writes to
    graph: int
    kept: tuple[bool, ...]  # per input: the graph holds it
    writes: bool  # the layer writes into an input
    outputs: tuple[Output, ...]
    forward_no_grad: int  # peak of a forward without a graph, outputs included
    forward: int  # peak of a forward with a graph, graph and outputs included
    loss: int  # bytes at the end of the loss, above the end of the forward: what the loss keeps for its backward
    loss_peak: int  # peak of the loss, above the end of the forward
    backward: int  # peak of a backward that frees the graph, above the end of the loss, without the errors of the outputs
    backward_with_errors: int  # the same, with the errors of the outputs, each freed as soon as it is used
    backward_retained: int  # the same, where the graph stays
    deferred_errors: int  # errors that flow into modules with weights of their own, all together
    weight_layers_graph: int  # the part of the graph that only such modules hold


def observe(
    module: nn.Module,
    value: Value,
    learns: Sequence[bool],
    loss: Callable[[Any], Tensor] | None,
    device: torch.device,
    execution: Execution,
) -> LayerMemory:
    """Runs one forward and one backward of the module on one batch, in one piece, and returns the bytes they hold.

    value: the module's input, a tensor or a tuple of tensors; learns: per tensor of it, whether it needs a gradient;
    loss: takes the module's output, if the module is the last one, else None. Weights and inputs are left as they are; the random
    state advances.
    """
    execution = replace(execution, chunks=1)
    forward_no_grad = _forward_no_grad(LayerTrial(module, value, learns, loss, device, execution))
    trial, live, saved = LayerTrial(module, value, learns, loss, device, execution), LiveBytes(), _Saved()
    live.ignore(trial.there)
    given = trial.given
    before, buffers = [x._version for x in given], [(b, b.clone()) for b in module.buffers()]
    with live:
        with saved_tensors_hooks(saved.note, lambda kept: kept), saved.watching(module):
            out = trial.forward()
        forward, held = live.peak, live.from_here()
        sources = {storage_of(x): i for i, x in enumerate(given)}
        outputs = [Output(storage_bytes(x), sources.get(storage_of(x)), storage_of(x) in saved.holders) for x in tensors(out)]
        own = {storage_of(x): storage_bytes(x) for x in tensors(out) if storage_of(x) not in sources}
        weight_layers_graph = saved.weight_layers_graph([*own, *map(storage_of, trial.there)])
        ends = trial.ends(out)
        loss_peak, begun = live.peak - held, live.from_here()
        roots = ends if loss else [_with_error(x, live) for x in ends]
        trial.backward(roots, keep=True)
        backward_retained, _ = live.peak - begun, live.from_here()
        trial.backward(roots)
    sizes = [storage_bytes(w) for w in module.parameters() if w.requires_grad]
    return LayerMemory(
        weights=sum(sizes),
        largest=max(sizes, default=0),
        written=sum(storage_bytes(b) for b, was in buffers if not torch.equal(b, was)),
        graph=held - sum(own.values()),
        kept=tuple(storage_of(x) in saved.holders for x in given),
        writes=any(x._version != was for x, was in zip(given, before, strict=True)),
        outputs=tuple(outputs),
        forward_no_grad=forward_no_grad,
        forward=forward,
        loss=begun - held,
        loss_peak=loss_peak,
        backward=live.bare - begun,
        backward_with_errors=live.peak - begun,
        backward_retained=backward_retained,
        deferred_errors=saved.deferred_errors,
        weight_layers_graph=weight_layers_graph,
    )


class LayerTrial:
    """Runs a module forward and backward on copies of its inputs.

    `there` lists all tensors that exist before the forward: inputs, parameters, buffers.
    """

    def __init__(
        self,
        module: nn.Module,
        value: Value,
        learns: Sequence[bool],
        loss: Callable[[Any], Tensor] | None,
        device: torch.device,
        execution: Execution,
    ) -> None:
        self.module, self.loss, self.device, self.execution = module, loss, device, execution
        self.value = value
        leaves = [x.detach().requires_grad_(learn) for x, learn in zip(tensors(value), learns, strict=True)]
        unwritten = getattr(module, "unwritten", ())
        self.given = [x if i in unwritten else x.clone() for i, x in enumerate(leaves)]  # a layer may write into its input
        self.wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        self.there = [*leaves, *self.given, *module.parameters(), *module.buffers()]

    def forward(self) -> Value:
        """Returns the module's output, with its graph."""
        out: Value = apply(self.execution, self.module, like(self.value, self.given), self.device)
        return out

    def ends(self, out: Value) -> list[Tensor]:
        """Returns the tensors at which a backward begins: the loss, or without one the outputs that need a gradient."""
        with precision(self.execution, self.device):
            ends = out if self.loss is None else self.loss(out)
        return [x for x in tensors(ends) if x.requires_grad]

    def backward(self, roots: Sequence[Tensor], keep: bool = False) -> None:
        """Goes back from scalars: a loss, or a `root` per output. keep: the graph stays for another backward."""
        if roots and self.wanted:
            torch.autograd.grad(roots, self.wanted, retain_graph=keep, allow_unused=True)


def root(out: Tensor, error: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns a scalar whose backward sends error(ones) into `out`; ones have the shape of `out`.

    torch.autograd.grad takes errors too, but with the first of them it loads a library for symbolic shapes, which takes half a second.
    """
    out.register_hook(error)  # type: ignore[no-untyped-call]
    total = out.sum()
    return total.real if total.is_complex() else total


def _forward_no_grad(trial: LayerTrial) -> int:
    """Returns the peak bytes of a forward without a graph, above its beginning."""
    live = LiveBytes()
    live.ignore(trial.there)
    with live, torch.no_grad():
        trial.forward()
    return live.peak


class _Saved:
    """Records what autograd saves in a forward, and whether a module with parameters of its own, a weight layer, saved it."""

    def __init__(self) -> None:
        self.holders: dict[int, set[bool]] = {}  # storage -> {True} if weight layers saved it, {False} if others did, or both
        self.sizes: dict[int, int] = {}
        self.deferred_errors = 0  # bytes that weight layers return, and so of the errors that flow into them
        self.inside = 0

    def note(self, tensor: Tensor) -> Tensor:
        """Records a tensor that autograd saves; a hook for `saved_tensors_hooks`."""
        self.holders.setdefault(storage_of(tensor), set()).add(self.inside > 0)
        self.sizes[storage_of(tensor)] = storage_bytes(tensor)
        return tensor.detach()  # the tensor itself would keep a graph alive that is dropped without a backward

    def weight_layers_graph(self, apart: Iterable[int]) -> int:
        """Returns the bytes that only weight layers saved, leaving out the storages `apart`."""
        return sum(self.sizes[one] for one in self.holders.keys() - set(apart) if self.holders[one] == {True})

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Notes, within the block, when the module's forward enters and leaves its weight layers."""
        layers = [one for one in module.modules() if any(True for _ in one.parameters(recurse=False))]
        hooks = [hook for one in layers for hook in (one.register_forward_pre_hook(self._enter), one.register_forward_hook(self._leave))]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, *_: Any) -> None:
        self.inside += 1

    def _leave(self, module: nn.Module, given: Any, out: Any) -> None:
        self.inside -= 1
        self.deferred_errors += sum(x.nbytes for x in tree_tensors(out))


def _with_error(out: Tensor, live: LiveBytes) -> Tensor:
    """Returns a scalar whose backward sends an error of the shape of `out` into it, which only the backward refers to."""
    shape, strides = out.shape, out.stride()

    def new_error(error: Tensor) -> Tensor:
        live.setting_apart = True
        try:
            return torch.empty_strided(shape, strides, dtype=error.dtype, device=error.device).fill_(1)
        finally:
            live.setting_apart = False

    return root(out, new_error)
