"""From options to an optimizer and a course of the learning rate: small picklable values that every stage calls for itself.

The optimizers are torch's fused ones: a step takes 0.2 to 0.7 times as long as by default (one thread; a ResNet-20 saves 0.5 ms with
momentum and 1.4 with AdamW, a GPT of 5 million parameters 4 and 10), and differs by rounding. They do not tell autograd what they write;
stages do not ask it.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from delock.config import TrainConfig, known
from delock.methods import Method

Params: TypeAlias = Iterable[Any]  # parameters, named or not, or parameter groups, as torch.optim takes them
Named: TypeAlias = Iterable[tuple[str, torch.Tensor]]  # by their names in the unsplit model


@dataclass(frozen=True, slots=True)
class SGD:
    """w <- w - lr m, m <- momentum m + g + weight_decay w; Nesterov's form steps along g + momentum m."""

    lr: float
    momentum: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    def __call__(self, params: Params) -> Optimizer:
        fused = self.momentum > 0  # without, a stage of two tensors would lose 3 us
        return torch.optim.SGD(params, self.lr, self.momentum, weight_decay=self.weight_decay, nesterov=self.nesterov, fused=fused)


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam, its weight decay added to the gradient."""

    lr: float
    weight_decay: float = 0.0

    def __call__(self, params: Params) -> Optimizer:
        return torch.optim.Adam(params, self.lr, weight_decay=self.weight_decay, fused=True)


@dataclass(frozen=True, slots=True)
class AdamW:
    """Adam, its weight decay apart from the gradient, and of matrices and kernels only.

    Biases, the weights of norms and embeddings are left as they are: decay limits what a sum over many inputs can reach, and these
    scale, shift or look up one number each.
    """

    lr: float
    weight_decay: float = 0.0

    def __call__(self, params: Named) -> Optimizer:
        named = list(params)
        groups = [(self.weight_decay, [one for one in named if decays(*one)]), (0.0, [one for one in named if not decays(*one)])]
        return torch.optim.AdamW([{"params": some, "weight_decay": decay} for decay, some in groups if some], self.lr, fused=True)


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Whether AdamW's weight decay acts on a parameter: it has two dimensions or more, and is no embedding, by its name."""
    return parameter.dim() > 1 and not any(part.startswith("embed") for part in name.split("."))


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


def recipe(config: TrainConfig, method: Method, epoch: int, batches: int) -> tuple[Callable[[Any], Optimizer], Schedule]:
    """Optimizer and schedule of a resolved config, for a run of `batches` with `epoch` batches per epoch."""
    options = config.training
    lr, decay = known(options.lr), known(options.weight_decay)
    optimizer: Callable[[Any], Optimizer]
    match known(options.optimizer):
        case "sgd":
            optimizer = SGD(lr, options.momentum or 0.0, decay, options.nesterov)
        case "adam":
            optimizer = Adam(lr, decay)
        case "adamw":
            optimizer = AdamW(lr, decay)

    def updates(count: float) -> int:
        return math.ceil(count / method.batches_per_update)

    milestones = tuple(sorted(updates(at * epoch) for at in options.milestones))
    return optimizer, Schedule(options.schedule, updates(batches), updates(known(options.warmup)), milestones, options.gamma)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """Share of the rows of (B, classes) whose largest entry is at their (B,) label."""
    return float((outputs.argmax(1) == targets).double().mean())
