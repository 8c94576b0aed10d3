"""A small data set of noisy points with labels and weights, a network for it, and `delock.fit` on both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import delock
from delock.records import Result

CLASSES = 3


class Points(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """n points of three kinds, each read with noise drawn afresh from all three generators, as transforms do; every fifth has no label."""

    def __init__(self, n: int = 22) -> None:
        g = torch.Generator().manual_seed(0)
        self.label = torch.randint(CLASSES, (n,), generator=g)
        self.x = torch.randn(n, 6, generator=g) + self.label[:, None]
        self.weight = torch.rand(n, generator=g) + 0.5

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.x[i] + 0.1 * torch.randn(6) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        label = self.label[i] if i % 5 else torch.tensor(-100)
        return x, {"label": label, "weight": self.weight[i]}


def train_data(batch_size: int = 6, n: int = 22) -> DataLoader[Any]:
    return DataLoader(Points(n), batch_size=batch_size, shuffle=True)


def test_data() -> DataLoader[Any]:
    return DataLoader(Points(10), batch_size=4)


test_data.__test__ = False


def network(dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Dropout(dropout)
        return nn.Sequential(*first, nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, CLASSES))


def weighted(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    """Cross-entropy with a weight per sample; samples without a label are ignored."""
    losses = cross_entropy(out, target["label"], reduction="none", ignore_index=-100)
    return (losses * target["weight"]).mean()


def hits(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    return (out.argmax(1) == target["label"]).float().mean()


SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)


def fit(model: Any = None, train: Any = None, test: Any = None, **options: Any) -> tuple[Any, Result]:
    """The model and the result of a short run, inline and in two stages unless it says otherwise."""
    if model is None:
        model = network()
        options = options if "stages" in options or "cuts" in options else {"cuts": [4], **options}  # a measured cut may vary
    options = {"loss": weighted, "method": "fdg", "optimizer": SGD, "epochs": 2, "workers": "inline"} | options
    if options["epochs"] is None:
        del options["epochs"]
    result = delock.fit(model, train_data() if train is None else train, test, **options)
    return model, result


def weights(model: nn.Module | Sequence[nn.Module]) -> list[Tensor]:
    parts = model if isinstance(model, list) else [model]
    return [value for part in parts for value in part.state_dict().values()]


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def broken_loss(out: Tensor, target: Any) -> Tensor:
    """Breaks in a run, not while the layers are measured."""
    if len(out) == 4:
        raise ZeroDivisionError("the culprit's own words")
    return weighted(out, target)
