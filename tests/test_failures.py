"""A stage that fails in the middle of a run: raises, is killed, or hangs; the run ends soon and says which and where."""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from multiprocessing import parent_process
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

from delock.api import fit
from delock.errors import StageFailed
from delock.options import Placement, Report
from delock.records import StepRecord

from ranks import a_loop_without_end

pytestmark = pytest.mark.usefixtures("own_random")


class BadBackward(torch.autograd.Function):
    """The identity, whose derivative raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *errors: Tensor) -> Tensor:
        raise ZeroDivisionError("the culprit's own words")


class Trouble(nn.Module):
    """The identity until the fifth training batch; only in a stage's process, for the parent measures a copy."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.batch = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch < 5 or parent_process() is None:
            return x
        match self.how:
            case "forward":
                raise ZeroDivisionError("the culprit's own words")
            case "backward":
                return BadBackward.apply(x)  # type: ignore[no-any-return]
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                a_loop_without_end()
        return x


def troubled(how: str, cut: int, patience: float = 60.0, link: Literal["auto", "gloo", "shared"] = "gloo") -> tuple[str, float]:
    """Train with a layer in trouble; the error's message, and the seconds between the last sign of life and the error."""
    net = nn.Sequential(nn.Linear(4, 8), Trouble(how), nn.Linear(8, 8), nn.Linear(8, 2))
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(12)]
    heard = [time.monotonic()]

    def note(event: object) -> None:
        if isinstance(event, StepRecord):
            heard.append(time.monotonic())

    with pytest.raises(StageFailed) as caught:
        fit(
            net,
            batches,
            loss=nn.functional.cross_entropy,
            method="fdg",
            cuts=[cut],
            optimizer=functools.partial(torch.optim.SGD, lr=0.1),
            epochs=1,
            placement=Placement(patience=patience, link=link),
            report=Report(log_every=1),
            callbacks=[note],
        )
    ended = time.monotonic() - heard[-1]
    assert len(heard) > 1, "it failed before the first batch was through"
    return str(caught.value), ended


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize(
    ("how", "cut", "expected"),
    [
        ("forward", 2, r"stage 0 failed in F4 \(forward of batch 4, tick 4\): ZeroDivisionError: the culprit's own words"),
        ("forward", 1, r"stage 1 failed in F4 \(forward of batch 4, tick 5\): ZeroDivisionError: the culprit's own words"),
        ("backward", 1, r"stage 1 failed in B4 \(backward of batch 4, tick 5\): ZeroDivisionError: the culprit's own words"),
    ],
)
def test_a_stage_that_raises_ends_the_run_and_is_told(how: str, cut: int, expected: str) -> None:
    message, seconds = troubled(how, cut)
    assert re.match(expected, message), message
    assert "Traceback (most recent call last)" in message
    assert re.search(r'test_failures\.py", line \d+, in (forward|backward)\n', message)
    assert seconds < 10


@pytest.mark.usefixtures("own_random")
def test_a_stage_that_raises_in_this_process_is_told_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_failures.parent_process", lambda: 1)
    net = nn.Sequential(nn.Linear(4, 8), Trouble("forward"), nn.Linear(8, 2))
    net[1].batch = -4  # measured three times
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(12)]
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    with pytest.raises(StageFailed, match=r"stage 0 failed in F8 \(forward of batch 8, tick 8\): ZeroDivisionError: the culprit's own"):
        fit(net, batches, loss=nn.functional.cross_entropy, cuts=[2], optimizer=optimizer, epochs=1, workers="inline")


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("link", ["gloo", "shared"])
def test_a_stage_that_is_killed_is_named(link: str) -> None:
    message, seconds = troubled("kill", 1, link=link)
    assert message.startswith("stage 1 was killed by SIGKILL (the system does so when memory runs out) in F4 (forward of batch 4, tick 5)")
    assert seconds < 10


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("link", ["gloo", "shared"])
def test_a_stage_that_hangs_shows_its_stack(link: str) -> None:
    message, seconds = troubled("hang", 1, patience=2, link=link)
    assert "stage 1 hangs in F4 (forward of batch 4, tick 5): it has not moved for " in message
    assert "stage 0 waits for stage 1 in " in message
    assert "in a_loop_without_end" in message
    assert seconds < 30


@pytest.mark.usefixtures("own_random")
def test_a_user_error_in_a_metric_is_told() -> None:
    """One more way in which a user's own code fails, in the last stage."""

    calls = []

    def wrong(outputs: Tensor, targets: Tensor) -> float:
        calls.append(1)
        if len(calls) > 1:  # in the second evaluation; the trial before the run does not count
            raise KeyError("accuracy")
        return 0.0

    batches = [(torch.randn(6, 4), torch.randint(2, (6,)))]
    optimizer = functools.partial(torch.optim.SGD, lr=0.1)
    options = {"loss": nn.functional.cross_entropy, "metrics": {"accuracy": wrong}, "optimizer": optimizer, "epochs": 2}
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.raises(KeyError, match="accuracy"):
        fit(model, batches, batches, workers="inline", **options)
    calls.clear()
    with pytest.raises(StageFailed, match=r"stage 1 failed in .*: KeyError: 'accuracy'(.|\n)*raise KeyError\(\"accuracy\"\)"):
        fit(model, batches, batches, **options)
