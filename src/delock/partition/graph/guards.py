"""Refuses inputs of sizes and types for which a graph was not traced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from delock.errors import UsageError

KNOWN: Mapping[str, Any] = MappingProxyType(
    {"math": math, "torch": torch, "max": max, "min": min, "abs": abs, "int": int, "float": float, "round": round}
)  # torch: functions of numbers, such as torch.sym_float


class OtherSizesError(UsageError):
    """Raised for inputs of sizes that a graph does not hold for. problem: the size that may not change, or what was taken for granted."""

    problem = ""

    @classmethod
    def of(cls, problem: str, found: str) -> OtherSizesError:
        """Returns the error for sizes that were found; it can be sent, as a stage sends it."""
        error = cls(
            f"the model was traced for inputs of other sizes ({problem}) than {found}: give it a first batch of the common size, and "
            "pad to one length what may not change"
        )
        error.problem = problem
        return error


@dataclass(eq=False)
class Guards:
    """Checks the inputs of a traced graph.

    sizes: of every input, per dimension a number, the name of a size that may change, or an expression of names; a name is the same number
    everywhere. dtypes: of every input; a forward may have decided on them.
    ranges: the least and the largest number for a name. conditions: on the names, as Python expressions, which tracing took for granted.
    It can be called in a graph: its name and module are those of a function.
    """

    sizes: tuple[tuple[int | str, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    ranges: dict[str, tuple[int, float]] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    seen: set[tuple[Any, ...]] = field(default_factory=set)
    __name__ = "refuse_other_sizes"

    def __call__(self, *inputs: Tensor) -> None:
        """Raises UsageError for inputs of other types, and OtherSizesError for those of other sizes."""
        key = tuple((x.shape, x.dtype) for x in inputs)
        if key in self.seen:
            return
        for i, (was, x) in enumerate(zip(self.dtypes, inputs, strict=True)):
            if was != x.dtype:
                raise UsageError(
                    f"the model was traced for inputs of another type (input {i} of {was}) than {x.dtype}, and it may decide on types: let "
                    "all batches, those for testing too, have the types of the first"
                )
        if problem := self._problem(inputs):
            found = ", ".join(str(tuple(x.shape)) for x in inputs)
            raise OtherSizesError.of(problem, found)
        self.seen.add(key)

    def _problem(self, inputs: Sequence[Tensor]) -> str:
        named: dict[str, int] = {}
        for sizes, x in zip(self.sizes, inputs, strict=True):
            for size, now in zip(sizes, x.shape, strict=False):
                if isinstance(size, str) and size.isidentifier():
                    named.setdefault(size, now)
        for i, (sizes, x) in enumerate(zip(self.sizes, inputs, strict=True)):
            if len(sizes) != x.dim() or any(now != _number(size, named) for size, now in zip(sizes, x.shape, strict=True)):
                return f"input {i} of ({', '.join(map(str, sizes))})"
        for name, (least, most) in self.ranges.items():
            if name in named and not least <= named[name] <= most:
                return f"{name} from {least} to {most}"
        for condition in self.conditions:
            if not _number(condition, named):
                return condition
        return ""


def _number(said: int | str, named: Mapping[str, int]) -> Any:
    """Returns the value of a size or a condition; None if it is said of a size that has no name here."""
    try:
        return eval(said, {"__builtins__": {}, **KNOWN}, named) if isinstance(said, str) else said
    except NameError:
        return None
