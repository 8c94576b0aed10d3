"""Emulates a stage by timed waits, to try schedules of more workers than the machine has cores, with real messages of real sizes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from delock.keys import key
from delock.optim.stage_facts import ALONE, StageFacts, for_stage


class Emulated(nn.Module):
    """Waits `forward` seconds per forward and `backward` seconds per backward in training, and maps (B, ...) to zeros (B, *shape).

    In eval mode it does not wait. If input and weight gradient are computed apart, each waits half of `backward`. On stage 0, whose input
    has no gradient, the weight's waits all of it (see `timeline.Costs`).
    jitter: the largest share by which a wait is longer or shorter; the share is a function of (seed, number of the forward).
    """

    def __init__(self, shape: tuple[int, ...], forward: float, backward: float, *, jitter: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.seconds, self.jitter, self.seed = shape, (forward, backward), jitter, seed
        self.weight = nn.Parameter(torch.zeros(()))
        self.count = 0
        self.original: dict[str, str] = {}  # its parameter does not belong to the unsplit model

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, ...) to (B, *shape)."""
        if not self.training:
            return x.new_zeros(len(x), *self.shape)
        ahead, back = (seconds * self._stretch(i) for i, seconds in enumerate(self.seconds))
        self.count += 1
        time.sleep(ahead)
        done = _Done()
        weight = _Wait.apply(self.weight, back, done, False)
        made: Tensor = _Zeros.apply(_Wait.apply(x, back, done, True), weight, self.shape, done)  # made last, so autograd runs it first
        return made

    def _stretch(self, which: int) -> float:
        draw = key("jitter", self.seed, self.count, which) / 2**62 - 1  # in [-1, 1)
        return 1 + self.jitter * draw


class _Done:
    """Remembers which part of a backward is done: if the same error arrives a second time, only the weight's half is left."""

    error: Tensor | None = None
    half = False  # the input's half is done


class _Wait(torch.autograd.Function):
    """Computes the identity; its backward waits: half of the seconds for the input, the rest for the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, seconds: float, done: _Done, first: bool) -> Tensor:
        ctx.seconds, ctx.done, ctx.first = seconds, done, first
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None, None]:
        time.sleep(ctx.seconds / 2 if ctx.first or ctx.done.half else ctx.seconds)
        ctx.done.half = ctx.done.half or ctx.first
        return d, None, None, None


class _Zeros(torch.autograd.Function):
    """Returns zeros of a shape; the gradients of input and weight are zeros too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shape: tuple[int, ...], done: _Done) -> Tensor:
        ctx.like, ctx.done = x, done
        return weight.new_zeros(len(x), *shape)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None, None]:
        done: _Done = ctx.done
        done.half = done.error is not None and done.error.data_ptr() == d.data_ptr()
        done.error = d
        return torch.zeros_like(ctx.like), d.new_zeros(()), None, None


@dataclass(frozen=True, slots=True)
class WaitingStep:
    """Makes a factory's optimizers wait after each step, as long as the step of the real weights would take."""

    optimizer: Callable[..., Optimizer]
    seconds: float

    def __call__(self, params: Any, *, stage: StageFacts = ALONE) -> Optimizer:
        made = for_stage(self.optimizer, stage)(params)
        if isinstance(made, Optimizer):  # else the stage refuses it
            made.register_step_post_hook(self._wait)
        return made

    def _wait(self, *_: Any) -> None:
        time.sleep(self.seconds)
