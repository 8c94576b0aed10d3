"""What a method will do on K stages, before anything runs: speed, idle shares, staleness, what is in flight."""

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
    """What the plan says about one stage."""

    staleness: float  # of the gradient: mean over a warm group of batches, in updates
    layer_staleness: int  # D_k, in batches
    idle: float  # share of the steady period
    held: HeldCounts


@dataclass(frozen=True, slots=True)
class Prediction:
    """Steady state of a method under a cost model."""

    period: float  # seconds per batch; a batch of a synchronous method is all its micro-batches
    speedup: float  # over BP in as many stages, with the same costs
    stages: tuple[StageForecast, ...]
    messages: tuple[tuple[int, int], ...]  # per link, the most activations and errors under way at one time


def predict(method: Method, K: int, costs: Costs, batches: int | None = None) -> Prediction:
    """Unroll and simulate `batches` batches (default: enough for a steady state without slow-downs; with them give some thousand).

    Costs are those of one op, which for a synchronous method is one micro-batch. Links of unlimited capacity get the method's own, as
    in the engine. Raises UsageError when the method or the costs do not fit K stages.
    """
    batches = _enough(method, K) if batches is None else batches
    plan = unroll(method, K, batches)
    timeline = simulate(plan, costs if costs.capacity else replace(costs, capacity=capacities(method, K)))
    rate = throughput(timeline)
    base = throughput(simulate(unroll(BP(), K, batches if costs.slow else 8), _whole(costs, method.parts)))  # BP repeats soon
    forecasts = [
        StageForecast(
            staleness=warm_mean(gradient_staleness(column), method.batches_per_update),
            layer_staleness=max(layer_staleness(column).values(), default=0),
            idle=share,
            held=held,
        )
        for column, share, held in zip(plan.columns, idle(timeline), in_flight(plan), strict=True)
    ]
    return Prediction(method.parts / rate, rate / method.parts / base, tuple(forecasts), tuple(messages(timeline)))


def capacities(method: Method, K: int) -> tuple[int, ...]:
    """What the engine's links hold, for `Costs.capacity`."""
    return tuple(method.capacity(k, K) for k in range(K - 1))


def _whole(costs: Costs, parts: int) -> Costs:
    """The costs of a batch in one piece, from those of one of its parts; a message is under way as long as a part's."""
    forward, backward, replay = (tuple(parts * cost for cost in work) for work in (costs.forward, costs.backward, costs.replay))
    return replace(costs, forward=forward, backward=backward, replay=replay, head=())  # BP has none


def _enough(method: Method, K: int) -> int:
    """Batches after which the steady stretch is long and warm, and the last complete group of an Update as well."""
    return 2 * method.span(K) + max(6, 36 // method.parts) + 2 * method.batches_per_update
