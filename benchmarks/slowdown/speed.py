"""Measures the updates per second of every stage when one is slow: synchronous and free-running DGL, six stages in six processes.

    python benchmarks/slowdown/speed.py --out benchmarks/slowdown

So that six stages run on fewer cores, a stage waits instead of computing: UNIT seconds forward and twice that backward, around real
messages, buffers, graphs and optimizers. Synchronous DGL has longer waits in the slow stage; free-running DGL slows it by its own option.
"""

from __future__ import annotations

import argparse
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from delock.data import as_loader
from delock.launch.processes import run_processes
from delock.methods import DGL, AsyncDGL, Method
from delock.nets.emulated import Emulated
from delock.ops import Update
from delock.options import Placement, Report
from delock.plan import RunLength
from delock.records import VisitsRecord
from delock.run.job import StageJob, StageResult
from delock.run.ranks import run_rank

K, FEATURES, BATCH, UPDATES, SLOW = 6, 1024, 128, 60, 2
UNIT = 0.01  # seconds
SLOWDOWNS = (1.0, 1.5, 2.0, 4.0)


def waiting(seconds: float) -> nn.Module:
    """Maps (B, FEATURES) to (B, FEATURES) in this number of seconds forward and twice that backward."""
    return Emulated((FEATURES,), seconds, 2 * seconds)


def jobs(method: Method, factor: float) -> list[StageJob]:
    """Returns the jobs of six stages; stage SLOW takes `factor` times as long."""
    torch.manual_seed(0)
    batches = [(torch.randn(BATCH, FEATURES), torch.randint(10, (BATCH,))) for _ in range(8)]
    stages = [nn.Sequential(waiting(UNIT * (factor if k == SLOW else 1)), *([nn.Linear(FEATURES, 10)] * (k == K - 1))) for k in range(K)]
    return [
        StageJob(
            k=k,
            K=K,
            module=stage,
            names={},
            method=method,
            length=RunLength(UPDATES),
            per_epoch=len(batches),
            optimizer=partial(torch.optim.SGD, lr=0.01),
            schedule=None,
            loss=cross_entropy,
            metrics={},
            seed=0,
            train=as_loader(batches) if k == 0 else None,
            head=nn.Linear(FEATURES, 10) if k < K - 1 else None,
            placement=Placement(link="gloo"),
            report=Report(trace=True),
        )
        for k, stage in enumerate(stages)
    ]


def rates(method: Method, factor: float) -> list[float]:
    """Returns the updates per second of each stage, medians over the run."""
    ends: list[list[float]] = [[] for _ in range(K)]

    def hear(rank: int, event: object) -> None:
        if isinstance(event, VisitsRecord):
            ends[rank] += [visit.end for visit in event.visits if visit.trains]

    results: list[StageResult] = run_processes(run_rank, jobs(method, factor), threads=1, pin=False, on_event=hear)
    for k, result in enumerate(results):
        ends[k] = ends[k] or [span.end for span in result.spans if isinstance(span.op, Update)]
    return [1 / statistics.median(b - a for a, b in pairwise(own[K:])) for own in ends]


def main() -> None:
    """Writes a row per S and engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    lines = ["| S of stage 2 | engine | " + " | ".join(f"stage {k}" for k in range(K)) + " |", "|---:|---|" + "---:|" * K]
    for slowdown in SLOWDOWNS:
        free = AsyncDGL(5, slow_stage=SLOW, noise=1 - 1 / slowdown)
        for name, found in (("synchronous", rates(DGL(), slowdown)), ("free-running", rates(free, 1.0))):
            lines.append(f"| {slowdown:g} | {name} | " + " | ".join(f"{rate:.1f}" for rate in found) + " |")
            print(lines[-1], flush=True)
    (out / "speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
