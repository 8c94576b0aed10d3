"""Predicted memory against what is counted by hand, against what stages really hold, and against what torch's allocator gives out."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import delock
from delock.cli.tables import prediction_table, stage_table
from delock.execution import PLAIN, lay_out_input, lay_out_weights
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links.connect import shares
from delock.links.mailbox import Mailbox
from delock.memory.compose import StageGraph as Atoms
from delock.memory.peaks import LinkBytes, StageBytes, StageMemory, peaks
from delock.memory.sizes import RunLinks
from delock.methods import ADL, BP, DDG, DGL, DSP, FDG, FR, AsyncDGL, GPipe, Interlocking, Method, OneFOneB
from delock.nets import build
from delock.options import Compression, Execution, Placement
from delock.partition.layer_memory import LayerMemory, Output, observe
from delock.partition.live_bytes import LiveBytes
from delock.partition.measure import LayerCost
from delock.plan import unroll, walk
from delock.records import Event, StageReport, Started
from delock.run.job import StageJob
from delock.run.prepare import prepare
from delock.run.ranks import joined
from delock.run.request import Request
from delock.run.worker import Worker

from harness import every_method, one_of_each
from harness import jobs as tiny_jobs

pytestmark = pytest.mark.usefixtures("own_random")

CPU = torch.device("cpu")
NOTHING = StageBytes(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def lives(method: Method, stages: list[StageBytes], batches: int) -> list[int]:
    """The peaks of what lives."""
    return [one.live for one in peaks(method, stages, batches)]


def most(method: Method, K: int, **bytes_: Any) -> list[int]:
    """The peaks of K stages of which some sizes are not 0."""
    return lives(method, [replace(NOTHING, feeds=method.micro_batches * (k == 0), **bytes_) for k in range(K)], 40)


# ---- by hand -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("K", range(1, 5))
def test_graphs(K: int) -> None:
    """A graph is 1 byte from its Forward to its last Backward; all else weighs nothing."""
    held = partial(most, K=K, graph=1, forward=1)
    for k in range(K):
        d, D = K - 1 - k, 2 * (K - 1 - k)
        assert held(BP())[k] == held(DGL())[k] == held(Interlocking(1))[k] == 1
        assert held(GPipe(4))[k] == 4
        assert held(OneFOneB(4))[k] == min(4, K - k)
        assert held(DDG())[k] == d + 1
        assert held(FDG())[k] == held(FDG(at="mixed"))[k] == held(ADL(2))[k] == D + 1
        assert held(FDG(order="backward-first"))[k] == max(1, D)
        assert held(DSP())[k] == held(FR())[k] == 1


@pytest.mark.parametrize("K", range(2, 5))
def test_weights(K: int) -> None:
    """10 bytes of weights: copies where a stashed Backward crosses an Update, a gradient, and the optimizer's 20 and 3 in a step."""
    held = partial(most, K=K, weights=10, largest=10, backward=10, backward_retained=10, state=20, optimizer_step=3)
    for k in range(K):
        d, D = K - 1 - k, 2 * (K - 1 - k)
        assert held(BP())[k] == held(FDG(at="mixed"))[k] == held(DSP())[k] == held(FR())[k] == 10 + 20 + 3
        # the copy for the graph that goes with a Backward is gone by the Update
        assert held(DDG())[k] == (10 + 20 + 3 if k == K - 1 else 10 * (d + 1) + 10 + 20)
        assert held(FDG())[k] == (10 + 20 + 3 if k == K - 1 else 10 * (D + 1) + 10 + 20)
    # a second gradient is added out of place to the first; the mean of two is a third
    assert held(BP(accumulate=2)) == [10 + 10 + 20 + 10] * K
    assert held(ADL(2, at="mixed")) == [max(20 + 10 + 10 + 10, 20 + 10 + 10 + 3)] * K


