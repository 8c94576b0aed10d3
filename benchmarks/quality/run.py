"""Measures the quality of short delays: many small runs, one JSON file each; what is there is not run again.

    python benchmarks/quality/run.py run screening quoted --jobs 2 --out benchmarks/quality
    python benchmarks/quality/run.py estimate screening --out benchmarks/quality
    python benchmarks/quality/run.py table --out benchmarks/quality

Every run is inline, with one thread, at the lowest priority. It may be interrupted at any time. Text is read from
$DELOCK_DATA/tinyshakespeare.txt, images from $DELOCK_DATA.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from threading import Thread
from typing import Any

import store
import tables
import todo
from rows import Row, Run
from sets import SETS
from tasks import Task, trained
from todo import Set

from delock.errors import UsageError

RUNS_OF_A_PROCESS = 25  # then a fresh one: what a run leaves in memory does not add up
TRIAL = 16  # updates of an estimate; the first six are left out
WARM = 6


def end_with_parent() -> None:
    """Ends this process when the one that started it is gone, killed ones included."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def make(task: Task, run: Run, folder: Path) -> dict[str, Any]:
    """Makes a run and writes its record."""
    record = trained(task, run)
    store.write(folder / f"{run.name}.json", record)
    return record


def go_on(wanted: Set, folder: Path, jobs: int) -> int:
    """Makes the runs of a set that are missing; returns how many failed. A run that diverges is a result; one that fails is not."""
    failed = set[str]()
    rows, refused = wanted.possible()
    print("".join(f"{line}\n" for line in refused), end="", flush=True)
    store.refuse_stale(wanted, folder)
    context = multiprocessing.get_context("spawn")
    with store.alone(folder), ProcessPoolExecutor(jobs, context, end_with_parent, max_tasks_per_child=RUNS_OF_A_PROCESS) as pool:
        records, flying = store.read(folder), dict[Future[dict[str, Any]], Run]()
        while True:
            busy = {run.name for run in flying.values()} | failed
            ready = (run for run in todo.wanted(rows, wanted.seeds, records) if run.name not in busy)
            for run, _ in zip(ready, range(jobs - len(flying)), strict=False):
                flying[pool.submit(make, wanted.task, run, folder)] = run
            if not flying:
                return len(failed)
            for future in wait(flying, return_when=FIRST_COMPLETED).done:
                run = flying.pop(future)
                if problem := future.exception():
                    failed.add(run.name)
                    print(f"failed {run.name}: {problem!r}", flush=True)
                else:
                    records[run.name] = future.result()
                    print(progress(rows, wanted.seeds, records, run, jobs), flush=True)


def progress(rows: list[Row], seeds: int, records: todo.Records, run: Run, jobs: int) -> str:
    """Returns a line about a run that has ended, and what is left."""
    left, record = sum(todo.outlook(rows, seeds, records).values()), records[run.name]
    reached = "diverged" if record["score"] is None else f"{record['score']:.4f}"
    hours = todo.seconds_left(rows, seeds, records) / jobs / 3600
    done = sum(len(todo.made(row, seeds, records)) for row in rows)
    return f"[{done}/{done + left}] {run.name}: {reached}, {record['seconds']:.0f} s; about {hours:.1f} h left"


def seconds_per_update(task: Task, row: Row) -> float:
    """Returns the processor's seconds of an update, after a few."""
    at: list[float] = []
    task.fit(Run(row, row.rates[0], 0), batches=TRIAL, callbacks=[lambda event: at.append(time.process_time())])
    return (at[-1] - at[-1 - (TRIAL - WARM)]) / (TRIAL - WARM)


def estimate(wanted: Set, folder: Path) -> None:
    """Prints how long the missing runs of a set take, row by row, evaluations left out."""
    rows, refused = wanted.possible()
    print("".join(f"{line}\n" for line in refused), end="")
    total = 0.0
    for row, count in todo.outlook(rows, wanted.seeds, store.read(folder)).items():
        each = seconds_per_update(wanted.task, row)
        total += count * each * wanted.task.updates
        print(f"{row.slug}: {1e3 * each:.1f} ms per update, {each * wanted.task.updates:.0f} s per run, {count} runs", flush=True)
    print(f"{folder.name}: {total / 3600:.1f} h of one processor", flush=True)


def main() -> None:
    """Runs, estimates, or writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "estimate", "table"))
    parser.add_argument("sets", nargs="*", help="by default all but toy")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each in a process of its own")
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    names = asked.sets or [name for name in SETS if name != "toy"]
    os.nice(19)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by torch in the processes of the runs
    failed = 0
    for name in names:
        folder = asked.out / "runs" / name
        if asked.what == "run":
            failed += go_on(SETS[name], folder, asked.jobs)
        elif asked.what == "estimate":
            estimate(SETS[name], folder)
        if asked.what != "estimate" and store.read(folder):
            (asked.out / f"{name}.md").write_text(tables.table(SETS[name], store.read(folder)))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except UsageError as error:
        sys.exit(f"error: {error}")
