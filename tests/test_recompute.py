"""Activation checkpointing inside a stage: the same bits as without it where a gradient knows its weights, else refused."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

import delock
from delock.launch.processes import run_processes
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, PACI, ZB1P, Interlocking, Method, OneFOneB, PipeDream2BW
from delock.nets import build
from delock.nets.gpt import gpt
from delock.options import Execution, Placement
from delock.partition.layers import layers
from delock.run.checks import refuse_recomputation
from delock.run.job import StageJob
from delock.run.prepare import prepare
from delock.run.request import Request
from delock.tensors import map_tensors
from test_memory import allocated

from chain import Chain, seeded, vectors
from harness import enough, inline, jobs, one_of_each, plainly, same_state, same_tree, whole_and_resumed
from workloads import sgd

pytestmark = pytest.mark.usefixtures("own_random")

METHODS: list[Method] = [
    BP(accumulate=2),
    DDG(),
    DDG(micro_batches=2),
    FDG(beta=0.5),
    ADL(2),
    FR(),
    DSP(),
    *(DDG(micro_batches=2, ahead="part"), FDG(ahead="mean"), FR(ahead="part")),
    *(BP(behind=1), PipeDream2BW(micro_batches=3)),
    *(OneFOneB(micro_batches=2), ZB1P(micro_batches=2)),
    *(DGL(), Interlocking(n_wise=2), Interlocking(n_wise=2, combine="sum", send="late")),
]


class Checkpointed(nn.Module):
    """Drops the activations of a module, and computes them again in the backward."""

    def __init__(self, inner: nn.Module, *, reentrant: bool = False) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Any) -> Any:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


class Fading(nn.Module):
    """A buffer that every forward reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(0.9)
        return x * self.scale.clone()


class Scaled(Fading):
    """A part that is no module of its own."""

    def __init__(self, dropped: bool) -> None:
        super().__init__()
        self.weight, self.dropped = nn.Parameter(torch.randn(6, 6)), dropped

    def part(self, x: Tensor) -> Tensor:
        return super().forward(linear(x, self.weight))

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.part, x, use_reentrant=False) if self.dropped else self.part(x)  # type: ignore[no-any-return]


def network(dropped: bool, *, fading: bool = True) -> list[nn.Module]:
    """Three stages with batch norm, dropout, and a buffer that counts; their weights are equal."""
    wrap: Callable[[nn.Module], nn.Module] = Checkpointed if dropped else nn.Sequential

    def part() -> nn.Module:
        normed = wrap(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3)))
        return nn.Sequential(normed, Scaled(dropped), nn.Tanh()) if fading else nn.Sequential(normed)

    return seeded(lambda: [part() for _ in range(3)])  # type: ignore[no-any-return]


def fit(model: Any, method: Method, data: Any = None, **options: Any) -> tuple[dict[str, Tensor], list[float]]:
    """The state and the losses after a short run in one process, a stage per module unless it says otherwise."""
    options = {"loss": nn.functional.mse_loss, "optimizer": sgd, "epochs": 1, "workers": "inline"} | options
    result = delock.fit(model, vectors(9, 6, 8) if data is None else data, method=method, **options)
    parts = nn.ModuleList(model) if isinstance(model, list) else model
    return {name.replace(".inner.", ".0."): value for name, value in parts.state_dict().items()}, result.losses


def assert_equal(one: tuple[dict[str, Tensor], list[float]], other: tuple[dict[str, Tensor], list[float]]) -> None:
    """States and losses are the same bits."""
    assert one[1] == other[1]
    assert same_state(one[0], other[0])


@pytest.mark.parametrize("method", one_of_each(METHODS), ids=str)
def test_the_same_bits_as_without(method: Method) -> None:
    assert_equal(fit(network(True), method), fit(network(False), method))


@pytest.mark.parametrize("execution", [Execution(amp="bf16"), Execution(chunks=2)], ids=["amp", "chunks"])
def test_the_same_bits_in_bf16_and_in_chunks(execution: Execution) -> None:
    assert_equal(
        fit(network(True, fading=False), DDG(), execution=execution), fit(network(False, fading=False), DDG(), execution=execution)
    )


