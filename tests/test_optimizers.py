"""Weights of a stage: any optimizer and schedule, delayed gradients, frozen, tied and derived weights, as plain PyTorch does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.nn.utils import parametrizations, prune
from torch.optim import lr_scheduler

from delock import recipes
from delock.errors import UsageError
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Method
from delock.ops import Backward, Forward, Update

import oracles
import oracles_ticks
from chain import Chain, by_bp, layers, plain, seeded, sgd, stage, vectors
from oracles import MakeOptimizer

pytestmark = pytest.mark.usefixtures("own_random")

# -- mixed -------------------------------------------------------------------------------------------------------------------------


def parametrized(how: str) -> nn.Module:
    linear = nn.Linear(4, 4)
    match how:
        case "weight_norm, old":
            return nn.utils.weight_norm(linear)
        case "weight_norm":
            return parametrizations.weight_norm(linear)
        case "spectral_norm, old":
            return nn.utils.spectral_norm(linear)
        case "orthogonal":
            return parametrizations.orthogonal(linear)
        case "pruned":
            return prune.l1_unstructured(linear, "weight", 0.25)
    raise ValueError(how)


@pytest.mark.usefixtures("own_random")
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("how", ["weight_norm, old", "weight_norm", "spectral_norm, old", "orthogonal", "pruned"])
def test_mixed_refuses_weights_that_are_derived(how: str) -> None:
    made = nn.Sequential(nn.Tanh(), parametrized(how))
    with pytest.raises(UsageError, match=r'at="mixed" cannot be computed for 1: .*use at="stash"'):
        stage(made, mixed=True)
    stage(made)


@pytest.mark.parametrize("how", ["weight_norm", "orthogonal"])
def test_derived_weights_train_with_stash_and_replay(how: str) -> None:
    data = vectors(6, dtype=torch.float64)
    modules = seeded(lambda: [nn.Sequential(parametrized(how), nn.Tanh()).double() for _ in range(3)])
    by_bp(seeded(lambda: [parametrized(how).double() for _ in range(2)]), data)
    Chain(modules, FDG(), data).run().assert_close(delayed(modules, data, [4, 2, 0]))
    Chain(modules, FR(), data).run().assert_close(delayed(modules, data, [2, 1, 0], at="replay"))


def delayed(modules: list[nn.Module], data: Any, delays: list[int], optimizer: MakeOptimizer = sgd, **options: Any) -> oracles.OracleRun:
    return oracles.delayed(modules, data, loss=mse_loss, make_optimizer=optimizer, delays=delays, seed=7, **options)


VARIANTS: dict[str, MakeOptimizer] = {
    "sgd foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.05, foreach=True),
    "sgd fused": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.05, fused=True),
    "nesterov foreach": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, foreach=True),
    "adam foreach": lambda params: torch.optim.Adam(params, lr=0.01, foreach=True),
    "adam fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "the command line's sgd": recipes.SGD(lr=0.05, momentum=0.9, weight_decay=0.05, nesterov=True),
}


@pytest.mark.parametrize("optimizer", VARIANTS.values(), ids=VARIANTS.keys())
def test_mixed_and_stash_do_not_depend_on_how_the_optimizer_writes(optimizer: MakeOptimizer) -> None:
    """Fused optimizers do not count versions, foreach ones write to gradients."""
    modules, data = layers(), vectors(8)
    want = oracles_ticks.mixed_deque(modules, data, loss=mse_loss, make_optimizer=optimizer, delays=[4, 2, 0], backward_first=True, seed=7)
    Chain(modules, FDG(at="mixed", order="backward-first"), data, optimizer=optimizer).run().assert_equals(want)
    exact = [copy.deepcopy(m).double() for m in modules]
    precise = vectors(8, dtype=torch.float64)
    Chain(exact, FDG(), precise, optimizer=optimizer).run().assert_close(delayed(exact, precise, [4, 2, 0], optimizer))


# -- gradients ---------------------------------------------------------------------------------------------------------------------


class Shift(nn.Module):
    """x + a + b: autograd hands out one tensor as the gradient of x, a and b."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a + self.b


