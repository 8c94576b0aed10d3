"""Measures the speed of K = 4 emulated stages with stragglers, beside the simulator, with the same seeded draws of slow ticks.

    python benchmarks/stragglers/run.py --out benchmarks/stragglers

Every stage waits 120 ms forward and 240 ms backward around real messages of 1 MB. In a slow tick a stage takes 1 + s times as long. Each
stage is slow with probability 1/K in every tick ("random"), or stage 1 is in every tick ("fixed"). A cell is the share of the speed without
stragglers that is kept: measured (simulated; measured over simulated time, minus 1). The simulator is given the time of an op and of a
message beside the wait. These are measured first, with one stage and with two, for waits and messages of a batch and of a micro-batch.
Free-running DGL has no plan and its stages never wait. So its simulated time is the sum of a stage's own ticks, and its speed is the mean
over the stages of updates per second.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import delock
from delock.data import as_loader
from delock.methods import Method, spelled
from delock.ops import Backward
from delock.plan import unroll
from delock.records import Event, StepRecord, Visit, VisitsRecord
from delock.timeline import Costs, Emulation, Slowdown, capacities, simulate

K, FORWARD, BACKWARD = 4, 0.12, 0.24  # seconds
ROWS, FEATURES, STEPS, WARM = 128, 2048, 50, 10
LINK: Literal["shared"] = "shared"  # holds as many messages as the simulator says; gloo holds as many again at the other end
LONG = 20  # steps of those that take a second and more for each
EXTRA = (0.0, 0.2, 0.5, 1.0, 1.5)
METHODS: tuple[Method, ...] = (
    delock.BP(),
    delock.OneFOneB(8),
    delock.DDG(),
    delock.FDG(),
    delock.ADL(K),
    delock.DSP(p=1, q=1),
    delock.DSP(p=2, q=2),
    delock.DSP(p=3, q=3),
    delock.AsyncDGL(buffer=2),
)


def slowdown(kind: str, extra: float) -> Slowdown | None:
    """Returns the slow ticks of one cell."""
    if not extra:
        return None
    return Slowdown(extra, 1 / K, seed=1) if kind == "random" else Slowdown(extra, victim=1)


def length(method: Method) -> int:
    """Returns the number of batches of a run."""
    return LONG if isinstance(method, delock.BP) else STEPS


def overhead(parts: int) -> tuple[float, float]:
    """Returns the seconds of an op beside its wait, and of a message: backpropagation in one stage and in two, with waits as long."""
    waits = (FORWARD / parts, BACKWARD / parts)
    op = (measured(delock.BP(), None, K=1, rows=ROWS // parts, waits=waits) - sum(waits)) / 2
    return op, max(0.0, measured(delock.BP(), None, K=2, rows=ROWS // parts, waits=waits) / 2 - sum(waits) - 2 * op)


def measured(
    method: Method, slow: Slowdown | None, *, K: int = K, rows: int = ROWS, waits: tuple[float, float] = (FORWARD, BACKWARD)
) -> float:
    """Returns the seconds per batch, from batch WARM to the last one of the last stage; for free-running stages as `paces` does."""
    made: tuple[Tensor, Tensor] = torch.randn(rows, FEATURES), torch.randint(10, (rows,))
    ends: list[float] = []
    visits: list[list[Visit]] = [[] for _ in range(K)]

    def hear(event: Event) -> None:
        if isinstance(event, StepRecord):
            ends.append(event.seconds)
        if isinstance(event, VisitsRecord):
            visits[event.stage] += [visit for visit in event.visits if visit.trains]

    steps = length(method)
    delock.fit(
        [nn.Linear(FEATURES, FEATURES) for _ in range(K - 1)] + [nn.Linear(FEATURES, 10)],
        as_loader([made] * steps),
        loss=cross_entropy,
        method=method,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        cuts=list(range(1, K)),
        heads=[nn.Linear(FEATURES, 10) for _ in range(K - 1)] if isinstance(method, delock.AsyncDGL) else None,
        batches=steps,
        placement=delock.Placement(link=LINK if not isinstance(method, delock.AsyncDGL) else "gloo", pin=False),
        simulation=delock.Simulation(slow, Emulation(*waits)),
        report=delock.Report(log_every=1),
        callbacks=[hear],
    )
    if isinstance(method, delock.AsyncDGL):
        return paces([(own[-1].end - own[WARM].end) / (steps - 1 - WARM) for own in visits])
    return (ends[-1] - ends[WARM]) / (steps - 1 - WARM)


def simulated(method: Method, slow: Slowdown | None, op: float, delay: float) -> float:
    """Returns the same from the plan on the clock, with the given time of an op beside its wait, and of a message on its way."""
    steps = length(method)
    if isinstance(method, delock.AsyncDGL):
        extra = [sum(slow.extra(n, k) if slow else 0.0 for n in range(WARM + 1, steps)) / (steps - 1 - WARM) for k in range(K)]
        return paces([(1 + more) * (FORWARD + BACKWARD) + 2 * op for more in extra])
    share = 1 / method.micro_batches
    delays = (delay,) * (K - 1)
    forward, backward = (share * FORWARD + op,) * K, (share * BACKWARD + op,) * K
    costs = Costs(forward, backward, up=delays, down=delays, capacity=capacities(method, K), slow=slow)
    column = simulate(unroll(method, K, steps), costs).columns[-1]
    ends = [span.end for span in column if isinstance(span.op, Backward)][method.micro_batches - 1 :: method.micro_batches]
    return (ends[-1] - ends[WARM]) / (steps - 1 - WARM)


def paces(periods: list[float]) -> float:
    """Returns the period whose rate is the mean of the stages' rates."""
    return len(periods) / sum(1 / period for period in periods)


