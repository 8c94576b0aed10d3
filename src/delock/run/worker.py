"""Trains one stage: it executes the plan window by window, and reports at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from delock.engine.asynchronous.buffer import ReuseStatistics
from delock.engine.engine import Engine, spin
from delock.engine.feed import Feed, HandedFeed
from delock.engine.log import StageLog
from delock.errors import Concluded, Stopped, UsageError
from delock.execution import module_of
from delock.launch import allocator, peak_memory
from delock.launch.notices import Notices
from delock.links import Link
from delock.links.coded import CodedLink
from delock.optim.stage_facts import for_stage
from delock.plan import Plan, rest, windows
from delock.records import Event, StageReport, Traffic
from delock.run.acting import Acting
from delock.run.history import History
from delock.run.job import StageJob, StageResult
from delock.run.survival.checkpointing import AgreedSaver, Saver
from delock.run.survival.free_checkpointing import FreeSaver
from delock.stage import Stage
from delock.stage.average import Average
from delock.stage.compiled import pieces, zeros
from delock.stage.loading import volatile
from delock.timeline import Slowdown, stage_facts


class Worker:
    """Builds one stage of a run with its log and engine, ready to execute windows of its plan."""

    def __init__(
        self,
        job: StageJob,
        link: Link,
        device: torch.device,
        emit: Callable[[Event], None],
        progress: Any = None,
        asked: Callable[[], bool] = lambda: False,
        *,
        history: type[History] = History,
        handed: HandedFeed | None = None,
        saver: type[Saver] | None = None,
        notices: Notices | None = None,
    ) -> None:
        """history: of the last stage; handed: the feed of stage 0, if it is not to read the loaders; notices: of stages that may act.

        saver: how the stage is saved, by default at the times that the job's checkpoint says.
        """
        self.job, self.device = job, device
        last, facts = job.k == job.K - 1, stage_facts(job.method, job.K)[job.k]
        self.stage = Stage(
            job.module,
            job.k,
            job.K,
            optimizer=for_stage(job.optimizer, facts),
            schedule=for_stage(job.schedule, facts) if job.schedule else None,
            loss=job.loss,
            head=job.head,
            main=job.main,
            alone=job.alone,
            learns_below=job.learns_below,
            names=job.names,
            seed=job.seed,
            device=device,
            mixed=job.method.mixed,
            resumable=job.checkpoint is not None,
            micro_batches=job.method.micro_batches,
            execution=job.execution,
        )
        if ema := job.ema:
            self.stage.learner.average = Average(self.stage.module, ema.decay)
            self.stage.body.average = self.stage.learner.average if ema.evaluate else None
        if job.execution.compile:
            self.rehearse()
        self.log = StageLog(spans=[] if job.report.trace else None)
        self.tracker = history(job, self.log, emit, device)
        self.sent = link.sent
        slow, delay = _pace(job)
        self.feed = feed = Feed(job.train, job.test, job.method.micro_batches, device) if job.train is not None and not handed else None
        codec, error_codec = job.compression.activations, job.compression.errors
        self.engine = Engine(
            self.stage,
            CodedLink(link, job.k, codec, error_codec, job.seed) if codec or error_codec else link,
            feed=handed or feed,
            log=self.log,
            progress=progress,
            micro_batches=job.method.micro_batches,
            on_loss=self.tracker.loss if last else None,
            on_output=self.tracker.output if last else None,
            slow=slow,
            delay=delay,
        )
        saves = saver or _saver_of(job)
        self.acting = acting = Acting(job, self.stage, notices) if notices is not None and job.acts else None
        if self.stage.learner.judged and not acting:
            raise UsageError(
                "ReduceLROnPlateau waits for a measure of evaluations, and is not seen in a function of your own: give "
                "delock.recipes.Plateau, the class, or functools.partial of it"
            )
        self.engine.on_evaluation = acting
        self.tracker.acting = acting if last else None
        self.saver = saves(job, self.engine, feed, self.log, self.tracker, emit, asked, acting) if job.checkpoint else None
        self.stopped: int | None = None
        if self.saver:
            self.saver.begin()
        if isinstance(self.saver, AgreedSaver):
            self.engine.agreement = self.saver
        self.held = peak_memory.reset_peak(device) - peak_memory.programs(device)

    def rehearse(self) -> None:
        """Compiles the stage for the micro-batches of a batch, outside all measured times."""
        for piece in pieces(self.job.example, self.job.rows, self.job.method.micro_batches):
            self.stage.rehearse(zeros(piece, self.device))

    def run(self) -> None:
        """Executes the whole plan, window by window, beside the other ranks; of the others' columns only the neighbours' are drawn."""
        job = self.job
        near = range(max(0, job.k - 1), min(job.K, job.k + 2))
        try:
            self.begin()
            windowed(job, self.engine.run, near)
            self.end()
        except Stopped as stopped:
            self.stop(stopped.tick)
        self.close()

    def begin(self) -> None:
        """Tells the stages again what they may not have heard before the run went on."""
        if self.tracker.acting:
            self.tracker.acting.tell(self.tracker.evaluations)

    def end(self) -> None:
        """Lets the last evaluation act, and the module have the weights that it is to have in the end."""
        if self.job.ema and self.job.ema.load and self.stage.learner.average:
            self.stage.learner.average.put()
        if self.acting:
            self.acting.finish()
            if self.acting.stopped:
                self.tracker.finish(self.stage.lr)

    def stop(self, tick: int) -> None:
        """Saves the stage, which ends before its first step at this tick."""
        assert isinstance(self.saver, AgreedSaver)
        self.stopped = tick
        self.saver.finish(tick)

    def abandon(self) -> None:
        """Gives up checkpoints that cannot be completed any more, after a failure, and lets go of the data."""
        if self.saver:
            self.saver.abandon()
        if self.feed:
            self.feed.close()

    def close(self) -> None:
        """Waits until all checkpoints are written."""
        if self.saver:
            self.saver.close()

    def result(self, *, alone: bool, read: ReuseStatistics | None = None) -> StageResult:
        """Returns the result of a finished run; `alone`: no other stage shares this process' memory; `read`: from a replay buffer."""
        log, tracker = self.log, self.tracker
        peak = peak_memory.peak(self.device) if alone else 0
        report = StageReport(
            stage=self.job.k,
            parameters=sum(p.numel() for p in self.stage.module.parameters()),
            updates=self.stage.version,
            **log.seconds,
            seconds=log.last - (log.first or log.last),
            staleness=_sorted(log.staleness),
            layer_staleness=_sorted(log.layer_staleness),
            peak_memory=peak,
            memory_growth=max(0, peak - peak_memory.programs(self.device) - self.held) if alone else 0,
            allocator=allocator.in_use() if self.device.type == "cpu" else "",
            reuse=_sorted(read.reuse) if read else {},
            visits_behind=_sorted(read.visits_behind) if read else {},
            versions_behind=_sorted(read.versions_behind) if read else {},
            sent_up=Traffic(**asdict(self.sent.to[self.job.k + 1])),
            sent_down=Traffic(**asdict(self.sent.to[self.job.k - 1])),
        )
        stage = self.stage
        head = stage.head.module.state_dict() if stage.head else {}
        loss = module_of(self.job.loss) if self.job.k == self.job.K - 1 else None
        rest = {
            "module": volatile(stage.module),
            "head": volatile(stage.head.module) if stage.head else {},
            "loss": volatile(loss) if loss else {},
        }
        seconds = tracker.seconds(until=tracker.last)
        optimizer = stage.optimizer.state_dict() if stage.optimizer else None
        spans = log.spans or []
        return StageResult(
            state=_home(stage.module.state_dict()),
            head=_home(head),
            loss=_home(loss.state_dict()) if loss else {},
            report=report,
            volatile=_home(rest),
            losses=tracker.losses,
            evaluations=tracker.evaluations,
            samples=tracker.samples,
            seconds=seconds,
            spans=spans,
            optimizer=_home(optimizer),
            stopped=self.stopped,
            ended=self.acting.stopped if self.acting else "",
            best=self.acting.kept_number if self.acting else None,
        )


