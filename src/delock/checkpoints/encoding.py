"""Turns a tree of plain values and tensors into JSON and named tensors, and back. Nothing that is read here can run code.

    None, True, 3, 0.5, "text"      themselves; a float that JSON lacks as {"float": "inf"}
    [a, b]                          [a, b]
    (a, b)                          {"tuple": [a, b]}
    {1: a, "x": b}                  {"dict": [[1, a], ["x", b]]}; a key is None, a bool, an int, a text, or a tuple of these
    a tensor                        {"tensor": "7", "strides": [3, 1]}; the same name twice is the same tensor twice.
                                    "offset": 60 says that it begins 60 bytes behind a multiple of LINE, as a part of a batch may

All other kinds of values are refused by the place at which they lie.

Why the offset: on some processors a product of matrices differs in its last bits with the place of a matrix in memory, and a run that goes
on must be the run that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from delock.checkpoints.files import NAMES
from delock.errors import UsageError

Structure: TypeAlias = Any
"""A value that JSON holds: None, bool, int, float, str, lists, and objects with text keys."""
Key: TypeAlias = bool | int | str | tuple[Any, ...] | None

LINE = 64  # bytes: a cache line; torch's own memory begins at a multiple of it


def encode(tree: Any, what: str = "state", prefix: str = "") -> tuple[Structure, dict[str, Tensor]]:
    """Returns the structure of a tree, and its tensors by the names that stand in it, which begin with `prefix`.

    A tensor keeps its strides, also where they are not those of a dense one. `what` names the tree in errors. Raises UsageError for a value
    of another kind.
    """
    encoder = _Encoder(prefix)
    return encoder.encode(tree, what), encoder.tensors


def decode(structure: Structure, tensors: Mapping[str, Tensor]) -> Any:
    """Returns the tree. Raises UsageError if the structure is not one that `encode` makes, or names a tensor that is not there."""
    return _Decoder(tensors).decode(structure)


def copied(tree: Any, what: str = "state", lasting: Collection[int] = ()) -> Any:
    """Returns the tree with a copy of every tensor, one for all its places. Raises UsageError as `encode` does.

    lasting: addresses of memory that nobody will write to; tensors in it are not copied.
    """
    structure, tensors = encode(tree, what)
    return decode(structure, {name: one if one.untyped_storage().data_ptr() in lasting else _copy(one) for name, one in tensors.items()})


class _Encoder:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.tensors: dict[str, Tensor] = {}
        self.names: dict[tuple[Any, ...], str] = {}

    def encode(self, value: Any, where: str) -> Structure:
        match value:
            case None | bool() | int() | str() if type(value) in (type(None), bool, int, str):
                return value
            case float() if type(value) is float:
                return value if math.isfinite(value) else {"float": str(value)}
            case Tensor():
                name = self.name(value, where)
                beside = {"offset": offset} if (offset := _offset(value)) else {}
                return {"tensor": name, "strides": list(value.stride()), **beside}
            case list():
                return [self.encode(one, f"{where}[{i}]") for i, one in enumerate(value)]
            case tuple() if type(value) is tuple:
                return {"tuple": [self.encode(one, f"{where}[{i}]") for i, one in enumerate(value)]}
            case Mapping():
                return {"dict": [[_key(key, where), self.encode(one, f"{where}[{key!r}]")] for key, one in value.items()]}
            case _:
                raise UsageError(f"{where} is a {type(value).__name__}, which a checkpoint cannot keep: {_remedy(value)}")

    def name(self, tensor: Tensor, where: str) -> str:
        """Returns the name of a tensor; the same one for the same memory with the same shape."""
        if tensor.layout != torch.strided:
            raise UsageError(f"{where} is a tensor of layout {tensor.layout}, which a checkpoint cannot keep: make it dense")
        if hasattr(type(tensor), "__tensor_flatten__"):
            raise UsageError(
                f"{where} is a {type(tensor).__name__}, made of several tensors, which a checkpoint cannot keep: make it a plain one"
            )
        if tensor.dtype not in NAMES and tensor.dtype != torch.complex128:
            raise UsageError(f"{where} is a tensor of {str(tensor.dtype)[6:]}, which a checkpoint cannot keep: use another dtype")
        marks = tensor.is_conj(), tensor.is_neg()  # if the values are conjugates, or negatives, of what lies in memory
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.numel() or id(tensor), marks)
        if place not in self.names:
            self.names[place] = f"{self.prefix}{len(self.names)}"
            self.tensors[self.names[place]] = tensor.detach().resolve_conj().resolve_neg()
        return self.names[place]


class _Decoder:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors, self.made = tensors, dict[tuple[str, tuple[int, ...], int], Tensor]()

    def decode(self, structure: Structure) -> Any:
        match structure:
            case None | bool() | int() | float() | str():
                return structure
            case list():
                return [self.decode(one) for one in structure]
            case {"float": "inf" | "-inf" | "nan" as text, **rest} if not rest:
                return float(text)
            case {"tuple": list(values), **rest} if not rest:
                return tuple(self.decode(one) for one in values)
            case {"dict": list(pairs), **rest} if not rest:
                return dict(self.pair(one) for one in pairs)
            case {"tensor": str(name), "strides": list(strides), **rest} if not rest and name in self.tensors:
                return self.tensor(name, strides)
            case {"tensor": str(name), "strides": list(strides), "offset": offset, **rest} if not rest and name in self.tensors:
                return self.tensor(name, strides, offset)
            case _:
                raise UsageError(f"this is not a checkpoint's structure: {str(structure)[:80]}")

    def pair(self, pair: Structure) -> tuple[Key, Any]:
        match pair:
            case [key, value]:
                found = self.decode(key)
                return _key_of(found), self.decode(value)
            case _:
                raise UsageError(f"this is not an entry of a checkpoint's structure: {str(pair)[:80]}")

    def tensor(self, name: str, strides: Sequence[Any], offset: Any = 0) -> Tensor:
        """Returns a tensor with these strides, at this offset; the same one for the same name."""
        dense = self.tensors[name]
        if len(strides) != dense.dim() or not all(type(one) is int and 0 <= one < 2**40 for one in strides):
            raise UsageError(f"tensor {name} has {dense.dim()} dimensions, but the strides {str(strides)[:80]}")
        if type(offset) is not int or not 0 <= offset < LINE or offset % dense.element_size():
            raise UsageError(f"the offset {str(offset)[:80]} of tensor {name} cannot be right: the file is damaged")
        place = name, tuple(strides), offset
        if place not in self.made:
            there = dense.stride() == place[1] and _offset(dense) == offset
            self.made[place] = dense if there else _placed(dense, place[1], offset // dense.element_size())
        return self.made[place]


def _offset(tensor: Tensor) -> int:
    """Returns the bytes by which a tensor begins behind a multiple of LINE."""
    return 0 if tensor.is_meta or not tensor.numel() else tensor.data_ptr() % LINE


def _copy(tensor: Tensor) -> Tensor:
    """Returns a copy that begins as far behind a multiple of LINE."""
    if not (offset := _offset(tensor)):
        return tensor.clone()
    return _placed(tensor, torch.empty_like(tensor, device="meta").stride(), offset // tensor.element_size())


def _placed(dense: Tensor, strides: tuple[int, ...], before: int) -> Tensor:
    """Returns the values with these strides, with room for `before` more in front.

    Raises UsageError if that would need far more memory than the values.
    """
    extent = 1 + sum((size - 1) * stride for size, stride in zip(dense.shape, strides, strict=True) if size)
    if extent > 64 * max(1, dense.numel()):
        raise UsageError(f"the strides {list(strides)} of a tensor of shape {list(dense.shape)} cannot be right: the file is damaged")
    if any(size > 1 and stride == 0 for size, stride in zip(dense.shape, strides, strict=True)):
        single = dense[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in strides)]
        return _placed(single, strides, before).expand(dense.shape)
    memory = torch.empty(before + extent, dtype=dense.dtype, device=dense.device)
    return memory.as_strided(tuple(dense.shape), strides, before).copy_(dense)


def _key(key: Any, where: str) -> Structure:
    if isinstance(key, tuple) and type(key) is tuple:
        return {"tuple": [_key(one, where) for one in key]}
    if type(key) in (type(None), bool, int, str):
        return key
    raise UsageError(f"{where} has a {type(key).__name__} as a key, which a checkpoint cannot keep: use numbers or texts")


def _key_of(found: Any) -> Key:
    if isinstance(found, tuple):
        return tuple(map(_key_of, found))
    if found is None or isinstance(found, bool | int | str):
        return found
    raise UsageError(f"this is not a key of a checkpoint's structure: {str(found)[:80]}")


def _remedy(value: Any) -> str:
    if callable(value):
        return "it is made from code; keep numbers in its place, or give an object with state_dict of numbers"
    return "keep numbers, texts, lists, dicts and tensors in its place"
