"""Gives losses and metrics what the model returns, where the last stage returns its tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from delock.errors import UsageError
from delock.partition.graph.structure import Structure, put_together
from delock.tensors import tensors


@dataclass(frozen=True)
class OnOutput:
    """Calls function(outputs, targets) with what the model returns. structures: of its output, by the number of tensors in it.

    What a head returns, a tensor where the model returns several, is passed on as it is.
    """

    function: Callable[[Any, Any], Any]
    structures: Mapping[int, Structure]

    @property
    def func(self) -> Callable[[Any, Any], Any]:
        """Returns the function, as a partial does: it is what a run is named by."""
        return self.function

    def __call__(self, outputs: Any, targets: Any) -> Any:
        return self.function(whole(outputs, self.structures), targets)


def whole(outputs: Any, structures: Mapping[int, Structure]) -> Any:
    """Returns what the model returns, from its tensors."""
    found = tensors(outputs)
    return put_together(structures[len(found)], found) if len(found) in structures else outputs


def own_loss(outputs: Any, targets: Any) -> Tensor:
    """Returns the loss that a model computes itself: its output, the output's `loss`, or the first tensor without dimensions in a tuple.

    Raises UsageError if it returns none.
    """
    found = outputs.get("loss") if isinstance(outputs, Mapping) else getattr(outputs, "loss", None)
    if found is None and isinstance(outputs, tuple | list):
        found = next((one for one in outputs if isinstance(one, Tensor) and one.dim() == 0), None)
    if found is None and isinstance(outputs, Tensor) and outputs.dim() == 0:
        found = outputs
    if isinstance(found, Tensor) and found.dim() == 0:
        return found
    raise UsageError(
        "no loss is given, and the model returns none: give loss=..., or let the model return a scalar, or something with a `loss`"
    )


def by_count(structures: Mapping[bool, Structure]) -> dict[int, Structure]:
    """Returns the structures of both modes by the number of their tensors. Raises UsageError where that does not tell the modes apart.

    An entry that is None in one mode may be missing in the other, as the cache that a model for text fills in evaluation alone: then both
    have it.
    """
    counts = {mode: _count(one) for mode, one in structures.items()}
    if counts[True] == counts[False] and _filled(structures[True]) == _filled(structures[False]):
        return {counts[True]: max(structures.values(), key=partial(_count, constants=True))}
    if counts[True] == counts[False]:
        raise UsageError(
            f"the model returns {counts[True]} tensors in training and in evaluation, but in different structures, which a stage cannot "
            "tell apart: let it return the same"
        )
    return {counts[mode]: one for mode, one in structures.items()}


def _filled(structure: Structure) -> Structure:
    """Returns a structure without entries of objects that are None."""
    match structure:
        case ("o", cls, *items):
            return ("o", cls, *((name, _filled(item)) for name, item in items if item != ("c", None)))
        case ("t" | "c", _):
            return structure
        case (mark, *items):
            return (mark, *map(_filled, items))
    raise AssertionError(structure)


def _count(structure: Structure, constants: bool = False) -> int:
    """Returns the number of tensors in a structure; constants: with what is none."""
    match structure:
        case ("t", _):
            return 1
        case ("c", _):
            return int(constants)
        case ("o", _, *items):
            return sum(_count(item, constants) for _, item in items)
        case (_, *items):
            return sum(_count(item, constants) for item in items)
    raise AssertionError
