"""Measures the cost of a step of each optimizer on the README's GPT, one thread, beside torch's AdamW and beside an update's derivatives.

    python benchmarks/optimizers/run.py --out benchmarks/optimizers

All take turns, round by round, in one process. Time is the processor's, so that another program on the machine disturbs little; a ratio is
taken within a round, and the median of rounds is shown.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from delock.nets import gpt, nats
from delock.optim.stage_facts import StageFacts, for_stage
from delock.recipes import SGD, AdamW, NAdamW, error_feedback, muon, scadamw, scsgd, soap

VOCABULARY, CONTEXT, WINDOWS, STEPS = 100, 64, 16, 10
STAGE = StageFacts(0, 4, 0.75, 1)  # the first of four, lags of ddg, four parts
TORCHS_SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
REFERENCE = "AdamW(foreach=True), torch"
FACTORIES: tuple[tuple[str, Callable[..., Optimizer], str], ...] = (
    (REFERENCE, partial(torch.optim.AdamW, foreach=True), ""),
    ("AdamW", AdamW(1e-3, 0.01), ""),
    ("NAdamW", NAdamW(1e-3, 0.01), ""),
    ("scadamw", scadamw(), REFERENCE),
    ("SGD, momentum", SGD(0.1, 0.9), ""),
    ("SGD, momentum, torch's default", TORCHS_SGD, ""),
    ("scsgd", scsgd(0.1), "SGD, momentum"),
    ("muon", muon(), ""),
    ("soap", soap(), ""),
    ("error_feedback(AdamW)", error_feedback(AdamW(1e-3, 0.01)), "AdamW"),
    ("error_feedback(scadamw)", error_feedback(scadamw()), "scadamw"),
    ("error_feedback(SGD, momentum)", error_feedback(SGD(0.1, 0.9)), "SGD, momentum"),
    ("error_feedback(SGD, momentum, torch's default)", error_feedback(TORCHS_SGD), "SGD, momentum, torch's default"),
    ("error_feedback(muon)", error_feedback(muon()), "muon"),
)


def derivatives() -> nn.Module:
    """Returns the network with the gradients of one batch."""
    model = gpt(VOCABULARY, depth=4, width=128, context=CONTEXT)
    tokens = torch.randint(VOCABULARY, (WINDOWS, CONTEXT + 1), generator=torch.Generator().manual_seed(0))  # (B, T + 1)
    nats(model(tokens[:, :-1]), tokens[:, 1:]).backward()
    return model


def stepping(factory: Callable[..., Optimizer]) -> Callable[[], Any]:
    """Returns a function that makes STEPS steps of an optimizer that is warm."""
    model = derivatives()
    optimizer = for_stage(factory, STAGE)(list(model.named_parameters()))

    def steps() -> None:
        for _ in range(STEPS):
            optimizer.step()

    steps()
    return steps


def seconds(work: Callable[[], Any]) -> float:
    """Returns the processor's seconds."""
    begun = process_time()
    work()
    return process_time() - begun


def measure(rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of a step for every optimizer, and of the derivatives, in every round."""
    works = {name: stepping(factory) for name, factory, _ in FACTORIES}
    found: dict[str, list[float]] = {name: [] for name in ("derivatives", *works)}
    for _ in range(rounds):
        found["derivatives"].append(seconds(derivatives))
        for name, work in works.items():
            found[name].append(seconds(work) / STEPS)
    return found


def rows(found: dict[str, list[float]]) -> list[str]:
    """Returns the lines of the table."""
    lines = ["| optimizer | ms | of torch's AdamW(foreach=True) | of its base | share of an update |", "|---|---:|---:|---:|---:|"]

    def ratio(name: str, other: str) -> float:
        return median(a / b for a, b in zip(found[name], found[other], strict=True))

    for name, _, base in FACTORIES:
        own = f"{ratio(name, base):.2f}" if base else ""
        share = median(a / (a + b) for a, b in zip(found[name], found["derivatives"], strict=True))
        lines.append(f"| {name} | {1e3 * median(found[name]):.2f} | {ratio(name, REFERENCE):.2f} | {own} | {share:.1%} |")
    return lines


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = "\n".join(rows(measure(options.rounds))) + "\n"
    (options.out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
