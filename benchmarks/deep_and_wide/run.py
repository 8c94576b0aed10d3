"""Trains very deep and very wide networks: ResNet-1202 in four stages, WRN-28-10 in two, ten updates of every stage on one repeated batch.

    python benchmarks/deep_and_wide/run.py --out benchmarks/deep_and_wide

The last loss is that of a batch that every stage forwarded after at least ten updates. Memory is the peak of resident bytes of each stage's
process, in all, and above the built stage before its first batch.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import delock
from delock.nets import build

WORKS = [("resnet1202", 4, 1e-3), ("wrn-28-10", 2, 1e-2)]
METHODS: list[delock.Method] = [delock.FDG(), delock.DSP()]
UPDATES = 10


def row(name: str, K: int, lr: float, method: delock.Method, batch: int, size: int) -> str:
    """Trains one network with one method and returns a line of the table."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, size, size, generator=generator)
    y = torch.randint(10, (batch,), generator=generator)
    result = delock.fit(
        build(name, classes=10, in_channels=3, image_size=size),
        [(x, y)],
        loss=cross_entropy,
        method=method,
        stages=K,
        batches=UPDATES + method.delay(0, K) + 1,
        optimizer=functools.partial(torch.optim.SGD, lr=lr, momentum=0.9, weight_decay=5e-4),
        placement=delock.Placement(patience=600),
    )
    peaks = " / ".join(f"{stage.peak_memory / 2**20:.0f}" for stage in result.stages)
    growth = " / ".join(f"{stage.memory_growth / 2**20:.0f}" for stage in result.stages)
    first, last = result.losses[0], result.losses[-1]
    verdict = "falls" if last < first else "RISES"
    return f"| {name} | {K} | {method.name} | {lr:g} | {first:.3f} | {last:.3f} | {verdict} | {peaks} | {growth} | {result.seconds:.0f} |"


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=32, help="side of the images")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    heads = ["network", "K", "method", "lr", "first loss", "last loss", "", "peak MB per stage", "of it grown in training", "seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, K, lr in WORKS:
        for method in METHODS:
            lines.append(row(name, K, lr, method, options.batch, options.size))
            print(lines[-1], flush=True)
    where = f"one thread per stage, {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    table = "\n".join(lines) + f"\n\nBatch of {options.batch} random images {options.size} x {options.size}; {where}\n"
    if options.out:
        (options.out / "table.md").write_text(table)


if __name__ == "__main__":
    main()
