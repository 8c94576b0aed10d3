"""Methods and costs that the tests of timelines share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from delock.methods import ADL, BP, DDG, DSP, FDG, FR, METHODS, make
from delock.timeline import (
    Costs,
    Slowdown,
)

EVERY = [
    *(make(name, **({"micro_batches": 16} if name == "2bw" else {})) for name in METHODS if name != "pipedream"),
    *(FDG(order="backward-first"), ADL(3, order="backward-first"), DSP(2, 3), FR()),
    *(DDG(micro_batches=4), ADL(2, micro_batches=3, ahead="mean"), DSP(2, 3, micro_batches=2, ahead="part"), BP(2, behind=3)),
]


STRAGGLERS = Slowdown(1.0, probability=1 / 4)


def linked(K: int, c: float, **more: Any) -> Costs:
    """Unit costs with a delay on every link."""
    return replace(Costs.unit(K), up=(c,) * (K - 1), down=(c,) * (K - 1), **more)
