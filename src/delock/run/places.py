"""The places where a measured network can be cut, with what a choice between them goes by."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from delock.run.measured_network import MeasuredNetwork


@dataclass(frozen=True)
class CutPlace:
    """Holds a layer, and what a cut in front of it would send. The first layer has nothing in front of it."""

    name: str  # what `cuts` takes
    also: tuple[str, ...]  # other names of the place
    before: float  # share of all work that lies in front of it
    work: float  # share of all work that the layer does
    parameters: int
    kept: int | None  # bytes that the layer holds between its forward and its backward, of one batch
    tensors: int  # that cross the cut
    bytes: int  # of these, per batch
    tied: dict[str, int]  # of these, weights that both sides use, and their bytes


def places_of(measured: MeasuredNetwork) -> list[CutPlace]:
    """Returns a place for each layer, in order."""
    work = measured.work()
    whole = sum(work) or 1.0
    found = []
    for i, (layer, cost, before) in enumerate(zip(measured.layers, measured.costs, accumulate(work, initial=0.0), strict=False)):
        crossing = measured.costs[i - 1] if i else None
        memory = cost.memory
        found.append(
            CutPlace(
                name=layer.name or str(i),
                also=tuple(name for name in layer.also if name != layer.name),
                before=before / whole,
                work=work[i] / whole,
                parameters=cost.params,
                kept=memory.graph + sum(out.size for out in memory.outputs if out.source is None) if memory else None,
                tensors=len(crossing.outputs) if crossing else 0,
                bytes=crossing.out_bytes if crossing else 0,
                tied=dict(layer.ties),
            )
        )
    return found
