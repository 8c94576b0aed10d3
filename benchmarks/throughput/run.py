"""Samples per second on the same work: plain PyTorch beside two stages in two processes, interleaved rounds in one run.

    python benchmarks/throughput/run.py $DELOCK_DATA --rounds 5 --out benchmarks/throughput

Every contender trains ResNet-20 on the same augmented batches with SGD; the rate is taken between batch WARM and the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import time
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import delock
from delock.data import Data, load
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.nets import build
from delock.records import Event, StepRecord

WARM, STEPS, BATCH = 8, 40, 128
SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4)


def plain(rank: Rank, data: Data) -> float:
    """The loop that everybody writes."""
    model = build("resnet20", classes=data.classes, in_channels=data.channels, image_size=data.image_size).train()
    optimizer = SGD(model.parameters())
    begun = 0.0
    for step, (x, y) in enumerate(data.train.epoch(0)):
        if step == WARM:
            begun = time.perf_counter()
        if step == STEPS:
            break
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    return (STEPS - WARM) * BATCH / (time.perf_counter() - begun)


def plain_in_process(data: Data, threads: int) -> float:
    """In a process of its own, set up like a stage: same allocator, threads and pinning."""
    return run_processes(plain, [data], threads=threads)[0]


def stages(data: Data, method: delock.Method, cuts: list[int | str] | None) -> float:
    """Two stages, a process with one thread each."""
    marks: list[StepRecord] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepRecord):
            marks.append(event)

    model = build("resnet20", classes=data.classes, in_channels=data.channels, image_size=data.image_size)
    delock.fit(model, data.train, loss=cross_entropy, method=method, optimizer=SGD, cuts=cuts, steps=STEPS, log_every=WARM, on_event=hear)
    first, last = marks[0], marks[-1]
    return (last.samples - first.samples) / (last.seconds - first.seconds)


def main() -> None:
    """Run the rounds, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir", help="CIFAR-10 as an image folder: train/<class>/*.jpg, test/<class>/*.jpg")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cuts", nargs="*", default=None)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    data = load("folder", data_dir=options.data_dir, batch_size=BATCH)
    methods = [delock.BP(), delock.OneFOneB(4), delock.DDG(), delock.FDG(), delock.DSP()]
    contenders = {
        "plain, 1 thread": lambda: plain_in_process(data, 1),
        "plain, 2 threads": lambda: plain_in_process(data, 2),
        **{f"{method.name}, 2 stages": functools.partial(stages, data, method, options.cuts) for method in methods},
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(options.rounds):
        for name, measure in contenders.items():
            rates[name].append(measure())
            print(f"round {number + 1}  {name:18s} {rates[name][-1]:8.0f} samples/s", flush=True)
    table = report(rates)
    print(table)
    if options.out:
        (options.out / "table.md").write_text(table)
        (options.out / "rates.json").write_text(json.dumps(rates, indent=1))


def report(rates: dict[str, list[float]]) -> str:
    """A GitHub table: medians, ranges, and the median of the ratios to plain PyTorch with one thread, round by round."""
    base = rates["plain, 1 thread"]
    lines = ["| contender | samples/s | range | x plain, 1 thread |", "|---|---|---|---|"]
    for name, found in rates.items():
        ratio = statistics.median(a / b for a, b in zip(found, base, strict=True))
        lines.append(f"| {name} | {statistics.median(found):.0f} | {min(found):.0f} .. {max(found):.0f} | {ratio:.2f} |")
    where = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, Python {platform.python_version()}"
    return "\n".join(lines) + f"\n\nResNet-20, batch {BATCH}, median of {len(base)} interleaved rounds of {STEPS - WARM} batches; {where}\n"


if __name__ == "__main__":
    main()
