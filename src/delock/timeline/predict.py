"""Predicts a method on K stages before anything runs: speed, idle shares, staleness, batches in flight."""

from __future__ import annotations

from dataclasses import dataclass, replace

from delock.methods import BP, Method
from delock.plan import unroll
from delock.timeline.costs import Costs
from delock.timeline.measures import idle, messages, throughput
from delock.timeline.simulate import simulate
from delock.timeline.staleness import HeldCounts, gradient_staleness, in_flight, layer_staleness, warm_mean


@dataclass(frozen=True, slots=True)
class StageForecast:
    """Holds what the plan says about one stage."""

    staleness: float  # of the gradient: mean over a warm group of batches, in updates
    layer_staleness: int  # D_k, in batches
    idle: float  # share of the steady period
    held: HeldCounts


@dataclass(frozen=True, slots=True)
class Prediction:
    """Describes the steady state of a method under a cost model."""

    period: float  # seconds per batch, of all its micro-batches
    speedup: float  # over BP in as many stages, with the same costs
    stages: tuple[StageForecast, ...]
    messages: tuple[tuple[int, int], ...]  # per link, the most activations and errors under way at one time


def predict(method: Method, K: int, costs: Costs, batches: int | None = None) -> Prediction:
    """Unrolls and simulates a run of a method, and returns its steady state.

    costs: of one op, which is for one micro-batch if the method splits batches. If they name no capacities, links get the method's own, as
    in the engine.
    batches: the length of the run; the default is long enough for a steady state without slow-downs. With slow-downs give some thousand.
    Raises UsageError if the method or the costs do not fit K stages.
    """
    batches = enough(method, K) if batches is None else batches
    plan = unroll(method, K, batches)
    timeline = simulate(plan, costs if costs.capacity else replace(costs, capacity=capacities(method, K)))
    rate = throughput(timeline)
    base = throughput(simulate(unroll(BP(), K, batches if costs.slow else 8), _whole(costs, method.micro_batches)))  # BP repeats soon
    forecasts = [
        StageForecast(
            staleness=warm_mean(gradient_staleness(column), method.batches_per_update),
            layer_staleness=max(layer_staleness(column).values(), default=0),
            idle=share,
            held=held,
        )
        for column, share, held in zip(plan.columns, idle(timeline), in_flight(plan), strict=True)
    ]
    return Prediction(method.micro_batches / rate, rate / method.micro_batches / base, tuple(forecasts), tuple(messages(timeline)))


def capacities(method: Method, K: int) -> tuple[int, ...]:
    """Returns the number of messages that each of the engine's links holds, for `Costs.capacity`."""
    return tuple(method.capacity(k, K) for k in range(K - 1))


def _whole(costs: Costs, micro_batches: int) -> Costs:
    """Returns the costs of a batch in one piece, from those of a micro-batch; the delay of a message stays that of a micro-batch."""
    forward, backward, replay = (tuple(micro_batches * cost for cost in work) for work in (costs.forward, costs.backward, costs.replay))
    return replace(costs, forward=forward, backward=backward, replay=replay, head=())  # BP has none


def enough(method: Method, K: int) -> int:
    """Returns a number of batches with a long steady stretch, which includes the last complete group of batches of one Update."""
    return 2 * method.span(K) + max(6, 36 // method.micro_batches) + 2 * method.batches_per_update
