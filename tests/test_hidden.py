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

from harness import trained_plainly

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


class Centred(nn.Module):
    """Reads the statistics of a norm that it keeps in a list."""

    def __init__(self, norm: nn.BatchNorm1d) -> None:
        super().__init__()
        self.others = [norm]

    def forward(self, x: Tensor) -> Tensor:
        mean = self.others[0].running_mean
        assert mean is not None
        return x - mean


def with_shared_statistics() -> nn.Sequential:
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Linear(6, 8), norm, nn.ReLU(), Centred(norm), nn.Linear(8, 3))


class Whole(nn.Module):
    """The same with a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.norm, self.act, self.centred, self.out = with_shared_statistics()

    def forward(self, x: Tensor) -> Any:
        return self.out(self.centred(self.act(self.norm(self.low(x)))))


def hooked_by_a_closure() -> nn.Module:
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    model[2].register_forward_hook(lambda module, given, out: out - model[1].running_mean)
    return model


SHARED = nn.BatchNorm1d(8)


class ByGlobal(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return x - SHARED.running_mean  # type: ignore[operator]


class Hooked(nn.Module):
    """Has a hook that is a method of its own, which a copy has as well."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.out.register_forward_hook(self.centre)

    def centre(self, module: nn.Module, given: Any, out: Tensor) -> Any:
        return out - self.norm.running_mean  # type: ignore[operator]

    def forward(self, x: Tensor) -> Any:
        return self.out(self.norm(x))


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
        (with_shared_statistics, r"3 \(stage 1\) holds 1.weight \(stage 0\) in a plain attribute"),
        (hooked_by_a_closure, "2 has code, as a hook, that holds 0.weight by a closure"),
        (lambda: nn.Sequential(nn.Linear(6, 8), SHARED, ByGlobal(), nn.Linear(8, 3)), "2 has code, as a hook, that holds 1.weight"),
        (partial(Counts, "number"), "its forward changes the attribute n,"),
        (partial(Counts, "dict"), "its forward changes the attribute kept,"),
    ],
)
def test_what_would_be_lost_is_refused(model: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        fit(model())


def test_a_part_of_a_traced_model_that_keeps_another_stages_tensor_is_refused() -> None:
    with pytest.raises(UsageError, match=r"centred \(stage 1\) holds norm.weight \(stage 0\) in a plain attribute"):
        fit(Whole(), cuts=["centred"], stages=None)
    assert "pieces" in fit(Whole(), cuts=["out"], stages=None).started.traced


def doubled(module: nn.Module, given: Any, out: Tensor) -> Tensor:
    return out * 2


def with_hook() -> nn.Module:
    model = chain()
    model.register_forward_hook(doubled)
    return model


def parametrized() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(6, 8))
    return nn.Sequential(first, nn.ReLU(), parametrizations.orthogonal(nn.Linear(8, 8)), parametrizations.spectral_norm(nn.Linear(8, 3)))


def with_hooked_part() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), Hooked(), nn.Linear(8, 3))


def with_both_in_one_stage() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.Sequential(*with_shared_statistics()[1:4]), nn.Linear(8, 3))


KEPT = (with_hook, with_hooked_part, with_both_in_one_stage, Flat, parametrized, lambda: Doubled(*chain()))


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("make", KEPT, ids=["hook", "own hook", "one stage", "flat", "parametrized", "call"])
def test_what_a_model_does_beside_its_forward_is_kept(make: Callable[[], nn.Module], workers: str) -> None:
    """It is trained as plain PyTorch trains it, in one process and several."""
    torch.manual_seed(0)
    model = make()
    own = copy.deepcopy(model)
    trained_plainly(own, batches(), cross_entropy)
    fit(model, workers=workers)
    assert all(torch.equal(one, model.state_dict()[name]) for name, one in own.state_dict().items())


def test_a_sequential_that_does_more_is_no_chain() -> None:
    assert is_chain(chain())
    assert not is_chain(with_hook())
    assert not is_chain(Doubled(*chain()))
