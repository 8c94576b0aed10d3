"""Refuses a model that does what a stage's copy of it would not do: hooks on weights, functions that hold some, lazy weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from delock.errors import UsageError
from delock.partition.holdings import beside, held, place
from delock.partition.layers import named_state


def refuse_hidden(model: nn.Module | Sequence[nn.Module]) -> None:
    """Raises UsageError for such a model, or a list of modules."""
    parts = [one for one in (model if isinstance(model, Sequence) else [model]) if isinstance(one, nn.Module)]
    for i, part in enumerate(parts):
        _refuse(part, "" if isinstance(model, nn.Module) else f"{i}.")
    _refuse_fixed(model if isinstance(model, nn.Module) else nn.ModuleList(parts))


def _refuse_fixed(model: nn.Module) -> None:
    """Raises UsageError for state of the model that a function holds, as a hook: no copy of a module has a copy of the function."""
    names = {place(tensor): name for name, tensor in named_state(model)}
    for holder, one, fixed in held((path, one) for path, module in model.named_modules() for one in beside(module)):
        if fixed and isinstance(one, Tensor) and (name := names.get(place(one))):
            raise UsageError(
                f"{holder or 'the model'} has code, as a hook, that holds {name} by a closure or as a global: there it would stay as "
                "it is, because a stage trains a copy; let forward hand on what is needed"
            )


def _refuse(model: nn.Module, under: str) -> None:
    for name, weight in model.named_parameters():
        if is_lazy(weight):
            raise UsageError(f"{under}{name} has no shape yet, as in a Lazy module: call the model with a batch once, then train it")
        if weight._backward_hooks or getattr(weight, "_post_accumulate_grad_hooks", None):
            raise UsageError(
                f"{under}{name} has a hook on its gradient, which would not come along to its stage: remove it, and change the gradient in "
                "the optimizer, or in a parametrization of the weight"
            )
    for name, module in model.named_modules():
        if "forward" in vars(module) and not isinstance(module, ScriptModule):
            where = f"{under}{name}" or "the model"
            raise UsageError(
                f"{where} ({type(module).__name__}) has a forward of its own, put on the instance, which a copy in another process would "
                "call with this module's weights: make it a method of a class"
            )
