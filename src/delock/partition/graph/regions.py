"""Keeps what torch.export traces under no_grad or autocast as one operation, which sets the same state around its own graph."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx

from delock.errors import UsageError
from delock.partition.graph.segment import Program

GRAD, AUTOCAST = "wrap_with_set_grad_enabled", "wrap_with_autocast"


class Region:
    """Runs a graph with gradients on or off, or under autocast. It can be called in a graph and pickled."""

    def __init__(self, number: int, kind: str, options: tuple[Any, ...], program: Program) -> None:
        self.__name__ = self.__qualname__ = f"region_{number}"
        self.__module__ = __name__
        self.number, self.kind, self.options, self.program = number, kind, options, program

    def __call__(self, *given: Any) -> Any:
        with self._state():
            return self.program.run(None, *given)

    def _state(self) -> AbstractContextManager[Any]:
        if self.kind == GRAD:
            return torch.set_grad_enabled(*self.options)
        device, dtype, enabled, cached = self.options
        return torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cached)


def keep_regions(graph: fx.Graph, owner: torch.nn.Module, count: int) -> None:
    """Replaces torch.export's operations that hold a graph by Regions. Raises UsageError for others. count: of regions so far."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        kind = node.target.__name__
        if kind not in (GRAD, AUTOCAST):
            raise UsageError(f"the model uses torch's {kind}, which cannot be cut")
        at = 1 if kind == GRAD else 4
        held = node.args[at]
        inner = getattr(owner, held.target)
        keep_regions(inner.graph, inner, count * 100 + 100)
        count += 1
        node.target = Region(count, kind, tuple(node.args[:at]), Program.of(inner.graph))
        node.args = tuple(node.args[at + 1 :])
        if not held.users:
            graph.erase_node(held)
