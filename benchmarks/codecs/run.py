"""Measures accuracy against compression: DGL in three stages on CIFAR-10 with each codec, and product quantization up to 64 to 1.

    python benchmarks/codecs/run.py $DELOCK_DATA --jobs 2 --out benchmarks/codecs

The network is the six-layer one of the DGL papers at a quarter of its widths. It is cut in front of its pools, so that 32 channels at 32 x
32 and 64 at 16 x 16 travel; it trains on 12,500 images. Both ratios are of the bytes that were sent: before codebooks, and with them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch.nn.functional import cross_entropy

import delock
from delock.data import Data, load
from delock.nets import build
from delock.optim.rates import Schedule
from delock.recipes import accuracy
from delock.records import Traffic

IMAGES, BATCH = 12_500, 128
CODECS = ("none", "bf16", "int8", "vq:dim=2", "vq:dim=4", "vq:dim=8", "vq:dim=16")  # 256 codes of d float32 numbers: 4 d to 1
CUTS = ("pool1", "pool2")


@cache
def images(folder: str) -> Data:
    """Returns CIFAR-10, decoded once in each process."""
    return load("folder", data_dir=folder, batch_size=BATCH, test_batch_size=500, limit=IMAGES)


def train(folder: str, epochs: int, batches: int | None, work: tuple[str, int]) -> dict[str, Any]:
    """Trains with one (codec, seed)."""
    codec, seed = work
    data = images(folder)
    model = build("dgl-cnn6-quarter", classes=10, in_channels=3, image_size=32, seed=seed)
    length = batches or epochs * len(data.train)
    result = delock.fit(
        model,
        data.train,
        data.test,
        loss=cross_entropy,
        method="dgl",
        optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-4),
        schedule=Schedule("cosine", length, warmup=length // 10),
        cuts=CUTS,
        batches=length,
        eval_every=length,
        metrics={"accuracy": accuracy},
        heads="mlp",
        seed=seed,
        workers="inline",
        execution=delock.Execution(layout="channels-last"),
        compression=delock.Compression(codec),
    )
    sent = sum((report.sent_up for report in result.stages), Traffic())
    reached = result.evaluations[-1].metrics["accuracy"]
    print(f"{codec}, seed {seed}: {100 * reached:.2f} %, {sent.compression:.1f} : 1, {result.seconds:.0f} s", flush=True)
    return {
        "codec": codec,
        "seed": seed,
        "accuracy": reached,
        "compression": sent.compression,
        "compression_with_codebooks": sent.compression_with_codebooks,
        "sent": sent.total,
        "seconds": result.seconds,
    }


def table(rows: Sequence[dict[str, Any]], what: str) -> str:
    """Returns a row per codec: ratios, megabytes sent, and test accuracy, the mean over the seeds with the least and the largest."""
    lines = ["| codec | before codebooks | with codebooks | MB sent | test accuracy, % |", "|---|---:|---:|---:|---:|"]
    for codec in CODECS:
        own = [row for row in rows if row["codec"] == codec]
        reached = [100 * row["accuracy"] for row in own]
        span = f" ({min(reached):.1f} .. {max(reached):.1f})" if len(reached) > 1 else ""
        ratios = " | ".join(f"{own[0][name]:.1f}" for name in ("compression", "compression_with_codebooks"))
        lines.append(f"| `{codec}` | {ratios} | {own[0]['sent'] / 1e6:,.0f} | {mean(reached):.1f}{span} |")
    return "\n".join([*lines, "", what]) + "\n"


def figure(rows: Sequence[dict[str, Any]], stem: Path) -> None:
    """Draws accuracy against the ratio with codebooks: a dot per run, a line through the means."""
    drawn, axis = plt.subplots(figsize=(6, 3.6))
    places, means = [], []
    for codec in CODECS:
        own = [row for row in rows if row["codec"] == codec]
        places.append(mean(row["compression_with_codebooks"] for row in own))
        means.append(mean(100 * row["accuracy"] for row in own))
        axis.plot([places[-1]] * len(own), [100 * row["accuracy"] for row in own], "o", color="tab:blue", markersize=4)
        axis.annotate(codec, (places[-1], means[-1]), textcoords="offset points", xytext=(0, 8), ha="center", fontsize=8)
    axis.plot(places, means, color="tab:blue")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 2, 4, 8, 16, 32, 64], ["1", "2", "4", "8", "16", "32", "64"])
    axis.margins(y=0.2)
    axis.set_xlabel("raw bytes per byte sent, codebooks included")
    axis.set_ylabel("test accuracy (%)")
    drawn.tight_layout()
    for suffix in (".png", ".svg"):
        drawn.savefig(stem.with_suffix(suffix), dpi=120)


def main() -> None:
    """Runs everything, then writes the table and the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="CIFAR-10 as an image folder: train/<class>/*.jpg, test/<class>/*.jpg")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batches", type=int, default=None, help="batches, in place of epochs")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each codec")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    works = list(product(CODECS, range(options.seeds)))
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        rows = list(pool.map(partial(train, options.data, options.epochs, options.batches), works))
    length = f"{options.batches} batches" if options.batches else f"{options.epochs} epochs"
    what = f"DGL, K = 3, dgl-cnn6-quarter, {IMAGES:,} images of CIFAR-10, {length} of batch {BATCH}, {options.seeds} seed(s)."
    (options.out / "runs.json").write_text(json.dumps(rows, indent=1) + "\n")
    (options.out / "table.md").write_text(table(rows, what))
    figure(rows, options.out / "accuracy")
    print(table(rows, what))


if __name__ == "__main__":
    main()
