"""The bytes that factories of delock.optim say they take, against steps of what they make."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.memory.optimizer import optimizer_bytes
from delock.optim.stage_facts import for_stage
from delock.partition.live_bytes import LiveBytes
from delock.recipes import SGD, AdamW, NAdamW, error_feedback, muon, scadamw, scsgd, soap

from harness import plainly
from walks import Named, facts

SHAPES = {"a.weight": (64, 64), "a.bias": (64,), "b.weight": (256, 64), "c.weight": (128, 256), "c.bias": (128,), "d.qkv.weight": (96, 32)}
WARM = 5  # steps after which a state grows no more


def named() -> Named:
    with torch.random.fork_rng(devices=[]):
        made = [(name, nn.Parameter(torch.randn(shape))) for name, shape in SHAPES.items()]
        for _, w in made:
            w.grad = torch.randn_like(w)
    return made


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in a state, those in lists included."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from tensors(one)


def held(optimizer: Any, weights: Named) -> tuple[int, int]:
    """Bytes of the state, and peak bytes during a step, above what lives before it."""
    live = LiveBytes()
    live.ignore(tensor for _, w in weights for tensor in (w, w.grad) if tensor is not None)
    with live:
        for _ in range(WARM):
            optimizer.step()
        before = live.from_here()
        optimizer.step()
    return sum(x.nbytes for x in tensors(dict(optimizer.state))), live.peak - before


@pytest.mark.parametrize("tau", [0.0, 0.75, 2.5])
@pytest.mark.parametrize(
    "factory",
    [
        *(NAdamW(0.1), scadamw(), scsgd(0.1), scsgd(0.1, weight_decay=0.1), muon(), soap(precondition_frequency=1)),
        *(error_feedback(base) for base in (SGD(0.1), SGD(0.1, weight_decay=0.1), AdamW(0.1), scadamw(), muon(), torch.optim.RMSprop)),
    ],
    ids=plainly,
)
def test_what_a_factory_says_is_what_steps_hold(factory: Any, tau: float) -> None:
    weights = named()
    state, step = held(for_stage(factory, facts(tau))(weights), weights)
    predicted = optimizer_bytes(factory, weights, "cpu", facts(tau))
    assert predicted is not None
    assert predicted[0] == state
    assert predicted[1] == pytest.approx(step, rel=0.1, abs=0.02 * sum(w.nbytes for _, w in weights))


def test_a_base_that_is_not_known() -> None:
    assert optimizer_bytes(error_feedback(lambda named: torch.optim.SGD(named)), named(), "cpu", facts(1.0)) is None
