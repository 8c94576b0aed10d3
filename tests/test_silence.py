"""Faults that would give a wrong result without a word: each is refused before the first update, or made to work."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.errors import UsageError

from points import CLASSES, SGD, fit, network, weighted, weights


def unchanged(says: str, model: Any = None, **options: Any) -> None:
    """Expects a refusal, and a model that is as it was."""
    model = model or network()
    before = [value.clone() for value in weights(model)]
    with pytest.raises(UsageError, match=says):
        fit(model, stages=2, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


# ---- what would not learn ----------------------------------------------------------------------------------------------------------


def no_optimizer(named: Any) -> Any:
    """Forgets to return what it makes."""
    SGD(named)


OTHER = nn.Parameter(torch.ones(3))

FACTORIES = {
    "none": (no_optimizer, "optimizer factory returned None for the parameters 0.weight"),
    "a schedule": (lambda named: torch.optim.lr_scheduler.StepLR(SGD(named), 1), "returned a StepLR"),
    "weights": (lambda named: named, "returned a list"),
    "foreign": (lambda named: SGD([OTHER]), r"holds a parameter of shape \(3,\) that is not among them"),
    "foreign too": (lambda named: SGD([*(w for _, w in named), OTHER]), r"holds a parameter of shape \(3,\)"),
    "nothing": (lambda named: SGD([{"params": []}]), "holds none of them"),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_an_optimizer_that_would_not_train_its_stage(case: str) -> None:
    factory, says = FACTORIES[case]
    unchanged(says, optimizer=factory)


def test_an_optimizer_that_would_not_train_its_stage_in_processes() -> None:
    unchanged("optimizer factory returned None", optimizer=no_optimizer, workers="processes")


def test_a_factory_that_takes_its_parameters_from_the_whole_model() -> None:
    model = network()
    unchanged("let the factory take its parameters from its argument alone", model, optimizer=lambda named: SGD(model.parameters()))


def test_a_schedule_that_is_none() -> None:
    unchanged("the schedule factory returned None", schedule=lambda optimizer: None)


def test_a_network_in_which_nothing_learns() -> None:
    unchanged("has no parameter that learns", network().requires_grad_(False))
    unchanged("has no parameter that learns", nn.Sequential(nn.Flatten(), nn.Tanh()))


@pytest.mark.parametrize("layers", [slice(4), slice(4, None)])
def test_one_stage_may_be_frozen(layers: slice) -> None:
    model = network()
    model[layers].requires_grad_(False)
    before = [value.clone() for value in model.parameters()]
    fit(model, cuts=[4])
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert changed == [value.requires_grad for value in model.parameters()]


class Scaled(nn.Module):
    """A loss with a temperature that is to be learned."""

    def __init__(self, learns: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES), requires_grad=learns)

    def forward(self, out: Tensor, target: Any) -> Tensor:
        return weighted(out * self.scale, target)


def penalized(model: nn.Module, out: Tensor, target: Any) -> Tensor:
    return weighted(out, target) + sum(w.square().sum() for w in model.parameters())


def test_a_loss_that_has_parameters_of_its_own() -> None:
    says = r"the loss computes with a parameter of its own, of shape \(3,\).*last layer of the model"
    unchanged(says, loss=Scaled())
    scaled = Scaled()
    unchanged(says, loss=lambda out, target: scaled(out, target))
    model = network()
    unchanged("a parameter of its own", model, loss=partial(penalized, model))
    fit(loss=Scaled(learns=False))
