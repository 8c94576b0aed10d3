"""Chooses where a measured network is cut: even stages, at CutPoints alone if it has some, within a limit of memory if there is one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from delock.errors import UsageError
from delock.partition.balance import balance
from delock.partition.balance_within import balance_within, smallest_need
from delock.partition.layers import Layer, resolve_cuts
from delock.run.measured_network import MeasuredNetwork
from delock.run.prepared import PreparedRun
from delock.run.stage_memory import StageNeeds, needed, refuse_unknown, sized

TRIES = 20  # candidates for which shared memory, which depends on all stages together, may turn out larger than that of the first


def cut_network(measured: MeasuredNetwork, cuts: Sequence[int | str] | None) -> PreparedRun:
    """Returns the run with the cuts that are given, or with the best ones. Raises UsageError where a stage would need too much memory."""
    limits = measured.request.placement.limits(measured.K)
    if limits:
        refuse_unknown(measured)
    if cuts is not None:
        prepared = measured.cut(tuple(resolve_cuts(measured.layers, cuts)))
        if limits and not _fit(needed(prepared), limits):
            raise UsageError(f"the stages would need {_compared(needed(prepared), limits)}: cut elsewhere, or let delock choose the cuts")
        return prepared
    edges = [0, *(places(measured) if measured.K > 1 else ()), len(measured.layers)]
    work, params = measured.work(), [cost.params for cost in measured.costs]
    costs = [sum(work[a:b]) for a, b in itertools.pairwise(edges)]
    learned = [sum(params[a:b]) for a, b in itertools.pairwise(edges)]
    prepared = measured.cut(tuple(edges[i] for i in balance(costs, measured.K, learned)))
    return _within(measured, limits, prepared, edges, costs, learned) if limits else prepared


def places(measured: MeasuredNetwork) -> list[int]:
    """Returns the layers in front of which the network may be cut: any but the first, or those with a CutPoint if the model has some.

    Where stages need heads, only places are taken behind which one is known, if there are enough. Raises UsageError if there are too few
    CutPoints, or if one marks no place.
    """
    layers, marks = measured.layers, set(measured.marks)
    if not marks:
        every = range(1, len(layers))
        headed = [i for i in every if not measured.goal or measured.goal.name(measured.costs[i - 1].outputs)]
        return headed if len(headed) >= measured.K - 1 else list(every)
    found = [i for i, layer in enumerate(layers) if i and marks & _names(layer)]
    if idle := next((mark for mark in measured.marks if mark not in {name for i in found for name in _names(layers[i])}), None):
        raise UsageError(f"the CutPoint {idle} stands at an end of the model, where there is nothing to cut: take it out")
    if len(found) < measured.K - 1:
        s, have = "s" * (len(found) > 1), len(found)
        raise UsageError(
            f"the model has {have} CutPoint{s}, but {measured.K} stages need {measured.K - 1} cuts: add CutPoints, use at most "
            f"{have + 1} stages, or say in cuts where to cut"
        )
    return found


def _names(layer: Layer) -> set[str]:
    return {layer.name, *layer.also}


def _within(
    measured: MeasuredNetwork,
    limits: Sequence[int],
    prepared: PreparedRun,
    edges: Sequence[int],
    costs: Sequence[float],
    learned: Sequence[int],
) -> PreparedRun:
    """Returns the run with the best cuts whose stages stay under their limits; `prepared`: with the best ones of all."""
    needs = StageNeeds(measured, prepared.slots())

    def need(k: int, a: int, b: int) -> float:
        return needs.of(k, edges[a], edges[b])

    def fits(k: int, a: int, b: int) -> bool:
        return needs.least(edges[a], edges[b]) <= limits[k] and need(k, a, b) <= limits[k]

    for _ in range(TRIES):
        own = needed(prepared)
        if _fit(own, limits):
            return prepared
        needs.correct(prepared.bounds(), own)
        found = balance_within(costs, measured.K, fits, learned)
        if found is None:
            break
        prepared = measured.cut(tuple(edges[i] for i in found))
    best = smallest_need(
        measured.K, len(costs), lambda k, a, b: needs.least(edges[a], edges[b]) / limits[k], lambda k, a, b: need(k, a, b) / limits[k]
    )
    cuts = tuple(edges[i] for i in best)
    own, names = needed(measured.cut(cuts)), [measured.layers[cut].name or str(cut) for cut in cuts]
    raise UsageError(
        f"no cuts into {measured.K} stages keep within stage_memory: at the best ones ({', '.join(names)}) the stages would need "
        f"{_compared(own, limits)}: use more stages, smaller batches, or a method that keeps fewer batches under way"
    )


def _fit(needs: Sequence[int], limits: Sequence[int]) -> bool:
    return all(need <= limit for need, limit in zip(needs, limits, strict=True))


def _compared(needs: Sequence[int], limits: Sequence[int]) -> str:
    return f"{', '.join(map(sized, needs))}, and stage_memory allows {', '.join(map(sized, limits))}"
