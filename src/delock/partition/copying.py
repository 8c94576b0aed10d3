"""Copies modules to be measured or trained, with the modules' own open files, locks and the like, which cannot be copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

T = TypeVar("T")


def copied_but_for_handles(value: T, instead: Mapping[int, Any] = MappingProxyType({})) -> T:
    """Returns a copy of a module, or of several. What cannot be copied, however deep it lies, is the same object in both.

    instead: by id, what the copy has in place of some objects.
    """
    try:
        return copy.deepcopy(value, dict(instead))
    except Exception:  # copying raises whatever an object's own reduction raises
        return copy.deepcopy(value, {**{id(one): one for one in _handles(value, set())}, **instead})


def _handles(value: object, seen: set[int]) -> Iterator[object]:
    """Yields the smallest parts of a value that cannot be copied."""
    if id(value) in seen or _copies(value):
        return
    seen.add(id(value))
    found = [one for part in _parts(value) for one in _handles(part, seen)]
    yield from found or [value]


def _parts(value: object) -> list[object]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set) else list(getattr(value, "__dict__", {}).values())


def _copies(value: object) -> bool:
    try:
        copy.deepcopy(value)
    except Exception:
        return False
    return True
