"""A value is a tensor or a tuple of tensors: a stage takes one and gives one. A tree is any nest of tensors: labels, and what travels.

This is the one place that takes values and trees apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor

from delock.errors import UsageError

Value: TypeAlias = Tensor | tuple[Tensor, ...]
Tree: TypeAlias = Any
"""Tensors in tuples, lists and dicts with string keys; None and plain numbers and strings may stand among them. A Value is a Tree."""

# ---- values ------------------------------------------------------------------------------------------------------------------------


def tensors(value: Value) -> tuple[Tensor, ...]:
    """Returns the tensors of a value, in order."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def like(value: Value, new: Sequence[Tensor]) -> Value:
    """Returns new tensors in the form of a value: one alone, or a tuple."""
    return new[0] if isinstance(value, Tensor) else tuple(new)


def is_floating(tensor: Tensor) -> bool:
    """Says whether a tensor may have a gradient; complex ones may, too."""
    return tensor.is_floating_point() or tensor.is_complex()


def floating(value: Value) -> list[Tensor]:
    """Returns the tensors that may have a gradient; an error message holds one tensor for each."""
    return [t for t in tensors(value) if is_floating(t)]


def leaves_of(value: Value, wanted: bool) -> tuple[Tensor, ...]:
    """Returns the floating tensors cut off from any graph, as the beginnings of a new one; `wanted`: their gradients will be."""
    return tuple(t.detach().requires_grad_(wanted) for t in floating(value))


