"""Takes what a model returns apart into tensors, and puts it together again: tuples, lists, dicts, named tuples, dataclasses, ModelOutputs.

An object of another kind becomes None.

tensor ("t", i) · tuple ("u", item...) · list ("l", item...) · constant ("c", value) · mapping or object ("o", class, (name, item)...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from delock.errors import UsageError

Structure = tuple[Any, ...]


def not_constant(found: str) -> UsageError:
    """Returns the error for an output with numbers or names that another batch changes: the last stage would give those of the first."""
    return UsageError(
        f"it returns what changes with the batch and is no tensor ({found}): return a tensor, or let the loss find it in the batch"
    )


def take_apart(value: Any, is_leaf: Callable[[Any], bool] = lambda one: isinstance(one, Tensor)) -> tuple[list[Any], Structure]:
    """Returns the tensors of a value in order, and its structure. Raises UsageError for a number that follows from sizes, while tracing."""
    leaves: list[Any] = []
    return leaves, _structure(value, leaves, is_leaf)


def put_together(structure: Structure, leaves: Sequence[Any]) -> Any:
    """Returns the value that `take_apart` took apart, with these tensors."""
    match structure:
        case ("t", i):
            return leaves[i]
        case ("c", value):
            return value
        case ("o", cls, *items):
            return _made(cls, {name: put_together(item, leaves) for name, item in items})
        case (mark, *items):
            made = [put_together(item, leaves) for item in items]
            return tuple(made) if mark == "u" else made
    raise AssertionError(structure)


def _structure(value: Any, leaves: list[Any], is_leaf: Callable[[Any], bool]) -> Structure:
    if is_leaf(value):
        leaves.append(value)
        return ("t", len(leaves) - 1)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        named = list(value.items())
    elif hasattr(value, "_fields"):
        named = list(zip(value._fields, value, strict=True))
    elif isinstance(value, tuple | list):
        return ("u" if isinstance(value, tuple) else "l", *(_structure(one, leaves, is_leaf) for one in value))
    elif is_dataclass(value) and not isinstance(value, type):
        named = [(one.name, getattr(value, one.name)) for one in fields(value)]
    elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        raise not_constant("a number that follows from sizes")
    elif value is None or isinstance(value, bool | int | float | str):
        return ("c", value)
    else:
        return ("c", None)  # as a cache for generation, which training has no use for
    return ("o", type(value), *((name, _structure(one, leaves, is_leaf)) for name, one in named))


def change(one: Structure, other: Structure, where: str = "") -> str:
    """Returns the first thing in which the structures of two outputs differ; "" if there is none."""
    if repr(one) == repr(other):  # numbers that are no number are equal here, and 1 and True are not
        return ""
    match one, other:
        case ("c", a), ("c", b):
            return f"{a!r} and then {b!r}{where and f' as {where}'}"
        case ("o", a, *items), ("o", b, *others) if a is b and [name for name, _ in items] == [name for name, _ in others]:
            return next(filter(None, (change(x, y, f"{where}[{name!r}]") for (name, x), (_, y) in zip(items, others, strict=True))))
        case (a, *items), (b, *others) if a == b and a in ("u", "l") and len(items) == len(others):
            return next(filter(None, (change(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(items, others, strict=True)))))
    return f"something in another form{where and f' as {where}'}"


def _made(cls: type[Any], named: dict[str, Any]) -> Any:
    made: Callable[..., Any] = cls
    return made(named) if issubclass(cls, Mapping) and not is_dataclass(cls) else made(**named)
