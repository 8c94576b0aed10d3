"""The bytes of a message, in one run: a short header, then every tensor where a view can use it in place.

    PREFIX | JSON text | pad | tensor | pad | tensor | pad      every tensor starts at a multiple of ALIGN

The text says what the tensors are. It is the same for all messages that are alike, so it is written and read once, not once per message.
"""

from __future__ import annotations

import ctypes
import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from delock.errors import LinkError
from delock.links.message import Message, MessageKind, MessageName
from delock.tensors import Tree, fills_memory, flatten, map_tensors, unflatten

PREFIX = struct.Struct("<qBqiidqdqq")  # bytes of all; kind, batch, loss, version; weight, samples, count, agreed; bytes of the text
KINDS = tuple(MessageKind)
ALIGN = 64  # bytes: a cache line, and what vector loads like
DTYPES: Mapping[str, torch.dtype] = MappingProxyType({str(one)[6:]: one for one in vars(torch).values() if isinstance(one, torch.dtype)})
Meta: TypeAlias = tuple[torch.dtype, tuple[int, ...], tuple[int, ...], bool]
"""Dtype, shape and strides of a tensor; True if it travels apart from the bytes."""


class Place(NamedTuple):
    """A tensor's place in the bytes, and its form there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    apart: bool
    offset: int  # in elements of its dtype


class MessageLayout(NamedTuple):
    """The order of the bytes of a message: a run has a handful of layouts, and each travels thousands of times."""

    text: bytes
    tree: Any
    places: tuple[Place, ...]
    length: int


class Buffer(NamedTuple):
    """Memory for a message: a uint8 tensor that begins at a multiple of ALIGN, and a view of it for every tensor that is to lie there."""

    packed: Tensor
    tensors: Sequence[Tensor]


def new_buffer(layout: MessageLayout) -> Buffer:
    """Returns memory that nothing else uses."""
    return buffer_views(torch.empty(layout.length, dtype=torch.uint8), layout)


def buffer_views(packed: Tensor, layout: MessageLayout) -> Buffer:
    """Returns that memory, with views of it."""
    return Buffer(packed, [_view(packed, place) for place in layout.places if not place.apart])


def pack(
    name: MessageName,
    message: Message,
    apart: Callable[[Tensor], bool] = lambda leaf: False,
    into: Callable[[MessageLayout], Buffer] = new_buffer,
) -> tuple[Tensor, list[Tensor]]:
    """Returns the message as one uint8 tensor on the CPU, and the tensors for which `apart` holds, which the caller sends by another way.

    Dense tensors keep their strides (channels_last stays so), others become contiguous. `into` gives the memory for a layout.
    """
    layout, leaves = _layout_of(message, apart)
    packed, tensors = into(layout)
    numbers = message.weight, message.samples, message.count, message.agreed
    head = PREFIX.pack(layout.length, name.kind, name.batch, name.loss, name.version, *numbers, len(layout.text))
    ctypes.memmove(packed.data_ptr(), head + layout.text, len(head) + len(layout.text))
    others = []
    inside = iter(tensors)
    for leaf, place in zip(leaves, layout.places, strict=True):
        if place.apart:
            others.append(_flat(leaf.detach() if place.strides == leaf.stride() else _dense_copy(leaf.detach())))
        else:
            next(inside).copy_(leaf.detach() if leaf.requires_grad else leaf)
    return packed, others


def packed_length(message: Message) -> int:
    """Returns the bytes that `pack` would make of the message."""
    return _layout_of(message, lambda leaf: False)[0].length


def length_of(start: Tensor) -> int:
    """Returns the bytes of the whole message whose first bytes these are."""
    return int(PREFIX.unpack(ctypes.string_at(start.data_ptr(), PREFIX.size))[0])


def unpack(packed: Tensor, device: torch.device, fetch: Callable[[list[Tensor]], None] | None = None) -> tuple[MessageName, Message]:
    """Returns name and message on that device; on the CPU the tensors are views of `packed`. `fetch` fills tensors that travelled apart."""
    name, layout, numbers = _read_header(packed.numpy().data)
    if fetch is None and any(place.apart for place in layout.places):
        raise LinkError("a message says that tensors travel apart from it, where none do")
    if device.type != "cpu" and not all(place.apart for place in layout.places):
        packed = packed.to(device)
    leaves = [
        torch.empty_strided(place.shape, place.strides, dtype=place.dtype, device=device) if place.apart else _view(packed, place)
        for place in layout.places
    ]
    if fetch:
        fetch([_flat(leaf) for leaf, place in zip(leaves, layout.places, strict=True) if place.apart])
    values, targets = unflatten(layout.tree, leaves)
    return name, Message(values, targets, *numbers)


def unpack_borrowed(memory: memoryview) -> tuple[MessageName, Message]:
    """Returns name and message that lie in memory of another owner: every tensor in it holds on to `memory`, and nothing else does."""
    name, layout, numbers = _read_header(memory)
    values, targets = unflatten(layout.tree, [_borrowed_view(memory, place) for place in layout.places])
    return name, Message(values, targets, *numbers)


def _read_header(memory: memoryview) -> tuple[MessageName, MessageLayout, tuple[float, int, float, int]]:
    """Returns what a message begins with: its name, its layout; weight, samples, count and agreed tick."""
    _, kind, batch, loss, version, weight, samples, count, agreed, chars = PREFIX.unpack_from(memory)
    layout = _read_layout(bytes(memory[PREFIX.size : PREFIX.size + chars]))
    return MessageName(KINDS[kind], batch, loss, version), layout, (weight, samples, count, agreed)


def _borrowed_view(memory: memoryview, place: Place) -> Tensor:
    count = math.prod(place.shape)
    if count == 0:
        return torch.empty_strided(place.shape, place.strides, dtype=place.dtype)
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset * place.dtype.itemsize)
    return flat.as_strided(place.shape, place.strides)


def _flat(leaf: Tensor) -> Tensor:
    """Returns a dense tensor's memory as one row."""
    return leaf.as_strided((leaf.numel(),), (1,))


