"""The request for a run: the arguments of `fit` as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, TypeAlias

from torch import nn

from delock.data.loader import Loader
from delock.errors import UsageError
from delock.methods import Method
from delock.options import Acts, Checkpoint, Compression, Execution, Placement, Report, Simulation
from delock.partition.network import Network
from delock.plan import RunLength
from delock.stage import Loss, OptimizerFactory, ScheduleFactory

Metric: TypeAlias = Callable[[Any, Any], Any]
Workers: TypeAlias = Literal["processes", "inline"]


@dataclass(frozen=True)
class Request:
    """Holds a network, the goal and the length of its training, and the six groups of options, as they were given to `fit`."""

    model: nn.Module | Sequence[nn.Module]
    train: Loader
    test: Loader | None
    loss: Loss | None
    method: Method
    optimizer: OptimizerFactory
    schedule: ScheduleFactory | None = None
    stages: int | None = None
    cuts: Sequence[int | str] | None = None
    epochs: int | None = None
    batches: int | None = None
    eval_every: int | None = None
    clip: float | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    heads: str | Sequence[nn.Module] | None = None
    seed: int = 0
    device: str = "cpu"
    workers: Workers | Literal["torchrun"] = "processes"
    execution: Execution = field(default_factory=Execution)
    placement: Placement = field(default_factory=Placement)
    compression: Compression = field(default_factory=Compression)
    simulation: Simulation = field(default_factory=Simulation)
    report: Report = field(default_factory=Report)
    checkpoint: Checkpoint | None = None
    callbacks: tuple[Acts, ...] = ()  # that act on evaluations
    network: Network = None  # type: ignore[assignment]  # of the model: its layers, once they are known

    def __post_init__(self) -> None:
        if self.network is None:
            object.__setattr__(self, "network", Network(self.model))

    @property
    def criterion(self) -> Loss:
        """Returns the loss. Raises UsageError if there is none, neither given nor the model's own."""
        if self.loss is None:
            raise UsageError(f"loss is missing, and a {type(self.model).__name__} computes none: give fit a loss(outputs, targets)")
        return self.loss

    def length(self) -> RunLength:
        """Returns the length of the run. Raises UsageError unless exactly one of epochs and batches says it."""
        if (self.epochs is None) == (self.batches is None):
            raise UsageError("say how long to train: either epochs or batches")
        batches = self.batches if self.batches is not None else len(self.train) * (self.epochs or 0)
        if batches < 1:
            raise UsageError(f"training must last at least one batch, not {batches}: raise epochs or batches")
        every = self.eval_every if self.eval_every is not None else len(self.train)
        if every < 1:
            raise UsageError(f"eval_every is {every}, but it must be at least 1 batch")
        refuse_wrong_clip(self.clip)
        return RunLength(batches, every if self.test is not None else 0, len(self.test) if self.test is not None else 0, self.clip)


def refuse_wrong_clip(clip: float | None) -> None:
    """Raises UsageError for what is no norm of a gradient."""
    if clip is not None and not 0 < clip < inf:
        what = "must be above 0" if abs(clip) < inf else "must be finite"
        raise UsageError(f"clip is {clip:g}, but the norm that a gradient may keep {what}; leave it out not to clip")
