"""A small network, batches for it, and sessions of both, for the tests of loops of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.run.session import Session

from chain import seeded

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
EACH = pytest.mark.parametrize("workers", ["inline", "processes"])


def network() -> nn.Sequential:
    """Five layers, with dropout and batch norm."""
    return seeded(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)))


def batches(n: int = 9) -> list[tuple[Tensor, Tensor]]:
    """Batches of seven samples, and at last of six."""
    g = torch.Generator().manual_seed(1)
    sizes = [*[7] * (n - 1), 6]
    return [(torch.randn(size, 8, generator=g), torch.randint(0, 3, (size,), generator=g)) for size in sizes]


def accuracy(out: Tensor, y: Tensor) -> Tensor:
    return (out.argmax(1) == y).float().mean()


def session(model: nn.Module, **options: Any) -> Session:
    given = {"loss": cross_entropy, "optimizer": SGD, "stages": 3, "workers": "inline", "cuts": None} | options
    return delock.session(model, batches()[0], **given)


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
