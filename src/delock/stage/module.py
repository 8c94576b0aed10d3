"""A stage's module as a function of a batch: of its input, its weights, and the number that its random draws are seeded with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.prune import BasePruningMethod

from delock.checkpoints.encoding import copied
from delock.errors import UsageError
from delock.execution import PLAIN, Modes, apply, lay_out_input, lay_out_weights, precision
from delock.keys import key
from delock.options import Execution
from delock.recomputation import Lender, Rereading
from delock.stage.average import Average
from delock.stage.buffers import BufferCopies, Buffers, buffers_of, cloned
from delock.stage.compiled import Compiled, statistics
from delock.stage.split_backward import Gradients
from delock.tensors import Value, address, floating, is_value, kind, like, same, tensors, with_leaves

Weights = dict[str, Tensor]
_REPARAMETRIZING = frozenset({"WeightNorm", "SpectralNorm"})


class ModuleFunction:
    """Calls a module, in training mode on a device, with a value: a tensor or a tuple of tensors; it returns a value.

    execution: how it computes; if it is to be compiled, `rehearse` must compile it before it is used.
    name: dropout draws from torch's default generator of the device, seeded with key(*name, batch) before every call that learns.
    """

    def __init__(self, module: nn.Module, name: tuple[int | str, ...], device: torch.device, execution: Execution = PLAIN) -> None:
        self.module, self.name, self.device, self.execution = lay_out_weights(execution, module.to(device)), name, device, execution
        self.modes = Modes(self.module)
        self.modes.train()
        self.compiled = Compiled(self.module) if execution.compile else None
        self.weights: Weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.own: frozenset[int] | None = None  # addresses of weights and buffers; None: not asked for yet
        self.clones_inputs: bool | None = None  # the module writes to its input; None: not seen yet
        self.recomputes: bool | None = None  # the module computes again in a backward; None: no whole backward has been seen yet
        self.written: tuple[str, ...] | None = None  # buffers that a forward writes to; None: not seen yet
        self.lender = Lender(self.module)
        self.copies = BufferCopies(self.module)
        self.average: Average | None = None  # to be evaluated in place of the weights
        self.extras = {name: one for name, one in module.named_modules() if _has_extra_state(one)}

    def __call__(
        self,
        batch: int,
        values: Value,
        leaves: tuple[Tensor, ...] = (),
        weights: Weights | None = None,
        is_replay: bool = False,
        buffers: Buffers | None = None,
    ) -> Value:
        """Returns f(values; weights), by default at the current weights, with `leaves` in place of the floating inputs.

        is_replay: the batch has gone forward before, so BatchNorm's statistics and all other buffers stay as they are, and the module sees
        copies of `buffers`, and of the current ones where these have none.
        """
        instead: dict[str, Any] = dict(weights or {})
        if is_replay:
            own = buffers_of(self.module)
            instead |= cloned({name: b for name, b in {**own, **(buffers or {})}.items() if b is not None or own.get(name) is not None})
        elif self.compiled:
            instead |= statistics(self.module)
        self.seed(batch)
        entered = self._enter(values, leaves)
        module, under = (self.compiled, "inner.") if self.compiled else (self.module, "")
        if not instead:
            return self._checked(apply(self.execution, module, entered, self.device))
        named = {f"{under}{name}": tensor for name, tensor in instead.items()}
        return self._checked(apply(self.execution, lambda given: functional_call(module, named, (given,)), entered, self.device))

    def rehearse(self, values: Value, leaves: tuple[Tensor, ...], what: str) -> Value:
        """Compiles forward and backward for inputs like these. Returns outputs, with a graph.

        Weights and buffers stay as they are. Raises UsageError, about `what`, where torch.compile cannot.
        """
        compiled, self.compiled = self.compiled, None
        assert compiled is not None
        with torch.no_grad():
            self(0, values, leaves, is_replay=True)  # sees whether the inputs are written to, and fails as the module fails
        self.compiled = compiled
        with compiled.compiling(what):
            with torch.enable_grad():
                outputs = self(0, values, leaves, is_replay=True)
            roots = [h for h in floating(outputs) if h.requires_grad]
            wanted = [t for t in (*leaves, *self.weights.values()) if t.requires_grad]
            if roots:  # kept, as by the first of several losses: else the graph could be gone through only once
                torch.autograd.grad(roots, wanted, [torch.ones_like(h) for h in roots], retain_graph=True, allow_unused=True)
        return outputs

    def evaluate(self, values: Value) -> Value:
        """Returns f(values) in eval mode, without a graph: at the average of the weights where that is to be evaluated."""
        self.module.eval()
        weights = self.average.weights if self.average else {}
        try:
            with torch.no_grad(), precision(self.execution, self.device):
                entered = self._enter(values, ())
                return self._checked(functional_call(self.module, weights, (entered,)) if weights else self.module(entered))
        finally:
            self.modes.train()

    def _checked(self, outputs: Any) -> Value:
        """Returns the module's outputs. Raises UsageError if they are not made of tensors, as they were when the layers were measured."""
        if not is_value(outputs):
            *_, last = (self.module, *self.module.children())
            whose = "head" if "head" in self.name else f"last layer ({type(last).__name__})"
            who = f"the {whose}" + "".join(f" of stage {k}" for k in self.name[1:2])
            raise UsageError(f"{who} returns {kind(outputs)}, and only a tensor or a tuple of tensors can go from layer to layer: wrap it")
        found: Value = outputs
        return found

    def buffers(self, *, resumable: bool = False) -> Buffers | None:
        """Returns copies of the buffers as they are now, before a forward, where a backward may compute again; else None.

        resumable: the graph may be built again, and is to find them as they were.
        """
        if resumable:
            return self.copies.take(self.written)
        return cloned(buffers_of(self.module)) if self.recomputes is not False else None

    def note_written(self, before: Buffers) -> None:
        """Notes, once, which buffers a forward has written to; `before`: copies of all. Versions would not tell: batch norm hides its."""
        if self.written is None:
            own = buffers_of(self.module)
            self.written = tuple(name for name, was in before.items() if name in own and not same(own[name], was))

    def extra_state(self) -> dict[str, Any] | None:
        """Returns a copy of what modules have as extra state (`get_extra_state`), by their names; None if none has any."""
        return copied({name: one.get_extra_state() for name, one in self.extras.items()}, "extra state") if self.extras else None

    @contextmanager
    def with_extra_state(self, extra: Mapping[str, Any] | None) -> Iterator[None]:
        """Gives modules another extra state within the block."""
        now = self.extra_state()
        self._set_extra_state(extra)
        try:
            yield
        finally:
            self._set_extra_state(now)

    def _set_extra_state(self, extra: Mapping[str, Any] | None) -> None:
        for name, state in (extra or {}).items():
            self.extras[name].set_extra_state(state)

    def differentiate(
        self, take: Callable[[], Gradients], weights: Weights | None, buffers: Buffers | None, whole: bool = True
    ) -> Gradients:
        """Returns take(), gradients through a graph of the module, which is lent what it had in that forward if it computes again.

        weights: None if they are the current ones. whole: all weights' gradients are taken, so that one look is enough to know that nothing
        is computed again.
        """
        if self.recomputes is False:
            return take()
        lent = {**(weights or {}), **cloned(buffers or {})}  # a backward may write to buffers, and another one may follow
        if self.recomputes:
            return self.lender.lend(lent, take)
        reading = Rereading(self.module)

        def watched() -> Gradients:
            with reading:
                return take()

        found = self.lender.lend(lent, watched)
        if whole or reading.seen:
            self.recomputes = reading.seen
        return found

    def sent(self, outputs: Value) -> Value:
        """Returns outputs cut off from any graph. One that lies in a weight or buffer is copied: an Update would change it under way."""
        if self.own is None:
            self.own = frozenset(map(address, (*self.module.parameters(), *self.module.buffers())))
        own = self.own.union(map(address, self.average.weights.values())) if self.average else self.own
        return like(outputs, [t.detach().clone() if address(t) in own else t.detach() for t in tensors(outputs)])

    def _enter(self, values: Value, leaves: tuple[Tensor, ...]) -> Value:
        """Returns the module's argument, cloned if the module writes to it."""
        clone = self.clones_inputs is not False
        entered = [lay_out_input(self.execution, t.clone() if clone else t) for t in with_leaves(values, leaves)]
        if self.clones_inputs is None and hasattr(Tensor, "_version"):  # without that counter every call clones
            self._watch(entered)
        return like(values, entered)

    def _watch(self, entered: list[Tensor]) -> None:
        """Notes after the first call if the inputs were written to, so that later calls clone only if they must."""
        before = [t._version for t in entered]

        def look(*_: Any) -> None:
            handle.remove()
            self.clones_inputs = any(t._version != was for t, was in zip(entered, before, strict=True))

        handle = self.module.register_forward_hook(look)

    def seed(self, *what: int | str) -> None:
        """Seeds torch's default generator for a forward, by its batch, or for anything else that may draw."""
        if self.execution.captured:  # the module draws nothing, and a GPU cannot be seeded while it records
            return
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):  # manual_seed means the current GPU
                torch.cuda.manual_seed(key(*self.name, *what))
        else:
            torch.default_generator.manual_seed(key(*self.name, *what))


def copies(weights: Mapping[str, Tensor]) -> Weights:
    """Returns copies of the weights as they are now, as leaves of graphs to come."""
    return {name: nn.Parameter(w.detach().clone()) for name, w in weights.items()}  # Parameters, as compiled code expects


def _has_extra_state(module: nn.Module) -> bool:
    return type(module).get_extra_state is not nn.Module.get_extra_state


def refuse_derived_weights(module: nn.Module) -> None:
    """Raises UsageError for a parametrized module: at="mixed" needs graphs of the weights themselves, and its graph has a derived copy."""
    for name, child in module.named_modules():
        hooks = child._forward_pre_hooks.values()
        old_style = any(type(hook).__name__ in _REPARAMETRIZING or isinstance(hook, BasePruningMethod) for hook in hooks)
        if old_style or nn.utils.parametrize.is_parametrized(child):
            raise UsageError(
                f'at="mixed" cannot be computed for {name or "the module"}: weight_norm, spectral_norm, pruning and other '
                'parametrizations make a copy of the weights that the graph keeps, so the result would silently be at="stash"; '
                'use at="stash"'
            )
