"""Ranks that raise, die, hang or wait for each other: the first one is named, and no process is left behind."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest

from delock.errors import StageFailed, UsageError
from delock.launch.processes import run_processes

from ranks import Pids, alive, block, raise_in_one, slow_set_up


def test_a_rank_that_raises_is_told_with_its_op_and_traceback(pids: Pids) -> None:
    began = time.monotonic()
    with pytest.raises(StageFailed) as caught:
        run_processes(raise_in_one, ["error"] * 3, on_event=pids)
    message = str(caught.value)
    assert message.startswith("stage 1 failed in F12 (epoch 1, batch 3): ZeroDivisionError: the culprit's own words")
    assert "in raise_in_one" in message
    assert time.monotonic() - began < 30


def test_a_usage_error_is_raised_with_its_words_alone(pids: Pids) -> None:
    with pytest.raises(UsageError, match=r"^the batch holds one sample; give it two$"):
        run_processes(raise_in_one, ["usage"] * 2, on_event=pids)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "stage 1 was killed by SIGKILL (the system does so when memory runs out) in F12 (epoch 1, batch 3)"),
        ("segv", "stage 1 was killed by SIGSEGV in F12 (epoch 1, batch 3)"),
        ("leave", "stage 1 ended with exit code 3 in F12 (epoch 1, batch 3)"),
    ],
)
def test_a_rank_that_dies_is_named_though_its_peers_raise_first(how: str, words: str, pids: Pids) -> None:
    with pytest.raises(StageFailed, match="^" + re.escape(words)) as caught:
        run_processes(raise_in_one, [how] * 3, on_event=pids)
    assert ("in raise_in_one" in str(caught.value)) == (how == "segv")  # a fatal signal leaves the Python stack


def test_a_rank_that_hangs_shows_its_stack(pids: Pids) -> None:
    with pytest.raises(StageFailed) as caught:
        run_processes(raise_in_one, ["hang"] * 2, on_event=pids, patience=1.0)
    message = str(caught.value)
    assert message.startswith("stage 1 hangs in F12 (epoch 1, batch 3): it has not moved for 1 s")
    assert "stage 0 waits for stage 1 in F12" in message
    assert "in a_loop_without_end" in message
    assert "die_with_parent" not in message
    assert "multiprocessing" not in message


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_stopped_rank_is_told_as_stopped(pids: Pids) -> None:
    with pytest.raises(StageFailed, match=r"^stage 1 is stopped by a signal in F12"):
        run_processes(raise_in_one, ["stop"] * 2, on_event=pids, patience=1.0)


def test_ranks_that_wait_for_each_other_are_told(pids: Pids) -> None:
    with pytest.raises(StageFailed, match=r"^stage 0 waits for stage 1 in F12(.|\n)*stage 1 waits for stage 0 in F12"):
        run_processes(raise_in_one, ["wait"] * 2, on_event=pids, patience=1.0)


def test_setting_up_may_take_longer_than_patience(pids: Pids) -> None:
    assert run_processes(slow_set_up, [1.5] * 2, on_event=pids, patience=0.5) == [0, 1]


def test_an_error_of_on_event_ends_the_run() -> None:
    told: list[int] = []

    def stumble(rank: int, event: Any) -> None:
        told.append(event[1])
        raise KeyError("not ready")

    with pytest.raises(KeyError, match="not ready"):
        run_processes(block, [None], on_event=stumble)
    assert not alive(told[0])
