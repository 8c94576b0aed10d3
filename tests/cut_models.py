"""Small networks for the tests of cuts: with a skip past everything, marked or not, and one that torch.fx cannot trace."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import delock
from delock.api import fit
from delock.records import Started

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
WIDTH = 16


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(self.a(x).relu())


class Net(nn.Module):
    """Marks places between two lines, where it is asked to: after the stem with a tuple, and in front of block 2. One module is idle."""

    def __init__(self, *, marks: bool = False, decides: bool = False) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH)
        self.blocks = nn.ModuleList([Block(WIDTH) for _ in range(4)])
        self.head, self.idle = nn.Linear(WIDTH, 1), nn.Linear(2, 2)
        self.marks, self.decides = marks, decides
        if marks:
            self.first, self.second = delock.CutPoint(), delock.CutPoint()

    def forward(self, x: Tensor) -> Tensor:
        if self.decides and x.shape[1] < 4:
            raise AssertionError
        h = self.norm(self.stem(x))
        skip = h
        if self.marks:
            h, skip = self.first((h, skip))
        for i, block in enumerate(self.blocks):
            if self.marks and i == 2:
                h = self.second(h)
            h = block(h)
        return self.head(h + skip)


class Twice(nn.Module):
    """Calls one CutPoint in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.mark = nn.ModuleList([Block(8) for _ in range(3)]), delock.CutPoint()

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.mark(block(x))
        return x[:, :1]


class Stateful(nn.Module):
    """Normalizes twice by one norm, whose statistics both calls write; between them lies a module that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.between, self.after = nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.norm(self.between(self.norm(x))))


class Tied(nn.Module):
    """Reads and writes by the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.layers, self.write = nn.Embedding(11, 8), nn.ModuleList([Block(8) for _ in range(3)]), nn.Linear(8, 11, bias=False)
        self.write.weight = self.read.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        for layer in self.layers:
            h = layer(h)
        return self.write(h)


class Settles(nn.Module):
    """Goes through a layer without gradients until it has settled, and once more with them: a region in training, none in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.middle, self.high, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.low(x)
        with torch.no_grad():
            z = torch.zeros_like(h)
            for _ in range(5):
                z = torch.tanh(self.middle(z) + h)
        return self.out(torch.tanh(self.high(torch.tanh(self.middle(z) + h))))


def seeded(make: Any, *args: Any, **options: Any) -> Any:
    """Returns a model with the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **options)


def chain(*marks: int) -> nn.Sequential:
    """Returns a chain of five layers, with a CutPoint in front of some, by number."""
    layers = [nn.Linear(8, WIDTH), Block(WIDTH), Block(WIDTH), Block(WIDTH), nn.Linear(WIDTH, 1)]
    return nn.Sequential(*(part for i, layer in enumerate(layers) for part in ([delock.CutPoint()] * (i in marks) + [layer])))


def batches(sizes: Sequence[int] = (4, 4, 3)) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 8, generator=g), torch.randn(n, 1, generator=g)) for n in sizes]


def started(model: nn.Module | Sequence[nn.Module], **options: Any) -> Started:
    """Trains, and returns what was said before; `data`: else that of `batches`."""
    events: list[Any] = []
    data = options.pop("data", None) or batches()
    fit(
        model,
        data,
        **{"loss": mse_loss, "optimizer": SGD, "method": "bp", "workers": "inline", "batches": len(data), **options},
        callbacks=[events.append],
    )
    found: Started = events[0]
    return found


def plain(model: nn.Module) -> dict[str, Tensor]:
    """Returns what plain PyTorch makes of a model."""
    optimizer = SGD(model.parameters())
    for x, y in batches():
        optimizer.zero_grad()
        mse_loss(model(x), y).backward()
        optimizer.step()
    return model.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
