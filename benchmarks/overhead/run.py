"""Measures the time that the engine adds to an op, and a link to a message, above the same bare torch calls, on Linear(4, 4).

    python benchmarks/overhead/run.py --out benchmarks/overhead

Ops: one stage in one process runs interleaved rounds of a bare loop (forward, autograd.grad, optimizer step on the same tensors) and of the
engine on a plan of backpropagation; numbers are medians per op. Messages: two processes send a tensor of 64 KB, 1 MB and 8 MB to and fro,
by the two kinds of link, and by bare gloo isend and irecv of the same bytes into a buffer posted ahead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from delock.engine.engine import Engine
from delock.engine.feed import Feed
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links import Link, Message, MessageKind, MessageName
from delock.links.connect import connect
from delock.links.mailbox import Mailbox
from delock.methods import BP
from delock.plan import unroll
from delock.stage import Stage

BATCHES, ROUNDS = 300, 15
SIZES = {64 << 10: 400, 1 << 20: 200, 8 << 20: 50}  # bytes of a tensor -> messages there and back in a round
KINDS: tuple[Literal["gloo", "shared"], ...] = ("gloo", "shared")
SGD = partial(torch.optim.SGD, lr=0.01)


class Same:
    """Loads batches that are ready: the cost of a data set is not the cost of the engine."""

    def __init__(self, made: list[tuple[Tensor, Tensor]]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def sizes(self) -> list[int]:
        """Returns the rows of every batch."""
        return [len(x) for x, _ in self.made]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same batches in every epoch."""
        return iter(self.made)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Returns tiny batches."""
    return [(torch.randn(4, 4), torch.randn(4, 4)) for _ in range(BATCHES)]


def bare(made: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the seconds per batch of forward, backward and update written by hand."""
    module = nn.Linear(4, 4)
    optimizer, weights = SGD(module.parameters()), list(module.parameters())
    begun = perf_counter()
    for x, y in made:
        loss = mse_loss(module(x), y)
        for w, g in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.grad = g
        optimizer.step()
        loss.item()
    return (perf_counter() - begun) / len(made)


def engine(made: list[tuple[Tensor, Tensor]]) -> float:
    """Returns the seconds per batch of the same three ops by the engine; the plan is made before."""
    stage = Stage(nn.Linear(4, 4), 0, 1, optimizer=SGD, loss=mse_loss)
    plan = unroll(BP(), 1, len(made))
    worker = Engine(stage, Mailbox().end(0), feed=Feed(Same(made), None, 1, torch.device("cpu")))
    begun = perf_counter()
    worker.run(plan)
    return (perf_counter() - begun) / len(made)


def rounds(*ways: Callable[[], float]) -> list[float]:
    """Returns the median of each, over interleaved rounds."""
    found = [[way() for way in ways] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*found, strict=True)]


def to_and_fro(rank: Rank, payload: None) -> list[list[float]]:
    """Returns the seconds per message for each of SIZES, by bare gloo and by each of KINDS: medians of interleaved rounds."""
    torch.set_num_threads(1)
    peer = 1 - rank.rank
    rank.open_group()
    links = [connect(kind, {peer: 2}, rank) for kind in KINDS]
    found = []
    for size, count in SIZES.items():
        tensor = torch.randn(size // 4)
        ways = [partial(by_gloo, rank.rank, tensor, count), *(partial(by_link, link, rank.rank, tensor, count) for link in links)]
        for way in ways:
            way()  # the first messages of a size take several frames, or make slots
        found.append(rounds(*ways))
    for link in links:
        link.close()
    return found


def by_link(link: Link, rank: int, tensor: Tensor, count: int) -> float:
    """Sends a message there and one back, `count` times."""
    peer, message = 1 - rank, Message(tensor)
    dist.barrier()
    begun = perf_counter()
    for i in range(count):
        if rank == 0:
            link.send(peer, MessageName(MessageKind.ACTIVATION, i), message)
            link.receive(peer, MessageName(MessageKind.ERROR, i))
        else:
            link.receive(peer, MessageName(MessageKind.ACTIVATION, i))
            link.send(peer, MessageName(MessageKind.ERROR, i), message)
    return (perf_counter() - begun) / (2 * count)


def by_gloo(rank: int, tensor: Tensor, count: int) -> float:
    """Does the same with bare isend and irecv, each receive posted ahead into the same buffer."""
    peer, posted = 1 - rank, torch.empty_like(tensor)
    work = dist.irecv(posted, peer, tag=9)
    dist.barrier()
    begun = perf_counter()
    for i in range(count):
        if rank == 0:
            sent = dist.isend(tensor, peer, tag=9)
        work.wait()
        if i + 1 < count:
            work = dist.irecv(posted, peer, tag=9)
        if rank == 1:
            sent = dist.isend(tensor, peer, tag=9)
        sent.wait()
    return (perf_counter() - begun) / (2 * count)


def main() -> None:
    """Writes a row for an op, and one for each size of message and kind of link."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    made = batches()
    bare(made), engine(made)
    lines = ["| | bare torch (µs) | Delock (µs) | more (µs) |", "|---|---:|---:|---:|"]
    plain, ours = (1e6 * seconds / 3 for seconds in rounds(partial(bare, made), partial(engine, made)))
    lines.append(f"| an op, Linear(4, 4) | {plain:.0f} | {ours:.0f} | {ours - plain:.0f} |")
    for size, (bare_gloo, *links) in zip(SIZES, run_processes(to_and_fro, [None, None])[0], strict=True):
        for kind, link in zip(KINDS, links, strict=True):
            what = f"a message of {size >> 10:,} KB, link {kind}"
            lines.append(f"| {what} | {1e6 * bare_gloo:.0f} | {1e6 * link:.0f} | {1e6 * (link - bare_gloo):.0f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
