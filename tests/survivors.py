"""A small run for the tests of checkpoints, and the ways in which it is cut off."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import delock
from delock.checkpoints.directory import read, verified
from delock.records import Event, Resumed, StepRecord

from harness import same_state

BATCHES = 24
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
Run = tuple[nn.Sequential, delock.Result]


def data(n: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 6 samples with 5 features and 3 classes."""
    draw = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 5, generator=draw), torch.randint(3, (6,), generator=draw)) for _ in range(n)]


def network(width: int = 8) -> nn.Sequential:
    """Seven layers; stages are cut in front of the third and the sixth."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = [nn.Linear(5, width), nn.ReLU(), nn.Dropout(0.2), nn.Linear(width, width), nn.BatchNorm1d(width)]
        return nn.Sequential(*first, nn.Tanh(), nn.Linear(width, 3))


def train(folder: Path | None = None, *, width: int = 8, keeps: dict[str, Any] | None = None, of: Any = None, **more: Any) -> Run:
    """Trains it, on batches `of`; keeps: the options of its checkpoints in `folder`."""
    given = {"method": "fdg", "cuts": [2, 5], "batches": BATCHES, "workers": "inline", "optimizer": SGD, "loss": cross_entropy, **more}
    kept = {"checkpoint": delock.Checkpoint(folder, **(keeps or {}))} if folder else {}
    model, report = network(width), delock.Report(log_every=1)
    return model, delock.fit(model, of or data(), data(2, 1), report=report, **given, **kept)


def assert_same(a: Run, b: Run) -> None:
    """Two runs ended alike: weights, losses, evaluations, counters."""
    assert same_state(a[0].state_dict(), b[0].state_dict())
    one, other = a[1], b[1]
    assert one.losses == other.losses
    assert [e.test_loss for e in one.evaluations] == [e.test_loss for e in other.evaluations]
    assert one.samples == other.samples
    for mine, theirs in zip(one.stages, other.stages, strict=True):
        for what in ("staleness", "layer_staleness", "updates", "sent_up", "sent_down"):
            assert getattr(mine, what) == getattr(theirs, what), what


class Killer:
    """Kills a stage with SIGKILL, once, when the last stage has trained so and so many batches; a callback of `fit`."""

    def __init__(self, seed: int, K: int, batches: int = BATCHES) -> None:
        draw = random.Random(seed)
        self.stage, self.at = draw.randrange(K), draw.randrange(1, batches - 1)
        self.killed = False
        self.resumed: list[Resumed] = []
        self.in_flight = 0  # batches and messages in the checkpoint that the run went on from

    def __call__(self, event: Event) -> None:
        if isinstance(event, Resumed):
            self.resumed.append(event)
            self.in_flight += in_flight(Path(event.path)) if event.path else 0
        if isinstance(event, StepRecord) and event.batches == self.at and not self.killed:
            self.killed = True
            kill(self.stage)


def kill(stage: int) -> None:
    """Kills the process of a stage of the run in this program."""
    for process in multiprocessing.active_children():
        if process.name == f"delock-stage-{stage}" and process.pid:
            os.kill(process.pid, signal.SIGKILL)


def in_flight(path: Path) -> int:
    """Batches between Forward and Backward, and messages under way, in a checkpoint."""
    found = [read(path, "in-flight", k) for k in range(verified(path).K)]
    return sum(len(one["stage"]["in_flight"]) + sum(map(len, one["in_flight"].values())) for one in found)
