"""Lets torch.fx trace what it does not know by itself, within a block: lengths, functions with a gradient of their own."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.autograd import Function


@contextlib.contextmanager
def lengths() -> Iterator[None]:
    """Lets `len` of a traced value be a part of the graph; torch.fx knows its own remedy, `wrap`, only for the user's file."""
    before = builtins.len

    def length(of: Any, /) -> Any:
        return of.tracer.create_proxy("call_function", before, (of,), {}) if isinstance(of, fx.Proxy) else before(of)

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


@contextlib.contextmanager
def transforms_ended() -> Iterator[None]:
    """Ends what torch.func's transforms leave when tracing fails inside them; else nothing could be drawn at random afterwards."""
    depth = getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", lambda: 0)()
    try:
        yield
    finally:
        if depth != getattr(torch._C._functorch, "get_dynamic_layer_stack_depth", lambda: 0)():
            torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
