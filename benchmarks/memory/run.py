"""Measures the memory of every stage: predicted from plan and profile, allocated by torch, and resident in the stage's process.

    python benchmarks/memory/run.py --out benchmarks/memory

All numbers are peaks of bytes during a run, above those of the built stage before its first batch. Predicted from one batch before the
start: the bytes that will live at one time, and the growth of the process. Live: the bytes that torch's allocator has given out and not got
back, counted by torch's profiler. Resident: the growth of the process, with shared memory and without pages of program files, in a run
without a profiler, with the allocator that Delock has found on this system, and with glibc's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.profiler import ProfilerActivity, profile

import delock
from delock.draw.figure import BLUE, GREEN, GREY, ORANGE, new, save, style
from delock.launch import allocator
from delock.launch.processes import run_processes
from delock.launch.rank import Rank
from delock.methods import spelled
from delock.nets import build
from delock.nets.gpt import gpt, nats
from delock.run.job import StageJob
from delock.run.prepare import prepare
from delock.run.prepared import PreparedRun
from delock.run.ranks import joined, run_rank
from delock.run.request import Request
from delock.run.worker import Worker

METHODS: list[delock.Method] = [
    *(delock.BP(), delock.GPipe(4), delock.OneFOneB(4), delock.DDG(), delock.FR()),
    *(delock.FDG(), delock.FDG(at="mixed"), delock.FDG(order="backward-first"), delock.ADL(2), delock.DSP()),
    *(delock.DGL(), delock.Interlocking(2)),
]
STAGES = (2, 4)
NAMES = ("live", "resident", "resident, glibc")


@dataclass(frozen=True)
class Batches:
    """Loads random batches, each in memory of its own, as a data set makes them."""

    make: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    rows: int

    def __len__(self) -> int:
        return 100

    def sizes(self) -> list[int]:
        """Returns the rows of every batch."""
        return [self.rows]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields batches that differ from epoch to epoch."""
        generator = torch.Generator().manual_seed(e)
        for _ in range(len(self)):
            yield self.make(generator)


@dataclass(frozen=True)
class Work:
    """Holds a network with its data and its loss."""

    name: str
    network: Callable[[], nn.Module]
    data: Batches
    loss: Callable[[Any, Any], Tensor]


