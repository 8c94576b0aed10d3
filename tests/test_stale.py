"""Losses and metrics that hold the model, and would read in it what its forward leaves only in the copies that stages train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.errors import UsageError

pytestmark = pytest.mark.usefixtures("own_random")


class Kept:
    """Holds what a forward leaves."""

    aux: Any = 0.0


class Leaves(nn.Module):
    """Leaves something beside its output, in one of several ways; it is new with every batch."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.low, self.norm, self.out, self.how = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3), how
        self.aux: Any = 0.0
        self.all: list[Tensor] = []
        self.kept, self.labels = Kept(), 3

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.low(x)))
        if self.how == "attribute":
            self.aux = h.square().mean()
        if self.how == "list":
            self.all = [h.square().mean()]
        if self.how == "object":
            self.kept.aux = h.square().mean()
        return self.out(h)

    def loss(self, out: Tensor, y: Tensor) -> Tensor:
        """Reads what can be there."""
        return cross_entropy(out, y) + self.aux + sum(self.all) + self.kept.aux

    def plain_loss(self, out: Tensor, y: Tensor) -> Tensor:
        """Reads nothing that changes."""
        return cross_entropy(out[:, : self.labels], y) + 0 * next(self.parameters()).shape[0]


def in_closure(model: Any) -> Callable[..., Tensor]:
    return lambda out, y: cross_entropy(out, y) + model.aux


def in_partial(model: Any) -> Callable[..., Tensor]:
    return partial(lambda held, out, y: cross_entropy(out, y) + held[0].aux, [model])


HELD: Any = None


def by_a_global(out: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(out, y) + HELD.aux


class Penalty(nn.Module):
    def __init__(self, model: Any, reads: Callable[[Any], Any]) -> None:
        super().__init__()
        self.held, self.reads = [model], reads

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out, y) + self.reads(self.held[0])


def batches(n: int = 2) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(4, 6, generator=generator), torch.randint(0, 3, (4,), generator=generator)) for _ in range(n)]


def fit(model: Any, loss: Any, **options: Any) -> Any:
    given = {"stages": 2, "workers": "inline", "method": "bp", "epochs": 1, **options}
    return delock.fit(model, batches(), loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1), **given)


@pytest.mark.parametrize("make", [in_closure, in_partial, lambda m: m.loss, lambda m: Penalty(m, lambda held: held.aux)])
@pytest.mark.parametrize(("how", "says"), [("attribute", "attribute aux,"), ("list", "attribute all,"), ("object", "attribute kept,")])
def test_a_loss_that_holds_a_model_that_leaves_something(make: Callable[[Any], Any], how: str, says: str) -> None:
    model = Leaves(how)
    with pytest.raises(UsageError, match=f"the loss holds the model, and with it its {says}.*return from forward"):
        fit(model, make(model))


def test_a_loss_that_names_the_model_as_a_global(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Leaves("attribute")
    monkeypatch.setattr(f"{__name__}.HELD", model)
    with pytest.raises(UsageError, match="attribute aux, which its forward changes"):
        fit(model, by_a_global)


def test_a_loss_that_holds_a_layer_of_a_chain() -> None:
    inner = Leaves("attribute")
    chains = [nn.Sequential(inner, nn.Linear(3, 3)), [inner, nn.Linear(3, 3)]]
    for model in chains:
        with pytest.raises(UsageError, match=r"attribute 0\.aux, which its forward changes"):
            fit(model, in_closure(inner))


@pytest.mark.parametrize(
    ("reads", "says"),
    [
        (lambda model: model.out.weight.detach().norm(), "parameter out.weight"),
        (lambda model: sum(w.detach().square().sum() for w in model.parameters()), "parameter low.weight"),
        (lambda model: model.norm.running_mean.norm(), "buffer norm.running_mean"),
    ],
)
def test_a_loss_that_reads_old_weights_or_statistics(reads: Callable[[Any], Any], says: str) -> None:
    model = Leaves()
    with pytest.raises(UsageError, match=f"the loss holds the model, and with it its {says}"):
        fit(model, Penalty(model, reads))


def test_a_metric_that_reads_what_a_forward_leaves() -> None:
    model = Leaves("attribute")
    with pytest.raises(UsageError, match="the metric 'aux' holds the model, and with it its attribute aux"):
        fit(model, cross_entropy, test=batches(), metrics={"aux": lambda out, y: float(model.aux)})


def test_what_does_not_change_may_be_read() -> None:
    model = Leaves()
    model.low.requires_grad_(False)
    assert fit(model, model.plain_loss).losses
    assert fit(model, Penalty(model, lambda held: held.low.weight.norm())).losses


def test_what_nobody_reads_may_be_left() -> None:
    assert fit(Leaves("attribute"), cross_entropy).losses