# ---- ordinary networks ---------------------------------------------------------------------------------------------------------------


def token_loss(out: Tensor, targets: Tensor) -> Tensor:
    return cross_entropy(out.flatten(0, 1), targets.flatten())


def transformer(dropped: bool) -> tuple[list[nn.Module], Any, Any]:
    """A GPT whose blocks are checkpointed, data, and its loss."""
    parts = [layer.module for layer in layers(gpt(11, depth=4, width=16, heads=2, context=8, dropout=0.2))]
    data = seeded(lambda: [(x, x.roll(-1, 1)) for x in torch.randint(11, (8, 4, 8))])
    return [Checkpointed(part) if dropped and 0 < i < 5 else part for i, part in enumerate(parts)], data, token_loss


def resnet(dropped: bool) -> tuple[list[nn.Module], Any, Any]:
    """A ResNet whose blocks are checkpointed, data, and its loss."""
    parts = [layer.module for layer in layers(build("resnet8", classes=3, in_channels=3, image_size=8))]
    data = seeded(lambda: list(zip(torch.randn(8, 4, 3, 8, 8), torch.randint(3, (8, 4)), strict=True)))
    return [Checkpointed(part) if dropped and 0 < i < 4 else part for i, part in enumerate(parts)], data, cross_entropy


LATE = (DDG(), FR(), FDG(ahead="part"), DDG(micro_batches=2, ahead="mean"))


@pytest.mark.parametrize(("net", "method"), enough(itertools.product((transformer, resnet), LATE), together=1), ids=plainly)
def test_a_gpt_and_a_resnet(net: Callable[[bool], tuple[list[nn.Module], Any, Any]], method: Method) -> None:
    seen = []
    for dropped in (True, False):
        model, data, loss = net(dropped)
        state, losses = fit(model, method, data, loss=loss, cuts=[2, 4])
        seen.append(({name.replace(".0.", "."): value for name, value in state.items()}, losses))
    assert seen[0][1] == seen[1][1]
    for one, other in zip(seen[0][0].values(), seen[1][0].values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("net", "method"),
    [
        (transformer, FDG(ahead="part")),
        pytest.param(resnet, DDG(), marks=pytest.mark.slow),
        pytest.param(transformer, FR(), marks=pytest.mark.slow),
    ],
    ids=plainly,
)
def test_processes_equal_one(net: Callable[[bool], tuple[list[nn.Module], Any, Any]], method: Method) -> None:
    seen = []
    for workers in ("inline", "processes"):
        model, data, loss = net(True)
        seen.append(fit(model, method, data, loss=loss, cuts=[3], workers=workers))
    assert_equal(*seen)


def test_the_predicted_memory_is_that_of_a_checkpointed_network() -> None:
    parts = [layer.module for layer in layers(gpt(32, depth=4, width=64, heads=4, context=64))]
    data = [(x, x) for x in torch.randint(32, (9, 32, 64))]
    measured, predicted, plain_sgd = [], [], partial(torch.optim.SGD, lr=0.01)
    for model in (parts, [Checkpointed(part) if 0 < i < 5 else part for i, part in enumerate(parts)]):
        request = Request(model, delock.data.as_loader(data), None, token_loss, FDG(), plain_sgd, cuts=[3], epochs=1,
                          placement=Placement(link="gloo"))  # fmt: skip
        prepared = prepare(request)
        predicted.append([stage.live for stage in prepared.started().stages])
        measured.append(run_processes(allocated, prepared.jobs()))
    assert predicted[1] == pytest.approx(measured[1], rel=0.1)
    assert measured[1][0] < 0.5 * measured[0][0]


# ---- saved in the middle -------------------------------------------------------------------------------------------------------------


