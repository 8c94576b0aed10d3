"""The values a plan is made of: a step, a stage's column of steps, and the length of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from delock.ops import Op

Keep = Literal["graph", "input", "nothing"]


@dataclass(frozen=True, slots=True)
class Step:
    """An op in its place in a plan, with what follows from the rest of the plan."""

    op: Op
    tick: int
    version: int  # Updates that the stage has made before it
    keep: Keep = "nothing"  # Forward: for the Backwards of this batch
    snapshot: bool = False  # Forward: a stashed Backward lies behind an Update, so the weights must be kept as well
    last: bool = False  # Backward: no later op needs this batch's memory
    up: bool = False  # Forward, Evaluate: stage k + 1 is listening
    down: bool = False  # Backward: stage k - 1 is listening
    sends_norms: bool = False  # Backward: the Update behind it clips over the network, so the norms of this gradient go down with it
    weights_later: bool = False  # Backward of the input: one of the weights, for the same batch and loss, comes later
    slot: int = 0  # Forward, Backward: its place among those of the stage, in micro-batches; between the two lies the layer-wise staleness
    banks: int = 0  # Update: older versions of the weights that the stage must have after it


@dataclass(frozen=True, slots=True)
class RunLength:
    """The length of a run in batches (of one update each for synchronous methods), and its evaluations.

    With `every` > 0 the network is evaluated on `evaluation` batches after each `every` training batches, and at the end.
    clip: the largest norm of a gradient, over the network where the method is synchronous, else over a stage. first: the batch with which
    its stages begin, at the tick of that number; they count their Updates from there.
    """

    batches: int
    every: int = 0
    evaluation: int = 0
    clip: float | None = None
    first: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """columns[k] is the program of stage k, or the window of it that lies in some range of ticks. begin: the first of them."""

    columns: tuple[tuple[Step, ...], ...]
    begin: int = 0

    @property
    def K(self) -> int:
        """Number of stages."""
        return len(self.columns)
