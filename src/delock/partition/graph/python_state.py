"""Finds what a forward leaves in Python's attributes of a module: a graph would take the value of its tracing for ever."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from delock.errors import UsageError

LONGEST = 300  # characters of a value that is looked at


def attributes(model: nn.Module, kept: Collection[str]) -> dict[str, str]:
    """Returns the plain attributes of modules as text, by path. kept: modules that stay as they are, whose state is their own affair."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        if path in kept:
            continue
        for name, value in vars(module).items():
            if name != "training" and not name.startswith("_") and (text := _text(value)) is not None:
                found[f"{path}.{name}" if path else name] = text
    return found


def refuse_changed(before: Mapping[str, str], after: Mapping[str, str]) -> None:
    """Raises UsageError for an attribute that two forwards of the same batch have changed."""
    for path, value in after.items():
        if before.get(path, value) != value:
            raise UsageError(
                f"its forward changes the attribute {path}, and a graph would keep the value of its tracing: make it a buffer, or keep it "
                "in a part that is called as it is"
            )


def marks(model: nn.Module) -> dict[str, Any]:
    """Returns for every attribute of modules, by path, but for their parameters, buffers and parts, what changes with it.

    It holds the values, so that no other gets the number of one that is gone.
    """
    own = vars(nn.Module())
    return {
        f"{path}.{name}" if path else name: _mark(value, 3)
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if name not in own
    }


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns the paths of attributes that are others than before, or new."""
    return [path for path, mark in after.items() if path not in before or before[path] != mark]


def _mark(value: Any, depth: int) -> Any:
    if isinstance(value, Tensor):
        return _Same(value), value._version
    if isinstance(value, bool | int | float | str | None):
        return type(value), repr(value)
    inside = value if isinstance(value, dict | list | tuple) else getattr(value, "__dict__", None)
    if isinstance(value, nn.Module | type) or callable(value) or inside is None or not depth:
        return _Same(value)
    items = inside.items() if isinstance(inside, dict) else enumerate(inside)
    return type(value), [(str(key), _mark(one, depth - 1)) for key, one in items]


class _Same:
    """Is equal to another of the same object."""

    def __init__(self, one: object) -> None:
        self.one = one

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.one is other.one


def _text(value: Any) -> str | None:
    """Returns a plain value, or an object or container of plain values, as text; None for anything else."""
    if isinstance(value, bool | int | float | str):
        return repr(value)[:LONGEST]
    if isinstance(value, dict | list | tuple):
        held: Any = value.values() if isinstance(value, dict) else value
        return repr(value)[:LONGEST] if all(isinstance(one, bool | int | float | str) for one in held) else None
    if isinstance(value, nn.Module | Tensor | type) or callable(value):
        return None
    inside = vars(value) if hasattr(value, "__dict__") else {}
    plain = {name: one for name, one in inside.items() if isinstance(one, bool | int | float)}
    return repr(plain)[:LONGEST] if plain else None
