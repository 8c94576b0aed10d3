"""Interlocking backpropagation against its oracle, the oracle against numbers by hand, and both at their limits: DGL and BP."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from delock.data.iterable import as_loader
from delock.errors import UsageError
from delock.methods import BP, DGL, Interlocking, Method
from delock.plan import RunLength
from delock.run.job import StageJob, StageResult

import oracles
from chain import seeded, vectors
from harness import assert_equal, enough, in_processes, inline, jobs
from oracles import OracleRun
from oracles_local import greedy, n_wise, tiny_heads
from workloads import WORK, batches, sgd, warm_up

Combine = Literal["furthest", "sum", "mean"]
COMBINES: tuple[Combine, ...] = ("furthest", "sum", "mean")
WAYS = ("early", "late")
SAMPLES, BATCH, EPOCHS = 13, 5, 2  # batches of 5, 5 and 3

# Numbers by hand ------------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """x -> p x, elementwise, p a vector of two equal numbers."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.tensor([p, p], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.p


class Last(Scale):
    """The last stage; its logits come as a tuple of one, by which the loss knows them."""

    def forward(self, x: Tensor) -> tuple[Tensor]:  # type: ignore[override]
        return (super().forward(x),)


def forced(out: Tensor | tuple[Tensor], target: Tensor) -> Tensor:
    """Cross-entropy; of the last stage's logits a loss whose gradient is 0.1 in both coordinates."""
    return 0.1 * out[0].sum() if isinstance(out, tuple) else cross_entropy(out, target)


Row = tuple[int, Combine, tuple[float, float], list[tuple[float, float]]]  # N, combine, input, p of every stage after one step

BY_HAND: list[Row] = [
    (1, "furthest", (1, 1), [(1.5, 2.5), (2, 4), (3.4, 3.4)]),
    (2, "furthest", (1, 1), [(0.5, 3.5), (2.2, 2.2), (3.4, 3.4)]),
    (2, "sum", (1, 1), [(0, 4), (1.2, 3.2), (3.4, 3.4)]),
    (2, "mean", (1, 1), [(1, 3), (2.1, 3.1), (3.4, 3.4)]),
    (3, "furthest", (1, 0), [(0.8, 2), (2.2, 3), (3.4, 4)]),
    (2, "furthest", (1, 1), [(0.5, 3.5), (-1, 7), (1, 1), (2.6, 2.6)]),
    (3, "furthest", (1, 1), [(-4, 8), (-1, -1), (1, 1), (2.6, 2.6)]),
]
"""Stages that begin at p = 2, 3, 4 (and 5); target class 1; the auxiliary heads are the identity; SGD with learning rate 1."""


def scales(K: int) -> list[nn.Module]:
    return [*(Scale(2 + k) for k in range(K - 1)), Last(2 + K - 1)]


def headed(N: int, combine: Combine, K: int) -> range:
    """The stages whose head the paper's method has, in words of the paper's and not of the method's own."""
    return range(min(N, K) - 1 if combine == "furthest" else 0, K - 1)


def one_batch(x: tuple[float, float]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.tensor([x], dtype=torch.float64), torch.tensor([1]))]


unit_sgd = partial(torch.optim.SGD, lr=1.0)


def by_engine(
    method: Method, stages: Sequence[nn.Module], heads: dict[int, Any], made: list[Any], *, loss: Any, optimizer: Any
) -> list[StageResult]:
    """These stages, inline, over these batches."""
    common: dict[str, Any] = {"method": method, "length": RunLength(len(made)), "per_epoch": len(made), "schedule": None, "metrics": {}}
    common |= {"K": len(stages), "optimizer": optimizer, "loss": loss, "seed": 7, "names": {}}
    loader, stages, heads = as_loader(made), copy.deepcopy(stages), copy.deepcopy(heads)
    return inline([StageJob(k=k, module=m, train=None if k else loader, head=heads.get(k), **common) for k, m in enumerate(stages)])


