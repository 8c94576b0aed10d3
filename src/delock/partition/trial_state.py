"""Keeps the state of the user's functions over trials: what a loss counts or averages must begin with the first batch of the run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from delock.partition.code_names import loaded, stored
from delock.partition.graph.generators import Generators, is_generator
from delock.partition.holdings import content, held, of_library, slots
from delock.tensors import same

PutBack: TypeAlias = Callable[[], None]
DATA = (Dataset, DataLoader, Sampler)
HOLDING = (Tensor, np.ndarray, nn.Module, dict, list, set, deque, tuple, frozenset, partial, type, FunctionType, MethodType)


@contextmanager
def state_kept(functions: Iterable[object], models: Iterable[nn.Module]) -> Iterator[None]:
    """Lets calls of functions within the block leave no trace in what they hold: modules, objects, containers, closures, globals.

    models: what the functions may hold and is left as it is; so are data, and objects of libraries that are no modules, such as files.
    """
    functions = list(functions)
    given = {id(one) for function in functions for one in (function, getattr(function, "__self__", None))}
    parts = {id(one): one for model in models for one in model.modules()}
    own = {id(one) for function in functions if id(function) in parts for one in _state(parts[id(function)])}
    left = {id(one) for model in models for one in _state(model)} - own
    reached = held([("", one) for one in functions], lambda one: id(one) in left or (id(one) not in given and _passed(one)))
    owners = list({id(one): one for _, one, _ in reached}.values())
    draws = Generators(own=filter(is_generator, owners))
    with ExitStack() as back:
        back.callback(draws.put_back)
        for put_back in (put_back for one in owners for put_back in _of(one)):
            back.callback(put_back)
        yield


def _state(module: nn.Module) -> Iterator[object]:
    yield from (*module.modules(), *module.parameters(), *module.buffers())


def _passed(one: object) -> bool:
    """Returns True for data, and for objects of which it is not known how to put them back."""
    return isinstance(one, DATA) or not (isinstance(one, HOLDING) or is_generator(one) or not of_library(type(one)))


def _of(one: object) -> Iterator[PutBack]:
    """Yields what puts back the state of an object itself, without that of what it holds."""
    if isinstance(one, Tensor):
        if one.layout == torch.strided and not one.is_meta and not one.is_nested:
            yield partial(_put_tensor, one, one.detach().clone(), one.requires_grad)
            if one.is_leaf:
                yield partial(setattr, one, "grad", one.grad)
                yield from _of(one.grad)
    elif isinstance(one, np.ndarray):
        if one.flags.writeable:
            yield partial(np.copyto, one, one.copy())
    elif isinstance(one, type):
        if not of_library(one):
            yield partial(_put_class, one, {name: value for name, value in vars(one).items() if not name.startswith("__")})
    elif isinstance(one, FunctionType):
        yield from (partial(_put_cell, cell, [*_content(cell)]) for cell in one.__closure__ or ())
        if not of_library(one):
            names = loaded(one.__code__) | stored(one.__code__)
            yield partial(_put_names, one.__globals__, names, {name: one.__globals__[name] for name in names & one.__globals__.keys()})
    elif isinstance(one, dict):
        yield partial(_put_items, one, dict(one))
    elif isinstance(one, list | deque | set):
        yield partial(_put_members, one, [*one])
    if not isinstance(one, type) and isinstance(inside := getattr(one, "__dict__", None), dict):
        yield partial(_put_items, inside, dict(inside))
    if not of_library(type(one)):
        yield from (partial(_put_slot, slot, one, content(slot, one)) for slot in slots(one))


def _put_tensor(one: Tensor, value: Tensor, learns: bool) -> None:
    if one.shape != value.shape or one.dtype != value.dtype:
        one.data = value
    elif not same(one, value):
        one.detach().copy_(value)
    if one.requires_grad != learns and one.is_leaf:
        one.requires_grad_(learns)


def _put_slot(slot: MemberDescriptorType, one: object, before: list[object]) -> None:
    if before:
        slot.__set__(one, before[0])
    elif content(slot, one):
        slot.__delete__(one)


def _put_names(space: dict[str, Any], names: Iterable[str], before: Mapping[str, Any]) -> None:
    for name in names:
        if name in before:
            space[name] = before[name]
        else:
            space.pop(name, None)


def _put_class(one: type, before: Mapping[str, Any]) -> None:
    for name in [name for name in vars(one) if name not in before and not name.startswith("__")]:
        delattr(one, name)
    for name, value in before.items():
        if vars(one).get(name) is not value:
            setattr(one, name, value)


def _content(cell: CellType) -> Iterator[object]:
    """Yields what a variable around a function holds, if it has a value yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


def _put_cell(cell: CellType, before: list[object]) -> None:
    if before:
        cell.cell_contents = before[0]
    elif [*_content(cell)]:
        del cell.cell_contents


def _put_items(one: dict[Any, Any], before: dict[Any, Any]) -> None:
    if [*map(id, one)] != [*map(id, before)]:
        one.clear()
        one.update(before)
    for name, value in before.items():
        if one[name] is not value:
            one[name] = value


def _put_members(one: list[Any] | deque[Any] | set[Any], before: list[Any]) -> None:
    if len(one) != len(before) or any(now is not then for now, then in zip(one, before, strict=True)):
        one.clear()
        one.update(before) if isinstance(one, set) else one.extend(before)
