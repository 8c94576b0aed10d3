"""What was asked for: the arguments of `fit`, as far as they shape the run itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from torch import nn

from delock.codecs import Codec
from delock.data.loader import Loader
from delock.errors import UsageError
from delock.links.connect import LinkKind
from delock.methods import Method
from delock.plan import RunLength
from delock.run.job import Metric
from delock.stage import Loss, OptimizerFactory, ScheduleFactory
from delock.timeline import Emulation, Slowdown

if TYPE_CHECKING:
    from delock.run.prepared import PreparedRun

Layout = Literal["default", "channels-last", "auto"]


@dataclass
class Request:
    """The arguments of `fit`, as far as they shape the run itself."""

    model: nn.Module | Sequence[nn.Module]
    train: Loader
    test: Loader | None
    loss: Loss
    method: Method
    optimizer: OptimizerFactory
    schedule: ScheduleFactory | None = None
    stages: int | None = None
    cuts: Sequence[int | str] | None = None
    epochs: int | None = None
    steps: int | None = None
    eval_every: int | None = None
    clip: float | None = None
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    heads: str | Sequence[nn.Module] | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int = 1
    amp: bool = False
    layout: Layout = "default"
    chunks: int = 1
    compile: bool = False
    slow: Slowdown | None = None
    emulate: Emulation | None = None
    link: LinkKind = "auto"
    log_every: int = 10
    trace: bool = False
    workers: str = "processes"
    codec: Codec | None = None
    error_codec: Codec | None = None
    prepared: PreparedRun | None = None  # under torchrun: what this rank has prepared

    def length(self) -> RunLength:
        """The length of the run. Raises UsageError unless exactly one of epochs and steps says it."""
        if (self.epochs is None) == (self.steps is None):
            raise UsageError("say how long to train: either epochs or steps")
        batches = self.steps if self.steps is not None else len(self.train) * (self.epochs or 0)
        if batches < 1:
            raise UsageError(f"training must last at least one batch, not {batches}: raise epochs or steps")
        every = self.eval_every if self.eval_every is not None else len(self.train)
        if every < 1:
            raise UsageError(f"eval_every is {every}, but it must be at least 1 batch")
        if self.clip is not None and not 0 < self.clip < float("inf"):
            raise UsageError(f"clip is {self.clip:g}, but the norm that a gradient may keep must be above 0; leave it out not to clip")
        return RunLength(batches, every if self.test is not None else 0, len(self.test) if self.test is not None else 0, self.clip)
