"""Weighs what functions and classes carry with them to a rank, and refuses too much: globals, and what stands around them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from delock.errors import UsageError
from delock.launch.by_value import Own, defaults
from delock.launch.parcel import Parcel, Sending

LIMIT = 16_000_000  # bytes


def refuse_large(parcel: Parcel, value: object, rank: int) -> None:
    """Raises UsageError for a global that a function of the parcel would carry to the rank, and which is no part of `value` otherwise."""
    if parcel.size <= LIMIT:
        return
    heavy = [(one, name, part) for one, uses in parcel.made for name, part in uses.items() if _Weighing().weight(part) > LIMIT]
    given = _Weighing()
    if heavy:
        given.dump(value)
    for one, name, part in heavy:
        if (size := _Weighing(given.met).weight(part)) > LIMIT:
            raise UsageError(
                f"{in_words(one, name)} has {size / 1e6:,.0f} MB. It would be sent to the process of stage {rank} with it, and all that a "
                f"function or a class uses may have {LIMIT // 1_000_000} MB: give it as data or as an attribute of an object, load it "
                "inside the function, or put it into a module. If only a fact of it is used, such as its length, give that a name before"
            )


def in_words(one: Own, name: str) -> str:
    """Returns the words for what a function or class uses under a name."""
    if isinstance(one, type):
        return f"the attribute `{name}` of the class `{one.__name__}`"
    kind = "variable" if name in one.__code__.co_freevars else "argument" if name in defaults(one) else "global"
    known = f"the function `{one.__name__}`" if one.__name__ != "<lambda>" else f"the lambda in line {one.__code__.co_firstlineno}"
    return f"the {kind} `{name}` of {known}"


class _Weighing(Sending):
    """Pickles into nothing, without what functions and classes use, and without the objects `left_out`, by their ids."""

    def __init__(self, left_out: Mapping[int, object] = MappingProxyType({})) -> None:
        super().__init__(self)
        self.left_out, self.written = left_out, 0
        self.met: dict[int, object] = {}  # by its id

    def weight(self, value: object) -> int:
        """Returns the bytes of a value."""
        self.dump(value)
        return self.written + sum(one.nbytes() for one in self.memory.storages)

    def write(self, pickled: Any) -> None:
        """Counts bytes, as a file."""
        self.written += memoryview(pickled).nbytes

    def reducer_override(self, obj: Any) -> Any:
        """Returns how an object is pickled for a rank; an empty tuple in place of what is left out."""
        if isinstance(obj, Own):
            found = super().reducer_override(obj)
            return (tuple, ()) if self.made and self.made.pop() else found
        self.met[id(obj)] = obj
        return (tuple, ()) if id(obj) in self.left_out else super().reducer_override(obj)
