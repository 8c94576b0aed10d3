"""Faults that would give a wrong result without a word: each is refused before the first update, or made to work."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.errors import StageFailed, UsageError
from delock.records import EvaluationRecord

from points import CLASSES, SGD, broken_loss, fit, network, test_data, train_data, weighted, weights


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


# ---- modes -------------------------------------------------------------------------------------------------------------------------


def fixed_norm(model: nn.Sequential) -> bool:
    """Says whether the statistics of the network's BatchNorm stay as they are in a run that evaluates, too."""
    before, modes = model[1].running_mean.clone(), [one.training for one in model.modules()]
    fit(model, test=test_data(), cuts=[4])
    assert [one.training for one in model.modules()] == modes  # as the caller had them
    return torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_module_in_eval_mode_stays_so_in_a_model_that_trains(workers: str) -> None:
    model, before = network(), network()[1].running_mean
    model[1].eval()
    fit(model, cuts=[4], test=test_data(), workers=workers)
    assert torch.equal(model[1].running_mean, before)
    assert [one.training for one in model] == [i != 1 for i in range(len(model))]


@pytest.mark.usefixtures("own_random")
def test_the_numbers_of_a_fixed_norm_are_those_of_the_plain_loop() -> None:
    ours, plain, data = network(0.0), network(0.0), list(train_data())
    ours[1].eval()
    plain[1].eval()
    fit(ours, data, cuts=[4], method="bp", epochs=1)
    optimizer = SGD(plain.parameters())
    for x, y in data:
        optimizer.zero_grad()
        weighted(plain(x), y).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(ours), weights(plain), strict=True))


@pytest.mark.usefixtures("own_random")
def test_a_model_that_is_all_in_eval_mode_is_trained_whole() -> None:
    assert not fixed_norm(network().eval())
    assert not fixed_norm(nn.Sequential(*network().eval()))  # a new Sequential is in training mode, its parts are not
    grown = network().eval()
    grown[6] = nn.Linear(8, CLASSES)
    assert not fixed_norm(grown)


def test_a_list_of_modules_has_the_modes_of_its_modules() -> None:
    first, second = network()[:4].eval(), network()[4:]
    before = first[1].running_mean.clone()
    fit([first, second])
    assert torch.equal(first[1].running_mean, before)


def test_a_fixed_norm_takes_a_single_sample() -> None:
    model, data = network(), train_data(1)
    model[1].eval()
    fit(model, data, cuts=[4], batches=2, epochs=None)


# ---- runs that fail ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_run_that_fails_leaves_the_model_as_it_was(workers: str) -> None:
    model = network()
    before, modes = [value.clone() for value in weights(model)], [one.training for one in model.eval().modules()]
    with pytest.raises(StageFailed, match="the culprit's own words"):
        fit(model, cuts=[4], loss=broken_loss, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert [one.training for one in model.modules()] == modes


@pytest.mark.usefixtures("own_random")
def test_a_run_that_fails_leaves_the_heads_as_they_were() -> None:
    head = nn.Linear(8, CLASSES)
    before = head.weight.detach().clone()
    with pytest.raises(StageFailed, match="the culprit's own words"):
        fit(network(), cuts=[4], loss=broken_loss, method="dgl", heads=[head])
    assert torch.equal(head.weight, before)
    fit(network(), cuts=[4], method="dgl", heads=[head])
    assert not torch.equal(head.weight, before)


def test_a_run_that_is_interrupted_leaves_the_model_as_it_was() -> None:
    def interrupted(event: object) -> None:
        if isinstance(event, EvaluationRecord):
            raise KeyboardInterrupt

    model, before = network(), weights(network())
    with pytest.raises(KeyboardInterrupt):
        fit(model, cuts=[4], on_event=interrupted)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


class Counting(nn.Module):
    """Has a buffer in no state dict, and one that is there only after the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.first = x.detach().mean(0) if self.first is None else self.first
        return x


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_every_buffer_comes_back_to_the_model(workers: str) -> None:
    model = nn.Sequential(Counting(), nn.Linear(6, 8), nn.Linear(8, CLASSES))
    fit(model, cuts=[1], epochs=1, workers=workers)
    assert model[0].seen == 22
    assert model[0].first.shape == (6,)
