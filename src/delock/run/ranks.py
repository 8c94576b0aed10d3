"""Trains one stage of a run in this process, beside the other ranks."""

from __future__ import annotations

from dataclasses import replace

from delock.engine.asynchronous.buffer import replay_buffer
from delock.engine.asynchronous.link import FreeLink
from delock.engine.asynchronous.runner import FreeRun
from delock.errors import Stopped
from delock.launch.rank import Rank
from delock.links.coded import ReceivedCodebooks
from delock.links.connect import connect, free_ways
from delock.links.rank_link import RankLink
from delock.run.job import StageJob, StageResult
from delock.run.survival.free_checkpointing import FreeSaver
from delock.run.worker import Worker


def run_rank(rank: Rank, job: StageJob) -> StageResult:
    """Trains stage job.k in this process; the other stages are the other ranks."""
    job.ambient.enter(rank.device)
    if job.method.free_running:
        return _run_free(rank, job)
    link = joined(rank, job)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress, rank.asked, notices=rank.notices)
    begin_together(rank, job)
    worker.run()
    result = worker.result(alone=True)
    link.close()
    return result


def train_rank(rank: Rank, job: StageJob) -> StageResult:
    """Trains stage job.k; its optimizer's state, which nobody asks for, stays in this process."""
    return replace(run_rank(rank, job), optimizer=None)


def joined(rank: Rank, job: StageJob) -> RankLink:
    """Returns the link of stage job.k to its neighbours, with room for the messages that the method's lags need. Ranks call it together."""
    depth = {peer: job.method.capacity(min(job.k, peer), job.K) for peer in (job.k - 1, job.k + 1) if 0 <= peer < job.K}
    return connect(job.placement.link, depth, rank)


def _run_free(rank: Rank, job: StageJob) -> StageResult:
    buffer, ways = replay_buffer(job.method), free_ways(job.placement.link, rank)
    link = FreeLink(job.k, job.K, buffer, rank.device, rank.progress, lambda: worker.stage.version, ReceivedCodebooks(), ways)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress, rank.asked)
    run = FreeRun(worker.engine, link, job.length, rank.emit)
    if isinstance(worker.saver, FreeSaver):
        worker.saver.follow(run)
    link.start()
    begin_together(rank, job)
    try:
        run.run()
    except Stopped as stopped:
        worker.stopped = stopped.tick
        link.stop()
    link.close()
    worker.close()
    return worker.result(alone=True, read=buffer.close())


def begin_together(rank: Rank, job: StageJob) -> None:
    """Waits for the slowest stage if stages are compiled: else the others would wait in their first op, in measured time."""
    if job.execution.compile:
        rank.meet()
