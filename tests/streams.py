"""Data without a length for tests: it knows how often it was read, and where it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

PER_ITERATION = 3


def made(n: int, iteration: int) -> tuple[Tensor, Tensor]:
    """The n-th batch of an iteration: 4 samples of 6 numbers, and their classes of 3."""
    draw = torch.Generator().manual_seed(100 * iteration + n)
    return torch.randn(4, 6, generator=draw), torch.randint(3, (4,), generator=draw)


class Unsized:
    """Three batches in every iteration, others in each."""

    def __init__(self) -> None:
        self.iteration, self.told = 0, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.iteration = epoch
        self.told.append(epoch)

    def __iter__(self) -> Iterator[Any]:
        return (made(n, self.iteration) for n in range(PER_ITERATION))


class Placed(Unsized):
    """The same, which goes on from a place in an iteration."""

    def __init__(self) -> None:
        super().__init__()
        self.at = self.start = 0
        self.reads = 0

    def __iter__(self) -> Iterator[Any]:
        self.at, self.start = self.start, 0
        while self.at < PER_ITERATION:
            self.at += 1
            self.reads += 1
            yield made(self.at - 1, self.iteration)

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["at"]


class Rows(IterableDataset[Any]):
    """The samples of `Unsized`, one by one, for a DataLoader to batch; dicts of them."""

    def __init__(self) -> None:
        self.iteration = 0

    def set_epoch(self, epoch: int) -> None:
        self.iteration = epoch

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for n in range(PER_ITERATION):
            for x, y in zip(*made(n, self.iteration), strict=True):
                yield {"x": x, "label": y}