def step_by_engine(method: Method, x: tuple[float, float], K: int) -> list[dict[str, Tensor]]:
    """p after one step of the engine."""
    heads = dict.fromkeys(method.headed(K), nn.Identity())
    got = by_engine(method, scales(K), heads, one_batch(x), loss=forced, optimizer=unit_sgd)
    return [stage.state for stage in got]


def assert_by_hand(states: Sequence[dict[str, Tensor]], want: list[tuple[float, float]]) -> None:
    assert [state["p"].tolist() for state in states] == [pytest.approx(p, abs=1e-12) for p in want]


@pytest.mark.parametrize(("N", "combine", "x", "want"), BY_HAND)
def test_the_oracle_gives_the_numbers_by_hand(N: int, combine: Combine, x: tuple[float, float], want: list[tuple[float, float]]) -> None:
    K = len(want)
    heads = {k: nn.Identity() for k in headed(N, combine, K)}
    got, _ = n_wise(scales(K), heads, one_batch(x), N=N, combine=combine, loss=forced, make_optimizer=unit_sgd)
    assert_by_hand(got.states, want)


@pytest.mark.parametrize("send", WAYS)
@pytest.mark.parametrize(("N", "combine", "x", "want"), BY_HAND)
def test_the_engine_gives_the_numbers_by_hand(
    N: int, combine: Combine, x: tuple[float, float], want: list[tuple[float, float]], send: str
) -> None:
    method = Interlocking(n_wise=N, combine=combine, send=send)
    assert_by_hand(step_by_engine(method, x, len(want)), want)


def test_backpropagation_gives_the_numbers_by_hand() -> None:
    assert_by_hand(step_by_engine(BP(), (1, 0), 3), BY_HAND[4][-1])


# The oracle at its limits ---------------------------------------------------------------------------------------------


def oracle(work: str, K: int, N: int, combine: Combine, n: int | None = None, **options: Any) -> tuple[OracleRun, dict[int, Any]]:
    """On the first n batches of a workload, in float64."""
    net, kind, loss = WORK[work]
    made, stages = batches(SAMPLES, BATCH, EPOCHS, kind)[:n], net(K)
    tiny = tiny_heads(stages, made[0][0], torch.float64)
    training = {"make_optimizer": sgd, "make_schedule": warm_up, "seed": 7} | options
    heads = {k: tiny[k] for k in headed(N, combine, K)}
    return n_wise(stages, heads, made, N=N, combine=combine, loss=loss, **training)


@pytest.mark.parametrize("work", ["conv", "tuple"])
@pytest.mark.parametrize("combine", COMBINES)
def test_the_oracle_at_1_is_greedy(work: str, combine: Combine) -> None:
    net, kind, loss = WORK[work]
    made, stages = batches(SAMPLES, BATCH, EPOCHS, kind), net(4)
    tiny = tiny_heads(stages, made[0][0], torch.float64)
    want, tops = greedy(stages, tiny, made, loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=7)
    got, heads = oracle(work, 4, 1, combine)
    assert oracles.gap((got.states, got.losses, got.optimizer_states), (want.states, want.losses, want.optimizer_states)) == 0
    assert oracles.gap([heads[k] for k in range(3)], tops) == 0


@pytest.mark.parametrize("work", ["conv", "tuple"])
def test_the_oracle_at_K_is_backpropagation(work: str) -> None:
    net, kind, loss = WORK[work]
    made = batches(SAMPLES, BATCH, EPOCHS, kind)
    want = oracles.backprop(net(4), made, loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=7)
    got, heads = oracle(work, 4, 4, "furthest")
    assert not heads
    assert oracles.gap((got.states, got.losses, got.optimizer_states), (want.states, want.losses, want.optimizer_states)) == 0


