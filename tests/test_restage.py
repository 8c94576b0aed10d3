"""Runs that go on in other stages: no change is seen in the loss, and what follows is the run of a fresh pipeline, to the last bit."""

from __future__ import annotations

import itertools
import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

import delock
from delock.checkpoints.directory import newest_first, read, verified
from delock.methods import ADL, BP, DDG, DGL, FDG, FR, PACI, Method, OneFOneB, PipeDream2BW
from delock.records import Event, Resumed, StepRecord

from harness import enough, same_state
from restaging import ADAM, MOMENTUM, falling, joined, kept_by_name, loss_of, network, train

pytestmark = pytest.mark.usefixtures("own_random")


def chain(folder: Path, stages: list[int], apart: int = 10, **more: Any) -> list[delock.Result]:
    """Runs in so many stages, each of which goes on where the one before saved itself, 4 batches before its end."""
    last = len(stages) - 1
    ends = [(i + 1) * apart + 4 for i in range(len(stages))]
    return [
        train(folder, K, end, keeps={"keep": 9, "every": apart if i < last else None}, **more)[1]
        for i, (K, end) in enumerate(zip(stages, ends, strict=True))
    ]


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        (BP(), ADAM),
        pytest.param(OneFOneB(micro_batches=2), MOMENTUM, marks=pytest.mark.slow),
        (PipeDream2BW(micro_batches=3), delock.recipes.muon(lr=0.01)),
        pytest.param(DDG(), delock.recipes.scadamw(lr=0.01), marks=pytest.mark.slow),
        (FR(), delock.recipes.error_feedback(MOMENTUM)),
        pytest.param(ADL(accumulate=3), ADAM, marks=pytest.mark.slow),
        (FDG(beta=0.7, at="mixed", order="backward-first"), delock.recipes.scsgd(lr=0.05)),
        pytest.param(PACI(micro_batches=2, ahead="mean"), MOMENTUM, marks=pytest.mark.slow),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_every_change_keeps_the_loss(tmp_path: Path, method: Method, optimizer: Any) -> None:
    """4 -> 2 -> 3 -> 1: what the run measures in its new stages is what the checkpoint's model gives in one process."""
    results = chain(tmp_path, [4, 2, 3, 1], method=method, optimizer=optimizer)
    paths = {verified(path).batches: path for path in newest_first(tmp_path)}
    before = results[0]
    for i, result in enumerate(results[1:], 1):
        batches, rows = 10 * i, {row.batches: row for row in result.evaluations}
        assert abs(rows[batches].test_loss - loss_of(joined(paths[batches], network()))) < 1e-6
        assert [row.batches for row in result.evaluations][-1] == 10 * (i + 1) + 4
        known = verified(paths[batches]).trained
        assert str(result.losses[:known]) == str(before.losses[:known])  # there may be NaN
        assert all(map(math.isnan, result.losses[known:batches]))
        assert not any(map(math.isnan, result.losses[batches:]))
        assert len(result.losses) == 10 * (i + 1) + 4
        before = result


FRESH: tuple[Method, ...] = (
    BP(),
    OneFOneB(micro_batches=2),
    PipeDream2BW(micro_batches=3),
    DDG(),
    ADL(accumulate=3),
    FDG(at="mixed", micro_batches=2),
    PACI(3, ahead="part"),
    FR(),
    FR(accumulate=2),
    DDG(accumulate=3),
)


