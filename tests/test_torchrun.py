"""Ranks under torchrun: rank 0 gets all events and results, and a failure is reported once."""

from __future__ import annotations

import socket
import subprocess
import threading
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

import acting
from delock.cli import main
from delock.errors import UsageError
from delock.launch.rendezvous import meet
from delock.launch.variables import under_torchrun
from delock.links.meeting import here
from delock.methods import ADL
from test_acting import EARLY
from test_shared_runs import trained

from harness import same_state
from points import fit, hits, test_data
from programs import torchrun

WELL = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import delock
from delock.launch.torchrun import run_torchrun
from delock.cli import main
from delock.errors import UsageError
from delock.launch.rendezvous import meet
from delock.launch.variables import under_torchrun
from delock.links.meeting import here
from delock.methods import ADL
from delock.run import telling
from points import SGD, hits, network, test_data, train_data, weighted
from ranks import greet
from test_shared_runs import trained
from test_torchrun import stopped

assert under_torchrun()
for run in range(2):  # one program may train more than once
    events = []
    results = run_torchrun(greet, lambda rank: f"for {{rank}}", telling, on_event=lambda rank, event: events.append((rank, event)))
    sys.stdout.write(f"results {{results}}\\n")  # whole: print writes piece by piece here, and the ranks write to one pipe
    if os.environ["RANK"] == "0":
        for rank in range(2):
            sys.stdout.write(f"events {{rank}} {{[event for of, event in events if of == rank and event[0] != 'pid']}}\\n")
    else:
        assert not events

model, heard = network(), []
result = delock.fit(model, train_data(), test_data(), loss=weighted, method=ADL(2), optimizer=SGD, epochs=2, metrics={{"hits": hits}},
                    cuts=[4], placement=delock.Placement(link="gloo"), callbacks=[heard.append])
seen = {{"state": model.state_dict(), "result": repr(result), "losses": result.losses, "heard": [type(e).__name__ for e in heard]}}
shared, state = trained("shared" if here() is not None else "auto")
other, early = stopped()
torch.save((seen, (state, shared.losses), (other.state_dict(), early.losses, early.stopped)), sys.argv[1] + os.environ["RANK"])
"""
ILL = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from ranks import raise_in_one
from delock.launch.torchrun import run_torchrun
from delock.run import telling

run_torchrun(raise_in_one, lambda rank: sys.argv[1], telling, patience=2.0)
"""
HEARD = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch.distributed as dist
import delock
from points import SGD, network, test_data, train_data, weighted

def hears(event):
    if isinstance(event, delock.records.EvaluationRecord):
        raise KeyError(f"batch {{event.batches}}")

def fit():
    given = {{"loss": weighted, "method": "fdg", "optimizer": SGD, "epochs": 100_000, "cuts": [4], "callbacks": [hears]}}
    delock.fit(network(), train_data(), test_data(), **given)

dist.init_process_group("gloo")
try:
    fit()
except delock.UsageError as error:
    sys.stdout.write(f"{{error}}\\n")