def test_inputs_and_links() -> None:
    """1 byte for an input; 100 for a message up, 10000 for one down, where gloo keeps three at each end, and one while it is packed."""
    assert most(FR(), 3, input=1) == [3, 2, 1]
    assert most(BP(), 2, input=1) == [2, 1]  # the feed holds the batch that it read last until it has the next
    assert most(GPipe(4), 2, input=4) == [8, 16]  # stage 0: parts are views of their batch
    up, down = LinkBytes(100, 3), LinkBytes(10000, 3)
    first = replace(NOTHING, feeds=1, up_out=up, down_in=down)
    last = replace(NOTHING, up_in=up, down_out=down)
    assert lives(FDG(), [first, last], 40) == [100 * 4 + 10000 * 3, 100 * 3 + 10000 * 4]
    assert lives(FDG(), [first, last], 2) == [100 * 2 + 10000 * 3, 100 * 3 + 10000 * 2]  # a run too short to fill them
    assert lives(DGL(), [first, last], 40) == [100 * 4, 100 * 3]


def test_a_process_grows_by_the_peaks_of_activations_and_of_weights() -> None:
    """Activations are 7 at their peak, weights 10 + 20 + 3 in an Update, when no activation lives."""
    sizes = replace(NOTHING, feeds=1, graph=7, forward=7, weights=10, largest=10, backward=10, state=20, optimizer_step=3)
    [found] = peaks(BP(), [sizes], 5)
    assert (found.live, found.resident) == (7 + 10 + 20, 7 + 33)
    [first, _] = peaks(FDG(), [sizes, replace(sizes, feeds=0)], 40)
    assert first.resident == 3 * 7 + 3 * 10 + 10 + 20
    [alone] = peaks(BP(), [replace(sizes, weights=0, backward=0, state=0, optimizer_step=0)], 5)
    assert alone.live == alone.resident == 7


def test_a_graph_that_is_needed_again_is_not_freed_on_the_way() -> None:
    held = most(Interlocking(2, combine="sum", send="late"), 3, graph=5, forward=5, backward=1, backward_retained=7)
    assert held == [5 + 7, 5 + 7, 5 + 1]


def memory_of(**bytes_: Any) -> LayerMemory:
    """An atom that holds nothing but what is said."""
    base: dict[str, Any] = dict.fromkeys(LayerMemory.__slots__, 0)
    return LayerMemory(**{**base, "kept": (False,), "writes": False, "outputs": (Output(8, None, False),), **bytes_})


def test_a_tensor_between_two_atoms_is_held_once() -> None:
    holds = memory_of(kept=(True,), outputs=(Output(8, None, True),), graph=100)
    view = memory_of(outputs=(Output(8, 0, False),))
    assert Atoms([holds, view, holds], [8], 1.0).graph == 100 + 8 + 100  # the input and the output are counted elsewhere
    assert Atoms([holds, view, holds], [8], 0.5).graph == 104
    assert Atoms([memory_of(), memory_of()], [8], 1.0).graph == 0
    writes = memory_of(writes=True, kept=(True,), outputs=(Output(8, 0, True),))
    assert Atoms([writes, holds], [8], 1.0).graph == 8 + 100  # the stage gives it a copy of the input
    assert Atoms([holds], [8], 1.0).output == 8
    assert Atoms([view], [8], 1.0).output == 0


def test_a_backward_frees_what_it_has_used() -> None:
    layer = memory_of(graph=100, weights=10, backward=30, backward_with_errors=40, backward_retained=45)
    chain = Atoms([layer] * 3, [8], 1.0)
    assert chain.backward(frees=True) == 30  # at the last atom; the next has 100 less, 10 of gradients and an error more
    assert chain.backward(frees=False) == 45 + 10 + 10


