"""Measures the seconds per step of N-wise learning beside the prediction, on four equal stages of real convolutions in four processes.

    python benchmarks/interlocking/periods.py --out benchmarks/interlocking

So that four stages run on fewer cores, waiting makes every convolution long: UNIT seconds in its forward, UNIT for its input gradient, UNIT
for its weight gradient. Messages, graphs, optimizer and engine are real.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cross_entropy

from delock.data import as_loader
from delock.draw import gantt
from delock.launch.processes import run_processes
from delock.methods import BP, Interlocking, Method
from delock.ops import Backward, Update
from delock.options import Placement, Report
from delock.plan import RunLength, unroll
from delock.run.job import StageJob
from delock.run.ranks import run_rank
from delock.timeline import Costs, Timeline, period, simulate

K, LAYERS, CHANNELS, BATCH, STEPS = 4, 4, 16, 16, 24
UNIT = 0.02  # seconds


class Wait(torch.autograd.Function):
    """Computes the identity, with a wait in the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Returns x itself."""
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        """Returns the error, UNIT seconds later."""
        time.sleep(UNIT)
        return d


class LongConv(nn.Module):
    """Computes Conv3x3 and ReLU as a slower machine would: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(CHANNELS, CHANNELS, 3, 3))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Returns relu(w * x), after UNIT seconds; both factors wait when their gradients are computed."""
        time.sleep(UNIT)
        return torch.relu(conv2d(Wait.apply(x), Wait.apply(self.weight), padding=1))


def head() -> nn.Module:
    """Returns a head (B, C, H, W) -> (B, 10) that costs almost nothing."""
    return nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(1), fc=nn.Linear(CHANNELS, 10)))


def jobs(method: Method) -> list[StageJob]:
    """Returns the jobs of four stages of LAYERS convolutions; the last has the network's own head."""
    torch.manual_seed(0)
    pictures = [(torch.randn(BATCH, CHANNELS, 8, 8), torch.randint(10, (BATCH,))) for _ in range(STEPS)]
    stages = [nn.Sequential(*(LongConv() for _ in range(LAYERS)), *((head(),) if k == K - 1 else ())) for k in range(K)]
    return [
        StageJob(
            k=k,
            K=K,
            module=stage,
            names={},
            method=method,
            length=RunLength(STEPS),
            per_epoch=STEPS,
            optimizer=partial(torch.optim.SGD, lr=0.01),
            schedule=None,
            loss=cross_entropy,
            metrics={},
            seed=0,
            train=as_loader(pictures) if k == 0 else None,
            head=head() if k in method.headed(K) else None,
            placement=Placement(link="gloo"),
            report=Report(trace=True),
        )
        for k, stage in enumerate(stages)
    ]


def measured(method: Method) -> Timeline:
    """Returns the timeline of four processes."""
    return Timeline(tuple(tuple(result.spans) for result in run_processes(run_rank, jobs(method), threads=1, pin=False)))


def per_step(timeline: Timeline) -> float:
    """Returns the median seconds between two updates of the last stage, once the pipeline is warm."""
    ends = [span.end for span in timeline.columns[-1] if isinstance(span.op, Update)][K:]
    return statistics.median(b - a for a, b in pairwise(ends))


def ahead(timeline: Timeline) -> str:
    """Counts the weight gradients computed after their error was sent, and those still under way when stage k - 1 took the error."""
    taken = {(b.stage, b.op.batch, b.op.loss): b.start for column in timeline.columns for b in column if isinstance(b.op, Backward)}
    halves = [b for column in timeline.columns for b in column if isinstance(b.op, Backward) and b.op.part == "weights"]
    under_way = [taken[b.stage - 1, b.op.batch, b.op.loss] < b.end for b in halves if isinstance(b.op, Backward)]
    return f"{sum(under_way)} of {len(halves)}" if halves else "-"


def main() -> None:
    """Writes a row per method, and draws the timelines of N = 3."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    stage = LAYERS * UNIT
    costs = Costs(forward=(stage,) * K, backward=(2 * stage,) * K)
    early = [(f"{n}, early", Interlocking(n), f"2(N-1) + 3 = {2 * n + 1}") for n in (1, 2, 3, 4)]
    late = [(f"{n}, late", Interlocking(n, send="late"), f"3N = {3 * n}") for n in (1, 2, 3, 4)]
    lines = [
        "| N, errors sent | formula (units) | predicted (ms) | measured (ms) | measured / predicted | errors ahead of weight gradients |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for name, method, formula in [*early, *late, ("backpropagation", BP(), f"3K = {3 * K}")]:
        forecast, got = simulate(unroll(method, K, STEPS), costs), measured(method)
        due, took = period(forecast), per_step(got)
        lines.append(f"| {name} | {formula} | {1e3 * due:.0f} | {1e3 * took:.0f} | {took / due:.3f} | {ahead(got)} |")
        print(lines[-1], flush=True)
        if method == Interlocking(3):
            gantt({"predicted": forecast, "measured": got}, out / "periods", window=(0.0, 4 * due))
    (out / "periods.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
