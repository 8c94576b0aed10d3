"""The course of the learning rate as a small picklable value that every stage calls with its own optimizer."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True, slots=True)
class Schedule:
    """The learning rate of update n = 0, 1, ... of a stage: a factor of the optimizer's own; (n + 1) / warmup in a warm-up.

    shape: "constant"; "cosine", from 1 after the warm-up to 0 after `updates`; "steps", times `gamma` at each of the `milestones`.
    updates, warmup and milestones count the stage's own updates, so that all stages use the same rate for the same batch.
    """

    shape: str
    updates: int
    warmup: int = 0
    milestones: tuple[int, ...] = ()
    gamma: float = 0.1

    def __call__(self, optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, self.factor)

    def factor(self, n: int) -> float:
        """The factor at update n."""
        if n < self.warmup:
            return (n + 1) / self.warmup
        if self.shape == "cosine":
            done = (n - self.warmup) / max(1, self.updates - self.warmup)
            return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
        if self.shape == "steps":
            return self.gamma ** bisect_right(self.milestones, n)
        return 1.0
