"""Checkpoints of whole runs: what goes on from one ends as the run that was never interrupted, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from delock.checkpoints.directory import newest_first
from delock.checkpoints.folder_lock import FolderLock
from delock.errors import StageFailed, UsageError
from delock.records import CheckpointRecord, Event

from survivors import Killer, assert_same, data, train

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(tmp_path: Path, workers: str) -> None:
    whole = train(workers=workers)
    events: list[Event] = []
    assert_same(train(tmp_path, keeps={"every": 10}, workers=workers, callbacks=[events.append]), whole)
    written = [event for event in events if isinstance(event, CheckpointRecord)]
    assert [(one.batches, one.problem) for one in written] == [(10, ""), (20, "")]
    for name in ("batch-00000020", "batch-00000010"):
        for path in newest_first(tmp_path):
            if path.name != name:
                path.rename(tmp_path / f"aside-{path.name}")
        assert_same(train(tmp_path, keeps={"resume": "newest"}, workers=workers), whole)
        for path in tmp_path.glob("aside-*"):
            path.rename(tmp_path / path.name.removeprefix("aside-"))


def test_a_run_whose_stage_is_killed_goes_on_by_itself(tmp_path: Path) -> None:
    killer = Killer(3, 3)
    killer.at = 17
    half = tmp_path / ".batch-00000020"

    def told(event: Event) -> None:
        before = killer.killed
        killer(event)
        if killer.killed and not before:  # what the first life has left half written must not enter a checkpoint of the second
            half.mkdir(exist_ok=True)
            (half / "of-the-first-life").touch()

    again = train(tmp_path, keeps={"every": 5, "restarts": 1}, workers="processes", callbacks=[told])
    assert not list(tmp_path.rglob("of-the-first-life"))
    assert [event.batches > 0 for event in killer.resumed] == [True]
    assert f"stage {killer.stage} was killed by SIGKILL" in killer.resumed[0].notes[0]
    assert killer.in_flight > 0
    assert_same(again, train())


def test_without_restarts_a_kill_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="was killed by SIGKILL"):
        train(tmp_path, keeps={"every": 5}, workers="processes", callbacks=[Killer(3, 3)])


def test_a_folder_of_checkpoints_is_for_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    folder.mkdir()
    lock = FolderLock(folder)
    lock.take()
    with pytest.raises(UsageError, match="is in use by another run"):
        train(folder, keeps={"every": 5})
    lock.release()
    train(folder)
    assert list(folder.iterdir()) == []  # nothing was kept; the folder was there before


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ({"best": "max:nope"}, "best goes by 'nope', but evaluations have loss: use one of them"),
        ({"resume": ""}, "resume is '', but it must be the path of a folder"),
        ({"every": "5x"}, "but it must be a number of batches, or a time"),
        ({"best": "loss"}, "which way is better"),
    ],
)
def test_what_checkpoints_cannot_be_is_refused(tmp_path: Path, keeps: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        train(tmp_path / "kept", keeps=keeps)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_does_not_exist_is_told_once(tmp_path: Path) -> None:
    train(tmp_path, keeps={"every": 10})
    with pytest.raises(
        UsageError, match=r"^elsewhere/batch-7 is no checkpoint: it does not exist, and .* holds batch-00000020, batch-00000010;"
    ):
        train(tmp_path, keeps={"resume": "elsewhere/batch-7"})


def test_batches_of_another_size_are_refused(tmp_path: Path) -> None:
    train(tmp_path, keeps={"every": 10})
    larger = [(torch.cat([x, x]), torch.cat([y, y])) for x, y in data()]
    with pytest.raises(UsageError, match=r"samples of a batch was 6 when the checkpoint .* was made, and is 12 now"):
        train(tmp_path, keeps={"resume": "newest"}, batches=30, of=larger)
