"""The best weights and averages of weights are those of a plain loop, in the model, in evaluations and in runs that go on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import delock
from acting import EVERY, PLATEAU, SGD, Loop, assert_equal, batches, fit, network
from delock import EMA, EarlyStopping, KeepBest
from delock.errors import UsageError
from delock.options import Checkpoint
from delock.stage.average import Average
from delock.stage.module import ModuleFunction

from harness import every_method, one_of_each, same_state

pytestmark = pytest.mark.usefixtures("own_random")
AVERAGE = EMA(0.8)
ALL: dict[str, Any] = {"K": 3, "callbacks": [EarlyStopping(patience=2, min_delta=0.1), KeepBest("max:accuracy"), AVERAGE]}


class Averaged:
    """The average of a plain loop, as torch has it."""

    def __init__(self) -> None:
        self.found: Any = None

    def after(self, loop: Loop) -> None:
        if self.found is None:
            self.found = AveragedModel(loop.model, multi_avg_fn=get_ema_multi_avg_fn(0.8))
        self.found.update_parameters(loop.model)

    def evaluated(self, loop: Loop) -> Any:
        return self.found.module


@pytest.mark.parametrize("K", [1, 3])
@pytest.mark.parametrize("monitor", ["min:loss", "max:accuracy"])
def test_the_best_weights_are_those_of_a_plain_loop(K: int, monitor: str) -> None:
    seen: list[nn.Module] = []
    loop = Loop(at=lambda loop: seen.append(copy.deepcopy(loop.model))).run()
    values = [one[monitor[4:]] for one in loop.measured]
    at = values.index(max(values) if monitor.startswith("max") else min(values))  # the first of equals
    assert at < len(seen) - 1
    model, result = fit(K=K, callbacks=[KeepBest(monitor)])
    assert_equal(model, seen[at])
    assert result.best == result.evaluations[at]
    assert result.losses == loop.losses


@pytest.mark.parametrize("K", [1, 3])
def test_all_of_it_together_is_a_plain_loop(K: int) -> None:
    """Optimizer and schedule as objects, a rate that goes by evaluations, early stopping, the best weights, an average."""
    average, seen = Averaged(), list[nn.Module]()

    def act(loop: Loop, number: int, measures: dict[str, float]) -> None:
        losses = [one["loss"] for one in loop.measured[: number + 1]]
        best = [i for i, one in enumerate(losses) if all(one < before - 0.02 for before in losses[:i])][-1]  # a step down each time
        loop.over = number - best >= 3
        if not loop.over:
            loop.made.step(measures["loss"])

    loop = Loop(
        act, lambda loop: seen.append(copy.deepcopy(average.found.module)), average.after, average.evaluated, schedule=PLATEAU
    ).run()  # fmt: skip
    losses = [one["loss"] for one in loop.measured]
    assert 12 < len(loop.losses) < 40
    assert len(set(loop.rates)) > 1
    model = network()
    optimizer = SGD(model.parameters())
    result = delock.fit(
        model, batches(), batches(2, 9), loss=cross_entropy, method="bp", workers="inline", cuts=[[], [3], [1, 3]][K - 1], epochs=1,
        optimizer=optimizer, schedule=PLATEAU(optimizer), eval_every=EVERY,
        callbacks=[EarlyStopping(patience=3, min_delta=0.02), KeepBest(), AVERAGE],
    )  # fmt: skip
    assert result.losses == loop.losses
    assert [one.test_loss for one in result.evaluations] == losses
    assert_equal(model, seen[losses.index(min(losses))])
    assert result.stopped


@pytest.mark.parametrize("K", [1, 3])
def test_an_average_is_that_of_torch(K: int) -> None:
    average = Averaged()
    loop, plain = Loop(after=average.after, evaluated=average.evaluated).run(), Loop().run()
    for given, model, measured in (
        (AVERAGE, average.found.module, loop.measured),
        (EMA(0.8, evaluate=False), average.found.module, plain.measured),
        (EMA(0.8, load=False), loop.model, loop.measured),
    ):
        own, result = fit(K=K, callbacks=[given])
        assert_equal(own, model)
        assert [one.test_loss for one in result.evaluations] == [one["loss"] for one in measured]
        assert result.losses == loop.losses


@pytest.mark.parametrize("method", one_of_each(every_method(3)), ids=str)
def test_averages_and_best_weights_change_no_training(method: Any) -> None:
    """With every method they give the loss of the evaluation that they are of."""
    small = [(x[:7].repeat(2, 1), y[:7].repeat(2)) for x, y in batches(12)]
    given: dict[str, Any] = {"method": method, "K": 3, "data": small, "eval_every": 4}
    plain, result = fit(**given)
    model, best = fit(**given, callbacks=[KeepBest()])
    tested = [one.test_loss for one in result.evaluations]
    assert (best.losses, [one.test_loss for one in best.evaluations]) == (result.losses, tested)
    assert delock.evaluate(model, batches(2, 9), loss=cross_entropy).loss == min(tested)
    mean, averaged = fit(**given, callbacks=[AVERAGE])
    assert averaged.losses == result.losses
    assert delock.evaluate(mean, batches(2, 9), loss=cross_entropy).loss == averaged.evaluations[-1].test_loss
    assert not same_state(mean.state_dict(), plain.state_dict())


@pytest.mark.parametrize("method", [delock.FDG(), delock.OneFOneB(2), delock.PipeDream2BW(2)], ids=str)
def test_processes_keep_what_one_keeps(method: Any) -> None:
    model, result = fit(**ALL, method=method)
    other, again = fit(**ALL, method=method, workers="processes")
    assert_equal(model, other)
    assert (result.losses, result.stopped) == (again.losses, again.stopped)
    assert result.best
    assert again.best
    assert result.best.test_loss == again.best.test_loss


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_what_is_kept_is_in_checkpoints(tmp_path: Path, workers: str) -> None:
    given = {**ALL, "method": "fdg"}
    whole, result = fit(**given)
    for at in range(4, len(result.losses) + 3, 2 if workers == "inline" else 9):
        folder = tmp_path / str(at)
        fit(**given, checkpoint=Checkpoint(folder, every=at, keep=1))
        model, again = fit(**given, workers=workers, checkpoint=Checkpoint(folder, resume="newest"))
        assert_equal(model, whole)
        assert result.best
        assert again.best
        assert again.best.test_loss == result.best.test_loss, at


def test_memory_counts_what_is_kept() -> None:
    """Two sets of weights and buffers for the best, one of weights for the average."""
    plain, best, mean = (fit(K=2, batches=4, callbacks=given)[1].started.stages[0].live for given in ([], [KeepBest()], [AVERAGE]))
    weights, buffers = 4 * (5 * 8 + 8 + 16), 4 * 16 + 8
    assert plain
    assert best == plain + 2 * (weights + buffers)
    assert mean == plain + weights


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([KeepBest(), KeepBest("max:accuracy")], "callbacks holds 2 of KeepBest, and the model can have the weights of one"),
        ([AVERAGE, EMA(0.5)], "callbacks holds 2 of EMA"),
        ([KeepBest(), EMA(evaluate=False)], "KeepBest and EMA both put weights into the model"),
        ([KeepBest("max:hits")], "KeepBest goes by 'hits', but evaluations have loss, accuracy"),
    ],
)
def test_what_cannot_both_be_is_refused(callbacks: list[Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(callbacks=callbacks)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EMA(1.5), "decay is 1.5, but it must be at most 1"),
        (lambda: EMA(evaluate=False, load=False), "so it would change nothing"),
        (lambda: KeepBest("loss"), "monitor is 'loss', but it must say which way is better"),
    ],
)
def test_what_callbacks_cannot_be_is_refused(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make()


def test_an_average_needs_no_test_data() -> None:
    model, _ = fit(callbacks=[AVERAGE], test=None, K=3)
    average = Averaged()
    Loop(after=average.after).run()
    assert_equal(model, average.found.module)
    with pytest.raises(UsageError, match="EMA needs stages that keep one order"):
        fit(callbacks=[AVERAGE], test=None, K=2, method="dgl-async")


class Tied(nn.Module):
    """Its first weight is also its last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = nn.functional.linear(torch.tanh(self.middle(torch.tanh(self.first(x)))), self.first.weight)
        return found


class SendsWeight(nn.Linear):
    """Sends its weight beside what it computes."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), self.weight


def test_an_average_under_way_stays_as_it_was() -> None:
    body = ModuleFunction(SendsWeight(3, 3), (0, 0), torch.device("cpu"))
    body.average = average = Average(body.module, 0.5)
    average.update()
    _, sent = body.sent(body.evaluate(torch.ones(2, 3)))
    before = sent.clone()
    assert torch.equal(sent, body.weights["weight"])
    with torch.no_grad():
        body.weights["weight"].zero_()
    average.update()
    assert torch.equal(sent, before)


def test_a_weight_that_travels_is_the_average_too() -> None:
    model = Tied()
    result = delock.fit(
        model, batches(), batches(2, 9), loss=cross_entropy, optimizer=SGD, cuts=["middle"], workers="inline", method="fdg", epochs=1,
        eval_every=5, callbacks=[AVERAGE],
    )  # fmt: skip
    assert delock.evaluate(model, batches(2, 9), loss=cross_entropy).loss == result.evaluations[-1].test_loss
