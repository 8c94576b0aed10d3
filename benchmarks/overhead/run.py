"""What the engine costs per op, and a link per message, above the same bare torch calls: the smallest stage there is, Linear(4, 4).

    python benchmarks/overhead/run.py --out benchmarks/overhead

Ops: one stage in one process, `repeats` interleaved rounds of a bare loop (forward, autograd.grad, optimizer step on the same tensors) and
of the engine on a plan of backpropagation; per op, medians. Messages: two processes, 64 KB to and fro, the link against bare gloo isend and
irecv of the same bytes into a buffer posted ahead.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from delock.engine import Engine
from delock.feed import Feed
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links.distributed import DistributedLink
from delock.links.mailbox import Mailbox
from delock.links.message import Message
from delock.methods import BP
from delock.plan import unroll
from delock.stage import Stage

BATCHES, ROUNDS, MESSAGES, FLOATS = 300, 15, 400, 16_384  # 64 KB
SGD = partial(torch.optim.SGD, lr=0.01)


class Same:
    """A loader that has its batches ready: what a data set costs is not the engine's."""

    def __init__(self, made: list[tuple[Tensor, Tensor]]) -> None:
        self.made = made

    def __len__(self) -> int:
        return len(self.made)

    def sizes(self) -> list[int]:
        """Rows of every batch."""
        return [len(x) for x, _ in self.made]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in every epoch."""
        return iter(self.made)


def batches() -> list[tuple[Tensor, Tensor]]:
    """Tiny ones."""
    return [(torch.randn(4, 4), torch.randn(4, 4)) for _ in range(BATCHES)]


def bare(made: list[tuple[Tensor, Tensor]]) -> float:
    """Seconds per batch of forward, backward and update as one writes them."""
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
    """Seconds per batch of the same three ops by the engine, the plan being there."""
    stage = Stage(nn.Linear(4, 4), 0, 1, optimizer=SGD, loss=mse_loss)
    plan = unroll(BP(), 1, len(made))
    worker = Engine(stage, Mailbox().end(0), feed=Feed(Same(made), None, 1, torch.device("cpu")))
    begun = perf_counter()
    worker.run(plan)
    return (perf_counter() - begun) / len(made)


def rounds(first: Callable[[], float], second: Callable[[], float]) -> tuple[float, float]:
    """Medians of both, interleaved."""
    pairs = [(first(), second()) for _ in range(ROUNDS)]
    one, other = zip(*pairs, strict=True)
    return statistics.median(one), statistics.median(other)


def to_and_fro(rank: Rank, payload: None) -> tuple[float, float]:
    """Seconds per message: bare gloo with receives posted ahead, and the link."""
    torch.set_num_threads(1)
    peer, tensor = 1 - rank.rank, torch.randn(FLOATS)
    link = DistributedLink({peer: 2}, torch.device("cpu"), rank.progress)

    def by_link() -> float:
        begun = perf_counter()
        for i in range(MESSAGES):
            if rank.rank == 0:
                link.send(peer, ("h", i, 0), Message(tensor))
                link.receive(peer, ("d", i, 0))
            else:
                link.receive(peer, ("h", i, 0))
                link.send(peer, ("d", i, 0), Message(tensor))
        return (perf_counter() - begun) / (2 * MESSAGES)

    def by_gloo() -> float:
        posted = torch.empty(FLOATS)
        work = dist.irecv(posted, peer, tag=9)
        dist.barrier()
        begun = perf_counter()
        for i in range(MESSAGES):
            if rank.rank == 0:
                sent = dist.isend(tensor, peer, tag=9)
            work.wait()
            if i + 1 < MESSAGES:
                work = dist.irecv(posted, peer, tag=9)
            if rank.rank == 1:
                sent = dist.isend(tensor, peer, tag=9)
            sent.wait()
        return (perf_counter() - begun) / (2 * MESSAGES)

    by_link()  # the first message of a size takes several frames
    found = rounds(by_gloo, by_link)
    link.close()
    return found


def main() -> None:
    """Two rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    made = batches()
    bare(made), engine(made)
    lines = ["| | bare torch (µs) | Delock (µs) | more (µs) |", "|---|---:|---:|---:|"]
    plain, ours = (1e6 * seconds / 3 for seconds in rounds(partial(bare, made), partial(engine, made)))
    lines.append(f"| an op, Linear(4, 4) | {plain:.0f} | {ours:.0f} | {ours - plain:.0f} |")
    gloo, link = (1e6 * seconds for seconds in run_processes(to_and_fro, [None, None])[0])
    lines.append(f"| a message of 64 KB, two processes | {gloo:.0f} | {link:.0f} | {link - gloo:.0f} |")
    (out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
