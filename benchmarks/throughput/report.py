"""Writes the tables from results.json: medians, ranges, ratios round by round, and the aims."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

PLAIN, TWO, DDP, CEILING = "plain, 1 thread", "plain, 2 threads", "DDP, half batches", "ceiling"
LIMITS = {"FDG": CEILING, "ADL": CEILING, "DDG": "DDG, simulated", "DGL": "ceiling of DGL"}
LINKS = ("gloo", "shared")
SCHEDULED = " micro-batches"  # how the names of torch's schedules end
OF_LIMIT, OF_BEST, OF_OTHERS = 0.97, 0.95, 0.97  # what was to be reached
Found = Mapping[str, Any]  # a configuration of results.json


def ratios(found: Found, a: str, b: str) -> list[float]:
    """Returns a over b in every round in which both were measured."""
    rates = found["rates"]
    return [x / y for x, y in zip(rates.get(a, []), rates.get(b, []), strict=False) if x and y]


def ratio(found: Found, a: str, b: str) -> float | None:
    """Returns the median of these ratios."""
    known = ratios(found, a, b)
    return statistics.median(known) if known else None


def said(number: float | None) -> str:
    """Returns a number with two digits, or a dash for none."""
    return "-" if number is None else f"{number:.2f}"


def limit(name: str) -> str:
    """Returns the limit of a contender: its own ceiling for a method of the library that has one, the common ceiling for all others."""
    return LIMITS.get(name.partition(",")[0], CEILING)


def best_schedule(found: Found) -> str | None:
    """Returns the fastest of torch's schedules, by its median."""
    medians = {name: statistics.median(known) for name in found["rates"] if name.endswith(SCHEDULED) and (known := rates(found, name))}
    return max(medians, key=medians.__getitem__, default=None)


def rates(found: Found, name: str) -> list[float]:
    """Returns the samples per second in the rounds in which the contender was measured."""
    return [rate for rate in found["rates"].get(name, []) if rate]


def table(results: Mapping[str, Found]) -> str:
    """Returns the whole of table.md."""
    parts = [_summary(results), _links(results)]
    parts += [f"## {title}\n\n{_about(found)}\n\n{_contenders(found)}\n\n{_reached(found)}" for title, found in results.items()]
    return "\n\n".join(parts) + "\n"


def _summary(results: Mapping[str, Found]) -> str:
    lines = [
        "Speed over plain PyTorch with one thread; the methods over gloo / over shared memory.\n",
        f"| configuration | 2 threads | DDP | best schedule of torch | ceiling | {' | '.join(LIMITS)} |",
        "|---|" + "---:|" * (4 + len(LIMITS)),
    ]
    for title, found in results.items():
        best = best_schedule(found)
        cells = [said(ratio(found, name, PLAIN)) for name in (TWO, DDP, best or "", CEILING)]
        cells += [" / ".join(said(ratio(found, f"{method}, {link}", PLAIN)) for link in LINKS) for method in LIMITS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _links(results: Mapping[str, Found]) -> str:
    lines = [
        "Speed over shared memory by speed over gloo: median (range) of the rounds.\n",
        f"| configuration | {' | '.join(LIMITS)} |",
        "|---|" + "---:|" * len(LIMITS),
    ]
    for title, found in results.items():
        pairs = [ratios(found, f"{method}, shared", f"{method}, gloo") for method in LIMITS]
        cells = [f"{statistics.median(p):.3f} ({min(p):.3f} .. {max(p):.3f})" if p else "-" for p in pairs]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _about(found: Found) -> str:
    same = [(a, b) for name in found["losses"] for a, b in _losses(found, name)]
    return (
        f"{found['work']}; layers of the stages: {' + '.join(map(str, found['layers']))}. {found['where']}, {found['when']}.\n"
        f"First losses, where they should be the same, differ by {max((abs(a - b) for a, b in same), default=0.0):.1g} at most from"
        " those of plain PyTorch."
    )


def _losses(found: Found, name: str) -> list[tuple[float, float]]:
    """Returns the losses that should be equal: all first ones; for a decoupled method only the very first, before any update."""
    own = found["losses"][name][: 1 if name.startswith(tuple(LIMITS)) else None]
    return list(zip(own, found["losses"].get(PLAIN, []), strict=False))


def _contenders(found: Found) -> str:
    lines = [
        "| contender | samples/s | range | over plain, 1 thread | of the ceiling | batches |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in found["rates"]:
        if not (known := rates(found, name)):
            continue
        cells = [f"{statistics.median(known):.0f}", f"{min(known):.0f} .. {max(known):.0f}"]
        cells += [said(ratio(found, name, other)) for other in (PLAIN, limit(name))]
        lines.append(f"| {name} | " + " | ".join([*cells, str(found["batches"].get(name, ""))]) + " |")
    lines += [f"| {name} | failed: {_short(why)} | | | | |" for name, why in found["failed"].items()]
    return "\n".join(lines)


def _short(why: str) -> str:
    """Returns the event without its stack, in one cell."""
    reported = " ".join(why.partition("\n\n")[0].split()).replace("|", "/")
    return reported if len(reported) < 160 else reported[:157] + "..."


def _reached(found: Found) -> str:
    best = best_schedule(found)
    lines = [
        f"Aims: of the ceiling {OF_LIMIT} (DDG: of its simulated speed); over the best of torch's schedules ({best or 'none'}) {OF_BEST} of"
        f"\nwhat the ceiling is over it; of DDP and two threads {OF_OTHERS} where the ceiling reaches them (else in brackets).\n",
        "| method, link | of the ceiling | over the best schedule (aim) | of DDP | of two threads | reached |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for name in (f"{method}, {link}" for method in LIMITS for link in LINKS):
        if not rates(found, name):
            continue
        own, over = ratio(found, name, limit(name)), ratio(found, name, best or "")
        hoped = ratio(found, _ceiling(name), best or "")
        aims = [(own, OF_LIMIT), (over, OF_BEST * hoped if hoped else None)]
        cells = [said(own), f"{said(over)} ({said(aims[1][1])})"]
        for other in (DDP, TWO):
            there, top = ratio(found, name, other), ratio(found, _ceiling(name), other)
            binds = top is not None and top >= 1
            cells.append(said(there) if binds else f"[{said(there)}]")
            aims += [(there, OF_OTHERS)] if binds else []
        missed = [aim for got, aim in aims if got is not None and aim is not None and got < aim]
        lines.append(f"| {name} | " + " | ".join([*cells, "no" if missed else "yes"]) + " |")
    return "\n".join(lines)


def _ceiling(name: str) -> str:
    """Returns the ceiling without communication itself, for DDG too."""
    return LIMITS["DGL"] if name.startswith("DGL") else CEILING
