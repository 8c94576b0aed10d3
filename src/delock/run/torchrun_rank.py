"""The run of one of torchrun's ranks: rank 0 measures and cuts, and all follow its plan."""

from __future__ import annotations

import os
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from delock.errors import UsageError
from delock.launch.ambient import Ambient
from delock.launch.rank import Rank
from delock.launch.stopping import Relay, StopRequest
from delock.records import Started
from delock.run.job import StageResult
from delock.run.left_out import left_out
from delock.run.nonfinite import explained
from delock.run.prepare import prepare
from delock.run.ranks import run_rank
from delock.run.request import Request
from delock.run.resume import NEWEST, find, make_ready, resumed


def run_torchrun_rank(rank: Rank, request: Request, stop: StopRequest | None = None) -> tuple[Started, StageResult]:
    """Trains this rank's stage; returns rank 0's prediction, which is that of the run, and the stage's result."""
    request = replace(_again(request), stages=_stages(rank, request))
    request.method.fits_workers(request.workers)
    begin, notes = find(request.checkpoint) if request.checkpoint and rank.rank == 0 else (None, ())
    prepared = prepare(request, begin) if rank.rank == 0 else None
    left = left_out(prepared) if prepared else ()
    said: list[Any] = [prepared.started() if prepared else None, Ambient.here(), begin, request.checkpoint, f"delock/stop/{time.time_ns()}"]
    if prepared:
        rank.emit(said[0])
        if request.checkpoint:
            make_ready(request.checkpoint)
    if begin or notes:
        rank.emit(resumed(begin, (*notes, *left)))
    torch.distributed.broadcast_object_list(said, src=0)
    started: Started = said[0]
    request = replace(request, checkpoint=said[3])  # whose folder may have a name by the hour
    if said[1] != Ambient.here():
        differ = Ambient.here().beside(said[1])
        raise UsageError(f"torch has other settings on rank {rank.rank} than on rank 0: {differ}; make them alike in the program")
    if request.checkpoint:
        refuse_unshared(rank, Path(request.checkpoint.folder))
    prepared = prepared or prepare(replace(request, cuts=started.cuts), said[2])
    rank.be_patient(prepared.patience())
    with explained(request), Relay(rank.rank, stop, said[4]) if stop else nullcontext() as relay:
        rank = replace(rank, asked=relay.asked) if relay else rank
        return started, run_rank(rank, prepared.jobs()[rank.rank])


def _again(request: Request) -> Request:
    """Returns the request; one that torchrun has started again goes on from its newest checkpoint."""
    if request.checkpoint is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return request
    return replace(request, checkpoint=replace(request.checkpoint, resume=NEWEST))


def refuse_unshared(rank: Rank, folder: Path) -> None:
    """Raises UsageError if not all ranks see the same folder of checkpoints; ranks call it together."""
    token = folder / f".token-{os.getpid()}-{time.time_ns()}"
    said: list[Any] = [token.name]
    if rank.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    torch.distributed.broadcast_object_list(said, src=0)
    seen: list[Any] = [None] * rank.world
    try:
        torch.distributed.all_gather_object(seen, (folder / said[0]).exists())
    finally:
        if rank.rank == 0:
            token.unlink(missing_ok=True)
    if blind := [k for k, there in enumerate(seen) if not there]:
        which = ", ".join(map(str, blind))
        raise UsageError(f"rank {which} does not see the folder of checkpoints {folder} of rank 0: give one that all hosts share")


def _stages(rank: Rank, request: Request) -> int:
    """Returns the number of stages. Raises UsageError unless torchrun has started a rank for each."""
    K = request.stages or (len(request.cuts) + 1 if request.cuts is not None else rank.world)
    if rank.world != K:
        raise UsageError(f"torchrun started {rank.world} ranks for {K} stages: start as many ranks as stages (--nproc-per-node {K})")
    return K
