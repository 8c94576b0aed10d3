"""Error feedback around any optimizer, against the spec's equation: base and correction in numpy, with fractional staleness."""

from __future__ import annotations

import copy
import math
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from delock.errors import UsageError
from delock.optim.feedback import ErrorFeedback
from delock.optim.several import Several
from delock.optim.stage_facts import for_stage
from delock.recipes import SGD, AdamW, error_feedback, muon, scadamw, soap

from harness import plainly
from walks import DECAYING, advance, assert_close, assert_equals, by_hand, facts, interrupted, start, walk


def sgd(name: str, w: Any, g: Any, memory: dict[str, Any], n: int) -> Any:
    """The new weight under SGD(0.05, momentum 0.8, decay 0.1)."""
    memory["v"] = 0.8 * memory.get("v", 0) + g + 0.1 * w
    return w - 0.05 * memory["v"]


def adamw(name: str, w: Any, g: Any, memory: dict[str, Any], n: int) -> Any:
    """The new weight under AdamW(0.05, decay 0.1, betas .9, .97)."""
    m = memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    s = memory["s"] = 0.97 * memory.get("s", 0) + 0.03 * g**2
    decayed = w * (1 - 0.05 * 0.1) if name in DECAYING else w
    return decayed - 0.05 * (m / (1 - 0.9 ** (n + 1))) / (np.sqrt(s / (1 - 0.97 ** (n + 1))) + 1e-8)


BASES = [(SGD(0.05, 0.8, 0.1), sgd), (AdamW(0.05, 0.1, (0.9, 0.97)), adamw)]


@pytest.mark.parametrize("c", [1.0, 0.5])
@pytest.mark.parametrize("tau", [0.25, 0.75, 1.0, 1.5, 3.0])
@pytest.mark.parametrize(("base", "plain"), BASES, ids=["sgd", "adamw"])
def test_it_is_its_equation(base: Any, plain: Any, tau: float, c: float) -> None:
    def update(name: str, w: Any, g: Any, memory: dict[str, Any], n: int) -> Any:
        u = memory.setdefault("u", [])
        u.append(w - plain(name, w, g, memory, n))
        if n < math.ceil(tau):
            return w - u[n]
        below, above = math.floor(n - tau), math.ceil(n - tau)
        then = u[below] + (n - tau - below) * (u[above] - u[below])
        return w - u[n] - c * (u[n] - then)

    assert_close(walk(for_stage(error_feedback(base, c), facts(tau))), by_hand(update))


@pytest.mark.parametrize("tau", [0.75, 2.5])
@pytest.mark.parametrize("base", [AdamW(0.05), scadamw(0.05), muon(), soap(), partial(torch.optim.SGD, lr=0.05)], ids=plainly)
def test_a_loaded_state_goes_on_as_the_whole(base: Any, tau: float) -> None:
    factory = for_stage(pickle.loads(pickle.dumps(error_feedback(base))), facts(tau))
    assert type(factory(start())) is ErrorFeedback
    assert_equals(interrupted(factory), walk(factory, dtype=torch.float32))


def test_without_staleness_it_is_the_base_itself() -> None:
    factory = for_stage(error_feedback(scadamw(0.05)), facts(0.0))
    assert type(factory(start())) is torch.optim.AdamW
    with pytest.raises(UsageError, match="use the optimizer without it"):
        ErrorFeedback(torch.optim.SGD([nn.Parameter(torch.ones(1))]), tau=0)


def test_it_does_not_go_around_itself() -> None:
    """Both would keep their changes under one name, and the staleness is one."""
    named = start()
    inner = ErrorFeedback(torch.optim.SGD(named[:2], lr=0.1, momentum=0.9), tau=1)
    for base in (inner, Several([inner, torch.optim.SGD(named[2:], lr=0.1)])):
        with pytest.raises(UsageError, match="would correct one staleness twice: give it an optimizer without"):
            ErrorFeedback(base, tau=2)
    with pytest.raises(UsageError, match="would correct one staleness twice"):
        error_feedback(error_feedback(AdamW(0.05)))


