"""Runs keep the checkpoints that were asked for, when they were; neither a run that fails nor a disk that fails harms the other."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from threading import Event as Flag
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

import delock
from delock.checkpoints.directory import newest_first, verified
from delock.errors import NonFinite
from delock.records import CheckpointRecord, EvaluationRecord, Event, StepRecord
from delock.run.survival import checkpointing

from survivors import SGD, assert_same, data, network, train

pytestmark = pytest.mark.usefixtures("own_random")


def names(folder: Path) -> list[int]:
    """The batches of the checkpoints in a folder, the newest first."""
    return [int(path.name[6:]) for path in newest_first(folder)]


def written(events: list[Event]) -> list[CheckpointRecord]:
    return [event for event in events if isinstance(event, CheckpointRecord)]


@pytest.mark.parametrize(("best", "better"), [("min:loss", min), ("max:loss", max)])
def test_the_best_stays(tmp_path: Path, best: str, better: Callable[..., Any]) -> None:
    events: list[Event] = []
    train(tmp_path, keeps={"best": best, "keep": 1}, eval_every=3, callbacks=[events.append])
    made = [event.batches for event in written(events)]
    judged = [(event.batches, event.test_loss) for event in events if isinstance(event, EvaluationRecord)][: len(made)]
    assert len(made) == 6
    assert all(was < at <= was + 3 for (was, _), at in zip(judged, made, strict=True))  # behind its evaluation, not behind the next
    found = {at: verified(tmp_path / f"batch-{at:08d}").measures["loss"] for at in names(tmp_path)}
    assert found == {at: loss for at, (_, loss) in zip(made, judged, strict=True) if at in found}
    assert set(found) == {made[-1], better((loss, at) for at, (_, loss) in zip(made, judged, strict=True))[1]}


def test_the_newest_stay(tmp_path: Path) -> None:
    train(tmp_path, keeps={"every": 4, "keep": 3})
    assert names(tmp_path) == [20, 16, 12]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"batch-{at:08d}" for at in (12, 16, 20)]


def test_a_checkpoint_after_some_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[Event] = []
    done = [0]
    clock = SimpleNamespace(monotonic=lambda: 0.05 * done[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(checkpointing, "time", clock)

    def note(event: Event) -> None:
        events.append(event)
        done[0] += isinstance(event, StepRecord)

    train(tmp_path, keeps={"every": "0.2s", "keep": 99}, callbacks=[note])
    made = [event.batches for event in written(events)]
    assert len(made) >= 3
    assert {b - a for a, b in pairwise(made)} <= {4, 5}  # of the batches that stage 0 has begun, which are ahead


def fails(keeps: delock.Checkpoint, workers: Any) -> None:
    """A run of 24 batches, of which one is infinite."""
    batches = [batch for _ in range(6) for batch in data()]
    batches[15] = (batches[15][0] * float("inf"), batches[15][1])
    loss = nn.functional.cross_entropy
    delock.fit(network(), batches, loss=loss, method="fdg", cuts=[2, 5], epochs=1, workers=workers, optimizer=SGD, checkpoint=keeps)


@pytest.mark.parametrize("workers", ["inline", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_run_that_fails_leaves_no_thread_and_whole_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    never, sync = Flag(), os.fsync

    def slow(file: int) -> None:
        never.wait(0.02)
        sync(file)

    monkeypatch.setattr(os, "fsync", slow)  # so that there is something to write when it fails
    with pytest.raises(NonFinite):
        fails(delock.Checkpoint(tmp_path, every=1, keep=99), workers)
    assert names(tmp_path)
    assert max(names(tmp_path)) <= 16
    for path in newest_first(tmp_path):
        verified(path)
    with pytest.raises(NonFinite, match="the loss of batch 15"):  # it goes on to the same end
        fails(delock.Checkpoint(tmp_path, resume="newest"), workers)


class Breaks:
    """Does something to the folder of the checkpoints, once, in the middle of a run."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act, self.events, self.done = act, list[Event](), False

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, StepRecord) and event.batches >= 9 and not self.done:
            self.done = True
            self.act()


def in_its_place(folder: Path) -> None:
    """Puts a file in the place of a folder into which others write."""
    for _ in range(1000):
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(FileExistsError):
            folder.open("x").close()
            return
    raise AssertionError(folder)


@contextmanager
def bounded() -> Iterator[Callable[[], None]]:
    """Gives a function that fills the disk: no file grows beyond 100 bytes, until the end of the block. (This program's own log, too.)"""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("how", ["full", "removed", "a file"])
def test_a_disk_that_fails_ends_no_run(tmp_path: Path, how: str) -> None:
    folder, whole = tmp_path / "checkpoints", train()
    with bounded() as full:
        acts = {"full": full, "removed": lambda: shutil.rmtree(folder, ignore_errors=True), "a file": lambda: in_its_place(folder)}
        breaks = Breaks(acts[how])
        again = train(folder, keeps={"every": 4, "keep": 99}, callbacks=[breaks])
    assert_same(again, whole)
    told = {one.batches: one.problem for one in written(breaks.events)}
    if how == "removed":  # it is made again
        assert names(folder)[0] == 20
        assert not told[20]
        return
    assert [bool(told[at]) for at in (4, 16, 20)] == [False, True, True]
    assert told[20].startswith("stage ")
    assert ("File too large" if how == "full" else "File exists") in told[20] or "Not a directory" in told[20]
    if how == "full":
        assert set(names(folder)) <= {4, 8}
        assert [verified(path).batches for path in newest_first(folder)] == names(folder)


def test_a_disk_that_fails_ends_no_run_in_processes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"

    breaks = Breaks(lambda: in_its_place(folder))
    more = {"workers": "processes", "batches": 60, "callbacks": [breaks]}
    assert_same(train(folder, keeps={"every": 2, "keep": 99}, **more), train(batches=60))
    problems = [one.problem for one in written(breaks.events) if one.problem]
    assert problems
    assert all(one.startswith("stage ") for one in problems)
