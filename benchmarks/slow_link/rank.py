"""Runs one of the two ranks of a run over the slow link; benchmarks/slow_link/run.py starts it with torchrun's variables set."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import delock
from delock.data import load
from delock.nets import build

BATCH, CUT, WARM = 128, "layer2", 6  # steps before the clock starts


def main(method: str, codec: str, error_codec: str, batches: int, out: Path) -> None:
    """Trains; rank 0 writes seconds per batch, each stage's seconds of work per batch, and bytes per batch and direction."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    data = load("synthetic", batch_size=BATCH)
    model = build("resnet20", classes=10, in_channels=3, image_size=32, seed=0)
    marks: list[Any] = []
    result = delock.fit(
        model,
        data.train,
        loss=cross_entropy,
        method=method,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        cuts=[CUT],
        batches=batches,
        compression=delock.Compression(codec, error_codec),
        report=delock.Report(log_every=WARM),
        callbacks=[lambda event: marks.append(event) if isinstance(event, delock.records.StepRecord) else None],
    )
    if os.environ["RANK"] != "0":
        return
    first, last = marks[0], marks[-1]
    reported = {
        "seconds": (last.seconds - first.seconds) / (last.batches - first.batches),
        "forward": [stage.forward / batches for stage in result.stages],
        "backward": [(stage.backward + stage.update) / batches for stage in result.stages],
        "up": result.stages[0].sent_up.total / batches,
        "down": result.stages[1].sent_down.total / batches,
    }
    out.write_text(json.dumps(reported))


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), Path(sys.argv[5]))
