"""Measures the accuracy of asynchronous DGL with one slow stage of six, early or late, with three buffer sizes.

    python benchmarks/slowdown/run.py $DELOCK_DATA --jobs 2 --out benchmarks/slowdown

Source of the study: Belilovsky et al., ICML 2020, here at a quarter of their widths, on 12,500 images. The order is drawn in one process
("sampled"): the slow stage acts with probability 1/S against 1. Every stage makes the same number of updates.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import delock
from delock.data import Data, load
from delock.methods import DGL, AsyncDGL
from delock.nets import build
from delock.optim.rates import Schedule
from delock.recipes import accuracy

IMAGES, BATCH, EPOCHS, SEEDS = 12_500, 128, 2, (0,)
SLOWDOWNS, STAGES, BUFFERS = (1.5, 2.0), (1, 4), (1, 5, 20)
CUTS = ("conv2", "pool1", "conv4", "pool2", "conv6")  # a convolution per stage, the pools in front of the wider ones


@cache
def images(folder: str) -> Data:
    """Returns CIFAR-10, decoded once in each process."""
    return load("folder", data_dir=folder, batch_size=BATCH, test_batch_size=500, limit=IMAGES)


def train(folder: str, work: tuple[float, int, int, int]) -> dict[str, Any]:
    """Makes one run of (S, slow stage, buffer, seed); buffer 0 stands for synchronous DGL."""
    slowdown, stage, buffer, seed = work
    data = images(folder)
    model = build("dgl-cnn6-quarter", classes=10, in_channels=3, image_size=32, seed=seed)
    method = AsyncDGL(buffer, order="sampled", slow_stage=stage, noise=1 - 1 / slowdown) if buffer else DGL()
    batches = EPOCHS * len(data.train)
    result = delock.fit(
        model,
        data.train,
        data.test,
        loss=cross_entropy,
        method=method,
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=Schedule("cosine", batches, warmup=batches // 10),
        cuts=CUTS,
        batches=batches,
        eval_every=batches,
        metrics={"accuracy": accuracy},
        heads="mlp",
        seed=seed,
        workers="inline",
        execution=delock.Execution(layout="channels-last"),
    )
    read = {k: report.visits_behind for k, report in enumerate(result.stages) if report.visits_behind}
    reached = result.evaluations[-1].metrics["accuracy"]
    print(f"S = {slowdown:g} at stage {stage}, buffer {buffer}: {100 * reached:.2f} %", flush=True)
    return {"S": slowdown, "stage": stage, "buffer": buffer, "seed": seed, "accuracy": reached, "behind": read}


def works() -> Iterator[tuple[float, int, int, int]]:
    """Returns all runs; without a slow stage its number does not matter."""
    for seed in SEEDS:
        yield 1.0, 0, 0, seed
        yield from ((1.0, 0, buffer, seed) for buffer in BUFFERS)
        yield from ((slowdown, stage, buffer, seed) for slowdown in SLOWDOWNS for stage in STAGES for buffer in BUFFERS)


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the test accuracy in per cent: a row per slow stage and S, a column per buffer size."""

    def cell(slowdown: float, stage: int, buffer: int) -> str:
        found = [100 * r["accuracy"] for r in rows if (r["S"], r["stage"], r["buffer"]) == (slowdown, stage, buffer)]
        return f"{sum(found) / len(found):.1f}" if found else "-"

    lines = ["| slow stage | S | " + " | ".join(f"buffer {buffer}" for buffer in BUFFERS) + " |", "|---|---:|" + "---:|" * len(BUFFERS)]
    lines.append("| none | 1 | " + " | ".join(cell(1.0, 0, buffer) for buffer in BUFFERS) + " |")
    for stage, slowdown in product(STAGES, SLOWDOWNS):
        lines.append(f"| {stage} | {slowdown:g} | " + " | ".join(cell(slowdown, stage, buffer) for buffer in BUFFERS) + " |")
    return "\n".join([*lines, "", f"Synchronous DGL, the same steps: {cell(1.0, 0, 0)} %."]) + "\n"


def figure(rows: list[dict[str, Any]], stem: Path) -> None:
    """Draws accuracy against S, a panel per slow stage, a line per buffer size."""
    drawn, axes = plt.subplots(1, len(STAGES), figsize=(8, 3.2), sharey=True)
    for axis, stage in zip(axes, STAGES, strict=True):
        for buffer in BUFFERS:
            own = sorted((r["S"], 100 * r["accuracy"]) for r in rows if r["buffer"] == buffer and (r["stage"] == stage or r["S"] == 1))
            axis.plot([s for s, _ in own], [a for _, a in own], marker="o", label=f"buffer {buffer}")
        axis.axhline(next(100 * r["accuracy"] for r in rows if not r["buffer"]), color="grey", linestyle=":", label="synchronous")
        axis.set_title(f"stage {stage} of 0 .. 5 slowed")
        axis.set_xlabel("S, how much slower it is")
    axes[0].set_ylabel("test accuracy (%)")
    axes[0].legend()
    drawn.tight_layout()
    for suffix in (".png", ".svg"):
        drawn.savefig(stem.with_suffix(suffix), dpi=120)


def main() -> None:
    """Runs everything, then writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(partial(train, options.data), works()))
    (options.out / "runs.json").write_text(json.dumps(rows) + "\n")
    (options.out / "table.md").write_text(table(rows))
    figure(rows, options.out / "accuracy")
    print(table(rows))


if __name__ == "__main__":
    main()
