"""Measures the processor time that it takes to plan: `delock plan` as a whole, and the slots that are counted before a run.

    python benchmarks/planning/run.py --out benchmarks/planning
    python benchmarks/planning/run.py --out /tmp --src ../before/src --stages 2 16 64

Every plan is a process of its own; its processor time above that of the same plan in two stages is what the stages cost. A number is the
least of the rounds, because other programs only add to it. Slots are those of a link in shared memory, from costs per stage as a profile
has them; `--src` measures the plans of another checkout, and no slots.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from time import process_time

from delock.memory.peaks import repeating
from delock.memory.slots import slots_of_any
from delock.methods import BP, DSP, METHODS, AsyncDGL, GPipe, Method, OneFOneB, make, spelled
from delock.timeline import Costs

PLANS = {"FDG": ["--method", "fdg"], "1F1B, 16 micro-batches": ["--method", "1f1b", "--micro-batches", "16"]}
DEEP = 16  # stages of the runs whose slots are counted
SLOTS: list[Method] = [*(make(name) for name in METHODS if name != AsyncDGL.name), BP(16), GPipe(16), OneFOneB(16), DSP(3, 3)]


def plan_seconds(words: list[str], stages: int, src: Path) -> float:
    """Returns the processor time of a `delock plan`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "PYTHONPATH": str(src)}
    command = [sys.executable, "-m", "delock", "plan", *words, "--stages", str(stages)]
    subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def slot_seconds(method: Method) -> float:
    """Returns the processor time of counting the slots of all links."""
    forward = tuple(0.001 + 0.0001 * (k * 7 % 5) for k in range(DEEP))
    costs = Costs(forward, tuple(2.1 * cost for cost in forward), head=(0.0,) * DEEP)
    begun = process_time()
    slots_of_any(method, repeating(method, DEEP), costs)
    return process_time() - begun


def least(rounds: int, seconds: Callable[..., float], *given: object) -> float:
    """Returns the least of some rounds."""
    return min(seconds(*given) for _ in range(rounds))


def main() -> None:
    """Writes a row per plan, and one per method's slots."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--src", type=Path, help="of another checkout")
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    src = asked.src or Path(__file__).resolve().parents[2] / "src"
    lines = ["| `delock plan` (s of processor time above K = 2) | " + " | ".join(f"K = {K}" for K in asked.stages) + " |"]
    lines.append("|---|" + "---:|" * len(asked.stages))
    for name, words in PLANS.items():
        seconds = [least(asked.rounds, plan_seconds, words, K, src) for K in asked.stages]
        lines.append(f"| {name} | " + " | ".join(f"{one - seconds[0]:.2f}" for one in seconds) + " |")
    if asked.src is None:
        lines += ["", f"| slots, K = {DEEP} | s of processor time |", "|---|---:|"]
        lines += [f"| {spelled(method)} | {least(asked.rounds, slot_seconds, method):.2f} |" for method in SLOTS]
    (asked.out / "table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