@pytest.mark.parametrize("work", ["conv", "tuple"])
def test_the_oracle_sums_what_the_furthest_of_1_to_N_give(work: str) -> None:
    """In one step of plain gradient descent; the top stages have fewer losses to sum than N."""
    K, N = 4, 3
    names = [[name for name, _ in stage.named_parameters()] for stage in WORK[work][0](K)]
    start = [stage.state_dict() for stage in WORK[work][0](K)]

    def moves(n: int, combine: Combine) -> list[list[Tensor]]:
        run, _ = oracle(work, K, n, combine, 1, make_optimizer=unit_sgd, make_schedule=None)
        return [[run.states[k][name] - start[k][name] for name in names[k]] for k in range(K)]

    furthest = [moves(n, "furthest") for n in range(1, N + 1)]
    total, mean = moves(N, "sum"), moves(N, "mean")
    for k in range(K):
        losses = min(N, K - k)
        want = [torch.stack(parts).sum(0) for parts in zip(*(furthest[n][k] for n in range(losses)), strict=True)]
        assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(total[k], want, strict=True))
        assert all(torch.allclose(a, b / losses, rtol=0, atol=1e-12) for a, b in zip(mean[k], want, strict=True))
        assert all(move.abs().max() > 1e-6 for move in total[k])


# The engine against the oracle ----------------------------------------------------------------------------------------


def run(work: str, K: int, method: Method) -> list[StageResult]:
    return inline(jobs(work, K, method, samples=SAMPLES, batch=BATCH, epochs=EPOCHS, dtype=torch.float64))


@pytest.mark.parametrize(
    ("work", "K", "N", "combine"),
    enough(case for case in itertools.product(("conv", "tuple"), range(2, 6), range(1, 6), COMBINES) if case[2] <= case[1]),
)
def test_the_engine_computes_what_is_written(work: str, K: int, N: int, combine: Combine) -> None:
    want, tops = oracle(work, K, N, combine)
    early, late = (run(work, K, Interlocking(n_wise=N, combine=combine, send=way)) for way in WAYS)
    assert_equal(early, late)
    assert_close(early, want, tops)


def assert_close(got: list[StageResult], want: OracleRun, tops: dict[int, Any]) -> None:
    """To 1e-10 of each tensor's largest entry: stages, heads, momenta, losses."""
    assert oracles.gap([stage.state for stage in got], want.states) <= 1e-10
    assert oracles.gap({k: stage.head for k, stage in enumerate(got) if stage.head}, tops) <= 1e-10
    assert oracles.gap([momenta(stage.optimizer) for stage in got], [momenta(state) for state in want.optimizer_states]) <= 1e-10
    assert oracles.gap(torch.tensor(got[-1].losses, dtype=torch.float64), torch.stack(want.losses)) <= 1e-10


def momenta(state: dict[str, Any] | None) -> dict[int, Tensor]:
    return {n: entry["momentum_buffer"] for n, entry in state["state"].items()} if state else {}


@pytest.mark.parametrize(
    ("work", "K", "N", "combine", "send"),
    [
        ("conv", 3, 2, "furthest", "early"),
        ("tuple", 4, 3, "furthest", "late"),
        ("tuple", 3, 2, "sum", "early"),
        ("conv", 3, 3, "mean", "early"),
    ],
)
def test_processes_equal_one_process(work: str, K: int, N: int, combine: Combine, send: str) -> None:
    method = Interlocking(n_wise=N, combine=combine, send=send)
    assert_equal(in_processes(jobs(work, K, method)), inline(jobs(work, K, method)))


# Stages that are hard to halve ----------------------------------------------------------------------------------------


class Tied(nn.Module):
    """The same weights twice on the way to the input."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.map(torch.tanh(self.map(h)))
        return out


class Shift(nn.Module):
    """h + a, a as large as h: the weights' gradient is the error itself, which is also the one that is passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.full((3, 4), 0.1))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.a


class Aside(nn.Module):
    """h + s, sent as (h, s): the second output has weights behind it and no input."""

    def __init__(self) -> None:
        super().__init__()
        self.map, self.s = nn.Linear(4, 4), nn.Parameter(torch.ones(1, 4))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.map(h), torch.exp(self.s).expand(len(h), 4)


