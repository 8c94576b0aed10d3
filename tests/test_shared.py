"""Shared memory between ranks of one host: what is received stays as it was, nothing waits for ever, and nothing is left behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import parent_process
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delock.api import fit
from delock.codecs import VQ
from delock.errors import StageFailed, UsageError
from delock.execution import Execution
from delock.launch.failure import raised
from delock.launch.processes import run_processes
from delock.launch.progress import Progress
from delock.launch.rank import Rank
from delock.links import Message, shared_memory
from delock.links import connect as connecting
from delock.links.connect import LinkKind, connect
from delock.links.gloo import DistributedChannel
from delock.links.shared_memory import RECORD, SharedChannel, SlotEvent
from delock.links.wire import ALIGN
from delock.methods import ADL, BP, DGL, DSP, FDG, Interlocking, Method, OneFOneB
from delock.run.job import StageJob, StageResult
from delock.run.ranks import run_rank
from test_links import DTYPES, beside, numbers, tensors, trip

from harness import CPU, assert_equal, in_processes, inline, jobs
from programs import torchrun
from workloads import Samples, class_loss, mlp, sgd

pytestmark = pytest.mark.skipif(connecting._host() is None, reason="no shared memory between processes here")


# -- a channel, both ends in this process ------------------------------------------------------------------------------------------


def pair(depth: int = 2) -> tuple[SharedChannel, SharedChannel]:
    a, b = socket.socketpair()
    return SharedChannel(1, depth, a), SharedChannel(0, depth, b)


def send(channel: SharedChannel, b: int, values: Any) -> float:
    return channel.post(channel.pack(("h", b, 0), Message(values))[0])


def take(channel: SharedChannel, b: int) -> Any:
    name, message = channel.receive()
    assert name == ("h", b, 0)
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
    lower.post(lower.pack(("h", 0, 0), Message(numbers(50), {"y": [torch.arange(9)]}))[0])
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
    now, hear = 0.0, SharedChannel._hear

    def late(channel: SharedChannel, flags: int = 0) -> None:
        nonlocal now
        if channel is lower and not lower.room and not flags:
            now += 2
            assert torch.equal(take(upper, taken := int(now / 2) - 1), row(5, taken))
        hear(channel, flags)

    monkeypatch.setattr(shared_memory, "perf_counter", lambda: now)
    monkeypatch.setattr(SharedChannel, "_hear", late)
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
        "pack": lambda: lower.pack(("h", 1, 0), Message(row(5000, 1))) and take(lower, 0),
    }

    def wait() -> None:
        waits.set()
        with pytest.raises(ConnectionError) as gone:
            acts[act]()
        assert raised(0, gone.value, Progress().read()).echo, "taken for the cause"

    with beside(wait):
        waits.wait(20)
        upper.connection.close()


# -- between processes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "K", "method"),
    [
        ("conv", 2, BP()),
        ("conv", 3, FDG(order="backward-first")),
        ("tuple", 3, FDG(at="mixed")),
        ("tuple", 3, ADL(accumulate=3)),
        ("tuple", 3, DSP(p=(2, 1), q=(1, 2))),
        ("conv", 3, DGL()),
        ("tuple", 4, Interlocking(n_wise=2)),
        ("conv", 3, Interlocking(n_wise=3, combine="sum", send="late")),
        ("conv", 3, OneFOneB(micro_batches=4)),
        ("mlp", 1, FDG()),
    ],
    ids=str,
)
def test_processes_equal_one_process(work: str, K: int, method: Method) -> None:
    assert_equal(in_processes(jobs(work, K, method, link="shared")), inline(jobs(work, K, method)))


def test_encoded_and_clipped_and_laid_out_as_in_one_process() -> None:
    """A codebook outlives its message, norms travel between activations, and strides stay."""

    def made(link: LinkKind) -> list[StageJob]:
        execution = Execution(channels_last=True)
        return [
            replace(job, codec=VQ(codes=16, dim=2, every=3), execution=execution, length=replace(job.length, clip=0.1), link=link)
            for job in jobs("conv", 2, BP(2), samples=48, epochs=3)
        ]

    assert_equal(in_processes(made("shared")), inline(made("gloo")))


def test_windows_and_long_runs() -> None:
    method = FDG(beta=0.5)
    assert_equal(
        in_processes(jobs("tuple", 3, method, samples=96, epochs=4, window=3, link="auto")),
        inline(jobs("tuple", 3, method, samples=96, epochs=4)),
    )


def places(rank: Rank, kind: LinkKind) -> dict[int, str]:
    """The channels of a rank of three, where rank 2 is on another host."""
    far_away(rank)
    link = connect(kind, {peer: 2 for peer in (rank.rank - 1, rank.rank + 1) if 0 <= peer < 3}, CPU, rank.progress)
    link.close()
    return {peer: type(channel).__name__ for peer, channel in link.channels.items()}


def far_away(rank: Rank) -> None:
    if rank.rank == 2:
        connecting._host = lambda: "another host"  # type: ignore[assignment]


def test_a_rank_may_have_a_neighbour_of_each_kind() -> None:
    near, far = SharedChannel.__name__, DistributedChannel.__name__
    assert run_processes(places, ["auto"] * 3, pin=False) == [{1: near}, {0: near, 2: far}, {1: far}]
    with pytest.raises(UsageError, match=r'link is "shared", but stages 1 and 2 are on different hosts: use link "auto"'):
        run_processes(places, ["shared"] * 3, pin=False)


def train_far_away(rank: Rank, job: StageJob) -> StageResult:
    far_away(rank)
    return run_rank(rank, job)


def test_training_over_both_kinds() -> None:
    method = ADL(2)
    got = run_processes(train_far_away, jobs("tuple", 3, method, link="auto"), pin=False, patience=60)
    assert_equal(got, inline(jobs("tuple", 3, method)))


SCRIPT = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from test_shared import trained

result, state = trained("shared")
if result is not None:
    torch.save((state, result.losses), sys.argv[1])
"""


