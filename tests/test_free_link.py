"""The link of free-running stages, with the test for its neighbours."""

from __future__ import annotations

import atexit
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from delock.engine.agreement import Wish
from delock.engine.asynchronous.buffer import ReplayBuffer
from delock.engine.asynchronous.link import DEPTH, END, FreeLink
from delock.engine.asynchronous.mark import Mark
from delock.engine.asynchronous.runner import FreeRun
from delock.errors import LinkError, Stopped
from delock.links import Message, MessageName
from delock.links.coded import ReceivedCodebooks
from delock.links.wire import pack, unpack
from delock.methods import AsyncDGL
from delock.plan import RunLength
from delock.records import Visit, VisitsRecord
from delock.run.worker import Worker

from harness import CPU, jobs
from messages import activation, evaluation

PATIENT = 20.0  # seconds that a test waits for what should come at once


class Neighbours:
    """Messages that come from each side, and those that were sent there; `open`: the link up lets something through."""

    def __init__(self) -> None:
        self.come: dict[int, queue.Queue[Tensor | Exception]] = {0: queue.Queue(), 2: queue.Queue()}
        self.sent: dict[int, list[tuple[MessageName, Message]]] = {0: [], 2: []}
        self.open = threading.Event()
        self.waits: list[int | None] = []
        self.links: list[FreeLink] = []
        self.ways: Any = None

    def comes(self, source: int, name: MessageName, values: Any = None) -> None:
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
def neighbours() -> Iterator[Neighbours]:
    """In place of the sockets."""
    there = Neighbours()

    class Sender:
        def __init__(self, peer: int) -> None:
            self.peer = peer

        def send(self, packed: Tensor) -> None:
            assert self.peer == 0 or there.open.wait(PATIENT)
            there.sent[self.peer].append(unpack(packed, CPU))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            pass

    class Receiver:
        def __init__(self, peer: int) -> None:
            self.peer = peer

        def receive(self) -> Tensor:
            found = there.come[self.peer].get(timeout=PATIENT)
            if isinstance(found, Exception):
                raise found
            return found

        def close(self) -> None:
            pass

    there.ways = SimpleNamespace(sender=Sender, receiver=Receiver, abandon=lambda: None)
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
    neighbours.links.append(FreeLink(1, 3, ReplayBuffer(size, max_reuse), CPU, neighbours, lambda: 5, ReceivedCodebooks(), neighbours.ways))
    neighbours.links[-1].start()
    return neighbours.links[-1]