@pytest.mark.parametrize("optimizer", [sgd, *VARIANTS.values()], ids=["sgd", *VARIANTS.keys()])
def test_one_gradient_for_two_parameters_and_the_error_below(optimizer: MakeOptimizer) -> None:
    modules = seeded(lambda: [nn.Linear(4, 4), Shift(), nn.Sequential(Shift(), nn.Linear(4, 4))])
    by_bp(modules, vectors(6), optimizer=optimizer)


class ClippedSGD(torch.optim.SGD):
    """Clips in its step, in place, as people do."""

    def step(self, closure: Any = None) -> Any:
        nn.utils.clip_grad_norm_([p for group in self.param_groups for p in group["params"]], 0.1)
        return super().step(closure)


def test_an_optimizer_that_clips_in_place() -> None:
    modules = seeded(lambda: [nn.Linear(4, 4), Shift(), nn.Linear(4, 4)])
    by_bp(modules, vectors(6), optimizer=partial(ClippedSGD, lr=0.1))


@pytest.mark.parametrize("optimizer", [sgd, VARIANTS["sgd fused"], VARIANTS["adam fused"]], ids=["sgd", "sgd fused", "adam fused"])
def test_gradients_lie_in_memory_as_their_weights(optimizer: MakeOptimizer) -> None:
    """On channels_last inputs autograd gives them other strides, which fused optimizers take no notice of."""
    modules = seeded(lambda: [nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 2))])
    g = torch.Generator().manual_seed(0)
    data = [(torch.randn(3, 3, 8, 8, generator=g).to(memory_format=torch.channels_last), torch.randn(3, 2, generator=g)) for _ in range(4)]
    by_bp(modules, data, optimizer=optimizer)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("method", [BP(), FDG(), FDG(at="mixed"), FR()], ids=str)
def test_frozen_weights_stay_and_pass_errors_on(method: Method) -> None:
    modules = [m.double() for m in layers(nn.Linear(4, 4))]
    modules[1].requires_grad_(False)  # a whole stage
    modules[2].bias.requires_grad_(False)
    data = vectors(6, dtype=torch.float64)
    chain = Chain(modules, method, data).run()
    frozen = {n: p for m in modules for n, p in m.named_parameters() if not p.requires_grad}
    assert torch.equal(chain.state(1)["1.weight"], frozen["1.weight"])
    assert not torch.equal(chain.state(0)["weight"], modules[0].weight)
    assert chain.stages[1].optimizer is None
    assert (chain.stages[1].lr, chain.stages[1].version) == (0.0, 6)
    if isinstance(method, BP):
        chain.assert_equals(plain(modules, data))
    else:
        at, delays = ("replay", [3, 2, 1, 0]) if isinstance(method, FR) else (method.at, [6, 4, 2, 0])
        chain.assert_close(delayed(modules, data, delays, at=at))


class Idle(nn.Module):
    """Holds a layer that its output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.idle(x)
        out: Tensor = self.used(x)
        return out


@pytest.mark.parametrize("method", [FDG(), FR(), GPipe(2)], ids=str)
def test_parameters_without_gradient_are_left_alone(method: Method) -> None:
    """No weight decay either, as in plain PyTorch."""
    modules = seeded(lambda: [Idle(), Idle()])
    chain = Chain(modules, method, vectors(4)).run()
    for k in (0, 1):
        assert torch.equal(chain.state(k)["idle.weight"], modules[k].idle.weight)
        assert not torch.equal(chain.state(k)["used.weight"], modules[k].used.weight)
    by_bp(modules, vectors(4))


@pytest.mark.parametrize("method", [BP(), FDG(), DDG(), FR(), FDG(at="mixed"), ADL(2)], ids=str)
def test_stages_without_parameters(method: Method) -> None:
    modules = [nn.Tanh(), *layers(), nn.Sequential(nn.Tanh(), nn.Flatten())]
    chain = Chain(modules, method, vectors(6), schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1)).run()
    assert chain.stages[0].optimizer is None
    assert [s.version for s in chain.stages] == [3 if isinstance(method, ADL) else 6] * 5
    if isinstance(method, BP):
        chain.assert_equals(plain(modules, vectors(6), schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1)))


class Tied(nn.Module):
    """Encodes and decodes with one weight under two names, and uses one layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.twice = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.down.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.tanh(self.twice(torch.tanh(self.twice(self.up(x))))))
        return out


