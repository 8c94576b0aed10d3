"""One forward and backward of an atom with all bytes counted: what its graph holds, and how much more lives at the peaks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from delock.execution import Execution
from delock.partition.live_bytes import LiveBytes, storage_bytes, storage_of

Value: TypeAlias = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor that an atom returns."""

    size: int  # bytes of its storage
    source: int | None  # number of the input in whose storage it lies, if it is a view of one or was written there
    kept: bool  # the atom's graph holds it


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes of an atom on one batch. The graph is what lives between forward and backward beside weights, buffers, inputs and outputs."""

    weights: int  # parameters that learn
    largest: int  # the largest of them
    buffers: int
    graph: int
    kept: tuple[bool, ...]  # inputs that the graph holds
    writes: bool  # it writes to an input
    outputs: tuple[Output, ...]
    passing_through: int  # the most while it goes forward without a graph, above what was there: outputs included
    forward: int  # the same with a graph, that included
    loss: int  # what the loss behind it holds until its backward
    losing: int  # the most while that is computed
    backward: int  # the most in its backward above what was there at its begin, where errors of the outputs are somebody else's
    passing: int  # the same, with these errors, which go as soon as they are used
    backward_retained: int  # the same, where the graph stays
    deferred_errors: int  # errors that flow into layers with weights
    weight_layers_graph: int  # of the graph, what nothing but such layers hold


def observe(
    module: nn.Module,
    value: Value,
    learns: Sequence[bool],
    loss: Callable[[Any], Tensor] | None,
    device: torch.device,
    execution: Execution,
) -> LayerMemory:
    """What one forward and backward of the module hold; like `measure`, and with the batch in one piece.

    The errors that come from behind are as large as the outputs and free to go, as inside a stage, not a tensor that somebody keeps.
    """
    execution = replace(execution, chunks=1)
    passing_through = _passing_through(LayerTrial(module, value, learns, loss, device, execution))
    trial, live, saved = LayerTrial(module, value, learns, loss, device, execution), LiveBytes(), _Saved()
    live.ignore(trial.there)
    given = trial.given
    before = [x._version for x in given]
    with live:
        with saved_tensors_hooks(saved.note, lambda kept: kept), saved.watching(module):
            out = trial.forward()
        forward, held = live.peak, live.from_here()
        sources = {storage_of(x): i for i, x in enumerate(given)}
        outputs = [Output(storage_bytes(x), sources.get(storage_of(x)), storage_of(x) in saved.holders) for x in tensors(out)]
        own = {storage_of(x): storage_bytes(x) for x in tensors(out) if storage_of(x) not in sources}
        weight_layers_graph = saved.weight_layers_graph([*own, *map(storage_of, trial.there)])
        ends = trial.ends(out)
        losing, begun = live.peak - held, live.from_here()
        roots = ends if loss else [_with_error(x, live) for x in ends]
        trial.backward(roots, list(map(torch.ones_like, roots)), keep=True)
        backward_retained, _ = live.peak - begun, live.from_here()
        trial.backward(roots, list(map(torch.ones_like, roots)))
    sizes = [storage_bytes(w) for w in module.parameters() if w.requires_grad]
    return LayerMemory(
        weights=sum(sizes),
        largest=max(sizes, default=0),
        buffers=sum(map(storage_bytes, module.buffers())),
        graph=held - sum(own.values()),
        kept=tuple(storage_of(x) in saved.holders for x in given),
        writes=any(x._version != was for x, was in zip(given, before, strict=True)),
        outputs=tuple(outputs),
        passing_through=passing_through,
        forward=forward,
        loss=begun - held,
        losing=losing,
        backward=live.bare - begun,
        passing=live.peak - begun,
        backward_retained=backward_retained,
        deferred_errors=saved.deferred_errors,
        weight_layers_graph=weight_layers_graph,
    )


def tensors(value: Value) -> tuple[Tensor, ...]:
    """One alone, or those of a tuple."""
    return (value,) if isinstance(value, Tensor) else value


class LayerTrial:
    """The module on inputs of its own, forward and backward once; `there`: all tensors that it begins with."""

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
        self.alone = isinstance(value, Tensor)
        leaves = [x.detach().requires_grad_(learn) for x, learn in zip(tensors(value), learns, strict=True)]
        self.given = [x.clone() for x in leaves]  # an atom may write on its input
        self.wanted = [x for x in (*leaves, *module.parameters()) if x.requires_grad]
        self.there = [*leaves, *self.given, *module.parameters(), *module.buffers()]

    def forward(self) -> Value:
        """The output with its graph."""
        out: Value = self.execution.apply(self.module, self.given[0] if self.alone else tuple(self.given), self.device)
        return out

    def ends(self, out: Value) -> list[Tensor]:
        """Where a backward begins: the loss, or the outputs that learn."""
        with self.execution.context(self.device):
            return [x for x in tensors(out if self.loss is None else self.loss(out)) if x.requires_grad]

    def backward(self, roots: Sequence[Tensor], errors: Sequence[Tensor], keep: bool = False) -> None:
        """keep: the graph, for another one."""
        if roots and self.wanted:
            torch.autograd.grad(roots, self.wanted, errors, retain_graph=keep, allow_unused=True)


def _passing_through(trial: LayerTrial) -> int:
    """The peak of a forward that only passes on."""
    live = LiveBytes()
    live.ignore(trial.there)
    with live, torch.no_grad():
        trial.forward()
    return live.peak


class _Saved:
    """What autograd saves in a forward, and what modules with parameters of their own have to do with it."""

    def __init__(self) -> None:
        self.holders: dict[int, set[bool]] = {}  # storage -> whether such a module saved it, others, or both
        self.sizes: dict[int, int] = {}
        self.deferred_errors = 0  # bytes that such modules return, and so of the errors that come to them
        self.inside = 0

    def note(self, tensor: Tensor) -> Tensor:
        """A hook for what is saved."""
        self.holders.setdefault(storage_of(tensor), set()).add(self.inside > 0)
        self.sizes[storage_of(tensor)] = storage_bytes(tensor)
        return tensor.detach()  # the tensor itself would keep a graph alive that is dropped without a backward

    def weight_layers_graph(self, apart: Iterable[int]) -> int:
        """Bytes that only such modules saved, without some storages."""
        return sum(self.sizes[one] for one in self.holders.keys() - set(apart) if self.holders[one] == {True})

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Within it, the module's forward is looked at."""
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
        self.deferred_errors += sum(x.nbytes for x in tree_leaves(out) if isinstance(x, Tensor))


def _with_error(out: Tensor, live: LiveBytes) -> Tensor:
    """A number whose gradient sends an error as large as `out` into it, which nobody holds but the backward."""
    shape, strides = out.shape, out.stride()

    def fresh(error: Tensor) -> Tensor:
        live.setting_apart = True
        try:
            return torch.empty_strided(shape, strides, dtype=error.dtype, device=error.device).fill_(1)
        finally:
            live.setting_apart = False

    out.register_hook(fresh)  # type: ignore[no-untyped-call]
    return out.sum()
