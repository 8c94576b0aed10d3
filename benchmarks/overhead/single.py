"""Compares one stage with a loop written by hand, on real work: ResNet-20, batch 128, interleaved rounds in one process.

    python benchmarks/overhead/single.py --rounds 20 --out benchmarks/overhead

Both train the same network on the same batches with the same optimizer, in a process set up like that of a stage. The ratio of their times
is taken round by round; the interval is Student's, 95 %, of its mean.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from delock.engine.engine import Engine
from delock.engine.feed import Feed
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.links.mailbox import Mailbox
from delock.methods import BP
from delock.nets import build
from delock.plan import unroll
from delock.stage import Stage

BATCH, BATCHES = 128, 6
SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)
STUDENT = {14: 2.145, 19: 2.093, 29: 2.045}  # 97.5 % quantile by degrees of freedom


class Same:
    """Loads batches that are ready."""

    def __init__(self) -> None:
        self.made = [(torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))) for _ in range(BATCHES)]

    def __len__(self) -> int:
        return BATCHES

    def sizes(self) -> list[int]:
        """Returns the rows of every batch."""
        return [BATCH] * BATCHES

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the same batches in every epoch."""
        return iter(self.made)


def network() -> nn.Module:
    """Returns ResNet-20, always with the same weights."""
    return build("resnet20", classes=10, in_channels=3, image_size=32)


def ratios(rank: Rank, rounds: int) -> list[float]:
    """Returns the seconds of one stage divided by those of the loop, round by round; they take turns in being first."""
    data, model = Same(), network().train()
    optimizer = SGD(model.parameters())
    stage = Stage(network(), 0, 1, optimizer=SGD, loss=cross_entropy)
    engine = Engine(stage, Mailbox().end(0), feed=Feed(data, None, 1, torch.device("cpu")))
    plan = unroll(BP(), 1, BATCHES * (rounds + 1)).columns[0]
    steps = iter(plan)

    def loop() -> float:
        begun = perf_counter()
        for x, y in data.epoch(0):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            loss.item()
        return perf_counter() - begun

    def ours() -> float:
        begun = perf_counter()
        for _ in range(3 * BATCHES):
            engine.execute(next(steps))
        return perf_counter() - begun

    loop(), ours()
    found = []
    for i in range(rounds):
        first, second = (loop, ours) if i % 2 else (ours, loop)
        a, b = first(), second()
        found.append(b / a if i % 2 else a / b)
    return found


def main() -> None:
    """Writes one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, choices=[n + 1 for n in STUDENT], default=20)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    found = run_processes(ratios, [options.rounds])[0]
    middle = statistics.mean(found)
    half = STUDENT[options.rounds - 1] * statistics.stdev(found) / math.sqrt(len(found))
    line = f"one stage over the hand-written loop: {middle:.3f} (95 %: {middle - half:.3f} .. {middle + half:.3f}), {options.rounds} rounds"
    (options.out / "single.md").write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
