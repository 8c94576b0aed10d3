"""Makes tensors of numpy's arrays and of lists of numbers, wherever they stand in a tree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from delock.errors import UsageError
from delock.tensors import Tree, layout


def with_tensors(tree: Any, *, lists: bool = False) -> Tree:
    """Returns the tree with a tensor in place of every numpy array and number, and a dict in place of every other mapping.

    An array's memory is shared where torch can. lists: lists and tuples of plain numbers become tensors, too.
    Raises UsageError for an array that no tensor can hold.
    """
    if isinstance(tree, np.ndarray | np.generic):
        return tensor_of(tree)
    if isinstance(tree, Mapping):
        return {name: with_tensors(item, lists=lists) for name, item in tree.items()}
    if not isinstance(tree, tuple | list) or hasattr(tree, "_fields"):
        return tree
    if lists and tree and all(isinstance(item, bool | int | float) for item in tree):
        return torch.tensor(tree)
    return type(tree)([with_tensors(item, lists=lists) for item in tree]) if type(tree) in (tuple, list) else tree


def targets_of(tree: Any) -> Tree:
    """Returns targets with a tensor in place of every array and list of numbers; of a number, too, where it is all there is."""
    is_number = isinstance(tree, bool | int | float) and not isinstance(tree, np.generic)
    return torch.tensor(tree) if is_number else with_tensors(tree, lists=True)


def tensor_of(array: np.ndarray[Any, Any] | np.generic) -> Tensor:
    """Returns an array as a tensor. It is copied only where torch would warn or fail: read-only, other byte order, negative strides."""
    found = np.asarray(array)
    if not found.dtype.isnative:
        found = found.astype(found.dtype.newbyteorder("="))
    if not found.flags.writeable or any(stride < 0 for stride in found.strides):
        found = found.copy()
    try:
        return torch.from_numpy(found)
    except TypeError as error:
        raise UsageError(f"an array of {found.dtype} cannot become a tensor: give numbers that torch has") from error


def refuse_sparse(parts: Mapping[str, Tree]) -> None:
    """Raises UsageError for a tensor of a batch that is not dense. parts: of the batch, by what they are in words."""
    for name, part in parts.items():
        if found := layout(part):
            raise UsageError(
                f"{name} {found}, and only dense tensors go through stages: give a dense one, as delock.data.Batches(loader, inputs=f) "
                "makes with to_dense() in f(batch), or its indices and values as dense tensors with which forward computes, as by "
                "index_add; where their rows are no samples, samples=... says how many there are"
            )
