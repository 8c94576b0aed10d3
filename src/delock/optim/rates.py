"""Sets the learning rate, through a small picklable value that every stage calls with its own optimizer."""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau

from delock.errors import UsageError
from delock.optim.ranges import check_amount, is_amount
from delock.optim.stage_facts import ALONE, StageFacts

SHAPES = ("constant", "cosine", "steps")


@dataclass(frozen=True, slots=True)
class Schedule:
    """Scales the optimizer's learning rate by a factor of the number n = 0, 1, ... of the stage's update.

    warmup: number of updates n during which the factor is (n + 1) / warmup.
    shape: after the warm-up, "constant" keeps 1; "cosine" falls from 1 to `floor`, which it reaches after `updates`; "steps"
    multiplies by `gamma` at each of the `milestones`.
    updates, warmup and milestones count the stage's own updates, so that all stages use the same rate for the same batch.
    """

    shape: str
    updates: int
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1
    floor: float = 0.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise UsageError(f"the shape of a Schedule is {', '.join(SHAPES[:-1])} or {SHAPES[-1]}, not {reprlib.repr(self.shape)}")
        if not isinstance(self.milestones, tuple | list):
            raise UsageError(f"milestones of a Schedule are numbers of updates, as (100, 200), not {reprlib.repr(self.milestones)}")
        amounts = [(name, getattr(self, name)) for name in ("updates", "warmup", "gamma", "floor")]
        for name, value in amounts + [("a milestone", at) for at in self.milestones]:
            check_amount(name, value, "a Schedule")
        if self.floor > 1:
            raise UsageError(f"floor of a Schedule is a share of the rate in [0, 1], not {self.floor}")
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Raises UsageError for an option of another shape; gamma has a default that says nothing."""
        for name, shape in (("milestones", "steps"), ("floor", "cosine")):
            if getattr(self, name) and self.shape != shape:
                raise UsageError(f"a Schedule of the shape {self.shape} takes no {name}, unlike {shape}")

    def __call__(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.factor)

    def factor(self, n: int) -> float:
        """Returns the factor at update n."""
        if n < self.warmup:
            return (n + 1) / self.warmup
        if self.shape == "cosine":
            done = (n - self.warmup) / max(1, self.updates - self.warmup)
            return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.shape == "steps":
            return self.gamma ** sum(at <= n for at in self.milestones)
        return 1.0


@dataclass(frozen=True, slots=True)
class PipeMare:
    """Slows a stage down at the beginning where its gradients are more than one update old, and follows `schedule` besides:

        lr_k <- lr / max(1, tau_k)^(1 - min(n / annealing, 1))

    tau_k is the stage's mean staleness in updates, n = 0, 1, ... the number of the update. Source: Yang et al., "PipeMare: Asynchronous
    Pipeline Parallel DNN Training", MLSys 2021, its technique T1; T2, the correction of the weights, is not part of this.
    """

    annealing: int
    schedule: Schedule = Schedule("constant", 0)

    def __post_init__(self) -> None:
        if not is_amount(self.annealing) or self.annealing < 1:
            raise UsageError(f"annealing of PipeMare is a number of updates, at least 1, not {reprlib.repr(self.annealing)}")
        if not isinstance(self.schedule, Schedule):
            raise UsageError(f'schedule of PipeMare is a Schedule, as Schedule("cosine", 1_000), not {reprlib.repr(self.schedule)}')

    def __call__(self, optimizer: Optimizer, *, stage: StageFacts = ALONE) -> LambdaLR:
        return LambdaLR(optimizer, partial(self.factor, stage.staleness))

    def factor(self, tau: float, n: int) -> float:
        """Returns the factor of the rate at update n of a stage whose mean staleness is tau."""
        slowed: float = max(1.0, tau) ** (1 - min(n / self.annealing, 1))
        return self.schedule.factor(n) / slowed


class Plateau:
    """Reduces the rate when a measure of evaluations has become no better for a while: torch's ReduceLROnPlateau, by any measure.

    monitor: "min:NAME" or "max:NAME", by a metric's name, or loss. The options are those of ReduceLROnPlateau but `mode`.
    """

    def __init__(self, monitor: str = "min:loss", **options: Any) -> None:
        self.monitor, self.options = monitor, options

    def __call__(self, optimizer: Optimizer) -> ReduceLROnPlateau:
        return ReduceLROnPlateau(optimizer, mode=self.monitor[:3], **self.options)  # type: ignore[arg-type]  # min or max


def monitor_of(schedule: Any) -> str:
    """Returns the measure by which a schedule goes, as "min:loss"; "" if it is stepped once per update.

    Raises UsageError for a ReduceLROnPlateau that waits for the loss to rise.
    """
    if isinstance(schedule, Plateau):
        return schedule.monitor
    made = schedule
    while hasattr(made, "func"):
        made = made.func
    if made is not ReduceLROnPlateau:
        return ""
    template = getattr(schedule, "template", None)
    if (template.mode if template else getattr(schedule, "keywords", {}).get("mode", "min")) != "min":
        raise UsageError(
            'ReduceLROnPlateau is given the test loss, which gets better when it falls: give delock.recipes.Plateau("max:NAME", ...)'
        )
    return "min:loss"
