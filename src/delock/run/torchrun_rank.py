"""The run of one of torchrun's ranks: rank 0 measures and cuts, and all follow its plan."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from delock.errors import UsageError
from delock.launch.ambient import Ambient
from delock.launch.collective import gather
from delock.launch.rank import Rank
from delock.launch.stopping import Relay, StopRequest
from delock.records import Started
from delock.run.job import StageResult
from delock.run.nonfinite import explained
from delock.run.prepare import prepare
from delock.run.prepared import PreparedRun
from delock.run.ranks import train_rank
from delock.run.request import Request
from delock.run.survival.left_out import left_out
from delock.run.survival.resume import NEWEST, find, held, resumed
from delock.run.telling import pack, unpack


def run_torchrun_rank(rank: Rank, request: Request, stop: StopRequest | None = None) -> tuple[Started, StageResult]:
    """Trains this rank's stage; returns rank 0's prediction, which is that of the run, and the stage's result."""
    request = replace(_again(request), stages=_stages(rank, request))
    request.method.fits_workers(request.workers)
    with ExitStack() as until_the_end:
        prepared = _announced(rank, request, until_the_end) if rank.rank == 0 else None
        kept = prepared.request.checkpoint if prepared else None
        own = (prepared.started(), prepared.begin, kept, time.time_ns(), Ambient.here()) if prepared else None
        started, begin, checkpoint, token, ambient = unpack(gather(pack(own))[0])
        if ambient != Ambient.here():
            differ = Ambient.here().beside(ambient)
            raise UsageError(f"torch has other settings on rank {rank.rank} than on rank 0: {differ}; make them alike in the program")
        request = replace(request, checkpoint=checkpoint, cuts=started.cuts)  # the folder may have a name by the hour
        if checkpoint:
            refuse_unshared(rank, Path(checkpoint.folder))
        prepared = prepared or prepare(request, begin)
        rank.be_patient(prepared.patience())
        until_the_end.enter_context(explained(request))
        if stop:
            rank = replace(rank, asked=until_the_end.enter_context(Relay(rank.rank, stop, f"delock/stop/{token}")).asked)
        return started, train_rank(rank, prepared.jobs()[rank.rank])


def _announced(rank: Rank, request: Request, until_the_end: ExitStack) -> PreparedRun:
    """Returns the run as rank 0 has prepared it; the folder of checkpoints is kept for it until the end."""
    begin, notes = find(request.checkpoint) if request.checkpoint else (None, ())
    prepared = prepare(request, begin)
    rank.emit(prepared.started())
    if request.checkpoint:
        until_the_end.enter_context(held(request.checkpoint))
    if begin or notes:
        rank.emit(resumed(begin, (*notes, *left_out(prepared))))
    return prepared


def _again(request: Request) -> Request:
    """Returns the request; one that torchrun has started again goes on from its newest checkpoint."""
    if request.checkpoint is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return request
    return replace(request, checkpoint=replace(request.checkpoint, resume=NEWEST))


def refuse_unshared(rank: Rank, folder: Path) -> None:
    """Raises UsageError if not all ranks see the same folder of checkpoints; ranks call it together."""
    token = folder / f".token-{os.getpid()}-{time.time_ns()}"
    if rank.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        name = Path(gather(token.name.encode())[0].decode()).name
        seen = [unpack(one) for one in gather(pack((folder / name).exists()))]
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
        ranks = "one rank" if rank.world == 1 else f"{rank.world} ranks"
        raise UsageError(f"torchrun started {ranks} for {K} stages: start as many ranks as stages (--nproc-per-node {K})")
    return K
