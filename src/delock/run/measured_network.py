"""A network that has been measured on a batch: it can be cut anywhere, and then makes a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from delock.errors import UsageError
from delock.keys import key
from delock.nets.emulated import Emulated, WaitingStep
from delock.options import Execution
from delock.partition.layers import Layer, has_batch_norm
from delock.partition.measure import LayerCost
from delock.partition.stages import stages
from delock.run.checks import refuse_recomputation, refuse_single_samples, refuse_unfit_codecs
from delock.run.heads import Goal, auxiliary, head_shares, tried
from delock.run.prepared import Batch, PreparedRun
from delock.run.request import Request
from delock.tensors import Value, map_tensors
from delock.timeline import Emulation


@dataclass(frozen=True)
class MeasuredNetwork:
    """Holds a request that fits K stages, its network as layers, and their costs on the first batch."""

    request: Request
    K: int
    layers: list[Layer]
    costs: list[LayerCost]
    batch: Batch
    execution: Execution
    inputs: Value
    targets: Any
    marks: Sequence[str] = ()  # CutPoints, by path

    def work(self) -> list[float]:
        """Returns the cost of every layer in the measure by which the stages are made even."""
        counts = self.request.placement.balance == "counted"
        return [cost.work if counts else cost.total_s for cost in self.costs]

    def cut(self, found: tuple[int, ...]) -> PreparedRun:
        """Returns the run with these cuts. Raises UsageError for what does not go with them."""
        request, costs, K, execution = self.request, self.costs, self.K, self.execution
        refuse_unfit_codecs(request, [costs[cut - 1] for cut in found])
        outputs = [costs[cut - 1].outputs for cut in found]
        heads = auxiliary(request, K, outputs, self.goal)
        normed = [*(self.layers if execution.chunks > 1 else ()), *(Layer(f"heads.{k}", head, head.training) for k, head in heads.items())]
        if has_batch_norm(normed):
            refuse_single_samples(request.train.sizes() or [], request.method.micro_batches * execution.chunks)
        head_costs, head_losses = tried(request, execution, heads, outputs, self.goal, self.targets) if self.goal else ({}, {})
        for what in (f"the head of stage {k}" for k, cost in head_costs.items() if cost.recomputes):
            refuse_recomputation(request.method, execution, what)
        if waits := request.simulation.waits:
            request = replace(request, optimizer=WaitingStep(request.optimizer, waits.update)) if waits.update else request
            emulated = _emulated(request, waits, [*found, len(self.layers)], costs)
            return PreparedRun(request, self.layers, found, costs, self.batch, execution, *emulated)
        modules = stages(self.layers, found)
        shares = head_shares(modules, heads, outputs, self.inputs, self.goal) if self.goal else {}
        entering = map_tensors(lambda x: x.to("meta"), self.inputs) if execution.compile else None
        own = (heads, head_costs, head_losses, shares)
        return PreparedRun(request, self.layers, found, costs, self.batch, execution, modules, *own, inputs=entering)

    @cached_property
    def goal(self) -> Goal | None:
        """Returns what heads have to predict, if stages have some."""
        return Goal.of(self.request, self.costs[-1].outputs, self.targets) if self.request.method.headed(self.K) else None


def _emulated(
    request: Request, waits: Emulation, ends: Sequence[int], costs: Sequence[LayerCost]
) -> tuple[list[Emulated], dict[int, nn.Module]]:
    """Returns stages that wait, and heads that cost nothing, with outputs as large as the real ones."""
    share = 1 / request.method.micro_batches
    shapes = [costs[end - 1].shape for end in ends]
    if not all(shapes):
        raise UsageError("a stage whose output is a tuple cannot be emulated: cut elsewhere")
    modules = [
        Emulated(shape, share * waits.forward, share * waits.backward, jitter=waits.jitter, seed=key(request.seed, "emulate", k))
        for k, shape in enumerate(shapes)
    ]
    return modules, {k: Emulated(shapes[-1], 0.0, 0.0) for k in request.method.headed(len(ends))}
