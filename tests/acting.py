"""A plain loop that acts on evaluations, and the runs that are compared with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.records import Result

from chain import seeded

SGD = partial(torch.optim.SGD, lr=0.3, momentum=0.9)
EVERY = 4
PLATEAU = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, factor=0.5, patience=0, threshold=0.05)
Batches = list[tuple[Tensor, Tensor]]


def batches(n: int = 40, seed: int = 0) -> Batches:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(8, 5, generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(n)]


def network() -> nn.Sequential:
    """Six layers without dropout; batch norm has buffers."""
    return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))


def accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (out.argmax(1) == y).double().mean()


def fit(*, method: Any = "bp", K: int = 1, workers: Any = "inline", **options: Any) -> tuple[nn.Sequential, Result]:
    model, given = network(), {"cuts": [[], [3], [1, 3], [1, 3, 4]][K - 1], "eval_every": EVERY, "optimizer": SGD, **options}
    metrics = {"accuracy": accuracy}
    data, test = given.pop("data", batches()), given.pop("test", batches(2, 9))
    given = {"epochs": 1, **given} if "batches" not in given else given
    return model, delock.fit(model, data, test, loss=cross_entropy, metrics=metrics, method=method, workers=workers, **given)


@dataclass
class Loop:
    """Trains as any loop in PyTorch does; evaluation e acts at evaluation e + 1.

    act: called with the loop, the number of an evaluation, and its measures; it may set `over`. after: after every update.
    """

    act: Callable[[Loop, int, dict[str, float]], None] = lambda *_: None
    at: Callable[[Loop], None] = lambda _: None
    after: Callable[[Loop], None] = lambda _: None
    evaluated: Callable[[Loop], nn.Module] = lambda loop: loop.model
    schedule: Callable[[Any], Any] | None = None
    model: nn.Sequential = field(default_factory=network)
    over: bool = False
    measured: list[dict[str, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    def run(self, data: Batches | None = None) -> Loop:
        self.optimizer = SGD(self.model.parameters())
        self.made = self.schedule(self.optimizer) if self.schedule else None
        for n, (x, y) in enumerate(data or batches()):
            if n and n % EVERY == 0:
                self.evaluation()
                if self.over:
                    return self
            self.model.train()
            self.optimizer.zero_grad()
            loss = cross_entropy(self.model(x), y)
            loss.backward()
            self.rates.append(self.optimizer.param_groups[0]["lr"])
            self.optimizer.step()
            self.losses.append(loss.item())
            self.after(self)
        self.evaluation()
        return self

    def evaluation(self) -> None:
        if self.measured:
            self.act(self, len(self.measured) - 1, self.measured[-1])
        self.at(self)
        model = self.evaluated(self).eval()
        with torch.no_grad():
            found = [(cross_entropy(model(x), y).item(), accuracy(model(x), y).item()) for x, y in batches(2, 9)]
        self.measured.append({"loss": math.fsum(a for a, _ in found) / 2, "accuracy": math.fsum(b for _, b in found) / 2})


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    """Two networks have the same weights and buffers, bit for bit."""
    theirs = other.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