def images(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns images (rows, 3, 32, 32) and labels (rows,)."""
    return torch.randn(rows, 3, 32, 32, generator=generator), torch.randint(10, (rows,), generator=generator)


def text(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns tokens (rows, length), and the next of each."""
    tokens = torch.randint(96, (rows, length + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def works(scale: float) -> list[Work]:
    """Returns two networks with much memory in activations and in weights: above 500 MB in all with backpropagation and a scale of 1."""
    resnet = partial(build, "resnet56", classes=10, in_channels=3, image_size=32)
    big = partial(gpt, 96, depth=24, width=64 * round(8 * scale), heads=4, context=32)
    rows = 4 * round(21 * scale)
    return [
        Work("ResNet-56", resnet, Batches(partial(images, rows), rows), cross_entropy),
        Work("GPT", big, Batches(partial(text, 4, 32), 4), nats),
    ]


def request_of(work: Work, method: delock.Method, K: int, cuts: tuple[int, ...] | None) -> Request:
    """Returns the request that `fit` would make, for a run until the plan repeats itself and every link has been full."""
    optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    length, report = 2 * K + 3, delock.Report(log_every=1000)
    return Request(work.network(), work.data, None, work.loss, method, optimizer, stages=K, cuts=cuts, batches=length, report=report)


def live(rank: Rank, job: StageJob) -> int:
    """Trains stage job.k and returns the peak of bytes given out by torch's allocator, above those at the end of building."""
    link = joined(rank, job)
    worker = Worker(job, link, rank.device, rank.emit, rank.progress)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        worker.run()
    link.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return max(map(int, re.findall(r'"Total Allocated": (\d+)', path.read_text())))


def resident(rank: Rank, job: StageJob) -> int:
    """Trains stage job.k and returns the growth of the process, without pages of program files."""
    return run_rank(rank, job).report.memory_growth


def served(rank: Rank, payload: None) -> str:
    """Returns the allocator of a stage's process."""
    return allocator.in_use()


Cuts = dict[str, tuple[int, ...]]
"""The cuts of each work into each number of stages: the same in all runs."""


@dataclass(frozen=True)
class Cell:
    """Holds one stage of a run, in bytes."""

    work: str
    K: int
    method: str
    stage: int
    lives: int  # predicted
    grows: int
    live: int  # measured
    resident: int
    glibc: int


def runs_of(work: Work, K: int, cuts: Cuts) -> Iterator[tuple[str, PreparedRun]]:
    """Returns every method with its name, on the same cuts."""
    plain = prepare(request_of(work, METHODS[0], K, cuts.get(f"{work.name} {K}")))
    cuts[f"{work.name} {K}"] = plain.cuts
    for method in METHODS:
        request = request_of(work, method, K, plain.cuts)
        yield f"{work.name} {K} {spelled(method)}", prepare(request) if method.local_losses else replace(plain, request=request)


def grown(works: list[Work], cuts: Cuts) -> dict[str, list[int]]:
    """Returns the growth of every stage of every run."""
    runs = (run for work in works for K in STAGES for run in runs_of(work, K, cuts))
    return {name: run_processes(resident, prepared.jobs()) for name, prepared in runs}


def grown_with_glibc(scale: float, cuts: Cuts) -> dict[str, list[int]]:
    """Returns the same from a program whose stages start with the C library's own heap."""
    command = [sys.executable, __file__, "--scale", str(scale), "--cuts", json.dumps(cuts), "--out", os.devnull]
    done = subprocess.run(command, env={**os.environ, allocator.PRELOAD: ""}, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[int]] = json.loads(done.stdout)
    return found


def run(works: list[Work], scale: float) -> Iterator[list[Cell]]:
    """Makes every run for one line of the table."""
    cuts: Cuts = {}
    found: list[tuple[Work, int, str, str, list[int], list[int], list[int], list[int]]] = []
    for work in works:
        for K in STAGES:
            for name, prepared in runs_of(work, K, cuts):
                print(name, file=sys.stderr, flush=True)
                stages = prepared.started().stages
                predicted = [stage.live or 0 for stage in stages], [stage.memory or 0 for stage in stages]
                measured = run_processes(live, prepared.jobs()), run_processes(resident, prepared.jobs())
                found.append((work, K, name, spelled(prepared.request.method), *predicted, *measured))
    other = grown_with_glibc(scale, cuts)
    for work, K, name, method, *numbers in found:
        columns = enumerate(zip(*numbers, other[name], strict=True))
        yield [Cell(work.name, K, method, k, *five) for k, five in columns]


def row(own: list[Cell]) -> str:
    """Returns one line about the stages of a run: megabytes from stage 0 on, and the worst deviation of the prediction."""

    def each(values: list[int]) -> str:
        return " / ".join(f"{value / 1e6:.0f}" for value in values)

    predicted = [each([cell.lives for cell in own]), each([cell.grows for cell in own])]
    measured = []
    for pairs in measures(own).values():
        worst = max((expected / value - 1 for expected, value in pairs), key=abs)
        measured += [each([value for _, value in pairs]), f"{100 * worst:+.1f} %"]
    return f"| {' | '.join([own[0].work, str(own[0].K), own[0].method, *predicted, *measured])} |"


def table(rows: list[list[Cell]]) -> str:
    """Returns the table of all runs, with the worst and the median stage of each measure."""
    head = ["work", "K", "method", "will live, MB", "will grow by", *(cell for name in NAMES for cell in (name, "off"))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|", *map(row, rows)]
    every = [cell for own in rows for cell in own]
    for name, pairs in measures(every).items():
        off = sorted(abs(expected / value - 1) for expected, value in pairs)
        share = sum(one <= 0.1 for one in off) / len(off)
        median, most = 100 * off[len(off) // 2], 100 * off[-1]
        lines.append(f"\n{name}: within 10 % on {100 * share:.0f} % of {len(off)} stages, median {median:.1f} %, at most {most:.1f} % off")
    where = f"{os.cpu_count()} cores ({platform.machine()}), {' '.join(platform.libc_ver())}, torch {torch.__version__}"
    how = "off: the worst stage. SGD with momentum, shared memory between the stages, one thread per stage"
    [allocator] = run_processes(served, [None])
    return "\n".join(lines) + f"\n\nPer stage, from stage 0 on; {how}; resident: {allocator}; {where}\n"


def measures(every: list[Cell]) -> dict[str, list[tuple[int, int]]]:
    """Returns the three measured numbers of all stages, each after its prediction."""
    pairs = [((cell.lives, cell.live), (cell.grows, cell.resident), (cell.grows, cell.glibc)) for cell in every]
    return {name: [three[i] for three in pairs] for i, name in enumerate(NAMES)}


def draw(every: list[Cell], out: Path) -> None:
    """Draws measured over predicted bytes, a point per stage."""
    with style():
        figure = new(4.2, 3.8)
        axis = figure.subplots()
        for (name, pairs), colour in zip(reversed(measures(every).items()), (ORANGE, GREEN, BLUE), strict=True):
            xs, ys = [expected / 1e6 for expected, _ in pairs], [value / 1e6 for _, value in pairs]
            axis.plot(xs, ys, "o", color=colour, markersize=4, alpha=0.7, label=name)
        ends = [min(cell.lives for cell in every) / 1e6, max(cell.grows for cell in every) / 1e6]
        for factor, line in ((1.0, "-"), (1.1, ":"), (0.9, ":")):
            axis.plot(ends, [factor * end for end in ends], line, color=GREY, linewidth=0.8, label="± 10 %" if factor == 1.1 else None)
        axis.set(xscale="log", yscale="log", xlabel="predicted (MB)", ylabel="measured (MB)")
        axis.legend()
        save(figure, out / "memory")


def main() -> None:
    """Writes the table, the figure and every number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="of the batch of the images and the width of the GPT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cuts", type=json.loads, help=argparse.SUPPRESS)  # this program calls itself for another heap
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.cuts:
        print(json.dumps(grown(works(options.scale), options.cuts)))
        return
    rows = list(run(works(options.scale), options.scale))
    every = [cell for own in rows for cell in own]
    (options.out / "cells.json").write_text(json.dumps([asdict(cell) for cell in every], indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows))
    draw(every, options.out)
    print(table(rows))


if __name__ == "__main__":
    main()
