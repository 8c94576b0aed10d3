"""Refuses a model that does what a stage's copy of it would not do: hooks on weights, a forward put on an instance, lazy weights."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from delock.errors import UsageError


def refuse_hidden(model: nn.Module | Sequence[nn.Module]) -> None:
    """Raises UsageError for such a model, or a list of modules."""
    for i, part in enumerate(model if isinstance(model, Sequence) else [model]):
        if isinstance(part, nn.Module):
            _refuse(part, "" if isinstance(model, nn.Module) else f"{i}.")


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
