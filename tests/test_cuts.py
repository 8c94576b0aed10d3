"""Cuts by the names of modules at any depth, and at CutPoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import delock
from cut_models import Block, Net, Settles, Stateful, Tied, Twice, batches, chain, plain, same, seeded, started
from delock.errors import UsageError
from delock.nets.cut_point import cut_points
from delock.partition.layers import layers, resolve_cuts
from delock.partition.measure import measure
from delock.recipes import SGD

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.mark.parametrize(
    ("make", "cuts"),
    [
        (Net, ["blocks.1.b", "blocks.3"]),
        (Net, ["norm", "blocks.2"]),
        (Net, ["blocks", "head"]),
        (chain, ["1.b"]),
        (chain, ["2.a", "3.b"]),
        (chain, ["1.b", "3"]),
    ],
)
def test_a_name_at_any_depth_is_a_place_to_cut(make: Any, cuts: list[str]) -> None:
    """The weights are those of plain PyTorch; a chain with a cut inside a layer is traced as any other model is."""
    model = seeded(make)
    found = started(model, cuts=cuts)
    assert len(found.cuts) == len(cuts)
    assert same(model.state_dict(), plain(seeded(make)))


def test_a_cut_comes_in_front_of_the_module_that_is_named() -> None:
    """Block 1 without its second layer stays below, with the stem, the norm, block 0, and the module that is never called."""
    model = Net()
    below = [model.stem, model.norm, model.blocks[0], model.blocks[1].a]
    stages = started(model, cuts=["blocks.1.b"]).stages
    assert stages[0].parameters == sum(p.numel() for part in (*below, model.idle) for p in part.parameters())
    assert sum(stage.parameters for stage in stages) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "cuts", "says"),
    [
        (Net, ["blocks.7"], "no module is called 'blocks.7': did you mean 'blocks.3'?"),
        (Net, ["blocks.1.bb"], "no module is called 'blocks.1.bb': did you mean 'blocks.1.b'?"),
        (Net, ["idle"], "in front of idle: the forward does not call it"),
        (Net, ["stem"], "in front of stem: it is the first"),
        (Net, ["blocks.2", "blocks.2.a"], r"cuts blocks.2, blocks.2.a are out of order \(layers \[(\d+), \1\]\)"),
        (Stateful, ["between"], "in front of between: norm.weight is used on both sides of it"),
        (Settles, ["middle"], r"middle\.\w+ is first used on one side of it in training, and on the other in evaluation"),
        (chain, ["1.c"], "no layer is called '1.c': did you mean '1.b'?"),
        (lambda: list(chain()), ["1.b"], r"1.b lies inside layer 1 \(1, Block\), which is called as a whole"),
        (lambda: nn.Sequential(nn.Linear(8, 4), nn.LSTM(4, 1), nn.Flatten()), ["1.x"], "no layer is called '1.x'"),
    ],
)
def test_a_cut_that_is_not_possible_says_why(make: Any, cuts: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        started(make(), cuts=cuts)


def test_a_weight_has_one_home_in_training_and_in_evaluation() -> None:
    """Cut in front of the layer that settles, the graph of evaluation would give its weights to another stage than that of training."""
    model = seeded(Settles)
    assert started(model, stages=2).cuts == ("high",)
    assert same(model.state_dict(), plain(seeded(Settles)))


@pytest.mark.parametrize("cuts", [[1], ["blocks.1", "3"]])
def test_a_traced_model_is_cut_by_names_alone(cuts: list[int | str]) -> None:
    """Its pieces have other numbers for another number of stages."""
    with pytest.raises(UsageError, match=r"cut ('3'|1) is a number, but a Net is traced.*as cuts=\['blocks\.1'\]"):
        started(Net(), cuts=cuts)


def test_a_number_that_names_a_module_is_its_name() -> None:
    assert started(nn.Sequential(nn.Linear(8, 8), Net()), cuts=[1, "1.blocks.2"]).cuts == ("1", "1.blocks.2")


def test_a_chain_that_cannot_be_traced_names_the_layer_around_the_cut() -> None:
    class Decides(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) if x.mean() > -9 else x

    model = nn.Sequential(nn.Linear(8, 8), Decides(8), nn.Linear(8, 1))
    with pytest.raises(UsageError, match=r"a cut inside layer 1 \(1, Decides\) needs the whole chain to be traced, which failed: .*x.mean"):
        started(model, cuts=["1.b"])


# --- CutPoint -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decides", [False, True], ids=["torch.fx", "torch.export"])
def test_cut_points_mark_places_in_a_forward(decides: bool) -> None:
    """A tensor and a tuple go through them; the weights are those of plain PyTorch."""
    model = seeded(Net, marks=True, decides=decides)
    found = started(model, stages=3)
    assert same(model.state_dict(), plain(seeded(Net, marks=True)))
    first, second = (
        sum(p.numel() for part in own for p in part.parameters()) for own in ([model.stem, model.norm, model.idle], model.blocks[:2])
    )
    assert [stage.parameters for stage in found.stages][:2] == [first, second]
    assert found.messages[1] == 2 * 4 * 4 * 16  # the main activation and the skip


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_stages_begin_at_cut_points_alone(stages: int) -> None:
    """With more CutPoints than cuts the balance chooses among them; a single stage needs none."""
    assert started(Net(marks=True), stages=stages).cuts == started(Net(marks=True), cuts=["first", "second"][3 - stages :]).cuts
    marked = started(chain(2, 3, 4), stages=stages)
    assert marked.cuts == {1: (), 2: (2,), 3: (2, 3)}[stages]


@pytest.mark.parametrize("model", [Net(marks=True), chain(1, 2), list(chain(1, 2))])
def test_too_few_cut_points_are_refused(model: Any) -> None:
    says = r"the model has 2 CutPoints, but 4 stages need 3 cuts: add CutPoints, use at most 3 stages, or say in cuts where to cut"
    with pytest.raises(UsageError, match=says):
        started(model, stages=4)


def test_cuts_that_are_given_go_before_cut_points() -> None:
    assert started(Net(marks=True), cuts=["blocks.1"]).cuts != started(Net(marks=True), cuts=["second"]).cuts
    assert started(chain(1, 2), cuts=[3]).cuts == (3,)
    assert started(chain(1, 2), cuts=["3"]).cuts == (2,)  # the path of the second CutPoint


def test_a_cut_point_in_a_chain_is_no_layer() -> None:
    """It adds nothing to the count of layers and work, and names the place in front of the next layer."""
    own, marked = layers(chain()), layers(chain(2, 4))
    assert [type(layer.module) for layer in own] == [type(layer.module) for layer in marked]
    assert [layer.also for layer in marked] == [(), (), ("2",), (), ("5",)]
    assert resolve_cuts(marked, ["2", "5"]) == [2, 4]
    inputs, targets = batches()[0]
    costs = [measure(one, inputs, targets, nn.functional.mse_loss, counts=True) for one in (own, marked)]
    assert [cost.work for cost in costs[0]] == [cost.work for cost in costs[1]]
    model = seeded(chain, 2, 4)
    assert cut_points(model) == ["2", "5"]
    started(model, stages=3)
    want = plain(seeded(chain, 2, 4))
    assert same(model.state_dict(), want)


def test_a_cut_point_inside_a_layer_of_a_chain_is_found() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(Block(8), delock.CutPoint(), Block(8)), nn.Linear(8, 1))
    assert [stage.parameters for stage in started(model, stages=2).stages] == [72 + 144, 144 + 9]


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (chain(0), "the CutPoint 0 stands at an end of the model"),
        (nn.Sequential(nn.Linear(8, 1), nn.ReLU(), delock.CutPoint()), "the CutPoint 2 stands at an end of the model"),
        (Twice(), "the CutPoint mark is called 3 times in a forward, but marks one place"),
    ],
)
def test_a_cut_point_that_marks_no_place_is_refused(model: nn.Module, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        started(model, stages=2)


def test_a_cut_point_returns_what_it_is_given() -> None:
    mark, x = delock.CutPoint(), torch.randn(2, 3)
    assert torch.equal(mark(x), x)
    assert [torch.equal(a, b) for a, b in zip(mark((x, x.int())), (x, x.int()), strict=True)] == [True, True]
    assert not mark.state_dict()
    with pytest.raises(UsageError, match="a CutPoint is given a dict, but it takes a tensor or a tuple of tensors"):
        mark({"x": x})


# --- tied weights -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_messages_count_weights_that_travel(micro_batches: int) -> None:
    """They are there for every part of a batch as a whole."""
    data = [(torch.randint(0, 11, (4, 5)), torch.randint(0, 11, (4, 5)))]
    found = started(
        Tied(),
        data=data,
        loss=lambda out, target: cross_entropy(out.flatten(0, 1), target.flatten()),
        method=delock.GPipe(micro_batches=micro_batches) if micro_batches > 1 else "bp",
        optimizer=SGD(0.1),
        cuts=["layers.1"],
    )
    weight, activation = 11 * 8 * 4, 4 * 5 * 8 * 4
    assert found.messages == (weight + activation // micro_batches,)
