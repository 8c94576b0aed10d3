"""Measures what checkpoints cost a GPT of 100 million parameters in two stages: speed, time of the stages, memory, and bytes.

    python benchmarks/checkpoint/run.py --out benchmarks/checkpoint

The GPT has 14 blocks of width 768 and is trained by FDG with AdamW in two processes, on random tokens. In a round the same number of
batches, about five minutes of them, is trained without checkpoints, with one of them, and with five. Every run is noted in runs.json as it
ends, and one that is there is not made again. The newest checkpoint is written once more with nobody training, for the writer's own time.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import delock
from delock.checkpoints.directory import Writer, newest_first, read, read_tensors, verified
from delock.nets.gpt import gpt, nats
from delock.options import Checkpoint, Placement
from delock.recipes import AdamW
from delock.records import CheckpointRecord, Event

VOCABULARY, LENGTH, ROWS = 256, 64, 4
SETTINGS = {"none": 0, "one in five minutes": 1, "one a minute": 5}  # checkpoints in five minutes
TRIAL = 12  # batches
Runs = list[dict[str, Any]]


class Tokens:
    """Loads random tokens, (ROWS, LENGTH) int64, with the next ones as targets; the same in every epoch."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return self.batches

    def sizes(self) -> list[int]:
        """Returns the rows of every batch."""
        return [ROWS]

    def epoch(self, e: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields the batches."""
        draw = torch.Generator().manual_seed(0)
        for _ in range(self.batches):
            tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=draw)
            yield tokens[:, :-1], tokens[:, 1:]


def train(batches: int, checkpoints: int, folder: Path, size: dict[str, int]) -> dict[str, Any]:
    """Trains with that number of checkpoints, spread over the run, and returns what was measured."""
    told: list[Event] = []
    every = max(1, round(batches / (checkpoints + 0.5)))
    keeps = {"checkpoint": Checkpoint(folder, every=every)} if checkpoints else {}
    result = delock.fit(
        gpt(VOCABULARY, context=LENGTH, **size), Tokens(batches), None, loss=nats, optimizer=AdamW(lr=1e-4), method="fdg",
        cuts=[1 + size["depth"] // 2], epochs=1, placement=Placement(threads=1), callbacks=[told.append], **keeps,
    )  # fmt: skip
    written = [event for event in told if isinstance(event, CheckpointRecord)]
    if problems := [event.problem for event in written if event.problem]:
        raise RuntimeError(problems[0])
    return {
        "batches": batches,
        "seconds": result.seconds,
        "given up": [stage.saving / stage.seconds for stage in result.stages],
        "per checkpoint": [stage.saving / max(1, len(written)) for stage in result.stages],
        "memory": [stage.memory_growth for stage in result.stages],
        "predicted": [stage.memory or 0 for stage in result.started.stages],
        "checkpoints": len(written),
        "bytes": max((event.bytes for event in written), default=0),
        "until written": statistics.median([event.seconds for event in written] or [0.0]),
    }


def write_alone(folder: Path) -> dict[str, float]:
    """Writes a copy of the newest checkpoint's files with nobody training; returns seconds, and those of a processor."""
    newest = newest_first(folder)[0]
    K, again = verified(newest).K, folder / "again"
    loaded = [{kind: read(newest, kind, k) for kind in ("optimizer", "in-flight")} for k in range(K)]
    weights = [read_tensors(newest / f"weights-{k}.safetensors")[0] for k in range(K)]

    def write() -> None:
        for k in range(K):
            writer = Writer(again, 0, k, K)
            writer.begin()
            writer.add_tensors("weights", weights[k])
            for kind, tree in loaded[k].items():
                writer.add(kind, tree)

    found = [timed(write) for _ in range(3)]
    shutil.rmtree(again)
    return {"seconds": statistics.median(s for s, _ in found), "processor": statistics.median(cpu for _, cpu in found)}


def timed(work: Callable[[], None]) -> tuple[float, float]:
    """Returns the seconds of the work, and those of a processor."""
    began, busy = time.perf_counter(), time.thread_time()
    work()
    return time.perf_counter() - began, time.thread_time() - busy


def table(runs: Runs, alone: dict[str, float]) -> str:
    """Returns a row per setting: medians over the rounds."""
    of = {name: [run for run in runs if run["setting"] == name] for name in SETTINGS}
    speed = {(run["setting"], run["round"]): run["batches"] / run["seconds"] for run in runs}
    lines = [
        "| checkpoints | ms per batch | speed, share of none | a stage gives up | seconds per checkpoint | until written (s) | MB |"
        " stages grow by (MB) | predicted (MB) |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, own in of.items():
        ms = statistics.median(1000 * run["seconds"] / run["batches"] for run in own)
        ratio = statistics.median(speed[name, run["round"]] / speed["none", run["round"]] for run in own)
        given, each = (statistics.median(max(run[what]) for run in own) for what in ("given up", "per checkpoint"))
        written, size = (statistics.median(run[what] for run in own) for what in ("until written", "bytes"))
        grown, predicted = (megabytes([run[what] for run in own]) for what in ("memory", "predicted"))
        cells = f"{100 * given:.2f} % | {each:.2f} | {written:.1f} | {size / 1e6:,.0f}" if name != "none" else "- | - | - | -"
        lines.append(f"| {name} | {ms:.0f} | {ratio:.3f} | {cells} | {grown} | {predicted} |")
    count = len(of["none"])
    lines += [
        "",
        f"Medians of {count} round{'s' * (count != 1)} of {runs[0]['batches']} batches. With nobody training, the files of a "
        f"checkpoint are written and synced in {alone['seconds']:.1f} s, of which a processor is busy for {alone['processor']:.1f} s.",
    ]
    return "\n".join(lines) + "\n"


def megabytes(rounds: list[list[int]]) -> str:
    """Returns the medians of every stage."""
    return ", ".join(f"{statistics.median(stage) / 1e6:,.0f}" for stage in zip(*rounds, strict=True))


def main() -> None:
    """Makes the runs that are missing, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=300.0, help="of a run; five of its checkpoints count as one a minute")
    parser.add_argument("--depth", type=int, default=14)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    size = {"depth": options.depth, "width": options.width, "heads": options.width // 64}
    path = options.out / "runs.json"
    noted: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"runs": []}
    with tempfile.TemporaryDirectory(dir=options.out) as place:
        make = partial(train, size=size)
        if "batches" not in noted:
            trial = make(TRIAL, 0, Path(place))
            noted["batches"] = max(TRIAL, round(options.seconds * TRIAL / trial["seconds"]))
        for r in range(options.rounds):
            for name, count in SETTINGS.items():
                folder = Path(place) / f"{r}-{count}"
                if not any(run["setting"] == name and run["round"] == r for run in noted["runs"]):
                    noted["runs"].append({"setting": name, "round": r, **make(noted["batches"], count, folder)})
                    path.write_text(json.dumps(noted, indent=1) + "\n")
                    print(noted["runs"][-1], flush=True)
                if count == max(SETTINGS.values()) and folder.is_dir():
                    noted["alone"] = write_alone(folder)
                    path.write_text(json.dumps(noted, indent=1) + "\n")
                shutil.rmtree(folder, ignore_errors=True)
    reported = table(noted["runs"], noted["alone"])
    print(reported)
    (options.out / "table.md").write_text(reported)


if __name__ == "__main__":
    main()
