"""Pieces of a traced model as they are measured: without weights and values that they only hand on, which cost them nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from torch import Tensor, nn

from delock.partition.graph.segment import Segment, computation
from delock.partition.layer_memory import LayerMemory, Output
from delock.tensors import Value, tensors

T = TypeVar("T")


class Lean(nn.Module):
    """Runs a piece in training, on those of its inputs that it uses; it returns those of its outputs that it makes.

    `unwritten`: which of these inputs are weights, to which nothing is ever written.
    """

    def __init__(self, piece: Segment) -> None:
        super().__init__()
        self.piece, self.training = piece, piece.training
        self.does, self.own = computation(piece, True), dict[int, Tensor]()
        self.idle = frozenset(self.does.handed.values())
        self.unwritten = frozenset(i - sum(j < i for j in self.idle) for i in self.does.weights - self.idle)

    def forward(self, given: Value) -> Value:
        used, count = iter(tensors(given)), len(tensors(given)) + len(self.idle)
        made = self.does.program.run(self.piece, *(None if i in self.idle else next(used) for i in range(count)))
        self.own = {j: made[j] for j in self.does.own}
        found = tuple(one for j, one in enumerate(made) if j not in self.does.handed and j not in self.own)
        return found[0] if len(found) == 1 else found

    def used(self, given: Sequence[T]) -> list[T]:
        """Returns what belongs to the inputs that are used."""
        return [one for i, one in enumerate(given) if i not in self.idle]

    def whole(self, given: Sequence[T], own: dict[int, T], made: Sequence[T]) -> tuple[T, ...]:
        """Returns what belongs to the piece's outputs: some are inputs, some parameters of its own."""
        rest = iter(made)
        there = {j: given[i] for j, i in self.does.handed.items()} | own
        return tuple(there[j] if j in there else next(rest) for j in range(len(made) + len(there)))

    def memory(self, seen: LayerMemory) -> LayerMemory:
        """Returns the memory as that of the piece: what it hands on takes none."""
        count = len(seen.kept) + len(self.idle)
        places, kept = self.used(range(count)), iter(seen.kept)
        made = [one if one.source is None else replace(one, source=places[one.source]) for one in seen.outputs]
        handed = [Output(0, i, False) for i in range(count)]
        return replace(
            seen,
            kept=tuple(i not in self.idle and next(kept) for i in range(count)),
            outputs=self.whole(handed, {j: Output(0, None, False) for j in self.own}, made),
        )


def lean(module: nn.Module) -> Lean | None:
    """Returns a piece of a traced model as it is measured; None for other modules, and where nothing is handed on."""
    if not isinstance(module, Segment) or not module.training:
        return None
    does = computation(module, True)
    return Lean(module) if does.handed or does.own or does.weights else None
