"""`delock.fit` as a user meets it: the same numbers everywhere, what it reports, and what it leaves alone."""

from __future__ import annotations

import itertools
import os
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from delock.data.iterable import as_loader
from delock.errors import StageFailed
from delock.keys import key
from delock.methods import ADL, BP, DDG, DSP, FDG, FR, GPipe, OneFOneB
from delock.options import Placement, Report
from delock.records import EvaluationRecord, Event, Started, StepRecord

from points import CLASSES, SGD, broken_loss, fit, hits, network, same, test_data, train_data, weighted, weights

pytestmark = pytest.mark.usefixtures("own_random")

# -- the same everywhere -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "K"), [(BP(), 3), (BP(accumulate=2), 2), (ADL(2), 2), (DSP(), 3)], ids=str)
def test_processes_give_what_one_process_gives(method: Any, K: int) -> None:
    """Weights in the model, losses, evaluations, staleness; the data are shuffled and noisy."""
    options = {"method": method, "stages": K, "metrics": {"hits": hits}, "cuts": [2, 4][: K - 1], "seed": 5}
    here, a = fit(test=test_data(), **options)
    there, b = fit(test=test_data(), workers="processes", **options)
    assert same(here, there)
    assert not same(here, network())
    assert a.losses == b.losses
    assert [(e.batches, e.test_loss, e.metrics) for e in a.evaluations] == [(e.batches, e.test_loss, e.metrics) for e in b.evaluations]
    for s, t in zip(a.stages, b.stages, strict=True):
        assert (s.parameters, s.updates, s.staleness, s.layer_staleness) == (t.parameters, t.updates, t.staleness, t.layer_staleness)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("method", ["bp", "gpipe", "ddg", "fr", "fdg", "adl", "dsp"])
def test_the_data_do_not_depend_on_the_method_or_the_stages(method: str) -> None:
    """The network is fed the same batches: order, augmentation and labels."""
    fed: list[list[Tensor]] = []
    for K in (1, 2, 4):
        seen: list[Tensor] = []

        class Watch(nn.Linear):
            def forward(self, x: Tensor, seen: list[Tensor] = seen) -> Tensor:
                if self.training and torch.is_grad_enabled() and not any(torch.equal(x, y) for y in seen):
                    seen.append(x.detach().clone())
                return super().forward(x)

        model = nn.Sequential(Watch(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, CLASSES))
        fit(model, stages=K, cuts=[1, 2, 3][: K - 1], method=method, seed=3)
        fed.append(torch.cat(seen)[:22] if method == "gpipe" else torch.cat(seen[-7:]))
    assert torch.equal(fed[0], fed[1])
    assert torch.equal(fed[0], fed[2])


def by_hand(model: nn.Module, data: DataLoader[Any], epochs: int, seed: int, schedule: Any = None) -> list[float]:
    """Plain PyTorch, seeded with the keys that the common ground names: order and noise by (seed, epoch, batch), dropout by batch."""
    optimizer = SGD(model.parameters())
    rates = schedule(optimizer) if schedule else None
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[]):
        for e in range(epochs):
            for x, y in as_loader(data, seed).epoch(e):
                torch.manual_seed(key(seed, 0, len(losses)))
                loss = weighted(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if rates:
                    rates.step()
                losses.append(loss.item())
    return losses


@pytest.mark.parametrize("method", [BP(), DDG(), FR(), FDG(), FDG(at="mixed", order="backward-first"), ADL(1), DSP()], ids=str)
def test_one_stage_is_plain_training_bit_for_bit(method: Any) -> None:
    schedule = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.2, total_steps=12)
    plain = network()
    losses = by_hand(plain, train_data(), 3, 11, schedule)
    model, result = fit(stages=1, method=method, epochs=3, seed=11, schedule=schedule)
    assert same(model, plain)
    assert result.losses == losses


@pytest.mark.usefixtures("own_random")
def test_bp_accumulates() -> None:
    """Micro-batches of a batch make its one step: close to the whole batch, and the same however the work is ordered."""
    made = [fit(network(0), method=m, loss=mean_loss, train=train_data(8), stages=2, cuts=[4]) for m in (BP(2), GPipe(2), OneFOneB(2))]
    assert same(made[0][0], made[1][0])
    assert same(made[0][0], made[2][0])
    assert made[0][1].losses == made[1][1].losses == made[2][1].losses
    assert [s.updates for s in made[0][1].stages] == [6, 6]
    without_statistics = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES)]
    whole, parts = (nn.Sequential(*(seeded_copy(m) for m in without_statistics)).double() for _ in range(2))
    data = [(x.double(), y) for x, y in as_loader(train_data(8)).epoch(0)]
    fit(whole, data, loss=mean_loss, method=BP())
    fit(parts, data, loss=mean_loss, method=BP(3))
    assert all(torch.allclose(a, b, rtol=1e-12) for a, b in zip(weights(whole), weights(parts), strict=True))
    assert not same(whole, parts), "was it split at all?"


