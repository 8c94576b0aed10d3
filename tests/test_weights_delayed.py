"""Delay-line methods with parts that weigh by what counts: against a loop over the whole network that only knows sums over tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import delock
from delock.data import Batches
from delock.methods import ADL, BP, DDG, FDG, PACI, Method, make
from delock.nets import gpt, nats, tokens
from delock.records import Result
from test_weights import CONTEXT, UNEVEN, VOCABULARY, Pairs, gap, same, texts

import papers
from harness import enough

RATE = 0.2
DATA = [*UNEVEN, *texts([0, 0, 0, 0, 0], [2, 0, 0, 0, 1, 6, 6], [6], seed=1)]  # one without a token; one of a single sample


def model() -> nn.Sequential:
    return gpt(VOCABULARY, depth=2, width=8, heads=2, context=CONTEXT).double()


def trained(method: Method, K: int, data: Pairs = DATA) -> tuple[list[Tensor], Result]:
    net = model()
    made = partial(torch.optim.SGD, lr=RATE)
    weighed = Batches(data, weight=tokens)
    result = delock.fit(net, weighed, loss=nats, method=method, optimizer=made, epochs=1, cuts=[1, 2, 3][: K - 1], workers="inline")
    return [w.detach() for w in net.parameters()], result


def loop(delays: Sequence[int], M: int, data: Pairs = DATA) -> list[Tensor]:
    """DDG's or FDG's equations, a batch in M parts: the sum over a part's tokens, by the tokens of the batch, at each stage's version."""
    K, net = len(delays), model()
    edges = [0, *[1, 2, 3][: K - 1], len(net)]
    stages = [net[a:z] for a, z in pairwise(edges)]
    versions = [[dict(stage.named_parameters())] for stage in stages]
    for g, (x, y) in enumerate(data):
        total = [[torch.zeros_like(w) for w in versions[k][-1].values()] for k in range(K)]
        for j, (inputs, targets) in enumerate(zip(x.tensor_split(M), y.tensor_split(M), strict=True)):
            used = [versions[k][max(0, g * M + j - delays[k]) // M] for k in range(K)]
            if not (targets != -100).any():
                continue
            h = inputs
            for stage, weights in zip(stages, used, strict=True):
                h = functional_call(stage, weights, (h,))
            loss = cross_entropy(h.flatten(0, -2), targets.flatten(), reduction="sum") / (y != -100).sum()
            grads = iter(torch.autograd.grad(loss, [w for weights in used for w in weights.values()]))
            for of_stage in total:
                for gradient in of_stage:
                    gradient += next(grads)
        for k in range(K):
            new = [w - RATE * d for w, d in zip(versions[k][-1].values(), total[k], strict=True)]
            versions[k].append({name: w.detach().requires_grad_() for name, w in zip(versions[k][-1], new, strict=True)})
    return [w.detach() for k in range(K) for w in versions[k][-1].values()]


@pytest.mark.parametrize(("K", "M"), enough(itertools.product((1, 2, 3, 4), (1, 2, 3, 4)), together=1))
def test_ddg_and_fdg(K: int, M: int) -> None:
    """With parts without a token, parts without a sample, and a batch without a token."""
    for method, delay in ((DDG(micro_batches=M), 1), (FDG(micro_batches=M), 2)):
        want = loop([delay * (K - 1 - k) for k in range(K)], M)
        assert gap(trained(method, K)[0], want) < 1e-13, method


@pytest.mark.parametrize("name", sorted(papers.LAGS))
def test_the_first_batch_is_the_undivided_one(name: str) -> None:
    """All its parts are at the initial weights on every stage, whatever the lags."""
    method = ADL(1, micro_batches=3) if name == "adl" else make(name, micro_batches=3)
    (whole, a), (parts, b) = trained(BP(), 3, DATA[:1]), trained(method, 3, DATA[:1])
    assert gap(whole, parts) < 1e-14
    assert a.losses == pytest.approx(b.losses, rel=1e-14)


def test_adl_divides_by_batches() -> None:
    """Whatever the parts hold: three groups of two batches, the last batch without a part for each."""
    a, _ = trained(ADL(2, micro_batches=3), 1)
    b, _ = trained(ADL(2), 1)
    assert gap(a, b) < 1e-13


@pytest.mark.parametrize("method", [PACI(micro_batches=3)], ids=str)
def test_mixed_stays_finite(method: Method) -> None:
    weights, result = trained(method, 3)
    assert all(w.isfinite().all() for w in weights)
    assert not same(weights, [w.detach() for w in model().parameters()])
    assert [stage.updates for stage in result.stages] == [len(DATA)] * 3
