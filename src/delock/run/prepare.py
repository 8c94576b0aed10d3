"""Turns a request into a run that can start: it checks everything, measures the network and cuts it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from delock.checkpoints.directory import read
from delock.data.call import Call
from delock.data.loader import call_of, loaded
from delock.errors import UsageError, users_own
from delock.keys import key
from delock.memory.optimizer import learned
from delock.nets.emulated import Emulated, WaitingStep
from delock.optim.stage_facts import for_stage
from delock.options import Simulation
from delock.partition.balance import balance
from delock.partition.layers import Layer, has_batch_norm, resolve_cuts
from delock.partition.measure import LayerCost
from delock.partition.stages import stages
from delock.run.checks import (
    refuse_empty_test,
    refuse_other_rows,
    refuse_recomputation,
    refuse_single_samples,
    refuse_unfit,
    refuse_unfit_codecs,
    refuse_untrainable,
)
from delock.run.heads import auxiliary, head_cost, head_shares
from delock.run.layout_choice import choose_layout
from delock.run.parts import refuse_other
from delock.run.prepared import Batch, PreparedRun
from delock.run.request import Request
from delock.run.resume import Begin, refuse_changed, settled
from delock.run.room import make_folder, refuse_folder
from delock.stage.learner import described
from delock.stage.unfit import made_by, refuse_unfit_optimizer
from delock.tensors import Value, map_tensors, tensors
from delock.timeline import Emulation, stage_facts


def prepare(request: Request, begin: Begin | None = None) -> PreparedRun:
    """Checks all that can be checked before the start, measures the network on a first batch, and cuts it. Raises UsageError.

    begin: the checkpoint that the run goes on from.
    """
    writes = request.checkpoint is not None and request.simulation.replay is None
    if request.checkpoint and writes:
        refuse_folder(request.checkpoint)
    prepared = _prepared(settled(request, begin))
    prepared.given = request.method
    if begin:
        refuse_changed(prepared.conditions(), begin, prepared.length.batches, free=request.method.free_running)
        refuse_other_optimizers(prepared, begin)
        prepared.begin = begin
    if writes:
        make_folder(prepared)
    return prepared


def _prepared(request: Request) -> PreparedRun:
    waits, cuts = request.simulation.waits, request.cuts
    request.length()  # raises UsageError
    if request.execution.compile and waits:
        raise UsageError("emulated stages compute nothing, so there is nothing to compile: leave compile or emulate out")
    K = _number_of_stages(request)
    request = replace(request, method=request.method.fitted(K))
    if request.simulation.slow and any(request.method.slowdown(k) > 1 for k in range(K)):
        raise UsageError("noise and slow both make stages slower: use one of them")
    _refuse_misfit(request.simulation, K, request.seed)
    if request.network.chain:
        _refuse_network(request, K)
    with users_own("the training data"):
        first = next(iter(loaded(request.train, 0)))
    inputs, targets = first.inputs, first.targets
    refuse_empty_test(request)
    batch = Batch.of(inputs, targets, first.counted)
    if not request.network.chain:
        request.network.trace(_call(request, inputs), inputs, batch.rows, K, [cut for cut in cuts or () if isinstance(cut, str)])
        _refuse_network(request, K)
    network = request.network.layers()
    request = replace(
        request,
        loss=request.network.loss(request.loss),
        metrics={name: request.network.on_output(metric) for name, metric in request.metrics.items()},
    )
    refuse_other_rows(request.execution, [batch.inputs], batch.rows)
    counts = cuts is None and K > 1 and request.placement.balance == "counted"
    execution, costs = choose_layout(request, network, inputs, targets, counts=counts)
    refuse_other_rows(execution, [batch.inputs, *(cost.outputs for cost in costs[:-1])], batch.rows)
    for what in (layer.called(i) for i, layer in enumerate(network) if costs[i].recomputes):
        refuse_recomputation(request.method, execution, what)
    if cuts is None:
        cuts = balance([cost.work if counts else cost.total_s for cost in costs], K, [cost.params for cost in costs])
    found = tuple(resolve_cuts(network, cuts))
    refuse_unfit_codecs(request, [costs[cut - 1] for cut in found])
    heads = auxiliary(request, K, [costs[cut - 1].shape for cut in found], costs[-1].shape)
    normed = [*(network if execution.chunks > 1 else ()), *(Layer(f"heads.{k}", head, head.training) for k, head in heads.items())]
    if has_batch_norm(normed):
        refuse_single_samples(request.train.sizes() or [], request.method.micro_batches * execution.chunks)
    shaped = {k: costs[found[k] - 1].shape for k in heads}
    head_costs = {k: head_cost(request, execution, k, head, (batch.rows, *shaped[k]), targets) for k, head in heads.items() if shaped[k]}
    for what in (f"the head of stage {k}" for k, cost in head_costs.items() if cost.recomputes):
        refuse_recomputation(request.method, execution, what)
    if waits:
        request = replace(request, optimizer=WaitingStep(request.optimizer, waits.update)) if waits.update else request
        return PreparedRun(request, network, found, costs, batch, execution, *_emulated(request, waits, [*found, len(network)], costs))
    modules = stages(network, found)
    shares = head_shares(modules, heads, [costs[cut - 1].shape for cut in found], inputs)
    entering = map_tensors(lambda x: x.to("meta"), inputs) if execution.compile else None
    return PreparedRun(request, network, found, costs, batch, execution, modules, heads, head_costs, shares, inputs=entering)


def _refuse_network(request: Request, K: int) -> None:
    """Raises UsageError for a network that is too small for its stages, or in which nothing learns."""
    network = request.network.layers()
    refuse_unfit(network, K, request.cuts, request.method, request.train.sizes())
    if not request.simulation.waits:
        refuse_untrainable(network)


def _call(request: Request, inputs: Value) -> Call:
    """Returns the way in which the model is called: as the loader says, else with one argument per tensor."""
    return call_of(request.train) or Call.of(tensors(inputs), {})[0]


def refuse_other_optimizers(prepared: PreparedRun, begin: Begin) -> None:
    """Raises UsageError if a stage's optimizer is made otherwise than that of the checkpoint: loading it would hide the difference."""
    request, facts = prepared.request, stage_facts(prepared.request.method, prepared.K)
    if begin.restages(prepared.cuts):  # then others, by names
        return
    for k, module in enumerate(prepared.modules):
        named = learned(module, prepared.heads.get(k), k)
        made = made_by(for_stage(request.optimizer, facts[k]), list(named), "optimizer", k) if named else None
        if named:
            refuse_unfit_optimizer(made, named)
        refuse_other(described(made), read(Path(begin.path), "optimizer", k, outline=True)["made"], k)


def _refuse_misfit(simulation: Simulation, K: int, seed: int) -> None:
    """Raises UsageError if the stages that are slow, or whose visits are done again, are not the K stages of this run."""
    simulation.straggler(K, seed)
    if simulation.replay is not None and len(simulation.replay) != K:
        raise UsageError(f"visits of {len(simulation.replay)} stages cannot be done again by {K}: cut the network as it was cut then")


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


def _number_of_stages(request: Request) -> int:
    if request.cuts is not None:
        K = len(request.cuts) + 1
        if request.stages not in (None, K):
            raise UsageError(f"{len(request.cuts)} cuts make {K} stages, but stages is {request.stages}: give one of them")
        return K
    if request.stages is not None:
        return request.stages
    return len(request.model) if isinstance(request.model, list | tuple | nn.ModuleList) else 2
