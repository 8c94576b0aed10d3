"""Puts a model under a module whose forward takes tensors alone, and returns a tuple of tensors: what a tracer sees."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from delock.data.call import Call
from delock.partition.graph.structure import Structure, take_apart

MODEL = "model"  # the name of the model under the root


class Root(nn.Module):
    """Calls the model with tensors, and takes what it returns apart. `structure`: of the last output."""

    def __init__(self, model: nn.Module, call: Call, is_leaf: Callable[[Any], bool] | None = None) -> None:
        super().__init__()
        self.model, self.call, self.is_leaf = model, call, is_leaf or (lambda one: isinstance(one, Tensor))
        self.structure: Structure = ()

    def run(self, *given: Any) -> tuple[Any, ...]:
        """Returns the tensors of what the model returns."""
        args, kwargs = self.call.arguments(given)
        leaves, self.structure = take_apart(self.model(*args, **kwargs), self.is_leaf)
        return tuple(leaves)


def root(model: nn.Module, call: Call, count: int, is_leaf: Callable[[Any], bool] | None = None) -> Root:
    """Returns a Root whose forward has `count` arguments by name, as tracers need them."""
    names = ", ".join(f"x{i}" for i in range(count))
    space: dict[str, Any] = {}
    exec(f"def forward(self, {names}):\n    return self.run({names})\n", space)
    made: Root = type("Root", (Root,), {"forward": space["forward"]})(model, call, is_leaf)
    return made.train(model.training) if model.training == made.training else _with_mode(made, model.training)


def _with_mode(made: Root, training: bool) -> Root:
    made.training = training  # not train(), which would change the model's parts
    return made


def shadow(model: nn.Module) -> nn.Module:
    """Returns a copy with the model's own parameters and copies of all else: tracing may leave its marks there."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})
