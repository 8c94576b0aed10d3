"""The tensors in what a stage takes and gives, a tensor or a tuple of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

from delock.errors import UsageError

Tree: TypeAlias = Any
"""Tensors in tuples, lists and dicts with string keys; None and plain numbers and strings may stand among them."""


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


def flatten(tree: Tree, leaves: list[Tensor]) -> Any:
    """Append the tensors of a tree to `leaves` and return its shape, in nested tuples. Raises UsageError for what cannot travel."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return ("t", len(leaves) - 1)
    if hasattr(tree, "_fields"):
        raise UsageError(f"a {type(tree).__name__} is a named tuple, which would arrive as a plain one: use a tuple or a dict")
    if isinstance(tree, tuple | list):
        return ("u" if isinstance(tree, tuple) else "l", *[flatten(item, leaves) for item in tree])
    if isinstance(tree, dict) and all(isinstance(name, str) for name in tree):
        return ("d", *[(name, flatten(item, leaves)) for name, item in tree.items()])
    if tree is None or isinstance(tree, bool | int | float | str):
        return ("c", repr(tree), tree)  # repr, because 1, 1.0 and True are equal, and layouts are looked up by equality
    raise UsageError(f"a {type(tree).__name__} cannot travel between stages: use tensors in tuples, lists and dicts with string keys")


def unflatten(shape: Any, leaves: list[Tensor]) -> Tree:
    """The tree that `flatten` took apart."""
    kind = shape[0]
    if kind == "t":
        return leaves[shape[1]]
    if kind == "c":
        return shape[2]
    if kind == "d":
        return {name: unflatten(item, leaves) for name, item in shape[1:]}
    items = [unflatten(item, leaves) for item in shape[1:]]
    return tuple(items) if kind == "u" else items
