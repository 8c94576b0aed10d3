"""Clipping: over the network it is torch's own clip_grad_norm_ on the unsplit model, bit for bit; over a stage, that of each stage."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from delock.api import fit
from delock.errors import UsageError
from delock.keys import key
from delock.methods import ADL, BP, DDG, DGL, FDG, FR, PACI, ZB1P, GPipe, Interlocking, Method, OneFOneB, PipeDream2BW
from delock.ops import Update
from delock.plan import RunLength, unroll
from delock.run.job import StageJob, StageResult
from delock.timeline import Costs, simulate

from harness import assert_equal, enough, in_the_same_processes, inline, jobs, same_tree
from workloads import WORK, Samples, batches, sgd

CLIP = 0.3  # of gradients whose norms are about 1
SAMPLES = 18  # batches of 8, 8 and 2 samples: three parts of 2 samples leave one empty


def clipped(work: str, K: int, method: Method, **more: Any) -> list[StageJob]:
    """The harness' jobs, with clipping."""
    made = jobs(work, K, method, samples=SAMPLES, schedule=None, **more)
    return [replace(job, length=replace(job.length, clip=CLIP)) for job in made]


def loop(work: str, K: int, parts: int) -> list[dict[str, torch.Tensor]]:
    """Plain training of the unsplit network, a batch in `parts`; dropout draws as every stage's would."""
    net, kind, loss = WORK[work]
    stages = net(K, torch.float32)
    for stage in stages:
        stage.train()
    weights = [w for stage in stages for w in stage.parameters()]
    optimizers = [sgd(list(stage.parameters())) for stage in stages]
    with torch.random.fork_rng(devices=[]):
        for t, (x, y) in enumerate(batches(SAMPLES, 8, 2, kind, torch.float32)):
            for optimizer in optimizers:
                optimizer.zero_grad()
            for i, (part, labels) in enumerate(zip(x.tensor_split(parts), y.tensor_split(parts), strict=True)):
                if not len(part):
                    continue
                h = part
                for k, stage in enumerate(stages):
                    torch.default_generator.manual_seed(key(7, k, t * parts + i))
                    h = stage(h)
                (loss(h, labels) * (len(part) / len(x))).backward()
            clip_grad_norm_(weights, CLIP)
            for optimizer in optimizers:
                optimizer.step()
    return [stage.state_dict() for stage in stages]


@pytest.mark.parametrize(
    ("method", "K"), enough(itertools.product((BP(), BP(2), GPipe(3), OneFOneB(2), ZB1P(3)), range(1, 5)), together=1), ids=str
)
def test_over_the_network_it_is_that_of_torch(method: Method, K: int) -> None:
    got = inline(clipped("conv", K, method, evaluate=False))
    same_tree([result.state for result in got], loop("conv", K, method.micro_batches))


APART = (BP(), OneFOneB(3), ZB1P(3), BP(2, 1), FDG(), DDG(3, "part"), PipeDream2BW(3), Interlocking(2))


@pytest.fixture(scope="module")
def there() -> dict[Any, list[StageResult]]:
    return in_the_same_processes({method: clipped("tuple", 3, method) for method in APART})


@pytest.mark.parametrize("method", APART, ids=str)
def test_processes_equal_one_process(method: Method, there: Any) -> None:
    assert_equal(inline(clipped("tuple", 3, method, window=2)), there[method])


@pytest.mark.parametrize(
    "method", [FDG(), ADL(2), DDG(3, "part"), FR(3, "mean"), PACI(3), PipeDream2BW(3), DGL(), Interlocking(2)], ids=str
)
def test_other_methods_clip_each_stage(method: Method) -> None:
    class Clipping(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            clip_grad_norm_(self.param_groups[0]["params"], CLIP)
            super().step(closure)

    def clipping(params: Any) -> torch.optim.Optimizer:
        weights = [p[1] if isinstance(p, tuple) else p for p in params]
        return Clipping(weights, **sgd(weights).defaults)

    got = inline(clipped("conv", 3, method, evaluate=False))
    want = inline(jobs("conv", 3, method, samples=SAMPLES, schedule=None, optimizer=clipping, evaluate=False))
    for one, other in zip(got, want, strict=True):
        same_tree((one.state, one.head, one.losses), (other.state, other.head, other.losses))
    free = inline(jobs("conv", 3, method, samples=SAMPLES, schedule=None, evaluate=False))
    assert any(not torch.equal(free[0].state[name], value) for name, value in got[0].state.items())


def test_on_the_clock_an_update_over_the_network_waits_for_all_stages() -> None:
    timeline = simulate(unroll(BP(), 3, RunLength(2, clip=1.0)), replace(Costs.unit(3), up=(1.0, 1.0)))
    done = [next(span.end for span in column if isinstance(span.op, Update)) for column in timeline.columns]
    # forwards 3, links 2, backwards 6: stage 0 is done at 11, and what it found out goes up two links
    assert done == [11, 12, 13]


@pytest.mark.parametrize("clip", [0.0, -1.0, float("inf"), float("nan")])
def test_a_norm_must_be_positive_and_finite(clip: float) -> None:
    with pytest.raises(UsageError, match=r"clip is .* must be (above 0|finite); leave it out"):
        fit(WORK["conv"][0](2, torch.float32), Samples("image", 24, 8), loss=WORK["conv"][2], optimizer=sgd, batches=2, clip=clip)
