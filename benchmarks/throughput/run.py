"""Measures samples per second of FDG, ADL, DDG and DGL in two stages, beside the usual alternatives on the same two cores.

    python benchmarks/throughput/run.py --rounds 5 --out benchmarks/throughput

For each configuration, which is a network in a layout and a precision, one pair of processes builds every contender once; then they take
turns, A B C A B C. A contender that fails is left out from then on, and the table gives the reason. Results are written after every
configuration.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from ceiling import ddg_period
from figure import figure
from ours import METHODS
from pair import CONTENDERS, Begun, Task, Turned, pair
from report import table
from share import Share, TurnReport
from torch import nn
from works import CONFIGURATIONS, ENDLESS, SGD, WORKS, Ready, Work, pays

from delock.errors import DelockError
from delock.launch.processes import run_processes
from delock.methods import Method
from delock.nets.heads import build_head, choose
from delock.options import Execution, Report
from delock.partition.balance import balance
from delock.partition.layers import layers
from delock.partition.measure import measure
from delock.partition.stages import StageModule, stages
from delock.plan import RunLength
from delock.run.job import StageJob

PATIENCE = 60.0  # seconds without a sign of life
Found = dict[str, Any]  # of a configuration, as results.json has it


def share(work: str, execution: Execution) -> Share:
    """Returns all that contenders are built from; the cuts come from the costs of the layers, measured here and now as `fit` does."""
    found = WORKS[work]
    batches, model = found.batches(), found.model()
    parts = layers(model)
    torch.set_num_threads(1)
    costs = measure(parts, *batches[0], found.loss, execution=execution)
    halves, quarters = (stages(parts, balance([c.total_s for c in costs], K, [c.params for c in costs])) for K in (2, 4))
    shape = costs[len(halves[0]) - 1].shape
    head = build_head(choose(shape), shape, costs[-1].shape[-1])
    jobs = {name: [job(k, module, head, method, found, execution) for k, module in enumerate(halves)] for name, method in METHODS.items()}
    return Share(work, execution, model, list(halves), list(quarters), head, jobs, batches, os.sched_getaffinity(0))


def job(k: int, module: StageModule, head: nn.Module, method: Method, work: Work, execution: Execution) -> StageJob:
    """Returns the job that `fit` would send to the process of stage k; the process fills in the number of batches and the link."""
    return StageJob(
        k=k,
        K=2,
        module=module,
        names=module.original,
        method=method,
        length=RunLength(1),
        per_epoch=ENDLESS,
        optimizer=SGD,
        schedule=None,
        loss=work.loss,
        metrics={},
        seed=0,
        train=Ready(work.batches()) if k == 0 else None,
        head=head if k in method.headed(2) else None,
        execution=execution,
        report=Report(ENDLESS, trace=True),
    )


class Log:
    """Collects the reports of the ranks on a configuration."""

    def __init__(self, title: str) -> None:
        self.title, self.current, self.allocator = title, "", ""
        self.turns: dict[str, dict[int, dict[int, Turned]]] = {}  # contender -> round -> rank
        self.failed: dict[str, str] = {}

    def hear(self, rank: int, event: object) -> None:
        """Keeps the turns among a rank's events; the library's own events are ignored."""
        if isinstance(event, Begun):
            self.current, self.allocator = event.name, event.allocator
        if isinstance(event, Turned):
            both = self.turns.setdefault(event.name, {}).setdefault(event.round, {})
            both[rank] = event
            if len(both) == 2:
                ms = 1e3 * max(one.reported.seconds for one in both.values())
                print(f"{self.title}  round {event.round + 1}  {event.name:26s} {ms:8.1f} ms per batch", flush=True)

    def rounds(self, name: str) -> dict[int, list[TurnReport]]:
        """Returns the turns that both ranks have had: round -> reports of rank 0 and rank 1."""
        done = {number: both for number, both in self.turns.get(name, {}).items() if len(both) == 2}
        return {number: [both[rank].reported for rank in (0, 1)] for number, both in sorted(done.items())}

    def left(self, names: list[str], rounds: int) -> range:
        """Returns the rounds that these contenders have not all completed."""
        complete = min((max(self.rounds(name), default=-1) + 1 for name in names), default=rounds)
        return range(complete, rounds)

    def forget(self, names: list[str], again: range) -> None:
        """Drops the reports of first turns and of rounds that are repeated, because a turn belongs to two ranks of one pair."""
        for name in names:
            self.turns[name] = {number: both for number, both in self.turns.get(name, {}).items() if 0 <= number < again.start}


def measured(share: Share, title: str, names: list[str], rounds: int, seconds: float) -> Log:
    """Runs all turns of a configuration. A contender that fails loses only its own turns; the others go on in a new pair of processes."""
    log = Log(title)
    while names and (left := log.left(names, rounds)):
        log.forget(names, left)
        task = Task(share, names, left, seconds)
        try:
            run_processes(pair, [task, task], threads=1, patience=PATIENCE, on_event=log.hear)
        except DelockError as error:
            if not log.current:
                raise
            log.failed[log.current] = str(error)
            print(f"{title}  {log.current} failed: {error}", flush=True)
            names = [name for name in names if name != log.current]
            log.current = ""
    return log


def collected(log: Log, share: Share, rounds: int) -> Found:
    """Returns a configuration for results.json: samples per second round by round (null where there are none), first losses, failures."""
    rows = len(share.batches[0][0])
    software = f"torch {torch.__version__}, Python {platform.python_version()}, {log.allocator}"
    rates: dict[str, list[float | None]] = {}
    for name in log.turns:
        periods = {number: max(reported.seconds for reported in both) for number, both in log.rounds(name).items()}
        rates[name] = [rows / periods[number] if number in periods else None for number in range(rounds)]
    ceilings = log.rounds("ceiling")
    if ceilings:
        rates["DDG, simulated"] = [rows / ddg_period(ceilings[n]) if n in ceilings else None for n in range(rounds)]
    return {
        "batch": rows,
        "layers": share.layers,
        "rates": rates,
        "batches": {name: both[0][0].batches for name, both in log.turns.items() if 0 in both},
        "losses": {name: first_losses(log.rounds(name).get(-1, [])) for name in log.turns if not name.startswith("ceiling")},
        "failed": log.failed,
        "where": f"{os.cpu_count()} cores ({platform.machine()}), {software}",
        "when": time.strftime("%Y-%m-%d %H:%M"),
    }


def first_losses(both: list[TurnReport]) -> list[float]:
    """Returns the losses of the first batches that a contender learned from: the mean over the ranks that have one."""
    known = [reported.losses for reported in both if reported.losses]
    return [sum(losses) / len(losses) for losses in zip(*known, strict=True)]


def asked(options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Returns networks and configurations, by name."""
    for work in options.work:
        for configuration in options.configuration:
            if pays(WORKS[work], CONFIGURATIONS[configuration]):
                yield work, configuration


def main() -> None:
    """Measures every configuration, and writes all files again after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.8, help="of a measurement, about; of torch's schedules half")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--configuration", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    path = options.out / "results.json"
    results: dict[str, Found] = json.loads(path.read_text()) if path.exists() else {}
    for work, configuration in asked(options):
        title, begun = f"{work}, {configuration}", time.perf_counter()
        made = share(work, CONFIGURATIONS[configuration])
        log = measured(made, title, list(CONTENDERS), options.rounds, options.seconds)
        results[title] = collected(log, made, options.rounds) | {"work": WORKS[work].title, "seconds": time.perf_counter() - begun}
        path.write_text(json.dumps(results, indent=1) + "\n")
        (options.out / "table.md").write_text(table(results))
        figure(results, options.out / "rates")
    print(table(results))


if __name__ == "__main__":
    main()
