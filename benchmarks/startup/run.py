"""The wall time of `delock train --epochs 1` on digits, part by part: what passes before the first update, and after the last.

    python benchmarks/startup/run.py --rounds 9 --out benchmarks/startup
    python benchmarks/startup/run.py --before ../edfd028/src --out benchmarks/startup     with an earlier checkout, in turns

Every round runs the command twice: as it is, for its whole wall time and the processor time of all its processes, and with the marks of
hook/sitecustomize.py, for the parts. Parts are medians over the rounds, so they need not add up.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
OWN = HERE.parents[1] / "src"
COMMAND = ("-m", "delock", "train", "--epochs", "1", "--out", "run")
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


class Mark(NamedTuple):
    """A part of a process, in seconds of the system's clock."""

    process: int
    part: str
    begin: float
    end: float


def main() -> None:
    """Run the rounds, write table.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--before", type=Path, help="the folder src of an earlier checkout")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # the fork server is waited for here when its parent has gone
    sources = {"before": asked.before.resolve(), "now": OWN} if asked.before else {"now": OWN}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in sources}
    for source in sources.values():
        whole(source)  # files into the system's cache
    for number in range(asked.rounds):
        for name, source in sources.items():
            rounds[name].append({**parts(source), **whole(source)})
            print(number, name, {part: round(seconds, 2) for part, seconds in rounds[name][-1].items()}, flush=True)
    text = table({name: medians(found) for name, found in rounds.items()})
    print(text)
    if asked.out:
        (asked.out / "table.md").write_text(text + "\n", encoding="utf-8")


def whole(source: Path) -> dict[str, float]:
    """Seconds of the command as it is: on the clock, and of processors, those of all its processes."""
    wall, processors = execute(source, {})
    return {"the whole command, without marks": wall, "its processor time, all processes": processors}


def execute(source: Path, more: Mapping[str, str], hook: Sequence[str] = ()) -> tuple[float, float]:
    """Run the command in a folder of its own; returns its seconds on the clock and of processors."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([*hook, str(source)])} | more
        begin = monotonic()
        process = subprocess.Popen([sys.executable, *COMMAND], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        _, code, used = os.wait4(process.pid, 0)
        wall, process.returncode = monotonic() - begin, code
        if code:
            raise SystemExit(f"the command failed: {code}")
        return wall, used.ru_utime + used.ru_stime + orphans()


def orphans() -> float:
    """Processor seconds of what the command has left behind for this process to wait for."""
    seconds = 0.0
    while True:
        try:
            _, _, used = os.wait4(-1, 0)
        except ChildProcessError:
            return seconds
        seconds += used.ru_utime + used.ru_stime


def parts(source: Path) -> dict[str, float]:
    """Seconds of every part of one run of the command."""
    with tempfile.NamedTemporaryFile("r") as file:
        begin = monotonic()
        wall, _ = execute(source, {"DELOCK_MARKS": file.name}, [str(HERE / "hook")])
        lines = [line.split() for line in file]
    marks = [Mark(int(process), part, float(start), float(end)) for process, part, start, end in lines]
    return divided(marks, begin, begin + wall)


def divided(marks: Sequence[Mark], begin: float, end: float) -> dict[str, float]:
    """The parts of a run, one after the other, from `begin` to `end`."""
    command = one(marks, "command")
    here = [mark for mark in marks if mark.process == command.process]
    run = last(here, "processes")
    ranks = [mark for mark in marks if run.begin <= mark.begin <= run.end and mark.process != command.process]
    started, joined, built, trained = (
        max(getattr(mark, at) for mark in ranks if mark.part == part)
        for part, at in (("rank", "begin"), ("group", "end"), ("train", "begin"), ("train", "end"))
    )
    updated = min(mark.end for mark in ranks if mark.part == "update")
    loading = [mark for mark in here if mark.part == "import" and mark.begin < run.begin]

    def own(part: str) -> float:
        return sum(mark.end - mark.begin - within(loading, mark) for mark in here if mark.part == part)

    prepared = {
        "start of Python": one(here, "python").begin - begin,
        "imports": sum(mark.end - mark.begin for mark in loading),
        "command line": own("parse"),
        "data": own("data"),
        "network": own("network"),
        "measuring the layers": own("measure"),
        "optimizer bytes": sum(mark.end - mark.begin for mark in here if mark.part == "optimizers"),
    }
    return {
        **prepared,
        "checks, prediction, pickles": run.begin - begin - sum(prepared.values()),
        "waiting for the fork server, start of the processes": started - run.begin,
        "rendezvous": joined - started,
        "links, stages": built - joined,
        "first update": updated - built,
        "**until the first update**": updated - begin,
        "the rest of the epoch, evaluation": trained - updated,
        "results home, end of the processes": run.end - trained,
        "weights, summary, tables": command.end - run.end,
        "end of the interpreter": end - command.end,
        "**all**": end - begin,
    }


def one(marks: Sequence[Mark], part: str) -> Mark:
    """The first mark of a part."""
    return next(mark for mark in marks if mark.part == part)


def last(marks: Sequence[Mark], part: str) -> Mark:
    """The last mark of a part: an earlier checkout starts a process for the optimizers, too."""
    return [mark for mark in marks if mark.part == part][-1]


def within(loading: Sequence[Mark], whole: Mark) -> float:
    """Seconds of imports inside a part."""
    return sum(mark.end - mark.begin for mark in loading if whole.begin <= mark.begin and mark.end <= whole.end)


def medians(rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Part by part."""
    return {part: statistics.median(found[part] for found in rounds) for part in rounds[0]}


def table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Seconds, a row for every part."""
    rows = ["| seconds | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    names = next(iter(columns.values()))
    return "\n".join([*rows, *(f"| {part} | " + " | ".join(f"{column[part]:.2f}" for column in columns.values()) + " |" for part in names)])


if __name__ == "__main__":
    main()
