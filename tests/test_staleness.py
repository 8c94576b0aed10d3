"""Staleness as the engine measures it, down to the weights in the Jacobians, against the papers' formulas."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, Method, OneFOneB
from delock.ops import Update
from delock.plan import Step
from delock.timeline import gradient_staleness, layer_staleness

import papers
from chain import Chain
from harness import in_processes, inline, jobs

BATCHES, LAYERS = 25, 8  # the last group of M = 2, 3, 4 is incomplete


class Clock(nn.Module):
    """A linear layer whose bias counts the updates it has had (see Ticking), and that notes, for the batch in its first entry, the count
    that its forwards saw and the count that autograd used.
    """

    def __init__(self) -> None:
        super().__init__()
        self.updates = nn.Parameter(torch.zeros(1))
        self.forwards: dict[int, list[int]] = {}
        self.jacobians: dict[int, int] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.forwards.setdefault(int(x[0, 0]), []).append(int(self.updates))
        y: Tensor = _Look.apply(x, self.updates, self.jacobians)
        return y


class _Look(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, updates: Tensor, found: dict[int, int]) -> Tensor:
        ctx.save_for_backward(x, updates)
        ctx.found = found
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, updates = ctx.saved_tensors
        ctx.found[int(x[0, 0])] = int(updates)
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
    """A run of eight tiny layers in K stages."""
    bounds = [-(-LAYERS * k // K) for k in range(K + 1)]
    modules = [nn.Sequential(*(Clock() for _ in range(z - a))) for a, z in itertools.pairwise(bounds)]
    data = [(torch.full((2, 1), float(b)), torch.zeros(2)) for b in range(BATCHES)]
    return Chain(modules, method, data, loss=lambda out, y: out.sum(), optimizer=Ticking)


DELAYED: list[Method] = [
    DDG(),
    FR(),
    DSP(),
    DSP(p=2, q=3),
    *(FDG(at=at, order=order) for at in ("stash", "mixed") for order in papers.ORDERS),
    *(ADL(accumulate=M, order=order) for M in (1, 2, 3, 4) for order in papers.ORDERS),
    ADL(accumulate=3, at="mixed", order="backward-first"),
]


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("method", DELAYED, ids=str)
def test_staleness_is_the_formulas_for_every_batch(method: Method, K: int) -> None:
    """In the weights themselves, in what the stage says, in the spans, and in the histograms; warm-up and drain included."""
    chain = ticking(method, K)
    said: list[dict[int, int]] = [{} for _ in range(K)]
    for k, s in enumerate(chain.stages):

        def look(step: Step, k: int = k, s: Any = s, prepare: Callable[[Step], None] = s.prepare) -> None:
            prepare(step)
            said[k][step.op.batch] = s.version - s.in_flight[step.op.batch].version

        s.prepare = look
    chain.run()
    derivative = papers.derivative(method)
    for k, stage in enumerate(chain.stages):
        used, applied = zip(*(papers.versions(method, b, k, K) for b in range(BATCHES)), strict=True)
        D = papers.delays(method, K)[k]
        count_staleness = [0 if derivative == "replay" else a - u for u, a in zip(used, applied, strict=True)]
        assert list(said[k].values()) == count_staleness
        assert gradient_staleness(chain.spans[k]) == dict(enumerate(count_staleness))
        assert layer_staleness(chain.spans[k]) == dict.fromkeys(range(BATCHES), D)
        log = chain.engines[k].log
        assert (log.staleness, log.layer_staleness) == (Counter(count_staleness), Counter({D: BATCHES}))
        for layer in stage.module:
            assert [layer.forwards[b][0] for b in range(BATCHES)] == list(used)
            at = used if derivative == "stash" else applied
            assert [layer.jacobians[b] for b in range(BATCHES)] == list(at)
        assert [span.version for span in chain.spans[k] if isinstance(span.op, Update)] == list(range(applied[-1] + 1))


@pytest.mark.parametrize("K", range(1, 9))
@pytest.mark.parametrize("method", [BP(), BP(3), GPipe(2), OneFOneB(4)], ids=str)
def test_synchronous_methods_are_never_stale(method: Method, K: int) -> None:
    chain = ticking(method, K).run()
    for spans, engine in zip(chain.spans, chain.engines, strict=True):
        parts = BATCHES * method.micro_batches
        assert gradient_staleness(spans) == layer_staleness(spans) == dict.fromkeys(range(parts), 0)
        filled = BATCHES * min(2, method.micro_batches)  # of two samples: an empty part is in no histogram
        assert engine.log.staleness == engine.log.layer_staleness == Counter({0: filled})


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
