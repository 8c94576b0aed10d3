"""Faults that would give a wrong result without a word: each is refused before the first update, or made to work."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.data.iterable import Batches, as_loader
from delock.errors import StageFailed, UsageError
from delock.methods import METHODS, Interlocking
from delock.options import Checkpoint, Execution, Placement
from delock.records import EvaluationRecord

from points import CLASSES, SGD, broken_loss, fit, network, test_data, train_data, weighted, weights


def unchanged(says: str, model: Any = None, **options: Any) -> None:
    """Expects a refusal, and a model that is as it was."""
    model = model or network()
    before = [value.clone() for value in weights(model)]
    with pytest.raises(UsageError, match=says):
        fit(model, **({"stages": 2} | options))
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


# ---- what would not learn ----------------------------------------------------------------------------------------------------------


def no_optimizer(named: Any) -> Any:
    """Forgets to return what it makes."""
    SGD(named)


OTHER = nn.Parameter(torch.ones(3))

FACTORIES = {
    "none": (no_optimizer, "optimizer factory returned None for the parameters 0.weight"),
    "a schedule": (lambda named: torch.optim.lr_scheduler.StepLR(SGD(named), 1), "returned a StepLR"),
    "weights": (lambda named: named, "returned a list"),
    "foreign": (lambda named: SGD([OTHER]), r"holds a parameter of shape \(3,\) that is not among them"),
    "foreign too": (lambda named: SGD([*(w for _, w in named), OTHER]), r"holds a parameter of shape \(3,\)"),
    "nothing": (lambda named: SGD([{"params": []}]), "holds none of them"),
}


@pytest.mark.parametrize("case", FACTORIES)
def test_an_optimizer_that_would_not_train_its_stage(case: str) -> None:
    factory, says = FACTORIES[case]
    unchanged(says, optimizer=factory)


def test_an_optimizer_that_would_not_train_its_stage_in_processes() -> None:
    unchanged("optimizer factory returned None", optimizer=no_optimizer, workers="processes")


def test_a_factory_that_takes_its_parameters_from_the_whole_model() -> None:
    model = network()
    unchanged("let the factory take its parameters from its argument alone", model, optimizer=lambda named: SGD(model.parameters()))


def test_a_schedule_that_is_none() -> None:
    unchanged("the schedule factory returned None", schedule=lambda optimizer: None)
    unchanged("the schedule factory returned a SGD", schedule=lambda optimizer: optimizer)


def test_an_optimizer_that_would_not_train_is_refused_when_a_run_goes_on(tmp_path: Path) -> None:
    fit(network(), cuts=[4], checkpoint=Checkpoint(tmp_path, every=2))
    for factory, says in FACTORIES.values():
        unchanged(says, optimizer=factory, cuts=[4], checkpoint=Checkpoint(tmp_path, resume="newest"))


def test_a_network_in_which_nothing_learns() -> None:
    unchanged("has no parameter that learns", network().requires_grad_(False))
    unchanged("has no parameter that learns", nn.Sequential(nn.Flatten(), nn.Tanh()))


@pytest.mark.parametrize("layers", [slice(4), slice(4, None)])
def test_one_stage_may_be_frozen(layers: slice) -> None:
    model = network()
    model[layers].requires_grad_(False)
    before = [value.clone() for value in model.parameters()]
    fit(model, cuts=[4])
    changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True)]
    assert changed == [value.requires_grad for value in model.parameters()]


class Scaled(nn.Module):
    """A loss with a temperature that is to be learned."""

    def __init__(self, learns: bool = True) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(CLASSES), requires_grad=learns)

    def forward(self, out: Tensor, target: Any) -> Tensor:
        return weighted(out * self.scale, target)


def penalized(model: nn.Module, out: Tensor, target: Any) -> Tensor:
    return weighted(out, target) + sum(w.square().sum() for w in model.parameters())


@pytest.mark.usefixtures("own_random")
def test_a_loss_that_has_parameters_of_its_own() -> None:
    says = r"the loss computes with a parameter of its own, of shape \(3,\).*let a module hold the model and the loss"
    unchanged(says, loss=Scaled())
    scaled = Scaled()
    unchanged(says, loss=lambda out, target: scaled(out, target))
    model = network()
    unchanged("holds the model, and with it its parameter 0.weight", model, loss=partial(penalized, model))
    fit(loss=Scaled(learns=False))
    learned = [(x, {**y, "weight": y["weight"].requires_grad_()}) for x, y in train_data()]
    fit(network(), learned, cuts=[4])  # not the loss's own


# ---- modes -------------------------------------------------------------------------------------------------------------------------


def fixed_norm(model: nn.Sequential) -> bool:
    """Says whether the statistics of the network's BatchNorm stay as they are in a run that evaluates, too."""
    before, modes = model[1].running_mean.clone(), [one.training for one in model.modules()]
    fit(model, test=test_data(), cuts=[4])
    assert [one.training for one in model.modules()] == modes  # as the caller had them
    return torch.equal(model[1].running_mean, before)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_module_in_eval_mode_stays_so_in_a_model_that_trains(workers: str) -> None:
    model, before = network(), network()[1].running_mean
    model[1].eval()
    fit(model, cuts=[4], test=test_data(), workers=workers)
    assert torch.equal(model[1].running_mean, before)
    assert [one.training for one in model] == [i != 1 for i in range(len(model))]


