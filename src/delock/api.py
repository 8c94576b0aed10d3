"""The library's front door: `fit` trains a network of your own on data of your own with any method, in one process or several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import wraps
from types import MappingProxyType
from typing import Any, ParamSpec, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from delock.data.call import Takes, takes
from delock.data.handed import Handed
from delock.data.iterable import evaluation_loader, train_loader
from delock.errors import UsageError, users_own
from delock.keys import MOST_SEED
from delock.launch.ambient import refuse_modes
from delock.launch.context import importing_main
from delock.launch.main_program import not_run_again
from delock.launch.rank import backend_for
from delock.launch.variables import under_torchrun
from delock.methods import Method, make
from delock.methods.base import whole
from delock.optim.objects import per_stage
from delock.options import Acts, Checkpoint, Compression, Execution, Placement, Report, Simulation
from delock.partition.graph.outputs import own_loss
from delock.partition.wrappers import unwrapped
from delock.records import Evaluation, Event, Result
from delock.run.carry_out import carry_out
from delock.run.checks import (
    refuse_replay,
    refuse_sessionless,
    refuse_uncapturable,
    refuse_unsavable,
    refuse_wrong_callbacks,
    refuse_wrong_link,
    refuse_wrong_types,
)
from delock.run.collect import collect
from delock.run.evaluation import evaluation
from delock.run.in_use import trained_alone
from delock.run.nonfinite import explained
from delock.run.own_loop.turns import ENDLESS
from delock.run.request import Metric, Request, Workers
from delock.run.session import Session
from delock.run.unfit_acts import refuse_unfit_acts
from delock.stage import Loss, OptimizerFactory, ScheduleFactory

P = ParamSpec("P")
R = TypeVar("R")

GROUPS = MappingProxyType(
    {"execution": Execution, "placement": Placement, "compression": Compression, "simulation": Simulation, "report": Report}
)
MOVED = MappingProxyType(
    {
        **{option.name: f"{name}=delock.{group.__name__}({option.name}=...)" for name, group in GROUPS.items() for option in fields(group)},
        "steps": "batches=...",
        "on_event": "callbacks=[...]",
        "turns": "simulation=delock.Simulation(replay=...)",
    }
)
"""Keywords that `fit` once had, and what is written today."""


def refuse_moved(function: Callable[P, R]) -> Callable[P, R]:
    """Lets the function raise UsageError for a keyword that it once had, with today's spelling. Its signature stays as it is."""

    @wraps(function)
    def checked(*args: P.args, **given: P.kwargs) -> R:
        for name in given:
            if name in MOVED:
                raise UsageError(f"fit has no keyword {name!r} any more: write {MOVED[name]}")
        return function(*args, **given)

    return checked


