"""A stage whose arithmetic is a timed wait: schedules of more workers than the machine has cores, with real messages of real sizes."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from delock.keys import key


class Emulated(nn.Module):
    """Takes (B, ...), waits `forward` seconds, returns zeros (B, *shape); its backward waits `backward` seconds, an eval forward none.

    jitter: every wait is longer or shorter by a share of at most so much, a function of (seed, number of the forward). Where input and
    weight gradient are computed apart, each takes half of the backward.
    """

    def __init__(self, shape: tuple[int, ...], forward: float, backward: float, *, jitter: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        self.shape, self.seconds, self.jitter, self.seed = shape, (forward, backward), jitter, seed
        self.weight = nn.Parameter(torch.zeros(()))
        self.count = 0
        self.original: dict[str, str] = {}  # its parameter is none of the unsplit model's

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, *shape)."""
        if not self.training:
            return x.new_zeros(len(x), *self.shape)
        ahead, back = (seconds * self._stretch(i) for i, seconds in enumerate(self.seconds))
        self.count += 1
        time.sleep(ahead)
        done = _Done()
        weight = _Wait.apply(self.weight, back, done, False)
        made: Tensor = _Zeros.apply(_Wait.apply(x, back, done, True), weight, self.shape, done)  # made later: autograd comes to it first
        return made

    def _stretch(self, which: int) -> float:
        draw = key("jitter", self.seed, self.count, which) / 2**62 - 1  # in [-1, 1)
        return 1 + self.jitter * draw


class _Done:
    """What has been done of a backward: an error that comes for the second time wants the weight's half only."""

    error: Tensor | None = None
    half = False  # the input's half


class _Wait(torch.autograd.Function):
    """The identity; its backward waits: the input's for a half, the weight's for what is left."""

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
    """Zeros of a shape, for which input and weight have gradients: zeros too."""

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
