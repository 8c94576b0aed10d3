"""Pickles target and payload for a rank by value, and says clearly which part cannot be pickled."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from delock.errors import UsageError

_REMEDY = 'Define it at the top level of a module (no lambda, no function or class inside a function), or use workers="inline".'
_DEPTH = 12  # levels of containers and attributes to search for the part at fault


def pack(target: Callable[..., object], payload: object, rank: int) -> bytes:
    """Returns both as bytes, with tensors by value. Raises UsageError that names the part of the payload which cannot be pickled.

    torch.multiprocessing's reductions are not used: they would share the tensors' memory between ranks, and tie it to files and the parent.
    """
    try:
        return pickle.dumps((target, payload), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # pickle raises whatever an object's own reduction raises
        what = "the target" if _fault(target) else "payload" + _path(payload, _DEPTH)
        raise UsageError(f"what stage {rank} needs cannot be sent to its process: {what}: {error}. {_REMEDY}") from error


def unpack(pickled: bytes) -> tuple[Callable[..., Any], Any]:
    """Returns target and payload. Raises UsageError if a name in them does not exist in this process, such as one defined in a notebook."""
    try:
        target, payload = pickle.loads(pickled)
    except (AttributeError, ImportError) as error:
        raise UsageError(f"a stage's process cannot rebuild what it was sent: {error}. {_REMEDY}") from error
    return target, payload


def _fault(value: object) -> bool:
    try:
        pickle.dumps(value)
    except Exception:
        return True
    return False


def _path(value: object, depth: int) -> str:
    """Returns the path of the first part of `value` that cannot be pickled, as one would write it: .model._modules['fc'].hook."""
    if depth > 0:
        for name, part in _parts(value):
            if _fault(part):
                return name + _path(part, depth - 1)
    return ""


def _parts(value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", part) for key, part in value.items()]
    if isinstance(value, list | tuple):
        return [(f"[{i}]", part) for i, part in enumerate(value)]
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ()) if hasattr(value, name)]
    members = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    return [(f".{name}", part) for name, part in members.items()]
