"""Pickles by value what no other process can import: functions and classes of the main program, lambdas, what is defined in functions.

What a module has stays a name, and so do the globals of a lambda in a module. Where the functions of the main program arrive, they have one
namespace again, that of the main program there, and the classes are found in it by their names.
"""

from __future__ import annotations

import io
import linecache
import marshal
import os
import pickle
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache, cached_property, lru_cache, partial
from importlib import import_module
from types import CodeType, FunctionType, MappingProxyType, ModuleType
from typing import Any, TypeAlias

import cloudpickle

from delock.launch.parametrized import reduced

MAIN = "__main__"
Own: TypeAlias = FunctionType | type
Cached = type(cache(len))


class ByValue(cloudpickle.Pickler):  # type: ignore[misc]  # it says no types
    """Pickles with cloudpickle, and keeps in `made` the functions and classes that it has pickled by value, and what each of them uses."""

    def __init__(self, into: Any, reducers: Mapping[type, Any] = MappingProxyType({})) -> None:
        """reducers: type -> function, of objects that are pickled in a way of their own."""
        table = {**cloudpickle.Pickler.dispatch_table, CodeType: _code, cached_property: _computed, **reducers}
        del table[io.TextIOWrapper]  # cloudpickle would send the text of an open file
        self.dispatch_table = table  # before the pickler underneath looks for it
        super().__init__(into, protocol=pickle.HIGHEST_PROTOCOL)
        self.made: list[tuple[Own, dict[str, object]]] = []

    def reducer_override(self, obj: Any) -> Any:
        """Returns how an object is pickled that cannot say it itself."""
        if isinstance(obj, ModuleType) and sys.modules.get(obj.__name__) is obj:
            return import_module, (obj.__name__,)  # of whatever class, as torch.ops
        found = _cached(obj) if isinstance(obj, Cached) else reduced(obj)
        if found is NotImplemented:
            found = super().reducer_override(obj)
        if not isinstance(obj, Own) or found is NotImplemented or len(found) != 6:  # 6: made and filled, so by value
            return found
        make, args, (state, slots), *rest, fill = found
        if isinstance(obj, FunctionType):
            uses = {**slots["__globals__"], **_variables(obj), **defaults(obj)}
            if home := _home(obj.__globals__):
                args = (args[0], Namespace(home, args[1]), *args[2:])
                slots = slots if home == MAIN else {**slots, "__globals__": {}}
        else:
            uses = {name: part for name, part in state.items() if not name.startswith("__")}
        self.made.append((obj, uses))
        if getattr(sys.modules[MAIN], obj.__qualname__, None) is obj:
            fill = partial(filled_and_named, fill)
        return make, args, (state, slots), *rest, fill


class Namespace:
    """Stands for the globals of a module, wherever it arrives. facts: of the main program, which a function may ask for, as __file__."""

    def __init__(self, name: str, facts: Mapping[str, object]) -> None:
        self.name, self.facts = name, facts if name == MAIN else {}

    def __reduce__(self) -> Any:
        return namespace, (self.name, self.facts)


def namespace(name: str, facts: Mapping[str, object]) -> dict[str, Any]:
    """Returns the globals of a module in this process."""
    found = vars(import_module(name))
    found.update(facts)
    return found


def filled_and_named(fill: Any, made: Own, state: Any) -> None:
    """Fills a function or class that was made, and lets the main program of this process have it under its name."""
    fill(made, state)
    setattr(sys.modules[MAIN], made.__qualname__, made)


def used(value: Own) -> dict[str, object]:
    """Returns what a function or a class uses, if it is pickled by value: globals, variables around it, attributes of the class."""
    pickler = ByValue(io.BytesIO())
    pickler.reducer_override(value)
    return pickler.made[0][1] if pickler.made else {}


def _variables(function: FunctionType) -> dict[str, object]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # not bound yet
            found[name] = cell.cell_contents
    return found


def defaults(function: FunctionType) -> dict[str, object]:
    """Returns the default values of a function's arguments, by name."""
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def _cached(obj: Any) -> Any:
    """Returns how a function of functools.cache is pickled: by name if that can be imported, else as one with an empty cache."""
    found: Any = sys.modules.get(obj.__module__) if obj.__module__ != MAIN else None
    for name in obj.__qualname__.split("."):
        found = getattr(found, name, None)
    return NotImplemented if found is obj else (cached_again, (obj.__wrapped__, obj.cache_parameters()))


def cached_again(function: Any, settings: Mapping[str, Any]) -> Any:
    """Returns a function with a cache of its results."""
    return lru_cache(**settings)(function)


def _computed(one: cached_property[Any]) -> Any:
    """Returns how a cached_property is pickled, whose lock cannot be."""
    return computed_again, (one.func, one.attrname)


def computed_again(function: Any, name: str | None) -> cached_property[Any]:
    """Returns a cached_property of a class that has it under this name."""
    found = cached_property(function)
    found.attrname = name
    return found


def _home(names: dict[str, Any]) -> str | None:
    """Returns the module whose globals these are, if it is the main program or one that can be imported."""
    name = names.get("__name__", "")
    module = sys.modules.get(name)
    return name if module and vars(module) is names and (name == MAIN or module.__spec__) else None


def _code(code: CodeType) -> Any:
    """Returns how code is pickled: with its file's name, for tracebacks, and with its lines, if it has no file, as a cell of a notebook."""
    entry = () if os.path.exists(code.co_filename) else linecache.cache.get(code.co_filename, ())
    return code_again, (marshal.dumps(code), entry[2] if len(entry) > 2 else [])


def code_again(marshalled: bytes, lines: list[str]) -> CodeType:
    """Returns the code, and makes its lines known to tracebacks."""
    code: CodeType = marshal.loads(marshalled)
    if lines:
        linecache.cache[code.co_filename] = (sum(map(len, lines)), None, lines, code.co_filename)
    return code
