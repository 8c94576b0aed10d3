"""A loss with a state of its own sees the batches of the run alone, in their order, as in a plain loop."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.partition.trial_state import state_kept

from harness import trained_plainly
from survivors import assert_same, train

pytestmark = pytest.mark.usefixtures("own_random")
Data = list[tuple[Tensor, Tensor]]


class Centred(nn.Module):
    """Keeps a running centre in a buffer, and counts its calls in one that is in no state dict, and in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(5))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)
        self.attribute = 0
        self.own = torch.Generator().manual_seed(3)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        noise = torch.rand(5, generator=self.own)
        found = cross_entropy(outputs - self.centre + noise, targets) * 0.9**self.attribute
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        self.calls += 1
        self.attribute += 1
        return found


class Counting:
    """A plain object that keeps what it has seen."""

    total = 0

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.last: dict[str, Tensor] = {}

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        found = cross_entropy(outputs, targets) / (1 + len(self.seen))
        self.seen.append(found.item())
        self.last["outputs"] = outputs.detach()
        type(self).total += 1
        return found


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))


def batches() -> Data:
    torch.manual_seed(1)
    return [(torch.randn(8, 12), torch.randint(5, (8,))) for _ in range(3)]


def plain_loop(loss: Any) -> tuple[list[float], nn.Module]:
    model = network()
    return trained_plainly(model, batches(), loss), model


def fit(loss: Any, **options: Any) -> tuple[list[float], nn.Module]:
    model = network()
    options = {"method": "bp", "stages": 2, "workers": "inline", "epochs": 1, **options}
    return delock.fit(model, options.pop("data", batches()), loss=loss, optimizer=partial(torch.optim.SGD, lr=0.1), **options).losses, model


def equal(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.state_dict().values(), b.state_dict().values()))


@pytest.mark.parametrize("options", [{"stages": 1}, {}, {"workers": "processes"}], ids=["one", "two", "processes"])
def test_a_loss_module_with_a_state_is_that_of_a_plain_loop(options: Any) -> None:
    mine, theirs = Centred(), Centred()
    losses, model = fit(mine, **options)
    expected, trained = plain_loop(theirs)
    assert losses == expected
    assert equal(model, trained)
    assert torch.equal(mine.centre, theirs.centre)
    assert mine.calls == theirs.calls == 3
    assert mine.attribute == (0 if "workers" in options else 3)


def test_a_callable_object_with_a_state_is_that_of_a_plain_loop() -> None:
    mine, theirs = Counting(), Counting()
    before = Counting.total
    losses, model = fit(mine)
    assert Counting.total == before + 3
    expected, trained = plain_loop(theirs)
    assert losses == expected == mine.seen
    assert equal(model, trained)


def test_a_function_around_a_loss_module_is_that_of_a_plain_loop() -> None:
    inner, calls = Centred(), 0

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return inner(outputs, targets) + 0.1 * calls

    again = copy.deepcopy(inner)
    losses, model = fit(loss)
    assert calls == inner.attribute == 3
    expected, trained = plain_loop(lambda outputs, targets: again(outputs, targets) + 0.1 * again.attribute)
    assert losses == expected
    assert equal(model, trained)


def test_metrics_and_functions_of_the_data_count_only_what_the_run_calls() -> None:
    metric, seen = Counting(), {"inputs": 0, "targets": 0, "weight": 0}

    def noted(name: str, value: Any) -> Any:
        seen[name] += 1
        return value

    data = delock.data.Batches(
        batches(),
        inputs=lambda batch: noted("inputs", batch[0]),
        targets=lambda batch: noted("targets", batch[1]),
        weight=lambda targets: noted("weight", len(targets)),
    )
    fit(cross_entropy, data=data, metrics={"own": metric}, test=batches()[:2])
    assert len(metric.seen) == 2
    assert seen == {"inputs": 3, "targets": 3, "weight": 5}


def test_every_stage_with_a_loss_has_a_copy_and_processes_give_the_same_numbers() -> None:
    inline, apart = (Centred() for _ in range(2))
    losses, model = fit(inline, method="dgl", stages=3)
    others, other = fit(apart, method="dgl", stages=3, workers="processes")
    assert losses == others
    assert equal(model, other)
    assert inline.calls == apart.calls == 3
    assert torch.equal(inline.centre, apart.centre)


