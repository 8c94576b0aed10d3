"""Lets tracers trace what they do not know by themselves, within a block: lengths, functions with a gradient of their own."""

from __future__ import annotations

import builtins
import contextlib
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.autograd import Function


@contextlib.contextmanager
def lengths() -> Iterator[None]:
    """Lets `len` of a traced value be a part of the graph, where Python itself would make a number of it that stays as it is.

    torch.fx knows its own remedy, `wrap`, only for the user's file.
    """
    before = builtins.len

    def length(of: Any, /) -> Any:
        if isinstance(of, fx.Proxy):
            return of.tracer.create_proxy("call_function", before, (of,), {})
        return of.shape[0] if isinstance(of, Tensor) and of.dim() else before(of)

    builtins.len = length
    try:
        yield
    finally:
        builtins.len = before


class Apply:
    """Calls the `apply` of a torch.autograd.Function. It can be called in a graph, and pickled if the class can."""

    def __init__(self, of: type[Function]) -> None:
        self.__name__ = self.__qualname__ = f"apply_{of.__name__}"
        self.__module__ = __name__
        self.of = of

    def __call__(self, *args: Any) -> Any:
        return self.of.apply(*args)


@contextlib.contextmanager
def own_gradients() -> Iterator[None]:
    """Keeps a torch.autograd.Function as one operation, with its own backward; tracing would look through its forward."""
    before = Function.__dict__["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        traced = next((one for one in args if isinstance(one, fx.Proxy)), None)
        if traced is None:
            return before.__get__(None, cls)(*args, **kwargs)
        return traced.tracer.create_proxy("call_function", Apply(cls), args, kwargs)

    Function.apply = classmethod(apply)
    try:
        yield
    finally:
        Function.apply = before


def items(value: Any, count: int) -> Any:
    """Returns a value from which `count` items are taken, as Python unpacks it: a tensor by unbind, whose gradient is made in one piece."""
    return value.unbind(0) if isinstance(value, Tensor) and len(value) == count else value


def unpack_at_once(graph: fx.Graph) -> None:
    """Lets `a, b, c = tensor` be one operation again; torch.fx makes three of it, each with a gradient as large as the tensor."""
    run: list[fx.Node] = []  # getitem nodes of one value, with the indices 0, 1, ...
    for node in [*graph.nodes]:
        if run and _is_item(node, len(run)) and node.args[0] is run[0].args[0]:
            run.append(node)
            continue
        _unpack(graph, run)
        run = [node] if _is_item(node, 0) else []


def _is_item(node: fx.Node, index: int) -> bool:
    return node.target is operator.getitem and type(node.args[1]) is int and node.args[1] == index


def _unpack(graph: fx.Graph, run: list[fx.Node]) -> None:
    if len(run) < 2:
        return
    with graph.inserting_before(run[0]):
        unpacked = graph.call_function(items, (run[0].args[0], len(run)))
    unpacked.meta = dict(run[0].meta)
    for node in run:
        node.update_arg(0, unpacked)


@contextlib.contextmanager
def transforms_ended() -> Iterator[None]:
    """Ends what torch.func's transforms leave when tracing fails inside them; else nothing could be drawn at random afterwards."""
    depth = getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", lambda: 0)()
    try:
        yield
    finally:
        if depth != getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", lambda: 0)():
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
