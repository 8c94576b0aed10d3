"""Derives from a plan the facts that the optimizer of each stage may ask for."""

from __future__ import annotations

from delock.methods import Method
from delock.optim.stage_facts import StageFacts
from delock.plan.pattern import patterns
from delock.timeline.predict import enough, repeated
from delock.timeline.staleness import gradient_staleness, warm_mean


def stage_facts(method: Method, K: int) -> list[StageFacts]:
    """Returns the facts of every stage. Staleness is here the age of the Forward's weights when a gradient is applied, with replay too.

    Free-running stages apply their gradients at once.
    """
    if method.free_running:
        return [StageFacts(k, K, 0.0, 0) for k in range(K)]
    method = method.fitted(K)
    group = method.batches_per_update * method.micro_batches
    steps = [repeated(pattern, enough(method, K)) for pattern in patterns(method, K)]
    ages = [gradient_staleness(column, from_forward=True) for column in steps]
    return [StageFacts(k, K, warm_mean(age, group), max(age.values(), default=0)) for k, age in enumerate(ages)]
