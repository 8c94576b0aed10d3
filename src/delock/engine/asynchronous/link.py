"""The links of a free-running stage: a thread takes what comes, another sends what goes up, and the stage itself never waits for either.

    stage k - 1 --- activations, evaluation batches, marks, end ---> [thread] replay buffer, queue ---> stage k
    stage k     --- activations ... ---> queue ---> [thread] ---> stage k + 1
    stage k + 1 --- done ---> [thread] flag ---> stage k

A message is sent when the one before has arrived, and an activation that finds two on their way is left out: over a slow link nothing
comes that is older than two transfers. An evaluation batch waits until it can go, and so does a mark: behind one the thread takes nothing
until the stage has passed it on, so that what is saved meanwhile is what came before it.
"""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import torch

from delock.engine.asynchronous.buffer import Entry, ReplayBuffer
from delock.engine.asynchronous.mark import Mark
from delock.launch.progress import Progress
from delock.links import Link
from delock.links.coded import ReceivedCodebooks
from delock.links.free_ways import Ways
from delock.links.message import Message, MessageKind, MessageName, as_values, expect
from delock.links.traffic import SentBytes
from delock.links.wire import pack, unpack

DEPTH = 2  # messages on their way up, and evaluation batches that wait for the stage
GONE = 2.0  # seconds that threads have to end when the program does
END = MessageName(MessageKind.END)


