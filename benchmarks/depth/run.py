"""Measures decoupled methods in 2 to 16 emulated stages: every stage waits 320 ms forward and 640 ms backward; messages of 1 MB are real.

    python benchmarks/depth/run.py --out benchmarks/depth

Every row is a method and a number of stages. It compares the time per batch in the steady state with the ideal, which is the computation of
one stage, and with the simulator, whose link delay is measured first. 1F1B in 8 micro-batches of the same batch is the usual alternative;
its bubble is (K-1)/(M+K-1).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.data import as_loader
from delock.methods import Method
from delock.plan import unroll
from delock.records import Event, StepRecord
from delock.timeline import Costs, Emulation, capacities, simulate, throughput

FORWARD, BACKWARD = 0.32, 0.64  # seconds
ROWS, FEATURES, MICRO = 128, 2048, 8  # a message of 128 x 2048 floats is 1 MB


def data(batches: int) -> Any:
    """Returns a loader that repeats one batch."""
    made: tuple[Tensor, Tensor] = torch.randn(ROWS, FEATURES), torch.randint(10, (ROWS,))
    return as_loader([made] * batches)


def measured(method: Method, K: int, emulate: Emulation, batches: int) -> float:
    """Returns the seconds per batch: the median over the steady half of the run."""
    ends: list[float] = []

    def hear(event: Event) -> None:
        if isinstance(event, StepRecord):
            ends.append(event.seconds)

    delock.fit(
        [nn.Linear(FEATURES, FEATURES) for _ in range(K - 1)] + [nn.Linear(FEATURES, 10)],
        data(batches),
        loss=cross_entropy,
        method=method,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        cuts=list(range(1, K)),
        batches=batches,
        placement=delock.Placement(pin=False),
        simulation=delock.Simulation(emulate=emulate),
        report=delock.Report(log_every=1),
        callbacks=[hear],
    )
    steady = ends[batches - 20 :]
    return (steady[-1] - steady[0]) / (len(steady) - 1)


def link_delay() -> float:
    """Returns the seconds over a link one way: half of a round trip of naive backpropagation over two stages that hardly compute."""
    tiny = Emulation(0.001, 0.001)
    return max(0.0, (measured(delock.BP(), 2, tiny, 60) - 2 * 0.002) / 2)


def simulated(method: Method, K: int, delay: float) -> float:
    """Returns the seconds per batch of the simulator, with that delay on every link."""
    share = 1 / method.micro_batches
    costs = Costs((share * FORWARD,) * K, (share * BACKWARD,) * K, up=(delay,) * (K - 1), down=(delay,) * (K - 1))
    plan = unroll(method, K, 2 * K + 36 + 4 * method.batches_per_update)
    return method.micro_batches / throughput(simulate(plan, replace(costs, capacity=capacities(method, K))))


def main() -> None:
    """Runs everything, then writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    delay = link_delay()
    print(f"a message of 1 MB takes {1000 * delay:.1f} ms", flush=True)
    rows = []
    for K in options.stages:
        methods: list[Method] = [delock.FDG(), delock.ADL(K), delock.DGL(), delock.DSP()]
        for method in [*methods, *([delock.OneFOneB(MICRO)] if K == 8 else [])]:
            replay = FORWARD if isinstance(method, delock.DSP) else 0.0
            bubble = (MICRO + K - 1) / MICRO if isinstance(method, delock.OneFOneB) else 1.0
            ideal = bubble * (FORWARD + BACKWARD + replay)
            took = measured(method, K, Emulation(FORWARD, BACKWARD), 2 * K + 24)
            forecast = simulated(method, K, delay)
            rows.append({"K": K, "method": method.name, "ideal": ideal, "measured": took, "simulated": forecast})
            print(rows[-1], flush=True)
    (options.out / "runs.json").write_text(json.dumps({"delay": delay, "rows": rows}) + "\n")
    (options.out / "table.md").write_text(table(rows))
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a row per run."""
    lines = ["| K | method | ideal (ms) | measured (ms) | ideal / measured | measured / simulated |", "|---:|---|---:|---:|---:|---:|"]
    for row in rows:
        times = f"{1e3 * row['ideal']:.0f} | {1e3 * row['measured']:.0f} | {row['ideal'] / row['measured']:.3f}"
        lines.append(f"| {row['K']} | {row['method']} | {times} | {row['measured'] / row['simulated']:.3f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
