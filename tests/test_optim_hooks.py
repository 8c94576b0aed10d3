"""Hooks of a step run once for every step of our optimizers, whichever class was made first: torch wraps `step` class by class."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from delock.optim import SCSGD, ErrorFeedback, SCAdamW, Several
from delock.optim.muon import SplitMuon
from delock.optim.spike import SpikeCompensated
from delock.recipes import AdamW, muon, scadamw

from walks import advance, start


def sgd(named: Any) -> Optimizer:
    return torch.optim.SGD(named, lr=0.1, momentum=0.9)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SCAdamW": lambda named: SCAdamW(named, tau=1.5),
    "SCSGD": lambda named: SCSGD(named, lr=0.1, tau=1.5),
    "Several": lambda named: Several([sgd(named[:2]), AdamW(0.1)(named[2:])]),
    "ErrorFeedback": lambda named: ErrorFeedback(sgd(named), tau=1.5),
    "ErrorFeedback of Several": lambda named: ErrorFeedback(muon()(named), tau=1.5),
    "SplitMuon": lambda named: muon()(named[:2]),
    "muon": muon(),
    "scadamw": scadamw(),
}


@pytest.fixture
def unwrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Our classes as they are before the first of their optimizers is made."""
    for kind in (Several, ErrorFeedback, SpikeCompensated, SCAdamW, SCSGD, SplitMuon, torch.optim.Muon):
        own = vars(kind).get("step")
        if getattr(own, "hooked", False):
            plain = own.__wrapped__  # type: ignore[union-attr]
            if plain.__qualname__ == f"{kind.__name__}.step":
                monkeypatch.setattr(kind, "step", plain)
            else:
                monkeypatch.delattr(kind, "step")


def runs(optimizer: Optimizer, named: Any) -> list[str]:
    """The hooks that run in a step."""
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    advance(optimizer, named, [0])
    return seen


@pytest.mark.usefixtures("unwrapped")
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("first", ["Several", "ErrorFeedback", "SCAdamW", "muon", "SplitMuon"])
def test_hooks_run_once(first: str, name: str) -> None:
    MAKERS[first](start(torch.float32))
    named = start(torch.float32)
    learning = named[:2] if name == "SplitMuon" else named
    optimizer = MAKERS[name](learning)
    twins, copied = copy.deepcopy((learning, optimizer))
    others, loaded = pickle.loads(pickle.dumps((learning, optimizer)))
    for one, weights in ((optimizer, learning), (copied, twins), (loaded, others)):
        assert runs(one, weights) == ["pre", "post"]


def test_hooks_of_a_part_run_once_too() -> None:
    named = start()
    base = sgd(named)
    seen: list[Optimizer] = []
    base.register_step_post_hook(lambda one, *_: seen.append(one))
    advance(ErrorFeedback(base, tau=1.0), named, range(3))
    assert seen == [base] * 3
