"""Optimizers and schedules that are given as objects: stages have what plain PyTorch has with them, and they stay as they are."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.nn.functional import cross_entropy
from torch.optim import lr_scheduler as rates
from torch.optim.swa_utils import SWALR

import delock
from delock.engine.graphs.sgd import capturable
from delock.memory.optimizer import optimizer_bytes
from delock.methods import ADL, BP, DDG, DGL, FDG, FR, GPipe, Interlocking, Method
from delock.ops import Update
from delock.optim.objects import per_stage
from delock.stage.learner import Learner

import restaging
from harness import enough, plainly
from points import network as points_network
from points import train_data, weighted

pytestmark = pytest.mark.usefixtures("own_random")

Make = Callable[[Any], optim.Optimizer]
Rate = Callable[[Any], Any]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(6, 6), nn.Tanh())), nn.Linear(6, 3))


def data(n: int = 7) -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 6, generator=g), torch.randint(3, (5,), generator=g)) for _ in range(n)]


def groups(model: nn.Module, least: int = 2) -> list[dict[str, Any]]:
    """The first two layers, and the others: with three stages each group is empty on some."""
    low, high = (
        [p for n, p in model.named_parameters() if n.startswith(("0", "2")) is first and p.dim() >= least] for first in (True, False)
    )
    return [{"params": low, "lr": 0.02}, {"params": high}]


def by_hand(model: nn.Module, made: optim.Optimizer, rate: Any = None, clip: float = 0.0) -> dict[str, Tensor]:
    """Trains in plain PyTorch."""
    for x, y in data():
        model.zero_grad()
        cross_entropy(model(x), y).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        made.step()
        if rate:
            rate.step()
    return model.state_dict()


fit = partial(delock.fit, loss=cross_entropy, method="bp", epochs=1, workers="inline")


def unlike(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert list(one) == list(other)
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def state(one: Any) -> Any:
    return copy.deepcopy(one.state_dict())


KINDS: list[Make] = [
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.Adamax,
    optim.Adagrad,
    optim.Adadelta,
    optim.RMSprop,
]
KINDS += [
    optim.Rprop,
    optim.ASGD,
    optim.Adafactor,
    optim.Muon,
    partial(delock.optim.SCAdamW, tau=0.7),
    partial(delock.optim.SCSGD, tau=0.7),
]
KINDS += [
    partial(optim.Adam, foreach=True),
    partial(optim.AdamW, fused=True),
    partial(optim.SGD, momentum=0.9, nesterov=True, weight_decay=0.1),
]


@pytest.mark.parametrize(("make", "K"), enough(itertools.product(KINDS, (1, 3)), together=1), ids=plainly)
def test_an_object_is_plain_pytorch_with_that_object(make: Make, K: int) -> None:
    plain, model = network(), network()
    want = by_hand(plain, make(groups(plain), lr=0.01))  # type: ignore[call-arg]
    given = make(groups(model), lr=0.01)  # type: ignore[call-arg]
    before = state(given)
    fit(model, data(), optimizer=given, stages=K)
    assert unlike(model.state_dict(), want) == []
    assert unlike(model.state_dict(), network().state_dict())
    assert str(state(given)) == str(before)
    assert {id(p) for group in given.param_groups for p in group["params"]} <= {id(p) for p in model.parameters()}


def halves(n: int) -> float:
    return 0.5**n


def still(n: int) -> float:
    return 1.0


def warm(o: Any) -> list[Any]:
    return [rates.LinearLR(o, 0.1, total_iters=2), rates.CosineAnnealingLR(o, 5)]


SCHEDULES: dict[str, Rate] = {
    "a function each": lambda o: rates.LambdaLR(o, [halves, still]),
    "multiplicative": lambda o: rates.MultiplicativeLR(o, halves),
    "cosine": lambda o: rates.CosineAnnealingLR(o, 100),
    "steps": lambda o: rates.MultiStepLR(o, [2, 4]),
    "linear": rates.LinearLR,
    "restarts": lambda o: rates.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: rates.CyclicLR(o, 0.01, 0.1, 2),
    "one cycle": lambda o: rates.OneCycleLR(o, [0.2, 0.1], total_steps=9),
    "warm-up": lambda o: rates.SequentialLR(o, warm(o), [2]),
    "chained": lambda o: rates.ChainedScheduler([rates.ConstantLR(o), rates.ExponentialLR(o, 0.9)]),
    "a chain in a sequence": lambda o: rates.SequentialLR(o, [rates.ChainedScheduler(warm(o)), rates.ExponentialLR(o, 0.9)], [2]),
    "a sequence in a chain": lambda o: rates.ChainedScheduler([rates.SequentialLR(o, warm(o), [1]), rates.ExponentialLR(o, 0.9)]),
    "averaging": lambda o: SWALR(o, 0.01),
}


@pytest.mark.filterwarnings("ignore:Detected call of:UserWarning")  # torch's own, as it makes a sequence of a chain
@pytest.mark.parametrize(("name", "K"), enough(itertools.product(SCHEDULES, (1, 3)), together=1))
def test_a_schedule_is_stepped_as_in_plain_pytorch(name: str, K: int) -> None:
    rate: Rate = SCHEDULES[name]
    plain, model = network(), network()
    momentum = partial(optim.SGD, lr=0.1, momentum=0.9)
    of_plain, given = momentum(groups(plain, 1)), momentum(groups(model, 1))
    want = by_hand(plain, of_plain, rate(of_plain))
    schedule = rate(given)
    before = state(given), str(schedule.state_dict())
    fit(model, data(), optimizer=given, schedule=schedule, stages=K)
    assert unlike(model.state_dict(), want) == []
    assert (state(given), str(schedule.state_dict())) == before


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_session_takes_objects_too(workers: Any) -> None:
    plain, model = network(), network()
    of_plain, given = (optim.SGD(groups(one, 1), lr=0.1, momentum=0.9) for one in (plain, model))
    want = by_hand(plain, of_plain, rates.StepLR(of_plain, 2))
    options: dict[str, Any] = {"loss": cross_entropy, "method": "bp", "workers": workers, "stages": 2}
    with delock.session(model, data()[0], optimizer=given, schedule=rates.StepLR(given, 2), **options) as session:
        for batch in data():
            session.step(batch)
    assert unlike(model.state_dict(), want) == []


def test_a_rate_in_a_tensor_belongs_to_each_stage_alone() -> None:
    plain, model = network(), network()
    of_plain, given = (optim.Adam(one.parameters(), lr=torch.tensor(0.05), foreach=False) for one in (plain, model))
    want = by_hand(plain, of_plain, rates.ExponentialLR(of_plain, 0.5))
    fit(model, data(), optimizer=given, schedule=rates.ExponentialLR(given, 0.5), stages=3)
    assert unlike(model.state_dict(), want) == []
    assert given.param_groups[0]["lr"] == torch.tensor(0.05)


def test_weights_that_no_group_holds_do_not_learn() -> None:
    """Clipping counts their gradients, as torch's does over model.parameters()."""
    plain, model = network(), network()
    want = by_hand(plain, optim.AdamW(plain[-1].parameters(), lr=0.1), clip=0.1)
    fit(model, data(), optimizer=optim.AdamW(model[-1].parameters(), lr=0.1), stages=3, clip=0.1)
    assert unlike(model.state_dict(), want) == []
    assert unlike(model.state_dict(), network().state_dict()) == ["8.weight", "8.bias"]


