"""The stages of a session in processes of their own. The loop's process hands the batches to stage 0 through memory that both share.

loop                                                 stage 0 ... K - 1
a batch, in shared memory                    ------>  stage 0
an order, over the pipe to each stage        ------>  does it, in order
results, answers, a failure                  <------  as events
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing import connection
from typing import Any

from delock.data.iterable import weigher
from delock.data.loader import LoadedBatch
from delock.engine.feed import HandedFeed
from delock.launch import allocator
from delock.launch.processes import Team, started
from delock.launch.rank import Rank
from delock.launch.watchdog import POLL
from delock.links.message import Message, MessageKind, MessageName
from delock.links.shared_memory import SharedChannel
from delock.options import Placement
from delock.records import BatchResult
from delock.run.job import StageResult
from delock.run.own_loop.results import Measured, Results
from delock.run.own_loop.turns import LoopedJob, Turns
from delock.run.ranks import begin_together, joined
from delock.run.survival.checkpointing import Saver
from delock.run.worker import Worker
from delock.stage.loading import Held

AHEAD = 2  # batches that stage 0 has not taken yet
LOOP = -1  # the loop's process, as a neighbour of stage 0
END = "end"
BATCHES = ("batch", "rest")  # orders by which results come


@dataclass(frozen=True)
class Came:
    """Holds the results that have come by an order."""

    results: list[BatchResult]


@dataclass(frozen=True)
class Reply:
    """Holds the answer of a stage to an order; that to number 0 says that it is ready."""

    order: int
    value: Any = None


def serve(rank: Rank, looped: LoopedJob) -> StageResult:
    """Does what the loop orders, as stage job.k in this process."""
    job = looped.job
    job.ambient.enter(rank.device)
    link = joined(rank, job)
    handed = HandedFeed(_taker(rank), weigher(job.train) if job.train else None, job.method.micro_batches, rank.device)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress, history=Results, saver=Saver, handed=handed if job.k == 0 else None)
    begin_together(rank, job)
    near = range(max(0, job.k - 1), min(job.K, job.k + 2))
    turns = Turns(looped, [worker], worker.engine.run, near)
    rank.emit(Reply(0))
    number = 0
    while (order := _order(rank))[0] != END:
        number += 1
        name, given, asked = order
        answer = getattr(turns, name)(*given)
        if name in BATCHES and answer:
            rank.emit(Came(answer))
        if asked:
            rank.emit(Reply(number, None if name in BATCHES else answer))
    worker.end()
    result = worker.result(alone=True)
    link.close()
    return replace(result, optimizer=None)


def _order(rank: Rank) -> tuple[str, tuple[Any, ...], bool]:
    """Waits for the next order, which may take any time."""
    with rank.progress.aside():
        found: tuple[str, tuple[Any, ...], bool] = pickle.loads(rank.hear())
    return found


def _taker(rank: Rank) -> Any:
    """Returns what takes the next batch that stage 0 is handed."""
    if LOOP not in rank.peers:
        return None
    channel = SharedChannel(LOOP, AHEAD, rank.peers[LOOP])

    def take() -> LoadedBatch:
        _, message = channel.receive()
        return LoadedBatch(message.values, message.targets, message.samples)

    return take


class StagesApart:
    """Holds the processes of a session's stages."""

    def __init__(self, looped: Sequence[LoopedJob], placement: Placement, device: str, patience: float) -> None:
        self.K, self.number = len(looped), 0
        self.answers: dict[int, dict[int, Any]] = {0: {}}  # to orders that are waited for: stage -> its answer
        self.news: deque[BatchResult] = deque()
        self.judgements: list[int] = []  # orders
        self.held = ExitStack()
        allocator.give_back()  # what was taken to prepare the run
        self.team: Team = self.held.enter_context(
            started(serve, looped, threads=placement.threads, pin=placement.pin, device=device, patience=patience, hand=True)
        )
        self.channel = SharedChannel(0, AHEAD, self.team.hand)
        try:
            self._answers(0, self.K)
        except BaseException:
            self.stop()
            raise

    def batch(self, batch: LoadedBatch, outputs: bool, wait: bool) -> None:
        """Hands over a batch, as soon as stage 0 has taken all but AHEAD of those before."""
        self._hand(batch)
        number = self._tell("batch", outputs, asked=wait, of=(self.K - 1,))
        self._answers(number, 1) if wait else self._hear(0)

    def judge(self, batch: LoadedBatch) -> None:
        """Evaluates a batch, which may take until `judged`."""
        self._hand(batch)
        self.judgements.append(self._tell("judge", asked=True, of=(self.K - 1,)))

    def judged(self) -> list[Measured]:
        """Returns measures, their weight and samples of each batch that was evaluated."""
        numbers, self.judgements = self.judgements, []
        return [self._answers(number, 1)[self.K - 1] for number in numbers]

    def rest(self) -> None:
        """Does what is left."""
        self._answers(self._tell("rest", asked=True, of=(self.K - 1,)), 1)

    def ask(self, what: str, *given: Any) -> list[Any]:
        """Returns the answers of the stages to `drained`, `rate`, `weights` or `save`."""
        found = self._answers(self._tell(what, *given, asked=True), self.K)
        return [one for _, own in sorted(found.items()) for one in own]

    def load(self, weights: Sequence[Held]) -> None:
        """Lets the stages have these weights."""
        number = self._tell("load", asked=True, each=[[own] for own in weights])
        self._answers(number, self.K)

    def taken(self) -> list[BatchResult]:
        """Returns the results that have come."""
        found = [*self.news]
        self.news.clear()
        return found

    def end(self) -> list[StageResult]:
        """Returns the results of the stages, which end."""
        self._tell(END)
        return [one.open() for one in self.team.follow(self._event)]

    def stop(self) -> None:
        """Ends the processes."""
        self.held.close()

    # ---- messages ------------------------------------------------------------------------------------------------------------------

    def _hand(self, batch: LoadedBatch) -> None:
        try:
            packed, _ = self.channel.pack(_NAME, Message(batch.inputs, batch.targets, samples=batch.samples))
            while not self.channel.ready():
                if not connection.wait([self.team.hand], POLL):  # what the others tell can wait that long
                    self._hear(0)
            self.channel.post(packed)
        except OSError:  # stage 0 is gone, as will show
            self._hear()
            self._answers(self.number + 1, 1)

    def _tell(self, name: str, *given: Any, asked: bool = False, of: Sequence[int] = (), each: Sequence[Any] = ()) -> int:
        """Sends an order to every stage; asked: they answer, or those in `of` alone."""
        self.number += 1
        if asked:
            self.answers[self.number] = {}
        for k in range(self.K):
            own = (each[k],) if each else given
            self.team.tell(k, pickle.dumps((name, own, asked and (not of or k in of))))
        return self.number

    def _answers(self, number: int, count: int) -> dict[int, Any]:
        """Waits for answers to an order."""
        own = self.answers.setdefault(number, {})
        while len(own) < count:
            self._hear()
        return self.answers.pop(number)

    def _hear(self, seconds: float = POLL) -> None:
        """Takes in what has come; waits so long for something."""
        self.team.turn(self._event, seconds)

    def _event(self, rank: int, event: object) -> None:
        match event:
            case Came(results):
                self.news += results
            case Reply(order, value) if order in self.answers:
                self.answers[order][rank] = value


_NAME = MessageName(MessageKind.ACTIVATION)
