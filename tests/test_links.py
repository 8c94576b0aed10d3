"""Messages arrive as they were sent: over the mailbox of one process, over a wire that can be looked into, and between real processes."""

from __future__ import annotations

import math
import threading
from collections import deque, namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from delock.errors import LinkError, StageFailed, UsageError
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links import Link, Message
from delock.links.connect import LinkKind, connect
from delock.links.gloo import FIRST, DistributedChannel, Receiver, Sender
from delock.links.mailbox import Mailbox
from delock.links.nccl import Courier
from delock.links.rank_link import RankLink
from delock.links.wire import ALIGN, length_of, make_dense, pack, unpack

from harness import same_tree

CPU = torch.device("cpu")
DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
)

# -- messages as bytes -------------------------------------------------------------------------------------------------------------


def trip(message: Message, name: tuple[str, int, int] = ("h", 3, 0)) -> Message:
    """The message as it arrives."""
    packed, apart = pack(name, message)
    assert not apart
    assert length_of(packed) == len(packed)
    got, arrived = unpack(packed, CPU)
    assert got == name
    return arrived


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 5), (), (1,), (0,), (4, 0, 2), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape_arrives(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = numbers(*shape, dtype=dtype)
    arrived = trip(Message(x, numbers(7, dtype=dtype)))  # something behind it, so that its end counts
    for got, sent in ((arrived.values, x), (arrived.targets, numbers(7, dtype=dtype))):
        assert (got.dtype, got.shape) == (sent.dtype, sent.shape)
        assert torch.equal(got, sent)


def tensors() -> dict[str, Tensor]:
    """Tensors that lie in memory in their own ways."""
    x = numbers(4, 3, 6, 5)
    return {
        "contiguous": x,
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x[0, 0].t(),
        "permuted": x.permute(3, 1, 0, 2),
        "expanded": numbers(4, 1, 5).expand(4, 3, 5),
        "a row": x[1],
        "every other row": x[::2],
        "columns": x[..., 1:3],
        "one behind the first": torch.arange(65.0)[1:],
        "a single column": numbers(6, 5)[:, 2:3],
        "one sample, channels_last": x[:1].to(memory_format=torch.channels_last),
        "a scalar inside": numbers(9)[4],
        "conjugated": numbers(3, dtype=torch.complex64).mul(1j).conj(),
        "negated": torch._neg_view(numbers(3)),
        "with a graph": x.clone().requires_grad_() * 2,
    }


@pytest.mark.parametrize("how", tensors())
def test_tensors_arrive_dense_and_aligned_over_every_link(how: str) -> None:
    """The kernels that read them add in the same order in one process as in many."""
    x = tensors()[how]
    settled, arrived = make_dense(x), trip(Message((numbers(3), x))).values[1]
    for got in (settled, arrived):
        assert torch.equal(got, x)
        assert got.data_ptr() % ALIGN == 0
    assert settled.stride() == arrived.stride()
    dense = x.numel() == 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))  # no gaps, no overlaps
    assert arrived.stride() == (x.stride() if dense else torch.empty(x.shape).stride())
    if how in ("contiguous", "channels_last"):
        assert settled is x, "copied without need"
    assert not arrived.requires_grad


def test_any_tree_of_targets_arrives() -> None:
    targets = {
        "boxes": [numbers(2, 4), (), numbers(0, 4)],
        "pair": (numbers(3, dtype=torch.int64), {"weight": numbers(3), "nothing": None, "empty": {}}),
        "constants": [True, 1, -2.5, 'ünï{"', None, math.inf],
    }
    arrived = trip(Message((numbers(2), numbers(2, dtype=torch.int32)), targets, weight=1 / 3, samples=2**40), ("d", 2**40, 7))
    same_tree(arrived.targets, targets)
    assert isinstance(arrived.values, tuple)
    assert isinstance(arrived.targets["pair"], tuple)
    assert isinstance(arrived.targets["boxes"], list)
    assert arrived.targets["constants"][0] is True
    assert (arrived.weight, arrived.samples) == (1 / 3, 2**40)
    assert trip(Message(None)).values is None
    assert trip(Message(())).values == ()
    assert math.isnan(trip(Message(None, math.nan)).targets)


@pytest.mark.parametrize("targets", [{1: torch.ones(1)}, [{torch.ones(1)}], numbers(2).numpy(), object()], ids=lambda x: type(x).__name__)
def test_what_cannot_travel_is_refused(targets: Any) -> None:
    for send in (pack, Mailbox().end(0).send):
        with pytest.raises(UsageError, match="cannot travel between stages: use tensors in tuples, lists and dicts with string keys"):
            send(*(("h", 0, 0), Message(None, targets)) if send is pack else (1, ("h", 0, 0), Message(None, targets)))


