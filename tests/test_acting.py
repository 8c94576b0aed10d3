"""Early stopping and rates that go by evaluations: evaluation e acts at evaluation e + 1, on all stages, as in a plain loop."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import SWALR

import delock
from acting import EVERY, PLATEAU, SGD, Loop, assert_equal, batches, fit, network
from delock import EarlyStopping
from delock.engine.agreement import reach
from delock.errors import UsageError
from delock.ops import Evaluate
from delock.options import Checkpoint
from delock.plan import RunLength, rest, unroll, windows
from delock.recipes import Plateau
from delock.records import Event, StepRecord

from harness import enough, every_method, same_state

pytestmark = pytest.mark.usefixtures("own_random")
EARLY = EarlyStopping(patience=2, min_delta=0.05)
EACH = pytest.mark.parametrize("workers", ["inline", "processes"])


def stops(patience: int = 2, least: float = 0.05) -> Any:
    """Acts in a plain loop as EARLY does."""

    def act(loop: Loop, number: int, measures: dict[str, float]) -> None:
        best, at = float("inf"), -1
        for i, one in enumerate(loop.measured[: number + 1]):
            if one["loss"] < best - least:
                best, at = one["loss"], i
        loop.over = number - at >= patience
        if loop.made:
            loop.made.step(measures["loss"])

    return act


@pytest.mark.parametrize("K", [1, 3])
def test_a_run_that_stops_early_is_the_plain_loop(K: int) -> None:
    loop = Loop(stops()).run()
    assert EVERY * 3 < len(loop.losses) < 36
    model, result = fit(K=K, callbacks=[EARLY])
    assert_equal(model, loop.model)
    assert result.losses == loop.losses
    assert [one.test_loss for one in result.evaluations] == [one["loss"] for one in loop.measured]
    assert f"stopped early, behind batch {len(loop.losses)}: loss was not less than" in result.stopped


@pytest.mark.parametrize(
    ("method", "workers"),
    enough(itertools.product(("fdg", "gpipe", "dgl", "2bw", delock.ADL(accumulate=3)), ("inline", "processes")), together=1),
    ids=str,
)
def test_a_run_that_stops_early_is_a_run_of_that_length(method: Any, workers: str) -> None:
    model, result = fit(method=method, K=3, workers=workers, callbacks=[EarlyStopping(patience=1, min_delta=0.3)])
    n = len(result.losses)
    assert result.stopped
    assert n < 40
    assert n % EVERY == 0
    other, whole = fit(method=method, K=3, batches=n)
    assert_equal(model, other)
    assert result.losses == whole.losses
    assert [one.test_loss for one in result.evaluations] == [one.test_loss for one in whole.evaluations]
    assert [one.updates for one in result.stages] == [one.updates for one in whole.stages]
    assert whole.stopped == ""


@pytest.mark.parametrize(("K", "how"), enough(itertools.product((1, 3), ("class", "recipe", "object")), together=1))
def test_a_rate_that_goes_by_evaluations_is_that_of_a_plain_loop(K: int, how: str) -> None:
    loop = Loop(lambda loop, number, measures: loop.made.step(measures["loss"]), schedule=PLATEAU).run()
    assert len(set(loop.rates)) > 3
    rates: list[float] = []

    def hear(event: Event) -> None:
        rates.extend([event.lr] if isinstance(event, StepRecord) else [])

    more: dict[str, Any] = {"schedule": PLATEAU}
    if how == "recipe":
        more = {"schedule": Plateau("min:loss", factor=0.5, patience=0, threshold=0.05)}
    model = network()
    if how == "object":
        optimizer = SGD(model.parameters())
        more = {"optimizer": optimizer, "schedule": PLATEAU(optimizer)}
    delock.fit(
        model, batches(), batches(2, 9), loss=nn.functional.cross_entropy, method="bp", workers="inline", epochs=1, eval_every=EVERY,
        cuts=[[], [3], [1, 3]][K - 1], callbacks=[hear], report=delock.Report(log_every=1), **{"optimizer": SGD, **more},
    )  # fmt: skip
    assert_equal(model, loop.model)
    assert rates == loop.rates


def test_a_rate_may_go_by_another_measure() -> None:
    made = partial(ReduceLROnPlateau, mode="max", factor=0.5, patience=0)
    loop = Loop(lambda loop, number, measures: loop.made.step(measures["accuracy"]), schedule=made).run()
    model, _ = fit(K=3, schedule=Plateau("max:accuracy", factor=0.5, patience=0))
    assert_equal(model, loop.model)


@pytest.mark.parametrize("method", ["fdg", "1f1b", "interlocking"])
def test_processes_have_the_bits_of_one(method: str) -> None:
    options: dict[str, Any] = {"schedule": PLATEAU, "callbacks": [EarlyStopping("max:accuracy", patience=4)], "method": method, "K": 3}
    model, result = fit(**options)
    other, again = fit(**options, workers="processes")
    assert_equal(model, other)
    assert (result.losses, result.stopped) == (again.losses, again.stopped)
    plain, _ = fit(method=method, K=3)
    assert not same_state(plain.state_dict(), model.state_dict())


@EACH
def test_a_run_that_goes_on_acts_as_one_that_was_not_interrupted(tmp_path: Path, workers: str) -> None:
    """From every batch on, also between an evaluation and its effect, and behind the batch at which some stages have ended."""
    given: dict[str, Any] = {"method": "fdg", "K": 3, "schedule": PLATEAU, "callbacks": [EarlyStopping(patience=1, min_delta=0.3)]}
    whole, result = fit(**given)
    assert len(result.losses) == 12
    for at in range(4, 15) if workers == "inline" else (10, 13):
        folder = tmp_path / str(at)
        fit(**given, checkpoint=Checkpoint(folder, every=at, keep=1))
        assert next(folder.iterdir()).name >= f"batch-{at:08d}"
        model, again = fit(**given, workers=workers, checkpoint=Checkpoint(folder, resume="newest"))
        assert_equal(model, whole)
        assert (again.losses, again.stopped) == (result.losses, result.stopped), at
        assert [one.test_loss for one in again.evaluations] == [one.test_loss for one in result.evaluations]


@pytest.mark.parametrize("K", [1, 2, 3, 4])
def test_an_evaluation_is_over_before_any_stage_comes_to_the_next(K: int) -> None:
    """In the order of ticks, for every method, at the least number of batches between them; so nobody waits for ever."""
    for method in every_method(K):
        every = reach(method, K) + 1
        columns = unroll(method, K, RunLength(5 * every + 1, every, 2)).columns
        ticks = [{step.op.batch // 2: step.tick for step in column if isinstance(step.op, Evaluate)} for column in columns]
        assert len(ticks[0]) == 6
        assert all(ticks[-1][e] < min(own[e + 1] for own in ticks) for e in range(5)), method


@pytest.mark.parametrize("K", [1, 2, 4])
def test_a_column_does_not_depend_on_batches_behind_an_evaluation(K: int) -> None:
    """Up to its place of an evaluation, a stage does what it does in a run that ends there; `rest` has what is left of that."""
    for method in every_method(K):
        for ended in (8, 12):
            long, short = RunLength(30, 4, 2), RunLength(ended, 4, 2)
            for plan in windows(method, K, long, 5):
                own = rest(method, K, short, plan.begin)
                for column, other in zip(plan.columns, own.columns, strict=True):
                    end = next((i for i, one in enumerate(column) if one.op == Evaluate((ended // 4 - 1) * 2)), len(column))
                    if plan.begin + 5 <= ended or end < len(column):
                        assert other[:end] == column[:end], (method, plan.begin)


def test_what_comes_too_fast_is_refused() -> None:
    with pytest.raises(UsageError, match=r"eval_every is 2, but EarlyStopping acts .* in 3 stages of fdg .* every 3 batches"):
        fit(method="fdg", K=3, callbacks=[EARLY], eval_every=2)
    fit(method="fdg", K=3, callbacks=[EARLY], eval_every=3, batches=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"callbacks": [EARLY], "test": None}, "EarlyStopping acts on evaluations, but there is no test data"),
        ({"schedule": PLATEAU, "test": None}, "a schedule of evaluations acts on evaluations, but there is no test data"),
        ({"callbacks": [EARLY], "method": "dgl-async"}, "EarlyStopping needs stages that keep one order, but those of dgl-async"),
        ({"callbacks": [EARLY], "simulation": delock.Simulation(emulate="1:1")}, "EarlyStopping does not go with emulate"),
        ({"callbacks": [EarlyStopping("max:hits")]}, "EarlyStopping goes by 'hits', but evaluations have loss, accuracy: use one of them"),
        ({"schedule": Plateau("max:hits")}, "a schedule of evaluations goes by 'hits', but evaluations have loss, accuracy"),
        ({"schedule": Plateau("loss")}, "monitor is 'loss', but it must say which way is better"),
        ({"schedule": partial(ReduceLROnPlateau, mode="max")}, "ReduceLROnPlateau is given the test loss, which gets better when it falls"),
        ({"schedule": lambda o: ReduceLROnPlateau(o)}, "ReduceLROnPlateau waits for a measure of evaluations, and is not seen"),
    ],
)
def test_what_could_not_act_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit(**{"K": 2, **options})


@pytest.mark.parametrize("kind", [delock.EMA, delock.ProgressBar])
def test_a_class_of_callbacks_is_refused(kind: Any) -> None:
    with pytest.raises(UsageError, match=f"callbacks holds the class {kind.__name__}: give"):
        fit(K=2, callbacks=[kind])


class Drop:
    """A factor that falls at an update; its option is a tensor."""

    def __init__(self, at: int) -> None:
        self.at = torch.tensor(at)

    def __call__(self, n: int) -> float:
        return 1.0 if n < self.at else 0.1


class Decay(torch.optim.SGD):
    """An optimizer that writes to its own rate."""

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        for group in self.param_groups:
            group["lr"] *= 0.97


@pytest.mark.parametrize("schedule", [partial(ExponentialLR, gamma=0.95), partial(CosineAnnealingLR, T_max=15)])
def test_a_run_goes_on_bit_for_bit_where_its_optimizer_writes_to_the_rate(schedule: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "ddg", "K": 2, "optimizer": partial(Decay, lr=0.1), "schedule": schedule, "batches": 15}
    whole, _ = fit(**given)
    fit(**{**given, "batches": 9}, checkpoint=Checkpoint(tmp_path, every=4))
    again, _ = fit(**given, checkpoint=Checkpoint(tmp_path, resume="newest"))
    assert same_state(again.state_dict(), whole.state_dict())


def later(updates: int) -> Callable[[Any], LRScheduler]:
    return lambda optimizer: SequentialLR(optimizer, [LinearLR(optimizer, 0.1, 1.0, 8), CosineAnnealingLR(optimizer, updates - 8)], [8])


LONGER: dict[str, Callable[[int], Callable[[Any], LRScheduler]]] = {
    "recipe": lambda updates: delock.recipes.Schedule("cosine", updates),
    "cosine": lambda updates: partial(CosineAnnealingLR, T_max=updates),
    "cycle": lambda updates: partial(OneCycleLR, max_lr=0.1, total_steps=updates + 1),
    "milestones": lambda updates: partial(MultiStepLR, milestones=[updates - 2]),
    "sequence": later,
    "chain": lambda updates: lambda optimizer: ChainedScheduler([LinearLR(optimizer, 0.1, 1.0, 3), CosineAnnealingLR(optimizer, updates)]),
    "average": lambda updates: partial(SWALR, swa_lr=0.01, anneal_epochs=updates),
    "tensor": lambda updates: partial(LambdaLR, lr_lambda=Drop(updates - 2)),
}


@pytest.mark.parametrize("kind", LONGER)
def test_a_run_that_is_made_longer_goes_on_by_the_schedule_of_its_new_length(kind: str, tmp_path: Path) -> None:
    """So do all stages, whatever their number was: from the first update on."""
    (tmp_path / "own").mkdir()

    def rates(updates: int, batches: int, K: int, **more: Any) -> dict[int, float]:
        seen: dict[int, float] = {}
        given: dict[str, Any] = {"method": "ddg", "schedule": LONGER[kind](updates), "report": delock.Report(log_every=1), **more}
        fit(K=K, **given, batches=batches, callbacks=[lambda e: seen.update({e.batches: e.lr}) if isinstance(e, StepRecord) else None])
        return {batch: rate for batch, rate in seen.items() if batch > 8}

    whole = rates(15, 15, 2)
    rates(11, 9, 2, checkpoint=Checkpoint(tmp_path / "own", every=4))
    for K in (2, 3):
        copied = shutil.copytree(tmp_path / "own", tmp_path / f"{K}")
        assert rates(15, 15, K, checkpoint=Checkpoint(copied, resume="newest")) == whole


def test_a_folder_of_the_users_own_stays(tmp_path: Path) -> None:
    fit(K=2, batches=2, checkpoint=Checkpoint(tmp_path, every=100))
    fit(K=2, batches=2, checkpoint=Checkpoint(tmp_path / "made" / "inside", every=100))
    assert tmp_path.is_dir()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("given", [{"monitor": "loss"}, {"patience": 0}, {"min_delta": -1.0}, {"patience": "3"}])
def test_what_early_stopping_cannot_be_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        EarlyStopping(**given)


def test_a_run_goes_on_with_the_same_callbacks_and_stages(tmp_path: Path) -> None:
    given: dict[str, Any] = {"method": "fdg", "K": 3, "callbacks": [EARLY]}
    fit(**given, checkpoint=Checkpoint(tmp_path, every=3), batches=10)
    resume = {"checkpoint": Checkpoint(tmp_path, resume="newest")}
    with pytest.raises(UsageError, match=r"callbacks was \[.*patience=2.*\] when .*, and is \[.*patience=5"):
        fit(**{**given, "callbacks": [EarlyStopping(patience=5, min_delta=0.05)]}, **resume)
    with pytest.raises(UsageError, match="EarlyStopping goes on only in the stages of the checkpoint"):
        fit(**{**given, "K": 2}, **resume)


def test_a_session_has_no_evaluations_of_its_own() -> None:
    with pytest.raises(UsageError, match="a session evaluates when its loop says"):
        delock.session(network(), batches()[0], loss=nn.functional.cross_entropy, optimizer=SGD, schedule=PLATEAU)
    assert torch.is_grad_enabled()
