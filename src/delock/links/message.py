"""What travels between stages, and how it lies in one run of bytes: a short header, then every tensor where a view can use it in place."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor

from delock.errors import UsageError

Name: TypeAlias = tuple[str, int, int]
"""What a message is: ("h", batch, 0) a training activation, ("e", batch, 0) an evaluation's, ("d", batch, loss) an error,
("n", update, 0) norms of gradients on their way down, ("t", update, 0) that of them all on its way up."""

Tree: TypeAlias = Any
"""Tensors in tuples, lists and dicts with string keys; None and plain numbers and strings may stand among them."""


@dataclass(frozen=True, slots=True)
class Message:
    """Tensors (or an error: a tuple with one tensor per floating input) and, on the way up, labels, weight of the loss, sample count.

    `values` is None for a part of a batch that has no samples.
    """

    values: Tree
    targets: Tree = None
    weight: float = 1.0
    samples: int = 0


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


def settle(tree: Tree) -> Tree:
    """The tree as it would arrive over a wire: dense strides and aligned memory, so that kernels add in the same order everywhere."""
    leaves: list[Tensor] = []
    shape = flatten(tree, leaves)
    return unflatten(shape, [leaf if _settled(leaf) else _settle(leaf) for leaf in leaves])


def _settled(leaf: Tensor) -> bool:
    return _strides(leaf) == leaf.stride() and leaf.data_ptr() % ALIGN == 0


def _settle(leaf: Tensor) -> Tensor:
    return torch.empty_strided(leaf.shape, _strides(leaf), dtype=leaf.dtype, device=leaf.device).copy_(leaf)


# layout of the bytes: PREFIX | JSON text | pad | tensor | pad | tensor ...      every tensor starts at a multiple of ALIGN
PREFIX = struct.Struct("<qcqqdqq")  # length of all, kind, batch, loss, weight, samples, length of the JSON text
ALIGN = 64  # bytes: a cache line, and what vector loads like

Meta: TypeAlias = tuple[str, tuple[int, ...], tuple[int, ...], bool]
"""A tensor in the header: dtype, shape, strides, and whether it travels apart from the bytes."""


def fresh(length: int) -> Tensor:
    """Memory for a message of so many bytes."""
    return torch.empty(length, dtype=torch.uint8)


def pack(
    name: Name, message: Message, apart: Callable[[Tensor], bool] = lambda leaf: False, room: Callable[[int], Tensor] = fresh
) -> tuple[Tensor, list[Tensor]]:
    """The message as one uint8 tensor on the CPU, and the tensors for which `apart` holds, which the caller sends by another way.

    Dense tensors keep their strides (channels_last stays so), others become contiguous. `room(bytes)`: where it is to lie, a uint8
    tensor of that length which begins at a multiple of ALIGN.
    """
    leaves: list[Tensor] = []
    tree = flatten((message.values, message.targets), leaves)
    metas = tuple((str(leaf.dtype)[6:], tuple(leaf.shape), _strides(leaf), apart(leaf)) for leaf in leaves)
    text, offsets, length = _layout(tree, metas)
    packed = room(length)
    head = PREFIX.pack(length, name[0].encode(), name[1], name[2], message.weight, message.samples, len(text)) + text
    packed[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    others = []
    for leaf, (_, shape, strides, elsewhere), offset in zip(leaves, metas, offsets, strict=True):
        if elsewhere:
            others.append(_line(leaf.detach() if _strides(leaf) == leaf.stride() else _settle(leaf.detach())))
        else:
            _view(packed, offset, leaf.dtype, shape, strides).copy_(leaf.detach())
    return packed, others


def packed_length(message: Message) -> int:
    """Bytes that `pack` would make of the message."""
    leaves: list[Tensor] = []
    tree = flatten((message.values, message.targets), leaves)
    metas = tuple((str(leaf.dtype)[6:], tuple(leaf.shape), _strides(leaf), False) for leaf in leaves)
    return _layout(tree, metas)[2]


def length_of(start: Tensor) -> int:
    """Bytes of the whole message whose first bytes these are."""
    return int(PREFIX.unpack(bytes(start[: PREFIX.size].numpy()))[0])


def unpack(packed: Tensor, device: torch.device, fetch: Callable[[list[Tensor]], None] | None = None) -> tuple[Name, Message]:
    """Name and message on that device; on the CPU the tensors are views of `packed`. `fetch` fills tensors that travelled apart."""
    _, kind, batch, loss, weight, count, chars = PREFIX.unpack(bytes(packed[: PREFIX.size].numpy()))
    tree, metas, offsets = _read_layout(bytes(packed[PREFIX.size : PREFIX.size + chars].numpy()))
    if not all(apart for *_, apart in metas):
        packed = packed.to(device)
    leaves = [
        torch.empty_strided(shape, strides, dtype=getattr(torch, dtype), device=device)
        if apart
        else _view(packed, offset, getattr(torch, dtype), shape, strides)
        for (dtype, shape, strides, apart), offset in zip(metas, offsets, strict=True)
    ]
    if fetch:
        fetch([_line(leaf) for leaf, (*_, apart) in zip(leaves, metas, strict=True) if apart])
    values, targets = unflatten(tree, leaves)
    return (kind.decode(), batch, loss), Message(values, targets, weight, count)


def _line(leaf: Tensor) -> Tensor:
    """A dense tensor's memory as one row."""
    return leaf.as_strided((leaf.numel(),), (1,))


def _strides(leaf: Tensor) -> tuple[int, ...]:
    """The tensor's own strides where it fills its memory without gaps or overlaps, else those of a contiguous one."""
    if leaf.is_contiguous():
        return leaf.stride()
    expected = 1
    for size, stride in sorted(zip(leaf.shape, leaf.stride(), strict=True), key=lambda pair: (pair[1], pair[0])):
        if size != 1:
            if stride != expected:
                return torch.empty(leaf.shape, device="meta").stride()
            expected *= size
    return leaf.stride()


@lru_cache(maxsize=256)  # a run has a handful of layouts, and each travels thousands of times
def _layout(tree: Any, metas: tuple[Meta, ...]) -> tuple[bytes, tuple[int, ...], int]:
    text = json.dumps([tree, metas], separators=(",", ":")).encode()
    return text, *_offsets(PREFIX.size + len(text), metas)


def _offsets(end: int, metas: tuple[Meta, ...]) -> tuple[tuple[int, ...], int]:
    offsets = []
    for dtype, shape, _, apart in metas:
        offsets.append(-(-end // ALIGN) * ALIGN)
        end = offsets[-1] + (0 if apart else torch.Size(shape).numel() * getattr(torch, dtype).itemsize)
    return tuple(offsets), end


@lru_cache(maxsize=256)
def _read_layout(text: bytes) -> tuple[Any, tuple[Meta, ...], tuple[int, ...]]:
    tree, listed = json.loads(text)
    metas = tuple((dtype, tuple(shape), tuple(strides), apart) for dtype, shape, strides, apart in listed)
    return tree, metas, _offsets(PREFIX.size + len(text), metas)[0]


def _view(packed: Tensor, offset: int, dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    count = torch.Size(shape).numel()
    return packed[offset : offset + count * dtype.itemsize].view(dtype).as_strided(shape, strides)
