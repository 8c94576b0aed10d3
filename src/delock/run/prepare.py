"""Turns a request into a run that can start: it checks everything, measures the network and cuts it."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from math import inf
from pathlib import Path

from torch import nn

from delock.checkpoints.directory import read
from delock.data.call import Call
from delock.data.loader import LoadedBatch, call_of, loaded
from delock.errors import UsageError, users_own
from delock.memory.optimizer import learned
from delock.optim.stage_facts import for_stage
from delock.options import Simulation
from delock.partition.graph.cutter import ENOUGH
from delock.partition.graph.examples import Examples
from delock.partition.layers import named_state
from delock.partition.measure import with_whole
from delock.run.checks import (
    first_of_test,
    refuse_other_rows,
    refuse_recomputation,
    refuse_unfit,
    refuse_untrainable,
)
from delock.run.choose_cuts import cut_network
from delock.run.heads import refuse_own_loss
from delock.run.hidden import refuse_hidden
from delock.run.layout_choice import choose_layout
from delock.run.measured_network import MeasuredNetwork
from delock.run.prepared import Batch, PreparedRun
from delock.run.request import Request
from delock.run.survival.parts import refuse_other
from delock.run.survival.resume import Begin, refuse_changed, settled
from delock.run.survival.room import make_folder, refuse_folder
from delock.run.unfit_acts import refuse_restaged_acts, refuse_unfit_pace
from delock.run.user_functions import functions_as_given, refuse_stale, try_user_functions
from delock.stage.learner import described
from delock.stage.module import refuse_derived_weights
from delock.stage.unfit import made_by, refuse_unfit_optimizer
from delock.tensors import Value, tensors
from delock.timeline import stage_facts

LOOK = 20  # batches among which one of another size is looked for


def prepare(request: Request, begin: Begin | None = None) -> PreparedRun:
    """Checks all that can be checked before the start, measures the network on a first batch, and cuts it. Raises UsageError.

    begin: the checkpoint that the run goes on from.
    """
    writes = request.checkpoint is not None and request.simulation.replay is None
    if request.checkpoint and writes:
        refuse_folder(request.checkpoint)
    if begin:
        request.network.kept = [cut for cut in begin.manifest.options["cuts"] if isinstance(cut, str)]
    with functions_as_given(request):
        prepared = _prepared(settled(request, begin))
    prepared.given = request.method
    if begin:
        refuse_changed(prepared.conditions(), begin, prepared.length.batches, free=request.method.free_running)
        refuse_other_optimizers(prepared, begin)
        prepared.begin = begin
        if begin.restages(prepared.places):
            refuse_restaged_acts(request)
    if writes:
        make_folder(prepared)
    return prepared


def _prepared(request: Request) -> PreparedRun:
    measured = measured_network(request)
    return cut_network(measured, measured.request.cuts)


def measured_network(request: Request, *, counts: bool = False, fine: bool = False) -> MeasuredNetwork:
    """Checks what can be checked before the network is cut, and measures its layers on a first batch. Raises UsageError.

    counts: the work is counted even if no cuts are to be found by it; fine: the layers are as small as possible.
    """
    waits, cuts = request.simulation.waits, request.cuts
    request.length()  # raises UsageError
    if request.execution.compile and waits:
        raise UsageError("emulated stages compute nothing, so there is nothing to compile: leave compile or emulate out")
    K = _number_of_stages(request)
    request.placement.limits(K)  # raises UsageError
    request = replace(request, method=request.method.fitted(K))
    refuse_unfit_pace(request, request.method, K)
    if request.simulation.slow and any(request.method.slowdown(k) > 1 for k in range(K)):
        raise UsageError("noise and slow both make stages slower: use one of them")
    _refuse_misfit(request.simulation, K, request.seed)
    refuse_hidden(request.model)
    request.network.open(request.network.wanted(cuts, K), everywhere=fine)
    cuts = request.network.named(cuts)
    request = replace(request, cuts=cuts)
    wanted = request.network.wanted(cuts, K)
    refuse_own_loss(request, K)
    if request.network.chain:
        _refuse_network(request, K)
    with users_own("the training data"):
        first = next(iter(loaded(request.train, 0)))
    inputs, targets = first.inputs, first.targets
    refuse_stale(request, _call(request, inputs), inputs, targets)
    tests = first_of_test(request)
    batch = Batch.of(inputs, targets, first.counted)
    if not request.network.chain:
        request.network.trace(_call(request, inputs), _examples(request, first), K, wanted, inf if fine else ENOUGH)
        if request.method.mixed and isinstance(request.model, nn.Module):
            refuse_derived_weights(request.model)  # of whose hooks a graph may show nothing any more
        _refuse_network(request, K)
    network = request.network.layers()
    request = replace(
        request,
        loss=request.network.loss(request.loss),
        metrics={name: request.network.on_output(metric) for name, metric in request.metrics.items()},
    )
    refuse_other_rows(request.execution, [batch.inputs], batch.rows)
    counts = counts or (cuts is None and K > 1 and request.placement.balance == "counted")
    execution, costs = choose_layout(request, network, inputs, targets, counts=counts)
    costs = with_whole(costs, network, dict(named_state(request.network.whole)), batch.rows)
    refuse_other_rows(execution, [batch.inputs, *(cost.outputs for cost in costs[:-1])], batch.rows)
    for what in (layer.called(i) for i, layer in enumerate(network) if costs[i].recomputes):
        refuse_recomputation(request.method, execution, what)
    try_user_functions(request, execution, first, {} if waits else tests)
    marks = request.network.marks() if cuts is None else ()
    return MeasuredNetwork(request, K, network, costs, batch, execution, inputs, targets, marks)


def _refuse_network(request: Request, K: int) -> None:
    """Raises UsageError for a network that is too small for its stages, or in which nothing learns."""
    network = request.network.layers()
    refuse_unfit(network, K, request.cuts, request.method, request.train.sizes())
    if not request.simulation.waits:
        refuse_untrainable(network)


def _examples(request: Request, first: LoadedBatch) -> Examples:
    """Returns batches to trace with. Where a rule counts the samples, rows cannot be taken out: then a later batch is the other one."""
    if first.counted is None:
        assert isinstance(request.model, nn.Module)
        return Examples.by_rows(tensors(first.inputs), first.samples, request.model)
    sizes = [x.shape for x in tensors(first.inputs)]
    with users_own("the training data"):
        later = (tensors(one.inputs) for one in islice(loaded(request.train, 0), LOOK))
        other = next((one for one in later if [x.shape for x in one] != sizes), tensors(first.inputs))
    return Examples(tensors(first.inputs), other)


def _call(request: Request, inputs: Value) -> Call:
    """Returns the way in which the model is called: as the loader says, else with one argument per tensor."""
    whole = request.network.chain or request.network.opened
    return call_of(request.train) or Call.of((inputs,) if whole else tensors(inputs), {})[0]


def refuse_other_optimizers(prepared: PreparedRun, begin: Begin) -> None:
    """Raises UsageError if a stage's optimizer is made otherwise than that of the checkpoint: loading it would hide the difference."""
    request, facts = prepared.request, stage_facts(prepared.request.method, prepared.K)
    if begin.restages(prepared.places):  # then others, by names
        return
    for k, module in enumerate(prepared.modules):
        named = learned(module, prepared.heads.get(k), k)
        made = made_by(for_stage(request.optimizer, facts[k]), list(named), "optimizer", k) if named else None
        if named:
            refuse_unfit_optimizer(made, named, request.optimizer)
        refuse_other(described(made), read(Path(begin.path), "optimizer", k, outline=True)["made"], k)


def _refuse_misfit(simulation: Simulation, K: int, seed: int) -> None:
    """Raises UsageError if the stages that are slow, or whose visits are done again, are not the K stages of this run."""
    simulation.straggler(K, seed)
    if simulation.replay is not None and len(simulation.replay) != K:
        raise UsageError(f"visits of {len(simulation.replay)} stages cannot be done again by {K}: cut the network as it was cut then")


def _number_of_stages(request: Request) -> int:
    if request.cuts is not None:
        K = len(request.cuts) + 1
        if request.stages not in (None, K):
            raise UsageError(f"{len(request.cuts)} cuts make {K} stages, but stages is {request.stages}: give one of them")
        return K
    if request.stages is not None:
        return request.stages
    return len(request.model) if isinstance(request.model, list | tuple | nn.ModuleList) else 2
