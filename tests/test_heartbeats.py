"""Ranks that watch each other through a store: who is late is asked for a stack and named once, and nobody else is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from delock.launch import heartbeats as module
from delock.launch.heartbeats import Heartbeats
from delock.launch.progress import Progress

PATIENT = 20.0  # seconds that a test waits for what should come at once


class Ranks:
    """Three ranks in this process, each with its thread; `told`: who was blamed, and the message."""

    def __init__(self, patience: float) -> None:
        self.store, self.told, self.heard = HashStore(), list[tuple[int, str]](), threading.Event()
        self.progress = [Progress() for _ in range(3)]
        self.beats = [Heartbeats(rank, 3, self.store, progress, patience, self.hear) for rank, progress in enumerate(self.progress)]

    def hear(self, culprit: int, message: str) -> None:
        self.told.append((culprit, message))
        self.heard.set()

    def begin(self, *waits: int | None) -> None:
        """All in an op, waiting for those."""
        for progress, peer in zip(self.progress, waits, strict=True):
            progress.at("F7", "epoch 2")
            if peer is not None:
                progress.wait_for(peer)

    def blamed(self) -> tuple[int, str]:
        assert self.heard.wait(PATIENT)
        return self.told[0]


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[float], Ranks]]:
    monkeypatch.setattr(module, "BEAT", 0.02)
    made: list[Ranks] = []

    def make(patience: float) -> Ranks:
        made.append(Ranks(patience))
        return made[-1]

    yield make
    for one in made:
        for beats in one.beats:
            beats.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "delock-heartbeats"]


def test_who_computes_and_does_not_move_is_named_once_with_a_stack(ranks: Callable[[float], Ranks]) -> None:
    three = ranks(0.5)
    three.begin(1, None, 1)
    culprit, message = three.blamed()
    assert culprit == 1
    assert message.startswith("stage 1 hangs in F7 (epoch 2): it has not moved for 0.5 s\nstage 0 waits for stage 1 in F7")
    assert "in blamed" in message, "the main thread's stack"
    beats(three, 30)
    assert len(three.told) == 1


def test_who_gives_no_sign_of_life_is_named_though_it_waits(ranks: Callable[[float], Ranks]) -> None:
    three = ranks(0.5)
    three.begin(1, 2, 1)
    beats(three, 9)
    three.beats[2].close()
    culprit, message = three.blamed()
    assert culprit == 2
    assert message.startswith("stage 2 gives no sign of life in F7 (epoch 2)")
    assert "stage 0 waits for stage 1 in F7" in message


def test_nobody_is_named_who_moves_sets_up_or_is_done(ranks: Callable[[float], Ranks]) -> None:
    three = ranks(0.3)
    three.progress[0].born()  # sets itself up
    three.progress[2].at("F9")
    three.beats[2].done()
    until = time.monotonic() + 1.0
    while time.monotonic() < until:
        three.progress[1].at("F1")
        beats(three, 1)
    assert not three.told


def test_patience_may_grow_and_0_is_none(ranks: Callable[[float], Ranks]) -> None:
    long, none = ranks(0.3), ranks(0.0)
    for one in long.beats:
        one.be_patient(600.0)
    for three in (long, none):
        three.begin(None, 0, 1)
    beats(long, 150)
    assert not long.told
    assert not none.told


def beats(three: Ranks, count: int) -> None:
    """Wait for that number of beats, of any ranks."""

    def now() -> int:
        return sum(own._numbers[rank] for rank, own in enumerate(three.beats))

    goal, deadline = now() + count, time.monotonic() + PATIENT
    while now() < goal:
        assert time.monotonic() < deadline
        threading.Event().wait(0.005)
