"""Decides which runs are still to be made, from those that are there: grids, their extension at an edge, and seeds at the best rate."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rows import Row, Run
from tasks import Task

from delock.errors import UsageError

EXTENSIONS = 4  # rates that are added to a grid at most
Records = Mapping[str, Mapping[str, Any]]  # by the names of the runs


@dataclass(frozen=True)
class Set:
    """Holds rows in the order in which they are run, all on one task; the best rate of a row is run with `seeds` seeds."""

    about: str
    task: Task
    rows: tuple[Row, ...]
    seeds: int = 1

    def possible(self) -> tuple[list[Row], list[str]]:
        """Returns the rows whose methods can be made today, and a line for each of the others."""
        rows, refused = [], []
        for row in self.rows:
            try:
                row.make_method()
                rows.append(row)
            except UsageError as error:
                refused.append(f"skipped {row.slug}: {error}")
        return rows, refused


def score(records: Records, run: Run) -> float:
    """Returns the score of a run that was made; infinity if it diverged."""
    found = records[run.name]["score"]
    return math.inf if found is None else float(found)


def grid(row: Row, records: Records) -> list[float]:
    """Returns the rates of a row, ascending. While the best lies at an edge, the grid grows there, as soon as all its runs are made."""
    rates = list(row.rates)
    factor = rates[1] / rates[0]
    for _ in range(EXTENSIONS):
        if missing(row, rates, records) or inside(row, rates, records):
            break
        if best(row, rates, records) == rates[0]:
            rates.insert(0, _neat(rates[0] / factor))
        else:
            rates.append(_neat(rates[-1] * factor))
    return rates


def missing(row: Row, rates: list[float], records: Records) -> list[Run]:
    """Returns the runs of a grid that are not made, those in the middle first."""
    middle = math.sqrt(rates[0] * rates[-1])
    runs = [Run(row, rate, 0) for rate in sorted(rates, key=lambda rate: (abs(math.log(rate / middle)), rate))]
    return [run for run in runs if run.name not in records]


def best(row: Row, rates: list[float], records: Records) -> float:
    """Returns the rate with the best score with seed 0, among those that are made; the lowest, if all diverged."""
    made = [rate for rate in rates if Run(row, rate, 0).name in records]
    return min(made, key=lambda rate: score(records, Run(row, rate, 0)))


def inside(row: Row, rates: list[float], records: Records) -> bool:
    """Returns whether the best rate has neighbours on both sides."""
    return best(row, rates, records) not in (rates[0], rates[-1])


def wanted(rows: list[Row], seeds: int, records: Records) -> Iterator[Run]:
    """Yields the runs to be made now, row by row."""
    for row in rows:
        rates = grid(row, records)
        left = missing(row, rates, records)
        yield from left
        if not left:
            yield from others(row, seeds, best(row, rates, records), records)


def others(row: Row, seeds: int, rate: float, records: Records) -> list[Run]:
    """Returns the runs of a row at a rate with further seeds that are not made."""
    return [run for seed in range(1, seeds) if (run := Run(row, rate, seed)).name not in records]


def outlook(rows: list[Row], seeds: int, records: Records) -> dict[Row, int]:
    """Returns how many runs each row needs yet, if no grid grows any more."""
    counts = dict.fromkeys(rows, 0)
    for run in wanted(rows, seeds, records):
        counts[run.row] += 1
    return {row: count + (seeds - 1 if missing(row, grid(row, records), records) else 0) for row, count in counts.items()}


def seconds_left(rows: list[Row], seeds: int, records: Records) -> float:
    """Returns the expected seconds of all runs that are needed yet: of a row as long as its others took, else as long as the mean."""
    took = {row: [records[run.name]["seconds"] for run in made(row, seeds, records)] for row in rows}
    known = [second for seconds in took.values() for second in seconds]
    usual = fmean(known) if known else math.nan
    return sum(count * (fmean(took[row]) if took[row] else usual) for row, count in outlook(rows, seeds, records).items() if count)


def made(row: Row, seeds: int, records: Records) -> list[Run]:
    """Returns the runs of a row that are made."""
    runs = [Run(row, rate, seed) for rate in grid(row, records) for seed in range(seeds)]
    return [run for run in runs if run.name in records]


def _neat(rate: float) -> float:
    return float(f"{rate:.3g}")
