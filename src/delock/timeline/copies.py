"""Counts the copies of its weights that a stage has, step by step: for graphs of older versions, in banks, and drawn out."""

from __future__ import annotations

from typing import TypeAlias

from delock.ops import Forward
from delock.plan import Step

Copy: TypeAlias = tuple[int, float]
"""(version, Updates by which it is drawn out)."""


class Copies:
    """Follows the copies of a stage in the order in which it makes and drops them. A stage makes one copy for all graphs that need it.

    for_all: every graph has a copy, as with at="mixed" where the run is saved in checkpoints.
    """

    def __init__(self, *, for_all: bool = False) -> None:
        self.for_all = for_all
        self.made: set[Copy] = set()  # for batches to come as well
        self.of: dict[int, Copy] = {}  # batch in flight -> the copy that its graph has

    @property
    def alive(self) -> set[Copy]:
        """Returns all copies that there are."""
        return self.made | set(self.of.values())

    @property
    def saved(self) -> set[Copy]:
        """Returns those that a checkpoint needs: weights that are drawn out for batches to come can be drawn out again."""
        return {(version, ahead) for version, ahead in self.made if not ahead} | set(self.of.values())

    def forward(self, step: Step) -> None:
        """Makes or finds the copy that a Forward needs."""
        op = step.op
        assert isinstance(op, Forward)
        used = op.weights.used(step.version)
        drawn = op.weights.draws_out(step.version)
        held = step.snapshot or (self.for_all and step.keep == "graph")
        if drawn or held:
            copy = (used, op.weights.ahead if drawn else 0.0)
            self.made.add(copy)
            if held:
                self.of[op.batch] = copy

    def update(self, step: Step) -> None:
        """Keeps as many older versions as the Update says, the one that it replaces included, and drops the rest."""
        oldest = step.version + 1 - step.banks
        if step.banks:
            self.made.add((step.version, 0.0))
        self.made = {(version, ahead) for version, ahead in self.made if version >= oldest + (ahead > 0)}

    def drop(self, batch: int) -> None:
        """Drops the graph of a batch after its last Backward."""
        self.of.pop(batch, None)