def seeded_copy(module: nn.Module) -> nn.Module:
    made = type(module)(module.in_features, module.out_features) if isinstance(module, nn.Linear) else nn.Tanh()
    made.load_state_dict(module.state_dict())
    return made


def mean_loss(out: Tensor, target: dict[str, Tensor]) -> Tensor:
    return (cross_entropy(out, target["label"].clamp(0), reduction="none") * target["weight"]).mean()


# -- how long, and what is told ----------------------------------------------------------------------------------------------------


def test_events_come_in_order_and_are_the_result() -> None:
    heard: list[Event] = []
    _, result = fit(test=test_data(), callbacks=[heard.append], report=Report(log_every=3), metrics={"hits": hits, "one": one})
    first, *rest = heard
    assert isinstance(first, Started)
    assert first == result.started
    assert (first.method.lower()[:3], first.workers, first.batches, first.epochs, len(first.stages)) == ("fdg", "inline", 8, 2.0, 2)
    steps = [event for event in rest if isinstance(event, StepRecord)]
    assert [(e.batches, e.epoch, e.loss) for e in steps] == [(n, n / 4, result.losses[n - 1]) for n in (3, 6, 8)]
    assert [e.samples for e in steps] == [18, 34, 44]
    evaluations = [event for event in rest if isinstance(event, EvaluationRecord)]
    assert evaluations == result.evaluations
    assert [(e.batches, e.epoch, e.samples) for e in evaluations] == [(4, 1.0, 22), (8, 2.0, 44)]
    assert [e.train_loss for e in evaluations] == [pytest.approx(sum(result.losses[a : a + 4]) / 4) for a in (0, 4)]
    assert all(e.metrics["one"] == 1.0 and 0 <= e.metrics["hits"] <= 1 for e in evaluations)
    assert [type(event).__name__ for event in rest] == ["StepRecord", "EvaluationRecord", "StepRecord", "StepRecord", "EvaluationRecord"]
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(rest))
    assert (result.samples, len(result.losses)) == (44, 8)
    assert result.samples_per_second == pytest.approx(44 / result.seconds)


def one(out: Tensor, target: Any) -> int:
    return 1


def test_an_evaluation_is_the_mean_over_the_samples_in_eval_mode() -> None:
    model, result = fit(test=test_data(), metrics={"hits": hits})
    model.eval()
    batches = list(as_loader(test_data(), 0).epoch(0))
    with torch.no_grad():
        outputs = [(model(x), y, len(x)) for x, y in batches]
    assert result.evaluations[-1].test_loss == pytest.approx(sum(weighted(o, y).item() * n for o, y, n in outputs) / 10)
    assert result.evaluations[-1].metrics["hits"] == pytest.approx(sum(hits(o, y).item() * n for o, y, n in outputs) / 10)


@pytest.mark.parametrize("method", [BP(), FDG(), DSP()], ids=str)
def test_steps_and_evaluations_at_any_step(method: Any) -> None:
    _, long = fit(epochs=3, method=method)
    _, short = fit(epochs=None, batches=7, test=test_data(), eval_every=3, method=method)
    assert short.losses == long.losses[:7], "an evaluation, or the end, changes what was before"
    assert [e.batches for e in short.evaluations] == [3, 6, 7]
    _, never = fit(epochs=None, batches=2, eval_every=5, test=test_data(), method=method)
    assert [e.batches for e in never.evaluations] == [2]
    _, untested = fit(epochs=None, batches=5, method=method)
    assert [(e.batches, e.metrics) for e in untested.evaluations] == [(4, {}), (5, {})]
    assert all(e.test_loss != e.test_loss for e in untested.evaluations)


# -- what is left alone ------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_random_state_threads_and_environment_are_the_callers(workers: str) -> None:
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy(), dict(os.environ)
    _, first = fit(workers=workers, test=test_data(), placement=Placement(threads=2))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()
    assert dict(os.environ) == before[3]
    assert torch.get_num_threads() == 1
    if workers == "inline":
        torch.rand(7)
        random.random()
        _, second = fit(test=test_data(), placement=Placement(threads=2))
        assert second.losses == first.losses, "a run depends on what was drawn before it"


def test_another_seed_is_another_run() -> None:
    runs = [fit(seed=seed)[1].losses for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]


def test_threads_are_given_back_after_a_failure() -> None:
    state = torch.get_rng_state()
    with pytest.raises(StageFailed):
        fit(loss=broken_loss, placement=Placement(threads=2))
    assert torch.get_num_threads() == 1
    assert torch.equal(torch.get_rng_state(), state)
