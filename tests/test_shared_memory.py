"""A channel in shared memory, both ends in this process: what is received stays as it was, and nothing waits for ever."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from delock.launch.failure import raised
from delock.launch.progress import Progress
from delock.links import Message, meeting, shared_memory
from delock.links.shared_memory import RECORD, SharedChannel, SlotEvent
from delock.links.wire import ALIGN

from messages import DTYPES, activation, beside, numbers, tensors, trip

pytestmark = pytest.mark.skipif(meeting.here() is None, reason="no shared memory between processes here")


def pair(depth: int = 2) -> tuple[SharedChannel, SharedChannel]:
    a, b = socket.socketpair()
    return SharedChannel(1, depth, a), SharedChannel(0, depth, b)


def send(channel: SharedChannel, b: int, values: Any) -> float:
    return channel.post(channel.pack(activation(b), Message(values))[0])


def take(channel: SharedChannel, b: int) -> Any:
    name, message = channel.receive()
    assert name == activation(b)
    return message.values


def close(*channels: SharedChannel) -> None:
    """Both ends, each of which waits for the other."""
    with beside(channels[0].close):
        channels[1].close()


def row(length: int, b: int) -> Tensor:
    return torch.full((length,), float(b))


def held(channels: tuple[SharedChannel, SharedChannel], n: int) -> list[int]:
    """Send n messages, hold all that was received, and return the value in each."""
    lower, upper = channels
    got = []
    for b in range(n):
        send(lower, b, row(100, b))
        got.append(take(upper, b))
    return [int(x[0]) if bool((x == x[0]).all()) else -1 for x in got]


def test_what_is_held_is_not_written_over() -> None:
    """Many more messages than may be under way: each keeps its slot while its tensor lives, and gives it back afterwards."""
    channels = pair()
    for _ in range(3):
        assert held(channels, 12) == list(range(12))
        assert len(channels[0].slots) <= 13, "slots are not used again"
    close(*channels)


def test_a_slot_that_is_used_too_early_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class AtOnce:
        def __init__(self, of: Any, act: Callable[[Any], None]) -> None:
            act(self)

    monkeypatch.setattr(shared_memory, "weakref", SimpleNamespace(ref=AtOnce))
    channels = pair()
    assert held(channels, 12) == [10, 11] * 6
    close(*channels)


@pytest.mark.usefixtures("own_random")
def test_a_slot_takes_messages_of_any_layout_in_turn() -> None:
    """As long, but of other dtypes, shapes and strides; and a message without tensors, whose slot is free at once."""
    lower, upper = pair()
    images = torch.randn(2, 4, 3, 3)
    last = images.to(memory_format=torch.channels_last)
    for b, values in enumerate([images, last, images.view(torch.int32), images.flatten(), None, images]):
        send(lower, b, values)
        got = take(upper, b)
        if values is None:
            assert got is None
        else:
            assert torch.equal(got, values)
            assert (got.dtype, got.stride()) == (values.dtype, values.stride())
        del got
    assert len(lower.slots) <= 2, "slots are not used again"
    close(lower, upper)


def test_a_graph_keeps_the_slots_it_needs() -> None:
    lower, upper = pair()
    w = torch.ones(3, requires_grad=True)
    graphs = []
    for b in range(6):
        send(lower, b, (row(3, b), row(3, 100 + b)))
        used, unused = take(upper, b)
        graphs.append((w * used).sum())
        del used, unused
    for b in reversed(range(6)):
        [grad] = torch.autograd.grad(graphs.pop(), w)
        assert torch.equal(grad, row(3, b))
    for b in range(20):  # no graph is left: one slot after another
        send(lower, b, row(3, b))
        assert torch.equal(take(upper, b), row(3, b))
    assert len(lower.slots) <= 7
    close(lower, upper)


def test_a_slice_or_a_label_keeps_the_slot() -> None:
    lower, upper = pair()
    lower.post(lower.pack(activation(0), Message(numbers(50), {"y": [torch.arange(9)]}))[0])
    label = upper.receive()[1].targets["y"][0][3:5]
    assert held((lower, upper), 5) == list(range(5))
    assert label.tolist() == [3, 4]
    del label
    close(lower, upper)


def test_tensors_are_views_of_the_slot_as_they_were_packed() -> None:
    lower, upper = pair(1)
    every = {**tensors(), **{f"{dtype} {shape}": numbers(*shape, dtype=dtype) for dtype in DTYPES for shape in [(3, 5), (), (0,)]}}
    for b, (execution, x) in enumerate(every.items()):
        send(lower, b, (numbers(3), x))
        got, expected = take(upper, b)[1], trip(Message((numbers(3), x))).values[1]
        assert torch.equal(got, x), execution
        assert (got.dtype, got.shape, got.stride()) == (expected.dtype, expected.shape, expected.stride()), execution
        assert got.data_ptr() % ALIGN == 0 or not got.numel(), execution
        begins = [(torch.frombuffer(slot, dtype=torch.uint8).data_ptr(), len(slot)) for slot in upper.theirs.values()]
        assert not got.numel() or any(begin < got.data_ptr() < begin + size for begin, size in begins), execution
        del got
    assert len(lower.slots) <= 2
    close(lower, upper)


@pytest.mark.parametrize("seed", range(3))
def test_sizes_grow_and_shrink(seed: int) -> None:
    """Any sizes in any order, the last few held: no more slots than messages in use, none smaller than it must be."""
    lower, upper = pair(3)
    g = torch.Generator().manual_seed(seed)
    lengths = [int(10 ** (5.5 * float(torch.rand((), generator=g)))) - 1 for _ in range(60)]
    lengths = sorted(lengths) if seed == 1 else sorted(lengths, reverse=True) if seed == 2 else lengths
    kept: list[tuple[Tensor, int, int]] = []
    for b, length in enumerate(lengths):
        send(lower, b, row(length, b))
        kept.append((take(upper, b), length, b))
        if len(kept) > 4:
            kept.pop(0)
        assert all(torch.equal(x, row(n, c)) for x, n, c in kept)
    assert len(lower.slots) <= 6
    assert sum(map(len, lower.slots)) <= 6 * (4 * max(lengths) + 5000)
    close(lower, upper)


def test_a_sender_is_no_further_ahead_than_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits where `depth` messages have not been taken, and says how long."""
    lower, upper = pair(3)
    now, read = 0.0, SharedChannel._read

    def late(channel: SharedChannel, flags: int = 0) -> None:
        nonlocal now
        if channel is lower and not lower.credits and not flags:
            now += 2
            assert torch.equal(take(upper, taken := int(now / 2) - 1), row(5, taken))
        read(channel, flags)

    monkeypatch.setattr(shared_memory, "perf_counter", lambda: now)
    monkeypatch.setattr(SharedChannel, "_read", late)
    assert [send(lower, b, row(5, b)) for b in range(6)] == [0, 0, 0, 2, 2, 2]
    monkeypatch.undo()
    assert [int(take(upper, b)[0]) for b in (3, 4, 5)] == [3, 4, 5]
    close(lower, upper)


