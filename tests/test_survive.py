"""Checkpoints of whole runs: what goes on from one ends as the run that was never interrupted, to the last bit."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import delock
from delock.checkpoints.directory import newest_first, verified
from delock.errors import UsageError
from delock.records import CheckpointRecord, Event, Resumed, StepRecord

from harness import same_state

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
BATCHES = 12


def data(n: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 5, generator=draw), torch.randint(3, (6,), generator=draw)) for _ in range(n)]


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def train(folder: Path | None = None, **more: Any) -> tuple[nn.Sequential, delock.Result]:
    given = {"method": "fdg", "cuts": [2, 5], "batches": BATCHES, "workers": "inline", "optimizer": SGD, **more}
    options = {"checkpoint": delock.Checkpoint(folder, **given.pop("keeps", {}))} if folder else {}
    model = network()
    result = delock.fit(model, data(), data(2, 1), loss=nn.functional.cross_entropy, report=delock.Report(log_every=1), **given, **options)
    return model, result


def same(a: tuple[nn.Sequential, delock.Result], b: tuple[nn.Sequential, delock.Result]) -> None:
    assert same_state(a[0].state_dict(), b[0].state_dict())
    one, other = a[1], b[1]
    assert one.losses == other.losses
    assert [e.test_loss for e in one.evaluations] == [e.test_loss for e in other.evaluations]
    assert one.samples == other.samples
    for mine, theirs in zip(one.stages, other.stages, strict=True):
        assert (mine.staleness, mine.updates, mine.sent_up, mine.sent_down) == (theirs.staleness, theirs.updates, theirs.sent_up, theirs.sent_down)


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(tmp_path: Path, workers: str) -> None:
    whole = train(workers=workers)
    events: list[Event] = []
    same(train(tmp_path, keeps={"every": 5}, workers=workers, on_event=events.append), whole)
    written = [event for event in events if isinstance(event, CheckpointRecord)]
    assert [(one.batches, one.problem) for one in written] == [(5, ""), (10, "")]
    for name in ("batch-00000010", "batch-00000005"):
        again = [one for one in newest_first(tmp_path) if one.name != name]
        for path in again:
            path.rename(path.with_name(f"aside-{path.name}"))
        same(train(tmp_path, keeps={"resume": "newest"}, workers=workers), whole)
        for path in again:
            path.with_name(f"aside-{path.name}").rename(path)
