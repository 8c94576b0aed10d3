"""Spike compensation against the spec's equations in numpy, and its limits: torch's own optimizers at no staleness, Nesterov's at one."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from delock.errors import UsageError
from delock.optim.spike import SCSGD, SCAdamW
from delock.optim.stage_facts import for_stage
from delock.recipes import SGD, AdamW, scadamw, scsgd

from walks import DECAYING, advance, assert_close, assert_equals, by_hand, facts, interrupted, start, walk

TAUS = [0.25, 0.75, 1.0, 2.5]


@pytest.mark.parametrize("r", [1.0, 2.0])
@pytest.mark.parametrize("tau", TAUS)
def test_scadamw_is_its_equation(tau: float, r: float) -> None:
    lr, b1, b2, eps, decay = 0.05, 0.9, 0.97, 1e-8, 0.1

    def update(name: str, w: Any, g: Any, memory: dict[str, Any], n: int) -> Any:
        m = memory["m"] = b1 * memory.get("m", 0) + (1 - b1) * g
        v = memory["v"] = b2 * memory.get("v", 0) + (1 - b2) * g * g
        late = b1 ** (r * tau)
        d = late * m / (1 - b1 ** (n + 1)) + (1 - late) * g
        own = decay if name in DECAYING else 0
        return (1 - lr * own) * w - lr * d / (np.sqrt(v / (1 - b2 ** (n + 1))) + eps)

    factory = for_stage(scadamw(lr, (b1, b2), decay, r), facts(tau))
    assert_close(walk(factory), by_hand(update))


@pytest.mark.parametrize("r", [1.0, 2.0])
@pytest.mark.parametrize("tau", TAUS)
def test_scsgd_is_its_equation(tau: float, r: float) -> None:
    lr, mu, decay = 0.05, 0.8, 0.1

    def update(name: str, w: Any, g: Any, memory: dict[str, Any], n: int) -> Any:
        g = g + decay * w
        v = memory["v"] = mu * memory.get("v", 0) + g
        return w - lr * (mu ** (r * tau) * v + (1 - mu ** (r * tau)) / (1 - mu) * g)

    assert_close(walk(for_stage(scsgd(lr, mu, decay, r), facts(tau))), by_hand(update))


def test_without_staleness_a_factory_gives_torchs_own() -> None:
    adamw = for_stage(scadamw(0.05, (0.9, 0.97), 0.1), facts(0.0))
    assert type(adamw(start())) is torch.optim.AdamW
    assert_equals(walk(adamw, dtype=torch.float32), walk(AdamW(0.05, 0.1, (0.9, 0.97)), dtype=torch.float32))
    sgd = for_stage(scsgd(0.05, 0.8, 0.1), facts(0.0))
    assert type(sgd(start())) is torch.optim.SGD
    assert_equals(walk(sgd, dtype=torch.float32), walk(SGD(0.05, 0.8, 0.1), dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_staleness_the_optimizers_equal_torchs(dtype: torch.dtype) -> None:
    plain = partial(torch.optim.AdamW, lr=0.05, betas=(0.9, 0.97), weight_decay=0.1, foreach=True)
    assert_equals(walk(partial(SCAdamW, lr=0.05, betas=(0.9, 0.97), weight_decay=0.1, tau=0), dtype=dtype), walk(plain, dtype=dtype))
    sgd = partial(torch.optim.SGD, lr=0.05, momentum=0.8, weight_decay=0.1, foreach=True)
    assert_equals(walk(partial(SCSGD, lr=0.05, momentum=0.8, weight_decay=0.1, tau=0), dtype=dtype), walk(sgd, dtype=dtype))


def test_sgd_one_update_late_is_nesterovs() -> None:
    nesterov = walk(partial(torch.optim.SGD, lr=0.05, momentum=0.8, nesterov=True))
    assert_close(walk(partial(SCSGD, lr=0.05, momentum=0.8, tau=0.5, r=2)), [w.numpy() for w in nesterov])


FACTORIES = [scadamw(0.05), scsgd(0.05, weight_decay=0.1)]


@pytest.mark.parametrize("factory", FACTORIES, ids=str)
def test_a_loaded_state_goes_on_as_the_whole(factory: Any) -> None:
    made = for_stage(pickle.loads(pickle.dumps(factory)), facts(0.75))
    assert_equals(interrupted(made), walk(made, dtype=torch.float32))


@pytest.mark.parametrize("factory", FACTORIES, ids=str)
def test_a_schedule_sets_every_group(factory: Any) -> None:
    made = for_stage(factory, facts(0.75))
    none = walk(made, schedule=lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda n: 0.0))
    assert_equals(none, [w.detach() for _, w in start()])


@pytest.mark.parametrize(("ours", "theirs"), [(SCAdamW, torch.optim.AdamW), (SCSGD, torch.optim.SGD)])
def test_a_state_of_torchs_own_can_be_taken_over(ours: Any, theirs: Any) -> None:
    named, twins = start(), start()
    options = {"momentum": 0.9} if ours is SCSGD else {}
    plain = theirs(named, lr=0.05, foreach=True, **options)
    advance(plain, named, range(5))
    state = copy.deepcopy(plain.state_dict())  # torch's loading shares tensors
    late = ours(start(), lr=0.05, tau=0.75)
    late.load_state_dict(copy.deepcopy(state))
    assert (late.param_groups[0]["tau"], late.param_groups[0]["r"]) == (0.75, late.defaults["r"])
    state["param_groups"][0] |= {"tau": 0.0, "r": 2.0}
    taken = ours(twins, lr=0.05, tau=0.75)
    taken.load_state_dict(state)
    with torch.no_grad():
        for (_, w), (_, twin) in zip(named, twins, strict=True):
            twin.copy_(w)
    advance(plain, named, range(5, 9))
    advance(taken, twins, range(5, 9))
    assert_equals([w.detach() for _, w in twins], [w.detach() for _, w in named])


def test_a_weight_without_gradient_is_left_alone_and_counts_for_itself() -> None:
    late, twin = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    both = SCAdamW([nn.Parameter(torch.ones(2)), late], tau=0.5)
    both.param_groups[0]["params"][0].grad = torch.ones(2)
    both.step()
    assert torch.equal(late, torch.ones(3))
    for optimizer, w in ((both, late), (SCAdamW([twin], tau=0.5), twin)):
        w.grad = torch.ones(3)
        optimizer.step()
    assert torch.equal(late, twin)


def test_a_closure_is_evaluated_with_gradients() -> None:
    w = nn.Parameter(torch.ones(2))
    optimizer = SCSGD([w], lr=0.1, tau=1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 2
    assert torch.all(w < 1)


def test_a_rate_may_be_a_tensor() -> None:
    """As torch's optimizers take it; a schedule writes into it."""

    def halved(optimizer: torch.optim.Optimizer) -> Any:
        return lr_scheduler.ExponentialLR(optimizer, 0.5)

    for kind in (SCAdamW, SCSGD):
        number, tensor = (
            walk(partial(kind, lr=lr, tau=0.75), 6, schedule=halved) for lr in (0.05, torch.tensor(0.05, dtype=torch.float64))
        )
        assert_equals(number, tensor)


@pytest.mark.usefixtures("own_random")
def test_sparse_gradients_are_refused() -> None:
    for options, says in (({}, None), ({"weight_decay": 0.1}, "SCSGD with weight decay does not take sparse gradients")):
        table = nn.Embedding(5, 3, sparse=True)
        table(torch.tensor([1, 2])).sum().backward()
        with pytest.raises(UsageError, match="SCAdamW does not take sparse gradients: give embeddings sparse=False"):
            SCAdamW(table.parameters(), tau=1).step()
        optimizer = SCSGD(table.parameters(), lr=0.1, tau=1, **options)
        if says:
            with pytest.raises(UsageError, match=says):
                optimizer.step()
        else:
            optimizer.step()
