"""A short walk of some weights under an optimizer. Gradients depend on the weights, so an error at one step is seen at all later ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from delock.optim.stage_facts import StageFacts

SHAPES = {"block0.qkv.weight": (12, 4), "block0.out.weight": (4, 4), "block0.out.bias": (4,), "embed.token.weight": (5, 4)}
DECAYING = ("block0.qkv.weight", "block0.out.weight")

Named = list[tuple[str, nn.Parameter]]


def facts(tau: float) -> StageFacts:
    return StageFacts(0, 4, tau, int(-(-tau // 1)))


def start(dtype: torch.dtype = torch.float64) -> Named:
    """Named weights, always the same."""
    made = np.random.default_rng(0)
    return [(name, nn.Parameter(torch.tensor(made.normal(size=shape), dtype=dtype))) for name, shape in SHAPES.items()]


def gradient(weight: Any, n: int) -> Any:
    """The gradient at update n = 0, 1, ...: noise and half of the weight."""
    return np.random.default_rng(n + 1).normal(size=weight.shape) + 0.5 * weight


def advance(optimizer: Optimizer, named: Named, updates: Sequence[int], schedule: Any = None) -> None:
    for n in updates:
        for _, w in named:
            w.grad = torch.from_numpy(gradient(w.detach().double().numpy(), n)).to(w.dtype)
        optimizer.step()
        if schedule:
            schedule.step()


def walk(
    factory: Callable[[Named], Optimizer], updates: int = 20, dtype: torch.dtype = torch.float64, schedule: Any = None
) -> list[Tensor]:
    """The weights after some updates."""
    named = start(dtype)
    optimizer = factory(named)
    advance(optimizer, named, range(updates), schedule(optimizer) if schedule else None)
    return [w.detach() for _, w in named]


def by_hand(update: Callable[[str, Any, Any, dict[str, Any], int], Any], updates: int = 20) -> list[Any]:
    """The same walk in numpy: `update` of (name, weight, gradient, the weight's own memory, n) returns the new weight."""
    weights = {name: w.detach().numpy().copy() for name, w in start()}
    memory: dict[str, dict[str, Any]] = {name: {} for name in weights}
    for n in range(updates):
        for name, w in weights.items():
            weights[name] = update(name, w, gradient(w, n), memory[name], n)
    return list(weights.values())


def assert_close(found: list[Tensor], wanted: list[Any]) -> None:
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one.numpy(), other, rtol=0, atol=1e-10)


def assert_equals(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert all(map(torch.equal, found, wanted))


def interrupted(factory: Callable[[Named], Optimizer], at: int = 7, updates: int = 20) -> list[Tensor]:
    """The weights after a walk whose optimizer is saved and loaded into a new one on the way."""
    named = start(torch.float32)
    first = factory(named)
    advance(first, named, range(at))
    second = factory(named)
    second.load_state_dict(first.state_dict())
    advance(second, named, range(at, updates))
    return [w.detach() for _, w in named]