@pytest.mark.usefixtures("own_random")
def test_the_numbers_of_a_fixed_norm_are_those_of_the_plain_loop() -> None:
    ours, plain, data = network(0.0), network(0.0), list(train_data())
    ours[1].eval()
    plain[1].eval()
    fit(ours, data, cuts=[4], method="bp", epochs=1)
    optimizer = SGD(plain.parameters())
    for x, y in data:
        optimizer.zero_grad()
        weighted(plain(x), y).backward()
        optimizer.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(weights(ours), weights(plain), strict=True))


@pytest.mark.usefixtures("own_random")
def test_a_model_that_is_all_in_eval_mode_is_trained_whole() -> None:
    assert not fixed_norm(network().eval())
    assert not fixed_norm(nn.Sequential(*network().eval()))  # a new Sequential is in training mode, its parts are not
    grown = network().eval()
    grown[6] = nn.Linear(8, CLASSES)
    assert not fixed_norm(grown)


def test_a_list_of_modules_has_the_modes_of_its_modules() -> None:
    first, second = network()[:4].eval(), network()[4:]
    before = first[1].running_mean.clone()
    fit([first, second])
    assert torch.equal(first[1].running_mean, before)


def test_a_fixed_norm_takes_a_single_sample() -> None:
    model, data = network(), train_data(1)
    model[1].eval()
    fit(model, data, cuts=[4], batches=2, epochs=None)


# ---- runs that fail ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_run_that_fails_leaves_the_model_as_it_was(workers: str) -> None:
    model = network()
    before, modes = [value.clone() for value in weights(model)], [one.training for one in model.eval().modules()]
    with pytest.raises(StageFailed, match="the culprit's own words"):
        fit(model, cuts=[4], loss=broken_loss, workers=workers)
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))
    assert [one.training for one in model.modules()] == modes


@pytest.mark.usefixtures("own_random")
def test_a_run_that_fails_leaves_the_heads_as_they_were() -> None:
    head = nn.Linear(8, CLASSES)
    before = head.weight.detach().clone()
    with pytest.raises(StageFailed, match="the culprit's own words"):
        fit(network(), cuts=[4], loss=broken_loss, method="dgl", heads=[head])
    assert torch.equal(head.weight, before)
    fit(network(), cuts=[4], method="dgl", heads=[head])
    assert not torch.equal(head.weight, before)


def test_a_run_that_is_interrupted_leaves_the_model_as_it_was() -> None:
    def interrupted(event: object) -> None:
        if isinstance(event, EvaluationRecord):
            raise KeyboardInterrupt

    model, before = network(), weights(network())
    with pytest.raises(KeyboardInterrupt):
        fit(model, cuts=[4], callbacks=[interrupted])
    assert all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


