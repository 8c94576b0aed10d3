"""Joins periods with the updates that a method needs, from the records of benchmarks/quality: the time to an equal loss."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent / "quality"))
import store
import tables
from rows import Row
from sets import SETS

RUNS = Path(store.__file__).parent / "runs"
LENGTHS: Mapping[str, float] = MappingProxyType({"quoted": 1.0, "longer115": 1.15, "longer130": 1.3})
"""Sets of runs, and how many times as long as backpropagation's they are."""
STAGES = MappingProxyType({"emulated": 8, "two cores": 2, "100 Mbit/s": 2})
TOLERANCE = 0.02  # bits above backpropagation that count as an equal loss
MODELLED = 1.08  # a ratio to zb1p is quoted where its measured period is at most this many times the simulated one
MOST_PARTS = 32
SYNCHRONOUS = ("1f1b", "zb1p")
ROWS = MappingProxyType({"muon": "muon", "scadamw": "scadamw.r3", "adamw": "adamw"})
"""Optimizers of periods, and their rows in benchmarks/quality."""
Cell = Mapping[str, Any]


@dataclass(frozen=True)
class Reached:
    """Holds how many times as many updates a method makes, and by how many bits it ends above backpropagation."""

    length: float
    above: float

    @property
    def equal(self) -> bool:
        """Returns whether that counts as an equal loss."""
        return self.above <= TOLERANCE


@cache
def records(set_name: str) -> Mapping[str, Any]:
    """Returns the records of a set, which are read once."""
    return store.read(RUNS / set_name)


def target(optimizer: str) -> float:
    """Returns the best mean score of backpropagation with an optimizer or the one that it corrects; infinity if there is none."""
    wanted = SETS["quoted"]
    own = next(row for row in wanted.rows if row.optimizer == ROWS[optimizer]).compared_with(wanted.rows)
    return min((score for row in own if (score := _whole(row, wanted.seeds, records("quoted"))) is not None), default=math.inf)


def mean_of(set_name: str, method: str, K: int, parts: int, optimizer: str) -> float | None:
    """Returns the mean score of a row at its best rate; None unless all seeds are there and the best rate is inside its grid."""
    wanted = SETS[set_name]
    base, _, ahead = method.partition(" ")
    options = {"micro_batches": parts, **({"ahead": "part"} if ahead else {})}
    for row in wanted.rows:
        if (row.method, row.K, row.optimizer, dict(row.options)) == (base, K, ROWS[optimizer], options):
            return _whole(row, wanted.seeds, records(set_name))
    return None


def _whole(row: Row, seeds: int, made: Mapping[str, Any]) -> float | None:
    found = tables.scores(row, seeds, made)
    return fmean(found) if len(found) == seeds and not tables.at_edge(row, made) else None


def reached(method: str, K: int, parts: int, optimizer: str) -> list[Reached]:
    """Returns what a method reaches by the length of its runs, up to the first with an equal loss."""
    due, found = target(optimizer), list[Reached]()
    for name, length in LENGTHS.items():
        score = mean_of(name, method, K, parts, optimizer)
        if score is not None and not (found and found[-1].equal):
            found.append(Reached(length, score - due))
    return found


def line(cell: Cell, K: int, own: Mapping[tuple[str, int], Cell]) -> str | None:
    """Returns a row of the table for a delayed method; None if it has no runs with that many parts."""
    method, parts = cell["method"], cell["parts"]
    runs = reached(method, K, parts, cell["optimizer"])
    if not runs:
        return None
    tried = ", ".join(f"{one.length:g}: {one.above:+.3f}" for one in runs)
    if not runs[-1].equal:
        return f"| {method} | {parts} | {tried} | not reached | - | - |"
    seconds = cell["seconds"] * runs[-1].length
    ratios = [_ratio(own.get((name, parts)), seconds, name) for name in SYNCHRONOUS]
    return f"| {method} | {parts} | {tried} | {runs[-1].length:g} | " + " | ".join(ratios) + " |"


def _ratio(cell: Cell | None, seconds: float, name: str) -> str:
    if cell is None:
        return "-"
    off = cell["seconds"] / cell["simulated"]
    unfit = f" (zb1p itself takes {off:.2f} of its model)" if name == "zb1p" and off > MODELLED else ""
    return f"{cell['seconds'] / seconds:.2f}{unfit}"


def best(K: int, own: Mapping[tuple[str, int], Cell]) -> str:
    """Returns a sentence on each side at its own best number of parts."""
    late = [
        (cell["seconds"] * runs[-1].length, name, parts)
        for (name, parts), cell in own.items()
        if name not in SYNCHRONOUS and parts <= MOST_PARTS and (runs := reached(name, K, parts, cell["optimizer"])) and runs[-1].equal
    ]
    if not late:
        return ""
    seconds, winner, parts = min(late)
    others = []
    for method in SYNCHRONOUS:
        took, its = min((cell["seconds"], n) for (name, n), cell in own.items() if name == method and n <= MOST_PARTS)
        others.append(f"{took / seconds:.2f} times as fast as {method} with {its} parts")
    return f"Each at its own best number of parts: {winner} with {parts} is {' and '.join(others)}."


def table(cells: list[Cell]) -> str:
    """Returns a table for each place and optimizer."""
    lines: list[str] = []
    for place, optimizer in dict.fromkeys((cell["place"], cell["optimizer"]) for cell in cells):
        own = {(c["method"], c["parts"]): c for c in cells if (c["place"], c["optimizer"]) == (place, optimizer)}
        late = sorted((c for c in own.values() if c["method"] not in SYNCHRONOUS), key=lambda c: c["parts"])
        rows = [row for cell in late if (row := line(cell, STAGES[place], own))]
        if not rows:
            continue
        what = f"how many times as fast to a loss within {TOLERANCE} bits of backpropagation's"
        head = "| method | parts | bits above bp, by length | updates over bp's | over 1f1b | over zb1p |"
        lines += [f"**{place}, K = {STAGES[place]}, {optimizer}**: {what}", "", head, "|---|---:|---|---:|---:|---:|", *rows, ""]
        lines += [said, ""] if (said := best(STAGES[place], own)) else []
    return "\n".join(lines)
