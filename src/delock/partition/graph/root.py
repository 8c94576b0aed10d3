"""Puts a model under a module whose forward takes tensors alone, and returns a tuple of tensors: what a tracer sees."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from delock.data.call import Call
from delock.errors import UsageError, said
from delock.execution import Modes
from delock.partition.graph.structure import Structure, take_apart

MODEL = "model"  # the name of the model under the root


class Root(nn.Module):
    """Calls the model with tensors, and takes what it returns apart. `structure`: of the last output.

    writes: a buffer that a forward has replaced is written instead, which a graph can say.
    """

    def __init__(self, model: nn.Module, call: Call, is_leaf: Callable[[Any], bool] | None = None) -> None:
        super().__init__()
        self.model, self.call, self.is_leaf = model, call, is_leaf or (lambda one: isinstance(one, Tensor))
        self.structure: Structure = ()
        self.writes = False
        self.training = model.training

    def run(self, *given: Any) -> tuple[Any, ...]:
        """Returns the tensors of what the model returns."""
        args, kwargs = self.call.arguments(given)
        before = [(module, name, buffer) for module in self.model.modules() for name, buffer in module._buffers.items()]
        leaves, self.structure = take_apart(self.model(*args, **kwargs), self.is_leaf)
        for module, name, buffer in before:
            if module._buffers[name] is not buffer:
                _replace(module, name, buffer, self.writes)
        return tuple(leaves)


def _replace(module: nn.Module, name: str, buffer: Tensor | None, writes: bool) -> None:
    """Lets a buffer be a copy of what a forward has put in its place. Raises UsageError for another kind of tensor."""
    now = module._buffers[name]
    if now is None or buffer is None or now.shape != buffer.shape or now.dtype != buffer.dtype:
        raise UsageError(
            f"the forward of a {type(module).__name__} puts another kind of tensor into its buffer {name}: let it keep its shape"
        )
    module._buffers[name] = buffer.copy_(now.detach()) if writes else now.detach().clone()


def root(model: nn.Module, call: Call, count: int, is_leaf: Callable[[Any], bool] | None = None) -> Root:
    """Returns a Root whose forward has `count` arguments by name, as tracers need them."""
    names = ", ".join(f"x{i}" for i in range(count))
    space: dict[str, Any] = {}
    exec(f"def forward(self, {names}):\n    return self.run({names})\n", space)
    made: Root = type("Root", (Root,), {"forward": space["forward"]})(model, call, is_leaf)
    return made


def shadow(model: nn.Module) -> nn.Module:
    """Returns a copy with parameters over the memory of the model's, and copies of all else: tracing may leave its marks there.

    Raises UsageError for a model that cannot be copied.
    """
    memo: dict[int, Any] = aliases(model.parameters())
    for module in model.modules():  # a tensor computed from weights, as by the old weight_norm, cannot be copied with its graph
        memo |= {id(one): one.detach() for one in vars(module).values() if isinstance(one, Tensor) and not one.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # copying raises whatever an object's own reduction raises
        raise UsageError(f"a {type(model).__name__} cannot be copied, which tracing needs: {said(error)}") from error


def aliases(weights: Iterable[nn.Parameter]) -> dict[int, nn.Parameter]:
    """Returns for parameters, by id, others over the same memory: their gradients are not those of the user's."""
    return {id(one): one if is_lazy(one) else nn.Parameter(one.detach(), one.requires_grad) for one in weights}


def in_mode(model: nn.Module, training: bool) -> nn.Module:
    """Returns a `shadow` in the mode in which the model is trained, or in eval mode."""
    own = shadow(model)
    modes = Modes(own, model.training)
    modes.train() if training else own.eval()
    return own
