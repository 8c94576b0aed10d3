"""Runs in one process that cannot go on: a loss that is no number, an op that raises, a user's own error."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.engine.engine import run_here
from delock.errors import NonFinite, StageFailed, UsageError
from delock.methods import ADL, BP, DDG, FDG, FR, GPipe, Method

from chain import Chain, seeded, vectors

pytestmark = pytest.mark.usefixtures("own_random")


def spoilt(at: int, value: float, n: int = 6) -> list[tuple[Tensor, Tensor]]:
    data = vectors(n, rows=4)
    data[at][1].fill_(value)
    return data


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("method", "which", "updates"),
    [
        (FDG(), "batch 3", "3 updates"),
        (BP(), "batch 3", "3 updates"),
        (ADL(3), "batch 3", "1 update"),
        (GPipe(2), r"batch 3 \(micro-batch 6\)", "3 updates"),
    ],
    ids=str,
)
def test_a_loss_that_is_no_number_names_batch_and_stage(method: Method, which: str, updates: str, value: float) -> None:
    chain = Chain(seeded(lambda: [nn.Linear(4, 4) for _ in range(3)]), method, spoilt(3, value))
    with pytest.raises(NonFinite, match=rf"the loss of {which} became {value} at stage 2, after {updates}$") as caught:
        run_here(chain.plan(), chain.engines)
    assert isinstance(caught.value, UsageError)
    assert (caught.value.batch, caught.value.part, f"{caught.value.updates} ") == (3, 0, updates[:2])
    assert len(chain.losses) == 3 * method.micro_batches
    assert all(torch.isfinite(p).all() for s in chain.stages for p in s.module.parameters()), "the weights were spoilt"


class Raises(nn.Module):
    """Raises in its n-th call, or in the backward of it."""

    def __init__(self, where: str, n: int) -> None:
        super().__init__()
        self.where, self.n, self.calls, self.w = where, n, 0, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.n:
            if self.where == "forward":
                raise KeyError("the culprit's own words")
            y: Tensor = _Bad.apply(x * self.w)
            return y
        return x * self.w


class _Bad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise KeyError("the culprit's own words")


def bad_loss(out: Tensor, y: Tensor) -> Tensor:
    if float(y.max()) == 7:
        raise KeyError("the culprit's own words")
    return out.mean()


class BadSGD(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        raise KeyError("the culprit's own words")


def bad_data(at: int) -> list[tuple[Tensor, Tensor]]:
    data = vectors(6)
    data[at] = (data[at][0], torch.full((3, 4), 7.0))
    return data


def failing(what: str) -> tuple[Chain, str, str]:
    """A run that fails, the beginning of its error, and a function that its traceback shows."""
    linear = seeded(lambda: [nn.Linear(4, 4) for _ in range(3)])
    match what:
        case "forward":
            linear[1] = Raises("forward", 3)
            return Chain(linear, FDG(), vectors(6)), "stage 1 failed in F2 (forward of batch 2, tick 3)", "in forward"
        case "replay":
            linear[0] = Raises("forward", 5)  # two forwards, and the graph of batch 0 was kept: the fifth call is batch 1's second
            return Chain(linear, FR(), vectors(6)), "stage 0 failed in B1 (backward of batch 1, tick 3)", "in prepare"
        case "backward":
            linear[1] = Raises("backward", 3)
            return Chain(linear, DDG(), vectors(6)), "stage 1 failed in B2 (backward of batch 2, tick 3)", "in backward"
        case "loss":
            return Chain(linear, FDG(), bad_data(4), loss=bad_loss), "stage 2 failed in B4 (backward of batch 4, tick 6)", "in bad_loss"
        case "optimizer":
            chain = Chain(linear, BP(), vectors(6), optimizer=lambda params: BadSGD(params, lr=0.1))
            return chain, "stage 2 failed in U (update, tick 0)", "in step"
        case "evaluation":
            linear[1] = Raises("forward", 4)
            chain = Chain(linear, BP(), vectors(6), test=vectors(2), every=3)
            return chain, "stage 1 failed in E0 (evaluation, batch 0, tick 3)", "in forward"
        case "micro-batch":
            linear[1] = Raises("forward", 4)
            return Chain(linear, GPipe(2), vectors(6)), "stage 1 failed in F3 (forward of micro-batch 3, batch 1, tick 1)", "in forward"
    raise ValueError(what)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("what", ["forward", "replay", "backward", "loss", "optimizer", "evaluation", "micro-batch"])
def test_a_stage_that_raises_is_told_with_op_batch_and_traceback(what: str) -> None:
    chain, begins, shows = failing(what)
    with pytest.raises(StageFailed) as caught:
        run_here(chain.plan(), chain.engines)
    message = str(caught.value)
    assert message.startswith(f'{begins}: KeyError: "the culprit\'s own words"\n')
    assert "Traceback (most recent call last)" in message
    assert shows in message
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.usefixtures("own_random")
def test_a_usage_error_in_a_stage_goes_through_as_it_is() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        raise UsageError("the labels are in feet")

    chain = Chain(seeded(lambda: [nn.Linear(4, 4) for _ in range(2)]), BP(), vectors(2), loss=loss)
    with pytest.raises(UsageError, match=r"^the labels are in feet$"):
        run_here(chain.plan(), chain.engines)
