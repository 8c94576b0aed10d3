"""Trains all stages of a run in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from delock.engine.asynchronous.buffer import ReuseStatistics
from delock.engine.asynchronous.schedule import drawn, recorded
from delock.engine.asynchronous.store import Store
from delock.engine.engine import Engine, run_here
from delock.engine.graphs.period import find_period
from delock.engine.graphs.sgd import capturable
from delock.engine.graphs.streams import make_streams
from delock.engine.graphs.ticks import Ticks
from delock.errors import Concluded, Stopped
from delock.launch.notices import NoticesHere
from delock.links.coded import ReceivedCodebooks
from delock.links.mailbox import Mailbox
from delock.partition.copying import copied_but_for_handles
from delock.plan import Plan
from delock.records import Event, Visit
from delock.run.job import StageJob, StageResult
from delock.run.survival.parts import cuts
from delock.run.worker import Executes, Worker, windowed


def run_inline(
    jobs: Sequence[StageJob], device: torch.device, emit: Callable[[Event], None], asked: Callable[[], bool] = lambda: False
) -> list[StageResult]:
    """Trains copies of all stages in this process. torch's random state, its thread count and the jobs' modules are as before afterwards.

    asked: whether the run is to be saved and to end, where it keeps checkpoints.
    Captured ticks are CUDA graphs, their stages on streams; on a CPU the same static memory without graphs, for tests.
    Raises StageFailed, with stage, op and the original traceback, when a stage raises.
    """
    box, plan, read = _way(jobs, jobs[0].simulation.replay)
    captured = jobs[0].execution.captured
    if captured:
        jobs = [replace(job, optimizer=capturable(job.optimizer)) for job in jobs]
    jobs = [copied_job(job) for job in jobs]
    before, workers, notices = torch.get_num_threads(), list[Worker](), NoticesHere()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.set_num_threads(jobs[0].placement.threads)
            for job in jobs:
                workers.append(Worker(job, box.end(job.k), device, emit, asked=asked, notices=notices))
            for worker in workers:
                worker.tracker.logs = [other.log for other in workers]
            engines = [worker.engine for worker in workers]
            execute = _ticks(jobs[0], engines, device) if captured else partial(run_here, engines=engines)
            try:
                execute(plan) if plan else _together(workers, execute)
            except Stopped as stopped:  # every stage has done its steps before that tick
                for worker in workers:
                    worker.stop(stopped.tick)
            for worker in workers:
                worker.close()
            return [worker.result(alone=len(jobs) == 1, read=read[worker.job.k] if read else None) for worker in workers]
        finally:
            for worker in workers:
                worker.abandon()
            torch.set_num_threads(before)


def _together(workers: Sequence[Worker], execute: Executes) -> None:
    """Executes the plan of all stages. The first that finds that the run ends earlier says it for all."""
    for worker in workers:
        worker.begin()
    ends = min(worker.job.length.batches for worker in workers)  # some have found it before the run went on

    def concluding(plan: Plan, *, again: bool = False) -> None:
        try:
            execute(plan, again=again)
        except Concluded as concluded:
            _shorten(workers, concluded.batches)
            raise

    _shorten(workers, ends)
    windowed(workers[0].job, concluding)
    for worker in workers:
        worker.end()


def _shorten(workers: Sequence[Worker], batches: int) -> None:
    for worker in workers:
        worker.job.length = replace(worker.job.length, batches=batches)


def copied_job(job: StageJob) -> StageJob:
    """Returns a job with modules of its own, as a process has: a run that fails leaves the caller's as they were.

    A loss that keeps a state is that of the last stage; those of heads begin with copies of it.
    """
    module, head = copied_but_for_handles((job.module, job.head))
    return replace(job, module=module, head=head, loss=copied_but_for_handles(job.loss) if job.head else job.loss)


def _ticks(job: StageJob, engines: Sequence[Engine], device: torch.device) -> Executes:
    made = find_period(job.method, job.K, job.length.clip)
    ticks = Ticks(engines, made, make_streams(device, job.K), batches=job.length.batches, every=job.report.log_every)

    def execute(plan: Plan, *, again: bool = False) -> None:
        assert not again  # no evaluation acts on them
        ticks.run(plan)

    return execute


def _way(
    jobs: Sequence[StageJob], replay: Sequence[Sequence[Visit]] | None
) -> tuple[Mailbox | Store, Plan | None, Sequence[ReuseStatistics] | None]:
    """Returns the links of a run in one process, its plan where that is known as a whole, and the counts of reads from replay buffers."""
    job, K = jobs[0], len(jobs)
    if replay is not None:
        plan, _ = recorded(replay, job.length.clip, cuts(job.begin.path, job.begin.manifest) if job.begin else ())
        return Store(plan, ReceivedCodebooks()), plan, None
    if not job.method.planned:
        plan, read = drawn(job.method, K, job.length, job.seed)
        return Store(plan, ReceivedCodebooks()), plan, read
    return Mailbox(), None, None
