"""Data of every kind, optimizers and schedules, for tests of resumed runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import delock

# ---- data --------------------------------------------------------------------------------------------------------------------------


def samples(n: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """n pairs of (2, 4, 4) and a class."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 4, 4, generator=draw).to(dtype), torch.randint(3, (n,), generator=draw)


def listed(n: int, dtype: torch.dtype, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of 6, the last as small as it comes."""
    x, y = samples(n, dtype, seed)
    return list(zip(x.split(6), y.split(6), strict=True))


class Stream:
    """A loader that draws its batches one after the other, and knows where it is: it goes on through the epochs."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.place = dtype, 0

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.place += 1
            yield samples(6, self.dtype, self.place)

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]


class Ordered(Stream):
    """A loader that begins every epoch anew, in another order, and goes on from a place with the next iteration."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.place, self.start = self.start, 0
        while self.place < 4:
            self.place += 1
            yield samples(6, self.dtype, 100 * self.epoch + self.place)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["place"]


def ones(targets: Tensor) -> Tensor:
    """Returns what targets weigh: class 0 counts half."""
    return torch.where(targets == 0, 0.5, 1.0).sum()


DATA: dict[str, Callable[[torch.dtype], Any]] = {
    "even": lambda dtype: listed(24, dtype),
    "four left": lambda dtype: listed(22, dtype),
    "one left": lambda dtype: listed(19, dtype),
    "shuffled": lambda dtype: DataLoader(TensorDataset(*samples(24, dtype)), 6, shuffle=True),
    "workers": lambda dtype: DataLoader(TensorDataset(*samples(24, dtype)), 6, shuffle=True, num_workers=1),
    "stream": Stream,
    "ordered": Ordered,
    "torchdata": lambda dtype: StatefulDataLoader(TensorDataset(*samples(24, dtype)), 6, shuffle=True),
    "torchdata workers": lambda dtype: StatefulDataLoader(TensorDataset(*samples(24, dtype)), 6, shuffle=True, num_workers=1),
    "weighed": lambda dtype: delock.data.Batches(listed(22, dtype), weight=ones),
    "weighed stream": lambda dtype: delock.data.Batches(Stream(dtype), weight=ones),
}

# ---- optimizers and schedules ------------------------------------------------------------------------------------------------------

R = delock.recipes


class Noisy(torch.optim.SGD):
    """Adds noise to every weight, drawn from the default generator."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(torch.randn_like(weight), alpha=1e-3)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.02, momentum=0.9, nesterov=True),
    "fused sgd": R.SGD(0.02, 0.9, 1e-3),
    "adamw": R.AdamW(2e-3, 0.01),
    "amsgrad": partial(torch.optim.Adam, lr=2e-3, amsgrad=True, foreach=True),
    "nadamw": R.NAdamW(2e-3, 0.01),
    "radam": partial(torch.optim.RAdam, lr=2e-3),
    "adagrad": partial(torch.optim.Adagrad, lr=0.02),
    "rmsprop": partial(torch.optim.RMSprop, lr=2e-3, centered=True, momentum=0.5),
    "asgd": partial(torch.optim.ASGD, lr=0.02, t0=2),
    "rprop": partial(torch.optim.Rprop, lr=2e-3),
    "adafactor": partial(torch.optim.Adafactor, lr=2e-3),
    "muon": R.muon(0.01),
    "spiked adamw": R.scadamw(2e-3),
    "spiked sgd": R.scsgd(0.02),
    "soap": R.soap(2e-3),
    "noisy": partial(Noisy, lr=0.02),
}


def half(n: int) -> float:
    """A factor of the rate."""
    return 0.9**n


def sequence(o: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Makes one schedule behind the other."""
    return lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3])


def chained(o: torch.optim.Optimizer) -> lr_scheduler.LRScheduler:
    """Makes two schedules at once."""
    return lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)])


SCHEDULES: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "milestones": partial(lr_scheduler.MultiStepLR, milestones=[2, 2, 5], gamma=0.5),
    "cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.02, total_steps=20, cycle_momentum=False),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=6),
    "restarts": partial(lr_scheduler.CosineAnnealingWarmRestarts, T_0=3),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=half),
    "sequence": sequence,
    "chained": chained,
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.001, max_lr=0.02, step_size_up=2, cycle_momentum=False),
}
