"""Takes the stages of this process, one or all, through a plan without an end, as the user's loop tells them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from delock.plan import OpenPlan, Plan
from delock.records import BatchResult, CheckpointRecord
from delock.run.job import StageJob
from delock.run.own_loop.results import Measured, Results
from delock.run.request import Metric
from delock.run.worker import Worker
from delock.stage.loading import Held, load_module, snapshot

ENDLESS = 1 << 62  # batches


@dataclass
class LoopedJob:
    """Holds what a stage of a session needs. show: makes of the last stage's outputs those of the model."""

    job: StageJob
    show: Metric

    def __post_init__(self) -> None:
        self.job = replace(self.job, per_epoch=ENDLESS)


class Turns:
    """Does what the loop asks of the stages. execute: a window of their plan; near: the stages whose columns are wanted for that."""

    def __init__(
        self, looped: LoopedJob, workers: Sequence[Worker], execute: Callable[[Plan], None], near: Sequence[int] | None = None
    ) -> None:
        job = looped.job
        self.workers, self.execute, self.seen = workers, execute, workers[-1].tracker
        self.plan = OpenPlan(job.method, job.K, job.length.clip, near)
        self.last = workers[-1].job.k == job.K - 1
        if self.last:
            self.results.watch(looped.show)
        self.rates = {worker.job.k: _rates(worker.stage.optimizer) for worker in workers}  # as they were made
        if job.begin:
            begun = [worker.saver.begun for worker in workers if worker.saver]  # each knows of itself, and perhaps of others
            made = {k: one for own in begun for k, one in own["plan"]["made"].items()}
            self.plan.load({**begun[-1]["plan"], "made": made})
            self.rates = {int(k): rates for own in begun for k, rates in own["rates"].items()}
            if self.last:
                self.results.wanted.update(begun[-1]["wanted"])

    @property
    def results(self) -> Results:
        """Returns the results, which the last stage has."""
        assert isinstance(self.seen, Results)
        return self.seen

    def batch(self, outputs: bool) -> list[BatchResult] | None:
        """Takes the next batch. Returns the results that have come, on the last stage; `outputs`: with its outputs."""
        if outputs and self.last:
            self.results.wanted.add(self.plan.batches)
        self.execute(self.plan.batch())
        return self.results.taken() if self.last else None

    def rest(self) -> list[BatchResult] | None:
        """Does what is left when no further batch comes for now."""
        self.execute(self.plan.rest())
        return self.results.taken() if self.last else None

    def drained(self) -> list[bool]:
        """Says that nothing is in flight, and that no update is left to do."""
        return [self.plan.batches == self.plan.first]

    def judge(self) -> Measured | None:
        """Evaluates the network as it is now on the next batch; what is in flight waits. Returns measures, their weight, and samples."""
        aside = [worker.engine.set_aside() for worker in self.workers]
        self.execute(self.plan.evaluation(1))
        for worker, messages in zip(self.workers, aside, strict=True):
            worker.engine.put_back(messages)
        return self.results.tested.pop() if self.last else None

    def rate(self, change: tuple[float, float] | None) -> list[tuple[float, float]]:
        """Returns of each stage that learns the rate of its first parameter group, as it was made and as it is now.

        change: (x, y) makes the rate of a group that was made with y x, and that of others x / y times what they were made with.
        """
        found = []
        for worker in self.workers:
            base = self.rates.get(worker.job.k, [])
            for made, group in zip(base, worker.stage.optimizer.param_groups if worker.stage.optimizer else (), strict=True):
                if change is not None:
                    value, first = change
                    _set(group, value if made == first else value / first * made)
            if base and worker.stage.optimizer:
                found.append((base[0], float(worker.stage.optimizer.param_groups[0]["lr"])))
        return found

    def weights(self, average: bool) -> list[Held]:
        """Returns copies of the weights of each stage, or of their average."""
        found = [snapshot(worker.stage.module) for worker in self.workers]
        for worker, (state, rest) in zip(self.workers, found, strict=True) if average else ():
            assert worker.stage.learner.average
            for name, mean in worker.stage.learner.average.weights.items():
                (state if name in state else rest)[name] = mean.clone()
        return found

    def save(self) -> list[CheckpointRecord]:
        """Saves each stage as it is now, with what is in flight to it."""
        rates = {str(k): own for k, own in self.rates.items()}
        beside = {"plan": self.plan.state(), "rates": rates, "wanted": sorted(self.results.wanted) if self.last else []}
        return [one for worker in self.workers if worker.saver for one in worker.saver.save_now(self.plan.batches, beside)]

    def load(self, weights: Sequence[Held]) -> None:
        """Lets each stage have these weights, with which an average begins anew; a head keeps its own."""
        for worker, own in zip(self.workers, weights, strict=True):
            load_module(worker.stage.module, *own, f"module of stage {worker.job.k}")
            worker.stage.banks.forget()
            if worker.stage.learner.average:
                worker.stage.learner.average.load([])


def _rates(optimizer: Optimizer | None) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups] if optimizer else []


def _set(group: dict[str, Any], value: float) -> None:
    if isinstance(group["lr"], Tensor):  # of a capturable optimizer
        group["lr"].fill_(value)
    else:
        group["lr"] = value
