"""A number that is drawn while a model is traced never becomes a constant of its graph."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph.examples import Examples
from delock.partition.graph.exported import exported
from delock.partition.graph.proof import difference
from delock.partition.graph.refusals import DrawnError
from delock.partition.graph.split import Split, split
from delock.partition.graph.symbolic import symbolic
from delock.partition.traces.kept_split import kept_split

pytestmark = pytest.mark.usefixtures("own_random")

FILE_RANDOM = random.Random(3)
WAYS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(()),
    "item": lambda: torch.rand(1).item(),
    "python": lambda: random.random(),
    "uniform": lambda: random.uniform(0.0, 1.0),
    "numpy": lambda: np.random.rand(),
    "a global of the file": lambda: FILE_RANDOM.random(),
}
ON_TENSORS = {"torch", "item"}  # torch.export cannot decide on them, and says so itself


class LeavesOut(nn.Module):
    """Leaves out layers by chance."""

    def __init__(self, draw: Callable[[], Any], p: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))
        self.draw, self.p = draw, p

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.training and self.draw() < self.p:
                continue
            x = torch.tanh(layer(x))
        return x


class OwnGenerator(LeavesOut):
    """Draws from a generator of its own."""

    def __init__(self, generator: Any, p: float = 0.001) -> None:
        super().__init__(lambda: None, p)
        self.own = generator

    def forward(self, x: Tensor) -> Tensor:
        own = self.own[0]["one"] if isinstance(self.own, list) else self.own
        for layer in self.layers:
            drawn = torch.rand((), generator=own) if isinstance(own, torch.Generator) else own.random()
            if self.training and drawn < self.p:
                continue
            x = torch.tanh(layer(x))
        return x


class OfItsClass(OwnGenerator):
    """Has the generator in its class."""

    own = random.Random(5)

    def __init__(self) -> None:
        LeavesOut.__init__(self, lambda: None, 0.001)


class InEvaluation(nn.Module):
    """Draws in evaluation alone."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x * random.random()


