"""The table of optimizers' bytes against two real steps of every one of torch's optimizers, with each option that changes them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

from delock.memory.optimizer import TABLE, optimizer_bytes
from delock.partition.live_bytes import LiveBytes
from delock.recipes import SGD, Adam, AdamW

OPTIONS: dict[str, Any] = {"weight_decay": 0.1, "momentum": 0.9, "amsgrad": True, "centered": True, "maximize": True}
SHAPES = [(64, 64), (64,), (256, 64), (256,), (128, 256), (128,), (16, 128)]  # a network, its largest weights one after the other


def pairs() -> list[Any]:
    """Every optimizer of the table, plain, with each of its options, with two of them, and so in every implementation that it has."""
    found = []
    for cls in TABLE:
        known = cls.__init__.__code__.co_varnames  # type: ignore[attr-defined]
        own = [{name: value} for name, value in OPTIONS.items() if name in known]
        own += [{"momentum": 0.9, "nesterov": True}] * ("nesterov" in known) + [{"decoupled_weight_decay": True, "weight_decay": 0.1}] * (
            "decoupled_weight_decay" in known
        )
        ways = [{}, *({way: True} for way in ("foreach", "fused") if way in known)]
        found += [partial(cls, **options, **way) for options in [{}, *own] for way in ways]
    return found


def spelled(factory: Any) -> str:
    return f"{factory.func.__name__} {factory.keywords}" if isinstance(factory, partial) else str(factory)


def named(factory: Any) -> list[tuple[str, Tensor]]:
    """Weights with gradients; Muon takes matrices alone."""
    muon = isinstance(factory, partial) and factory.func is optim.Muon
    weights = [(f"{i}.weight", nn.Parameter(torch.randn(shape))) for i, shape in enumerate(SHAPES) if len(shape) > 1 or not muon]
    for _, weight in weights:
        weight.grad = torch.randn_like(weight)
    return weights


def two_steps(factory: Any, weights: list[tuple[str, Tensor]]) -> tuple[int, int]:
    """Bytes of the state's tensors that the first step makes, and peak bytes during the second, above what lives before it."""
    live = LiveBytes()
    live.ignore(tensor for _, weight in weights for tensor in (weight, weight.grad) if tensor is not None)
    one = factory(weights)

    def state() -> int:
        return sum(x.nbytes for values in one.state.values() for x in values.values() if isinstance(x, Tensor))

    built = state()
    with live:
        one.step()
        before = live.from_here()
        one.step()
    return state() - built, live.peak - before


@pytest.mark.parametrize("factory", [*pairs(), SGD(0.1), SGD(0.1, 0.9, 0.1), Adam(0.1), AdamW(0.1, 0.1)], ids=spelled)
def test_the_table_says_what_two_steps_hold(factory: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        weights = named(factory)
    state, step = two_steps(factory, weights)
    predicted = optimizer_bytes(factory, weights, "cpu")
    assert predicted is not None
    total = sum(weight.nbytes for _, weight in weights)
    assert predicted[0] == state
    assert predicted[1] == pytest.approx(step, rel=0.1, abs=0.02 * total)


def test_a_gpu_steps_all_weights_at_once() -> None:
    weights = [("w", torch.empty(10, device="meta"))] * 3
    assert optimizer_bytes(optim.Adam, weights, "cpu") == (3 * 84, 3 * 40)
    assert optimizer_bytes(partial(optim.Adam, foreach=False), weights, "cuda") == (3 * 84, 3 * 40)
    assert optimizer_bytes(partial(optim.RMSprop, weight_decay=0.1), [*weights] * 2, "cuda") == (6 * 44, 2 * 6 * 40)
    assert optimizer_bytes(optim.Adafactor, weights, "cuda:1") == (3 * 44, 2 * 40)  # unless it is asked to


@dataclass
class Unhashable:
    """A factory as anybody may write it."""

    def __call__(self, named: Any) -> optim.Optimizer:
        return optim.SGD(named)


class Sized:
    """A factory that knows its bytes."""

    def __call__(self, named: Any) -> optim.Optimizer:
        raise AssertionError("it is not to be built")

    def bytes(self, named: Any) -> tuple[int, int]:
        """As many of state as there are weights."""
        return len(named), 7


def test_factories_that_know_and_that_do_not() -> None:
    weights = [("w", torch.empty(10, device="meta"))]
    assert optimizer_bytes(Sized(), weights * 3, "cpu") == (3, 7)
    assert optimizer_bytes(Sized(), [], "cpu") == (0, 0)
    for unknown in (lambda named: optim.SGD(named), optim.LBFGS, partial(partial(Sized()), 1), Unhashable(), partial(optim.SGD, [])):
        assert optimizer_bytes(unknown, weights, "cpu") is None
