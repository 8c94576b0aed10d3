"""The stages of a session in the user's own process."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from delock.data.iterable import weigher
from delock.data.loader import LoadedBatch
from delock.engine.engine import run_here
from delock.engine.feed import HandedFeed
from delock.links.mailbox import Mailbox
from delock.records import BatchResult, Event
from delock.run.inline import copied_job
from delock.run.job import StageResult
from delock.run.own_loop.results import Measured, Results
from delock.run.own_loop.turns import LoopedJob, Turns
from delock.run.survival.checkpointing import Saver
from delock.run.worker import Worker
from delock.stage.loading import Held
from delock.tensors import map_tensors


class StagesHere:
    """Holds all stages of a session. Between two calls torch's random state and its thread count are the user's."""

    def __init__(self, looped: Sequence[LoopedJob], device: torch.device) -> None:
        self.handed: deque[LoadedBatch] = deque()
        self.news: deque[BatchResult] = deque()
        self.judgements: list[Measured | None] = []
        self.device, first = device, looped[0].job
        self.threads = first.placement.threads
        feed = HandedFeed(self.handed.popleft, weigher(first.train) if first.train else None, first.method.micro_batches, device)
        box = Mailbox()
        with self._own():
            self.workers = [
                Worker(job, box.end(job.k), device, _unheard, history=Results, saver=Saver, handed=None if job.k else feed)
                for job in (copied_job(one.job) for one in looped)
            ]
        for worker in self.workers:
            worker.tracker.logs = [other.log for other in self.workers]
        engines = [worker.engine for worker in self.workers]
        self.turns = Turns(looped[-1], self.workers, partial(run_here, engines=engines))

    def batch(self, batch: LoadedBatch, outputs: bool, wait: bool) -> None:
        """Takes a batch; its tensors may be written to afterwards."""
        with self._own():
            self._take(batch)
            self.news += self.turns.batch(outputs) or ()

    def judge(self, batch: LoadedBatch) -> None:
        """Evaluates a batch."""
        with self._own():
            self._take(batch)
            self.judgements.append(self.turns.judge())

    def judged(self) -> list[Measured]:
        """Returns measures, their weight and samples of each batch that was evaluated."""
        found, self.judgements = self.judgements, []
        return [one for one in found if one]

    def rest(self) -> None:
        """Does what is left."""
        with self._own():
            self.news += self.turns.rest() or ()

    def ask(self, what: str, *given: Any) -> list[Any]:
        """Returns the answers of the stages to `drained`, `rate`, `weights`, `save` or `load`."""
        with self._own():
            found = getattr(self.turns, what)(*given)
        return found or []

    def load(self, weights: Sequence[Held]) -> None:
        """Lets the stages have these weights."""
        self.ask("load", weights)

    def taken(self) -> list[BatchResult]:
        """Returns the results that have come."""
        found = [*self.news]
        self.news.clear()
        return found

    def end(self) -> list[StageResult]:
        """Returns the results of the stages."""
        for worker in self.workers:
            worker.end()
        return [worker.result(alone=len(self.workers) == 1) for worker in self.workers]

    def stop(self) -> None:
        """Has nothing to end."""

    def _take(self, batch: LoadedBatch) -> None:
        inputs, targets = map_tensors(Tensor.clone, (batch.inputs, batch.targets))
        self.handed.append(LoadedBatch(inputs, targets, batch.samples))

    @contextmanager
    def _own(self) -> Iterator[None]:
        before = torch.get_num_threads()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(False), torch.random.fork_rng(devices), torch.enable_grad():
            torch.set_num_threads(self.threads)
            try:
                yield
            finally:
                torch.set_num_threads(before)


def _unheard(event: Event) -> None:
    """Hears no events: results are asked for."""
