"""Training as one stage lives it: windows of the plan, what the last stage reports, and the stage's own account at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from delock import heap, memory
from delock.captured import Ticks, capturable, cycle, lanes
from delock.codecs import Codec
from delock.computing import PLAIN, Computing
from delock.data.loader import Loader
from delock.engine import Engine, Log, busy, run_here
from delock.feed import Feed
from delock.free import FreeRun
from delock.links import CountingLink, Message
from delock.links.coded import CodedLink
from delock.links.free import FreeLink
from delock.links.mailbox import Mailbox
from delock.links.meet import LinkKind, connect
from delock.links.message import Tree
from delock.links.neighbours import RankLink, Watch
from delock.links.shelf import Shelf
from delock.methods import AsyncDGL, Method
from delock.ops import Backward, Forward
from delock.plan import Course, Plan, Step, windows
from delock.plan.turns import drawn, reads, recorded
from delock.records import EvaluationRecord, Event, StageReport, StepRecord, Traffic, Turn
from delock.replay import Account, ReplayBuffer
from delock.stage import Loss, OptimizerFactory, ScheduleFactory, Stage
from delock.stage.compiled import pieces, zeros
from delock.timeline import Slowdown, Span

Metric = Callable[[Any, Any], Any]


@dataclass
class Job:
    """Everything that stage k needs for a run; travels to its process. Only stage 0 gets the loaders; the last uses loss and metrics."""

    k: int
    K: int
    module: nn.Module
    names: Mapping[str, str]  # the stage's own parameter names -> names in the unsplit model
    method: Method
    course: Course
    per_epoch: int  # batches
    optimizer: OptimizerFactory
    schedule: ScheduleFactory | None
    loss: Loss
    metrics: Mapping[str, Metric]
    seed: int
    train: Loader | None = None
    test: Loader | None = None
    head: nn.Module | None = None  # auxiliary, of a stage with a loss of its own
    codec: Codec | None = None  # of activations
    error_codec: Codec | None = None
    link: LinkKind = "gloo"  # between processes
    slow: Slowdown | None = None  # ticks in which the stage is made to take longer
    how: Computing = PLAIN
    example: Tree = None  # on the meta device: a batch as it enters the stage, where that is compiled
    emulated: bool = False  # the module only waits, so a straggler waits as well
    log_every: int = 10
    window: int = 256
    trace: bool = False


@dataclass
class StageResult:
    """What a stage brings home: its weights under its own names, its account, and from the last stage the history."""

    state: dict[str, Tensor]
    head: dict[str, Tensor]  # of its auxiliary head, empty where it has none
    report: StageReport
    losses: list[float] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None


class RankLike(Protocol):
    """What a launched worker offers (launch.Rank)."""

    @property
    def device(self) -> torch.device:
        """Where it computes."""

    @property
    def emit(self) -> Callable[[object], None]:
        """Hands an event to the reporter."""

    @property
    def progress(self) -> Any:
        """Its record for the watchdog."""


class Tracker:
    """The last stage's history: turns losses and outputs into records as they come."""

    def __init__(self, job: Job, log: Log, emit: Callable[[Event], None], device: torch.device) -> None:
        self.job, self.emit, self.device, self.logs = job, emit, device, [log]  # logs: those of all stages that take turns in this process
        self.losses: list[float] = []
        self.evaluations: list[EvaluationRecord] = []
        self.samples = 0
        self.batch_loss = 0.0
        self.since = 0  # losses already averaged into a record
        self.sums: dict[str, float] = {}
        self.judged = 0
        self.paused = 0.0  # seconds of training when the evaluation in progress began

    def seconds(self, until: float | None = None) -> float:
        """Seconds of training until then, by default now, evaluations left out."""
        now = time.perf_counter() if until is None else until
        begun = min((log.first for log in self.logs if log.first is not None), default=now)
        return now - begun - sum(log.seconds["evaluation"] for log in self.logs)

    @property
    def last(self) -> float:
        """When the latest op was done, on the clock of the logs."""
        return max(log.last for log in self.logs)

    def loss(self, step: Step, value: float, stage: Stage, samples: int) -> None:
        """A (micro-)batch's loss; a batch is complete with its last part."""
        op = step.op
        assert isinstance(op, Backward)
        self.batch_loss += value
        self.samples += samples
        if (op.batch + 1) % self.job.method.parts:
            return
        self.losses.append(self.batch_loss)
        self.batch_loss = 0.0
        done = len(self.losses)
        if done % self.job.log_every == 0 or done == self.job.course.batches:
            self.emit(StepRecord(done, done / self.job.per_epoch, self.losses[-1], stage.lr, self.samples, self.seconds()))
        if not self.job.course.every and (done % self.job.per_epoch == 0 or done == self.job.course.batches):
            self._record(float("nan"), {}, self.seconds())

    def output(self, step: Step, result: Message) -> None:
        """An evaluation batch's outputs."""
        op = step.op
        assert isinstance(op, Forward)
        if not self.judged:
            self.paused = self.seconds(until=self.last)
        measures = {"": self.job.loss, **self.job.metrics}
        with self.job.how.context(self.device):
            found = {name: float(measure(result.values, result.targets)) for name, measure in measures.items()}
        self.sums = {name: self.sums.get(name, 0.0) + value * result.samples for name, value in found.items()}
        self.judged += result.samples
        if (op.batch + 1) % self.job.course.evaluation == 0:
            means = {name: total / self.judged for name, total in self.sums.items()}
            self._record(means.pop(""), means, self.paused)
            self.sums, self.judged = {}, 0

    def _record(self, test_loss: float, metrics: dict[str, float], seconds: float) -> None:
        new = self.losses[self.since :]
        self.since = done = len(self.losses)
        before = self.evaluations[-1].train_loss if self.evaluations else float("nan")
        train_loss = sum(new) / len(new) if new else before
        record = EvaluationRecord(done, done / self.job.per_epoch, train_loss, test_loss, metrics, seconds, self.samples)
        self.evaluations.append(record)
        self.emit(record)


