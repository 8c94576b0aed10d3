"""Batches in parts, older weights and weights ahead against their oracles: the engine computes what the equations say."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, PACI, ZB1P, GPipe, Method, PipeDream2BW
from delock.run.job import StageResult

import oracles
import oracles_parts
import papers
from harness import assert_equal, enough, inline, jobs, options_of, same_state
from oracles import MakeOptimizer, OracleRun
from workloads import WORK, batches, sgd, warm_up

SAMPLES, BATCH, EPOCHS = 12, 5, 5  # batches of 5, 5 and 2 samples: three or four parts of 2 samples leave some empty


def adamw(weights: Sequence[Tensor]) -> torch.optim.AdamW:
    """A rate and a decay that show."""
    return torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.1)


OPTIMIZERS: dict[str, MakeOptimizer] = {"sgd": sgd, "adamw": adamw}


def run(method: Method, K: int, work: str, optimizer: Any = sgd, **more: Any) -> list[StageResult]:
    options = {"samples": SAMPLES, "batch": BATCH, "epochs": EPOCHS, "dtype": torch.float64, "evaluate": False} | more
    made = jobs(work, K, method, optimizer=optimizer, **options)
    return inline(made)


def oracle(method: Method, K: int, work: str, optimizer: MakeOptimizer) -> OracleRun:
    net, kind, loss = WORK[work]
    options: dict[str, Any] = {"M": method.micro_batches, "ahead": getattr(method, "ahead", None)}
    compute: Callable[..., OracleRun] = oracles_parts.delayed_in_parts
    if isinstance(method, PipeDream2BW):
        compute = oracles_parts.two_versions
    elif isinstance(method, BP):
        compute = partial(oracles_parts.uniformly_behind, behind=method.behind)
    else:
        paper = papers.oracle_options(method, K)
        options |= {"A": paper.pop("M")} | paper
    data = batches(SAMPLES, BATCH, EPOCHS, kind)
    return compute(net(K), data, loss=loss, make_optimizer=optimizer, make_schedule=warm_up, seed=7, **options)


def assert_close(got: list[StageResult], want: OracleRun) -> None:
    """To 1e-10 of each tensor's largest entry."""
    assert oracles.gap([stage.state for stage in got], want.states) <= 1e-10
    mine, theirs = ([of["state"] for of in states if of] for states in ([stage.optimizer for stage in got], want.optimizer_states))
    assert oracles.gap(mine, theirs) <= 1e-10
    assert oracles.gap(torch.tensor(got[-1].losses, dtype=torch.float64), torch.stack(want.losses)) <= 1e-10


Row = Callable[[int, int], Method]  # of K and M

ROWS: list[Row] = [
    *(lambda K, M, ahead=ahead: DDG(M, ahead) for ahead in (None, "part", "mean")),
    *(lambda K, M, ahead=ahead: FR(M, ahead) for ahead in (None, "part", "mean")),
    lambda K, M: FDG(micro_batches=M),
    lambda K, M: FDG(0.5, micro_batches=M, ahead="mean"),
    lambda K, M: FDG(order="backward-first", micro_batches=M, ahead="part"),
    lambda K, M: FDG(0.5, "mixed", micro_batches=M),
    lambda K, M: FDG(at="mixed", micro_batches=M, ahead="part"),
    lambda K, M: FDG(at="mixed", order="backward-first", micro_batches=M, ahead="mean"),
    lambda K, M: ADL(2, micro_batches=M),
    lambda K, M: ADL(2, order="backward-first", micro_batches=M, ahead="part"),
    lambda K, M: ADL(4, reduce="sum", at="mixed", micro_batches=M),
    lambda K, M: ADL(2, at="mixed", micro_batches=M, ahead="mean"),
    *(lambda K, M, ahead=ahead: replace(papers.uneven_dsp(K), micro_batches=M, ahead=ahead) for ahead in (None, "part", "mean")),
    lambda K, M: DDG(M, accumulate=2),
    lambda K, M: DDG(M, "part", 3, "sum"),
    lambda K, M: FR(M, "mean", 2),
    lambda K, M: FR(M, accumulate=4, reduce="sum"),
    lambda K, M: replace(papers.uneven_dsp(K), micro_batches=M, accumulate=2, ahead="part"),
    lambda K, M: replace(papers.uneven_dsp(K), micro_batches=M, accumulate=3, reduce="sum"),
    *(lambda K, M, ahead=ahead: PACI(M, ahead) for ahead in (None, "part", "mean")),
    *(lambda K, M, ahead=ahead: PipeDream2BW(min(K, 4), ahead) for ahead in (None, "part", "mean")),
    *(lambda K, M, n=n, ahead=ahead: BP(M, n, ahead) for n, ahead in ((1, None), (2, "part"), (3, None), (1, "mean"))),
]

