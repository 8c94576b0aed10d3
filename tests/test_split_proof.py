"""The proof of a split sees the smallest difference, in sums of gradients or in what each use of a tied weight adds to them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import delock
from delock.data.call import Call
from delock.errors import UsageError
from delock.partition.graph import examples, proof
from delock.partition.graph.cutter import Piece
from delock.partition.graph.digests import Gradients, digest
from delock.partition.graph.examples import Examples
from delock.partition.graph.proof import difference
from delock.partition.graph.refusals import Obstacle, furthest, obstacle
from delock.partition.graph.segment import computation
from delock.partition.graph.split import split

pytestmark = pytest.mark.usefixtures("own_random")


class Tied(nn.Module):
    """A coder whose first weight is used again behind, once or more."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.parts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.out = nn.ModuleList(nn.Linear(4, 7, bias=False) for _ in range(uses))
        for one in self.out:
            one.weight = self.table.weight  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = self.table(x)
        for part in self.parts:
            x = x + part(x)
        return torch.stack([one(x) for one in self.out]).sum(0)


@pytest.fixture(params=["sums", "apart"])
def large(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Lets models count as large ones, whose uses of weights are compared apart, or not."""
    monkeypatch.setattr(examples, "LARGE", 0 if request.param == "apart" else 10**9)
    return bool(request.param == "apart")


def tried(model: nn.Module) -> tuple[list[Piece], list[tuple[Tensor, ...]]]:
    """Returns a model in pieces, and batches to try them with."""
    batches = Examples.by_rows([torch.tensor([[0, 3, 6], [1, 1, 5], [2, 4, 0], [6, 6, 6]])], 4, model)
    return split(model, Call(), batches, 3).pieces, [batches.first, batches.other]


def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Returns a list to which every comparison adds whether it was apart."""
    seen, plain = list[bool](), proof._difference

    def noted(*given: Any) -> str:
        seen.append(given[-1].apart)
        return plain(*given)

    monkeypatch.setattr(proof, "_difference", noted)
    return seen


@pytest.mark.parametrize("uses", [1, 2])
def test_a_tied_model_in_pieces_is_the_model(uses: int, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order counts in which three uses are added, so then sums are compared."""
    model = Tied(uses)
    made, batches = tried(model)
    assert len(made) >= 3
    assert sum(len(piece.ties) for piece in made) >= 2
    seen = passes(monkeypatch)
    assert difference(model, Call(), [piece.module for piece in made], batches) == ""
    assert seen == [*([True] if large else []), *([] if large and uses == 1 else [False])]
    assert all(weight.grad is None for weight in model.parameters())


def scaled(piece: Piece, mode: bool, by: Callable[[Tensor], Tensor]) -> None:
    """Changes the first output of a piece in one mode."""
    program = computation(piece.module, mode).program
    before = program.run
    program.run = lambda *given: (by((found := before(*given))[0]), *found[1:])


class Doubled(torch.autograd.Function):
    """The same value, with a gradient that differs in its last bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Any) -> Any:
        return errors[0] * (1 + 2**-22)


@pytest.mark.parametrize(
    ("at", "mode", "by", "found"),
    [
        (1, True, lambda x: x * (1 + 2**-22), "output 0 in training"),
        (1, False, lambda x: x * (1 + 2**-22), "output 0 in evaluation"),
        (1, True, Doubled.apply, "the gradient of "),
        (-1, True, lambda x: x.detach() + 0 * x, "the gradient of "),
    ],
    ids=["forward", "evaluation", "backward", "zero for none"],
)
def test_a_piece_that_differs_in_a_last_bit_is_seen(
    at: int, mode: bool, by: Callable[[Tensor], Tensor], found: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Tied(1)
    made, batches = tried(model)
    monkeypatch.setattr(proof, "_copies", lambda pieces: [piece.train() for piece in pieces])  # the proof tries the pieces themselves
    scaled(made[at], mode, by)
    assert difference(model, Call(), [piece.module for piece in made], batches).startswith(found)


def test_digests_are_equal_for_equal_tensors_alone() -> None:
    base = torch.randn(3, 5)
    assert digest(base) == digest(base.t().contiguous().t())
    assert digest(torch.tensor([0.0, torch.nan])) == digest(torch.tensor([-0.0, -torch.nan]))
    others = [base.double(), base.reshape(5, 3), base.t(), base.clone()]
    others[-1].view(torch.int32)[2, 4] ^= 1
    assert len({digest(one) for one in (base, *others)}) == 5
    assert digest(torch.tensor([0.0, 1.0])) != digest(torch.tensor([torch.nan, 1.0]))
    assert digest(torch.tensor([1j])) != digest(torch.tensor([1 + 0j]))
    assert digest(torch.tensor([1.0, 2.0]).bfloat16()) == digest(torch.tensor([1.0, 2.0]).bfloat16())


def test_gradients_are_let_go_of_as_they_come_and_none_is_not_zero() -> None:
    used, unused, zero = (nn.Parameter(torch.ones(2)) for _ in range(3))
    with Gradients({"used": used, "unused": unused, "zero": zero}) as gradients:
        (used.sum() + 0 * zero.sum()).backward()
    assert gradients.found == {"used": digest(torch.ones(2)), "zero": digest(torch.zeros(2))}
    assert used.grad is zero.grad is None
    used.sum().backward()
    assert used.grad is not None, "the hooks are gone"


class Unpacks(nn.Module):
    """Takes a tensor apart as Python does, the way attention does with its projection; and a tuple, of which one item is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.first(x).unflatten(-1, (3, 2)).permute(1, 0, 2)
        left, right = (q * k + v).split(1, dim=-1)
        pair = torch.stack([left, right, left])
        made: Tensor = self.last(torch.cat([pair[0], pair[1]], -1))
        return made


def test_a_tensor_is_unpacked_by_one_operation() -> None:
    """As selections, each item would have a gradient as large as the whole tensor. What is not unpacked whole stays as it is."""
    model = Unpacks()
    batches = Examples.by_rows([torch.randn(5, 4)], 5, model)
    made = split(model, Call(), batches, 2)
    assert made.how == "torch.fx"
    whole = nn.Sequential(*(piece.module for piece in made.pieces))
    with torch.profiler.profile() as profile:
        whole(torch.randn(5, 4)).sum().backward()
    seen = [event.name for event in profile.events()]
    assert seen.count("aten::unbind") == 1
    assert seen.count("aten::select_backward") == 2  # of pair[0] and pair[1]


def test_the_tracer_that_came_furthest_is_quoted() -> None:
    """torch.export traces it, and the pieces count in Python: torch.fx's reason, a type that it does not know, would help nobody."""
    told = [
        Obstacle("torch.fx", "TypeError: 'Proxy' object cannot be interpreted", "net.py:7, `range(x)`"),
        Obstacle("torch.export", "its forward changes the attribute n", far=1),
        Obstacle("torch.export", "RuntimeError: no", "net.py:9, `x`"),
    ]
    assert furthest(told) == told[1]
    assert furthest([*told, Obstacle("torch.export", "in pieces it would compute something else", far=2)]).far == 2
    assert furthest([told[0], told[2]]) == told[2]
    assert furthest([told[0], Obstacle("torch.export", "RuntimeError: no")]) == told[0]


class FailsTwice(nn.Module):
    """torch.fx cannot iterate over a tensor; torch.export can, and finds a number that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.out, self.n = nn.Linear(4, 4), nn.Linear(4, 2), 0

    def forward(self, x: Tensor) -> Any:
        self.n += 1
        h = self.low(x) if float(torch.tensor(1.0)) else x
        return self.out(sum(part for part in h.chunk(int(x.shape[1] > 0))))


def test_a_reason_of_delocks_own_goes_before_a_tracers() -> None:
    model = FailsTwice()
    batches = Examples.by_rows([torch.randn(4, 4)], 4, model)
    with pytest.raises(UsageError, match=r"cannot be traced \(torch.export: its forward changes the attribute n"):
        split(model, Call(), batches, 2)


class Fresh(Unpacks):
    """Draws from a generator that it makes itself."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * float(np.random.default_rng().random())


class Indexed(nn.Module):
    """Gives every edge the row of its node; a batch has as many nodes as edges."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, of: Tensor) -> Any:
        return self.out(self.low(x)[of])


def test_a_model_that_is_another_every_time_is_told_so() -> None:
    batches = Examples.by_rows([torch.randn(5, 4)], 5, nn.Identity())
    with pytest.raises(UsageError, match="does not compute the same twice, even from the same seed"):
        split(Fresh(), Call(), batches, 2)


def test_inputs_whose_rows_cannot_be_left_out() -> None:
    given = torch.randn(4, 4), torch.tensor([3, 2, 1, 0])
    call, inputs = Call.of(given, {})
    with pytest.raises(UsageError, match=r"not one of fewer samples.*IndexError.*Batches\(loader, samples=\.\.\.\)"):
        split(Indexed(), call, Examples.by_rows(inputs, 4, nn.Identity()), 2)


def test_words_of_a_tracer_are_cut_between_words() -> None:
    assert str(obstacle("torch.fx", RuntimeError("word " * 50)).reason).endswith(" word ...")


@pytest.mark.slow
def test_errors_are_tried_as_they_arrive() -> None:
    """The error of a joined branch has gaps between its elements, a message has none: a sum over one has other last bits than over both.

    It is that of a bias in front of a batch norm, so of zero and rounding alone.
    """
    transformers = pytest.importorskip("transformers")
    sizes = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 16, "num_attention_heads": [1, 2, 2, 4]}
    drops = dict.fromkeys(["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob", "drop_path_rate"], 0.0)
    model = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(num_labels=5, **sizes, **drops)).train()
    own = copy.deepcopy(model)
    batch = {"pixel_values": torch.randn(2, 3, 64, 64), "labels": torch.randint(0, 5, (2, 64, 64))}
    made = partial(torch.optim.SGD, lr=0.02)
    delock.fit(model, [batch], optimizer=made, stages=2, method="bp", workers="inline", batches=1)
    own(**batch).loss.backward()
    made(own.parameters()).step()
    assert [name for name, one in own.state_dict().items() if not torch.equal(one, model.state_dict()[name])] == []
