"""Carries out a request: in this process, in processes of its own that may be started again, or as one of torchrun's ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch

from delock.checkpoints.directory import discard_unfinished
from delock.errors import StageFailed
from delock.launch import allocator
from delock.launch.context import context
from delock.launch.processes import OnEvent, run_processes
from delock.launch.stopping import StopRequest
from delock.launch.torchrun import run_torchrun
from delock.options import Checkpoint
from delock.records import CheckpointRecord, Event, Started
from delock.run import telling
from delock.run.inline import run_inline
from delock.run.job import StageResult
from delock.run.prepare import prepare
from delock.run.prepared import PreparedRun
from delock.run.ranks import train_rank
from delock.run.request import Request
from delock.run.survival.left_out import left_out
from delock.run.survival.resume import NEWEST, find, held, resumed
from delock.run.torchrun_rank import run_torchrun_rank

Tell = Callable[[Event], None]


def carry_out(request: Request, tell: Tell) -> tuple[Started, list[StageResult]]:
    """Runs all stages; returns the prediction that was made before, and the result of every stage.

    With checkpoints a signal saves the run first, and then has the effect that it has without.
    """
    anew = request.simulation.replay is None
    stop, saved = StopRequest(request.checkpoint.grace) if request.checkpoint and anew else None, list[str]()
    try:
        started, results = (_torchrun if request.workers == "torchrun" else _here)(request, _noting(tell, saved), stop)
        if stop and results[0].stopped is not None:
            stop.have_effect()
            raise KeyboardInterrupt  # the signal was another rank's
    except BaseException as error:
        if stop and stop.asked:
            error.add_note(_how_it_ended(stop, saved))
        raise
    return started, results


def _here(request: Request, tell: Tell, stop: StopRequest | None) -> tuple[Started, list[StageResult]]:
    anew = request.simulation.replay is None
    if anew:
        request.method.fits_workers(request.workers)
    begin, notes = find(request.checkpoint, writes=anew) if request.checkpoint else (None, ())
    if request.workers == "processes":
        context([train_rank.__module__])  # its server loads while the run is prepared
    prepared = prepare(request, begin)
    left = left_out(prepared)
    started = prepared.started()
    tell(started)
    with held(request.checkpoint) if request.checkpoint and anew else nullcontext():
        if begin or notes:
            tell(resumed(begin, (*notes, *left)))
        with stop.listening() if stop else nullcontext():
            return started, _stages(prepared, tell, stop)


def _stages(prepared: PreparedRun, tell: Tell, stop: StopRequest | None) -> list[StageResult]:
    request = prepared.request
    if request.workers == "inline":
        return run_inline(prepared.jobs(), torch.device(request.device), tell, (lambda: stop.asked) if stop else (lambda: False))
    left = request.checkpoint.restarts if request.checkpoint else 0
    while True:
        try:
            return _processes(prepared, tell, stop)
        except StageFailed as error:
            if not left or request.checkpoint is None or (stop and stop.asked):
                raise
            left -= 1
            prepared = _again(prepared, request.checkpoint, error, tell)


def _again(prepared: PreparedRun, options: Checkpoint, error: StageFailed, tell: Tell) -> PreparedRun:
    """Returns the run that goes on from its newest checkpoint after a failure; without one it begins anew."""
    options = replace(options, resume=NEWEST)
    begin, notes = find(options)
    discard_unfinished(Path(options.folder))
    again = replace(prepared, begin=begin)
    tell(resumed(begin, (f"started again, because {str(error).splitlines()[0]}", *notes, *left_out(again))))
    return again


def _processes(prepared: PreparedRun, tell: Tell, stop: StopRequest | None) -> list[StageResult]:
    placement = prepared.request.placement
    allocator.give_back()  # what was taken to prepare the run
    return run_processes(
        train_rank,
        prepared.jobs(),
        threads=placement.threads,
        pin=placement.pin,
        device=prepared.request.device,
        patience=prepared.patience(),
        on_event=_listener(tell),
        stop=stop,
    )


def _torchrun(request: Request, tell: Tell, stop: StopRequest | None) -> tuple[Started, list[StageResult]]:
    with stop.listening() if stop else nullcontext():
        results = run_torchrun(
            partial(run_torchrun_rank, stop=stop),
            lambda rank: request,
            telling,
            device=request.device,
            threads=request.placement.threads,
            patience=request.placement.patience,
            on_event=_listener(tell),
            waiting=stop.heed if stop else lambda: None,
        )
    return results[0][0], [result for _, result in results]


def _listener(tell: Tell) -> OnEvent:
    """Returns `tell` for events that come with the rank that emitted them."""
    return lambda rank, event: tell(cast(Event, event))


def _noting(tell: Tell, saved: list[str]) -> Tell:
    """Returns `tell`, which also notes where the run was saved when it ended."""

    def noting(event: Event) -> None:
        if isinstance(event, CheckpointRecord) and event.last and not event.problem:
            saved.append(event.path)
        tell(event)

    return noting


def _how_it_ended(stop: StopRequest, saved: list[str]) -> str:
    if saved:
        return f"the run is saved in {saved[-1]}"
    return f"the run could not be saved within {stop.grace:g} s" if stop.overdue else "the run could not be saved"
