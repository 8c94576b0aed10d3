"""Times the way from the call of `fit` to the first loss, part by part: cold, and with a trace that an earlier run has kept.

    python benchmarks/any_model/start.py --rounds 3 --out benchmarks/any_model

Every run is a program of its own. The run with a kept trace follows the cold one. The table has the fastest of all rounds, by the clock.
In brackets is the processor time that the calling program took meanwhile, because other programs may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OWN = HERE.parents[1] / "src"
Times = dict[str, tuple[float, float]]  # of a part: by the clock, and of the processor
PARTS = ("kept trace", "trace", "proof", "measure", "rest", "start", "send and first loss", "all")


def main() -> None:
    """Run all cases, write start.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["gpt2", "chain"])
    parser.add_argument("--stages", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--source", type=Path, default=OWN, help="the folder src of another checkout")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.case:
        print(json.dumps(parts_of(asked.case[0], int(asked.case[1]))))
        return
    lines = [f"| model | stages | | {' | '.join(PARTS)} |", "|" + "---|" * (3 + len(PARTS))]
    print("\n".join(lines), flush=True)
    for model in asked.models:
        for stages in asked.stages:
            for kind, found in rounds(asked.source, model, stages, asked.rounds).items():
                best = min(found, key=lambda one: one["all"][0])
                shown = (f"{best[part][0]:.1f} ({best[part][1]:.1f})" for part in PARTS)
                lines.append(f"| {model} | {stages} | {kind} | {' | '.join(shown)} |")
                print(lines[-1], flush=True)
    if asked.out:
        (asked.out / "start.md").write_text("\n".join(lines) + "\n")


def rounds(source: Path, model: str, stages: int, count: int) -> dict[str, list[Times]]:
    """Return the times of several runs, cold ones and such with a kept trace."""
    found: dict[str, list[Times]] = defaultdict(list)
    for _ in range(count):
        with tempfile.TemporaryDirectory() as cache:
            for kind in ("cold", "kept") if model == "gpt2" else ("cold",):
                environ = {**os.environ, "PYTHONPATH": str(source.resolve()), "DELOCK_CACHE": cache}
                command = [sys.executable, str(Path(__file__).resolve()), "--case", model, str(stages)]
                done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def parts_of(name: str, stages: int) -> Times:
    """Run fit for two batches; return the seconds of every part until the first loss."""
    import torch

    from delock import fit
    from delock.launch import processes
    from delock.partition.graph import split
    from delock.partition.traces import kept_split
    from delock.records import StepRecord
    from delock.run import carry_out, prepare

    spent: Spent = defaultdict(lambda: [0.0, 0.0])
    timed(spent, kept_split, "trace_key", "kept trace")
    timed(spent, kept_split, "_earlier", "kept trace")
    timed(spent, kept_split, "split", "split")
    timed(spent, split, "difference", "proof")
    timed(spent, prepare, "choose_layout", "measure")
    timed(spent, carry_out, "prepare", "prepare")
    timed(spent, processes.Team, "start", "start")
    model, batches, loss = gpt2() if name == "gpt2" else chain()
    first: list[tuple[float, float]] = []

    def heard(event: object) -> None:
        if isinstance(event, StepRecord):
            first.append(now())

    began = now()
    optimizer = partial(torch.optim.SGD, lr=1e-3)
    fit(model, batches, loss=loss, optimizer=optimizer, method="bp", stages=stages, batches=2, callbacks=[heard])
    return {part: (of(spent, 0, first[0][0] - began[0])[part], of(spent, 1, first[0][1] - began[1])[part]) for part in PARTS}


Spent = dict[str, list[float]]


def now() -> tuple[float, float]:
    """Return the time by the clock, and of the processor."""
    return time.perf_counter(), time.process_time()


def of(spent: Spent, clock: int, whole: float) -> dict[str, float]:
    """Return the seconds of every part by one of the clocks."""
    took: dict[str, float] = defaultdict(float, {part: both[clock] for part, both in spent.items()})
    return {
        "kept trace": took["kept trace"],
        "trace": took["split"] - took["proof"],
        "proof": took["proof"],
        "measure": took["measure"],
        "rest": took["prepare"] - took["kept trace"] - took["split"] - took["measure"],
        "start": took["start"],
        "send and first loss": whole - took["prepare"] - took["start"],
        "all": whole,
    }


def timed(spent: Spent, owner: Any, name: str, part: str) -> None:
    """Let a function add the seconds of its calls to a part."""
    plain: Callable[..., Any] = getattr(owner, name)

    def run(*args: Any, **kwargs: Any) -> Any:
        began = now()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[part] = [was + end - begin for was, end, begin in zip(spent[part], now(), began, strict=True)]

    setattr(owner, name, run)


def gpt2() -> tuple[Any, list[Any], Any]:
    """Return GPT-2 with 124 million parameters of its own making, and two batches of two rows of 64 tokens."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    text = torch.randint(0, 50257, (2, 2, 64))
    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))
    return model, [{"input_ids": one, "labels": one} for one in text], None


def chain() -> tuple[Any, list[Any], Any]:
    """Return a chain of 24 linear layers with 100 million parameters, and two batches of noise."""
    from parent_memory import chain as layers

    return layers(2048, 24)


if __name__ == "__main__":
    main()