# ---- what stages hold --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", one_of_each(every_method(3)), ids=str)
def test_what_is_predicted_is_what_stages_hold(method: Method) -> None:
    """Graphs, copies of weights, batches and gradients after every step of a run in one process."""
    box = Mailbox()
    workers = [Worker(job, box.end(job.k), CPU, lambda event: None) for job in tiny_jobs("conv", 3, method, evaluate=False)]
    holding = [StageMemory(k, replace(NOTHING, weights=1, feeds=method.micro_batches * (k == 0))) for k in range(3)]
    with torch.random.fork_rng(devices=[]):
        for k, step in walk(unroll(method, 3, workers[0].job.length.batches)):
            workers[k].engine.execute(step)
            holding[k].execute(step)
            stage, seen = workers[k].stage, holding[k]
            assert seen.batches.keys() == stage.in_flight.keys()
            assert seen.graphs == sum(held.outputs is not None for held in stage.in_flight.values())
            copies = [*stage.banks.kept.values(), *stage.banks.drawn.values(), *(held.weights for held in stage.in_flight.values())]
            assert seen.versions == len({id(copy) for copy in copies if copy is not None})
            assert bool(seen.grads) == any(g is not None for g in stage.learner.grads[: len(stage.body.weights)])


# ---- what the allocator gives out --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batches:
    """Random batches, each in memory of its own."""

    make: Callable[[torch.Generator], tuple[Tensor, Tensor]]

    def __len__(self) -> int:
        return 9

    def sizes(self) -> list[int]:
        """Rows of every batch."""
        return [32]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in every epoch."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(len(self)):
            yield self.make(generator)


def images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(32, 3, 16, 16), (32,)."""
    return torch.randn(32, 3, 16, 16, generator=generator), torch.randint(10, (32,), generator=generator)


def allocated(rank: Rank, job: StageJob) -> int:
    """Trains stage job.k; returns the peak of bytes that torch's allocator has given out, above those at the end of building."""
    link = joined(rank, job)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        worker.run()
        link.close()  # before the profiler goes: gloo's receives tell it of their ends
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return max(map(int, re.findall(r'"Total Allocated": (\d+)', path.read_text())))


@pytest.mark.parametrize("method", [GPipe(2), FDG(), pytest.param(DSP(), marks=pytest.mark.slow)], ids=str)
def test_the_prediction_is_what_the_allocator_gives_out(method: Method) -> None:
    model = build("resnet8", classes=10, in_channels=3, image_size=16)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    request = Request(model, Batches(images), None, cross_entropy, method, sgd, cuts=[4], epochs=1,
                      placement=Placement(link="gloo"))  # fmt: skip
    prepared = prepare(request)
    predicted = [stage.live for stage in prepared.started().stages]
    measured = run_processes(allocated, prepared.jobs())
    assert all(found > 1e6 for found in measured)
    assert predicted == pytest.approx(measured, rel=0.1)


@pytest.mark.skipif(not shares("shared", "cpu"), reason="this system has no shared memory for stages")
def test_messages_in_use_lie_in_slots() -> None:
    """Inputs and errors cost nothing beside the slots of both links, which stay."""
    model = build("resnet8", classes=10, in_channels=3, image_size=16)
    sgd = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
    request = Request(model, Batches(images), None, cross_entropy, BP(), sgd, cuts=[4, 6], epochs=1,
                      placement=Placement(link="shared"))  # fmt: skip
    prepared = prepare(request)
    assert prepared.slots() == [(2, 1), (2, 1)]
    predicted = [stage.live for stage in prepared.started().stages]
    measured = run_processes(allocated, prepared.jobs())
    assert predicted == pytest.approx(measured, rel=0.1)
    assert all((stage.memory or 0) - (stage.live or 0) > 3 * 32 * 16 * 8 * 8 * 4 for stage in prepared.started().stages)
    assert replace(prepared, request=replace(request, placement=Placement(link="gloo"))).slots() is None
    assert replace(prepared, request=replace(request, workers="inline")).slots() is None


