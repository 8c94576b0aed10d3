"""The tensors in what a stage takes and gives, a tensor or a tuple of tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from delock.links.message import Tree


def tensors(values: Tree) -> tuple[Tensor, ...]:
    """All of them, in order."""
    return (values,) if isinstance(values, Tensor) else tuple(values)


def is_floating(tensor: Tensor) -> bool:
    """Whether it may have a gradient; complex ones are floating too."""
    return tensor.is_floating_point() or tensor.is_complex()


def floating(values: Tree) -> list[Tensor]:
    """Those that may have a gradient: an error message holds one tensor for each."""
    return [t for t in tensors(values) if is_floating(t)]


def leaves_of(values: Tree, wanted: bool) -> tuple[Tensor, ...]:
    """The floating ones, cut off from any graph, as the beginnings of a new one."""
    return tuple(t.detach().requires_grad_(wanted) for t in floating(values))


def with_leaves(values: Tree, leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """All of them, with the leaves in place of the floating ones (none where there are no leaves)."""
    source: Iterator[Tensor] = iter(leaves)
    return [next(source) if leaves and is_floating(t) else t for t in tensors(values)]


def like(values: Tree, new: list[Tensor]) -> Tree:
    """The new tensors in the form of the old: one alone, or a tuple."""
    return new[0] if isinstance(values, Tensor) else tuple(new)


def address(tensor: Tensor) -> int:
    """Where its memory begins; 0 for layouts without one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0
