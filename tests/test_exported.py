"""Traces by torch.export hold for the sizes that they say, whatever else a model computes with."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import delock
from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph.examples import Examples
from delock.partition.graph.exported import exported
from delock.partition.graph.guards import Guards
from delock.partition.graph.split import Split, split

from harness import trained_plainly

SGD = partial(torch.optim.SGD, lr=0.1)
pytestmark = pytest.mark.usefixtures("own_random")


class Layers(nn.Module):
    """Layers that a subclass uses."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def rest(self, x: Tensor) -> Tensor:
        """Computes with sizes, which torch.fx cannot."""
        made: Tensor = self.out(torch.tanh(self.high(x))) + torch.ones(x.shape[0], x.shape[0]).tril().mean()
        return made


class Scaled(Layers):
    """Computes with a number that comes from values."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        return self.rest(h * h.detach().abs().max().item())


class Downwards(Layers):
    """Counts rows downwards by floats; sizes are rounded then."""

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], -x.shape[0], -1.0)[: x.shape[0], None]
        return self.rest(torch.tanh(self.low(x)) * rows)


class Counted(Layers):
    """Asks for the number of rows as Python does."""

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.low(x).view(len(x), 2, 2).unbind(1)
        return self.rest(torch.cat([left, right], 1) * len(x))


def cut(model: nn.Module) -> Split:
    return split(model, Call(), Examples.by_rows([torch.arange(24.0).reshape(6, 4).sin()], 6, model), 2)


@pytest.mark.parametrize("made", [Scaled, Downwards, Counted])
def test_numbers_that_are_no_sizes(made: Callable[[], nn.Module]) -> None:
    """The pieces compute what the model computes for sizes that they were not traced with."""
    model = made()
    found = cut(model)
    assert (found.how, len(found.pieces) >= 2) == ("torch.export", True)
    whole, x = nn.Sequential(*(piece.module for piece in found.pieces)), torch.randn(9, 4)
    assert torch.equal(whole(x), model(x))


def test_conditions_are_checked_with_torchs_functions_of_numbers() -> None:
    check = Guards((("s0", 4),), (torch.float32,), {}, ("torch.sym_float(s0) < 5.0", "torch._sym_sqrt(s0) != 1.0"))
    check(torch.ones(4, 4))
    for rows in (6, 1):
        with pytest.raises(UsageError, match="traced for inputs of other sizes") as caught:
            check(torch.ones(rows, 4))
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value), "a stage sends it"
    with pytest.raises(UsageError, match=r"traced for inputs of other sizes \(u0 > 1\)"):
        Guards((("s0", 4),), (torch.float32,), {}, ("u0 > 1",))(torch.ones(4, 4))


class Shifted(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y[1:]


def test_a_size_that_follows_from_another_is_checked() -> None:
    batches = [(torch.rand(n, 3), torch.rand(n + 1, 3)) for n in (4, 3)]
    call, _ = Call.of(batches[0], {})
    check = exported(Shifted(), call, batches, False)[3][True]
    check(torch.rand(5, 3), torch.rand(6, 3))
    with pytest.raises(UsageError, match=r"input 1 of \(s\d+ \+ 1, 3\)"):
        check(torch.rand(5, 3), torch.rand(2, 3))


class Remembers(Layers):
    """Compares rows with those of earlier batches, and puts a new memory in the place of the old one, which the backward still needs."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.low(x))
        like = h @ self.memory
        if self.training:
            self.memory = torch.cat([h.detach().mean(0)[:, None], self.memory[:, :-1]], 1)
        return self.rest(h + like.mean(1, keepdim=True))


def test_a_buffer_that_is_read_and_then_replaced() -> None:
    """Plain PyTorch trains such a model, and so do its pieces; they can be cut behind the new memory."""
    model = Remembers()
    data = [(torch.randn(n, 4), torch.randn(n, 2)) for n in (4, 4, 3)]
    own = copy.deepcopy(model)
    options: dict[str, Any] = {"loss": mse_loss, "optimizer": SGD, "method": "bp", "workers": "inline"}
    assert delock.fit(model, data, stages=2, batches=3, **options).started.cuts == ("high",)
    trained_plainly(own, data, mse_loss)
    assert [name for name, one in own.state_dict().items() if not torch.equal(one, model.state_dict()[name])] == []


class Pixels(Layers):
    """Decides on the type of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.uint8:
            x = x.float() / 255
        return self.rest(torch.tanh(self.low(x)))


@pytest.mark.parametrize("place", ["train", "test"])
def test_inputs_of_another_type_than_the_traced_one_are_refused(place: str) -> None:
    pixels = [(torch.full((4, 4), 9, dtype=torch.uint8), torch.randn(4, 2))]
    floats = [(x / 255, y) for x, y in pixels]
    train, test = (pixels + floats, None) if place == "train" else (pixels, floats)
    options: dict[str, Any] = {"loss": mse_loss, "optimizer": SGD, "method": "bp", "workers": "inline"}
    with pytest.raises(UsageError, match=r"of another type \(input 0 of torch.uint8\) than torch.float32"):
        delock.fit(Pixels(), train, test, stages=2, epochs=1, **options)


class Returns(Layers):
    """Returns a number or a text in addition to its tensor."""

    def __init__(self, what: Callable[[Returns, Tensor], Any]) -> None:
        super().__init__()
        self.what = what
        self._calls = 0

    def forward(self, x: Tensor) -> dict[str, Any]:
        self._calls += 1
        return {"made": self.rest(torch.tanh(self.low(x))), "more": [self.what(self, x)]}


RETURNED: tuple[Callable[[Returns, Tensor], Any], ...] = (
    lambda model, x: x.shape[0],
    lambda model, x: x.shape[0] / 8,
    lambda model, x: len(x),
    lambda model, x: x.shape[0] > 2,
    lambda model, x: f"{x.shape[0]} rows",
)


@pytest.mark.parametrize("what", RETURNED)
def test_numbers_that_a_model_returns_are_not_those_of_its_first_batch(what: Callable[[Returns, Tensor], Any]) -> None:
    with pytest.raises(UsageError, match=r"cannot be traced|of one size alone"):
        cut(Returns(what))
    assert len(cut(Returns(lambda model, x: x.new_full((), len(x)))).pieces) >= 2, "the remedy"


def test_what_a_model_counts_and_returns_is_refused() -> None:
    with pytest.raises(UsageError, match=r"what changes with the batch and is no tensor \(1 and then 2 as \['more'\]\[0\]\)"):
        cut(Returns(lambda model, x: model._calls))


class ByRow(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.rest(torch.stack([self.low(row) for row in x]))


def test_a_loop_over_samples_is_named() -> None:
    """Also where all batches have one size: that of the first is not the only one that is tried."""
    with pytest.raises(UsageError, match=r"holds for batches of one size alone \(input 0 of \(6, 4\)\), as with a loop over the samples"):
        cut(ByRow())