def test_a_packed_message_is_a_copy() -> None:
    x = numbers(5)
    packed, _ = pack(("h", 0, 0), Message(x))
    x.zero_()
    assert torch.equal(unpack(packed, CPU)[1].values, numbers(5))


# -- the mailbox -------------------------------------------------------------------------------------------------------------------


def test_a_mailbox_keeps_order_and_directions_apart() -> None:
    box = Mailbox()
    ends = [box.end(k) for k in range(3)]
    for b in range(3):
        ends[1].send(0, ("d", b, 2), Message((numbers(b + 1),)))
        ends[1].send(2, ("h", b, 0), Message(numbers(b + 1)))
    assert [name for name, _ in ends[2].pull(1, 2)] == [("h", 0, 0), ("h", 1, 0)]
    check_pull_and_push(ends[2], 1, 3)
    assert [len(ends[0].receive(1, ("d", b, 2)).values[0]) for b in range(3)] == [1, 2, 3]
    ends[1].send(0, ("h", 7, 0), Message(None))
    with pytest.raises(LinkError):
        ends[0].receive(1, ("d", 7, 2))


def check_pull_and_push(link: Link, source: int, messages: int) -> None:
    """Of `messages` activations under way: what is pulled is still to come, what is pushed comes first."""
    pulled = link.pull(source, 2)
    assert [name for name, _ in pulled] == [("h", 0, 0), ("h", 1, 0)]
    link.receive(source, ("h", 0, 0))
    link.push(source, [(("h", 98, 0), Message(numbers(2))), (("h", 99, 0), Message(numbers(3)))])
    assert len(link.receive(source, ("h", 98, 0)).values) == 2
    assert len(link.receive(source, ("h", 99, 0)).values) == 3
    for b in range(1, messages):
        got = link.receive(source, ("h", b, 0))
        assert torch.equal(got.values, numbers(b + 1))
        assert b > 1 or torch.equal(got.values, pulled[1][1].values)


@pytest.mark.parametrize(
    ("got", "wanted", "says"),
    [
        (("h", 3, 0), ("d", 2, 1), "stage 4 sent the activation of batch 3 where the error under loss 1 of batch 2 was due"),
        (("e", 0, 0), ("h", 12, 0), "stage 4 sent evaluation batch 0 where the activation of batch 12 was due"),
    ],
)
def test_a_message_that_was_not_due_names_both(got: Any, wanted: Any, says: str) -> None:
    box = Mailbox()
    box.end(4).send(5, got, Message(None))
    with pytest.raises(LinkError, match=says):
        box.end(5).receive(4, wanted)


# -- frames over a wire that can be looked into --------------------------------------------------------------------------------------


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


@contextmanager
def beside(work: Callable[[], None]) -> Iterator[None]:
    """`work` in a thread of its own, which has ended, well, afterwards."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive(), "hangs"
    if errors:
        raise errors[0]


def payload(length: int, b: int) -> Tensor:
    return torch.randint(256, (length,), dtype=torch.uint8, generator=torch.Generator().manual_seed(b))


def packed(length: int, b: int = 0) -> Tensor:
    """Message b with `length` bytes in it."""
    return pack(("h", b, 0), Message(payload(length, b)))[0]


def holds(got: Tensor, length: int, b: int = 0) -> bool:
    """Whether it is `packed(length, b)`; what lies between a message's tensors says nothing."""
    name, message = unpack(got, CPU)
    return name == ("h", b, 0) and torch.equal(message.values, payload(length, b))


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


# -- between processes -------------------------------------------------------------------------------------------------------------


class AllApart(Courier):
    """Carries what a GPU's courier would, and the rest too."""

    def takes(self, leaf: Tensor) -> bool:
        return leaf.numel() > 0


def link_to(rank: Rank, depth: int = 2, kind: LinkKind = "gloo") -> RankLink:
    return connect(kind, {1 - rank.rank: depth}, CPU, rank.progress)


def link_apart(rank: Rank, depth: int) -> RankLink:
    peer = 1 - rank.rank
    return RankLink({peer: DistributedChannel(peer, depth, CPU, AllApart({peer: depth}, CPU, "gloo"))}, rank.progress)


