"""Checkpoints of whole runs: what goes on from one ends as the run that was never interrupted, to the last bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from delock.checkpoints.directory import newest_first
from delock.errors import StageFailed
from delock.records import CheckpointRecord, Event

from survivors import Killer, assert_same, train

pytestmark = pytest.mark.usefixtures("own_random")


@pytest.mark.parametrize("workers", ["inline", "processes"])
def test_a_run_that_goes_on_ends_as_one_that_was_not_interrupted(tmp_path: Path, workers: str) -> None:
    whole = train(workers=workers)
    events: list[Event] = []
    assert_same(train(tmp_path, keeps={"every": 10}, workers=workers, on_event=events.append), whole)
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
    again = train(tmp_path, keeps={"every": 5, "restarts": 1}, workers="processes", on_event=killer)
    assert [event.batches > 0 for event in killer.resumed] == [True]
    assert f"stage {killer.stage} was killed by SIGKILL" in killer.resumed[0].notes[0]
    assert killer.in_flight > 0
    assert_same(again, train())


def test_without_restarts_a_kill_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="was killed by SIGKILL"):
        train(tmp_path, keeps={"every": 5}, workers="processes", on_event=Killer(3, 3))
