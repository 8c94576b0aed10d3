"""Measures speed and memory under every installed allocator, in two stages: glibc's, jemalloc, tcmalloc.

    python benchmarks/throughput/heaps.py --rounds 5 --out benchmarks/throughput

An allocator serves a process from its start, so every turn is a program of its own; they take turns, A B C A B C. Each trains a network
with DDG on one core per stage, as a user would, and reports the time per batch and the growth of every stage.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import torch
from works import SGD, WORKS, Ready

import delock
from delock.launch import allocator

BATCHES = {"resnet20": 24, "conv": 24, "mlp": 60, "gpt": 14}  # some seconds each
Turn = tuple[float, list[int]]  # milliseconds a batch, bytes that every stage grew by


def train(name: str) -> Turn:
    """Runs one turn, in this program."""
    work, batches = WORKS[name], BATCHES[name]
    result = delock.fit(
        work.model(),
        Ready(work.batches()),
        loss=work.loss,
        method="ddg",
        stages=2,
        optimizer=SGD,
        batches=batches,
        report=delock.Report(log_every=batches),
    )
    return 1000 * result.seconds / batches, [stage.memory_growth for stage in result.stages]


def turn(name: str, library: str) -> Turn:
    """Runs one turn in a program whose stages start with that library; None means the C library alone."""
    command = [sys.executable, __file__, "--train", name]
    done = subprocess.run(command, env={**os.environ, **served(library)}, stdout=subprocess.PIPE, text=True, check=True)
    milliseconds, grown = json.loads(done.stdout)
    return milliseconds, grown


def served(library: str) -> Mapping[str, str]:
    """Returns the environment for that; the fork server inherits it from its program."""
    return allocator.environment({allocator.PRELOAD: library}, None) | {allocator.PRELOAD: library}


def libraries() -> dict[str, str]:
    """Returns the installed allocators, by name."""
    found = {"glibc": ""}
    for file in allocator.FILES:
        path = allocator.installed((file,))
        if path:
            found.setdefault(file[3:11], str(path))
    return found


def row(name: str, turns: Mapping[str, list[Turn]]) -> str:
    """Returns the row of a network: median and range of every allocator's times, their ratio to glibc's, the larger stage's growth."""
    base = median(ms for ms, _ in turns["glibc"])
    cells = [WORKS[name].title]
    for own in turns.values():
        times = [ms for ms, _ in own]
        grown = [median(grown[k] for _, grown in own) / 1e6 for k in range(2)]
        cells.append(f"{median(times):.0f} ({min(times):.0f} .. {max(times):.0f}), {median(times) / base:.3f}")
        cells.append(" / ".join(f"{mega:.0f}" for mega in grown))
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path())
    parser.add_argument("--train", choices=tuple(WORKS), help=argparse.SUPPRESS)  # this program calls itself
    options = parser.parse_args()
    if options.train:
        print(json.dumps(train(options.train)))
        return
    found = libraries()
    head = ["work", *itertools.chain(*((f"{name}: ms a batch, over glibc's", "grown by MB") for name in found))]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name in WORKS:
        turns: dict[str, list[Turn]] = defaultdict(list)
        for _ in range(options.rounds):
            for heap, library in found.items():
                turns[heap].append(turn(name, library))
        lines.append(row(name, turns))
        print(lines[-1], flush=True)
    where = f"{os.cpu_count()} cores ({platform.machine()}), {' '.join(platform.libc_ver())}, torch {torch.__version__}"
    lines.append(f"\nDDG, two stages; medians of {options.rounds} interleaved programs, (range); {where}")
    (options.out / "heaps.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
