"""Describes a model's configuration for a digest: every value of it, or an error for what cannot be described with certainty."""

from __future__ import annotations

import copyreg
import enum
import functools
import hashlib
import inspect
import logging
import re
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from delock.partition.code_names import imports, loaded
from delock.partition.traces.installed import Installed, UndescribedError, home

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice)
BY_NAME = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.finfo, torch.iinfo, PurePath)
TYPES = (types.GenericAlias, types.UnionType)
BUILT_IN = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType, np.ufunc)
OPERATIONS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
HOOKS = frozenset(name for name in vars(nn.Module()) if "hooks" in name)  # their keys count all hooks of the program
SALTED = ("_original_object_hash",)  # which transformers keeps of options for generating text: another one in every program
AUTOMATIC = frozenset(
    {"__dict__", "__weakref__", "__doc__", "__module__", "__annotations__", "__abstractmethods__", "_abc_impl", "__slotnames__"}
)


class Description:
    """Takes values into a digest. Equal digests mean equal values, the same ties between them, and the same code of their classes.

    state: parameters and buffers by path, which count by shape and not by contents. Meanwhile it notes the modules of Python that the
    values' code is from, those that code looks into, and the names and texts in the code of functions: what these mean is to be described
    as well.
    """

    def __init__(self, state: Mapping[str, Tensor] = types.MappingProxyType({})) -> None:
        self.hash = hashlib.sha256()
        self.installed = Installed()
        self.paths = {id(one): path for path, one in state.items()}
        self.seen: dict[int, int] = {}
        self.held: list[Any] = []  # so that no id is used twice
        self.modules: dict[str, types.ModuleType] = {}
        self.opened: dict[str, types.ModuleType] = {}
        self.names: set[str] = set()
        self.texts: set[str] = set()

    def digest(self) -> str:
        """Returns the digest of all that was taken."""
        return self.hash.hexdigest()

    def say(self, *words: object) -> None:
        """Takes words, each with its length."""
        for word in words:
            said = word if isinstance(word, bytes) else str(word).encode("utf-8", "surrogatepass")
            self.hash.update(f"{len(said)}:".encode() + said)

    def add(self, value: Any) -> None:
        """Takes a value. Raises UndescribedError."""
        if type(value) in PLAIN:
            self.say(type(value).__name__, repr(value))
        elif isinstance(value, types.CodeType):
            self.code(value)
        elif isinstance(value, enum.Enum):
            self.say("enum", value.name)
            self.add(type(value))
        elif isinstance(value, (*BY_NAME, *TYPES, *OPERATIONS)) or type(value).__module__ == "typing":
            self.say("named", type(value).__name__, str(value))
        elif type(value) in (tuple, frozenset):  # equal ones may be one or several
            self._new(value)
        elif id(value) in self.seen:
            self.say("seen", self.seen[id(value)])
        else:
            self.seen[id(value)] = len(self.held)
            self.held.append(value)
            self._new(value)

    def each(self, values: Iterable[Any]) -> None:
        """Takes several values in order."""
        held = list(values)
        self.say("values", len(held))
        for one in held:
            self.add(one)

    def _new(self, value: Any) -> None:
        """Takes a value that may be referred to again."""
        self.say(type(value).__module__, type(value).__qualname__)
        for kinds, describe in KINDS:
            if isinstance(value, kinds):
                describe(self, value)
                return
        self._object(value)

    def _tensor(self, value: Tensor) -> None:
        self.say(value.shape, value.dtype, value.device, value.layout, value.requires_grad, value.is_leaf)
        if type(value) not in (Tensor, nn.Parameter) or value.is_quantized or value.is_nested:
            raise UndescribedError(f"a {type(value).__name__}")
        if value.layout == torch.strided:
            self.say(value.stride(), value.storage_offset(), value.is_conj(), value.is_neg())
        self._mapping(vars(value))
        if id(value) in self.paths:
            self.say("state", self.paths[id(value)])
        elif value.device.type == "cpu" and value.layout == torch.strided:
            dense = value.detach().resolve_conj().resolve_neg().contiguous()
            self.hash.update(dense.reshape(-1).view(torch.uint8).numpy().data)
        else:
            raise UndescribedError(f"a tensor on {value.device}")

    def _array(self, value: np.ndarray[Any, Any] | np.generic) -> None:
        if value.dtype.hasobject:
            raise UndescribedError("an array of objects")
        self.say(value.dtype.str, value.shape, value.tobytes())

    def _set(self, value: Iterable[Any]) -> None:
        held = list(value)
        if not all(type(one) in PLAIN for one in held):
            raise UndescribedError("a set of objects")
        self.each(sorted(held, key=repr))
        self._extended(value)

    def _mapping(self, value: Mapping[Any, Any]) -> None:
        self.each([one for pair in value.items() if pair[0] not in SALTED for one in pair])
        self.add(getattr(value, "default_factory", None))

    def _function(self, value: types.FunctionType) -> None:
        """Takes a function by its code and what its names mean, or an installed one by its name."""
        self.say(value.__qualname__)
        if value.__globals__.get("__name__", "").startswith("namedtuple_"):
            self.code(value.__code__)
            return
        module = self._note(home(value))
        known = self.installed(module)
        if known and named(module.__name__, value.__qualname__) is value:
            return
        self.code(value.__code__)
        self.each([value.__defaults__, value.__kwdefaults__, *(_inside(cell) for cell in value.__closure__ or ())])
        self._mapping(vars(value))
        for name in () if known else sorted(loaded(value.__code__)):
            if name in value.__globals__:
                self.say(name)
                self.add(value.__globals__[name])
        for name in () if known else sorted(imports(value.__code__)):
            self.add(self.installed.imported(name, str(value.__globals__.get("__package__"))))

    def _built_in(self, value: Any) -> None:
        self.say(getattr(value, "__module__", ""), getattr(value, "__qualname__", value.__name__))
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, types.ModuleType):
            self.add(owner)

    def _method(self, value: types.MethodType) -> None:
        self.each([value.__self__, value.__func__])

    def _class(self, value: type) -> None:
        """Takes a class: an installed one by its name, else by its contents."""
        self.say(value.__module__, value.__qualname__)
        module = sys.modules.get(value.__module__)
        if module is None:
            raise UndescribedError(f"{value.__qualname__}, whose module is not known")
        self._note(module)
        self.each(value.__bases__)
        known = self.installed(module) and named(value.__module__, value.__qualname__) is value
        for name, one in vars(value).items():
            passed = name in AUTOMATIC or isinstance(one, types.GetSetDescriptorType | types.MemberDescriptorType)
            if not passed and (not known or self.installed.is_patched(one)):
                self.say(name)
                self.add(one)

    def _wrapped(self, value: Any) -> None:
        self.each([value.fget, value.fset, value.fdel] if isinstance(value, property) else [value.__func__])

    def _partial(self, value: functools.partial[Any]) -> None:
        self.each([value.func, value.args, value.keywords, vars(value)])

    def _python_module(self, value: types.ModuleType) -> None:
        self.say(value.__name__)
        self.opened[self._note(value).__name__] = value

    def _note(self, module: types.ModuleType) -> types.ModuleType:
        return self.modules.setdefault(module.__name__, module)

    def _network(self, value: nn.Module) -> None:
        self.add(type(value))
        keys = {key for name in HOOKS for key in value.__dict__.get(name, ())}
        ranks = {key: i for i, key in enumerate(sorted(keys))}
        for name, one in value.__dict__.items():
            self.say(name)
            if name == "_non_persistent_buffers_set":
                self.each(sorted(one))
            else:
                self.add({ranks[key]: hook for key, hook in one.items()} if name in HOOKS else one)

    def _object(self, value: Any) -> None:
        """Takes an object of a class in Python by its attributes."""
        cls = type(value)
        offsets = (cls.__dictoffset__, cls.__weakrefoffset__)
        own = object.__basicsize__ + 8 * (sum(at > 0 for at in offsets) + len(_slots(cls)))
        if cls.__itemsize__ or cls.__basicsize__ > own or not cls.__flags__ & HEAP:
            raise UndescribedError(f"a {cls.__name__} holds more than attributes")
        self._extended(value)

    def _extended(self, value: Any) -> None:
        """Takes class and attributes of a value; the items of a container are taken elsewhere."""
        if type(value).__flags__ & HEAP:
            self.add(type(value))
            held = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}
            self._mapping(held | getattr(value, "__dict__", {}))

    def code(self, code: types.CodeType) -> None:
        """Takes the code of a function, wherever it stands in a file."""
        self.say("code", code.co_name, code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, code.co_flags)
        self.say(code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_exceptiontable)
        self.names.update(code.co_names)
        self.texts.update(one for one in code.co_consts if isinstance(one, str))
        self.each(code.co_consts)