class Counting(nn.Module):
    """Has a buffer in no state dict, and one that is there only after the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.register_buffer("first", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen += len(x)
            self.first = x.detach().mean(0) if self.first is None else self.first
        return x


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_every_buffer_comes_back_to_the_model(workers: str) -> None:
    model = nn.Sequential(Counting(), nn.Linear(6, 8), nn.Linear(8, CLASSES))
    fit(model, cuts=[1], epochs=1, workers=workers)
    assert model[0].seen == 22
    assert model[0].first.shape == (6,)


# ---- data --------------------------------------------------------------------------------------------------------------------------


def points(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=draw), torch.randint(CLASSES, (n,), generator=draw)) for n in sizes]


class Unsized(list[Any]):
    """Batches whose sizes are found out by reading them."""

    def sizes(self) -> None:
        return None

    def epoch(self, e: int) -> Iterator[Any]:
        return iter(self)


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_an_empty_batch_of_the_test_data_is_passed_over(workers: str) -> None:
    full = points(4, 3)
    tests = [full, [full[0], *points(0), full[1]]]
    options = {"loss": cross_entropy, "cuts": [4], "metrics": {"again": cross_entropy}, "workers": workers}
    found = [fit(network(), points(6, 6), test, **options)[1].evaluations for test in tests]
    assert [(e.test_loss, e.metrics) for e in found[0]] == [(e.test_loss, e.metrics) for e in found[1]]
    assert found[0][0].test_loss == pytest.approx(found[0][0].metrics["again"])


@pytest.mark.parametrize("test", [points(0), Unsized(points(0, 0))], ids=["known", "unknown"])
def test_test_data_without_a_sample(test: Any) -> None:
    unchanged("the test data has no samples", train=points(6), test=test, loss=cross_entropy)


class Same:
    """Gives the same generator to everyone who iterates it."""

    def __init__(self) -> None:
        self.own = (batch for batch in points(4, 4, 4, 4))

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Any]:
        return self.own


def test_data_that_can_be_read_only_once() -> None:
    says = r"the data \(.*\) can be read only once.*give a list, a DataLoader, or an object whose __iter__ begins anew"
    for one in (iter(points(4)), (batch for batch in points(4)), zip(*zip(*points(4, 4), strict=True), strict=True)):
        with pytest.raises(UsageError, match=says):
            as_loader(one, batches_per_epoch=1)
        with pytest.raises(UsageError, match=says):
            as_loader(Batches(one, weight=len), batches_per_epoch=1)
        unchanged(says, train=one)
        unchanged(says, train=points(4), test=one)
    unchanged(says, train=Same(), loss=cross_entropy)


class Masked(nn.Module):
    """Takes (mask, x) or (x, mask), and mixes features by the mask."""

    def forward(self, given: tuple[Tensor, Tensor]) -> Tensor:
        mask, x = sorted(given, key=lambda one: one.shape[0] != 6)
        return x @ mask


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("method", ["bp", "gpipe"])
def test_the_place_of_a_mask_among_the_inputs_changes_nothing(method: str) -> None:
    mask, own = torch.rand(6, 6), points(8, 4)
    ends = nn.Linear(6, 5), nn.Linear(5, CLASSES)
    models, found = [nn.Sequential(Masked(), *copy.deepcopy(ends)) for _ in range(2)], []
    for model, first in zip(models, (True, False), strict=True):
        data = [((mask, x) if first else (x, mask), y) for x, y in own]
        found.append(fit(model, data, data, cuts=[2], method=method, loss=cross_entropy)[1])
    assert all(torch.equal(a, b) for a, b in zip(weights(models[0]), weights(models[1]), strict=True))
    assert [run.samples for run in found] == [24, 24]
    assert found[0].losses == found[1].losses
    assert found[0].evaluations[-1].test_loss == found[1].evaluations[-1].test_loss


@pytest.mark.usefixtures("own_random")
def test_chunks_of_a_mask_are_refused() -> None:
    data = [((torch.ones(6, 6), x), y) for x, y in points(8)]
    model = nn.Sequential(Masked(), nn.Linear(6, 5), nn.Linear(5, CLASSES))
    unchanged("chunks cut the rows of the first tensor", model, train=data, loss=cross_entropy, execution=Execution(chunks=2))


# ---- heads -------------------------------------------------------------------------------------------------------------------------


def heads(n: int) -> list[nn.Module]:
    return [nn.Linear(8, CLASSES) for _ in range(n)]


HEADS = {
    "dgl": (2, "dgl in 3 stages needs 2 auxiliary heads, for stages 0, 1, but"),
    "furthest": (1, "interlocking in 3 stages needs 1 auxiliary heads, for stage 1, but"),
    "sum": (2, "interlocking in 3 stages needs 2 auxiliary heads, for stages 0, 1, but"),
    "whole": (0, "interlocking in 3 stages needs 0 auxiliary heads, for no stage, but"),
}


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("case", HEADS)
def test_as_many_heads_are_given_as_the_method_uses(case: str) -> None:
    n, says = HEADS[case]
    methods = {"furthest": Interlocking(), "sum": Interlocking(combine="sum"), "whole": Interlocking(n_wise=3)}
    options = {"method": methods.get(case, case), "cuts": [2, 4]}
    for wrong in {0, n - 1, n + 1} - {n, -1}:
        with pytest.raises(UsageError, match=f"{says} {wrong} w(as|ere) given"):
            fit(network(), heads=heads(wrong), **options)
    fit(network(), heads=heads(n), **options)


@pytest.mark.usefixtures("own_random")
def test_a_head_for_two_stages_is_refused() -> None:
    one = heads(1)[0]
    with pytest.raises(UsageError, match="the auxiliary heads of stages 0 and 1 share a parameter"):
        fit(network(), cuts=[2, 4], method="dgl", heads=[one, one])
    with pytest.raises(UsageError, match="the auxiliary head of stage 1 is a str, but it must be a module"):
        fit(network(), cuts=[2, 4], method="dgl", heads=[one, "mlp"])


# ---- options -----------------------------------------------------------------------------------------------------------------------

CHOSEN: dict[str, tuple[type[Any], tuple[Any, ...]]] = {
    **{f"Execution.{name}": (Execution, ("fp16", "FP16", "", None, 16)) for name in ("amp", "layout")},
    "Placement.link": (Placement, ("nccl", "", None, 1)),
    **{
        f"{name}.{option.name}": (method, ("nonsense", "", 0.5 if isinstance(option.default, int) else "None"))
        for name, method in METHODS.items()
        for option in dataclasses.fields(method)
    },
}


@pytest.mark.parametrize("case", CHOSEN)
def test_no_option_takes_a_word_that_it_does_not_know(case: str) -> None:
    group, words = CHOSEN[case]
    for word in words:
        with pytest.raises(UsageError, match=r"but (it|every lag) must"):
            group(**{case.split(".")[-1]: word})


@pytest.mark.parametrize("seed", [2**64, -1, 1.5, "7", True])
def test_a_seed_that_is_none(seed: Any) -> None:
    with pytest.raises(UsageError, match="seed is"):
        fit(seed=seed)