def with_leaves(value: Value, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Returns the tensors of a value with the leaves in place of the floating ones, or as they are if there are no leaves."""
    source = iter(leaves)
    return [next(source) if leaves and is_floating(t) else t for t in tensors(value)]


def address(tensor: Tensor) -> int:
    """Returns where the tensor's memory begins; 0 for layouts without one."""
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def fills_memory(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Returns True if such elements fill their memory without gaps and overlaps, in any order, as those of channels_last do."""
    expected = 1
    for size, stride in sorted(zip(shape, strides, strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Returns True for tensors of one shape and dtype with the same elements, where NaN equals NaN; None is the same as None."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.layout == torch.sparse_coo == b.layout:
        a, b = a.to_dense(), b.to_dense()
    return bool(torch.equal(a, b) or torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)))


# ---- trees -------------------------------------------------------------------------------------------------------------------------


def tree_tensors(tree: Tree) -> Iterator[Tensor]:
    """Yields the tensors of a tree, in order. What cannot travel may stand in it and is passed over."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple | list | dict):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tree_tensors(item)


def lengths(tree: Tree) -> set[int]:
    """Returns the numbers of rows that the tensors of a tree have."""
    return {len(one) for one in tree_tensors(tree) if one.dim()}


def map_tensors(act: Callable[[Tensor], Tensor], tree: Tree) -> Tree:
    """Returns the tree with act(tensor) in place of every tensor. Raises UsageError for what cannot travel."""
    if isinstance(tree, Tensor):
        return act(tree)
    shape, leaves = flatten(tree)
    return unflatten(shape, [act(leaf) for leaf in leaves])


def layout(tree: Tree) -> str:
    """Returns what the first tensor of a tree is that is not dense, in words; "" if all are."""
    other = next((one for one in tree_tensors(tree) if one.is_nested or one.layout != torch.strided), None)
    if other is None:
        return ""
    kind = "nested" if other.is_nested else "sparse" if "sparse" in str(other.layout) else "packed"
    return f"a {kind} tensor ({other.layout})"


def rows(tree: Tree, begin: int, end: int, count: int) -> Tree:
    """Returns the tree with rows begin to end of every tensor that has `count` of them, one per sample; other tensors stay whole."""
    return map_tensors(lambda leaf: leaf[begin:end] if leaf.dim() and len(leaf) == count else leaf, tree)


def has_list_of(tree: Tree, count: int) -> bool:
    """Returns True if a list in a tree has `count` entries, and these are not all tensors with `count` rows."""
    if isinstance(tree, list) and len(tree) == count:
        return not all(isinstance(one, Tensor) and one.dim() and len(one) == count for one in tree)
    entries = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list | tuple) else ()
    return any(has_list_of(one, count) for one in entries)


def split_bounds(count: int, parts: int) -> list[tuple[int, int]]:
    """Returns the first row, and the one after the last, of every part: the first count % parts parts have one row more."""
    edges = [i * (count // parts) + min(i, count % parts) for i in range(parts + 1)]
    return list(pairwise(edges))


def flatten(tree: Tree) -> tuple[Any, list[Tensor]]:
    """Returns the shape of a tree, in nested tuples of plain values, and its tensors. Raises UsageError for what cannot travel."""
    leaves: list[Tensor] = []
    return _shape(tree, leaves), leaves


def unflatten(shape: Any, leaves: Sequence[Tensor]) -> Tree:
    """Returns the tree that `flatten` took apart, with these tensors."""
    kind = shape[0]
    if kind == "t":
        return leaves[shape[1]]
    if kind == "c":
        return shape[2]
    if kind == "d":
        return {name: unflatten(item, leaves) for name, item in shape[1:]}
    items = [unflatten(item, leaves) for item in shape[1:]]
    return tuple(items) if kind == "u" else items


def _shape(tree: Tree, leaves: list[Tensor]) -> Any:
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return ("t", len(leaves) - 1)
    if hasattr(tree, "_fields"):
        raise UsageError(f"a {type(tree).__name__} is a named tuple, which would arrive as a plain one: use a tuple or a dict")
    if isinstance(tree, tuple | list):
        return ("u" if isinstance(tree, tuple) else "l", *[_shape(item, leaves) for item in tree])
    if isinstance(tree, dict) and all(isinstance(name, str) for name in tree):
        return ("d", *[(name, _shape(item, leaves)) for name, item in tree.items()])
    if tree is None or isinstance(tree, bool | int | float | str):
        return ("c", repr(tree), tree)  # repr, because 1, 1.0 and True are equal, and layouts are looked up by equality
    raise UsageError(f"a {type(tree).__name__} cannot travel between stages: use tensors in tuples, lists and dicts with string keys")


# ---- in words ----------------------------------------------------------------------------------------------------------------------


def shown(tree: Any, *, values: bool = False) -> str:
    """Returns the shape and dtype of every tensor of a tree in words, as errors show it; values: the range of each, too."""
    found = list(tree_tensors(tree))
    if not found:
        return kind(tree)
    return ", ".join(f"{tuple(x.shape)} {str(x.dtype).removeprefix('torch.')}{_range(x) if values else ''}" for x in found)


def _range(x: Tensor) -> str:
    """Returns the least and the largest number of a tensor in words; "" where it has none."""
    if not x.numel() or x.is_complex() or x.is_meta:
        return ""
    try:
        least, largest = (one.item() for one in x.detach().aminmax())
    except RuntimeError:  # a dtype without order, or a device that has failed
        return ""
    return f" from {least:g} to {largest:g}" if x.is_floating_point() else f" from {least} to {largest}"


def kind(value: object) -> str:
    """Returns what a value is in words: "a list of 2 (Tensor, NoneType)"."""
    if not isinstance(value, tuple | list):
        name = type(value).__name__
        return "None" if value is None else f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    inside = ", ".join(type(one).__name__ for one in value[:4]) + (", ..." if len(value) > 4 else "")
    return f"a {type(value).__name__} of {len(value)} ({inside})" if value else f"an empty {type(value).__name__}"


def is_value(value: object) -> bool:
    """Says whether something can go from layer to layer: a tensor, or a tuple of tensors."""
    return isinstance(value, Tensor) or (isinstance(value, tuple) and len(value) > 0 and all(isinstance(x, Tensor) for x in value))
