"""A module that marks a place where a model may be cut into stages."""

from __future__ import annotations

from torch import Tensor, nn

from delock.errors import UsageError
from delock.tensors import Value, is_value, kind, like, tensors


class CutPoint(nn.Module):
    """Returns what it is given, a tensor or a tuple of tensors, and marks a place for a cut in front of it.

    It has no weights and computes nothing. A model with these is cut at some of them, unless `cuts` says where; in `cuts` a CutPoint has
    its path, as every module. In a forward each has one place: `h = self.cut1(h)`.
    """

    def forward(self, value: Value) -> Value:
        if not is_value(value):
            raise UsageError(f"a CutPoint is given {kind(value)}, but it takes a tensor or a tuple of tensors: give it what goes on")
        return like(value, [_same(one) for one in tensors(value)])


def _same(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)  # a view, because torch.export leaves no trace of a module that does nothing


def cut_points(model: nn.Module) -> list[str]:
    """Returns the paths of the CutPoints in a model."""
    return [path for path, module in model.named_modules() if isinstance(module, CutPoint)]