@refuse_moved
def fit(
    model: nn.Module | Sequence[nn.Module],
    train: Any,
    test: Any = None,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | Optimizer,
    method: str | Method = "ddg",
    schedule: ScheduleFactory | LRScheduler | None = None,
    stages: int | None = None,
    cuts: Sequence[int | str] | None = None,
    epochs: int | None = None,
    batches: int | None = None,
    eval_every: int | None = None,
    clip: float | None = None,
    metrics: Mapping[str, Metric] | None = None,
    heads: str | Sequence[nn.Module] | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: Workers = "processes",
    execution: Execution = Execution(),
    placement: Placement = Placement(),
    compression: Compression = Compression(),
    simulation: Simulation = Simulation(),
    report: Report = Report(),
    checkpoint: Checkpoint | None = None,
    callbacks: Sequence[Callable[[Event], None] | Acts] = (),
) -> Result:
    """Trains `model` on several workers, one stage each, and leaves the trained weights in it; after an error it is as it was.

    What is in eval mode in a model in training mode stays so, as a BatchNorm with fixed statistics; a model that is in eval mode itself, as
    after an evaluation, is trained whole. Afterwards every module is in the mode that it was in.

    model       any nn.Module: it is traced on the first batch and cut, and the pieces are proved to be equal to it; or a list of modules.
                Of a list, an nn.Sequential, one of delock.nets and torchvision's ResNets nothing is traced: every part takes one argument,
                a tensor or a tuple of tensors of any dtype, and returns the same
    train, test batches, e.g. a DataLoader: pairs (inputs, targets), targets tensors in tuples, lists, dicts; or dicts of the arguments of
                the model's forward by their names, with the targets as "labels"; delock.data.Batches says what others are. test may be a
                dict of several, by name: metrics are then called NAME/accuracy, and test_loss is that of the first
    loss        loss(outputs, targets) -> the mean over the batch, a scalar, of what the model returns; metrics likewise, by name, as
                numbers. Without a loss the model takes the targets, too, and returns its own: a scalar, or an entry or attribute `loss`
    optimizer   a torch.optim.Optimizer of the model's parameters, as torch.optim.SGD(model.parameters(), lr=0.1): every stage makes one
                like it for its own weights, and it stays as it is; or a function that every stage calls with its own [(name in the unsplit
                model, parameter), ...], as functools.partial(torch.optim.SGD, lr=0.1), so that groups may be made by name
    method      a method of delock.methods, or its name
    schedule    a scheduler of torch.optim.lr_scheduler for the optimizer that is given, or a function that every stage calls with its own
                optimizer and that returns one; it is stepped once per update. ReduceLROnPlateau, or delock.recipes.Plateau for
                another measure than the test loss, is stepped by evaluations: what one has measured acts at the next one
    stages      K; by default 2, the length of a list of modules, or torchrun's number of ranks; cuts: index or name of the first layer or
                module of each stage but the first; by default at CutPoints if the model has some, so that the most expensive stage has the
                least counted work
    epochs      the length of the run, or batches: batches of `train`, which needs no length then; eval_every: batches between evaluations
                (default: an epoch; of data without a length the run)
    clip        largest norm of a gradient: of the whole network's for synchronous methods, of each stage's for the others
    heads       for methods with local losses: the auxiliary head of every stage but the last, as modules (stage output -> what `loss`
                takes) or by a name of delock.nets.heads; by default chosen by the shapes of both. Of a traced stage that sends several
                tensors a head takes the first, its main activation. Given modules hold their trained weights afterwards
    seed        of dropout, and of the order and transforms of data that has no seed of its own, such as a DataLoader
    device      "cpu", "cuda" (stage k on GPU k; inline: all stages on one), "cuda:1"
    workers     "processes" on this host, one per stage, or "inline", all stages in this process; under torchrun its ranks are used, and
                each of them gets the same Result and all trained weights
    execution   how a stage computes: precision, memory layout, chunks, compilation (delock.Execution)
    placement   threads, cores, link and patience of the stages' processes (delock.Placement)
    compression codecs of activations and errors that travel (delock.Compression)
    simulation  stragglers, emulated stages, a run to be done again (delock.Simulation)
    report      how often losses are reported, and whether a timeline is kept (delock.Report)
    checkpoint  where and when the run is saved, and what it goes on from (delock.Checkpoint); without it a signal ends the run at once
    callbacks   functions, called one after the other with Started, StepRecord (every `report.log_every` batches) and EvaluationRecord as
                they come; with a free-running method also with VisitsRecord. Under torchrun on rank 0 alone. Or delock.EarlyStopping,
                KeepBest and EMA, which act on the run: what an evaluation has measured acts at the next one

    Raises UsageError for bad input, NonFinite (a UsageError) for a loss that is no number, StageFailed when a stage raises, dies or hangs.
    What a callback raises comes out as it is; inline so does what the data, a metric or the schedule raise.
    """
    refuse_wrong_callbacks(callbacks)
    model, taken = _taken(model, loss, workers, seed, execution)
    made, scheduled = per_stage(model, loss, heads, optimizer, schedule)
    request = Request(
        model=model,
        train=train_loader(train, seed, taken, batches),
        test=None if test is None else evaluation_loader(test, seed, taken),
        loss=loss,
        method=make(method) if isinstance(method, str) else method,
        optimizer=made,
        schedule=scheduled,
        stages=stages,
        cuts=cuts,
        epochs=epochs,
        batches=batches,
        eval_every=eval_every,
        clip=clip,
        metrics=metrics or {},
        heads=heads,
        seed=seed,
        device=device,
        workers="torchrun" if under_torchrun() else workers,
        execution=execution,
        placement=placement,
        compression=compression,
        simulation=simulation,
        report=report,
        checkpoint=checkpoint,
        callbacks=tuple(one for one in callbacks if isinstance(one, Acts)),
    )
    _check(request)
    with torch.enable_grad(), explained(request), not_run_again(), trained_alone(request.network.whole):
        started, results = carry_out(request, _telling([one for one in callbacks if not isinstance(one, Acts)]))
    return collect(request, started, results)


