"""The history of a session as its last stage sees it: it keeps the result of every batch until it is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from delock.errors import UsageError
from delock.execution import precision
from delock.links import Message
from delock.ops import Backward
from delock.plan import Step
from delock.records import BatchResult, Evaluation
from delock.run.history import History, measured
from delock.run.request import Metric
from delock.stage import InFlight, Stage
from delock.tensors import flatten, map_tensors, unflatten

Measured: TypeAlias = tuple[dict[str, float], float, int]
"""Measures of a batch, what they weigh, and its samples."""


class Results(History):
    """Keeps the results of batches, and of batches of an evaluation, in the order in which they come."""

    wanted: set[int]  # batches whose outputs come back
    show: Metric  # makes of the last stage's outputs those of the model

    def watch(self, show: Metric) -> None:
        """Begins to keep results."""
        self.wanted, self.show = set(), show
        self.ready: list[BatchResult] = []
        self.tested: list[Measured] = []  # measures, what they weigh, samples
        self.outputs: list[Any] = []  # of the parts of a batch so far
        self.parts: list[Measured] = []

    def loss(self, step: Step, value: float, stage: Stage, batch: InFlight) -> None:
        """Takes the loss of a (micro-)batch; one in which nothing counts has outputs, and no measures."""
        assert isinstance(step.op, Backward)
        number, done, message = step.op.batch // self.job.method.micro_batches, len(self.losses), batch.message
        if batch.outputs is not None:
            outputs = map_tensors(Tensor.detach, batch.outputs)
            found = self._measures(self.job.metrics, outputs, message.targets) if message.weight else {}
            self.parts.append((found, message.count, message.samples))
            if number in self.wanted:
                self.outputs.append(outputs)
        super().loss(step, value, stage, batch)
        if len(self.losses) > done:
            self._complete(number, stage.lr)

    def _complete(self, number: int, lr: float) -> None:
        samples = sum(n for _, _, n in self.parts)
        shown = _joined([self.show(one, None) for one in self.outputs]) if self.outputs else None
        metrics = means(self.parts) or dict.fromkeys(self.job.metrics, math.nan)
        self.ready.append(BatchResult(number, self.losses[-1], metrics, lr, samples, shown))
        self.wanted.discard(number)
        self.parts, self.outputs = [], []

    def output(self, step: Step, result: Message) -> None:
        """Takes the outputs of a batch of an evaluation."""
        found = self._measures({"": self.job.loss, **self.job.metrics}, result.values, result.targets) if result.count else {}
        self.tested.append((found, result.count, result.samples))

    def _measures(self, measures: Mapping[str, Metric], outputs: Any, targets: Any) -> dict[str, float]:
        with torch.no_grad(), precision(self.job.execution, self.device):
            return {name: measured(name, measure, outputs, targets) for name, measure in measures.items()}

    def taken(self) -> list[BatchResult]:
        """Returns the results that have come since it was last asked."""
        found, self.ready = self.ready, []
        return found


def evaluation_of(judged: Mapping[str, list[Measured]]) -> Evaluation:
    """Returns the evaluation of test sets by name; one without a name is called "". Raises UsageError for a set in which nothing counts."""
    found, metrics = {name: means(own) for name, own in judged.items()}, dict[str, float]()
    if not all(any(count for _, count, _ in own) for own in judged.values()):
        some = all(any(samples for _, _, samples in own) for own in judged.values())
        what = "the test data has samples, but weight(targets) is 0 for all of them" if some else "the test data has no samples"
        raise UsageError(f"{what}, so an evaluation has no mean: give it some{' that count' if some else ''}")
    for name, own in found.items():
        metrics |= {f"{name}/{one or 'loss'}" if name else one: value for one, value in own.items() if name or one}
    return Evaluation(next(iter(found.values()))[""], metrics, sum(n for own in judged.values() for _, _, n in own))


def means(found: list[Measured]) -> dict[str, float]:
    """Returns the means of measures over what they weigh; NaN where nothing weighs."""
    whole, names = sum(count for _, count, _ in found), dict.fromkeys(name for one, _, _ in found for name in one)
    return {name: sum(one[name] * count for one, count, _ in found if one) / whole if whole else math.nan for name in names}


def _joined(parts: list[Any]) -> Any:
    """Returns the outputs of a batch from those of its parts: rows behind rows, and numbers in a row; else, as they are, in a list."""
    if len(parts) == 1:
        return parts[0]
    shape, columns = flatten(parts[0])[0], list(zip(*(flatten(one)[1] for one in parts), strict=True))
    if any(len({one.shape[1:] for one in own}) > 1 for own in columns):
        return parts
    return unflatten(shape, [torch.cat(own) if own[0].dim() else torch.stack(own) for own in columns])