class Executes(Protocol):
    """Executes a window of a plan, as `Engine.run` does."""

    def __call__(self, plan: Plan, *, again: bool = False) -> None: ...


def windowed(job: StageJob, execute: Executes, near: Sequence[int] | None = None) -> None:
    """Executes the plan of a run window by window; where the run is found to end earlier, what is then left of the window and behind it.

    near: the stages whose columns are wanted, by default all.
    """
    begin = max(job.start, job.length.first)
    try:
        for plan in windows(job.method, job.K, job.length, job.window, near, start=begin):
            begin = plan.begin
            execute(plan)
    except Concluded as concluded:
        length = replace(job.length, batches=concluded.batches)
        execute(rest(job.method, job.K, length, begin, near), again=True)


def _saver_of(job: StageJob) -> type[Saver]:
    """Returns what saves a stage; what is done again only begins at a checkpoint."""
    if job.simulation.replay is not None:
        return Saver
    return FreeSaver if job.method.free_running else AgreedSaver


def _pace(job: StageJob) -> tuple[Slowdown | None, Callable[[float], None]]:
    """Returns the ticks in which the stage takes longer, and the way it does: a core that is not needed is left to stages that share it."""
    if job.method.free_running and (times := job.method.slowdown(job.k)) > 1:
        return Slowdown(times - 1), time.sleep
    return job.simulation.straggler(job.K, job.seed), time.sleep if job.simulation.emulate else spin


def _sorted(histogram: Mapping[int, int]) -> dict[int, int]:
    return dict(sorted(histogram.items()))


def _home(tree: Any) -> Any:
    """Returns a tree with its tensors on the CPU: the process that receives them need not start its GPU."""
    if isinstance(tree, Tensor):
        return tree.detach().cpu()
    if isinstance(tree, Mapping):
        return {name: _home(value) for name, value in tree.items()}
    return [_home(value) for value in tree] if isinstance(tree, list) else tree
