"""Follows what objects hold beside the state that modules register: attributes, hooks, closures, the globals that code names.

A copy of a module has copies of what it holds, but a function is never copied: what its closure holds, or its module, stays as it is.
"""

from __future__ import annotations

import sys
import sysconfig
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType, MemberDescriptorType, MethodType, ModuleType

import torch
from torch import Tensor, nn

from delock.partition.code_names import codes, loaded

LIBRARIES = ("<frozen", str(Path(__file__).parents[1]), *(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib")))
PLAIN = (str, bytes, int, float, complex, type(None), ModuleType, torch.dtype, torch.device)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OWN = (frozenset(vars(nn.Module())) - {*HOOKS}) | {"_flat_weight_refs"}  # of an nn.LSTM, whose copy makes them anew


def beside(module: nn.Module) -> list[object]:
    """Returns a module's plain attributes, its hooks and its class; its parameters, buffers and parts are left out."""
    return [*(value for name, value in vars(module).items() if name not in OWN), type(module)]


def held(roots: Iterable[tuple[str, object]], passed: Callable[[object], bool] = lambda _: False) -> Iterator[tuple[str, object, bool]]:
    """Yields all that named objects hold, each with the first name that leads to it, and True where a copy would hold the very same.

    passed: objects that are passed over, with all that only they hold.
    """
    waiting = deque((name, one, False) for name, one in roots)
    seen: dict[tuple[int, bool], object] = {}  # with the objects: no other may get the number of one that is gone
    while waiting:
        name, one, fixed = waiting.popleft()
        if isinstance(one, PLAIN) or (id(one), fixed) in seen or passed(one):
            continue
        seen[id(one), fixed] = one
        yield name, one, fixed
        fixed = fixed or isinstance(one, FunctionType | weakref.ref)
        waiting.extend((name, part, fixed) for part in _parts(one))


def place(tensor: Tensor) -> tuple[str, int]:
    """Returns where a tensor is: one memory under two Parameters is one place; meta and empty tensors have no address."""
    return ("at", tensor.data_ptr()) if tensor.layout == torch.strided and tensor.numel() and not tensor.is_meta else ("id", id(tensor))


def reaches(function: object, models: Iterable[nn.Module]) -> bool:
    """Returns True if a function can come to one of the modules, or to a part of one."""
    parts = {id(part) for model in models for part in model.modules()}
    return any(id(one) in parts for _, one, _ in held([("", function)]))


def _parts(one: object) -> list[object]:
    if isinstance(one, Tensor):
        return []
    if isinstance(one, FunctionType):
        return _of_function(one)
    if isinstance(one, weakref.ref):
        return [one()]
    if isinstance(one, Mapping):
        return list(one.values())
    if isinstance(one, list | tuple | set | frozenset | deque):
        return list(one)
    if isinstance(one, MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, type):
        return [inside for base in one.__mro__ if not of_library(base) for inside in vars(base).values()]
    if isinstance(one, property | staticmethod | classmethod):
        return [one.fget, one.fset] if isinstance(one, property) else [one.__func__]
    return [*getattr(one, "__dict__", {}).values(), *(value for slot in slots(one) for value in content(slot, one)), type(one)]


def slots(one: object) -> list[MemberDescriptorType]:
    """Returns the slots that an object has by classes of the user's own."""
    own = (cls for cls in type(one).__mro__ if not of_library(cls))
    return [slot for cls in own for slot in vars(cls).values() if isinstance(slot, MemberDescriptorType)]


def content(slot: MemberDescriptorType, one: object) -> list[object]:
    """Returns what is in a slot, if anything is."""
    try:
        return [slot.__get__(one)]
    except AttributeError:
        return []


def _of_function(function: FunctionType) -> list[object]:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    given = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values(), *vars(function).values()]
    return [*cells, *given, *([] if of_library(function) else _globals(function))]


def _globals(function: FunctionType) -> list[object]:
    """Returns the globals that the code of a function names, and what it names of modules of the user's own."""
    found = [function.__globals__[name] for name in sorted(loaded(function.__code__)) if name in function.__globals__]
    modules = [one for one in found if isinstance(one, ModuleType) and not _is_library(one)]
    names = [name for code in codes(function.__code__) for name in code.co_names]
    return [*found, *(vars(module)[name] for module in modules for name in names if name in vars(module))]


def _filled(cell: object) -> bool:
    try:
        return cell.cell_contents is not None  # type: ignore[attr-defined]
    except ValueError:  # of a name that has no value yet
        return False


def of_library(one: FunctionType | type) -> bool:
    """Returns True for a function or a class that is not the user's own."""
    if isinstance(one, FunctionType):
        return one.__code__.co_filename.startswith(LIBRARIES)
    return _is_library(sys.modules.get(one.__module__))


def _is_library(module: ModuleType | None) -> bool:
    """Returns True for a module of a library; a program, also one without a file, is the user's own."""
    own = module is not None and module.__name__ == "__main__"
    return not own and str(getattr(module, "__file__", None) or "<frozen>").startswith(LIBRARIES)
