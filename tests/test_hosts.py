"""Four hosts, each with a torchrun of its own: the numbers are those of one process, and a network that fails ends every rank in time."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import delock
from hosts import Hosts, Launched, NotPermitted, hosts

from points import SGD, network, train_data, weighted
from ranks import wait_until

pytestmark = pytest.mark.slow

PATIENCE = 5.0
AFTER = 15.0  # seconds beside the patience
STAGES, BATCHES = 4, 300
PROGRAM = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
import delock
from test_hosts import slow, train
from points import network

model = network()
train(model, int(sys.argv[1]), callbacks=[lambda event: print(event, flush=True) if getattr(event, "batches", 0) == 20 else None])
torch.save(model.state_dict(), sys.argv[2] + __import__("os").environ["RANK"])
"""


def train(model: torch.nn.Module, batches: int, **options: object) -> list[float]:
    placement, report = delock.Placement(patience=PATIENCE), delock.Report(log_every=1)
    data = train_data()
    return delock.fit(
        model, data, loss=slow, optimizer=SGD, stages=STAGES, cuts=[1, 4, 5], batches=batches, placement=placement, report=report, **options
    ).losses  # type: ignore[arg-type]


def slow(out: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
    """A loss that takes a while, so that a run lasts longer than what happens to it."""
    if "RANK" in os.environ:
        time.sleep(0.05)
    return weighted(out, target)


@pytest.fixture(scope="module")
def net() -> Iterator[Hosts]:
    try:
        with hosts(STAGES) as made:
            yield made
    except NotPermitted as reason:
        pytest.skip(str(reason))


@pytest.fixture
def launch(net: Hosts, tmp_path: Path) -> Iterator[Callable[[int], Launched]]:
    """Starts a run of that number of batches, and returns when it trains."""
    launched: list[Launched] = []

    def begin(batches: int) -> Launched:
        (tmp_path / "program.py").write_text(PROGRAM)
        launched.append(Launched(net, tmp_path / "program.py", str(batches), str(tmp_path / "out")))
        wait_until(lambda: "batches=20," in launched[-1].log(0), 120)
        launched[-1].find()
        return launched[-1]

    yield begin
    for one in launched:
        for host in range(STAGES):
            print(f"-- host {host}\n{one.log(host)[-6000:]}")
        one.close()
    for host in range(STAGES):
        net.plug(host)


def same_as_one_process(tmp_path: Path) -> bool:
    model = network()
    train(model, BATCHES, workers="inline")
    there = [torch.load(tmp_path / f"out{rank}") for rank in range(STAGES)]
    return all(torch.equal(value, state[name]) for state in there for name, value in model.state_dict().items())


def finished(run: Launched) -> None:
    wait_until(lambda: all("torchrun ended with" in run.log(host) for host in range(STAGES)), 120)
    assert ["torchrun ended with 0" in run.log(host) for host in range(STAGES)] == [True] * STAGES


def ends(run: Launched, killed: int | None = None) -> None:
    """Waits for the ends of all ranks, and for what torchrun says of those that were not killed: exit code 1."""
    began, took = time.monotonic(), {}

    def all_ended() -> bool:
        for host in range(STAGES):
            if host not in took and run.ended(host):
                took[host] = round(time.monotonic() - began, 1)
        return len(took) == STAGES

    try:
        wait_until(all_ended, PATIENCE + AFTER)
    finally:
        print("seconds until the ends:", took)
    others = [host for host in range(STAGES) if host != killed]
    wait_until(lambda: all("torchrun ended with" in run.log(host) for host in others), 60)
    assert [re.findall(r"exitcode  : (-?\d+)", run.log(host)) for host in others] == [["1"]] * len(others)


def test_four_hosts_have_the_weights_of_one_process(launch: Callable[[int], Launched], tmp_path: Path) -> None:
    finished(launch(BATCHES))
    assert same_as_one_process(tmp_path)


@pytest.mark.parametrize("how", ["between two", "host"])
def test_a_cut_of_3_seconds_changes_nothing(net: Hosts, launch: Callable[[int], Launched], tmp_path: Path, how: str) -> None:
    run = launch(BATCHES)
    down, up = (
        ((lambda: net.cut(1, 2)), (lambda: net.mend(1, 2))) if how == "between two" else ((lambda: net.unplug(2)), (lambda: net.plug(2)))
    )
    down()
    over = time.monotonic() + 3.0
    wait_until(lambda: time.monotonic() > over, 5)
    up()
    finished(run)
    assert same_as_one_process(tmp_path)


def test_a_cut_between_two_for_good_ends_all(net: Hosts, launch: Callable[[int], Launched]) -> None:
    run = launch(10**6)
    net.cut(1, 2)
    try:
        ends(run)
    finally:
        net.mend(1, 2)
    for host in range(STAGES):
        assert re.search(r"stage [12] waits for stage [12] in [FB]", run.log(host)), host


@pytest.mark.parametrize("host", [0, 2])
def test_a_host_that_is_cut_off_for_good_ends_all(net: Hosts, launch: Callable[[int], Launched], host: int) -> None:
    run = launch(10**6)
    net.unplug(host)
    ends(run)


def test_the_store_dies(launch: Callable[[int], Launched]) -> None:
    run = launch(10**6)
    os.kill(run.torchruns[0], signal.SIGKILL)
    ends(run, 0)
    for host in range(STAGES):
        assert re.search(
            rf"error: stage {host} stops in [FBU].*, because it has lost .*the store of the rendezvous at 10.213.0.2", run.log(host)
        )


@pytest.mark.parametrize("host", [0, 2])
def test_a_killed_rank_is_named_on_all_hosts(launch: Callable[[int], Launched], host: int) -> None:
    run = launch(10**6)
    os.kill(run.ranks[host], signal.SIGKILL)
    ends(run, host)
    for other in range(STAGES):
        if other != host:
            assert f"stage {host} has died: " in run.log(other), other