def named(one: nn.Module) -> optim.Optimizer:
    return optim.SGD(one.named_parameters(), lr=0.1)


def in_parts(parts: list[nn.Module]) -> optim.Optimizer:
    return optim.SGD([p for part in reversed(parts) for p in part.parameters()], lr=0.1)


def test_a_list_of_modules_a_frozen_weight_and_weights_given_by_name() -> None:
    plain, model = network(), network()
    for one in (plain, model):
        one[2].weight.requires_grad_(False)
    want = by_hand(plain, named(plain))
    fit(model, data(), optimizer=named(model), stages=2)
    assert unlike(model.state_dict(), want) == []
    like, _ = per_stage(model, None, None, named(model), None)
    assert like([("8.bias", model[-1].bias)]).param_groups[0]["param_names"] == ["8.bias"]
    parts = [(again := network())[:3], again[3:]]
    again[2].weight.requires_grad_(False)
    fit(parts, data(), optimizer=in_parts(parts))
    assert unlike(again.state_dict(), want) == []


class Tied(nn.Module):
    """Uses one matrix at both ends."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))
        return out


def test_a_tied_weight_of_a_traced_model_is_one() -> None:
    plain, model = Tied(), Tied()
    want = by_hand(plain, optim.Adam(plain.parameters(), lr=0.1))
    fit(model, data(), optimizer=optim.Adam(model.parameters(), lr=0.1), cuts=["last"])
    assert unlike(model.state_dict(), want) == []


class Scaled(nn.Module):
    """A loss with a temperature and a weight per class that learn."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature, self.weight = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(3))

    def forward(self, out: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(out * self.temperature * self.weight, y)


class WithLoss(nn.Module):
    """The model and the loss in one, as docs/api.md has it."""

    def __init__(self, model: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        outputs = self.model(x)
        return {"loss": self.loss(outputs, labels), "outputs": outputs}


@pytest.mark.parametrize("K", [1, 3])
def test_a_loss_that_learns_is_a_part_of_the_model(K: int) -> None:
    plain, model = (WithLoss(network(), Scaled()) for _ in range(2))
    want_of_loss = optim.AdamW(plain.parameters(), lr=0.05)
    for x, y in data():
        plain.zero_grad()
        plain(x, y)["loss"].backward()
        want_of_loss.step()
    result = delock.fit(
        model,
        data(),
        data(2),
        method="bp",
        stages=K,
        optimizer=optim.AdamW(model.parameters(), lr=0.05),
        metrics={"mean": mean_output},
        epochs=1,
        workers="inline",
    )
    assert unlike(model.state_dict(), plain.state_dict()) == []
    assert model.loss.temperature != 1
    assert result.evaluations[-1].metrics.keys() == {"mean"}


def mean_output(found: dict[str, Tensor], labels: Tensor) -> Tensor:
    return found["outputs"].mean()


ADAM = partial(optim.Adam, lr=0.01)
COSINE = partial(rates.CosineAnnealingLR, T_max=9)


@pytest.mark.parametrize("workers", ["inline", "processes"])
@pytest.mark.parametrize("method", [FDG(beta=0.5), DGL()], ids=["fdg", "dgl"])
def test_an_object_is_the_factory_with_its_options(method: Method, workers: str) -> None:
    """Heads that fit builds join the only group, as they join what a factory makes."""
    one, other = points_network(), points_network()
    given = ADAM(one.parameters())
    options: dict[str, Any] = {"loss": weighted, "method": method, "cuts": [4], "epochs": 2, "workers": workers}
    delock.fit(one, train_data(), optimizer=given, schedule=COSINE(given), **options)
    delock.fit(other, train_data(), optimizer=ADAM, schedule=COSINE, **options | {"workers": "inline"})
    assert unlike(one.state_dict(), other.state_dict()) == []


@pytest.mark.parametrize("method", [ADL(), DDG(), FR(), GPipe(2), BP(2), Interlocking(2)], ids=lambda method: method.name)
def test_of_every_kind_of_method(method: Method) -> None:
    one, other = network(), network()
    fit(one, data(), method=method, optimizer=ADAM(one.parameters()), schedule=COSINE, stages=3)
    fit(other, data(), method=method, optimizer=ADAM, schedule=COSINE, stages=3)
    assert unlike(one.state_dict(), other.state_dict()) == []


def test_heads_that_are_given_may_be_among_its_weights() -> None:
    ends = []
    for everything in (True, False, None):
        model, head = network(), network(1)[-1:]
        given = ADAM([*model.parameters(), *head.parameters()] if everything else model.parameters())
        fit(model, data(), method="dgl", optimizer=ADAM if everything is None else given, heads=[head], stages=2)
        ends.append(nn.ModuleList([model, head]).state_dict())
    assert unlike(ends[0], ends[1]) == unlike(ends[0], ends[2]) == []
    assert unlike({"weight": ends[0]["1.8.weight"]}, {"weight": network(1)[-1].weight})


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_which_of_several_groups_a_head_joins_is_not_known(workers: str) -> None:
    model = network()
    with pytest.raises(
        delock.UsageError, match=r"2 parameter groups, and which of them heads\.0\..* joins.*give a factory.*by their names"
    ):
        fit(model, data(), method="dgl", optimizer=optim.SGD(groups(model), lr=0.1), stages=2, workers=workers)


def go_on(folder: Path, K: int, batches: int, lr: float = 0.01) -> nn.Sequential:
    """Saves the run every four batches."""
    model = restaging.network()
    given = optim.Adam(model.parameters(), lr=lr)
    schedule = rates.LinearLR(given, total_iters=9)
    restaging.train(folder, K, batches, model, optimizer=given, schedule=schedule, keeps={"every": 4})
    return model


def test_a_run_goes_on_with_new_objects(tmp_path: Path) -> None:
    whole = go_on(tmp_path / "whole", 3, 11)
    go_on(tmp_path / "parts", 3, 6)
    with pytest.raises(delock.UsageError, match=r"lr of the optimizer was .* when the checkpoint was made"):
        go_on(tmp_path / "parts", 3, 11, lr=0.02)
    assert unlike(go_on(tmp_path / "parts", 3, 11).state_dict(), whole.state_dict()) == []


def test_it_goes_on_in_other_stages_as_with_factories(tmp_path: Path) -> None:
    ends = []
    for factories in (False, True):
        for K, batches in ((3, 6), (2, 11)):
            model = restaging.network()
            given = restaging.ADAM(groups(model, 1))
            made = {"optimizer": Grouped(), "schedule": COSINE} if factories else {"optimizer": given, "schedule": COSINE(given)}
            restaging.train(tmp_path / str(factories), K, batches, model, keeps={"every": 4}, **made)
        ends.append(model.state_dict())
    assert unlike(*ends) == []


class Grouped:
    """The factory that makes those groups of a stage's weights."""

    def __call__(self, own: list[tuple[str, nn.Parameter]]) -> optim.Optimizer:
        low, high = ([p for n, p in own if n.startswith(("0", "2")) is first] for first in (True, False))
        return restaging.ADAM([{"params": low, "lr": 0.02}, {"params": high}])


def test_its_memory_is_predicted() -> None:
    model = network()
    own = list(model.named_parameters())
    like, _ = per_stage(model, None, None, optim.AdamW(groups(model, 1), lr=0.1), None)
    assert optimizer_bytes(like, own, "cpu") == optimizer_bytes(partial(optim.AdamW, lr=0.1), own, "cpu")
    assert optimizer_bytes(like, own[:2], "cpu") == optimizer_bytes(partial(optim.AdamW, lr=0.1), own[:2], "cpu")
    like, _ = per_stage(model, None, None, optim.AdamW(model[0].parameters()), None)
    assert optimizer_bytes(like, own[2:], "cpu") == (0, 0)
    like, _ = per_stage(model, None, None, delock.optim.SCAdamW(model.parameters(), tau=1), None)
    assert optimizer_bytes(like, own, "cpu") is None


def test_a_group_may_be_empty_in_captured_ticks() -> None:
    model = network()
    like, _ = per_stage(model, None, None, optim.SGD(groups(model, 1), lr=0.1), None)
    weight = nn.Parameter(torch.ones(6, 6))
    learner = Learner([("8.weight", weight)], capturable(like), None, False, 1, 2)
    learner.add([torch.ones(6, 6)])
    learner.optimizer.upload_rates()  # type: ignore[union-attr]
    learner.step(Update())
    assert torch.equal(weight.detach(), torch.full((6, 6), 0.9))
