"""In the proof of a large model, what a backward needs lies on disk; the numbers are the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import ENOSPC
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.partition.graph import examples
from delock.partition.graph import offloaded as offloading
from delock.partition.graph.examples import Examples
from delock.partition.graph.offloaded import LEAST, bears_hooks, offloaded
from delock.partition.graph.split import split

pytestmark = pytest.mark.usefixtures("own_random")
ROWS = LEAST // 64


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Conv2d(8, 4, 1), nn.Tanh())


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()]))


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list to which every write adds its bytes."""
    sizes, plain = list[int](), os.pwritev

    def noted(place: int, blocks: Any, at: int) -> int:
        sizes.append(plain(place, blocks, at))
        return sizes[-1]

    monkeypatch.setattr(os, "pwritev", noted)
    return sizes


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_same_from_disk(layout: torch.memory_format, written: list[int]) -> None:
    model = network().to(memory_format=layout)
    x = torch.randn(16, 4, 32, 32).to(memory_format=layout).requires_grad_()
    plain = gradients(model, x)
    with offloaded(model):
        kept = gradients(model, x)
    assert all(map(torch.equal, plain, kept))
    assert len(written) >= 4


def test_weights_and_views_stay_in_memory(written: list[int]) -> None:
    wide = nn.Linear(256, 256)
    x = torch.randn(2 * ROWS, 256, requires_grad=True)
    with offloaded(wide):
        one, other = torch.sigmoid(wide(x[::2])).chunk(2, 1)
        torch.autograd.grad((one * other).sum(), [x, wide.weight])
    assert written == [ROWS * 256 * 4], "of the sigmoid; x[::2] and the halves have the memory of others, and the weight is the model's"


@pytest.mark.parametrize("fails", ["raises", "writes less"])
def test_what_the_disk_does_not_take_stays_in_memory(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: int, blocks: Any, at: int) -> int:
        if fails == "raises":
            raise OSError(ENOSPC, "no space left")
        return 10

    monkeypatch.setattr(os, "pwritev", full)
    model, x = network(), torch.randn(16, 4, 32, 32, requires_grad=True)
    plain = gradients(model, x)
    with offloaded(model):
        assert all(map(torch.equal, plain, gradients(model, x)))


def test_without_a_folder_for_a_file_all_stays_in_memory(monkeypatch: pytest.MonkeyPatch, written: list[int]) -> None:
    def refuses(**options: Any) -> Any:
        raise FileNotFoundError("no usable temporary directory found")

    monkeypatch.setattr(offloading, "TemporaryFile", refuses)
    model, x = network(), torch.randn(16, 4, 32, 32, requires_grad=True)
    with offloaded(model):
        gradients(model, x)
    assert not written


class Slope(nn.Module):
    """Computes by torch.func.grad, which bears no hooks, in a part that stays whole."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = torch.func.grad(lambda y: y.sin().sum())(x)
        return made * self.weight


class Forbidding(Slope):
    """Forbids hooks in words of its own."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            return x * self.weight


@pytest.mark.parametrize(("part", "bears"), [(Slope, False), (Forbidding, False), (nn.Tanh, True)])
def test_a_large_model_that_bears_no_hooks_is_proved_in_memory(
    part: Callable[[], nn.Module], bears: bool, monkeypatch: pytest.MonkeyPatch, written: list[int]
) -> None:
    monkeypatch.setattr(examples, "LARGE", 0)
    monkeypatch.setattr(examples, "FEW", ROWS)
    model, x = nn.Sequential(nn.Linear(64, 4), part(), nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)), torch.randn(ROWS, 64)
    assert bears_hooks(lambda: model(x)) is bears
    assert len(split(model, Call(), Examples.by_rows([x], ROWS, model), 2).pieces) >= 2
    assert bool(written) is bears
