"""Everything that one stage needs for a run, and everything that it brings home."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from delock.codecs import Codec
from delock.data.loader import Loader
from delock.execution import PLAIN, Execution
from delock.links.connect import LinkKind
from delock.methods import Method
from delock.plan import RunLength
from delock.records import EvaluationRecord, StageReport
from delock.stage import Loss, OptimizerFactory, ScheduleFactory
from delock.tensors import Tree
from delock.timeline import Slowdown, Span

Metric = Callable[[Any, Any], Any]


@dataclass
class StageJob:
    """Everything that stage k needs for a run; travels to its process. Only stage 0 gets the loaders; the last uses loss and metrics."""

    k: int
    K: int
    module: nn.Module
    names: Mapping[str, str]  # the stage's own parameter names -> names in the unsplit model
    method: Method
    length: RunLength
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
    execution: Execution = PLAIN
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
