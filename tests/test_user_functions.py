"""Test data, metrics and weights of batches that do not work are told before the start, in the user's words."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.data.iterable import Batches
from delock.errors import UsageError

from harness import trained_plainly

pytestmark = pytest.mark.usefixtures("own_random")
Data = list[tuple[Tensor, Tensor]]


class Own(nn.Module):
    """A model that is traced."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.norm, self.out = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        return self.out(torch.tanh(self.norm(self.low(x))))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def batches(width: int = 6, dtype: torch.dtype = torch.float32, classes: int = 3, seed: int = 3) -> Data:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(4, width, generator=generator).to(dtype), torch.randint(0, classes, (4,), generator=generator)) for _ in range(2)]


def fit(model: nn.Module, train: Any, test: Any = None, **options: Any) -> Any:
    given = {"stages": 2, "workers": "inline", "method": "bp", "epochs": 1, "loss": cross_entropy, **options}
    return delock.fit(model, train, test, optimizer=partial(torch.optim.SGD, lr=0.1), **given)


def refused(says: str, model: nn.Module, train: Any, test: Any, **options: Any) -> None:
    """Expects a refusal before anything has been reported, and a model that is as it was."""
    before, events = {name: one.clone() for name, one in model.state_dict().items()}, list[Any]()
    with pytest.raises(UsageError, match=says):
        fit(model, train, test, callbacks=[events.append], **options)
    assert events == []
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())


@pytest.mark.parametrize("make", [chain, Own])
@pytest.mark.parametrize(
    ("test", "says"),
    [
        (
            batches(7),
            r"the model fails in evaluation on the first batch of the test data, .* \(4, 7\) float32 \(in the training data \(4, 6\)",
        ),
        (
            batches(dtype=torch.float64),
            r"the model fails in evaluation .* \(4, 6\) float64 \(in the training data \(4, 6\) float32\).*dtype",
        ),
        ({"a": batches(), "b": batches(5)}, "on the first batch of the test data 'b', whose inputs"),
        ([(x, y + 3) for x, y in batches()], r"the loss fails on the first batch of the test data.*targets \(4,\) int64 from 3 to"),
    ],
    ids=["width", "dtype", "one of two", "labels out of range"],
)
def test_test_data_that_do_not_fit_are_told_before_the_start(make: Any, test: Any, says: str) -> None:
    refused(says, make(), batches(), test)


def wrong_metric(outputs: Tensor, targets: Tensor) -> Any:
    return outputs["logits"].argmax(1) == targets  # type: ignore[call-overload]


def odd_metric(outputs: Tensor, targets: Tensor) -> Any:
    return outputs


def wrong_weight(targets: Any) -> Any:
    return targets["length"].sum()


class Once:
    """Works for its first calls."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, targets: Tensor) -> int:
        self.left -= 1
        if self.left < 0:
            raise KeyError("length")
        return len(targets)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_metric_that_fails_is_told_before_the_start(workers: str) -> None:
    says = r"the metric 'hits' fails on the first batch of the test data.*outputs \(4, 3\) float32 and targets.*IndexError"
    refused(says, Own(), batches(), batches(), metrics={"hits": wrong_metric}, workers=workers)
    refused("the metric 'hits' returned a Tensor of shape", Own(), batches(), batches(), metrics={"hits": odd_metric}, workers=workers)


def test_a_weight_that_fails_is_told_before_the_start() -> None:
    says = r"the weight of batches fails on the first batch of the training data, whose targets are \(4,\) int64.*: IndexError"
    refused(says, chain(), Batches(batches(), weight=wrong_weight), batches())
    says = "the weight of batches fails on the first batch of the test data"
    refused(says, chain(), batches(), Batches(batches(), weight=wrong_weight))


def test_a_weight_that_fails_later_is_the_users_own_error() -> None:
    with pytest.raises(KeyError) as error:
        fit(chain(), Batches(batches(), weight=Once(1)))
    assert error.value.__notes__ == ["raised within the weight of batches, which Delock called"]


class Counting:
    """A metric that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, outputs: Tensor, targets: Tensor) -> int:
        self.calls += 1
        return self.calls


def test_a_metric_that_keeps_something_does_not_see_the_trial() -> None:
    assert fit(chain(), batches(), batches(), metrics={"calls": Counting()}).evaluations[-1].metrics == {"calls": 1.5}


class Writing(nn.Module):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2)


def test_a_model_that_writes_to_its_input_does_not_write_to_the_data() -> None:
    test = batches(seed=5)
    fit(nn.Sequential(Writing(), chain()), batches(), test)
    assert all(torch.equal(one, other) for (one, _), (other, _) in zip(test, batches(seed=5), strict=True))


def test_evaluations_are_not_changed_by_the_trial() -> None:
    """Statistics, random numbers and data are as without it."""
    model, plain = chain(), chain()
    plain.load_state_dict(model.state_dict())
    result = fit(model, batches(), batches(seed=5), metrics={"mean": lambda out, y: out.mean() + torch.rand(())})
    trained_plainly(plain, batches(), cross_entropy)
    assert all(torch.equal(one, plain.state_dict()[name]) for name, one in model.state_dict().items())
    losses = [float(cross_entropy(plain.eval()(x), y).detach()) for x, y in batches(seed=5)]
    assert result.evaluations[-1].test_loss == pytest.approx(sum(losses) / 2, abs=0)


def test_a_forgotten_loss_is_told_as_such() -> None:
    says = "of the data has targets, but the model's forward does not take them, and fit is given no loss"
    refused(says, Own(), batches(), None, loss=None)
    refused(says, Own(), [{"x": x, "labels": y} for x, y in batches()], None, loss=None)
