"""The history of a run as its last stage sees it: it turns losses and evaluations into records."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch

from delock.engine.log import StageLog
from delock.errors import UsageError, users_own
from delock.execution import compute_loss, precision
from delock.links import Message
from delock.ops import Backward, Evaluate
from delock.plan import Step
from delock.records import EvaluationRecord, Event, StepRecord
from delock.run.acting import Acting
from delock.run.job import StageJob
from delock.stage import InFlight, Stage
from delock.tensors import kind

SERIES = ("losses", "counts")
COUNTERS = ("samples", "batch_loss", "batch_count", "since", "sums", "judged", "means", "earlier")


class History:
    """Turns the losses and outputs of the last stage into records as they come."""

    def __init__(self, job: StageJob, log: StageLog, emit: Callable[[Event], None], device: torch.device) -> None:
        self.job, self.emit, self.device, self.logs = job, emit, device, [log]  # logs: those of all stages that take turns in this process
        self.losses: list[float] = []
        self.counts: list[float] = []  # what each batch weighs in a mean
        self.evaluations: list[EvaluationRecord] = []
        self.samples = 0
        self.batch_loss = self.batch_count = 0.0
        self.since = 0  # losses already averaged into a record
        self.told = 0  # batches up to the last record of a batch
        self.sums: dict[str, float] = {}  # of the test set that is being read
        self.judged = 0.0
        self.means: dict[str, dict[str, float]] = {}  # of the test sets of this evaluation that have been read
        self.ends = _ends(job)
        self.earlier = 0.0  # seconds of training in other stages, before the run went on in these
        self.paused = 0.0  # seconds of training when the evaluation in progress began
        self.acting: Acting | None = None  # on the last stage, where evaluations are acted on

    def seconds(self, until: float | None = None) -> float:
        """Returns the seconds of training until a moment, by default now, evaluations left out."""
        now = time.perf_counter() if until is None else until
        begun = min((log.first for log in self.logs if log.first is not None), default=now)
        return self.earlier + now - begun - sum(log.seconds["evaluation"] for log in self.logs)

    @property
    def last(self) -> float:
        """Returns the end of the latest op, on the clock of the logs."""
        return max(log.last for log in self.logs)

    def loss(self, step: Step, value: float, stage: Stage, batch: InFlight) -> None:
        """Takes the loss of a (micro-)batch; a batch is complete with its last micro-batch. One in which nothing counts has none: NaN."""
        op, message = step.op, batch.message
        assert isinstance(op, Backward)
        self.batch_loss += value
        self.batch_count += message.count
        self.samples += message.samples
        if (op.batch + 1) % self.job.method.micro_batches:
            return
        self.losses.append(self.batch_loss if self.batch_count else math.nan)
        self.counts.append(self.batch_count)
        self.batch_loss = self.batch_count = 0.0
        done = len(self.losses)
        if done % self.job.report.log_every == 0 or done == self.job.length.batches:
            self._step(stage.lr)
        if not self.job.length.every and (done % self.job.per_epoch == 0 or done == self.job.length.batches):
            self._record(math.nan, {}, self.seconds())

    def finish(self, lr: float) -> None:
        """Tells of the last batch of a run that has ended earlier than it knew when that batch came."""
        if self.losses and self.told < len(self.losses):
            self._step(lr)

    def _step(self, lr: float) -> None:
        done = self.told = len(self.losses)
        self.emit(StepRecord(done, done / self.job.per_epoch, self.losses[-1], lr, self.samples, self.seconds()))

    def state(self) -> dict[str, Any]:
        """Returns what the records to come depend on, and those of evaluations so far, as plain values and tensors."""
        numbers = {name: torch.tensor(getattr(self, name), dtype=torch.float64) for name in SERIES}
        return {**numbers, **{name: getattr(self, name) for name in COUNTERS}, "evaluations": [asdict(one) for one in self.evaluations]}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`."""
        for name in SERIES:
            setattr(self, name, state[name].tolist())
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.evaluations = [EvaluationRecord(**one) for one in state["evaluations"]]

    def take_over(self, state: Mapping[str, Any], batches: int, seconds: float) -> None:
        """Goes on in another last stage, from `state()` of the one before; batches up to `batches` whose losses had not come have NaN.

        state: empty in a stage that is not the last. seconds: of training so far.
        """
        if state:
            self.load(state)
            missing = batches - len(self.losses)
            self.losses += [math.nan] * missing
            self.counts += [0.0] * missing
            self.batch_loss = self.batch_count = 0.0
            self.sums, self.judged, self.means = {}, 0.0, {}
        self.earlier = seconds

    def output(self, step: Step, result: Message) -> None:
        """Takes the outputs of an evaluation batch."""
        op = step.op
        assert isinstance(op, Evaluate)
        if op.batch % self.job.length.evaluation == 0:
            self.paused = self.seconds(until=self.last)
        measures = {"": self.job.loss, **self.job.metrics}
        if result.count:  # else it has no mean
            with precision(self.job.execution, self.device):
                found = {name: measured(name, measure, result.values, result.targets) for name, measure in measures.items()}
            self.sums = {name: self.sums.get(name, 0.0) + value * result.count for name, value in found.items()}
            self.judged += result.count
        read = op.batch % self.job.length.evaluation + 1
        if read in self.ends:
            self.means[self.ends[read]] = {name: self.sums[name] / self.judged if self.judged else math.nan for name in measures}
            self.sums, self.judged = {}, 0.0
        if read == self.job.length.evaluation:
            loss, metrics = next(iter(self.means.values()))[""], dict[str, float]()
            for one, means in self.means.items():
                metrics |= {f"{one}/{name or 'loss'}" if one else name: mean for name, mean in means.items() if one or name}
            self._record(loss, metrics, self.paused)
            self.means = {}

    def _record(self, test_loss: float, metrics: dict[str, float], seconds: float) -> None:
        train_loss = self._mean_since()
        self.since = done = len(self.losses)
        record = EvaluationRecord(done, done / self.job.per_epoch, train_loss, test_loss, metrics, seconds, self.samples)
        self.evaluations.append(record)
        self.emit(record)
        if self.acting:
            self.acting.tell(self.evaluations)

    def _mean_since(self) -> float:
        """Returns the mean loss of the batches since the last record, weighted where the loader weighs them; without any, that record's."""
        new, counts = self.losses[self.since :], self.counts[self.since :]
        if not any(counts):
            return self.evaluations[-1].train_loss if self.evaluations else math.nan
        if not self.job.weighed:
            known = [loss for loss, count in zip(new, counts, strict=True) if count]
            return sum(known) / len(known)
        return sum(loss * count for loss, count in zip(new, counts, strict=True) if count) / sum(counts)


def _ends(job: StageJob) -> dict[int, str]:
    """Returns the name of each test set by the number of batches of an evaluation at its end."""
    tests = job.tests or {"": job.length.evaluation}
    return dict(zip(accumulate(tests.values()), tests, strict=True))


@torch.no_grad()
def measured(name: str, measure: Callable[[Any, Any], Any], outputs: Any, targets: Any) -> float:
    """Returns a measure of the outputs of a batch, without gradients; "" is the name of the loss.

    Raises UsageError for a metric that is no number.
    """
    if not name:
        return float(compute_loss(measure, outputs, targets))
    with users_own(f"the metric {name!r}"):
        found = measure(outputs, targets)
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else ""
        raise UsageError(f"the metric {name!r} returned {kind(found)}{shape}, but it must return one number for a batch") from error
