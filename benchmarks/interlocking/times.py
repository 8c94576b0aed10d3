"""Measures the time per step of N-wise learning on the two networks of README.md, in four processes, beside the prediction.

    python benchmarks/interlocking/times.py $DELOCK_DATA --out benchmarks/interlocking

The prediction is the schedule on the clock, with the costs of layers and heads measured before the run, if every stage has a core of its
own. With fewer cores than stages, a step takes at least the work of all stages divided by the number of cores. The measurement is the
median over the run.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

import delock
from delock.data import Loader, load, load_text
from delock.nets import build, gpt, nats
from delock.records import Event, Started, StepRecord
from delock.stage import Loss

STEPS, WARM, K = 48, 16, 4


def row(name: str, n: int, model: torch.nn.Module, data: Loader, cuts: list[int | str], head: str, loss: Loss) -> str:
    """Runs STEPS batches and returns times in milliseconds."""
    reported: list[Event] = []
    delock.fit(
        model,
        data,
        loss=loss,
        method=delock.Interlocking(n),
        optimizer=partial(torch.optim.SGD, lr=0.01),
        cuts=cuts,
        batches=STEPS,
        heads=head if n < K else None,
        report=delock.Report(log_every=1),
        callbacks=[reported.append],
    )
    [started] = [event for event in reported if isinstance(event, Started)]
    ends = [event.seconds for event in reported if isinstance(event, StepRecord)][WARM:]
    cores = min(K, len(os.sched_getaffinity(0)))
    work = sum(stage.forward + stage.backward for stage in started.stages)
    predicted = next(data.epoch(0))[0].shape[0] / started.samples_per_second
    measured = statistics.median(b - a for a, b in pairwise(ends))
    cells = (predicted, max(predicted, work / cores), measured)
    return f"| {name} | {n} | " + " | ".join(f"{1000 * cell:.0f}" for cell in cells) + " |"


def main() -> None:
    """Writes a row per network and N."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    images = load("folder", data_dir=options.data, batch_size=128, limit=128 * STEPS).train
    text = load_text(options.data / "tinyshakespeare.txt", context=64, batch_size=16)
    lines = ["| work | N | predicted, 4 workers (ms) | bound, these cores (ms) | measured (ms) |", "|---|---:|---:|---:|---:|"]
    for n in range(1, K + 1):
        model = build("resnet32-half", classes=10, in_channels=3, image_size=32)
        lines.append(row("ResNet-32", n, model, images, [6, 9, 13], "mlp-sr", cross_entropy))
        print(lines[-1], flush=True)
    for n in range(1, K + 1):
        network = gpt(text.vocabulary, depth=4, width=128, heads=4, context=64)
        lines.append(row("GPT", n, network, text.train, [2, 3, 4], "transformer", nats))
        print(lines[-1], flush=True)
    (options.out / "times.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