def figure(rows: list[dict[str, Any]], stem: Path) -> None:
    """Draws the kept share of speed against s: lines are simulated, marks measured."""
    drawn, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for axis, kind in zip(axes, ("random", "fixed"), strict=True):
        for i, method in enumerate(METHODS):
            own = [row for row in rows if row["kind"] == kind and row["method"] == spelled(method)]
            axis.plot([r["s"] for r in own], [r["simulated"] for r in own], color=f"C{i}", label=spelled(method))
            axis.plot([r["s"] for r in own], [r["measured"] for r in own], "o", color=f"C{i}")
        axis.set_title(f"{kind} stragglers")
        axis.set_xlabel("s: a slow tick takes 1 + s times as long")
    axes[0].set_ylabel("share of the clean speed")
    axes[1].legend(fontsize=7)
    drawn.tight_layout()
    for suffix in (".png", ".svg"):
        drawn.savefig(stem.with_suffix(suffix), dpi=120)


def cells(method: Method, kind: str, costs: tuple[float, float]) -> list[dict[str, Any]]:
    """Returns a row of the table: one run for every s."""
    found: list[dict[str, Any]] = []
    for s in EXTRA:
        slow = slowdown(kind, s)
        due = simulated(method, slow, *costs)
        found.append({"kind": kind, "method": spelled(method), "s": s, "ms": measured(method, slow), "due": due})
        found[-1] |= {"measured": found[0]["ms"] / found[-1]["ms"], "simulated": found[0]["due"] / due}
        print(found[-1], flush=True)
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line per kind of stragglers and method."""
    lines = ["| stragglers | method | " + " | ".join(f"s = {s:g}" for s in EXTRA) + " |", "|---|---|" + "---:|" * len(EXTRA)]
    for kind, method in dict.fromkeys((row["kind"], row["method"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["method"]) == (kind, method)]
        shown = [f"{r['measured']:.2f} ({r['simulated']:.2f}; {100 * (r['ms'] / r['due'] - 1):+.1f} %)" for r in own]
        lines.append(f"| {kind} | {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Makes the requested runs, then writes table and figure of all that are known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--method", nargs="+", choices=[spelled(method) for method in METHODS], default=[spelled(method) for method in METHODS]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder; methods that are not asked for keep what its runs.json has")
    options = parser.parse_args()
    asked = [method for method in METHODS if spelled(method) in options.method]
    path = options.out / "runs.json"
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    costs = {parts: overhead(parts) for parts in {method.micro_batches for method in asked}}
    for parts, (op, delay) in sorted(costs.items()):
        print(f"1/{parts} of a batch: an op takes {1000 * op:.2f} ms beside its wait, a message {1000 * delay:.2f} ms", flush=True)
    for kind in ("random", "fixed"):
        for method in asked:
            known = [row for row in known if (row["kind"], row["method"]) != (kind, spelled(method))]
            known += cells(method, kind, costs[method.micro_batches])
            known.sort(key=lambda row: (row["kind"] == "fixed", [spelled(m) for m in METHODS].index(row["method"]), row["s"]))
            path.write_text(json.dumps(known) + "\n")
    (options.out / "table.md").write_text(table(known))
    print(table(known))
    figure(known, options.out / "speed")


if __name__ == "__main__":
    main()
