"""Pickles target and payload for a rank by value, and says clearly which part cannot be pickled."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import UntypedStorage

from delock.errors import UsageError
from delock.launch.by_value import used
from delock.launch.carried import in_words, refuse_large
from delock.launch.main_program import Imports
from delock.launch.parcel import Parcel, Unpickler

_REMEDY = 'Open or make it where it is used, in the process of the stage, put it into a module, or use workers="inline".'
_DEPTH = 12  # levels of containers and attributes to search for the part at fault


def pack(target: Callable[..., object], payload: object, rank: int) -> Parcel:
    """Returns both to be sent, with tensors by value. Raises UsageError that names the part of the payload which cannot be pickled.

    It raises it too for a function or a class that would carry much with it.
    """
    value = Imports(), target, payload
    try:
        parcel = Parcel(value)
    except Exception as error:  # pickle raises whatever an object's own reduction raises
        name, part = ("the target", target) if _fault(target) else ("payload", payload)
        what = _after(name, _Search().path(part, _DEPTH))
        raise UsageError(f"what stage {rank} needs cannot be sent to its process: {what}: {error}. {_REMEDY}") from error
    refuse_large(parcel, value, rank)
    return parcel


def unpack(pickled: bytes, storages: Sequence[UntypedStorage]) -> tuple[Callable[..., Any], Any]:
    """Returns target and payload. Raises UsageError if a name in them does not exist in this process."""
    try:
        _, target, payload = Unpickler(io.BytesIO(pickled), storages).load()
    except (AttributeError, ImportError) as error:
        raise UsageError(
            f"a stage's process cannot rebuild what it was sent: {error}. Put it into a module that can be imported, "
            'or use workers="inline".'
        ) from error
    return target, payload


class _Search:
    """Searches for the part of a value that cannot be pickled, and looks at nothing twice: functions may use each other."""

    def __init__(self) -> None:
        self.seen = set[int]()

    def path(self, value: object, depth: int) -> str:
        """Returns the path of the first such part of `value`, as one would write it: model.fc.hook.

        A part whose name does not begin with a dot or a bracket is known to the user by that name alone.
        """
        if depth > 0 and id(value) not in self.seen:
            self.seen.add(id(value))
            for name, part in _parts(value):
                if _fault(part):
                    return _after(name, self.path(part, depth - 1))
        return ""


def _fault(value: object) -> bool:
    try:
        Parcel(value)
    except Exception:
        return True
    return False


def _after(name: str, rest: str) -> str:
    return name + rest if rest[:1] in ("", ".", "[") else rest


def _parts(value: object) -> Iterable[tuple[str, object]]:
    if callable(words := getattr(value, "parts_in_words", None)):
        return [*words()]
    if isinstance(value, FunctionType | type):
        bases = [("", base) for base in value.__bases__] if isinstance(value, type) else []
        return [*((in_words(value, name), part) for name, part in used(value).items()), *bases]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    if isinstance(value, partial):
        return [(f".{name}", getattr(value, name)) for name in ("func", "args", "keywords")]
    if isinstance(value, MethodType):
        return [("", value.__self__), ("", value.__func__)]
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(value, name)]
    members = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    for inside in ("_modules", "_parameters", "_buffers"):  # of a torch module, which has them as attributes
        members |= members.pop(inside, {}) if isinstance(members.get(inside), Mapping) else {}
    return [*((f".{name}", part) for name, part in members.items()), ("", type(value))]