def _view(packed: Tensor, place: Place) -> Tensor:
    return packed.view(place.dtype).as_strided(place.shape, place.strides, place.offset)


def _layout_of(message: Message, apart: Callable[[Tensor], bool]) -> tuple[MessageLayout, list[Tensor]]:
    tree, leaves = flatten((message.values, message.targets))
    return _layout(tree, tuple([(leaf.dtype, leaf.shape, leaf.stride(), apart(leaf)) for leaf in leaves])), leaves


@lru_cache(maxsize=256)  # the layouts of a run are few, and the text takes longer to write than a small message to send
def _layout(tree: Any, metas: tuple[Meta, ...]) -> MessageLayout:
    """Lays the tensors of that tree out, each as dense as it can be."""
    dense = [(dtype, tuple(shape), _dense(shape, strides), apart) for dtype, shape, strides, apart in metas]
    text = json.dumps([tree, [(str(dtype)[6:], *rest) for dtype, *rest in dense]], separators=(",", ":")).encode()
    return MessageLayout(text, tree, *_places(PREFIX.size + len(text), dense))


@lru_cache(maxsize=256)  # likewise of the texts that come
def _read_layout(text: bytes) -> MessageLayout:
    """Returns the same layout on the other side, from the header."""
    tree, listed = json.loads(text)
    metas = [(DTYPES[dtype], tuple(shape), tuple(strides), apart) for dtype, shape, strides, apart in listed]
    return MessageLayout(text, tree, *_places(PREFIX.size + len(text), metas))


def _places(end: int, metas: list[Meta]) -> tuple[tuple[Place, ...], int]:
    """Places tensors after `end` bytes; also returns the bytes of all, whole ALIGNs, so that they can be viewed as any dtype."""
    places = []
    for dtype, shape, strides, apart in metas:
        start = _aligned(end)
        places.append(Place(dtype, shape, strides, apart, start // dtype.itemsize))
        end = start + (0 if apart else torch.Size(shape).numel() * dtype.itemsize)
    return tuple(places), _aligned(end)


def _aligned(length: int) -> int:
    return -(-length // ALIGN) * ALIGN


@lru_cache(maxsize=256)  # asked for every tensor that a mailbox takes
def _dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> tuple[int, ...]:
    """Returns these strides where they fill memory without gaps or overlaps, else those of a contiguous tensor."""
    return strides if fills_memory(shape, strides) else torch.empty(shape, device="meta").stride()


def make_dense(tree: Tree) -> Tree:
    """Returns the tree as it would arrive over a wire: dense strides, aligned memory, so that kernels add in the same order everywhere."""
    return map_tensors(lambda leaf: leaf if _is_dense(leaf) else _dense_copy(leaf), tree)


def _is_dense(leaf: Tensor) -> bool:
    return _dense(leaf.shape, leaf.stride()) == leaf.stride() and leaf.data_ptr() % ALIGN == 0


def _dense_copy(leaf: Tensor) -> Tensor:
    strides = _dense(leaf.shape, leaf.stride())
    return torch.empty_strided(leaf.shape, strides, dtype=leaf.dtype, device=leaf.device).copy_(leaf)
