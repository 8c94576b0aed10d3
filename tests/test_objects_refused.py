"""Optimizers and schedules that are given as objects, and of which stages cannot have one each: the error says why, and the remedy."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler as rates

import delock
from delock.optim import SCSGD, ErrorFeedback, SCAdamW, Several
from delock.recipes import muon

pytestmark = pytest.mark.usefixtures("own_random")


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3))


class Wide(optim.SGD):
    """Keeps beside its options what its class does not take as one."""

    def __init__(self, params: Any, lr: float = 0.1, width: int = 1) -> None:
        super().__init__(params, lr=lr)
        self.width = width


class Doubled(optim.SGD):
    """Tells another option than it was given."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, lr=2 * lr)


class Weights(optim.SGD):
    """Takes the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)


def sgd(model: nn.Module, **options: Any) -> optim.Optimizer:
    return optim.SGD(model.parameters(), **{"lr": 0.1, **options})


def stepped(model: nn.Module, made: optim.Optimizer) -> optim.Optimizer:
    model(torch.ones(1, 6)).sum().backward()
    made.step()
    return made


def hooked(model: nn.Module) -> optim.Optimizer:
    made = sgd(model)
    made.register_step_post_hook(print)
    return made


def frozen(model: nn.Module) -> optim.Optimizer:
    return optim.SGD(model[0].requires_grad_(False).parameters(), lr=0.1)  # type: ignore[index]


EVERY = "give a factory, which every stage calls with its own parameters, as"
FACTORY = f"{EVERY} functools.partial"
OPTIMIZERS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "of another model": (lambda model: sgd(network()), rf"holds a parameter of shape \(4, 6\) that is none of the model's.*{FACTORY}"),
    "stepped": (lambda model: stepped(model, sgd(model, momentum=0.9)), rf"the SGD has taken steps.*{FACTORY}"),
    "stepped Adagrad": (lambda model: stepped(model, optim.Adagrad(model.parameters())), "the Adagrad has taken steps"),
    "of what is frozen": (frozen, "holds no parameter that learns"),
    "LBFGS": (lambda model: optim.LBFGS(model.parameters()), "LBFGS computes the loss several times"),
    "with an attribute": (lambda model: Wide(model.parameters(), width=2), f"differs in width, so stages cannot have one each: {FACTORY}"),
    "with other options": (lambda model: Doubled(model.parameters()), f"differs in its options.*{FACTORY}"),
    "made otherwise": (Weights, rf"another Weights cannot be made of the options that it tells \(lr, .*{FACTORY}"),
    "around another": (
        lambda model: ErrorFeedback(sgd(model), tau=1),
        rf"another ErrorFeedback cannot be made for every stage, as it is around other.*{EVERY} delock.recipes.error_feedback\(base\)",
    ),
    "several": (lambda model: Several([sgd(model)]), rf"another Several cannot be made.*{EVERY} delock.recipes.muon\(\), or a function of"),
    "muon": (lambda model: muon()(list(model.named_parameters())), rf"{EVERY} delock.recipes.muon\(\)"),
    "stepped SCAdamW": (lambda model: stepped(model, SCAdamW(model.parameters(), tau=1)), rf"{EVERY} delock.recipes.scadamw\(\)"),
    "stepped SCSGD": (lambda model: stepped(model, SCSGD(model.parameters(), 0.1, tau=1)), rf"{EVERY} delock.recipes.scsgd\(lr=0.1\)"),
    "with a hook": (hooked, f"differs in _optimizer_step_post_hooks.*{FACTORY}"),
    "no optimizer": (lambda model: 0.1, "optimizer is 0.1, but it must be a torch.optim.Optimizer of the model's parameters"),
}


@pytest.mark.parametrize(("make", "says"), OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_an_optimizer_that_stages_cannot_have(make: Callable[[nn.Module], Any], says: str) -> None:
    model = network()
    with pytest.raises(delock.UsageError, match=says):
        fit(model, make(model))


def fit(model: nn.Module, optimizer: Any, schedule: Any = None, **options: Any) -> None:
    data = [(torch.ones(2, 6), torch.zeros(2).long())]
    options = {"loss": cross_entropy, "workers": "inline"} | options
    delock.fit(model, data, optimizer=optimizer, schedule=schedule, epochs=1, **options)


def begun(schedule: Any) -> Any:
    schedule.optimizer.step()
    schedule.step()
    return schedule


def measured(schedule: Any) -> Any:
    schedule.step(0.5)
    return schedule


def warmed(o: optim.Optimizer) -> Any:
    return rates.SequentialLR(o, [rates.LinearLR(o), rates.ExponentialLR(o, 0.9)], [1])


BEGUN = r"has taken steps, and a run begins with the first.*give a factory, which every stage calls with its own optimizer"
SCHEDULES: dict[str, tuple[Callable[[optim.Optimizer], Any], str]] = {
    "of another": (lambda o: rates.StepLR(sgd(network()), 2), r"the StepLR belongs to another optimizer.*functools.partial\(StepLR, ...\)"),
    "begun": (lambda o: begun(rates.StepLR(o, 2)), BEGUN),
    "a begun sequence": (lambda o: begun(warmed(o)), BEGUN),
    "a begun chain": (lambda o: begun(rates.ChainedScheduler([rates.ExponentialLR(o, 0.9)])), BEGUN),
    "begun by a measure": (lambda o: measured(rates.ReduceLROnPlateau(o)), BEGUN),
    "none": (lambda o: 3, "schedule is 3, but it must be one of torch.optim.lr_scheduler"),
}


@pytest.mark.parametrize(("make", "says"), SCHEDULES.values(), ids=list(SCHEDULES))
def test_a_schedule_that_stages_cannot_have(make: Callable[[optim.Optimizer], Any], says: str) -> None:
    model = network()
    given = sgd(model)
    with pytest.raises(delock.UsageError, match=says):
        fit(model, given, make(given))


def test_a_schedule_of_an_object_beside_a_factory() -> None:
    model = network()
    with pytest.raises(delock.UsageError, match="the StepLR belongs to another optimizer than is given"):
        fit(model, partial(optim.SGD, lr=0.1), rates.StepLR(sgd(model), 2))


class Scaled(nn.Module):
    """A loss that learns."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out * self.temperature, y)


def test_a_loss_that_learns_is_named() -> None:
    model, loss = network(), Scaled()
    with pytest.raises(
        delock.UsageError, match=r"the SGD holds the parameter temperature of the loss.*let a module hold the model and the"
    ):
        fit(model, optim.SGD([*model.parameters(), *loss.parameters()], lr=0.1), loss=loss)


class Locked:
    """A function with what cannot be copied."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __call__(self, n: int) -> float:
        return 1.0


def test_a_schedule_that_cannot_be_copied() -> None:
    model = network()
    given = sgd(model)
    with pytest.raises(delock.UsageError, match=r"the LambdaLR cannot be copied for every stage: TypeError.*give a factory"):
        fit(model, given, rates.LambdaLR(given, Locked()))


def test_a_lambda_goes_to_a_process() -> None:
    ends = []
    for workers in ("inline", "processes"):
        torch.manual_seed(0)
        model = network()
        given = sgd(model)
        fit(model, given, rates.LambdaLR(given, lambda n: 0.5), workers=workers)
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_class_in_place_of_a_model_is_said_first() -> None:
    with pytest.raises(delock.UsageError, match="a model is a module"):
        fit(nn.Linear, sgd(network()))  # type: ignore[arg-type]
