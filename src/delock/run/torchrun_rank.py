"""The run of one of torchrun's ranks: rank 0 measures and cuts, and all follow its plan."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from delock.errors import UsageError
from delock.launch.ambient import Ambient
from delock.launch.rank import Rank
from delock.records import Started
from delock.run.job import StageResult
from delock.run.nonfinite import explained
from delock.run.prepare import prepare
from delock.run.ranks import run_rank
from delock.run.request import Request


def run_torchrun_rank(rank: Rank, request: Request) -> tuple[Started, StageResult]:
    """Trains this rank's stage; returns rank 0's prediction, which is that of the run, and the stage's result."""
    request = replace(request, stages=_stages(rank, request))
    request.method.fits_workers(request.workers)
    prepared = prepare(request) if rank.rank == 0 else None
    said: list[Any] = [prepared.started() if prepared else None, Ambient.here()]
    if prepared:
        rank.emit(said[0])
    torch.distributed.broadcast_object_list(said, src=0)
    started: Started = said[0]
    if said[1] != Ambient.here():
        differ = Ambient.here().beside(said[1])
        raise UsageError(f"torch has other settings on rank {rank.rank} than on rank 0: {differ}; make them alike in the program")
    prepared = prepared or prepare(replace(request, cuts=started.cuts))
    rank.be_patient(prepared.patience())
    with explained(request):
        return started, run_rank(rank, prepared.jobs()[rank.rank])


def _stages(rank: Rank, request: Request) -> int:
    """Returns the number of stages. Raises UsageError unless torchrun has started a rank for each."""
    K = request.stages or (len(request.cuts) + 1 if request.cuts is not None else rank.world)
    if rank.world != K:
        raise UsageError(f"torchrun started {rank.world} ranks for {K} stages: start as many ranks as stages (--nproc-per-node {K})")
    return K