class Worker:
    """One stage of a run, ready to execute windows of its plan."""

    def __init__(self, job: Job, link: CountingLink, device: torch.device, emit: Callable[[Event], None], progress: Any = None) -> None:
        self.job, self.device = job, device
        last = job.k == job.K - 1
        self.stage = Stage(
            job.module,
            job.k,
            job.K,
            optimizer=job.optimizer,
            schedule=job.schedule,
            loss=job.loss,
            head=job.head,
            names=job.names,
            seed=job.seed,
            device=device,
            mixed=getattr(job.method, "at", None) == "mixed",
            how=job.how,
        )
        if job.how.compile:
            self.rehearse()
        self.log = Log(spans=[] if job.trace else None)
        self.tracker = Tracker(job, self.log, emit, device)
        self.sent = link.sent
        self.engine = Engine(
            self.stage,
            CodedLink(link, job.k, job.codec, job.error_codec, job.seed) if job.codec or job.error_codec else link,
            feed=Feed(job.train, job.test, job.method.parts, device) if job.train is not None else None,
            log=self.log,
            progress=progress,
            parts=job.method.parts,
            on_loss=self.tracker.loss if last else None,
            on_output=self.tracker.output if last else None,
            slow=job.slow,
            linger=time.sleep if job.emulated else busy,
        )
        self.held = memory.reset_peak(device) - memory.programs(device)

    def rehearse(self) -> None:
        """Compile the stage for the parts of a batch, outside all measured times."""
        for part in pieces(self.job.example, self.job.method.parts):
            self.stage.rehearse(zeros(part, self.device))

    def run(self) -> None:
        """The whole plan, window by window, beside the other ranks."""
        for plan in windows(self.job.method, self.job.K, self.job.course, self.job.window):
            self.engine.run(plan)

    def result(self, *, alone: bool, read: Account | None = None) -> StageResult:
        """The account of a finished run; `alone`: no other stage shares this process' memory; `read`: from a replay buffer."""
        log, tracker = self.log, self.tracker
        peak = memory.peak(self.device) if alone else 0
        report = StageReport(
            stage=self.job.k,
            parameters=sum(p.numel() for p in self.stage.module.parameters()),
            updates=self.stage.version,
            **log.seconds,
            seconds=log.last - (log.first or log.last),
            staleness=_sorted(log.staleness),
            layer_staleness=_sorted(log.layer_staleness),
            peak_memory=peak,
            memory_growth=max(0, peak - memory.programs(self.device) - self.held) if alone else 0,
            allocator=heap.allocator() if self.device.type == "cpu" else "",
            reuse=_sorted(read.reuse) if read else {},
            visits_behind=_sorted(read.visits) if read else {},
            versions_behind=_sorted(read.versions) if read else {},
            sent_up=self.sent.to.get(self.job.k + 1, Traffic()),
            sent_down=self.sent.to.get(self.job.k - 1, Traffic()),
        )
        head = self.stage.head.module.state_dict() if self.stage.head else {}
        seconds = tracker.seconds(until=tracker.last)
        optimizer = self.stage.optimizer.state_dict() if self.stage.optimizer else None
        spans = log.spans or []
        return StageResult(
            state=_home(self.stage.module.state_dict()),
            head=_home(head),
            report=report,
            losses=tracker.losses,
            evaluations=tracker.evaluations,
            samples=tracker.samples,
            seconds=seconds,
            spans=spans,
            optimizer=optimizer,
        )