def test_both_send_much_before_they_read() -> None:
    """More than the sockets hold: neither gets stuck."""
    n, (lower, upper) = 800, pair(800)
    for channel in (lower, upper):
        channel.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)

    def talk(channel: SharedChannel) -> None:
        for b in range(n):
            send(channel, b, None if b % 2 else row(b % 7, b))
        for b in range(n):
            got = take(channel, b)
            assert got is None if b % 2 else torch.equal(got, row(b % 7, b))
        channel.close()

    with beside(lambda: talk(lower)):
        talk(upper)


def test_what_was_sent_arrives_after_a_farewell() -> None:
    lower, upper = pair()
    send(lower, 0, row(5, 0))
    with beside(lower.close):
        assert torch.equal(got := take(upper, 0), row(5, 0))
        upper.close()
    del lower, upper
    assert torch.equal(got, row(5, 0)), "a received tensor does not outlive its channel"


@pytest.mark.parametrize("act", ["receive", "post", "pack"])
def test_a_peer_that_is_gone_ends_every_wait(act: str) -> None:
    lower, upper = pair(1)
    send(lower, 0, row(5, 0))
    waits = threading.Event()

    acts: dict[str, Callable[[], Any]] = {
        "receive": lambda: take(lower, 0),
        "post": lambda: send(lower, 1, row(5, 1)),
        "pack": lambda: lower.pack(activation(1), Message(row(5000, 1))) and take(lower, 0),
    }

    def wait() -> None:
        waits.set()
        with pytest.raises(ConnectionError) as gone:
            acts[act]()
        assert raised(0, gone.value, Progress().read()).echo, "taken for the cause"

    with beside(wait):
        waits.wait(20)
        upper.connection.close()


def test_a_record_may_come_in_parts() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel, record = SharedChannel(1, 2, near), RECORD.pack(SlotEvent.TAKEN, 0, 0)
    with far:
        for part in (record[:7], record[7:] + record[:3], record[3:]):
            far.sendall(part)
            channel._read()
    assert channel.credits == 2 + 2
    near.close()
