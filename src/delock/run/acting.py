"""Lets a stage do what evaluations decide: evaluation e acts on every stage at its own place of evaluation e + 1, before it trains on.

An evaluation ends on the last stage, when the others are batches ahead of it. That stage tells all what it has measured (`Notices`), and
each takes it in where evaluation e + 1 lies in its column. So they decide by the same numbers at the same batch, every one for itself, and
keep in their own checkpoints what they have learned. Between the two lie more ticks than an activation takes to the last stage, which
`refuse_unfit_pace` sees to: so a stage in its place in the order of ticks waits for nothing, and no two can wait for each other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from delock.checkpoints.encoding import copied
from delock.errors import Concluded
from delock.launch.notices import Notices
from delock.ops import Evaluate
from delock.options import EarlyStopping, KeepBest, monitored
from delock.plan import Step
from delock.records import EvaluationRecord
from delock.run.job import StageJob
from delock.stage import Stage
from delock.stage.loading import Held, load_module, volatile


class Best:
    """Holds the best of a measure so far, and the evaluation that had it. least: a difference up to that counts as none."""

    def __init__(self, monitor: str, least: float = 0.0) -> None:
        self.name, self.most = monitored(monitor)
        self.least = least
        self.value: float | None = None
        self.number = -1

    def take(self, number: int, measures: Mapping[str, float]) -> bool:
        """Takes in the measures of an evaluation; returns True if it is better than all before."""
        value = measures[self.name]
        if math.isnan(value) or (self.value is not None and not self._better(value, self.value)):
            return False
        self.value, self.number = value, number
        return True

    def _better(self, value: float, than: float) -> bool:
        return value > than + self.least if self.most else value < than - self.least


class Acting:
    """The part of a stage in it; to be called in front of every Evaluate."""

    def __init__(self, job: StageJob, stage: Stage, notices: Notices) -> None:
        self.job, self.stage, self.notices = job, stage, notices
        self.planned = job.length.batches
        self.heard = 0  # evaluations whose measures have been taken in
        self.stopped = ""  # why the run ends earlier than was planned
        self.early = [(one, Best(one.monitor, one.min_delta)) for one in job.callbacks if isinstance(one, EarlyStopping)]
        self.best = next((Best(one.monitor) for one in job.callbacks if isinstance(one, KeepBest)), None)
        self.kept: dict[int, Held] = {}  # the best evaluation's, and those of one whose measures have not been taken in

    def __call__(self, step: Step) -> None:
        """Takes in all evaluations before this one, and keeps what it sees. Raises Concluded where the run is to end here."""
        assert isinstance(step.op, Evaluate)
        number = step.op.batch // self.job.length.evaluation
        self._hear(number)
        if self.best and number not in self.kept:
            self.kept[number] = evaluated(self.stage)

    def tell(self, evaluations: list[EvaluationRecord]) -> None:
        """Tells all stages what the latest evaluation has measured; on the last stage."""
        if evaluations:
            self.notices.put(len(evaluations) - 1, json.dumps(measures_of(evaluations[-1], next(iter(self.job.tests), ""))))

    def finish(self) -> None:
        """Takes in the evaluation at the end of the run, and lets the stage have the best weights, if they are kept."""
        length, stage = self.job.length, self.stage
        self._hear(-(-length.batches // length.every))
        if self.kept_number is not None:
            state, rest = self.kept[self.kept_number]
            load_module(stage.module, state, rest, f"module of stage {stage.k}")

    @property
    def kept_number(self) -> int | None:
        """Returns the number of the best evaluation so far; None if none is kept."""
        return self.best.number if self.best and self.best.number >= 0 else None

    def _hear(self, count: int) -> None:
        while self.heard < count:
            number, measures = self.heard, json.loads(self.notices.take(self.heard))
            self.heard += 1
            self._act(number, measures)

    def _act(self, number: int, measures: Mapping[str, float]) -> None:
        if self.best:
            self.best.take(number, measures)
            self.kept = {n: one for n, one in self.kept.items() if n == self.best.number}
        batches = (number + 2) * self.job.length.every  # before the place of the next evaluation
        for one, best in self.early:
            best.take(number, measures)
            if number - best.number >= one.patience and batches < self.planned and not self.stopped:
                self.stopped = _why(one, best, batches)
        if self.stopped and batches < self.job.length.batches:
            self.job.length = replace(self.job.length, batches=batches)
            raise Concluded(batches)
        if self.job.monitor and not self.stopped:  # updates that are left are those of a run that ends there, at the rate before
            self.stage.learner.judge(measures[monitored(self.job.monitor)[0]])

    def state(self) -> dict[str, Any]:
        """Returns what decisions to come depend on, as plain values."""
        return {
            "heard": self.heard,
            "stopped": self.stopped,
            "batches": self.job.length.batches if self.stopped else None,
            "bests": [(best.value, best.number) for best in self._bests()],
            "kept": dict(self.kept),
        }

    def _bests(self) -> list[Best]:
        return [*(best for _, best in self.early), *([self.best] if self.best else [])]

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`."""
        self.heard, self.stopped = state["heard"], state["stopped"]
        if self.stopped:
            self.job.length = replace(self.job.length, batches=state["batches"])
        for best, (value, number) in zip(self._bests(), state["bests"], strict=True):
            best.value, best.number = value, number
        self.kept = state["kept"]


def evaluated(stage: Stage) -> Held:
    """Returns a copy of what an evaluation of the stage sees: its weights and buffers, with the average of weights where it sees that."""
    state, means = stage.module.state_dict(), stage.body.average.weights if stage.body.average else {}
    found: Held = copied(({**state, **{name: w for name, w in means.items() if name in state}}, volatile(stage.module)), "the weights")
    return found


def _why(one: EarlyStopping, best: Best, batches: int) -> str:
    than = f" than {best.value:.6g}" if best.value is not None else ""
    return (
        f"stopped early, behind batch {batches}: {best.name} was not {'more' if best.most else 'less'}{than} in {one.patience} evaluations"
    )


def measures_of(record: EvaluationRecord, first: str) -> dict[str, float]:
    """Returns the measures of an evaluation by name; those of the first of several test sets, called `first`, also without its name."""
    found = {"loss": record.test_loss, **record.metrics}
    if first:
        found |= {name.removeprefix(f"{first}/"): value for name, value in record.metrics.items() if name.startswith(f"{first}/")}
    return found
