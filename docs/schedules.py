"""Draws docs/schedules.{png,svg}, the picture of the README: the same batches under three methods.

    python docs/schedules.py
"""

from __future__ import annotations

from pathlib import Path

from delock.draw import gantt
from delock.methods import BP, FDG, OneFOneB
from delock.plan import unroll
from delock.timeline import Costs, simulate

K = 4
WHOLE = Costs.unit(K)  # forward 1, backward 2
PART = Costs(forward=(0.25,) * K, backward=(0.5,) * K)  # of a quarter of the batch


def main() -> None:
    """Draws the predicted timelines above one another."""
    timelines = {
        "backpropagation": simulate(unroll(BP(), K, 4), WHOLE),
        "1F1B, every batch in 4 micro-batches": simulate(unroll(OneFOneB(4), K, 8), PART),
        "FDG": simulate(unroll(FDG(), K, 20), WHOLE),
    }
    gantt(timelines, Path(__file__).with_suffix(""), window=(0, 36), unit="time of one forward")


if __name__ == "__main__":
    main()
