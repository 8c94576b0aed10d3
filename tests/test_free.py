"""Free-running stages: their link, alone and in processes, what they leave on record, and that it can be done again to the last bit."""

from __future__ import annotations

import atexit
import functools
import itertools
import multiprocessing
import os
import queue
import random
import re
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing import parent_process
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import delock.links.free
from delock.codecs import VQ
from delock.errors import StageFailed, UsageError
from delock.fitting import fit
from delock.free import FreeRun
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links import Message, Name
from delock.links.errors import LinkError
from delock.links.free import DEPTH, END, FreeLink
from delock.links.message import pack, unpack
from delock.methods import AsyncDGL
from delock.nets.emulated import Emulated
from delock.ops import Forward, Update
from delock.plan import check
from delock.plan.turns import recorded
from delock.records import Event, StepRecord, Turn, TurnsRecord
from delock.replay import ReplayBuffer
from delock.train import Job, StageResult, Worker, run_inline, run_rank

from harness import CPU, jobs, same_tree
from workloads import sgd

PATIENT = 20.0  # seconds that a test waits for what should come at once


# -- the link, with the test for its neighbours ------------------------------------------------------------------------------------


class Neighbours:
    """What comes from each side, and what was sent there; `open` says whether the link up lets anything through."""

    def __init__(self) -> None:
        self.come: dict[int, queue.Queue[Tensor | Exception]] = {0: queue.Queue(), 2: queue.Queue()}
        self.sent: dict[int, list[tuple[Name, Message]]] = {0: [], 2: []}
        self.open = threading.Event()
        self.waits: list[int | None] = []
        self.links: list[FreeLink] = []

    def comes(self, source: int, name: Name, values: Any = None) -> None:
        self.come[source].put(pack(name, Message(values))[0])

    def wait_for(self, peer: int) -> None:
        self.waits.append(peer)

    def go_on(self) -> None:
        self.waits.append(None)

    def end(self) -> None:
        """Let the threads of a link go that was not closed."""
        self.open.set()
        for source in self.come:
            self.comes(source, END)
        for link in self.links:
            with link.news:
                link.evaluations.clear()
                link.outgoing.append(pack(END, Message(None))[0])
                link.leaving, link.closing = link.leaving + 1, True
                link.news.notify_all()
        until(lambda: all(link.working == 0 for link in self.links))
        for link in self.links:
            atexit.unregister(link._abandon)


@pytest.fixture
def neighbours(monkeypatch: pytest.MonkeyPatch) -> Iterator[Neighbours]:
    """In place of the process group."""
    there = Neighbours()

    class Sender:
        def __init__(self, peer: int, depth: int) -> None:
            self.peer = peer

        def send(self, packed: Tensor) -> None:
            assert self.peer == 0 or there.open.wait(PATIENT)
            there.sent[self.peer].append(unpack(packed, CPU))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    class Receiver:
        def __init__(self, peer: int, depth: int, limit: Any) -> None:
            self.peer = peer

        def receive(self) -> Tensor:
            found = there.come[self.peer].get(timeout=PATIENT)
            if isinstance(found, Exception):
                raise found
            return found

        def close(self) -> None:
            pass

    monkeypatch.setattr(delock.links.free, "Sender", Sender)
    monkeypatch.setattr(delock.links.free, "Receiver", Receiver)
    yield there
    there.end()


def until(holds: Callable[[], bool]) -> None:
    """Wait for what other threads do."""
    deadline = time.monotonic() + PATIENT
    while not holds():
        assert time.monotonic() < deadline, "too late"
        threading.Event().wait(0.001)


def middle(neighbours: Neighbours, size: int = 2, max_reuse: int = 0) -> FreeLink:
    """The link of stage 1 of 3, at version 5."""
    neighbours.links.append(FreeLink(1, 3, ReplayBuffer(size, max_reuse), CPU, neighbours, lambda: 5))
    return neighbours.links[-1]


