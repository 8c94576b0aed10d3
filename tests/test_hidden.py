"""Tests of what a model does beside its forward: hooks, attributes, forwards on instances, parametrizations."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import parametrizations

import delock
from delock.errors import UsageError
from delock.partition.layers import is_chain

pytestmark = pytest.mark.usefixtures("own_random")


def chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def hooked(register: str) -> nn.Module:
    model = chain()
    getattr(model[0].weight, register)(lambda g: None)
    return model


def patched() -> nn.Module:
    model = chain()
    before = model[2].forward
    model[2].forward = lambda x: before(x) * 3  # type: ignore[assignment, method-assign]
    return model


class Counts(nn.Module):
    """Keeps a number in Python, which would matter only much later; `at`: where."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.net, self.at, self.n, self.kept = chain(), at, 0, {"n": 0}

    def forward(self, x: Tensor) -> Tensor:
        if self.at == "number":
            self.n += 1
        else:
            self.kept["n"] += 1
        return self.net(x) * (2 if self.n > 100 or self.kept["n"] > 100 else 1)


class Tied(nn.Module):
    """Uses a weight of a module that it keeps in a list, so that it is none of its own."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.others[0].weight


def tied_by_a_list() -> nn.Module:
    first = nn.Linear(6, 8)
    return nn.Sequential(first, nn.ReLU(), Tied(first), nn.Linear(6, 3))


class Flat(nn.Module):
    """Has no modules, so that it can be cut between operations alone."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.ParameterList([torch.randn(6, 6) / 3 for _ in range(3)] + [torch.randn(6, 3)])

    def forward(self, x: Tensor) -> Tensor:
        for w in self.w[:-1]:
            x = (x @ w).tanh()
        return x @ self.w[-1]


class Doubled(nn.Sequential):
    """Has a call that is more than its forward."""

    def __call__(self, *args: Any) -> Any:
        return super().__call__(*args) * 2


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(n, 6, generator=generator), torch.randint(0, 3, (n,), generator=generator)) for n in (4, 4, 3, 2)]


def fit(model: nn.Module, **options: Any) -> Any:
    given = {"stages": 2, "workers": "inline", "method": "bp", "epochs": 1, **options}
    return delock.fit(model, batches(), loss=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), **given)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (partial(hooked, "register_hook"), "0.weight has a hook on its gradient"),
        (partial(hooked, "register_post_accumulate_grad_hook"), "0.weight has a hook on its gradient"),
        (patched, r"2 \(Linear\) has a forward of its own"),
        (lambda: nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 3)), "0.weight has no shape yet"),
        (tied_by_a_list, r"layer 2 \(2, Tied\) uses a weight of shape \(8, 6\) that is none of its parameters"),
        (partial(Counts, "number"), "its forward changes the attribute n,"),
        (partial(Counts, "dict"), "its forward changes the attribute kept,"),
    ],
)
def test_what_would_be_lost_is_refused(model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fit(model())


def doubled(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return out * 2


def with_hook() -> nn.Module:
    model = chain()
    model.register_forward_hook(doubled)
    return model


def parametrized() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(first, nn.ReLU(), parametrizations.orthogonal(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 3)))


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("make", [with_hook, Flat, parametrized, lambda: Doubled(*chain())], ids=["hook", "flat", "parametrized", "call"])
def test_what_a_model_does_beside_its_forward_is_kept(make: Callable[[], nn.Module], workers: str) -> None:
    """It is trained as plain PyTorch trains it, in one process and several."""
    torch.manual_seed(0)
    model = make()
    own = copy.deepcopy(model)
    optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
    for x, y in batches():
        optimizer.zero_grad()
        cross_entropy(own(x), y).backward()
        optimizer.step()
    fit(model, workers=workers)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in own.state_dict().items())


def test_a_sequential_that_does_more_is_no_chain() -> None:
    assert is_chain(chain())
    assert not is_chain(with_hook())
    assert not is_chain(Doubled(*chain()))
