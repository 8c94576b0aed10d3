"""Measures the two stalenesses of every batch, and the batches in flight, on a plan or on the spans of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from delock.ops import DERIVATIVES, Backward, Forward, Op, Update
from delock.plan import Plan, Step
from delock.timeline.copies import Copies


class Placed(Protocol):
    """An op with its version and slot: a Step of a plan, or a Span of a timeline."""

    @property
    def op(self) -> Op: ...
    @property
    def version(self) -> int: ...
    @property
    def slot(self) -> int: ...


def gradient_staleness(column: Iterable[Placed], *, from_forward: bool = False) -> dict[int, int]:
    """Returns the gradient staleness of every batch in updates: the age of its gradient's weights when an Update applies the gradient.

    Stash and mixed count from the version that the Forward used (ahead: that it started from), replay from the Backward itself, which gives
    0; layer-wise staleness says more there. from_forward: replay, too, counts from the Forward, whose weights made the activations that the
    error belongs to.
    Batches whose Forward or Update lies outside the column are left out.
    """
    taken: dict[int, int] = {}
    pending: list[int] = []
    found: dict[int, int] = {}
    for placed in column:
        match placed.op:
            case Forward(b, True, weights=weights):
                taken[b] = weights.used(placed.version)
            case Backward(b, at=at, part=part):
                if not from_forward and DERIVATIVES[at, taken.get(b) == placed.version].counts_from == "backward":
                    taken[b] = placed.version
                if part != "input" and b in taken:
                    pending.append(b)
            case Update():
                found.update((b, placed.version - taken.pop(b)) for b in dict.fromkeys(pending))
                pending.clear()
    return found


def layer_staleness(column: Iterable[Placed]) -> dict[int, int]:
    """Returns D_k of every (micro-)batch: those between its Forward and its last Backward. Batches without both are left out."""
    forward: dict[int, int] = {}
    found: dict[int, int] = {}
    for placed in column:
        match placed.op:
            case Forward(b, True):
                forward[b] = placed.slot
            case Backward(b) if b in forward:
                found[b] = placed.slot - forward[b]
    return found


def warm_group(staleness: dict[int, int], group: int) -> tuple[int, ...]:
    """Returns the staleness of the last complete group of `group` batches, those of one Update; zeros if there is none."""
    last = len(staleness) // group * group
    return tuple(staleness[b] for b in range(last - group, last)) if last else (0,) * group


@dataclass(frozen=True, slots=True)
class HeldCounts:
    """Holds the largest numbers that a stage has at one time."""

    graphs: int  # live graphs, the one of a recomputation included
    inputs: int  # inputs stored without a graph
    versions: int  # sets of the stage's weights: the current ones, older ones, and drawn out ones


def in_flight(plan: Plan) -> tuple[HeldCounts, ...]:
    """Returns the largest numbers that each stage of a whole plan holds, from what its steps keep."""
    return tuple(map(holds, plan.columns))


def holds(column: Iterable[Step]) -> HeldCounts:
    """Returns the largest numbers that a stage holds in its column."""
    kept: dict[str, set[int]] = {"graph": set(), "input": set()}  # batches
    copies = Copies()
    most = [0, 0, 1]
    for step in column:
        op = step.op
        if isinstance(op, Update):
            copies.update(step)
            continue  # nothing more is held than just before
        if step.keep != "nothing":
            kept[step.keep].add(op.batch)
        if isinstance(op, Forward):
            copies.forward(step)
        recomputed = isinstance(op, Backward) and op.batch in kept["input"]
        versions = copies.alive | {(step.version, 0.0)}
        most = [*map(max, most, (len(kept["graph"]) + recomputed, len(kept["input"]), len(versions)))]
        if step.last:
            kept["graph"].discard(op.batch)
            kept["input"].discard(op.batch)
            copies.drop(op.batch)
    return HeldCounts(*most)