CASES = [
    (row(K, M := (K + i) % 4 + 1), K, ("conv", "tuple")[(i // 2 + K // 2) % 2], ("sgd", "adamw")[(i + K + (M > 2)) % 2])
    for i, row in enumerate(ROWS)
    for K in range(1, 6)
]


def test_all_pairs_occur() -> None:
    """A row of the table, K, M, the workload and the optimizer take turns."""
    found = [(i // 5, K, method.micro_batches, work, optimizer) for i, (method, K, work, optimizer) in enumerate(CASES)]
    for a, b in itertools.combinations(zip(*found, strict=True), 2):
        assert set(zip(a, b, strict=True)) == set(itertools.product(a, b))


@pytest.mark.parametrize(
    ("method", "K", "work", "optimizer"),
    [
        *enough((case for case in CASES if case[1] == 3), of=lambda method, K, *more: (*options_of(method), *more)),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES if case[1] != 3),
    ],
    ids=str,
)
def test_parts(method: Method, K: int, work: str, optimizer: str) -> None:
    made = OPTIMIZERS[optimizer]
    assert_close(run(method, K, work, made), oracle(method, K, work, made))


# -- equal to the last bit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "A", "backward_first", "reduce"),
    enough(itertools.product(("stash", "replay", "mixed"), (1, 2, 3), (False, True), ("mean", "sum"))),
)
def test_undivided_batches_are_the_oracle_of_before(at: Any, A: int, backward_first: bool, reduce: Any) -> None:
    net, kind, loss = WORK["tuple"]
    options: dict[str, Any] = {"loss": loss, "make_optimizer": sgd, "make_schedule": warm_up, "delays": [4, 2, 0], "at": at}
    options |= {"backward_first": backward_first, "reduce": reduce, "shrink": 0.5}
    data = batches(SAMPLES, BATCH, EPOCHS, kind)
    old, new = oracles.delayed(net(3), data, M=A, **options), oracles_parts.delayed_in_parts(net(3), data, A=A, **options)
    assert oracles.gap(vars(new), vars(old)) == 0


@pytest.mark.parametrize(("K", "M"), enough(itertools.product(range(1, 5), range(1, 6)), together=1))
def test_zb1p_is_gpipe(K: int, M: int) -> None:
    """With batch norm, dropout, empty parts, on both workloads and in both precisions by turns."""
    one, other = ("conv", "tuple")[:: (-1) ** (K + M)]
    for work, dtype in ((one, torch.float32), (other, torch.float64)):
        got, want = (run(method, K, work, dtype=dtype, epochs=2) for method in (ZB1P(M), GPipe(M)))
        assert_equal(got, want)


@pytest.mark.parametrize("M", [3, *(pytest.param(M, marks=pytest.mark.slow) for M in (1, 2, 4))])
def test_one_stage_is_plain_training_in_parts(M: int) -> None:
    """Nothing is late, so that nothing is ahead either."""
    short = {"dtype": torch.float32, "epochs": 2}
    want = run(GPipe(M), 1, "conv", **short)
    late = [method(micro_batches=M, ahead=ahead) for method in (DDG, FR, FDG, DSP, PACI) for ahead in (None, "part", "mean")]
    for method in (*late, ADL(1, micro_batches=M, ahead="mean"), FDG(at="mixed", order="backward-first", micro_batches=M, ahead="part")):
        assert_equal(run(method, 1, "conv", **short), want)


@pytest.mark.parametrize(("K", "ahead"), enough(itertools.product(range(1, 5), (None, "mean")), together=1))
def test_2bw_is_backpropagation_one_update_behind(K: int, ahead: Any) -> None:
    got, want = (run(method, K, "conv", dtype=torch.float32) for method in (PipeDream2BW(3, ahead), BP(3, 1, ahead)))
    assert all(same_state(a.state, b.state) for a, b in zip(got, want, strict=True))
    assert got[-1].losses == want[-1].losses


class Offset(nn.Module):
    """Returns its output and one of its weights: the weight itself, or the result of an op on it."""

    def __init__(self, *, as_it_is: bool) -> None:
        super().__init__()
        self.linear, self.offset, self.as_it_is = nn.Linear(4, 4), nn.Parameter(torch.ones(4)), as_it_is

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        offset = self.offset.expand(len(x), 4)
        return self.linear(x), offset if self.as_it_is else offset * 1.0


class Product(nn.Module):
    """Multiplies what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = self.linear(pair[0] * pair[1])
        return out


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    "method", [PACI(2, "part"), PACI(2, "mean"), FDG(at="mixed", ahead="part"), DDG(2, "part"), FR(2, "part")], ids=str
)
def test_a_weight_in_a_message_is_that_of_the_forward(method: Method) -> None:
    draw = torch.Generator().manual_seed(0)
    data = [(torch.randn(8, 4, generator=draw), torch.randint(3, (8,), generator=draw)) for _ in range(8)]
    losses = []
    for as_it_is in (False, True):
        torch.manual_seed(0)
        model = [Offset(as_it_is=as_it_is), Product()]
        made = partial(torch.optim.SGD, lr=0.5)
        losses.append(
            delock.fit(model, data, loss=cross_entropy, optimizer=made, method=method, stages=2, epochs=1, workers="inline").losses
        )
    assert losses[0] == losses[1]