def _sorted(histogram: Mapping[int, int]) -> dict[int, int]:
    return dict(sorted(histogram.items()))


def _home(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu() for name, value in state.items()}


def run_rank(rank: RankLike, job: Job) -> StageResult:
    """Train stage job.k in this process; the other stages are the other ranks of the default process group."""
    if isinstance(job.method, AsyncDGL):
        return _run_free(rank, job, job.method, rank.progress)
    link = joined(rank, job)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress)
    _begin_together(job)
    worker.run()
    result = worker.result(alone=True)
    link.close()
    return result


def joined(rank: RankLike, job: Job) -> RankLink:
    """The link of stage job.k to its neighbours, with room for the messages that the method's lags ask for. Ranks call it together."""
    depth = {peer: job.method.capacity(min(job.k, peer), job.K) for peer in (job.k - 1, job.k + 1) if 0 <= peer < job.K}
    return connect(job.link, depth, rank.device, rank.progress)


def _run_free(rank: RankLike, job: Job, method: AsyncDGL, watch: Watch) -> StageResult:
    buffer: ReplayBuffer[Message] = ReplayBuffer(method.buffer, method.max_reuse)
    link = FreeLink(job.k, job.K, buffer, rank.device, watch, lambda: worker.stage.version)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress)
    _begin_together(job)
    FreeRun(worker.engine, link, method, job.course, rank.emit).run()
    link.close()
    return worker.result(alone=True, read=buffer.close())


def _begin_together(job: Job) -> None:
    """Where stages are compiled, wait for the slowest: else the others would wait in their first op, in measured time."""
    if job.how.compile:
        torch.distributed.barrier()


def run_inline(
    jobs: Sequence[Job],
    device: torch.device,
    emit: Callable[[Event], None],
    threads: int | None = None,
    turns: Sequence[Sequence[Turn]] | None = None,
    captured: bool = False,
) -> list[StageResult]:
    """Train all stages in this process. torch's random state and thread count are as before afterwards.

    turns: what the stages of a free-running run did, per stage, to be done again. captured: every tick is a CUDA graph, its stages on
    streams; on a CPU the same static memory without graphs, for tests.
    Raises StageFailed, with stage, op and the original traceback, when a stage raises.
    """
    box, plans, read = _way(jobs, turns)
    if captured:
        jobs = [replace(job, optimizer=capturable(job.optimizer)) for job in jobs]
    before = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            if threads:
                torch.set_num_threads(threads)
            workers = [Worker(job, box.end(job.k), device, emit) for job in jobs]
            for worker in workers:
                worker.tracker.logs = [other.log for other in workers]
            engines = [worker.engine for worker in workers]
            execute = _ticks(jobs[0], engines, device).run if captured else partial(run_here, engines=engines)
            for plan in plans:
                execute(plan)
            return [worker.result(alone=len(jobs) == 1, read=read[worker.job.k] if read else None) for worker in workers]
        finally:
            torch.set_num_threads(before)


def _ticks(job: Job, engines: Sequence[Engine], device: torch.device) -> Ticks:
    made = cycle(job.method, job.K, job.course.clip)
    return Ticks(engines, made, lanes(device, job.K), batches=job.course.batches, every=job.log_every)


def _way(jobs: Sequence[Job], turns: Sequence[Sequence[Turn]] | None) -> tuple[Mailbox | Shelf, Iterable[Plan], Sequence[Account] | None]:
    """The links of a run in one process, its plans, and what will have been read from replay buffers."""
    job, K = jobs[0], len(jobs)
    if turns is not None:
        plan, _ = recorded(turns, job.course.clip)
        return Shelf(reads(plan)), [plan], None
    if isinstance(job.method, AsyncDGL):
        plan, read = drawn(job.method, K, job.course, job.seed)
        return Shelf(reads(plan)), [plan], read
    return Mailbox(), windows(job.method, K, job.course, job.window), None