@pytest.mark.parametrize("method", [FDG(), FDG(at="mixed"), FR()], ids=str)
def test_weights_tied_within_a_stage_stay_tied(method: Method) -> None:
    modules = seeded(lambda: [Tied().double(), Tied().double(), nn.Linear(4, 4).double()])
    data = vectors(7, dtype=torch.float64)
    chain = Chain(modules, method, data).run()
    at, delays = ("replay", [2, 1, 0]) if isinstance(method, FR) else (method.at, [4, 2, 0])
    chain.assert_close(delayed(modules, data, delays, at=at))
    module = chain.stages[0].module
    assert module.up.weight is module.down.weight
    by_bp(modules, data)


# -- optimizers and schedules ------------------------------------------------------------------------------------------------------

OPTIMIZERS: dict[str, MakeOptimizer] = {
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.9, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.1),
    "adadelta": partial(torch.optim.Adadelta),
    "nadam": partial(torch.optim.NAdam),
    "radam": partial(torch.optim.RAdam),
    "rprop": partial(torch.optim.Rprop, foreach=True),
    "adamax": partial(torch.optim.Adamax),
    "asgd": partial(torch.optim.ASGD),
}
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "step": partial(lr_scheduler.StepLR, step_size=2, gamma=0.5),
    "one cycle": partial(lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=8),
    "cosine": partial(lr_scheduler.CosineAnnealingLR, T_max=8),
    "linear": partial(lr_scheduler.LinearLR, start_factor=0.1, total_iters=4),
    "cyclic": partial(lr_scheduler.CyclicLR, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "lambda": partial(lr_scheduler.LambdaLR, lr_lambda=lambda n: 1 / (n + 1)),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[3]
    ),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_any_optimizer(optimizer: MakeOptimizer) -> None:
    by_bp(layers(), vectors(6), optimizer=optimizer)


@pytest.mark.filterwarnings("ignore:.*epoch parameter:UserWarning")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_any_schedule_is_stepped_once_per_update(schedule: Callable[[Any], Any]) -> None:
    """All stages have the rate of update n in update n, also where the stages' updates lie ticks apart."""
    by_bp(layers(), vectors(8), schedule=schedule)
    wanted = []
    optimizer = sgd([nn.Parameter(torch.zeros(1))])
    rates = schedule(optimizer)
    for _ in range(7):
        wanted.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        rates.step()
    for method in (FDG(), ADL(2), GPipe(3)):
        chain = Chain(layers(), method, vectors(7 * method.batches_per_update), schedule=schedule)
        found: list[list[float]] = [[], [], []]
        was = [s.lr for s in chain.stages]
        for k, step in chain.steps():
            if isinstance(step.op, Update):
                found[k].append(was[k])
            was[k] = chain.stages[k].lr
        assert found == [wanted] * 3


@pytest.mark.usefixtures("own_random")
def test_what_cannot_be_stepped_by_a_stage_alone_is_refused() -> None:
    with pytest.raises(UsageError, match=r"LBFGS .* use another optimizer"):
        stage(nn.Linear(4, 4), optimizer=torch.optim.LBFGS)


@pytest.mark.parametrize("method", [FDG(), FDG(order="backward-first"), ADL(2), DDG(), FR(), DSP(p=2, q=3)], ids=str)
def test_no_step_of_the_optimizer_before_the_first_error(method: Method) -> None:
    """No weight decay, no momentum, no schedule: a stage's weights are the initial ones until its first Update."""
    chain = Chain(layers(), method, vectors(16), schedule=lambda optimizer: lr_scheduler.StepLR(optimizer, 1, 0.5))
    initial = [{name: p.clone() for name, p in s.module.named_parameters()} for s in chain.stages]
    heard, forwards = [False] * 3, [0] * 3
    for k, step in chain.steps():
        s = chain.stages[k]
        forwards[k] += isinstance(step.op, Forward) and not heard[k]
        if isinstance(step.op, Update):
            assert heard[k]
        heard[k] |= isinstance(step.op, Backward)
        if s.version == 0:
            assert all(torch.equal(p, initial[k][name]) for name, p in s.module.named_parameters())
            assert not s.optimizer.state
            assert s.lr == 0.05
    early = [int(k < 2 and getattr(method, "order", "") == "backward-first") for k in range(3)]
    assert forwards == [method.delay(k, 3) + 1 - early[k] for k in range(3)]
    assert all(s.version for s in chain.stages)