class Noting(nn.Module):
    """Keeps a running centre, a count that is in no state dict, and what it makes in its first call."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not hasattr(self, "first"):
            self.register_buffer("first", outputs.detach()[0].clone())
        found = cross_entropy(outputs - self.centre + self.first, targets) * 0.99**self.calls
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        self.calls += 1
        return found


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("method", ["fdg", "dgl"])
def test_a_run_that_goes_on_has_the_state_of_its_loss(method: str, workers: str, tmp_path: Path) -> None:
    """Every stage of dgl has a copy of the loss."""
    losses = [Noting() for _ in range(3)]
    whole, _, again = (
        train(tmp_path, keeps=keeps, method=method, workers=workers, loss=loss)
        for keeps, loss in zip(({}, {"every": 10}, {"resume": "newest"}), losses, strict=True)
    )
    assert_same(again, whole)
    assert torch.equal(losses[2].centre, losses[0].centre)
    assert losses[2].calls == losses[0].calls > 24


def test_a_run_that_goes_on_in_other_stages_has_the_state_of_its_loss(tmp_path: Path) -> None:
    """Dropout draws other numbers there."""
    first, then = Noting(), Noting()
    train(tmp_path, keeps={"every": 12}, method="bp", loss=first)
    train(tmp_path, keeps={"resume": "newest"}, method="bp", cuts=[3], loss=then)
    assert torch.equal(then.first, first.first)
    assert then.calls == first.calls > 24


class Graded(nn.Module):
    """Counts its calls without and with gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls[int(torch.is_grad_enabled())] += 1
        return cross_entropy(outputs, targets)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_evaluations_call_the_loss_without_gradients(workers: str) -> None:
    loss = Graded()
    fit(loss, test=batches()[:2], workers=workers)
    assert loss.calls.tolist() == [2, 3]


def test_trials_that_fail_leave_the_state_as_it_was() -> None:
    loss = Centred()
    with pytest.raises(delock.UsageError, match="the loss failed"):
        fit(loss, data=[(x, y + 9) for x, y in batches()])
    assert not loss.calls
    assert not loss.centre.any()


def test_state_is_put_back_wherever_it_lies() -> None:
    held: dict[str, Any] = {"list": [1], "set": {1}, "tensor": torch.zeros(3), "view": torch.zeros(4, 2), "pair": ([1], {2: 3})}
    array = torch.zeros(3)
    shared = array.numpy()

    def loss() -> None:
        held["list"].append(2)
        held["set"].add(2)
        held["tensor"].resize_(5)
        held["view"][0] += 1
        held["pair"][0].clear()
        held["pair"][1][4] = 5
        held["new"] = 1
        shared[0] = 7
        loss.own = 1  # type: ignore[attr-defined]

    before = copy.deepcopy(held)
    with state_kept([loss], []):
        loss()
    assert held.keys() == before.keys()
    assert all(torch.equal(held[name], before[name]) for name in ("tensor", "view"))
    assert all(held[name] == before[name] for name in ("list", "set", "pair"))
    assert not array.any()
    assert not vars(loss)


class Slotted:
    """Keeps its state in slots, one of them empty at first."""

    __slots__ = ("calls", "last")

    def __init__(self) -> None:
        self.calls = [0]

    def __call__(self) -> None:
        self.calls[0] += 1
        self.calls = [*self.calls, 1]
        self.last = 1


READ = {"a": 1, "b": 2}


def by_globals() -> None:
    """Makes a global, writes one that it does not read, and changes the order of a dict."""
    global MADE, WRITTEN
    MADE = globals().get("MADE", 0) + 1
    WRITTEN = 1
    READ["a"] = READ.pop("a")


WRITTEN = 0


def test_slots_and_names_of_globals_are_put_back() -> None:
    slotted = Slotted()
    with state_kept([slotted, by_globals], []):
        slotted()
        by_globals()
    assert slotted.calls == [0]
    assert not hasattr(slotted, "last")
    assert ("MADE" in globals(), WRITTEN, [*READ]) == (False, 0, ["a", "b"])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_a_loss_does_to_the_tensors_that_it_holds_is_put_back() -> None:
    weight, frozen = (torch.zeros(3, requires_grad=True) for _ in range(2))
    weight.grad = torch.ones(3)
    read_only = np.frombuffer(b"12345678", dtype=np.uint8)
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])

    def loss() -> None:
        assert read_only.sum() > 0
        assert nested.is_nested
        (weight * 2).sum().backward()
        frozen.requires_grad_(False)
        frozen.data = frozen.data.double()

    with state_kept([loss], []):
        loss()
    assert weight.grad.tolist() == [1, 1, 1]
    assert (frozen.requires_grad, frozen.dtype) == (True, torch.float32)


class Late(nn.Module):
    """Makes its buffer in the first call."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        if not hasattr(self, "centre"):
            self.register_buffer("centre", torch.zeros(5))
        self.centre = 0.9 * self.centre + 0.1 * outputs.detach().mean(0)
        return cross_entropy(outputs - self.centre, targets)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_buffer_that_a_loss_makes_in_its_first_call_costs_no_run(workers: str) -> None:
    losses, model = fit(Late(), workers=workers)
    expected, trained = plain_loop(Late())
    assert losses == expected
    assert equal(model, trained)


def test_a_loss_that_the_model_has_as_an_attribute_is_put_back_and_the_model_itself_is_not_looked_at() -> None:
    model = network()
    model.criterion, model.other = Centred(), Centred()
    model.criterion.model = [model]  # type: ignore[assignment]
    given = torch.zeros(8, 5), torch.zeros(8, dtype=torch.long)
    with state_kept([model.criterion], [model]):
        model.criterion(*given)
        model.other(*given)
    assert (model.criterion.attribute, model.other.attribute) == (0, 1)
