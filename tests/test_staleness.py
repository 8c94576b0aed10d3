"""Staleness as the engine measures it, down to the weights in the Jacobians, against the papers' formulas."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.methods import ADL, BP, DDG, DSP, FDG, FR, PACI, ZB1P, GPipe, Method, OneFOneB, PipeDream2BW
from delock.ops import Update
from delock.plan import Step
from delock.timeline import gradient_staleness, in_flight, layer_staleness

import papers
from chain import Chain
from harness import enough, in_processes, inline, jobs

BATCHES, LAYERS = 25, 8  # the last group of M = 2, 3, 4 is incomplete
GROUPS, EVERY = range(BATCHES), 10
TEST = [(torch.full((2, 1), -1.0), torch.zeros(2))]


class Clock(nn.Module):
    """A layer whose weight counts the updates it has had (see Ticking), and that notes, for the part in its first entry, the count that
    its forwards saw and the count that autograd used. Weights that are s updates ahead count s more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.Parameter(torch.zeros(1))
        self.forwards: dict[int, list[float]] = {}
        self.jacobians: dict[int, float] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.setdefault(int(x[0, 0]), []).append(float(self.updates.detach()))
        y: Tensor = _Look.apply(x, self.updates, self.jacobians)
        return y


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, updates: Tensor, found: dict[int, float]) -> Tensor:
        ctx.save_for_backward(x, updates)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, updates = ctx.saved_tensors
        ctx.found[int(x[0, 0])] = float(updates)
        return grads[0], torch.ones(1), None


