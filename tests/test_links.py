"""Messages arrive in order, and a wrong one is named: over the mailbox of one process, and between real processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from delock.errors import LinkError, StageFailed
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links import Link, Message
from delock.links.connect import connect
from delock.links.gloo import DistributedChannel
from delock.links.mailbox import Mailbox
from delock.links.nccl import Courier
from delock.links.rank_link import RankLink
from delock.links.wire import make_dense

from harness import for_one_link
from messages import CPU, activation, check_pull_and_push, error, evaluation, numbers

# -- the mailbox -------------------------------------------------------------------------------------------------------------------


def test_a_mailbox_keeps_order_and_directions_apart() -> None:
    box = Mailbox()
    ends = [box.end(k) for k in range(3)]
    for b in range(3):
        ends[1].send(0, error(b, 2), Message((numbers(b + 1),)))
        ends[1].send(2, activation(b), Message(numbers(b + 1)))
    assert [name for name, _ in ends[2].pull(1, 2)] == [activation(0), activation(1)]
    check_pull_and_push(ends[2], 1, 3)
    assert [len(ends[0].receive(1, error(b, 2)).values[0]) for b in range(3)] == [1, 2, 3]
    ends[1].send(0, activation(7), Message(None))
    with pytest.raises(LinkError):
        ends[0].receive(1, error(7, 2))


@pytest.mark.parametrize(
    ("got", "wanted", "says"),
    [
        (activation(3), error(2, 1), "stage 4 sent the activation of batch 3 where the error under loss 1 of batch 2 was due"),
        (evaluation(0), activation(12), "stage 4 sent evaluation batch 0 where the activation of batch 12 was due"),
    ],
)
def test_a_message_that_was_not_due_names_both(got: Any, wanted: Any, says: str) -> None:
    box = Mailbox()
    box.end(4).send(5, got, Message(None))
    with pytest.raises(LinkError, match=says):
        box.end(5).receive(4, wanted)


# -- between processes -------------------------------------------------------------------------------------------------------------


class AllApart(Courier):
    """Carries what a GPU's courier would, and the rest too."""

    def takes(self, leaf: Tensor) -> bool:
        return leaf.numel() > 0


def link_to(rank: Rank, depth: int = 2, kind: str = "gloo") -> RankLink:
    return connect(kind, {1 - rank.rank: depth}, for_one_link(rank))


def link_apart(rank: Rank, depth: int) -> RankLink:
    peer = 1 - rank.rank
    rank.open_group()
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
        link.send(peer, activation(b), Message((x, torch.arange(b)), {"y": [x[:3], None]}, 0.5, b))
        got.append(link.receive(peer, activation(b)))
    link.close()
    values = [torch.equal(m.values[0], torch.full((n, 4), float(b + 100 * peer))) for b, (m, n) in enumerate(zip(got, sizes, strict=True))]
    rest = [torch.equal(m.values[1], torch.arange(b)) and (m.weight, m.samples) == (0.5, b) for b, m in enumerate(got)]
    labels = [torch.equal(m.targets["y"][0], m.values[0][:3]) and m.targets["y"][1] is None for m in got]
    strides = [m.values[0].stride() == make_dense(torch.empty(4, n).t()).stride() for m, n in zip(got, sizes, strict=True)]
    return {"values": all(values), "rest": all(rest), "labels": all(labels), "strides": all(strides)}


def test_messages_of_changing_size_between_processes() -> None:
    well = dict.fromkeys(("values", "rest", "labels", "strides"), True)
    assert run_processes(exchange, [SIZES] * 2, pin=False) == [[well] * 5] * 2


def run_ahead(rank: Rank, kind: str) -> Any:
    """Rank 0 sends n messages as fast as it may; rank 1 looks how far it has come before it takes any."""
    rank.open_group()
    store, link, n = torch.distributed.distributed_c10d._get_default_store(), link_to(rank, 2 if kind == "gloo" else 4, kind), 40
    if rank.rank == 0:
        for b in range(n):
            link.send(1, activation(b), Message(numbers(b + 1)))
            store.set(f"sent {b}", "")
        link.close()
        return None
    store.wait(["sent 3"])
    stood = not store.check([f"sent {n - 1}"])
    check_pull_and_push(link, 0, n)
    link.close()
    return stood


@pytest.mark.parametrize("kind", ["gloo", "shared"])
def test_a_sender_waits_and_a_checkpoint_takes_what_is_under_way(kind: str) -> None:
    assert run_processes(run_ahead, [kind] * 2, pin=False) == [None, True]


def cross(rank: Rank, kind: str) -> None:
    link = link_to(rank, 2, kind)
    rank.progress.at("F2")
    link.send(1 - rank.rank, activation(3), Message(numbers(2)))
    link.receive(1 - rank.rank, activation(3) if rank.rank == 0 else error(2, 1))
    link.receive(1 - rank.rank, activation(4))  # rank 0 waits until rank 1 has failed


@pytest.mark.parametrize("kind", ["gloo", "shared"])
def test_a_wrong_message_between_processes_names_both(kind: str) -> None:
    says = r"(?s)^stage 1 failed in F2.*stage 0 sent the activation of batch 3 where the error under loss 1 of batch 2 was due"
    with pytest.raises(StageFailed, match=says):
        run_processes(cross, [kind] * 2, pin=False)