def fading_jobs(method: Method, wrap: Callable[[nn.Module], nn.Module]) -> list[StageJob]:
    """Jobs whose stages have batch norm, and a buffer that counts."""
    made = jobs("conv", 3, method, evaluate=False)
    return [replace(job, module=nn.Sequential(wrap(nn.Sequential(job.module, Fading())))) for job in made]


SAVED = (DDG(), FR(), FDG(ahead="part"), PipeDream2BW(micro_batches=3))


@pytest.mark.parametrize(("method", "stop"), enough(itertools.product(SAVED, (1, 3)), together=1), ids=str)
def test_a_run_goes_on_from_its_saved_state(method: Method, stop: int) -> None:
    whole, resumed, losses = whole_and_resumed(lambda: fading_jobs(method, Checkpointed), stop)
    plain = inline(fading_jobs(method, nn.Sequential))
    assert losses == whole.losses == plain[-1].losses
    for a, b, c in zip(whole.engines, resumed.engines, plain, strict=True):
        same_tree(dict(a.stage.module.state_dict()), dict(b.stage.module.state_dict()))
        same_tree([*a.stage.module.state_dict().values()], [*c.state.values()])


# ---- found once ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropped", [True, False])
def test_a_stage_sees_at_its_first_backward_if_it_computes_again(dropped: bool) -> None:
    chain = Chain(network(dropped), DDG(), vectors(6, 6, 8))
    for _ in chain.steps():
        pass
    for engine in chain.engines:
        assert engine.stage.body.recomputes is dropped
        assert (engine.stage.body.buffers() is not None) is dropped


# ---- refused -------------------------------------------------------------------------------------------------------------------------

MIXED = [PACI(), PACI(micro_batches=2, ahead="part"), FDG(at="mixed"), ADL(2, at="mixed"), FDG(at="mixed", ahead="part")]


@pytest.mark.parametrize("method", MIXED, ids=str)
def test_mixed_is_refused_before_the_start(method: Method) -> None:
    model = [*network(False)[:2], *network(True)[2:]]
    before = map_tensors(Tensor.clone, tuple(nn.ModuleList(model).state_dict().values()))
    with pytest.raises(delock.UsageError, match=r'layer 2 \(2, Sequential\) computes activations again .* use at="stash" .* ddg'):
        fit(model, method)
    assert all(torch.equal(a, b) for a, b in zip(before, nn.ModuleList(model).state_dict().values(), strict=True))


def test_a_part_that_is_no_module_is_noticed_too() -> None:
    with pytest.raises(delock.UsageError, match=r"layer 1 .* computes activations again"):
        fit([nn.Linear(6, 6), Scaled(True), nn.Linear(6, 6)], FDG(at="mixed"))


def test_mixed_is_refused_by_a_stage_that_was_not_tried() -> None:
    chain = Chain(network(True), FDG(at="mixed"), vectors(6, 6, 8))
    with pytest.raises(delock.UsageError, match="stage 2 computes activations again"):
        list(chain.steps())


@pytest.mark.parametrize("place", [0, 1])
def test_the_reentrant_form_is_refused_with_the_remedy(place: int) -> None:
    model: list[nn.Module] = [nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)]
    model[place] = Checkpointed(model[place], reentrant=True)
    with pytest.raises(delock.UsageError, match=rf"layer {place} .*give it use_reentrant=False"):
        fit(model, DDG())


def test_captured_ticks_are_refused() -> None:
    with pytest.raises(delock.UsageError, match="captured does not go with activation checkpointing, but layer 1"):
        refuse_recomputation(DDG(), Execution(captured=True), "layer 1")


def test_a_head_that_computes_again() -> None:
    made = [network(dropped, fading=False)[:2] for dropped in (False, True)]
    for heads in made:
        fit(network(False), DGL(), heads=heads)
    plain, dropped = (list(nn.ModuleList(heads).state_dict().values()) for heads in made)
    assert all(torch.equal(a, b) for a, b in zip(plain, dropped, strict=True))
    assert plain[-1] == 9  # batches that the norm has counted
