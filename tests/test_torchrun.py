"""Ranks under torchrun: rank 0 gets all events and results, and a failure is reported once."""

from __future__ import annotations

import subprocess
from pathlib import Path

from delock.launch.torchrun import under_torchrun

import programs

UNDER_TORCHRUN = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from ranks import greet, raise_in_one
from delock.launch.torchrun import run_torchrun, under_torchrun

assert under_torchrun()
if sys.argv[1] == "greet":
    for run in range(2):  # one program may train twice
        events = []
        results = run_torchrun(greet, lambda rank: f"for {{rank}}", on_event=lambda rank, event: events.append((rank, event)))
        sys.stdout.write(f"results {{results}}\\n")  # whole: print writes piece by piece here, and the ranks write to one pipe
        if os.environ["RANK"] == "0":
            for rank in range(2):
                sys.stdout.write(f"events {{rank}} {{[event for of, event in events if of == rank and event[0] != 'pid']}}\\n")
        else:
            assert not events
else:
    run_torchrun(raise_in_one, lambda rank: sys.argv[1], patience=2.0)
"""


def torchrun(tmp_path: Path, what: str) -> subprocess.CompletedProcess[str]:
    script = tmp_path / "script.py"
    script.write_text(UNDER_TORCHRUN)
    return programs.torchrun(script, what)


def test_torchrun_gives_every_rank_the_results_and_rank_0_all_events(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "greet")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("results [(0, 1, 'for 0'), (1, 1, 'for 1')]") == 4
    for rank in range(2):
        assert lines.count(f"events {rank} [('step', 0), ('step', 1), ('step', 2)]") == 2


def test_a_failing_rank_under_torchrun_is_told_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "error")
    assert done.returncode != 0
    assert "error: stage 1 failed in F12 (epoch 1, batch 3): ZeroDivisionError: the culprit's own words" in done.stderr
    assert "error: stage 0" not in done.stderr


def test_a_rank_that_hangs_under_torchrun_shows_its_stack(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "hang")
    assert done.returncode != 0
    assert done.stderr.count("error: stage ") == 1
    assert "error: stage 1 hangs in F12 (epoch 1, batch 3): it has not moved for 2 s\nstage 0 waits for stage 1 in F12" in done.stderr
    assert "in a_loop_without_end" in done.stderr


def test_this_process_is_not_under_torchrun() -> None:
    assert not under_torchrun()
