"""The links of a free-running stage: a thread takes what comes, another sends what goes up, and the stage itself never waits for either.

    stage k - 1 --- activations, evaluation batches, end ---> [thread] replay buffer, queue ---> stage k
    stage k     --- activations ... ---> queue of one ---> [thread] ---> stage k + 1
    stage k + 1 --- done ---> [thread] flag ---> stage k

An activation is left out where the one before has not been taken off the queue: on a slow link the newest would be overwritten anyway.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable

import torch

from delock.links.distributed import Receiver, Sender, Watch
from delock.links.message import Message, Name, pack, unpack
from delock.links.values import Library, Sent, lean
from delock.replay import Entry, ReplayBuffer

DEPTH = 2  # frames under way per direction
END: Name = ("f", 0, 0)  # going up: no more is to come; going down: all stages from here on are done


class FreeLink:
    """Stage k's end. `version()`: the stage's number of updates, which goes along with its activations."""

    def __init__(
        self, k: int, K: int, buffer: ReplayBuffer[Message], device: torch.device, watch: Watch, version: Callable[[], int]
    ) -> None:
        self.k, self.K, self.buffer, self.device, self.watch, self.version = k, K, buffer, device, watch, version
        self.news = threading.Condition()
        self.evaluations: deque[tuple[Name, Message]] = deque()
        self.ended = k == 0  # nothing more comes from below
        self.stopped = k + 1 == K  # all stages above are done
        self.error: BaseException | None = None
        self.picked: Message | None = None
        self.sent = Sent()
        self.outbox: queue.Queue[torch.Tensor | None] = queue.Queue(maxsize=1)
        self.threads: list[threading.Thread] = []
        if k > 0:
            self.down = Sender(k - 1, DEPTH)
            self._start(self._take_from_below)
        if k + 1 < K:
            self._start(self._take_from_above)
            self._start(self._send_up)

    # ---- what the stage calls --------------------------------------------------------------------------------------------------------

    def next(self) -> Entry[Message] | None:
        """What to learn from now, waiting until there is something; None where an evaluation, or the end, comes first."""
        with self.news:
            while True:
                self._complain()
                if self.evaluations or self.ended:
                    return None
                if entry := self.buffer.get():
                    self.picked = entry.item
                    return entry
                self._wait()

    def evaluation(self) -> Name | None:
        """The evaluation batch that has come, waiting for it or for the end; None at the end."""
        with self.news:
            while not self.evaluations and not self.ended:
                self._complain()
                self._wait()
            self._complain()
            return self.evaluations[0][0] if self.evaluations else None

    @property
    def waiting(self) -> bool:
        """Whether an evaluation batch has come."""
        return bool(self.evaluations)

    @property
    def ready(self) -> bool:
        """Whether an activation sent now would go on its way."""
        return self.outbox.empty()

    def receive(self, source: int, name: Name) -> Message:
        """See Link: the entry that was picked, or the evaluation batch."""
        if name[0] == "e":
            return self.evaluations.popleft()[1]
        assert self.picked is not None
        message, self.picked = self.picked, None
        return message

    def send(self, to: int, name: Name, message: Message) -> None:
        """See Link. An activation only after `ready`; an evaluation batch waits for its turn."""
        self._complain()
        packed, _ = pack((name[0], name[1], self.version()), lean(message))
        self.sent.count(to, name, message, len(packed))
        self.watch.wait_for(to)
        self._put(packed)
        self.watch.go_on()

    def stop(self) -> None:
        """Tell the stage below that this one and all above are done."""
        if self.k > 0:
            self.down.send(pack(END, Message(None))[0])

    def close(self) -> None:
        """See Link: say that no more is to come, and let everything arrive."""
        if self.k + 1 < self.K:
            self._put(pack(END, Message(None))[0])
            self._put(None)
        if self.k > 0:
            self.watch.wait_for(self.k - 1)
            self.down.close()
        for thread in self.threads:
            while thread.is_alive():
                thread.join(1.0)
                self._complain()

    # ---- threads ---------------------------------------------------------------------------------------------------------------------

    def _start(self, work: Callable[[], None]) -> None:
        def guarded() -> None:
            try:
                work()
            except BaseException as error:  # told to the stage, which raises it
                with self.news:
                    self.error = error
                    self.news.notify_all()

        thread = threading.Thread(target=guarded, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _take_from_below(self) -> None:
        receiver, library = Receiver(self.k - 1, DEPTH), Library()
        while not self.ended:
            name, message = unpack(receiver.receive(), self.device)
            message = library.completed(message)
            with self.news:
                match name[0]:
                    case "h":
                        self.buffer.put(message, name[1], name[2])
                    case "e":
                        self.evaluations.append((name, message))
                    case _:
                        self.ended = True
                self.news.notify_all()
        receiver.close()

    def _take_from_above(self) -> None:
        receiver = Receiver(self.k + 1, DEPTH)
        receiver.receive()
        with self.news:
            self.stopped = True
            self.news.notify_all()
        receiver.close()

    def _send_up(self) -> None:
        sender = Sender(self.k + 1, DEPTH)
        while (packed := self.outbox.get()) is not None:
            sender.send(packed)
        sender.close()

    def _put(self, packed: torch.Tensor | None) -> None:
        while True:
            self._complain()
            try:
                self.outbox.put(packed, timeout=1.0)
                return
            except queue.Full:
                continue

    def _wait(self) -> None:
        self.watch.wait_for(self.k - 1)
        self.news.wait(1.0)
        self.watch.go_on()

    def _complain(self) -> None:
        if self.error is not None:
            raise self.error

    def pull(self, source: int, count: int) -> list[tuple[Name, Message]]:
        """See Link. Nothing of such a run is saved in its middle."""
        raise NotImplementedError("a run with a replay buffer is repeated from its trace, not resumed")

    def push(self, source: int, messages: list[tuple[Name, Message]]) -> None:
        """See Link."""
        raise NotImplementedError("a run with a replay buffer is repeated from its trace, not resumed")

    def state(self) -> None:
        """See Link."""
        raise NotImplementedError("a run with a replay buffer is repeated from its trace, not resumed")

    def load(self, state: None) -> None:
        """See Link."""
        raise NotImplementedError("a run with a replay buffer is repeated from its trace, not resumed")