@pytest.mark.parametrize(("method", "K"), enough(itertools.product(FRESH, (2, 1)), together=1), ids=str)
def test_the_rest_is_the_run_of_a_fresh_pipeline(tmp_path: Path, method: Method, K: int) -> None:
    """One that begins with the model, the momenta and the rate of the checkpoint, and with its next batch: to the last bit."""
    more = {"method": method, "optimizer": MOMENTUM, "eval_every": None}
    train(tmp_path, 4, 13, keeps={"every": 12}, schedule=partial(LambdaLR, lr_lambda=falling), **more)
    path = newest_first(tmp_path)[0]
    start, momenta, updates = joined(path, network()), kept_by_name(path), 12 // method.batches_per_update
    assert len(momenta) == len(list(start.parameters()))
    model, result = train(tmp_path, K, 24, schedule=partial(LambdaLR, lr_lambda=falling), **more)

    def optimizer(named: list[tuple[str, nn.Parameter]]) -> Optimizer:
        made = MOMENTUM(named)
        for name, weight in named:
            made.state[weight] = {"momentum_buffer": momenta[name]["momentum_buffer"].clone()}
        return made

    def schedule(optimizer: Optimizer) -> LambdaLR:
        return LambdaLR(optimizer, lambda n: falling(n + updates))

    fresh, expected = train(tmp_path / "other", K, 12, start, **{**more, "optimizer": optimizer, "schedule": schedule})
    assert result.losses[12:] == expected.losses
    assert same_state(model.state_dict(), fresh.state_dict())
    assert [stage.staleness for stage in result.stages] == [stage.staleness for stage in expected.stages]
    assert [stage.updates for stage in result.stages] == [stage.updates for stage in expected.stages]


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param(OneFOneB(micro_batches=2), {"clip": 0.5}, marks=pytest.mark.slow),
        (PipeDream2BW(micro_batches=3), {}),
        (DDG(ahead="mean"), {"optimizer": delock.recipes.error_feedback(MOMENTUM)}),
        pytest.param(ADL(accumulate=3), {"optimizer": delock.recipes.muon(lr=0.01)}, marks=pytest.mark.slow),
        (FDG(order="backward-first"), {"compression": delock.Compression("vq:codes=4:dim=4:every=3", "int8")}),
        (DGL(), {"optimizer": delock.recipes.scadamw(lr=0.01)}),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_such_a_run_goes_on_in_the_same_stages_bit_for_bit(tmp_path: Path, method: Method, more: dict[str, Any]) -> None:
    more = {"method": method, "schedule": partial(LambdaLR, lr_lambda=falling), **more}
    train(tmp_path, 4, 14, keeps={"every": 10}, **more)
    model, whole = train(tmp_path, 3, 24, keeps={"every": 4, "keep": 9}, **more)
    newest, *older = [verified(path).batches for path in newest_first(tmp_path)]
    assert (newest, older[0], older[2]) == (20, 16, 10)
    for batches in older[:2]:
        newest_first(tmp_path)[0].rename(tmp_path / f"aside-{batches}")
        events: list[Event] = []
        again, result = train(tmp_path, 3, 24, callbacks=[events.append], **more)
        assert [event.batches for event in events if isinstance(event, Resumed)] == [batches]
        assert same_state(again.state_dict(), model.state_dict())
        assert str(result.losses) == str(whole.losses)
        assert [row.test_loss for row in result.evaluations] == [row.test_loss for row in whole.evaluations]
        for mine, theirs in zip(result.stages, whole.stages, strict=True):
            assert (mine.updates, mine.staleness, mine.sent_up, mine.sent_down) == (
                theirs.updates,
                theirs.staleness,
                theirs.sent_up,
                theirs.sent_down,
            )


def test_the_rate_is_a_function_of_the_batch(tmp_path: Path) -> None:
    """It is that of a run that never changed its stages, for every stage's update."""
    rates: dict[int, float] = {}
    told: Callable[[Event], None] = lambda event: rates.update({event.batches: event.lr}) if isinstance(event, StepRecord) else None  # noqa: E731
    chain(tmp_path, [4, 2, 3, 1], method=ADL(accumulate=3), schedule=partial(LambdaLR, lr_lambda=falling), callbacks=[told])
    assert rates == {n + 1: pytest.approx(0.01 * falling(n // 3)) for n in range(44) if n + 1 in rates}
    assert len(rates) > 35
    for path in newest_first(tmp_path):
        found = verified(path)
        for k in range(found.K):
            group = read(path, "optimizer", k)["learner"]["optimizer"]["param_groups"][0]
            assert group["lr"] == pytest.approx(0.01 * falling(found.first // 3 + found.updates[k]))


def test_processes_go_on_as_one_does(tmp_path: Path) -> None:
    more = {"method": "fdg", "schedule": partial(LambdaLR, lr_lambda=falling)}
    train(tmp_path / "a", 3, 14, network(lazy=False), keeps={"every": 10}, **more)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    model, result = train(tmp_path / "a", 2, 24, network(lazy=False), **more)
    other, expected = train(tmp_path / "b", 2, 24, network(lazy=False), workers="processes", **more)
    assert same_state(model.state_dict(), other.state_dict())
    assert str(result.losses) == str(expected.losses)
    assert [row.test_loss for row in result.evaluations] == [row.test_loss for row in expected.evaluations]
