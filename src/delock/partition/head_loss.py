"""Gives a loss the output of a head as if the model had returned it: in the place of the one output that a head can stand for."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch

from delock.errors import said
from delock.execution import compute_loss
from delock.partition.graph.outputs import OnOutput
from delock.partition.graph.structure import Structure, put_together
from delock.tensors import tensors

Outputs = Sequence[tuple[tuple[int, ...], torch.dtype]]
ABSENT: Structure = ("c", None)


@dataclass(frozen=True)
class HeadLoss:
    """Calls function(what the model returns, targets) with a head's tensor as output `place`, or with what a head returns as it is.

    Of the other outputs, those without dimensions, losses that the model adds, are zero, and the rest are None, or missing in a dict.
    structure: of what the model returns in training. A head that returns all of the model's tensors stands for all of them.
    """

    function: Callable[[Any, Any], Any]
    structure: Structure
    shapes: tuple[tuple[int, ...], ...]  # of the model's tensors
    place: int | None = None

    @property
    def func(self) -> Callable[[Any, Any], Any]:
        """Returns the function, as a partial does."""
        return self.function

    def __call__(self, outputs: Any, targets: Any) -> Any:
        found = tensors(outputs)
        if len(found) == len(self.shapes):
            return self.function(put_together(self.structure, found), targets)
        if len(found) != 1 or self.place is None:
            return self.function(outputs, targets)
        leaves = [found[0] if i == self.place else found[0].new_zeros(()) for i in range(len(self.shapes))]
        kept = {self.place, *(i for i, shape in enumerate(self.shapes) if not shape)}
        return self.function(put_together(without_others(self.structure, kept), leaves), targets)


def without_others(structure: Structure, kept: Collection[int]) -> Structure:
    """Returns a structure in which only some tensors are left: others are None, or missing in a mapping."""
    match structure:
        case ("t", i):
            return structure if i in kept else ABSENT
        case ("c", _):
            return structure
        case ("o", cls, *items):
            made = [(name, item, without_others(item, kept)) for name, item in items]
            plain = issubclass(cls, Mapping) and not is_dataclass(cls)
            return ("o", cls, *((name, new) for name, old, new in made if not (plain and new == ABSENT != old)))
        case (mark, *items):
            return (mark, *(without_others(item, kept) for item in items))
    raise AssertionError(structure)


def head_loss(function: Callable[[Any, Any], Any], structure: Structure | None, outputs: Outputs, targets: Any) -> tuple[HeadLoss, str]:
    """Returns the loss of a head that stands for the first of the model's outputs that the loss can do with alone; if there is none, why.

    outputs: shapes and dtypes of the model's tensors on a batch with these targets; structure: theirs, by default a tensor or a tuple.
    """
    if isinstance(function, OnOutput):
        function = function.function
    if structure is None:
        structure = ("t", 0) if len(outputs) == 1 else ("u", *(("t", i) for i in range(len(outputs))))
    plain = HeadLoss(function, structure, tuple(shape for shape, _ in outputs))
    why = ""
    for place, (shape, dtype) in enumerate(outputs):
        if not shape or not (dtype.is_floating_point or dtype.is_complex):
            continue
        one = replace(plain, place=place)
        x = torch.zeros(shape, dtype=dtype, requires_grad=True)
        try:
            with torch.enable_grad():
                (grad,) = torch.autograd.grad(compute_loss(one, x, targets), x, allow_unused=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a loss raises that misses its other outputs
            why = why or said(error).splitlines()[0][:200]
            continue
        if grad is not None:
            return one, ""
        why = why or "its gradient does not reach the network's output"
    return plain, why or "the network returns nothing that has a gradient"
