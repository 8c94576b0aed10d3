"""The number of messages in shared memory: predicted against formulas, and against what two processes really map."""

from __future__ import annotations

from dataclasses import replace

import pytest

from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links.connect import shares
from delock.links.shared_memory import SharedChannel
from delock.memory.slots import slots
from delock.methods import BP, DDG, DGL, FDG, FR, Interlocking, Method, OneFOneB
from delock.options import Placement
from delock.plan import RunLength, unroll
from delock.run.job import StageJob
from delock.run.ranks import joined
from delock.run.worker import Worker
from delock.timeline import Costs, capacities, simulate
from delock.timeline.spans import Timeline

from harness import jobs


def clocked(method: Method, K: int, batches: int = 40) -> Timeline:
    """Stages that are alike, backward twice as dear as forward, messages quick."""
    quick = (0.01,) * (K - 1)
    costs = Costs((1.0,) * K, (2.0,) * K, up=quick, down=quick, capacity=capacities(method, K))
    return simulate(unroll(method, K, batches), costs)


@pytest.mark.parametrize("K", [2, 3, 4, 5])
def test_a_slot_for_every_graph_and_one_on_its_way(K: int) -> None:
    """Stage k + 1 tells that it is done with a batch when it takes the next but one, so that there is one slot more than it has graphs."""
    links = range(K - 1)
    for method in (BP(), Interlocking(1), DGL()):
        assert [up for up, _ in slots(clocked(method, K))] == [2] * (K - 1), str(method)
    for method in (DDG(), FR()):
        assert [up for up, _ in slots(clocked(method, K))] == [K - k for k in links], str(method)
    for method in (FDG(), FDG(at="mixed")):
        assert [up for up, _ in slots(clocked(method, K))] == [2 * (K - 1 - k) + 1 for k in links], str(method)
    assert [up for up, _ in slots(clocked(OneFOneB(K + 1), K))] == [K - k for k in links]


def test_errors() -> None:
    """An error is used up by one op, whose activation tells of it; greedy losses have none."""
    assert [down for _, down in slots(clocked(BP(), 4))] == [1, 1, 1]
    assert [down for _, down in slots(clocked(FDG(), 4))] == [2, 2, 2]
    assert [down for _, down in slots(clocked(DGL(), 4))] == [0, 0, 0]


@pytest.mark.parametrize(("method", "few"), [(BP(), 1), (DDG(), 2), (FDG(), 3)], ids=str)
def test_a_message_that_is_decoded_is_done_with_at_once(method: Method, few: int) -> None:
    """Only those on their way have slots."""
    plain, decoded = slots(clocked(method, 4)), slots(clocked(method, 4), decoded=(True, False))
    assert [up for up, _ in decoded] == [few] * 3
    assert [down for _, down in decoded] == [down for _, down in plain]


def test_short_runs_have_no_more_slots_than_batches() -> None:
    assert [slots(clocked(FDG(), 4, batches))[0][0] for batches in (1, 3, 7, 8)] == [1, 3, 7, 7]
    assert slots(clocked(BP(), 1)) == []


def test_evaluations_are_batches_of_their_own() -> None:
    """A batch of an evaluation has the number of a batch of training, whose activation does not live longer for that."""
    length = RunLength(6, every=2, evaluation=2)
    timeline = simulate(unroll(BP(), 2, length), Costs((1.0,) * 2, (2.0,) * 2, up=(0.01,), down=(0.01,), capacity=(2,)))
    assert slots(timeline)[0][1] == 1
    assert slots(timeline)[0][0] <= 3


def mapped(rank: Rank, job: StageJob) -> tuple[int, int]:
    """Train stage job.k; the bytes that it has mapped together with its neighbours, and how many messages they may hold."""
    link = joined(rank, job)
    Worker(job, link, rank.device, rank.emit, rank.progress).run()
    link.close()
    [channel] = link.channels.values()
    assert isinstance(channel, SharedChannel)
    return sum(channel.sizes) + sum(slot.nbytes for slot in channel.theirs.values()), len(channel.sizes) + len(channel.theirs)


@pytest.mark.skipif(not shares("shared", "cpu"), reason="this system has no shared memory for stages")
@pytest.mark.parametrize("method", [BP(), BP(accumulate=2), Interlocking(2)], ids=str)
def test_two_processes_map_what_is_predicted(method: Method) -> None:
    """Methods without slack, where nothing depends on which stage is faster."""
    own = [replace(job, placement=Placement(link="shared")) for job in jobs("conv", 2, method, evaluate=False)]
    (below, count), (above, same) = run_processes(mapped, own)
    [(up, down)] = slots(simulate(unroll(method, 2, own[0].length.batches), Costs.unit(2)))
    assert (count, same) == (up + down,) * 2
    assert below == above > 0


def test_which_links_share() -> None:
    assert shares("auto", "cpu") == shares("shared", "cpu")
    assert not shares("gloo", "cpu")
    assert not shares("auto", "cuda")
