"""Derives from a plan the facts that the optimizer of each stage may ask for."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from delock.methods import Method
from delock.optim.stage_facts import StageFacts
from delock.plan.pattern import patterns
from delock.timeline.predict import enough, repeated
from delock.timeline.staleness import gradient_staleness, warm_group


def stage_facts(method: Method, K: int) -> list[StageFacts]:
    """Returns the facts of every stage. Staleness is here the age of the Forward's weights when a gradient is applied, with replay too.

    Free-running stages apply their gradients at once.
    """
    if method.free_running:
        return [StageFacts(k, K, 0.0, 0) for k in range(K)]
    return [StageFacts(k, K, fmean(ages), max(ages)) for k, ages in enumerate(warm_ages(method, K))]


def warm_ages(method: Method, K: int, stages: Sequence[int] | None = None) -> list[tuple[int, ...]]:
    """Returns, for these stages, the ages of the Forwards' weights when an Update applies the gradients, for every part of a warm group.

    By default for all stages.
    """
    method = method.fitted(K)
    group = method.batches_per_update * method.micro_batches
    asked = patterns(method, K, stages)
    columns = (repeated(pattern, enough(asked)) for pattern in asked)
    return [warm_group(gradient_staleness(column, from_forward=True), group) for column in columns]