SIZES = [1, 700, 10_000, 1, 0, 70_000, 20, 150_000, 70_000, 2]  # rows of four float32 numbers: up to 2.4 MB


def exchange(rank: Rank, sizes: list[int]) -> list[dict[str, bool]]:
    """Over one connection after the other: through the CPU, again, so that nothing may stray, with the tensors apart, in shared memory."""
    links: list[Callable[[], RankLink]] = [
        partial(link_to, rank),
        partial(link_to, rank, 3),
        partial(link_apart, rank, 2),
        partial(link_to, rank, 2, "shared"),
        partial(link_to, rank, 1, "shared"),
    ]
    return [messages(rank, link(), sizes) for link in links]


def messages(rank: Rank, link: Link, sizes: list[int]) -> dict[str, bool]:
    """Both send messages of changing size to each other and keep all they receive until the end."""
    peer = 1 - rank.rank
    got = []
    for b, size in enumerate(sizes):
        x = torch.full((4, size), float(b + 100 * rank.rank)).t()
        link.send(peer, ("h", b, 0), Message((x, torch.arange(b)), {"y": [x[:3], None]}, 0.5, b))
        got.append(link.receive(peer, ("h", b, 0)))
    link.close()
    values = [torch.equal(m.values[0], torch.full((n, 4), float(b + 100 * peer))) for b, (m, n) in enumerate(zip(got, sizes, strict=True))]
    rest = [torch.equal(m.values[1], torch.arange(b)) and (m.weight, m.samples) == (0.5, b) for b, m in enumerate(got)]
    labels = [torch.equal(m.targets["y"][0], m.values[0][:3]) and m.targets["y"][1] is None for m in got]
    strides = [m.values[0].stride() == make_dense(torch.empty(4, n).t()).stride() for m, n in zip(got, sizes, strict=True)]
    return {"values": all(values), "rest": all(rest), "labels": all(labels), "strides": all(strides)}


def test_messages_of_changing_size_between_processes() -> None:
    well = dict.fromkeys(("values", "rest", "labels", "strides"), True)
    assert run_processes(exchange, [SIZES] * 2, pin=False) == [[well] * 5] * 2


def run_ahead(rank: Rank, kind: LinkKind) -> Any:
    """Rank 0 sends n messages as fast as it may; rank 1 looks how far it has come before it takes any."""
    store, link, n = torch.distributed.distributed_c10d._get_default_store(), link_to(rank, 2 if kind == "gloo" else 4, kind), 40
    if rank.rank == 0:
        for b in range(n):
            link.send(1, ("h", b, 0), Message(numbers(b + 1)))
            store.set(f"sent {b}", "")
        link.close()
        return None
    store.wait(["sent 3"])
    stood = not store.check([f"sent {n - 1}"])
    check_pull_and_push(link, 0, n)
    link.close()
    return stood


@pytest.mark.parametrize("kind", ["gloo", "shared"])
def test_a_sender_waits_and_a_checkpoint_takes_what_is_under_way(kind: LinkKind) -> None:
    assert run_processes(run_ahead, [kind] * 2, pin=False) == [None, True]


def cross(rank: Rank, kind: LinkKind) -> None:
    link = link_to(rank, 2, kind)
    rank.progress.at("F2")
    link.send(1 - rank.rank, ("h", 3, 0), Message(numbers(2)))
    link.receive(1 - rank.rank, ("h", 3, 0) if rank.rank == 0 else ("d", 2, 1))
    link.receive(1 - rank.rank, ("h", 4, 0))  # rank 0 waits until rank 1 has failed


@pytest.mark.parametrize("kind", ["gloo", "shared"])
def test_a_wrong_message_between_processes_names_both(kind: LinkKind) -> None:
    says = r"(?s)^stage 1 failed in F2.*stage 0 sent the activation of batch 3 where the error under loss 1 of batch 2 was due"
    with pytest.raises(StageFailed, match=says):
        run_processes(cross, [kind] * 2, pin=False)


def test_a_named_tuple_is_refused_and_equal_constants_keep_their_types() -> None:
    with pytest.raises(UsageError, match="Point is a named tuple"):
        pack(("h", 0, 0), Message(torch.ones(1), namedtuple("Point", "x y")(torch.ones(1), torch.ones(1))))
    for constant in (1, 1.0, True, -0.0, 0.0, None, "1"):  # equal ones must not share a layout
        _, back = unpack(pack(("h", 0, 0), Message(torch.ones(1), (constant,)))[0], torch.device("cpu"))
        assert repr(back.targets[0]) == repr(constant)