@pytest.mark.usefixtures("own_random")
@pytest.mark.parametrize("execution", [PLAIN, Execution(layout="channels-last"), Execution(amp="bf16")], ids=str)
def test_what_is_observed_of_a_block(execution: Execution) -> None:
    """A residual block of 16 channels; what its graph holds beside x: conv, norm and relu, conv."""
    model = build("resnet8", classes=10, in_channels=3, image_size=16)
    block = lay_out_weights(execution, model.get_submodule("layer1.0"))
    x = lay_out_input(execution, torch.randn(32, 16, 16, 16))
    one = x.nbytes
    seen = observe(block.train(), x, [True], None, CPU, execution)
    stored = [o.size for o in seen.outputs]
    assert (stored, seen.writes) == ([one], False)
    amp = execution.amp == "bf16"
    halves = 2 if amp else 1  # convolutions make and keep half as many bytes
    assert seen.graph == pytest.approx(3 * one if not amp else (4 * one) / halves, rel=0.02)
    assert seen.kept == (not amp,)
    assert seen.forward >= seen.graph + one
    assert 0 < seen.forward_no_grad < seen.forward
    assert seen.weights == sum(p.nbytes for p in block.parameters())


def test_counting_bytes() -> None:
    x = torch.zeros(1000)
    live = LiveBytes()
    live.ignore([x])
    with live:
        y = x.view(10, 100)
        assert live.now == 0
        z = y + 1
        assert (live.now, live.peak) == (4000, 4000)
        del z
        assert (live.now, live.from_here()) == (0, 0)
        w = (x * 2).exp()
        assert (live.now, live.peak) == (4000, 8000)
    del w
    assert live.now == 0


# ---- where it is shown -------------------------------------------------------------------------------------------------------------


def started(method: str | Method, **options: Any) -> Started:
    """The prediction that a run in one process reports before it begins."""
    told: list[Event] = []
    given = {"loss": cross_entropy, "method": method, "cuts": [2], "batches": 3, "workers": "inline", "callbacks": [told.append], **options}
    data = [(torch.randn(4, 6), torch.randint(3, (4,)))] * 3
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    sgd = partial(torch.optim.SGD, lr=0.1)
    delock.fit(model, data, **{"optimizer": sgd, **given})
    return next(event for event in told if isinstance(event, Started))


@pytest.mark.usefixtures("own_random")
def test_tables_show_the_prediction_beside_what_is_measured() -> None:
    before = started("fdg")
    assert all(stage.memory for stage in before.stages)
    head, rows = prediction_table(before)
    big = [replace(stage, memory=mega * 10**6) for stage, mega in zip(before.stages, (12, 5), strict=True)]
    head, rows = prediction_table(replace(before, stages=tuple(big)))
    assert [row[head.index("memory\n(grows by)")] for row in rows] == ["12 MB", "5 MB"]
    report = StageReport(0, 1, 1, 0, 0, 0, 0, 0, 1, {}, {}, peak_memory=200_000_000, memory_growth=13_000_000)
    head, rows = stage_table([report], big[:1])
    assert rows[0][head.index("grown by") :] == ["13 MB", "12 MB"]
    assert stage_table([report], [replace(big[0], memory=None)])[1][0][-1] == "-"


@pytest.mark.usefixtures("own_random")
def test_what_is_not_predicted_is_not_shown() -> None:
    """Free-running stages, and an optimizer of which nothing is known."""
    assert {stage.memory for stage in started(AsyncDGL(order="round-robin")).stages} == {None}
    assert {stage.memory for stage in started("fdg", optimizer=own_optimizer).stages} == {None}


def own_optimizer(named: Any) -> torch.optim.Optimizer:
    """A function, which nobody can look into."""
    return torch.optim.SGD(named, lr=0.1)


def test_every_part_of_a_batch_has_a_shared_weight_as_a_whole() -> None:
    outputs = (((8, 4), torch.float32), ((11, 4), torch.float32))
    cost = LayerCost(0.0, 0.0, 304, 0, outputs=outputs, whole=(1,))
    links = RunLinks(DDG(micro_batches=4), Compression("none", "bf16"), [cost], 80, None, ahead=False)
    assert links.up(0).message == (8 * 4 * 4 + 80) // 4 + 11 * 4 * 4
    assert links.down(0).message == 8 * 4 * 2 // 4 + 11 * 4 * 2
