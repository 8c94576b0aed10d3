"""The link between processes over torch.distributed point-to-point (gloo): receives are posted ahead, sends go on in the background.

gloo's rules (measured; see docs/restrictions.md) shape this file: nothing moves before the receiver has posted a buffer, a message
longer than the buffer aborts the process, a shorter one fills its beginning, and a buffer in flight must be left alone. So a message
travels in frames that never exceed the buffer posted for them, and both sides know each buffer's size without a word:

    frame i            posted with FIRST bytes            for i < depth
    frame i + depth    posted when frame i is consumed,   as large as the largest message begun so far

The first message of a size needs a few frames, every later one fits in one, and its tensors are views of the received buffer.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from datetime import timedelta
from functools import partial
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from delock.links.message import Message, MessageName
from delock.links.nccl import Courier
from delock.links.wire import length_of, pack, unpack

FIRST = 4096  # bytes of the first buffers: room for a header, little waste
WAYS = 2  # frames under way in each direction of a free-running stage
ENDLESS = timedelta(days=3650)  # a free-running stage that is done hears nothing until all are


class FrameSizes:
    """The sizes of the receive buffers, as both ends compute them from the messages that pass."""

    def __init__(self, depth: int) -> None:
        self.sizes = deque([FIRST] * depth)
        self.largest = FIRST

    def next(self, message_length: int) -> tuple[int, int]:
        """Returns the size of the next frame's buffer, and of the one that replaces it; `message_length`: of the message in the frame."""
        self.largest = max(self.largest, message_length)
        self.sizes.append(self.largest)
        return self.sizes.popleft(), self.largest


class Sender:
    """Sends messages to one peer in order; at most `depth` frames are on their way before it waits (back-pressure)."""

    def __init__(self, peer: int, depth: int) -> None:
        self.peer, self.depth = peer, depth
        self.frames = FrameSizes(depth)
        self.pending: deque[tuple[Any, Tensor]] = deque()  # the Work must live, and its buffer must not change, until wait()

    def send(self, packed: Tensor) -> float:
        """Starts sending one packed message; returns the seconds that it waited before it could."""
        start, length, waited = 0, len(packed), 0.0
        while start < length:
            size, _ = self.frames.next(length)
            waited += self._post(packed[start : start + size])
            start += size
        return waited

    def _post(self, frame: Tensor) -> float:
        asked = perf_counter()
        while len(self.pending) >= self.depth:
            self.pending.popleft()[0].wait()
        waited = perf_counter() - asked
        self.pending.append((dist.isend(frame, self.peer), frame))
        return waited

    def flush(self) -> None:
        """Lets everything arrive."""
        while self.pending:
            self.pending.popleft()[0].wait()

    def close(self) -> None:
        """Fills the peer's posted buffers with farewells, and lets everything arrive."""
        for _ in range(self.depth):
            self._post(torch.zeros(1, dtype=torch.uint8))
        self.flush()


class Receiver:
    """Receives messages from one peer in order, with `depth` buffers posted ahead. A buffer is never used twice: views of it live on.

    `limit`: the longest wait for a message; by default the process group's. A wait that is longer closes the connection for good.
    """

    def __init__(self, peer: int, depth: int, limit: timedelta | None = None) -> None:
        self.peer, self.limit = peer, limit
        self.frames = FrameSizes(depth)
        self.posted: deque[tuple[Any, Tensor]] = deque()
        for _ in range(depth):
            self._post(FIRST)

    def _post(self, size: int) -> None:
        buffer = torch.empty(size, dtype=torch.uint8)
        self.posted.append((dist.irecv(buffer, self.peer), buffer))

    def _frame(self, length: int | None) -> tuple[Tensor, int]:
        work, buffer = self.posted.popleft()
        self._wait(work)
        length = length_of(buffer) if length is None else length
        _, replacement = self.frames.next(length)
        self._post(replacement)
        return buffer, length

    def receive(self) -> Tensor:
        """Returns the next packed message."""
        buffer, length = self._frame(None)
        if length <= len(buffer):
            return buffer[:length]
        parts = [buffer]
        missing = length - len(buffer)
        while missing > 0:
            buffer, _ = self._frame(length)
            parts.append(buffer[:missing])
            missing -= len(parts[-1])
        return torch.cat(parts)

    def close(self) -> None:
        """Takes the peer's farewells."""
        while self.posted:
            self._wait(self.posted.popleft()[0])

    def _wait(self, work: Any) -> None:
        if self.limit:
            work.wait(self.limit)
        else:
            work.wait()


class DistributedChannel:
    """The connection to one peer over the default process group.

    `depth`: frames per direction that may wait at each end. `device`: where received tensors go. `courier`: carries the tensors that
    stay on a GPU; without it they go through the CPU.
    """

    def __init__(self, peer: int, depth: int, device: torch.device, courier: Courier | None = None) -> None:
        self.peer, self.device, self.courier = peer, device, courier
        self.sender, self.receiver = Sender(peer, depth), Receiver(peer, depth)

    def pack(self, name: MessageName, message: Message) -> tuple[tuple[Tensor, list[Tensor]], int]:
        """Lays the message out in one buffer; tensors that the courier takes stay where they are."""
        packed, apart = pack(name, message, self.courier.takes) if self.courier else pack(name, message)
        return (packed, apart), len(packed) + sum(line.nbytes for line in apart)

    def post(self, packed: tuple[Tensor, list[Tensor]]) -> float:
        """Starts sending the buffer, and then the tensors that go apart."""
        waited = self.sender.send(packed[0])
        return waited + self.courier.send(self.peer, packed[1]) if self.courier else waited

    def receive(self) -> tuple[MessageName, Message]:
        """Returns the next message, its tensors views of the buffer it came in, or fetched onto the device."""
        fetch = partial(self.courier.fetch, self.peer) if self.courier else None
        return unpack(self.receiver.receive(), self.device, fetch)

    def close(self) -> None:
        """Says farewell, and takes the peer's."""
        self.sender.close()
        self.receiver.close()
        if self.courier:
            self.courier.close()


class GlooWays:
    """The ways of rank k to its neighbours over the default process group."""

    def __init__(self, k: int, world: int) -> None:
        self.neighbour = k + 1 if k + 1 < world else k - 1  # any

    def sender(self, peer: int) -> Sender:
        """Returns the way to a neighbour."""
        return Sender(peer, WAYS)

    def receiver(self, peer: int) -> Receiver:
        """Returns the way from a neighbour; who is gone is noticed without a limit."""
        return Receiver(peer, WAYS, ENDLESS)

    def abandon(self) -> None:
        """Ends every wait: one beyond its limit closes all connections. There may be none any more."""
        with suppress(RuntimeError, ValueError):
            work: Any = dist.irecv(torch.empty(1), self.neighbour)
            work.wait(timedelta(milliseconds=1))
