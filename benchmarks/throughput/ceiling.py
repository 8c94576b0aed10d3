"""Measures the ceiling: both ranks do their own share of every batch at the same time, and nothing is sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from time import perf_counter

import torch
from peers import output_of
from share import WARM, Here, Part, Turn, TurnReport
from torch import Tensor
from works import SGD

from delock.execution import lay_out_input
from delock.methods import DDG
from delock.plan import unroll
from delock.timeline import Costs, capacities, period, simulate

Forward = Callable[[int], Tensor]  # number of a batch -> what to differentiate


def ceiling(local: bool, here: Here) -> Turn:
    """Builds the share of a rank: forward on an input that is there, backward from its loss or an error that is there, update.

    local: stage 0 has a loss of its own, as in DGL, and takes no error; then stage 1 computes none.
    """
    part = here.part(here.share.halves[here.number])
    parts, error = [part], None
    if here.number:
        kept = lay_out_input(here.share.execution, output_of(here, [here.share.halves[0]], len(here.batch(0)[0]))).requires_grad_(not local)
        forward = partial(_loss, here, [part], kept)
    elif local:
        parts.append(here.part(here.share.head))
        forward = partial(_loss, here, parts, None)
    else:
        error = torch.randn_like(part(here.batch(0)[0]))
        forward = partial(_passed_on, here, part)
    return _Alone(parts, forward, error).turn


def _loss(here: Here, parts: list[Part], kept: Tensor | None, i: int) -> Tensor:
    x, y = here.batch(i)
    h = x if kept is None else kept.detach().requires_grad_(kept.requires_grad)  # without the gradient of the batch before
    for part in parts:
        h = part(h)
    return here.loss(h, y)


def _passed_on(here: Here, part: Part, i: int) -> Tensor:
    h: Tensor = part(here.batch(i)[0])
    return h


class _Alone:
    """Runs one rank's share, timed op by op."""

    def __init__(self, parts: list[Part], forward: Forward, error: Tensor | None) -> None:
        self.forward, self.error, self.done = forward, error, 0
        self.optimizer = SGD([w for part in parts for w in part.parameters()])

    def turn(self, n: int) -> TurnReport:
        """Runs n batches on the clock, and one more, so that the slower rank does not end alone."""
        for _ in range(WARM):
            self._one()
        begun = perf_counter()
        times = [self._one() for _ in range(n)]
        seconds = (perf_counter() - begun) / n
        self._one()
        forward, backward, update = (sum(took) / n for took in zip(*times, strict=True))
        return TurnReport(seconds, costs=(forward, backward, update))

    def _one(self) -> tuple[float, ...]:
        marks = [perf_counter()]
        root = self.forward(self.done)
        marks.append(perf_counter())
        root.backward(self.error)
        marks.append(perf_counter())
        self.optimizer.step()
        self.optimizer.zero_grad()
        marks.append(perf_counter())
        self.done += 1
        return tuple(b - a for a, b in pairwise(marks))


def ddg_period(reported: list[TurnReport]) -> float:
    """Returns the seconds per batch of DDG by its plan, if its ops take their times in that turn of both ranks, and messages take none."""
    forward, backward, update = zip(*(one.costs or (0.0, 0.0, 0.0) for one in reported), strict=True)
    method, K = DDG(), len(reported)
    return period(simulate(unroll(method, K, 40), Costs(forward, backward, update=update, capacity=capacities(method, K))))


CEILINGS = {"ceiling": partial(ceiling, False), "ceiling of DGL": partial(ceiling, True)}
