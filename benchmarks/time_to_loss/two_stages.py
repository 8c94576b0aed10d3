"""Trains one of the two stages of a run on two cores, or over the limited link; run.py starts one per stage with torchrun's variables."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import delock
from delock.data import load_text
from delock.methods import Method, make
from delock.nets import gpt, nats
from delock.recipes import AdamW, muon, scadamw
from delock.records import StepRecord

OPTIMIZERS = {"muon": muon(lr=0.01), "adamw": AdamW(1e-3, 0.01), "scadamw": scadamw()}
DEPTH, WIDTH, CONTEXT, BATCH, WARM = 8, 64, 64, 16, 12  # the network of benchmarks/quality's set `quoted`; batches before the clock starts


def method_of(name: str, parts: int) -> Method:
    """Returns a method with that many parts in a batch; with "ahead" behind its name, its weights are drawn ahead."""
    base, _, ahead = name.partition(" ")
    return make(base, micro_batches=parts, **({"ahead": "part"} if ahead else {}))


def main(method: str, parts: int, optimizer: str, batches: int, out: Path) -> None:
    """Trains; rank 0 writes seconds per batch and each stage's seconds of work and of its optimizer per batch."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ["RANK"]) % len(cores)]})
    data = load_text(None, context=CONTEXT, batch_size=BATCH, batches_per_epoch=batches)
    marks: list[StepRecord] = []
    result = delock.fit(
        gpt(data.vocabulary, depth=DEPTH, width=WIDTH, context=CONTEXT, seed=0),
        data.train,
        loss=nats,
        method=method_of(method, parts),
        optimizer=OPTIMIZERS[optimizer],
        cuts=[f"block{DEPTH // 2}"],
        batches=batches,
        report=delock.Report(log_every=WARM),
        callbacks=[lambda event: marks.append(event) if isinstance(event, StepRecord) else None],
    )
    if os.environ["RANK"] != "0":
        return
    first, last = marks[0], marks[-1]
    work = {name: [getattr(stage, name) / batches for stage in result.stages] for name in ("forward", "backward", "update")}
    out.write_text(json.dumps({"seconds": (last.seconds - first.seconds) / (last.batches - first.batches), **work}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))
