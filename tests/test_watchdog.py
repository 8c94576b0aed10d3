"""A rank's progress as its watchdog reads it, and whom the watchdog blames."""

from __future__ import annotations

import pytest

from delock.launch.progress import Progress
from delock.launch.watchdog import POLL, Watchdog


def test_progress_reads_as_written() -> None:
    memory = bytearray(Progress.SIZE)
    writer, reader = Progress(memory), Progress(memory)
    assert not reader.read().born
    writer.born()
    assert str(reader.read()) == "before its first op"
    writer.at("F" + "1" * 50, "é" * 50)  # longer than the record keeps
    assert reader.read().op == "F" + "1" * 31
    assert reader.read().batch == "é" * 48
    writer.at("B3", "epoch 1")
    writer.wait_for(2)
    at = reader.read()
    assert (str(at), at.waits_for, at.moves) == ("in B3 (epoch 1)", 2, 4)
    writer.go_on()
    assert reader.read().waits_for is None


def nothing_stops(rank: int) -> str:
    return ""


def test_aside_an_op_nobody_is_late() -> None:
    progress = Progress()
    progress.at("F12")
    progress.wait_for(1)
    with progress.aside():
        assert not progress.read().begun
    assert (str(progress.read()), progress.read().waits_for) == ("in F12", 1)
    assert Progress(bytearray(progress.raw())).read() == progress.read()


def test_the_watch_blames_nobody_while_its_own_process_slept(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("delock.launch.watchdog.time.monotonic", lambda: now[0])
    record = Progress()
    record.at("F0")
    watch = Watchdog([record], 2.0, nothing_stops)
    looks = []
    for step in (0.0, 0.25, 3600.0, 0.25, 0.25, 0.25, 0.25, 0.25):  # a long on_event, or Ctrl-Z, in the middle
        now[0] += step
        looks.append(watch.look([0]))
    assert looks == [[]] * 7 + [[0]]


def test_who_waited_for_a_rank_that_is_done_now_has_time_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("delock.launch.watchdog.time.monotonic", lambda: clock[0])
    records = [Progress(), Progress()]
    looks = Watchdog(records, 1.0, nothing_stops)
    for record in records:
        record.born()
    records[1].at("F0")
    records[1].wait_for(0)  # stage 0 sets itself up for a long time

    def after(seconds: float, at_work: list[int]) -> list[int]:
        for _ in range(round(seconds / POLL)):
            clock[0] += POLL
            found = looks.look(at_work)
        return found

    assert after(5.0, [0, 1]) == []
    records[0].at("F0")  # does what stage 1 waits for, and is done
    assert after(POLL, [1]) == []
    assert after(1.0, [1]) == [1]
