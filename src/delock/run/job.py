"""Holds all that one stage needs for a run, and all that it brings home."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor, nn

from delock.data.loader import Loader
from delock.launch.ambient import Ambient
from delock.methods import Method
from delock.optim.rates import monitor_of
from delock.options import EMA, Acts, Checkpoint, Compression, Execution, Placement, Report, Simulation
from delock.plan import RunLength
from delock.records import EvaluationRecord, StageReport
from delock.run.request import Metric
from delock.run.survival.resume import Begin
from delock.stage import Loss, OptimizerFactory, ScheduleFactory
from delock.tensors import Tree
from delock.timeline import Span


@dataclass
class StageJob:
    """Holds all that stage k needs for a run; travels to its process. Only stage 0 gets the loaders; the last uses loss and metrics.

    The five groups are those of the request; only a layout "auto" has become the one that was faster.
    """

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
    tests: Mapping[str, int] = field(default_factory=dict)  # batches of the test sets, by name; one without a name is called ""
    head: nn.Module | None = None  # auxiliary, of a stage with a loss of its own
    main: bool = False  # the head takes the first tensor of the stage's output alone
    alone: bool = False  # no loss but its own reaches the stage
    learns_below: bool = True  # a stage below has weights that learn
    execution: Execution = field(default_factory=Execution)
    placement: Placement = field(default_factory=Placement)
    compression: Compression = field(default_factory=Compression)
    simulation: Simulation = field(default_factory=Simulation)
    report: Report = field(default_factory=Report)
    ambient: Ambient = field(default_factory=Ambient.here)
    checkpoint: Checkpoint | None = None
    begin: Begin | None = None  # the checkpoint to go on from
    conditions: Mapping[str, Any] = field(default_factory=dict)  # what must be the same in a run that goes on
    example: Tree = None  # on the meta device: a batch as it enters the stage, where that is compiled
    rows: int = 0  # samples in it
    callbacks: tuple[Acts, ...] = ()  # that act on evaluations
    weighed: bool = False  # the loader says what its batches weigh in means
    window: int = 256

    @property
    def restages(self) -> bool:
        """Returns True if the run goes on from a checkpoint of other stages."""
        return self.begin is not None and self.begin.restages(self.conditions["cuts"])

    @property
    def start(self) -> int:
        """Returns the tick at which the stage begins."""
        return self.begin.tick if self.begin else 0

    @property
    def monitor(self) -> str:
        """Returns the measure of evaluations by which the schedule goes; "" for one that is stepped once per update."""
        return monitor_of(self.schedule)

    @property
    def ema(self) -> EMA | None:
        """Returns the average of the weights that is to be kept."""
        return next((one for one in self.callbacks if isinstance(one, EMA)), None)

    @property
    def acts(self) -> bool:
        """Returns True if evaluations are acted on."""
        return bool(self.monitor) or any(not isinstance(one, EMA) for one in self.callbacks)

    def parts_in_words(self) -> list[tuple[str, object]]:
        """Returns what it holds by the names that the user knows it by, for errors."""
        return [(one.name, getattr(self, one.name)) for one in fields(self)]


@dataclass
class StageResult:
    """Holds the result of a stage: its weights under its own names, its report, and from the last stage the history."""

    state: dict[str, Tensor]
    head: dict[str, Tensor]  # of its auxiliary head, empty where it has none
    report: StageReport
    loss: dict[str, Tensor] = field(default_factory=dict)  # of a loss that is a module, from the last stage
    volatile: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # of "module", "head" and "loss": what is in no state dict
    losses: list[float] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    samples: int = 0
    seconds: float = 0.0
    spans: list[Span] = field(default_factory=list)
    optimizer: dict[str, Any] | None = None
    stopped: int | None = None  # the tick before which it ended, as was asked
    ended: str = ""  # why the run was shorter than planned
    best: int | None = None  # the evaluation whose weights it brings home
