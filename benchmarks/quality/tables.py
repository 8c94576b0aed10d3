"""Writes the tables of a set from its records: the best of every row, by optimizer, and the whole grids."""

from __future__ import annotations

import math
from statistics import fmean

import todo
from rows import Row, Run
from todo import Records, Set

EDGE = "*"  # the best rate is the first or the last of its grid


def table(of: Set, records: Records) -> str:
    """Returns the two tables with what they show."""
    unit = of.task.unit
    head = f"{of.about} {unit.capitalize()}, lower is better; each at the best rate of its row"
    seeds = f", the mean of up to {of.seeds} seeds" if of.seeds > 1 else ""
    note = f"`{EDGE}`: the best rate lies at the edge of its grid. `-`: not run."
    return "\n\n".join([f"{head}{seeds}. {note}", summary(of, records), grids(of, records)]) + "\n"


def summary(of: Set, records: Records) -> str:
    """Returns a line per method, a column per optimizer."""
    columns = list(dict.fromkeys(row.corrected for row in of.rows))
    labels = dict.fromkeys(row.label for row in of.rows)
    lines = ["| method | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for label in labels:
        own = {row.corrected: row for row in of.rows if row.label == label}
        cells = [shown(own[name], of.seeds, records) if name in own else "" for name in columns]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grids(of: Set, records: Records) -> str:
    """Returns a line per row: its best, its distance from backpropagation, and the score at every rate with seed 0."""
    lines = ["| method | optimizer | best | above bp | rate | all rates, seed 0 | seconds per run |", "|---|---|---:|---:|---:|---|---:|"]
    for row in of.rows:
        rates = made_rates(row, records)
        if not rates:
            continue
        whole = ", ".join(f"{rate:g}: {number(todo.score(records, Run(row, rate, 0)))}" for rate in rates)
        seconds = fmean(records[run.name]["cpu_seconds"] for run in todo.made(row, of.seeds, records))
        reached = f"{shown(row, of.seeds, records)} | {above(row, of, records)} | {todo.best(row, rates, records):g}"
        lines.append(f"| {row.label} | {row.corrected} | {reached} | {whole} | {seconds:.0f} |")
    return "\n".join(lines)


def made_rates(row: Row, records: Records) -> list[float]:
    """Returns the rates of a row that were run, ascending."""
    return [rate for rate in todo.grid(row, records) if Run(row, rate, 0).name in records]


def scores(row: Row, seeds: int, records: Records) -> list[float]:
    """Returns the scores of the seeds at the best rate, those that are there."""
    rates = made_rates(row, records)
    runs = [Run(row, todo.best(row, rates, records), seed) for seed in range(seeds)] if rates else []
    return [todo.score(records, run) for run in runs if run.name in records]


def shown(row: Row, seeds: int, records: Records) -> str:
    """Returns the mean of a row's scores, with the least and the largest, and marked at an edge."""
    found = scores(row, seeds, records)
    if not found:
        return "-"
    span = f" ({number(min(found))} .. {number(max(found))})" if len(found) > 1 else ""
    return number(fmean(found)) + (EDGE if at_edge(row, records) else "") + span


def at_edge(row: Row, records: Records) -> bool:
    """Returns whether the best rate has no neighbour that was run, on one side or both."""
    rates = made_rates(row, records)
    return bool(rates) and not todo.inside(row, rates, records)


def above(row: Row, of: Set, records: Records) -> str:
    """Returns by how much a row is above the best of the backpropagation beside it."""
    others = [found for other in row.compared_with(of.rows) if (found := scores(other, of.seeds, records))]
    if not others:
        return "-"
    return f"{fmean(scores(row, of.seeds, records)) - min(map(fmean, others)):+.3f}"


def number(value: float) -> str:
    """Returns a score with three decimals."""
    return f"{value:.3f}" if math.isfinite(value) else "diverged"