def trained(link: LinkKind, **more: Any) -> Any:
    model, data = nn.Sequential(*mlp(5, torch.float32)), Samples("vector", 40, 8, torch.float32)
    return fit(model, data, data, loss=class_loss, method=FDG(), optimizer=sgd, cuts=[2], epochs=2, link=link, **more), model.state_dict()


def test_under_torchrun(tmp_path: Path) -> None:
    script, out = tmp_path / "script.py", tmp_path / "out.pt"
    script.write_text(SCRIPT)
    done = torchrun(script, str(out))
    assert done.returncode == 0, done.stderr
    state, losses = torch.load(out)
    result, expected = trained("gloo", workers="inline")
    assert losses == result.losses
    assert all(torch.equal(value, state[name]) for name, value in expected.items())


# -- ends --------------------------------------------------------------------------------------------------------------------------


class Look(nn.Module):
    """The identity, which looks in its sixth batch at what its process has mapped and open; then, if it is to, it is killed."""

    def __init__(self, out: str, kill: bool) -> None:
        super().__init__()
        self.out, self.kill, self.batch = out, kill, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batch += 1
        if self.batch == 6 and parent_process() is not None:
            Path(self.out).write_text(Path("/proc/self/maps").read_text() + "\n".join(map(target, Path("/proc/self/fd").iterdir())))
            if self.kill:
                os.kill(os.getpid(), signal.SIGKILL)
        return x


def target(descriptor: Path) -> str:
    try:
        return "open " + os.readlink(descriptor)
    except FileNotFoundError:  # that of the folder which is read
        return ""


@pytest.mark.parametrize("kill", [False, True])
def test_nothing_is_left_behind(tmp_path: Path, kill: bool) -> None:
    """Slots are memory without a name, which no program holds open: they are gone with the processes that use them."""
    before = set(Path("/dev/shm").iterdir())
    model = nn.Sequential(nn.Linear(12, 64), nn.Linear(64, 64), Look(str(tmp_path / "seen"), kill), nn.Linear(64, 10))
    data = Samples("vector", 120, 8, torch.float32)

    def run() -> None:
        fit(model, data, loss=class_loss, method="fdg", cuts=[2], optimizer=sgd, epochs=1, link="shared")

    if kill:
        with pytest.raises(StageFailed, match="stage 1 was killed by SIGKILL"):
            run()
    else:
        run()
    seen = (tmp_path / "seen").read_text()
    assert "/memfd:delock (deleted)" in seen
    assert not re.search(r"open .*memfd:delock", seen)
    assert not [line for line in seen.splitlines() if "/dev/shm/" in line and not line.endswith("(deleted)")]
    own = {path for path in set(Path("/dev/shm").iterdir()) - before if path.name.startswith(("delock", "psm", "torch"))}
    assert not own
    assert "delock" not in Path("/proc/self/maps").read_text().replace(str(Path(shared_memory.__file__).parents[1]), "")


def test_what_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="link is 'mail', but it must be one of auto, gloo, shared"):
        trained("mail")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='link is "shared", but tensors on cuda do not lie in memory that processes share'):
        connecting.refuse_link("shared", "cuda")
    monkeypatch.setattr(connecting, "_host", lambda: None)
    with pytest.raises(UsageError, match='link is "shared", but this system lacks'):
        trained("shared")


def test_a_record_may_come_in_parts() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    channel, record = SharedChannel(1, 2, near), RECORD.pack(SlotEvent.TAKEN, 0, 0)
    with far:
        for part in (record[:7], record[7:] + record[:3], record[3:]):
            far.sendall(part)
            channel._hear()
    assert channel.room == 2 + 2
    near.close()
