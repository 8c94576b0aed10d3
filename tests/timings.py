"""Methods and costs that the tests of timelines share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from delock.methods import ADL, DSP, FDG, FR, METHODS, make
from delock.timeline import (
    Costs,
    Slowdown,
)

EVERY = [make(name) for name in METHODS] + [FDG(order="backward-first"), ADL(3, order="backward-first"), DSP(2, 3), FR()]


STRAGGLERS = Slowdown(1.0, probability=1 / 4)


def linked(K: int, c: float, **more: Any) -> Costs:
    """Unit costs with a delay on every link."""
    return replace(Costs.unit(K), up=(c,) * (K - 1), down=(c,) * (K - 1), **more)