class Ticking(torch.optim.Optimizer):
    """Adds one to every weight that has a gradient."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(1)


def ticking(method: Method, K: int) -> Chain:
    """A run of eight tiny layers in K stages; every fifth batch has fewer samples than some methods have parts."""
    bounds = [-(-LAYERS * k // K) for k in range(K + 1)]
    modules = [nn.Sequential(*(Clock() for _ in range(z - a))) for a, z in itertools.pairwise(bounds)]
    M = method.micro_batches
    numbers = [torch.cat([torch.full((len(part), 1), float(g * M + j)) for j, part in enumerate(rows(g).tensor_split(M))]) for g in GROUPS]
    data = [(x, torch.zeros(len(x))) for x in numbers]
    return Chain(modules, method, data, loss=lambda out, y: out.sum(), optimizer=Ticking, test=TEST, every=EVERY)


def rows(g: int) -> Tensor:
    """As many as batch g has samples."""
    return torch.zeros(2 if g % 5 == 4 else 5)


def filled(method: Method) -> list[int]:
    """The parts that have samples."""
    M = method.micro_batches
    return [g * M + j for g in GROUPS for j, part in enumerate(rows(g).tensor_split(M)) if len(part)]


DELAYED: list[Method] = [
    DDG(),
    FR(),
    DSP(),
    DSP(p=2, q=3),
    *(FDG(at=at, order=order) for at in ("stash", "mixed") for order in papers.ORDERS),
    *(ADL(accumulate=M, order=order) for M in (1, 2, 3, 4) for order in papers.ORDERS),
    ADL(accumulate=3, at="mixed", order="backward-first"),
    *(method(accumulate=M) for method in (DDG, FR, DSP) for M in (2, 4)),
    DSP(p=2, q=3, accumulate=3),
]
PARTS: list[Method] = [
    *(DDG(M, ahead) for M, ahead in ((2, None), (4, None), (1, "part"), (3, "part"), (4, "mean"))),
    *(FR(M, ahead) for M, ahead in ((3, None), (2, "part"), (4, "mean"))),
    *(FDG(micro_batches=M) for M in (3, 4)),
    *(FDG(at=at, order="backward-first", micro_batches=M, ahead=a) for at, M, a in (("stash", 3, "part"), ("mixed", 2, "mean"))),
    *(FDG(at="mixed", micro_batches=M, ahead="part") for M in (1, 4)),
    *(ADL(2, micro_batches=3), ADL(3, order="backward-first", micro_batches=2, ahead="part"), ADL(2, micro_batches=1, ahead="mean")),
    *(DSP(p=2, q=3, micro_batches=4), DSP(p=2, q=1, micro_batches=3, ahead="part"), DSP(ahead="mean")),
    *(DDG(2, accumulate=2), DDG(3, "part", 2), FR(2, "mean", 3), DSP(p=2, q=1, micro_batches=3, ahead="part", accumulate=2)),
    *(PACI(M, ahead) for M, ahead in ((1, None), (4, None), (2, "part"), (3, "mean"))),
    *(BP(M, n, ahead) for M, n, ahead in ((1, 1, None), (3, 2, None), (2, 3, "part"), (4, 1, "mean"))),
]


def two_banks(K: int) -> list[Method]:
    """2BW, with as few parts as there can be, and more."""
    return [PipeDream2BW(M, ahead) for M, ahead in ((max(1, K - 1), None), (4, "part"), (5, "mean")) if M >= K - 1]


def reach(method: Method, b: int, k: int, K: int) -> float:
    """The updates by which the Forward of part b is ahead of the version that it uses."""
    ahead, used = getattr(method, "ahead", None), papers.versions(method, b, k, K)[0]
    if ahead is None or used < 2:
        return 0
    if isinstance(method, BP | PipeDream2BW):
        return method.behind if isinstance(method, BP) else 1
    N, late = papers.parts_of_update(method), papers.delays(method, K)[k] - papers.early(method, k, K)
    return late / N if ahead == "mean" else max(0, math.ceil((late - b % N) / N))


@pytest.mark.parametrize(
    ("method", "K"),
    [
        *enough(itertools.product(DELAYED, (1, 3, 5)), together=1),
        *enough(((m, K) for K in (2, 5) for m in (*PARTS, *two_banks(K))), together=1),
    ],
    ids=str,
)
def test_staleness_is_the_formulas_for_every_batch(method: Method, K: int) -> None:
    """In the weights themselves, in what the stage says, in plan and spans, and in the histograms; warm-up and drain included.

    Evaluations, before a Forward and after the drain, are at the newest weights.
    """
    chain = ticking(method, K)
    said: list[dict[int, int]] = [{} for _ in range(K)]
    for k, s in enumerate(chain.stages):

        def look(step: Step, k: int = k, s: Any = s, prepare: Callable[[Step], None] = s.prepare) -> None:
            prepare(step)
            said[k][step.op.batch] = s.version - s.in_flight[step.op.batch].version

        s.prepare = look
    chain.run()
    derivative, parts, real = papers.derivative(method), range(BATCHES * method.micro_batches), filled(method)
    for k, (stage, column) in enumerate(zip(chain.stages, chain.plan().columns, strict=True)):
        used, applied = zip(*(papers.versions(method, b, k, K) for b in parts), strict=True)
        D = papers.delays(method, K)[k]
        staleness = [papers.staleness(method, b, k, K) for b in parts]
        assert [said[k][b] for b in real] == [staleness[b] for b in real]
        assert gradient_staleness(chain.spans[k]) == gradient_staleness(column) == dict(enumerate(staleness))
        assert layer_staleness(chain.spans[k]) == layer_staleness(column) == dict.fromkeys(parts, D)
        log = chain.engines[k].log
        assert (log.staleness, log.layer_staleness) == (Counter(staleness[b] for b in real), Counter({D: len(real)}))
        there = pytest.approx([used[b] + reach(method, b, k, K) for b in real], rel=1e-6)
        for layer in stage.module:
            assert [layer.forwards[b][0] for b in real] == there
            assert [layer.jacobians[b] for b in real] == (there if derivative == "stash" else [applied[b] for b in real])
            evaluated = [newest(method, g * method.micro_batches, k, K) for g in range(EVERY, BATCHES, EVERY)]
            assert layer.forwards[-1] == [*evaluated, stage.version]
        assert [span.version for span in chain.spans[k] if isinstance(span.op, Update)] == list(range(applied[-1] + 1))


def newest(method: Method, b: int, k: int, K: int) -> int:
    """The updates that stage k has made when it comes to part b: at these weights it evaluates."""
    late = papers.delays(method, K)[k] - papers.early(method, k, K)
    return max(0, b - late) // papers.parts_of_update(method)


TABLE = {
    FDG(micro_batches=4): ([[2, 2, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], 3),
    DDG(micro_batches=4): ([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]], 2),
}


@pytest.mark.parametrize("method", TABLE, ids=str)
def test_four_stages_and_four_parts(method: Method) -> None:
    """Staleness of every part once warm, and the weight versions of stage 0, in the plan and on the stage itself."""
    want, versions = TABLE[method]
    chain, held = ticking(method, 4), set()
    for k, _ in chain.steps():
        stage = chain.stages[k]
        held.add(len({stage.version, *(one.version for one in stage.in_flight.values())}) if k == 0 else 0)
    for spans, column, of_parts in zip(chain.spans, chain.plan().columns, want, strict=True):
        for measured in (gradient_staleness(spans), gradient_staleness(column)):
            assert [[measured[4 * g + j] for j in range(4)] for g in GROUPS[2:]] == [of_parts] * (BATCHES - 2)
    assert max(held) == in_flight(chain.plan())[0].versions == versions


@pytest.mark.parametrize(
    ("method", "K"), enough(itertools.product((BP(), BP(3), GPipe(2), OneFOneB(4), ZB1P(3)), (1, 2, 5)), together=1), ids=str
)
def test_synchronous_methods_are_never_stale(method: Method, K: int) -> None:
    chain = ticking(method, K).run()
    for spans, engine in zip(chain.spans, chain.engines, strict=True):
        parts = BATCHES * method.micro_batches
        assert gradient_staleness(spans) == layer_staleness(spans) == dict.fromkeys(range(parts), 0)
        assert engine.log.staleness == engine.log.layer_staleness == Counter({0: len(filled(method))})  # an empty part is in no histogram


def test_adl_in_the_published_example() -> None:
    """K = 3, M = 2, once warm: (2,2), (1,1), (0,0) forward-first and (2,1), (1,0), (0,0) backward-first; K = 8: 13 .. 1, 0."""
    for order, want in (("forward-first", [(2, 2), (1, 1), (0, 0)]), ("backward-first", [(2, 1), (1, 0), (0, 0)])):
        chain = ticking(ADL(order=order), 3).run()
        assert [tuple(gradient_staleness(spans)[b] for b in (14, 15)) for spans in chain.spans] == want
    chain = ticking(FDG(order="backward-first"), 8).run()
    assert [gradient_staleness(spans)[20] for spans in chain.spans] == [13, 11, 9, 7, 5, 3, 1, 0]


def test_processes_measure_the_same() -> None:
    method = ADL(accumulate=3)
    there, here = in_processes(jobs("mlp", 3, method, trace=True)), inline(jobs("mlp", 3, method, trace=True))
    for a, b in zip(there, here, strict=True):
        assert [(s.op, s.version, s.tick) for s in a.spans] == [(s.op, s.version, s.tick) for s in b.spans]
        assert Counter(gradient_staleness(a.spans).values()) == Counter(a.report.staleness)
        assert all(s.start <= s.end <= t.start for s, t in itertools.pairwise(a.spans))
