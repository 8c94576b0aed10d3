"""Predicts a method on K stages before anything runs: speed, idle shares, staleness, batches in flight."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from statistics import fmean

from delock.methods import BP, Method
from delock.plan import RunLength, Step
from delock.plan.pattern import Pattern, patterns
from delock.plan.unroll import column
from delock.timeline.costs import Costs
from delock.timeline.measures import at_once, idle, throughput
from delock.timeline.simulate import clocked
from delock.timeline.staleness import HeldCounts, gradient_staleness, holds, layer_staleness, warm_group


@dataclass(frozen=True, slots=True)
class StageForecast:
    """Holds what the plan says about one stage."""

    staleness: float  # of the gradient: mean over a warm group of batches, in updates
    staleness_per_part: tuple[int, ...]  # of every (micro-)batch of that group, which one Update applies
    layer_staleness: int  # D_k, in batches or, where the method splits batches, in parts
    idle: float  # share of the steady period
    held: HeldCounts


@dataclass(frozen=True, slots=True)
class Prediction:
    """Describes the steady state of a method under a cost model."""

    period: float  # seconds per batch, of all its micro-batches
    speedup: float  # over BP in as many stages, with the same costs
    stages: tuple[StageForecast, ...]
    messages: tuple[tuple[int, int], ...]  # per link: largest numbers of activations and errors under way at one time


def predict(method: Method, K: int, costs: Costs, batches: int | None = None) -> Prediction:
    """Follows a run of a method on the clock, and returns its steady state.

    costs: of one op, which is for one micro-batch if the method splits batches. If they name no capacities, links get the method's own, as
    in the engine.
    batches: the length of the run; the default is long enough for a steady state without slow-downs. With slow-downs give some thousand.
    Raises UsageError if the method or the costs do not fit K stages.
    """
    method = method.fitted(K)
    stages = patterns(method, K)
    batches = enough(stages) if batches is None else batches
    columns = [_read(repeated(pattern, batches), pattern.n) for pattern in stages]
    clock = clocked(stages, batches, _with_capacity(costs, method))
    rate = throughput(clock.times)
    shares = idle(clock.times)
    forecasts = [StageForecast(fmean(ages), ages, lag, share, held) for (ages, lag, held), share in zip(columns, shares, strict=True)]
    links = [(at_once(clock.under_way(k, "up")), at_once(clock.under_way(k + 1, "down"))) for k in range(K - 1)]
    gain = rate / method.micro_batches / _base(method, K, costs, batches)
    return Prediction(method.micro_batches / rate, gain, tuple(forecasts), tuple(links))


def speedup(method: Method, K: int, costs: Costs) -> float:
    """Returns only the `speedup` of a prediction."""
    method = method.fitted(K)
    stages = patterns(method, K)
    batches = enough(stages)
    rate = throughput(clocked(stages, batches, _with_capacity(costs, method)).times)
    return rate / method.micro_batches / _base(method, K, costs, batches)


def _with_capacity(costs: Costs, method: Method) -> Costs:
    return costs if costs.capacity else replace(costs, capacity=capacities(method, costs.K))


def _base(method: Method, K: int, costs: Costs, batches: int) -> float:
    """Returns the throughput of BP, whose plan repeats after one batch."""
    return throughput(clocked(patterns(BP(), K), batches if costs.slow else 8, _whole(costs, method.micro_batches)).times)


def repeated(pattern: Pattern, batches: int) -> list[Step]:
    """Returns the first steps of one stage in a run of `batches`, enough to show all its staleness and its peak of held batches.

    After D_k batches the stage is full, and after D_k more, no batch in flight is from before its first Update. Older weights are there
    after as many Updates.
    """
    method, k, K = pattern.method, pattern.k, pattern.K
    parts = method.micro_batches
    warm = -(-2 * method.delay(k, K) // parts) + (3 + pattern.banks) * pattern.M
    stop = method.offset(k, K) // parts + 1 + warm if warm < batches else sys.maxsize
    return list(takewhile(lambda step: step.tick < stop, column(pattern, RunLength(batches))))


def _read(steps: Sequence[Step], group: int) -> tuple[tuple[int, ...], int, HeldCounts]:
    return warm_group(gradient_staleness(steps), group), max(layer_staleness(steps).values(), default=0), holds(steps)


def capacities(method: Method, K: int) -> tuple[int, ...]:
    """Returns the number of messages that each of the engine's links holds, for `Costs.capacity`."""
    return tuple(method.capacity(k, K) for k in range(K - 1))


def _whole(costs: Costs, micro_batches: int) -> Costs:
    """Returns the costs of a batch in one piece, from those of a micro-batch; the delay of a message stays that of a micro-batch."""
    forward, backward, replay = (tuple(micro_batches * cost for cost in work) for work in (costs.forward, costs.backward, costs.replay))
    return replace(costs, forward=forward, backward=backward, replay=replay, head=())  # BP has none


def enough(stages: Sequence[Pattern]) -> int:
    """Returns a number of batches with a long steady stretch, which includes the last complete group of batches of one Update."""
    method, groups = stages[0].method, 2 + max(pattern.banks for pattern in stages)
    return 2 * stages[0].span + max(6, 36 // method.micro_batches) + groups * method.batches_per_update