def session(
    model: nn.Module | Sequence[nn.Module],
    example_batch: Any,
    *,
    loss: Loss | None = None,
    optimizer: OptimizerFactory | Optimizer,
    method: str | Method = "ddg",
    schedule: ScheduleFactory | LRScheduler | None = None,
    stages: int | None = None,
    cuts: Sequence[int | str] | None = None,
    clip: float | None = None,
    metrics: Mapping[str, Metric] | None = None,
    heads: str | Sequence[nn.Module] | None = None,
    seed: int = 0,
    device: str = "cpu",
    workers: Workers = "processes",
    execution: Execution = Execution(),
    placement: Placement = Placement(),
    compression: Compression = Compression(),
    simulation: Simulation = Simulation(),
    report: Report = Report(),
    checkpoint: Checkpoint | None = None,
    callbacks: Sequence[Acts] = (),
) -> Session:
    """Returns a run for a loop of your own: `with delock.session(...) as session: session.step(batch)`, as docs/own-loop.md shows.

    example_batch   a batch of the form that `step` will be given, of at least two samples: the network is measured on it, traced if it is
                    no chain, and cut. delock.data.Batches(example_batch, inputs=..., targets=..., samples=..., weight=...) says what cannot
                    be guessed of all batches
    metrics         are computed of the outputs of every batch in training, and in `evaluate`
    checkpoint      the folder that `save` writes into, and with resume="newest" the checkpoint that the session goes on from
    callbacks       delock.EMA, or nothing: the loop has the results and evaluates by itself, so it can act by them

    The other arguments are those of `fit`. A session and `fit` with the same batches have the same weights and losses, bit for bit. Raises
    UsageError for bad input, here and when the block is entered; for a model that another run is training, a method whose stages run
    freely, captured ticks, and under torchrun, where `fit` is to be used.
    """
    refuse_wrong_callbacks(callbacks)
    model, taken = _taken(model, loss, workers, seed, execution)
    made, scheduled = per_stage(model, loss, heads, optimizer, schedule)
    handed = Handed(example_batch, seed, taken)
    request = Request(
        model=model,
        train=handed.loader,
        test=None,
        loss=loss,
        method=make(method) if isinstance(method, str) else method,
        optimizer=made,
        schedule=scheduled,
        stages=stages,
        cuts=cuts,
        batches=ENDLESS,
        clip=clip,
        metrics=metrics or {},
        heads=heads,
        seed=seed,
        device=device,
        workers="torchrun" if under_torchrun() else workers,
        execution=execution,
        placement=placement,
        compression=compression,
        simulation=simulation,
        report=report,
        checkpoint=checkpoint,
        callbacks=tuple(callbacks),
    )
    refuse_sessionless(request)
    _check(request)
    return Session(request, handed)


def evaluate(
    model: nn.Module | Sequence[nn.Module],
    batches: Any,
    *,
    loss: Loss | None = None,
    metrics: Mapping[str, Metric] | None = None,
    seed: int = 0,
    execution: Execution = Execution(),
) -> Evaluation:
    """Returns loss and metrics of a model on data, in this process, as an evaluation of `fit` has them.

    batches     as `fit` takes test data: batches of any form, Batches that say what is in them, several sets by name
    loss        as for `fit`; without it the model returns its own
    seed        of data that draws
    execution   how `fit` computes: of use for amp and layout, to have the same numbers

    The model stays where it is, computes in eval mode without gradients, and is in the mode in which it was afterwards. Raises UsageError
    for data in which nothing counts, and what `fit` raises for data that it cannot read.
    """
    whole("seed", seed, 0, MOST_SEED)
    model = model if isinstance(model, nn.Module) else nn.Sequential(*model)
    taken = takes(model, loss=loss is not None)
    if loss is None and taken.chain:
        raise UsageError("loss is missing, and a chain of modules computes none: give evaluate a loss(outputs, targets)")
    with not_run_again():
        return evaluation(model, evaluation_loader(batches, seed, taken), loss or own_loss, metrics or {}, taken, execution)


def _taken(
    model: nn.Module | Sequence[nn.Module], loss: Loss | None, workers: str, seed: int, execution: Execution
) -> tuple[nn.Module | Sequence[nn.Module], Takes]:
    """Returns the model without wrappers, and what it takes."""
    if workers not in ("processes", "inline"):
        raise UsageError(f"workers is {workers!r}, but it must be 'processes' or 'inline'")
    whole("seed", seed, 0, MOST_SEED)
    if isinstance(model, nn.Module):
        model = unwrapped(model, compiles=isinstance(execution, Execution) and execution.compile)
    taken = takes(model, loss=loss is not None)
    if loss is None and taken.chain:
        raise UsageError("loss is missing, and a chain of modules computes none: give fit a loss(outputs, targets)")
    return model, taken


def _telling(callbacks: Sequence[Callable[[Event], None]]) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        with users_own("a callback"):
            for hear in callbacks:
                hear(event)

    return tell


def _check(request: Request) -> None:
    """Refuses what can be seen before anything is measured."""
    if importing_main():
        raise UsageError(
            "the script that trains is run again by a process that it has started, such as a worker of a DataLoader where Python starts "
            'these afresh: put the call under `if __name__ == "__main__":`'
        )
    refuse_wrong_types(request)
    backend_for(request.device, None, 1)
    refuse_modes(request.device)
    refuse_wrong_link(request.method, request.placement.link, request.device)
    refuse_unfit_acts(request)
    if request.execution.captured:
        refuse_uncapturable(request)
    if request.simulation.replay is not None:
        refuse_replay(request)
    if request.checkpoint is not None:
        refuse_unsavable(request)