def test_several_parts_may_have_it_each() -> None:
    def parts(named: Any) -> Optimizer:
        return Several([ErrorFeedback(torch.optim.SGD(named[:2], lr=0.1), tau=1), ErrorFeedback(AdamW(0.05)(named[2:]), tau=2.5)])

    def alone(named: Any, own: slice, base: Any, tau: float) -> list[torch.Tensor]:
        advance(ErrorFeedback(base(named[own]), tau=tau), named, range(20))
        return [w.detach() for _, w in named[own]]

    first = alone(start(), slice(2), partial(torch.optim.SGD, lr=0.1), 1)
    assert_equals(walk(parts), first + alone(start(), slice(2, None), AdamW(0.05), 2.5))


def test_it_keeps_no_more_changes_than_it_needs() -> None:
    named = start()
    for tau, kept in ((0.75, 2), (1.0, 2), (2.5, 4)):
        optimizer = ErrorFeedback(torch.optim.SGD(named, lr=0.1), tau=tau)
        advance(optimizer, named, range(9))
        assert {len(optimizer.state[w]["changes"]) for _, w in named} == {kept}
    longer = optimizer.state_dict()
    optimizer = ErrorFeedback(torch.optim.SGD(named, lr=0.1), tau=1.0)
    optimizer.load_state_dict(longer)
    advance(optimizer, named, range(2))
    assert {len(optimizer.state[w]["changes"]) for _, w in named} == {2}


def test_a_schedule_acts_on_the_base() -> None:
    factory = for_stage(error_feedback(muon()), facts(0.75))
    still = walk(factory, schedule=lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda n: 0.0))
    assert_equals(still, [w.detach() for _, w in start()])


def test_a_schedule_that_moves_the_momentum_acts_on_the_base() -> None:
    """OneCycleLR asks the defaults of an optimizer for it. Muon's groups have no momentum that all share."""
    cycle = partial(lr_scheduler.OneCycleLR, max_lr=0.1, total_steps=9)
    base = walk(AdamW(0.05), 6, schedule=cycle)
    assert_equals(walk(lambda named: ErrorFeedback(AdamW(0.05)(named), tau=9), 6, schedule=cycle), base)
    optimizer = error_feedback(muon())(start())
    with pytest.raises(ValueError, match="must support momentum or beta1"):
        cycle(optimizer)
    cycle(optimizer, cycle_momentum=False)


def test_a_weight_without_gradient_counts_for_itself() -> None:
    """It is plain for its own first updates, and its changes are those of its own updates."""

    def late(first: int) -> torch.Tensor:
        a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        optimizer = ErrorFeedback(torch.optim.SGD([a, b], lr=0.1, momentum=0.9), tau=1.5)
        for n in range(8):
            a.grad, b.grad = torch.ones(2), b.detach().clone() if n >= first else None
            optimizer.step()
            if n < first:
                assert torch.equal(b, torch.ones(3))
        return b.detach()

    assert not torch.equal(late(2), late(0))
    w = nn.Parameter(torch.ones(3))
    alone = ErrorFeedback(torch.optim.SGD([w], lr=0.1, momentum=0.9), tau=1.5)
    for _ in range(6):
        w.grad = w.detach().clone()
        alone.step()
    assert torch.equal(late(2), w)


def test_a_copy_goes_on_by_itself() -> None:
    named = start()
    optimizer = ErrorFeedback(AdamW(0.05)(named), tau=1.5)
    advance(optimizer, named, range(4))
    twins, copied = copy.deepcopy((named, optimizer))
    advance(optimizer, named, range(4, 9))
    advance(copied, twins, range(4, 9))
    assert_equals([w.detach() for _, w in twins], [w.detach() for _, w in named])
