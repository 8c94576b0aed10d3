"""Measures the time to an equal loss: the updates that a method needs for it, times its seconds per batch.

    sudo python benchmarks/time_to_loss/run.py --out benchmarks/time_to_loss

Seconds per batch, the optimizer's included, of the network of benchmarks/quality's set `quoted`:

    emulated   eight stages of one block each, in processes that wait as long as a block and its optimizer take on one core
    two cores  two stages of four blocks in two processes, one core each
    100 Mbit/s the same two over a link with that limit, in two network namespaces; skipped where the machine does not permit them

All take turns, round by round; the median of rounds is shown, and beside it the simulator's period for the same seconds of work.
Updates come from benchmarks/quality: a delayed method may train 1.0, 1.15 or 1.3 times as long as backpropagation, each with a cosine
of its own, and needs the first of these whose final validation loss is at most 0.02 bits above that of backpropagation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import equal_loss
from periods import block, emulated, real, simulated
from two_stages import method_of

sys.path.append(str(Path(__file__).resolve().parent.parent / "slow_link"))
from namespaces import NotPermitted, joined, limit

K, SYNCHRONOUS, DELAYED = 8, ("1f1b", "zb1p"), ("ddg", "ddg ahead", "fdg")
PARTS = (4, 8, 16, 32)
FEW = (1, 2, 4, 8)  # parts on two stages
SCALE = 32.0  # emulated waits are this many times as long as the work, so that what a message costs on two cores is small beside it
PLACES = ("emulated", "two cores", "100 Mbit/s")
Cell = dict[str, Any]


def eight(optimizer: str, rounds: int, parts: Sequence[int]) -> list[Cell]:
    """Returns periods of eight emulated stages."""
    measured = block(optimizer)
    stage = type(measured)(*(SCALE * seconds for seconds in (measured.forward, measured.backward, measured.update)))
    names = [(name, one) for one in parts for name in (*SYNCHRONOUS, *DELAYED)]
    found: dict[tuple[str, int], list[float]] = {pair: [] for pair in names}
    for _ in range(rounds):
        for name, one in names:
            found[name, one].append(emulated(method_of(name, one), K, stage) / SCALE)
            print(f"emulated, {optimizer}: {name}, {one} parts: {1000 * found[name, one][-1]:.2f} ms", flush=True)
    own = [(seconds,) * K for seconds in (measured.forward, measured.backward, measured.update)]
    return [
        {"place": "emulated", "optimizer": optimizer, "method": name, "parts": one, "seconds": median(seconds),
         "simulated": simulated(method_of(name, one), *own), "stage": [measured.forward, measured.backward, measured.update]}
        for (name, one), seconds in found.items()
    ]  # fmt: skip


def two(optimizer: str, rounds: int, batches: int, parts: Sequence[int], ends: Any = None) -> list[Cell]:
    """Returns periods of two real stages."""
    names = [(name, one) for one in parts for name in (*SYNCHRONOUS, *DELAYED)]
    found: dict[tuple[str, int], list[Cell]] = {pair: [] for pair in names}
    place = "100 Mbit/s" if ends else "two cores"
    for _ in range(rounds):
        for name, one in names:
            found[name, one].append(real(name, one, optimizer, batches, ends))
            print(f"{place}, {optimizer}: {name}, {one} parts: {1000 * found[name, one][-1]['seconds']:.2f} ms", flush=True)
    return [{"place": place, "optimizer": optimizer, **_cell(*pair, cells)} for pair, cells in found.items()]


def _cell(name: str, parts: int, cells: list[Cell]) -> Cell:
    work = [[median(column) for column in zip(*(cell[what] for cell in cells), strict=True)] for what in ("forward", "backward", "update")]
    due = simulated(method_of(name, parts), *work)
    return {"method": name, "parts": parts, "seconds": median(cell["seconds"] for cell in cells), "simulated": due, "stage": work}


def table(cells: list[Cell]) -> str:
    """Returns a table for each place and optimizer: seconds per batch, and how many times as fast as a synchronous method ddg is."""
    lines: list[str] = []
    for place, optimizer in dict.fromkeys((cell["place"], cell["optimizer"]) for cell in cells):
        own = {(c["method"], c["parts"]): c for c in cells if (c["place"], c["optimizer"]) == (place, optimizer)}
        methods = list(dict.fromkeys(name for name, _ in own))
        lines += [f"**{place}, {optimizer}**: milliseconds per batch (measured over simulated)", ""]
        lines += ["| parts | " + " | ".join(methods) + " | 1f1b over ddg | zb1p over ddg |", "|---:|" + "---:|" * (len(methods) + 2)]
        for parts in sorted({parts for _, parts in own}):
            shown = [_shown(own.get((name, parts))) for name in methods]
            shown += [f"{own[name, parts]['seconds'] / own['ddg', parts]['seconds']:.2f}" for name in SYNCHRONOUS]
            lines.append(f"| {parts} | " + " | ".join(shown) + " |")
        fastest = {name: min((c["seconds"], c["parts"]) for (n, _), c in own.items() if n == name) for name in methods}
        best = [f"{name} {1000 * seconds:.2f} ({parts} parts)" for name, (seconds, parts) in fastest.items()]
        lines += ["", f"Each at its best number of parts: {', '.join(best)}.", ""]
    return "\n".join(lines)


def _shown(cell: Cell | None) -> str:
    return f"{1000 * cell['seconds']:.2f} ({cell['seconds'] / cell['simulated']:.2f})" if cell else ""


def main() -> None:
    """Measures the places that are asked for, and writes the tables of all that are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", nargs="*", choices=PLACES, default=PLACES)
    parser.add_argument("--optimizer", nargs="+", choices=["muon", "scadamw", "adamw"], default=["muon"])
    parser.add_argument("--parts", nargs="+", type=int, help="of a batch; by default 4 to 32, on two stages 1 to 8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=int, default=240, help="of a run in two stages")
    parser.add_argument("--out", type=Path, required=True, help="folder; places that are not asked for keep what its periods.json has")
    options = parser.parse_args()
    path = options.out / "periods.json"
    known: list[Cell] = json.loads(path.read_text()) if path.exists() else []
    for optimizer in options.optimizer:
        for place in options.place:
            try:
                found = measured(place, optimizer, options.rounds, options.batches, options.parts)
            except NotPermitted as error:
                print(f"{place} skipped: {error}")
                continue
            known = [cell for cell in known if (cell["place"], cell["optimizer"]) != (place, optimizer)] + found
            path.write_text(json.dumps(known, indent=0) + "\n")
    for name, written in (("periods.md", table(known)), ("equal_loss.md", equal_loss.table(known))):
        (options.out / name).write_text(written)
        print(written)


def measured(place: str, optimizer: str, rounds: int, batches: int, parts: Sequence[int] | None) -> list[Cell]:
    """Returns the periods of one place. Raises NotPermitted."""
    if place == "emulated":
        return eight(optimizer, rounds, parts or PARTS)
    if place == "two cores":
        return two(optimizer, rounds, batches, parts or FEW)
    with joined() as ends:
        limit(ends, "100mbit")
        return two(optimizer, rounds, batches // 2, parts or FEW, ends)


if __name__ == "__main__":
    main()
