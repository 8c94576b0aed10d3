"""Predicts what a stage needs: what it is built of, weights and buffers, and the peak above that; and what any layers would as a stage."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from delock.errors import UsageError
from delock.memory.optimizer import fixed_bytes, learned, optimizer_bytes
from delock.memory.peaks import first_columns, stage_peak
from delock.memory.sizes import Outputs, RunLinks, stage_sizes
from delock.partition.layers import under
from delock.partition.measure import LayerCost
from delock.run.heads import auxiliary, tried
from delock.run.measured_network import MeasuredNetwork
from delock.run.prepared import PreparedRun
from delock.timeline import stage_facts

UNKNOWN = float("inf")


def refuse_unknown(measured: MeasuredNetwork) -> None:
    """Raises UsageError if a limit of memory is given where memory cannot be predicted."""
    request, layers = measured.request, measured.layers
    dark = next((i for i, cost in enumerate(measured.costs) if cost.memory is None), None)
    weights = {name: weight for layer in layers for name, weight in layer.module.named_parameters() if weight.requires_grad}
    if request.simulation.emulate:
        why, remedy = "emulated stages hold none", "leave emulate or stage_memory out"
    elif request.execution.compile:
        why, remedy = "that of compiled stages depends on the compiler", "leave compile or stage_memory out"
    elif not request.method.planned:
        why, remedy = "that of free-running stages depends on the order of their messages", "leave stage_memory out"
    elif dark is not None:
        why, remedy = f"that of {layers[dark].called(dark)} cannot be counted", "leave stage_memory out"
    elif optimizer_bytes(request.optimizer, list(weights.items()), request.device) is None:
        why, remedy = (
            "that of the optimizer is not known",
            "give functools.partial of one of torch.optim, or a factory with a method `bytes`",
        )
    else:
        return
    raise UsageError(f"stage_memory needs a prediction of memory, and {why}: {remedy}")


def needed(prepared: PreparedRun) -> list[int]:
    """Returns the bytes that every stage needs. Raises UsageError if a head hides them."""
    found = [need for need in needs_if_known(prepared) if need is not None]
    if len(found) < prepared.K:
        raise UsageError("stage_memory needs a prediction of memory, and that of an auxiliary head is not known: leave stage_memory out")
    return found


def needs_if_known(prepared: PreparedRun) -> list[int | None]:
    """Returns the bytes that every stage needs: weights, buffers, and the predicted peak above them."""
    found: list[int | None] = []
    for k, (module, most) in enumerate(zip(prepared.modules, prepared.memory(), strict=True)):
        head = prepared.heads.get(k)
        weights = sum(weight.nbytes for _, weight in learned(module, head, k))
        built = weights + fixed_bytes(module, head)
        found.append(built + most.grows(prepared.request.device) if most else None)
    return found


class StageNeeds:
    """Predicts the bytes that stage k needs if it is made of the layers a .. b - 1; each answer is kept.

    slots: those of shared memory with other cuts, for a guess; `correct` puts what is known of a whole run in its place.
    """

    def __init__(self, measured: MeasuredNetwork, slots: list[tuple[int, int]] | None) -> None:
        request, K = measured.request, measured.K
        self.measured, self.slots = measured, slots
        self.columns = first_columns(request.method, K, request.length().batches)
        self.facts = stage_facts(request.method, K)
        self.ahead = request.workers != "inline" and torch.device(request.device).type == "cpu"
        self.known: dict[tuple[int, int, int], float] = {}
        self.bounds: dict[tuple[int, int], float] = {}
        self.heads: dict[tuple[int, Outputs], tuple[nn.Module, LayerCost] | None] = {}
        self.state = [
            [(under(layer.prefix, name), one) for name, one in (*layer.module.named_parameters(), *layer.module.named_buffers())]
            for layer in measured.layers
        ]

    def of(self, k: int, a: int, b: int) -> float:
        """Returns the bytes; infinite if they are not known."""
        if (k, a, b) not in self.known:
            self.known[k, a, b] = self._of(k, a, b)
        return self.known[k, a, b]

    def least(self, a: int, b: int) -> float:
        """Returns bytes below which the need cannot be, in little time: weights, buffers and gradients."""
        if (a, b) not in self.bounds:
            self.bounds[a, b] = sum(one.nbytes * (1 + one.requires_grad) for _, one in self._state(a, b))
        return self.bounds[a, b]

    def correct(self, bounds: Sequence[tuple[int, int]], needs: Sequence[int]) -> None:
        """Puts in what the stages of a whole run need."""
        self.known |= {(k, a, b): need for k, ((a, b), need) in enumerate(zip(bounds, needs, strict=True))}

    def _state(self, a: int, b: int) -> list[tuple[str, Tensor]]:
        found: dict[int, tuple[str, Tensor]] = {}
        for name, one in itertools.chain.from_iterable(self.state[a:b]):
            found.setdefault(id(one), (name, one))
        return list(found.values())

    def _of(self, k: int, a: int, b: int) -> float:
        measured, request = self.measured, self.measured.request
        head: tuple[nn.Module, LayerCost] | None = None
        if k in request.method.headed(measured.K):
            head = self._head(k, measured.costs[b - 1].outputs)
            if head is None:
                return UNKNOWN
        named = self._state(a, b) + (
            [(f"heads.{k}.{name}", one) for name, one in (*head[0].named_parameters(), *head[0].named_buffers())] if head else []
        )
        weights = [(name, one) for name, one in named if one.requires_grad]
        optimizer = optimizer_bytes(request.optimizer, weights, request.device, self.facts[k])
        built, own = sum(one.nbytes for _, one in named), sum(one.nbytes for _, one in weights)
        cut = [measured.costs[(a if link < k else b) - 1] for link in range(measured.K - 1)]  # of the stage's own links
        links = RunLinks(request.method, request.compression, cut, measured.batch.targets, self.slots, ahead=self.ahead)
        sizes = stage_sizes(k, links, measured.costs[a:b], head and head[1], optimizer, measured.batch.inputs, built - own)
        if sizes is None:
            return UNKNOWN
        saves, mixed = request.checkpoint is not None, request.method.mixed
        return built + stage_peak(self.columns, k, sizes, saves=saves, mixed=mixed).grows(request.device)

    def _head(self, k: int, outputs: tuple[tuple[tuple[int, ...], torch.dtype], ...]) -> tuple[nn.Module, LayerCost] | None:
        """Returns the head of a stage with such outputs, and its cost; None if there is none that fits."""
        at, measured = (k, outputs), self.measured
        if at not in self.heads and measured.goal:
            self.heads[at] = None
            with suppress(UsageError):
                request, every = measured.request, [outputs] * (measured.K - 1)
                head = auxiliary(request, measured.K, every, measured.goal)[k]
                costs, _ = tried(request, measured.execution, {k: head}, every, measured.goal, measured.targets)
                self.heads[at] = (head, costs[k]) if k in costs else None
        return self.heads[at]


def sized(count: float) -> str:
    """Returns a number of bytes in words."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB")) if count >= size), (1e3, "KB"))
    return f"{count / size:.2f} {unit}"
