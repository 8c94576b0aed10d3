"""PipeMare's rate against its equation, and what a stage hands to a factory."""

from __future__ import annotations

import pickle
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch

from delock.optim.stage_facts import StageFacts, for_stage
from delock.recipes import AdamW, NAdamW, PipeMare, Schedule, error_feedback, muon, scadamw, scsgd

from walks import advance, facts, start


@pytest.mark.parametrize("tau", [0.0, 0.75, 1.0, 2.5, 6.0])
def test_pipemare_is_its_equation(tau: float) -> None:
    base = Schedule("cosine", 12, warmup=3)
    made = for_stage(pickle.loads(pickle.dumps(PipeMare(8, base))), facts(tau))
    named = start()
    optimizer = muon(0.5)(named)
    schedule = made(optimizer)
    for n in range(12):
        slowed = base.factor(n) / max(1, tau) ** (1 - min(n / 8, 1))
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5 * slowed, 0.5 * slowed, 0.05 * slowed], abs=1e-15)
        advance(optimizer, named, [n], schedule)
    again = made(muon(0.5)(start()))
    again.load_state_dict(schedule.state_dict())
    assert again.last_epoch == 12
    assert PipeMare(8).factor(2.0, 4) == pytest.approx(2**-0.5)


def test_nadamw_reaches_its_beta_in_about_a_hundred_updates() -> None:
    """In torch beta1 of update t is beta1 (1 - 0.96^(t momentum_decay) / 2)."""
    group = NAdamW(0.1)(start()).param_groups[0]
    assert 1 - 0.5 * 0.96 ** (100 * group["momentum_decay"]) > 0.99
    assert group["decoupled_weight_decay"]


# -- facts -------------------------------------------------------------------------------------------------------------------------


def asks(params: Any, *, stage: StageFacts) -> Any:
    return stage.k


def has(params: Any, stage: int = 5) -> Any:
    return stage


def test_facts_go_where_a_keyword_only_parameter_asks_for_them() -> None:
    given = StageFacts(3, 4, 0.0, 0)
    assert [for_stage(one, given)([]) for one in (asks, partial(asks), partial(partial(asks), stage=StageFacts(1, 4, 0.0, 0)))] == [3, 3, 1]
    assert for_stage(has, given)([]) == 5
    for plain in (has, partial(has, stage=6), AdamW(0.1), muon(), torch.optim.SGD, partial(torch.optim.SGD, lr=0.1), dict, len):
        assert for_stage(plain, given) is plain
    for factory in (scadamw(), scsgd(0.1), error_feedback(AdamW(0.1)), PipeMare(3)):
        assert for_stage(factory, given) is not factory
        assert pickle.loads(pickle.dumps(factory)) == factory


def test_facts_load_no_torch() -> None:
    code = "import sys, delock.optim.stage_facts; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr
