"""Local losses against their oracle: decoupled greedy learning is the sequential loop, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from delock.api import fit
from delock.errors import UsageError
from delock.methods import BP, DGL
from delock.nets import build

from harness import enough, in_processes, inline, jobs
from oracles_local import greedy, tiny_heads
from workloads import WORK, Samples, batches, sgd, warm_up


@pytest.mark.parametrize(("work", "K", "processes"), enough(itertools.product(("conv", "tuple"), range(1, 6), (False, True))))
def test_dgl_is_the_sequential_loop(work: str, K: int, processes: bool) -> None:
    net, kind, loss = WORK[work]
    made = batches(22, 8, 2, kind, torch.float32)
    stages = net(K, torch.float32)
    heads = tiny_heads(stages, made[0][0], torch.float32)
    want, head_states = greedy(stages, heads, made, loss=loss, make_optimizer=sgd, make_schedule=warm_up, seed=7)
    run = in_processes if processes else inline
    got = run(jobs(work, K, DGL(), evaluate=False))
    for k, result in enumerate(got):
        assert all(torch.equal(result.state[name], value) for name, value in want.states[k].items())
        if k < K - 1:
            assert all(torch.equal(result.head[name], value) for name, value in head_states[k].items())
    assert got[-1].losses == [value.item() for value in want.losses]


def test_heads_are_chosen_from_the_output_and_trained() -> None:
    data = Samples("image", 32, 8, torch.float32)
    losses = []
    for workers in ("inline", "processes"):
        model = build("resnet8", classes=10, in_channels=3, image_size=8)
        result = fit(model, data, loss=torch.nn.functional.cross_entropy, method="dgl", stages=3, cuts=["layer2", "layer3"],
                     optimizer=sgd, epochs=3, workers=workers)  # fmt: skip
        losses.append(result.losses)
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_own_heads_are_trained_in_place() -> None:
    data = Samples("image", 24, 8, torch.float32)
    stages = WORK["conv"][0](3, torch.float32)
    heads = tiny_heads(stages, next(iter(data.epoch(0)))[0], torch.float32)
    before = [head.out.weight.detach().clone() for head in heads]
    fit(stages, data, loss=WORK["conv"][2], method=DGL(), optimizer=sgd, batches=2, heads=heads, workers="processes")
    assert not any(torch.equal(head.out.weight, was) for head, was in zip(heads, before, strict=True))


def test_wrong_heads() -> None:
    data = Samples("image", 24, 8, torch.float32)
    stages = WORK["conv"][0](3, torch.float32)
    heads = tiny_heads(stages, next(iter(data.epoch(0)))[0], torch.float32)
    with pytest.raises(UsageError, match="needs 2 auxiliary heads, for stages 0, 1, but 1 was given"):
        fit(stages, data, loss=WORK["conv"][2], method=DGL(), optimizer=sgd, batches=2, heads=heads[:1], workers="inline")
    with pytest.raises(UsageError, match="bp has no local losses"):
        fit(stages, data, loss=WORK["conv"][2], method=BP(), optimizer=sgd, batches=2, heads=heads, workers="inline")
    tuples = WORK["tuple"][0](3, torch.float32)
    with pytest.raises(
        UsageError, match=r"no head is known for stage 0, whose output is a tuple of .*: cut elsewhere, or give heads=\[...\]"
    ):
        fit(tuples, Samples("token", 24, 8), loss=WORK["tuple"][2], method=DGL(), optimizer=sgd, batches=2, workers="inline")