def test_what_comes_is_read_by_the_buffers_rule(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    for n in range(3):
        neighbours.comes(0, ("h", n, n), torch.full((2,), float(n)))
    until(lambda: len(link.buffer.entries) == 2 and link.buffer.entries[-1].ordinal == 2)
    read = []
    for _ in range(3):
        n = link.next()
        assert n is not None
        read.append((n, link.receive(0, ("h", n, 0)).values.tolist()))
    assert read == [(2, [2, 2]), (1, [1, 1]), (2, [2, 2])]
    assert link.buffer.account.versions == {0: 2, 1: 1}
    assert neighbours.waits == [], "it waited although there was something"


def test_the_first_batch_is_waited_for_and_so_is_the_next_when_all_are_used_up(neighbours: Neighbours) -> None:
    link = middle(neighbours, max_reuse=1)
    for n in range(2):
        threading.Timer(0.05, neighbours.comes, (0, ("h", n, 0))).start()
        assert link.next() == n
        link.receive(0, ("h", n, 0))
    assert neighbours.waits == [0, None] * 2, "the watch over stages that hang was not told"


def test_a_batch_that_has_lost_its_place_takes_no_memory(neighbours: Neighbours) -> None:
    link, alive = middle(neighbours), []
    for n in range(5):
        neighbours.comes(0, ("h", n, 0), torch.zeros(1000))
        until(lambda n=n: bool(link.buffer.entries) and link.buffer.entries[-1].ordinal == n)  # type: ignore[misc]
        alive.append(weakref.ref(link.buffer.entries[-1].item.values))
        source = link.next()
        assert source is not None
        assert link.receive(0, ("h", source, 0)).values.shape == (1000,)
    assert [ref() is not None for ref in alive] == [False] * 3 + [True] * 2


def test_an_evaluation_comes_first_in_order_and_does_not_pile_up(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    neighbours.comes(0, ("h", 0, 0))
    for i in range(6):
        neighbours.comes(0, ("e", i, 0), torch.tensor([i]))
    until(lambda: neighbours.come[0].qsize() == 6 - DEPTH - 1)  # one is in the hands of the thread
    assert link.next() is None
    assert len(link.evaluations) == DEPTH
    assert [link.receive(0, ("e", i, 0)).values.item() for i in range(6)] == list(range(6))
    assert link.next() == 0
    neighbours.comes(0, ("e", 7, 0))
    with pytest.raises(LinkError, match="stage 0 sent evaluation batch 7 where evaluation batch 6 was due"):
        link.receive(0, ("e", 6, 0))


def test_two_are_on_their_way_up_and_the_rest_is_left_out(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    for n in range(2):
        assert link.ready
        link.send(2, ("h", n, 0), Message(torch.zeros(1)))
    assert not link.ready
    neighbours.open.set()
    until(lambda: link.ready)
    link.send(2, ("e", 0, 0), Message(torch.zeros(1)))
    until(lambda: len(neighbours.sent[2]) == 3)
    assert [name for name, _ in neighbours.sent[2]] == [("h", 0, 5), ("h", 1, 5), ("e", 0, 5)]
    assert link.sent.to[2].messages == 3


def test_an_evaluation_waits_until_it_can_go_up(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    threading.Timer(0.05, neighbours.open.set).start()
    for i in range(4):
        link.send(2, ("e", i, 0), Message(torch.zeros(1)))
    assert [peer for peer in neighbours.waits if peer is not None] == [2] * (len(neighbours.waits) // 2) != []
    until(lambda: len(neighbours.sent[2]) == 4)


def test_the_end_is_told_down_and_up(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    neighbours.open.set()
    assert not link.stopped
    link.pause(time.perf_counter() + 0.05)  # ends by itself: the way is free
    neighbours.comes(2, END)
    link.pause(time.perf_counter() + 3600)  # ends because nobody above wants more
    assert link.stopped
    assert not link.ready
    link.stop()
    assert neighbours.sent[0] == [(END, Message(None))]
    neighbours.comes(0, ("e", 0, 0))
    assert link.evaluation()
    link.receive(0, ("e", 0, 0))
    neighbours.comes(0, END)
    assert not link.evaluation()
    link.close()
    assert [name for name, _ in neighbours.sent[2]] == [END]
    assert link.working == 0


def test_who_is_done_waits_for_a_free_way_but_not_with_an_evaluation(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    for n in range(2):
        link.send(2, ("h", n, 0), Message(None))
    threading.Timer(0.05, neighbours.open.set).start()
    link.pause(0.0)
    assert link.ready
    neighbours.comes(0, ("e", 0, 0))
    until(lambda: link.evaluates)
    link.pause(time.perf_counter() + 3600)


@pytest.mark.parametrize("side", [0, 2])
def test_what_fails_in_a_thread_is_raised_where_the_stage_waits(neighbours: Neighbours, side: int) -> None:
    link = middle(neighbours)
    neighbours.come[side].put(RuntimeError("Connection closed by peer"))
    with pytest.raises(RuntimeError, match="closed by peer"):
        link.next()
    assert neighbours.waits[-1:] != [None], "what it waited for must stand, so that the failure is known as an echo"
    with pytest.raises(RuntimeError, match="closed by peer"):
        link.send(2, ("e", 0, 0), Message(None))
    with pytest.raises(RuntimeError, match="closed by peer"):
        link.close()


def test_a_program_that_ends_early_ends_the_threads(neighbours: Neighbours, monkeypatch: pytest.MonkeyPatch) -> None:
    """One waits for room, one for something to send, one for the stage above; torch lets go of those that it holds."""
    link = middle(neighbours)
    for i in range(DEPTH + 1):
        neighbours.comes(0, ("e", i, 0))
    until(lambda: neighbours.come[0].empty() and len(link.evaluations) == DEPTH)

    class Work:
        def wait(self, limit: timedelta) -> None:
            neighbours.come[2].put(RuntimeError("Application timeout caused pair closure"))
            raise RuntimeError("Timed out waiting 1ms for recv operation to complete")

    monkeypatch.setattr(delock.links.free.dist, "irecv", lambda tensor, peer: Work())
    link._abandon()
    assert link.working == 0


def test_a_link_that_takes_nothing_holds_nobody_up(neighbours: Neighbours) -> None:
    """Stage 1 of 3 trains to its end, with the first two activations alone on their way, and does not compute what nobody can be given."""
    made = jobs("conv", 3, AsyncDGL(1), epochs=20, evaluate=False)
    link = middle(neighbours, size=1)
    worker, turns = Worker(made[1], link, CPU, lambda event: None), list[Turn]()
    outputs = made[0].module(made[0].train.inputs[:8]).detach()  # type: ignore[union-attr]
    neighbours.come[0].put(pack(("h", 0, 0), Message(outputs, made[0].train.targets[:8], samples=8))[0])  # type: ignore[union-attr]

    def tell(record: TurnsRecord) -> None:
        turns.extend(record.turns)

    def after() -> None:
        """When all updates are made: stage 1 stands still, until the way is free, and the stages above are done."""
        until(lambda: worker.stage.version == 60 and neighbours.waits[-1:] == [2])
        neighbours.open.set()
        until(lambda: len(neighbours.sent[2]) > 4)
        neighbours.comes(2, END)
        neighbours.comes(0, END)

    helper = threading.Thread(target=after)
    helper.start()
    FreeRun(worker.engine, link, AsyncDGL(1), made[1].course, tell).run()
    link.close()
    helper.join(PATIENT)
    assert [turn.ordinal for turn in turns] == list(range(len(turns)))
    assert [turn.trains for turn in turns] == [i < 60 for i in range(len(turns))]
    sent = [turn.ordinal for turn in turns if turn.sent]
    assert len([n for n in sent if n < 60]) == 2
    assert [name[1] for name, _ in neighbours.sent[2]] == [*sent, 0]  # and the end
    assert all(turn.sent for turn in turns[60:-1]), "an activation was computed for nobody"
    assert worker.stage.module.training


# -- in processes ------------------------------------------------------------------------------------------------------------------


def free(made: list[Job], **options: Any) -> tuple[list[StageResult], list[list[Turn]]]:
    """A free run; what its stages brought home, and their turns."""
    turns: list[list[Turn]] = [[] for _ in made]

    def hear(rank: int, event: Any) -> None:
        if isinstance(event, TurnsRecord):
            assert event.stage == rank
            turns[rank] += event.turns

    return run_processes(run_rank, made, threads=1, pin=False, patience=30, on_event=hear, **options), turns


def again(made: list[Job], turns: Sequence[Sequence[Turn]]) -> list[StageResult]:
    return run_inline(made, CPU, lambda event: None, threads=1, turns=turns)


def assert_replayed(run: list[StageResult], replay: list[StageResult]) -> None:
    """Weights, buffers, heads, optimizers, losses and evaluations, to the last bit."""
    for one, other in zip(run, replay, strict=True):
        same_tree((one.state, one.head, one.optimizer, one.losses), (other.state, other.head, other.optimizer, other.losses))
        same_tree([(e.step, repr(e.test_loss)) for e in one.evaluations], [(e.step, repr(e.test_loss)) for e in other.evaluations])


def assert_in_order(turns: Sequence[Sequence[Turn]], method: AsyncDGL, updates: int, evaluations: int) -> None:
    """Own numbers without a gap; what is read was sent before, stood in the buffer, and was not read too often."""
    for k, stage in enumerate(turns):
        visits = [turn for turn in stage if not turn.evaluates]
        assert [turn.ordinal for turn in visits] == list(range(len(visits)))
        assert [turn.ordinal for turn in stage if turn.evaluates] == list(range(evaluations))
        assert [turn.trains for turn in visits] == [i < updates for i in range(len(visits))]
        assert [turn.version for turn in visits] == [min(i, updates) for i in range(len(visits))]
        assert all(a.end <= b.start for a, b in itertools.pairwise(stage))
        if k == 0:
            assert [turn.source for turn in visits] == list(range(len(visits)))
            continue
        sent = {turn.ordinal: (i, turn.start) for i, turn in enumerate(t for t in turns[k - 1] if t.sent and not t.evaluates)}
        newest = 0
        for turn in visits:
            place, start = sent[turn.source]
            assert start < turn.start
            newest = max(newest, place)
            assert place > newest - method.buffer, "it had been overwritten"
        reads = [turn.source for turn in visits]
        assert not method.max_reuse or max(map(reads.count, reads)) <= method.max_reuse


RUNS: dict[str, tuple[str, int, AsyncDGL, dict[str, Any]]] = {
    "slowed": ("conv", 4, AsyncDGL(5, slow_stage=1, noise=0.5), {"samples": 160, "epochs": 10}),  # 200 updates
    "once more": ("tuple", 4, AsyncDGL(1, slow_stage=3, noise=0.5), {"samples": 160, "epochs": 10}),
    "read once": ("conv", 3, AsyncDGL(3, 1, slow_stage=0, noise=0.5), {"epochs": 10}),
    "clipped": ("conv", 3, AsyncDGL(2, 2), {"epochs": 10, "clip": 0.3}),
    "encoded": ("conv", 3, AsyncDGL(4), {"epochs": 10, "codec": VQ(codes=4, dim=2, every=3)}),
    "of two": ("tuple", 2, AsyncDGL(5), {"epochs": 10, "evaluate": False}),
    "alone": ("conv", 1, AsyncDGL(5), {"epochs": 4}),
}


def jobs_of(name: str) -> list[Job]:
    work, K, method, options = RUNS[name]
    options = dict(options)
    clip, codec = options.pop("clip", None), options.pop("codec", None)
    made = jobs(work, K, method, **options)
    return [replace(job, codec=codec, course=replace(job.course, clip=clip)) for job in made]


@pytest.mark.parametrize("name", RUNS)
def test_a_free_run_is_done_again_to_the_last_bit(name: str) -> None:
    _, K, method, _ = RUNS[name]
    made = jobs_of(name)
    course = made[0].course
    run, turns = free(made)
    assert multiprocessing.active_children() == []
    assert [result.report.updates for result in run] == [course.batches] * K
    evaluations = course.evaluation * (course.batches // course.every) if course.every else 0
    assert_in_order(turns, method, course.batches, evaluations)
    assert_replayed(run, again(jobs_of(name), turns))
    assert_accounted(run, turns, method)


def assert_accounted(run: list[StageResult], turns: list[list[Turn]], method: AsyncDGL) -> None:
    """What is told of the buffers and of time fits the turns."""
    for k, (result, stage) in enumerate(zip(run, turns, strict=True)):
        report, visits = result.report, [turn for turn in stage if not turn.evaluates]
        reads = len(visits) if k else 0
        assert sum(n * count for n, count in report.reuse.items()) == reads
        assert sum(report.visits_behind.values()) == sum(report.versions_behind.values()) == reads
        if k:
            sent = sum(turn.sent and not turn.evaluates for turn in turns[k - 1])
            assert sum(report.reuse.values()) == sent
        busy = report.forward + report.backward + report.update + report.evaluation + report.waiting
        assert 0.7 * report.seconds <= busy <= report.seconds + 1e-6, "there is time of which nobody knows where it went"
        assert report.staleness == {0: sum(turn.trains for turn in visits)}


def impatient(rank: Rank, payload: tuple[Job, str]) -> StageResult:
    """A stage in a process group that waits for a second, where others wait for half an hour."""
    job, meeting = payload
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo", f"file://{meeting}", timedelta(seconds=1), rank.world, rank.rank)
    return run_rank(rank, job)


def test_a_run_may_be_longer_than_the_limit_of_a_wait(tmp_path: Path) -> None:
    """Stage 0 hears nothing from above until all are done, and stages 1 and 2 nothing from below while it makes its last updates."""
    made = jobs("conv", 3, AsyncDGL(2), epochs=10, evaluate=False)
    made[0].module = Emulated((4, 8, 8), 0.07, 0.0)  # 30 updates in two seconds
    run = run_processes(impatient, [(job, str(tmp_path / "meeting")) for job in made], threads=1, pin=False, patience=30)
    assert [result.report.updates for result in run] == [30] * 3
    assert run[0].report.seconds > 2
    assert all(result.report.seconds < run[0].report.seconds / 2 for result in run[1:]), "they were as slow"


def test_time_is_waited_where_there_is_nothing_to_read() -> None:
    """Stage 0 is three times as slow as it is, and every batch may be read once: the others wait, and it does not."""
    run, _ = free(jobs("conv", 3, AsyncDGL(1, 1, slow_stage=0, noise=0.67), epochs=20, evaluate=False))
    slow, *others = [result.report for result in run]
    assert slow.idle < 0.35
    for report in others:
        assert report.idle > 0.4
        assert report.waiting > 0.4 * report.seconds


# -- a trace that was cut off ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def traced() -> tuple[list[StageResult], list[list[Turn]]]:
    torch.set_num_threads(1)
    return free(jobs_of("slowed"))


def test_any_cut_leaves_a_plan_that_can_run(traced: tuple[Any, list[list[Turn]]]) -> None:
    _, turns = traced
    plan, whole = recorded(turns)
    check(plan)
    assert whole
    draw, seen = random.Random(0), set()
    for _ in range(40):
        cut = [stage[: draw.choice([0, 1, len(stage) // 3, len(stage) // 2, len(stage) - 1, len(stage)])] for stage in turns]
        plan, whole = recorded(cut)
        seen.add(whole)
        check(plan)
        forwards = [[step.op for step in column if isinstance(step.op, Forward)] for column in plan.columns]
        for stage, ops in zip(cut, forwards, strict=True):
            assert [(turn.ordinal, turn.evaluates) for turn in stage][: len(ops)] == [(op.batch, op.evaluates) for op in ops]
        assert whole == (list(map(len, cut)) == list(map(len, forwards)))
        for k in range(1, 4):  # the first turn that is left out reads what is missing
            if len(forwards[k]) < len(cut[k]):
                missing = cut[k][len(forwards[k])]
                below = {(op.batch, op.evaluates) for op in forwards[k - 1]}
                assert (missing.ordinal if missing.evaluates else missing.source, missing.evaluates) not in below
    assert seen == {True, False}


def test_a_run_that_was_cut_off_is_done_again_as_far_as_it_goes(traced: tuple[list[StageResult], list[list[Turn]]]) -> None:
    """What stages 0 and 1 did does not depend on those above; of stage 3 nothing is left, and stage 2 stops where its reads do."""
    run, turns = traced
    replay = again(jobs_of("slowed"), [*turns[:2], turns[2][:50], []])
    for one, other in zip(run[:2], replay[:2], strict=True):
        same_tree((one.state, one.head), (other.state, other.head))
    assert replay[2].report.updates == sum(turn.trains for turn in turns[2][:50])
    assert (replay[3].report.updates, replay[3].losses) == (0, [])
    part = again(jobs_of("slowed"), [turns[0][:40], *turns[1:]])
    assert [result.report.updates for result in part] == [sum(isinstance(step.op, Update) for step in column)
                                                          for column in recorded([turns[0][:40], *turns[1:]])[0].columns]  # fmt: skip
    assert part[0].report.updates <= 40


def test_turns_of_another_number_of_stages() -> None:
    net, data = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [(torch.randn(6, 4), torch.randint(2, (6,)))]
    with pytest.raises(UsageError, match="turns of 3 stages cannot be done again by 2"):
        fit(net, data, loss=nn.functional.cross_entropy, method=AsyncDGL(), optimizer=sgd, steps=1, workers="inline", turns=[[]] * 3)
    with pytest.raises(UsageError, match="recorded turns are done again in one process"):
        fit(net, data, loss=nn.functional.cross_entropy, method=AsyncDGL(), optimizer=sgd, steps=1, turns=[[]] * 2)


# -- runs that cannot go on --------------------------------------------------------------------------------------------------------


class Trouble(nn.Module):
    """The identity until the fifth training batch, in a stage's process; ends the process, raises, or does not come back."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.batch = how, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch >= 5 and parent_process() is not None:
            match self.how:
                case "raise":
                    raise ZeroDivisionError("the culprit's own words")
                case "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                case "hang":
                    threading.Event().wait()
        return x


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", r"stage 1 failed in F4 \(forward of batch 4, tick 4\): ZeroDivisionError: the culprit's own words\n"),
        ("kill", r"stage 1 was killed by SIGKILL .* in F4 \(forward of batch 4, tick 4\)"),
        ("hang", r"stage 1 hangs in F4 \(forward of batch 4, tick 4\): it has not moved for \d+ s\nstage 0 (is|waits)"),
    ],
)
def test_a_stage_in_trouble_ends_the_run_and_is_named(how: str, expected: str) -> None:
    """Though nobody waits for it, and the stage below would go on for ever."""
    net = nn.Sequential(nn.Linear(4, 8), Trouble(how), nn.Linear(8, 8), nn.Linear(8, 2))
    batches = [(torch.randn(6, 4), torch.randint(2, (6,))) for _ in range(12)]
    heard = [time.monotonic()]

    def note(event: Event) -> None:
        if isinstance(event, StepRecord):
            heard.append(time.monotonic())

    with pytest.raises(StageFailed) as caught:
        fit(net, batches, loss=nn.functional.cross_entropy, method=AsyncDGL(3), cuts=[1, 2], epochs=1000, log_every=1, patience=2,
            optimizer=functools.partial(torch.optim.SGD, lr=0.1), on_event=note)  # fmt: skip
    assert time.monotonic() - heard[-1] < 15
    assert re.match(expected, str(caught.value)), str(caught.value)
    assert multiprocessing.active_children() == []