def named(module: str, qualname: str) -> Any:
    """Returns what has this name in a module that is loaded; None if nothing has."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = inspect.getattr_static(found, name, None) if isinstance(found, type) else getattr(found, name, None)
    return found


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is filled later
        return ...


def _slots(cls: type) -> list[str]:
    found: list[str] = copyreg._slotnames(cls)  # type: ignore[attr-defined]
    return found


def _sequence(to: Description, value: Any) -> None:
    to.each(value)
    to._extended(value)


def _ordered(to: Description, value: Any) -> None:
    to._mapping(value)
    to._extended(value)


HEAP = 1 << 9  # CPython's flag of a class that was made by a class statement
KINDS: tuple[tuple[Any, Callable[[Description, Any], None]], ...] = (
    (nn.Module, Description._network),
    (Tensor, Description._tensor),
    ((np.ndarray, np.generic), Description._array),
    (type, Description._class),
    (types.FunctionType, Description._function),
    (types.MethodType, Description._method),
    (BUILT_IN, Description._built_in),
    ((property, staticmethod, classmethod), Description._wrapped),
    (functools.partial, Description._partial),
    (types.ModuleType, Description._python_module),
    (functools._lru_cache_wrapper, lambda to, value: to.add(value.__wrapped__)),
    (weakref.ReferenceType, lambda to, value: to.add(value())),
    (logging.Logger, lambda to, value: to.say(value.name)),
    (re.Pattern, lambda to, value: to.say(value.pattern, value.flags)),
    ((set, frozenset), Description._set),
    ((tuple, list), _sequence),
    ((dict, types.MappingProxyType), _ordered),
)
"""Each entry holds kinds of values, the particular ones first, and the way to describe them."""