class Notes(nn.Module):
    """Draws from all generators, and notes what it has drawn."""

    drawn: ClassVar[list[tuple[float, ...]]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.drawn.append((float(torch.rand(())), random.random(), np.random.rand()))
        return x * sum(self.drawn[-1])


class Between(nn.Module):
    """Has layers around a part."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.low, self.part, self.high, self.out = nn.Linear(4, 4), part, nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(torch.tanh(self.high(self.part(torch.tanh(self.low(x))))))
        return made


def examples() -> Examples:
    return Examples.by_rows([torch.arange(16.0).reshape(4, 4).sin()], 4, nn.Identity())


def cut(model: nn.Module) -> Split:
    return split(model, Call(), examples(), 2)


@contextmanager
def unmoved() -> Iterator[None]:
    """Fails if a generator has moved within the block."""

    def states() -> str:
        return repr((torch.get_rng_state().sum(), np.random.get_state()[1:3], random.getstate(), FILE_RANDOM.getstate()))

    before = states()
    yield
    assert states() == before


# -- refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.5, 0.001])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_left_out_by_chance_is_refused_with_the_line(way: str, p: float) -> None:
    """However seldom that is: the draw itself is seen, and not its outcome."""
    model = LeavesOut(WAYS[way], p)
    with unmoved(), pytest.raises(UsageError, match=r"draws a random number in Python's own steps at test_chance\.py") as refusal:
        kept_split(model, Call(), examples(), 2)
    assert "which a graph cannot repeat; move the draw into a part that stays whole" in str(refusal.value)
    drawing = {"torch": "rand(())", "item": "rand(1)", "numpy": "np.random"}.get(way, "random")
    assert "`if self.training and self.draw()" in str(refusal.value) or drawing in str(refusal.value)


@pytest.mark.parametrize("way", WAYS)
def test_both_tracers_notice(way: str) -> None:
    model = LeavesOut(WAYS[way], 0.001)
    with pytest.raises(DrawnError):
        symbolic(model, Call(), 1)
    with pytest.raises(Exception) if way in ON_TENSORS else pytest.raises(DrawnError):  # noqa: PT011
        exported(model, Call(), [examples().first, examples().other], False)


@pytest.mark.parametrize("told", [False, True])
def test_what_is_drawn_in_evaluation_is_noticed_too(told: bool) -> None:
    with pytest.raises(DrawnError):
        exported(InEvaluation(), Call(), [examples().first, examples().other], told)


OWN: dict[str, Callable[[], nn.Module]] = {
    "random.Random": lambda: OwnGenerator(random.Random(1)),
    "numpy's Generator": lambda: OwnGenerator(np.random.default_rng(1)),
    "numpy's RandomState": lambda: OwnGenerator(np.random.RandomState(1)),
    "torch.Generator": lambda: OwnGenerator(torch.Generator().manual_seed(1)),
    "in a list": lambda: OwnGenerator([{"one": random.Random(1)}]),
    "of the class": OfItsClass,
}


@pytest.mark.parametrize("made", OWN.values(), ids=OWN)
def test_a_generator_of_the_model_is_noticed(made: Callable[[], nn.Module]) -> None:
    model = made()
    own: Any = model.own
    before = repr(own.getstate()) if isinstance(own, random.Random) else ""
    with pytest.raises(UsageError, match=r"draws a random number .* `drawn = "):
        kept_split(model, Call(), examples(), 2)
    assert not before or repr(own.getstate()) == before


# -- kept whole --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", sorted(WAYS.keys() - {"a global of the file"}))
def test_a_part_that_draws_stays_whole(way: str) -> None:
    """So it draws anew in every forward."""
    model = Between(LeavesOut(WAYS[way], 0.5))
    with unmoved():
        made = kept_split(model, Call(), examples(), 2)
    assert made.how == "torch.fx"
    assert [piece.begins for piece in made.pieces] == ["", "part", "high", "out"]
    whole = nn.Sequential(*(piece.module for piece in made.pieces)).train()
    assert len({float(whole(examples().first[0]).sum().detach()) for _ in range(30)}) > 3


def test_the_proof_draws_others_in_every_step_and_the_same_in_both() -> None:
    """The pieces and the model, on three batches in training and two in evaluation."""
    model = Between(Notes())
    made = cut(model)
    Notes.drawn.clear()
    with unmoved():
        assert difference(model, Call(), [piece.module for piece in made.pieces], [examples().first, examples().other]) == ""
    assert len(Notes.drawn) == 10
    assert Notes.drawn[::2] == Notes.drawn[1::2]
    assert all(len(set(one)) == 5 for one in zip(*Notes.drawn[::2], strict=True))


DROPPING: dict[str, Callable[[], nn.Module]] = {
    "Dropout": lambda: nn.Dropout(0.5),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.5),
    "a sequence": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.AlphaDropout(0.2)),
}


@pytest.mark.parametrize("part", DROPPING.values(), ids=DROPPING)
def test_dropout_is_none_of_pythons_draws(part: Callable[[], nn.Module]) -> None:
    made = cut(Between(part()))
    assert (made.how, made.refused) == ("torch.fx", [])


class Attends(nn.Module):
    """Calls attention as blocks do."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.drop = nn.MultiheadAttention(4, 2, dropout=0.5, batch_first=True), DropPath()

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, None]
        made: Tensor = (x + self.drop(self.attention(x, x, x, need_weights=False)[0])).squeeze(1)
        return made


class DropPath(nn.Module):
    """Leaves out a branch for some samples of the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * x.new_empty(x.shape[0], *(1 for _ in x.shape[1:])).bernoulli_(0.5) if self.training else x


@pytest.mark.parametrize("trace", [symbolic, exported])
def test_masks_of_the_batch_can_be_traced(trace: Any) -> None:
    """They are drawn by the graph itself."""
    if trace is symbolic:
        assert cut(Between(Attends())).how == "torch.fx"
    else:
        exported(Between(Attends()), Call(), [examples().first, examples().other], False)
