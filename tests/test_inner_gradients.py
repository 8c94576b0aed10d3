"""A gradient that a model takes in its forward, as of an energy: it is refused where it cannot be traced, and works in a submodule."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.errors import UsageError

from harness import trained_plainly

pytestmark = pytest.mark.usefixtures("own_random")


class Potential(nn.Module):
    """Returns energies and forces."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.low, self.high, self.enabled = nn.Linear(6, 8), nn.Linear(8, 8), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad() if self.enabled else contextlib.nullcontext():
            x = x.detach().requires_grad_()
            energy = self.high(self.low(x).tanh())
            (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, forces], 1)


class Whole(Potential):
    """Takes the gradient in its own forward."""


class Parted(nn.Module):
    """Takes it in a submodule."""

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.potential, self.middle, self.out = Potential(enabled), nn.Linear(14, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.potential(x)).relu())


class Calling(Parted):
    """Goes back in its own forward, by another name."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            self.middle(self.potential(x)).sum().backward()
        return super().forward(x)


def batches() -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(n, 6), torch.randint(3, (n,))) for n in (8, 8, 5)]


def fit(model: nn.Module, test: Any = None, **options: Any) -> Any:
    given = {"stages": 2, "workers": "inline", "method": "bp", "epochs": 1, **options}
    return delock.fit(model, batches(), test, loss=cross_entropy, optimizer=partial(torch.optim.SGD, lr=0.1), **given)


@pytest.mark.parametrize("model", [Whole(), Whole(enabled=False), Parted(enabled=False)], ids=["enabled", "plain", "submodule"])
def test_a_gradient_that_cannot_be_traced_is_refused_by_its_line_with_the_remedy(model: nn.Module) -> None:
    says = r"its forward takes a gradient of its own at test_inner_gradients.py:\d+, `\(forces,\) = torch.autograd.grad\(.*enable_grad\(\)"
    with pytest.raises(UsageError, match=says) as error:
        fit(model)
    assert "nn.Sequential of its parts" not in str(error.value)


def test_a_backward_in_forward_is_refused_too() -> None:
    with pytest.raises(UsageError, match=r"its forward takes a gradient of its own at .*\.sum\(\)\.backward\(\)"):
        fit(Calling())


def test_a_model_that_fails_with_gradients_too_is_told_of_as_it_is() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.autograd.grad(x.sum(), x)[0]

    with pytest.raises(UsageError, match=r"fails on its first batch: RuntimeError.*does not require grad"):
        fit(Failing())


@pytest.mark.parametrize("options", [{}, {"workers": "processes"}, {"stages": 1}], ids=["two", "processes", "one"])
def test_a_submodule_that_takes_a_gradient_stays_whole_and_is_that_of_a_plain_loop(options: Any) -> None:
    model = Parted()
    plain = copy.deepcopy(model)
    result = fit(model, batches()[:1], **options)
    assert result.losses == trained_plainly(plain, batches(), cross_entropy)
    assert all(map(torch.equal, model.state_dict().values(), plain.state_dict().values()))


def test_it_is_computed_again_where_a_method_does_so() -> None:
    found = fit(Parted(), method="fr").losses
    assert len(found) == 3


def test_a_weight_in_a_list_is_still_refused() -> None:
    weight = [torch.ones(8, requires_grad=True)]

    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * weight[0]

    with pytest.raises(UsageError, match="none of its parameters"):
        fit(nn.Sequential(nn.Linear(6, 8), Scaling(), nn.Linear(8, 3)))
