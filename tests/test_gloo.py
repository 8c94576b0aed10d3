"""Frames over a wire that can be looked into: no frame exceeds its buffer, and a sender waits where it must."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from delock.links import Message
from delock.links.gloo import FIRST, Receiver, Sender
from delock.links.wire import pack, unpack

from messages import CPU, activation, beside


class Wire:
    """Stands for torch.distributed between one sender and one receiver, with gloo's rules: nothing moves before a buffer is posted, what
    is posted is filled in order, a frame longer than its buffer is the end, and a send buffer is not copied before it is delivered.
    """

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.frames: deque[tuple[_Work, Tensor]] = deque()
        self.buffers: deque[tuple[_Work, Tensor]] = deque()
        self.waiting = 0
        self.sizes: list[int] = []  # of the frames delivered
        self.unwaited = 0

    def isend(self, frame: Tensor, peer: int) -> _Work:
        return self._post(self.frames, frame)

    def irecv(self, buffer: Tensor, peer: int) -> _Work:
        return self._post(self.buffers, buffer)

    def _post(self, queue: deque[tuple[_Work, Tensor]], data: Tensor) -> _Work:
        work = _Work(self)
        with self.changed:
            self.unwaited += 1
            queue.append((work, data))
            while self.frames and self.buffers:
                (sent, frame), (received, buffer) = self.frames.popleft(), self.buffers.popleft()
                assert len(frame) <= len(buffer), "gloo would abort the process"
                buffer[: len(frame)] = frame
                self.sizes.append(len(frame))
                sent.done = received.done = True
            self.changed.notify_all()
        return work

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait, not for long, until something holds."""
        with self.changed:
            assert self.changed.wait_for(holds, 20), "nothing moves any more"


class _Work:
    def __init__(self, wire: Wire) -> None:
        self.wire, self.done = wire, False

    def wait(self) -> None:
        wire = self.wire
        with wire.changed:
            wire.waiting += 1
            wire.changed.notify_all()
            assert wire.changed.wait_for(lambda: self.done, 20), "waited for what never comes"
            wire.waiting -= 1
            wire.unwaited -= 1


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    made = Wire()
    monkeypatch.setattr("delock.links.gloo.dist", made)
    return made


def payload(length: int, b: int) -> Tensor:
    return torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(b))


def packed(length: int, b: int = 0) -> Tensor:
    """Message b with `length` bytes in it."""
    return pack(activation(b), Message(payload(length, b)))[0]


def holds(got: Tensor, length: int, b: int = 0) -> bool:
    """It is `packed(length, b)`, but for the bytes between its tensors, which mean nothing."""
    name, message = unpack(got, CPU)
    return name == activation(b) and torch.equal(message.values, payload(length, b))


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("seed", range(6))
def test_frames_never_exceed_their_buffers(wire: Wire, depth: int, seed: int) -> None:
    """Any sizes in any order: bytes to hundreds of kilobytes, growing, shrinking, jumping."""
    g = torch.Generator().manual_seed(seed)
    lengths = [int(10 ** (5.5 * float(torch.rand((), generator=g)))) for _ in range(30)]
    lengths = sorted(lengths) if seed == 4 else sorted(lengths, reverse=True) if seed == 5 else lengths
    sender, receiver = Sender(1, depth), Receiver(0, depth)
    got = []

    def receive() -> None:
        got.extend(receiver.receive() for _ in lengths)
        receiver.close()

    with beside(receive):
        for b, length in enumerate(lengths):
            sender.send(packed(length, b))
        sender.close()
    arrived = [holds(one, length, b) for b, (one, length) in enumerate(zip(got, lengths, strict=True))]
    assert arrived == [True] * 30, "a received message was written over"
    assert not wire.unwaited, "something is pending"
    assert not wire.frames
    assert not wire.buffers


def test_a_size_seen_before_takes_one_frame_and_no_copy(wire: Wire) -> None:
    sender, receiver = Sender(1, 3), Receiver(0, 3)
    large, small = packed(50_000), packed(10)
    for length in (50_000, 50_000, 10, 50_000, 10):
        sender.send(packed(length))
        got = receiver.receive()
        assert holds(got, length)
    frames = [size for size in wire.sizes if size > 1]
    assert frames[:4] == [FIRST] * 3 + [len(large) - 3 * FIRST]
    assert frames[4:] == [len(large), len(small), len(large), len(small)]
    assert got.untyped_storage().nbytes() == len(large), "not a view of the buffer it came in"


@pytest.mark.parametrize("depth", [1, 3])
def test_a_sender_that_is_too_far_ahead_waits_for_the_receiver(wire: Wire, depth: int) -> None:
    """`depth` messages lie in posted buffers, `depth` wait at the sender, the next one blocks."""
    sender, receiver = Sender(1, depth), Receiver(0, depth)
    sent = 0

    def send() -> None:
        nonlocal sent
        for b in range(4 * depth):
            sender.send(packed(100, b))
            sent += 1
        sender.close()

    with beside(send):
        for consumed in range(2 * depth):
            wire.until(lambda: wire.waiting == 1)
            assert sent == 2 * depth + consumed
            assert holds(receiver.receive(), 100, consumed)
            wire.until(lambda consumed=consumed: sent > 2 * depth + consumed or wire.waiting == 0)
        for b in range(2 * depth, 4 * depth):
            assert holds(receiver.receive(), 100, b)
        receiver.close()
    assert sent == 4 * depth


def test_a_sender_says_how_long_it_waited(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(work: _Work) -> None:
        nonlocal now
        now += 2

    monkeypatch.setattr("delock.links.gloo.perf_counter", lambda: now)
    monkeypatch.setattr(_Work, "wait", wait)
    sender = Sender(1, 2)
    assert [sender.send(packed(10)) for _ in range(4)] == [0, 0, 2, 2]
    assert sender.send(packed(2 * FIRST)) == 6  # in three frames