dist.destroy_process_group()
fit()
"""


@dataclass
class Launched:
    """One program under torchrun for several tests: its lines, and on each rank the results of `fit` over gloo and over shared memory, and
    of a run that evaluations act on.
    """

    lines: list[str]
    seen: list[dict[str, Any]]
    shared: list[tuple[dict[str, Any], list[float]]]
    acting: list[tuple[dict[str, Any], list[float], str]]


def stopped() -> Any:
    """A run with a rate that goes by evaluations, which ends early."""
    return acting.fit(method="fdg", K=2, schedule=acting.PLATEAU, callbacks=[EARLY])


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "script.py").write_text(WELL)
    done = torchrun(folder / "script.py", str(folder / "out"))
    assert done.returncode == 0, done.stderr
    found = zip(*(torch.load(folder / f"out{rank}") for rank in range(2)), strict=True)
    return Launched(done.stdout.splitlines(), *map(list, found))


def test_torchrun_gives_every_rank_the_results_and_rank_0_all_events(launched: Launched) -> None:
    assert launched.lines.count("results [(0, 1, 'for 0'), (1, 1, 'for 1')]") == 4
    for rank in range(2):
        assert launched.lines.count(f"events {rank} [('step', 0), ('step', 1), ('step', 2)]") == 2


def test_fit_gives_every_rank_the_same_result_and_all_weights(launched: Launched) -> None:
    model, result = fit(test=test_data(), method=ADL(2), metrics={"hits": hits}, cuts=[4])
    first, second = launched.seen
    for there in (first, second):
        assert all(torch.equal(value, there["state"][name]) for name, value in model.state_dict().items())
        assert there["losses"] == result.losses
    assert first["result"] == second["result"]
    assert first["heard"] == ["Started", "EvaluationRecord", "StepRecord", "EvaluationRecord"]
    assert second["heard"] == []


@pytest.mark.skipif(here() is None, reason="no shared memory between processes here")
def test_fit_over_shared_memory(launched: Launched) -> None:
    result, expected = trained("gloo", workers="inline")
    for state, losses in launched.shared:
        assert losses == result.losses
        assert all(torch.equal(value, state[name]) for name, value in expected.items())


def test_ranks_act_as_one_process(launched: Launched) -> None:
    """They tell each other of evaluations through the store."""
    model, result = stopped()
    assert result.stopped
    for state, losses, why in launched.acting:
        assert (losses, why) == (result.losses, result.stopped)
        assert same_state(state, model.state_dict())


def ill(tmp_path: Path, how: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "script.py").write_text(ILL)
    return torchrun(tmp_path / "script.py", how)


def test_a_failing_rank_under_torchrun_is_told_once(tmp_path: Path) -> None:
    done = ill(tmp_path, "error")
    assert done.returncode != 0
    assert "error: stage 1 failed in F12 (epoch 1, batch 3): ZeroDivisionError: the culprit's own words" in done.stderr
    assert "error: stage 0" not in done.stderr


@pytest.mark.slow
def test_a_killed_rank_under_torchrun_is_named(tmp_path: Path) -> None:
    done = ill(tmp_path, "kill")
    assert done.returncode != 0
    assert "error: stage 1 has died: " in done.stderr, done.stderr
    assert done.stderr.count("error: stage ") == 1


@pytest.mark.slow
def test_a_rank_that_hangs_under_torchrun_shows_its_stack(tmp_path: Path) -> None:
    done = ill(tmp_path, "hang")
    assert done.returncode != 0
    assert done.stderr.count("error: stage ") == 1
    assert "error: stage 1 hangs in F12 (epoch 1, batch 3): it has not moved for 2 s\nstage 0 waits for stage 1 in F12" in done.stderr
    assert "in a_loop_without_end" in done.stderr


def test_what_a_callback_raises_ends_the_run_as_it_is(tmp_path: Path) -> None:
    """The record of the first evaluation comes from the other rank, and so to a thread of its own."""
    (tmp_path / "script.py").write_text(HEARD)
    done = torchrun(tmp_path / "script.py")
    assert done.returncode != 0
    assert done.stdout.count("call it before init_process_group, or destroy yours first; ") == 2
    assert "KeyError: 'batch 4'" in done.stderr, done.stderr
    assert "sendBytes" not in done.stderr
    assert "failed in" not in done.stderr
    assert "error: stage 1" not in done.stderr


@pytest.mark.parametrize("wrong", ["RANK=x", "RANK=2", "WORLD_SIZE=0", "LOCAL_RANK=-1", "MASTER_PORT=http"])
def test_variables_that_make_no_sense_are_named(wrong: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    name, value = wrong.split("=")
    for one, usual in given.items():
        monkeypatch.setenv(one, value if one == name else usual)
    assert main(["train", "--model", "mlp"]) == 2
    assert f"error: the variable {name} is {value!r}, but it must be a whole number, " in capsys.readouterr().err


def test_a_store_that_is_not_reached_is_named_and_looked_for_where_signals_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as held:  # so nobody listens there
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        threads: list[threading.Thread] = []
        with pytest.raises(UsageError, match=f"stage 1 could not reach the store of the rendezvous at 127.0.0.1:{port}: .*MASTER_PORT"):
            meet(1, 2, timedelta(seconds=1), lambda: threads.append(threading.current_thread()))
    assert len(threads) > 2
    assert {*threads} == {threading.main_thread()}


def test_this_process_is_not_under_torchrun() -> None:
    assert not under_torchrun()