class Twofold(torch.autograd.Function):
    """(h w, h sin w): one operation with two outputs, of which the stage uses the second."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, w)
        return h * w, h * torch.sin(w)

    @staticmethod
    def backward(ctx: Any, *d: Tensor) -> tuple[Tensor, Tensor]:
        h, w = ctx.saved_tensors
        return d[0] * w + d[1] * torch.sin(w), (d[0] * h + d[1] * h * torch.cos(w)).sum(0)


class Second(nn.Module):
    """h sin w."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.linspace(0.2, 1.0, 4))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = Twofold.apply(h, self.w)[1]  # type: ignore[no-untyped-call]
        return out


class Added(nn.Module):
    """A linear map of the sum of what came in, a tensor or some."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(4, 4)

    def forward(self, h: Tensor | tuple[Tensor, ...]) -> Tensor:
        out: Tensor = self.map(h if isinstance(h, Tensor) else sum(h))
        return out


@pytest.mark.parametrize(("hard", "combine", "send"), enough(itertools.product((Tied, Shift, Aside, Second), COMBINES, WAYS)))
def test_stages_that_are_hard_to_halve(hard: type[nn.Module], combine: Combine, send: str) -> None:
    """Below the last stage, so that with every `combine` a loss that trains it is passed on; the optimizer writes to gradients."""
    stages, tiny = seeded(lambda: ([nn.Linear(4, 4), nn.Linear(4, 4), hard(), Added()], [Added(), Added(), Added()]))
    stages, tiny = ([module.double() for module in modules] for modules in (stages, tiny))
    heads, made = {k: tiny[k] for k in headed(3, combine, 4)}, vectors(4, dtype=torch.float64)
    nesterov = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True, foreach=True)
    want, tops = n_wise(stages, heads, made, N=3, combine=combine, loss=mse_loss, make_optimizer=nesterov, seed=7)
    got = by_engine(Interlocking(n_wise=3, combine=combine, send=send), stages, heads, made, loss=mse_loss, optimizer=nesterov)
    assert_close(got, want, tops)


# The engine at its limits ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("work", "K", "send"), enough(itertools.product(("conv", "tuple"), range(1, 6), WAYS)))
def test_at_K_it_is_backpropagation(work: str, K: int, send: str) -> None:
    assert_equal(inline(jobs(work, K, Interlocking(n_wise=K, send=send))), inline(jobs(work, K, BP())))


def test_at_K_it_is_backpropagation_in_processes() -> None:
    assert_equal(in_processes(jobs("conv", 3, Interlocking(n_wise=3))), inline(jobs("conv", 3, BP())))


@pytest.mark.parametrize(("work", "K", "combine", "send"), enough(itertools.product(("conv", "tuple"), (1, 2, 4), COMBINES, WAYS)))
def test_at_1_it_is_decoupled_greedy_learning(work: str, K: int, combine: Combine, send: str) -> None:
    method = Interlocking(n_wise=1, combine=combine, send=send)
    assert_equal(inline(jobs(work, K, method)), inline(jobs(work, K, DGL())))


# Options --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("combine", COMBINES)
def test_heads_that_train_somebody(combine: Combine) -> None:
    for K in range(1, 6):
        for N in range(1, K + 1):
            assert list(Interlocking(n_wise=N, combine=combine).headed(K)) == list(headed(N, combine, K))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"n_wise": 0}, "n_wise"), ({"combine": "nearest"}, "combine.*furthest.*sum.*mean"), ({"send": "half"}, "send.*early.*late")],
)
def test_bad_options(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Interlocking(**options)


def test_more_losses_than_stages() -> None:
    for K in range(1, 5):
        Interlocking(n_wise=K).fits(K)
        with pytest.raises(UsageError, match=f"{K + 1}.*{K}"):
            Interlocking(n_wise=K + 1).fits(K)
