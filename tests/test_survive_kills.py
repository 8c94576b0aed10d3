"""Many runs, each cut off in its own way: all of them end as if nothing had happened."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, PACI, ZB1P, GPipe, Interlocking, Method, OneFOneB, PipeDream2BW

from survivors import Killer, Run, assert_same, kill, train

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_random")]

METHODS: list[Method] = [
    *(BP(), GPipe(2), OneFOneB(3), ZB1P(2), DDG(), DDG(micro_batches=3), FR(), FDG()),
    *(ADL(2), DSP(), PipeDream2BW(3), PACI(2), DGL(), Interlocking(2)),
]
CUTS: dict[int, list[int]] = {2: [4], 3: [2, 5]}


def test_every_method_survives_a_kill(tmp_path: Path) -> None:
    """A random stage is killed between its first and its last update: 14 methods, 2 and 3 stages, 2 seeds.

    Synchronous methods (four here) and interlocking have no work in flight between two batches, so 36 runs can have some.
    """
    resumed = 0
    for n, (method, K, seed) in enumerate((method, K, seed) for method in METHODS for K in CUTS for seed in (0, 1)):
        given: dict[str, Any] = {"method": method, "cuts": CUTS[K], "heads": "linear" if method.local_losses else None}
        given["batches"] = 240
        killer = Killer(100 * n + seed, K, 240)
        again = train(tmp_path / str(n), keeps={"every": 2, "restarts": 1}, workers="processes", callbacks=[killer], **given)
        assert killer.killed, (method, K, seed)
        assert len(killer.resumed) == 1
        assert_same(again, train(**given))
        resumed += killer.in_flight > 0
    print(f"{resumed} of {4 * len(METHODS)} runs went on with work in flight")
    assert resumed >= 36


def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The half-written one is passed over."""
    whole = train(width=700)
    caught = 0
    for n in range(10):
        caught += _killed_while_writing(tmp_path / str(n), whole, n % 3)
    assert caught == 10


def _killed_while_writing(folder: Path, whole: Run, stage: int) -> bool:
    folder.mkdir()
    done: list[bool] = []

    def watch() -> None:
        while not done:
            if list(folder.glob(".batch-*")) and len(list(folder.glob("batch-*"))) == 1:
                kill(stage)
                done.append(True)

    watcher = Thread(target=watch)
    watcher.start()
    killer = Killer(0, 3)
    killer.killed = True  # it only listens
    again = train(folder, width=700, keeps={"every": 6, "restarts": 1}, workers="processes", callbacks=[killer])
    caught = bool(done)
    done.append(True)
    watcher.join()
    assert_same(again, whole)
    return caught and len(killer.resumed) == 1