class FreeLink(Link):
    """Stage k's end. `version()`: the stage's number of updates, which goes along with its activations; `ways`: to its neighbours.

    `codebooks` are shown every message from below, in the order sent, by the thread that takes it.
    """

    def __init__(
        self,
        k: int,
        K: int,
        buffer: ReplayBuffer[Message],
        device: torch.device,
        watch: Progress,
        version: Callable[[], int],
        codebooks: ReceivedCodebooks,
        ways: Ways,
    ) -> None:
        self.k, self.K, self.buffer, self.device, self.watch, self.version = k, K, buffer, device, watch, version
        self.codebooks, self.ways = codebooks, ways
        self.news = threading.Condition()  # held to read and write what follows; notified of every change
        self.evaluations: deque[tuple[MessageName, Message]] = deque()
        self.outgoing: deque[torch.Tensor] = deque()
        self.leaving = 0  # messages that were given to go up and have not arrived, those outgoing among them
        self.closing = False  # no more will be
        self.mark: Mark | None = None  # that came from below, and has not been passed on
        self.ended = k == 0  # nothing more comes from below
        self.told = k == 0  # the stage below knows that this one and all above are done
        self.stopped = k + 1 == K  # all stages above are done
        self.error: BaseException | None = None
        self.picked: Entry[Message] | None = None
        self.sent = SentBytes()
        self.working = 0  # threads

    # ---- what the stage calls --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begins to take and to send messages, once everything is loaded: what came earlier would be lost."""
        if self.K > 1:
            atexit.register(self._abandon)
        if self.k > 0:
            self.down = self.ways.sender(self.k - 1)
            self._run(self._take_from_below)
        if self.k + 1 < self.K:
            self._run(self._take_from_above)
            self._run(self._send_up)

    def next(self) -> int | None:
        """Returns the ordinal of the batch to learn from now, waiting until there is one; None where something else comes first."""
        with self.news:
            self._until(lambda: self.evaluates or self.mark is not None or self._pick(), self.k - 1)
            return self.picked.ordinal if self.picked else None

    def more(self) -> bool:
        """Waits, for a stage that is done, for the next evaluation or mark (True) or the end (False)."""
        with self.news:
            self._until(lambda: self.evaluates or self.mark is not None or self.ended, self.k - 1)
            return self.evaluates or self.mark is not None

    def pause(self, until: float) -> None:
        """Waits, for a stage that is done, for that time, and for the way up to be free. An evaluation, a mark or the end cuts it short."""
        with self.news:
            self._until(lambda: self._disturbed or (self.ready and perf_counter() >= until), self.k + 1, until)

    @property
    def _disturbed(self) -> bool:
        return self.evaluates or self.mark is not None or self.stopped

    @property
    def evaluates(self) -> bool:
        """Says whether an evaluation batch has come."""
        return bool(self.evaluations)

    @property
    def ready(self) -> bool:
        """Returns True if an activation sent now would be under way at once, and a stage may want it."""
        return self.leaving < DEPTH and not self.stopped

    def receive(self, source: int, name: MessageName) -> Message:
        """Returns the batch that was picked, or the evaluation batch, waiting for it."""
        if name.kind is MessageKind.ACTIVATION:
            assert self.picked is not None
            entry, self.picked = self.picked, None
            expect(MessageName(MessageKind.ACTIVATION, entry.ordinal), name, source)
            return entry.item
        with self.news:
            self._until(lambda: self.evaluates, source)
            got, message = self.evaluations.popleft()
            self.news.notify_all()
        expect(got, name, source)
        return message

    def send(self, to: int, name: MessageName, message: Message) -> float:
        """Sends an activation if it is called when `ready`; an evaluation batch waits for its turn."""
        packed, _ = pack(name._replace(version=self.version()), message)
        self.sent.count(to, name, message, len(packed))
        asked = perf_counter()
        self._put(packed)
        return perf_counter() - asked

    def stop(self) -> None:
        """Tells the stage below, once, that this one and all above are done."""
        if not self.told:
            self.told = True
            self.down.send(pack(END, Message(None))[0])

    def due(self) -> Mark | None:
        """Returns the mark that is to be acted on now; evaluation batches that came before it come first."""
        with self.news:
            return None if self.evaluates else self.mark

    def pass_on(self, mark: Mark) -> None:
        """Sends a mark up, in its order among what is sent, and takes again what comes from below."""
        if self.k + 1 < self.K:
            self._put(pack(mark.message, Message(None))[0])
        with self.news:
            self.mark = None
            self.news.notify_all()

    def state(self) -> dict[str, Any]:
        """Returns the replay buffer and the codebooks that came; between a mark and `pass_on` they stay as they are."""
        with self.news:
            return {"buffer": self.buffer.state(as_values), "codebooks": dict(self.codebooks.books)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state()`, before the start."""
        self.buffer.load(state["buffer"], lambda values: Message(**values))
        self.codebooks.books = dict(state["codebooks"])

    def close(self) -> None:
        """Says that no more is to come, and lets everything arrive."""
        if self.k + 1 < self.K:
            self._put(pack(END, Message(None))[0], last=True)
        if self.k > 0:
            self.watch.wait_for(self.k - 1)
            self.down.close()
        with self.news:
            self._until(lambda: self.working == 0, self.k - 1 if self.k > 0 else self.k + 1)
        atexit.unregister(self._abandon)

    def _abandon(self) -> None:
        """Ends the threads of a program that ends without `close`. One that came back from torch later would abort the interpreter."""
        with self.news:
            self.error = self.error or RuntimeError("the program ends")
            self.news.notify_all()
        self.ways.abandon()
        with self.news:
            self.news.wait_for(lambda: self.working == 0, GONE)

    # ---- threads ---------------------------------------------------------------------------------------------------------------------

    def _run(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            error: BaseException | None = None
            try:
                work()
            except BaseException as raised:  # the stage raises it
                error = raised
            with self.news:
                self.working -= 1
                self.error = self.error or error
                self.news.notify_all()

        self.working += 1
        threading.Thread(target=guarded, daemon=True).start()

    def _take_from_below(self) -> None:
        receiver = self.ways.receiver(self.k - 1)
        while not self.ended:
            name, message = unpack(receiver.receive(), self.device)
            message = self.codebooks.with_codebooks(self.k - 1, message)
            with self.news:
                match name.kind:
                    case MessageKind.ACTIVATION:
                        self.buffer.put(message, name.batch, name.version)
                    case MessageKind.EVALUATION:
                        self._hold(lambda: len(self.evaluations) < DEPTH)  # else the whole test set would pile up here
                        self.evaluations.append((name, message))
                    case MessageKind.MARK:
                        self.mark = Mark.of(name)
                        self.news.notify_all()
                        self._hold(lambda: self.mark is None)
                    case _:
                        self.ended = True
                self.news.notify_all()
        receiver.close()

    def _take_from_above(self) -> None:
        receiver = self.ways.receiver(self.k + 1)
        receiver.receive()
        with self.news:
            self.stopped = True
            self.news.notify_all()
        receiver.close()

    def _send_up(self) -> None:
        sender = self.ways.sender(self.k + 1)
        while not (self.closing and self.leaving == 0):
            with self.news:
                self._hold(lambda: bool(self.outgoing))
                packed = self.outgoing.popleft()
            sender.send(packed)
            del packed
            sender.flush()
            with self.news:
                self.leaving -= 1
                self.news.notify_all()
        sender.close()

    def _put(self, packed: torch.Tensor, last: bool = False) -> None:
        with self.news:
            self._until(lambda: self.leaving < DEPTH, self.k + 1)
            self.outgoing.append(packed)
            self.leaving, self.closing = self.leaving + 1, last
            self.news.notify_all()

    def _hold(self, until: Callable[[], bool]) -> None:
        """Waits for that in a thread, `news` held. Raises what went wrong in another one."""
        self.news.wait_for(lambda: until() or self.error is not None)
        self._complain()

    def _pick(self) -> bool:
        self.picked = self.buffer.get()
        return self.picked is not None

    def _until(self, holds: Callable[[], bool], peer: int, deadline: float = 0.0) -> None:
        """Waits, `news` held, until that holds, which a deadline may bring about. Raises what went wrong in a thread."""
        self._complain()
        if holds():
            return
        self.watch.wait_for(peer)
        while not holds():
            self.news.wait(max(0.0, deadline - perf_counter()) or None)
            self._complain()
        self.watch.go_on()

    def _complain(self) -> None:
        if self.error is not None:
            raise self.error