def test_what_comes_is_read_by_the_buffers_rule(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    for n in range(3):
        neighbours.comes(0, activation(n, version=n), torch.full((2,), float(n)))
    until(lambda: len(link.buffer.entries) == 2 and link.buffer.entries[-1].ordinal == 2)
    read = []
    for _ in range(3):
        n = link.next()
        assert n is not None
        read.append((n, link.receive(0, activation(n)).values.tolist()))
    assert read == [(2, [2, 2]), (1, [1, 1]), (2, [2, 2])]
    assert link.buffer.statistics.versions_behind == {0: 2, 1: 1}
    assert neighbours.waits == [], "it waited although there was something"


def test_the_first_batch_is_waited_for_and_so_is_the_next_when_all_are_used_up(neighbours: Neighbours) -> None:
    link = middle(neighbours, max_reuse=1)
    for n in range(2):
        threading.Timer(0.05, neighbours.comes, (0, activation(n))).start()
        assert link.next() == n
        link.receive(0, activation(n))
    assert neighbours.waits == [0, None] * 2, "the watch over stages that hang was not told"


def test_a_batch_that_has_lost_its_place_takes_no_memory(neighbours: Neighbours) -> None:
    link, alive = middle(neighbours), []
    for n in range(5):
        neighbours.comes(0, activation(n), torch.zeros(1000))
        until(lambda n=n: bool(link.buffer.entries) and link.buffer.entries[-1].ordinal == n)  # type: ignore[misc]
        alive.append(weakref.ref(link.buffer.entries[-1].item.values))
        source = link.next()
        assert source is not None
        assert link.receive(0, activation(source)).values.shape == (1000,)
    assert [ref() is not None for ref in alive] == [False] * 3 + [True] * 2


def test_an_evaluation_comes_first_in_order_and_does_not_pile_up(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    neighbours.comes(0, activation(0))
    for i in range(6):
        neighbours.comes(0, evaluation(i), torch.tensor([i]))
    until(lambda: neighbours.come[0].qsize() == 6 - DEPTH - 1)  # one is in the hands of the thread
    assert link.next() is None
    assert len(link.evaluations) == DEPTH
    assert [link.receive(0, evaluation(i)).values.item() for i in range(6)] == list(range(6))
    assert link.next() == 0
    neighbours.comes(0, evaluation(7))
    with pytest.raises(LinkError, match="stage 0 sent evaluation batch 7 where evaluation batch 6 was due"):
        link.receive(0, evaluation(6))


def test_two_are_on_their_way_up_and_the_rest_is_left_out(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    for n in range(2):
        assert link.ready
        link.send(2, activation(n), Message(torch.zeros(1)))
    assert not link.ready
    neighbours.open.set()
    until(lambda: link.ready)
    link.send(2, evaluation(0), Message(torch.zeros(1)))
    until(lambda: len(neighbours.sent[2]) == 3)
    assert [name for name, _ in neighbours.sent[2]] == [activation(0, version=5), activation(1, version=5), evaluation(0, version=5)]
    assert link.sent.to[2].messages == 3


def test_an_evaluation_waits_until_it_can_go_up(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    threading.Timer(0.05, neighbours.open.set).start()
    for i in range(4):
        link.send(2, evaluation(i), Message(torch.zeros(1)))
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
    neighbours.comes(0, evaluation(0))
    assert link.more()
    link.receive(0, evaluation(0))
    neighbours.comes(0, END)
    assert not link.more()
    link.close()
    assert [name for name, _ in neighbours.sent[2]] == [END]
    assert link.working == 0


MARK = Mark(6, 5, Wish.SAVE)


def test_behind_a_mark_nothing_is_taken_until_it_is_passed_on(neighbours: Neighbours) -> None:
    """Evaluations in front of it come first; what is saved is what came before."""
    link = middle(neighbours, size=3)
    neighbours.open.set()
    neighbours.comes(0, activation(0), torch.tensor([0.0]))
    neighbours.comes(0, evaluation(0))
    neighbours.comes(0, MARK.message)
    neighbours.comes(0, activation(1), torch.tensor([1.0]))
    neighbours.comes(0, evaluation(1))
    until(lambda: link.mark is not None)
    assert link.due() is None
    assert link.next() is None
    link.receive(0, evaluation(0))
    assert link.next() is None, "it went on reading where it should be saved"
    assert link.due() == MARK
    link.send(2, activation(4), Message(None))
    [entry] = link.state()["buffer"]["entries"]
    assert (entry["ordinal"], entry["uses"], entry["item"]["values"].item()) == (0, 0, 0.0)
    assert neighbours.come[0].qsize() == 2
    link.pass_on(MARK)
    until(lambda: len(link.buffer.entries) == 2 and link.evaluates)
    assert link.due() is None
    until(lambda: len(neighbours.sent[2]) == 2)
    assert [name for name, _ in neighbours.sent[2]] == [activation(4, version=5), MARK.message]
    assert Mark.of(neighbours.sent[2][1][0]) == MARK
    assert link.sent.to[2].messages == 1, "a mark is no work"


def test_who_is_done_hears_of_a_mark(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    neighbours.open.set()
    neighbours.comes(0, MARK.message)
    until(lambda: link.mark is not None)
    link.pause(time.perf_counter() + 3600)
    assert link.more()
    link.pass_on(MARK)
    neighbours.comes(0, END)
    assert not link.more()


def test_a_stage_saves_itself_and_then_passes_the_mark_on(neighbours: Neighbours) -> None:
    link, told, saved = middle(neighbours), list[VisitsRecord](), list[int]()
    neighbours.open.set()

    def save(mark: Mark) -> None:
        assert link.due() == mark
        assert neighbours.sent[2] == []
        assert sum(len(record.visits) for record in told) == 1, "the trace does not reach as far as the checkpoint"
        saved.append(mark.tick)

    run = FreeRun(SimpleNamespace(stage=SimpleNamespace(k=1, K=3)), link, RunLength(9), told.append, save=save)  # type: ignore[arg-type]
    run.unreported.append(Visit(0, 0, True, 0))
    for wish in (Wish.SAVE, Wish.STOP):
        neighbours.comes(0, Mark(6 + wish, 5, wish).message)
        until(lambda: link.mark is not None)
        mark = run.mark()
        assert mark
        with pytest.raises(Stopped) if wish is Wish.STOP else nullcontext():
            run.cut(mark)
        until(lambda: len(neighbours.sent[2]) == 1)
        neighbours.sent[2].clear()
    assert saved == [6, 7]


def test_it_is_told_once_that_all_are_done(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    link.stop()
    link.stop()
    assert [name for name, _ in neighbours.sent[0]] == [END]


def test_who_is_done_waits_for_a_free_way_but_not_with_an_evaluation(neighbours: Neighbours) -> None:
    link = middle(neighbours)
    for n in range(2):
        link.send(2, activation(n), Message(None))
    threading.Timer(0.05, neighbours.open.set).start()
    link.pause(0.0)
    assert link.ready
    neighbours.comes(0, evaluation(0))
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
        link.send(2, evaluation(0), Message(None))
    with pytest.raises(RuntimeError, match="closed by peer"):
        link.close()


def test_a_program_that_ends_early_ends_the_threads(neighbours: Neighbours) -> None:
    """One waits for room, one for something to send, one for the stage above; torch lets go of those that it holds."""
    link = middle(neighbours)
    for i in range(DEPTH + 1):
        neighbours.comes(0, evaluation(i))
    until(lambda: neighbours.come[0].empty() and len(link.evaluations) == DEPTH)

    neighbours.ways.abandon = lambda: neighbours.come[2].put(ConnectionError("the connection to a neighbour was closed"))
    link._abandon()
    assert link.working == 0


@pytest.mark.usefixtures("own_random")
def test_a_link_that_takes_nothing_holds_nobody_up(neighbours: Neighbours) -> None:
    """Stage 1 of 3 trains to its end, with the first two activations alone on their way, and does not compute what nobody can be given."""
    made = jobs("conv", 3, AsyncDGL(1), epochs=20, evaluate=False)
    link = middle(neighbours, size=1)
    worker, turns = Worker(made[1], link, CPU, lambda event: None), list[Visit]()
    outputs = made[0].module(made[0].train.inputs[:8]).detach()  # type: ignore[union-attr]
    neighbours.come[0].put(pack(activation(0), Message(outputs, made[0].train.targets[:8], samples=8))[0])  # type: ignore[union-attr]

    def tell(record: VisitsRecord) -> None:
        turns.extend(record.visits)

    def after() -> None:
        """When all updates are made: stage 1 stands still, until the way is free, and the stages above are done."""
        until(lambda: worker.stage.version == 60 and neighbours.waits[-1:] == [2])
        neighbours.open.set()
        until(lambda: len(neighbours.sent[2]) > 4)
        neighbours.comes(2, END)
        neighbours.comes(0, END)

    helper = threading.Thread(target=after)
    helper.start()
    FreeRun(worker.engine, link, made[1].length, tell).run()
    link.close()
    helper.join(PATIENT)
    assert [turn.ordinal for turn in turns] == list(range(len(turns)))
    assert [turn.trains for turn in turns] == [i < 60 for i in range(len(turns))]
    sent = [turn.ordinal for turn in turns if turn.sent]
    assert len([n for n in sent if n < 60]) == 2
    assert [name.batch for name, _ in neighbours.sent[2]] == [*sent, 0]  # and the end
    assert all(turn.sent for turn in turns[60:-1]), "an activation was computed for nobody"
    assert worker.stage.module.training
