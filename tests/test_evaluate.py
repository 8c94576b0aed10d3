"""`delock.evaluate` has the bits of the evaluations of `fit`, for every form of model and data, and leaves the model as it was."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.errors import UsageError
from delock.records import Evaluation

from chain import seeded

SGD = partial(torch.optim.SGD, lr=0.1)
pytestmark = pytest.mark.usefixtures("own_random")


def batches(n: int = 3, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Batches of seven samples, and at last of four."""
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(size, 5, generator=draw), torch.randint(3, (size,), generator=draw)) for size in [*[7] * (n - 1), 4]]


def named(pairs: list[tuple[Tensor, Tensor]]) -> list[dict[str, Tensor]]:
    return [{"x": x, "labels": y} for x, y in pairs]


class Own(nn.Module):
    """Computes its own loss, and writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.last(torch.relu(self.norm(self.first(x))))
        return {"loss": cross_entropy(logits, labels), "logits": logits}


def chain() -> nn.Sequential:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))


def accuracy(outputs: Any, targets: Any) -> Tensor:
    return ((outputs["logits"] if isinstance(outputs, dict) else outputs).argmax(1) == targets).double().mean()


def counted(targets: Tensor) -> Tensor:
    return (targets > 0).sum()


CASES: dict[str, Any] = {
    "chain": (chain, batches, cross_entropy),
    "own loss": (Own, lambda *given: named(batches(*given)), None),
    "weights": (chain, lambda *given: delock.data.Batches(batches(*given), weight=counted), cross_entropy),
    "several": (chain, lambda *given: {"a": batches(*given), "b": batches(2, 7)} if given else batches(), cross_entropy),
}


@pytest.mark.parametrize("case", CASES)
def test_an_evaluation_has_the_bits_of_a_run(case: str) -> None:
    make, data, loss = CASES[case]
    model, test = seeded(make), data(4, 3)
    more = {"metrics": {"accuracy": accuracy}, "loss": loss}
    result = delock.fit(model, data(), test, optimizer=SGD, stages=2, method="bp", batches=5, workers="inline", **more)
    last = result.evaluations[-1]
    found = delock.evaluate(model, test, **more)
    assert (found.loss, found.metrics) == (last.test_loss, last.metrics)
    assert found.samples == 25 + (11 if case == "several" else 0)
    session = delock.session(model, data()[0] if isinstance(data(), list) else batches()[0], optimizer=SGD, workers="inline", **more)
    if case != "weights":
        with session as run:
            assert run.evaluate(test) == found


def test_the_model_and_the_data_are_as_they_were() -> None:
    model, data = seeded(chain), batches()
    model[2].eval()
    before = [module.training for module in model.modules()], [x.clone() for x, _ in data]
    assert isinstance(delock.evaluate(model, data, loss=cross_entropy), Evaluation)
    assert [module.training for module in model.modules()] == before[0]
    assert all(map(torch.equal, before[1], (x for x, _ in data)))
    assert all(weight.grad is None for weight in model.parameters())


def test_a_list_of_modules_is_a_chain() -> None:
    model = seeded(chain)
    assert delock.evaluate([*model], batches(), loss=cross_entropy) == delock.evaluate(model, batches(), loss=cross_entropy)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "loss is missing, and a chain of modules computes none: give evaluate a loss"),
        ({"loss": cross_entropy, "batches": [(torch.zeros(0, 5), torch.zeros(0).long())]}, "the test data has no samples"),
        ({"loss": cross_entropy, "batches": 3}, "data must be an iterable of batches"),
        ({"loss": cross_entropy, "metrics": {"hits": lambda out, y: "x"}}, "the metric 'hits' returned a str"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        delock.evaluate(chain(), **{"batches": batches(), **given})
