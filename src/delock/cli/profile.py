"""A model measured for a prediction: what a batch costs each of its stages, cut evenly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from delock.cli.workload import build_model, goals, load_data
from delock.config import TrainConfig, known, tokens


@dataclass(frozen=True)
class Profile:
    """Where a model is cut, and the cost of a batch on each stage."""

    model: str
    samples: int  # in the batch
    cuts: tuple[int, ...]
    layers: tuple[int, ...]
    parameters: tuple[int, ...]
    forward: tuple[float, ...]  # seconds
    backward: tuple[float, ...]  # seconds
    messages: tuple[int, ...]  # bytes of an activation on each link
    tokens: int | None  # in a sample of text


def measure_model(config: TrainConfig, K: int, *, threads: int) -> Profile:
    """Measure a resolved config's model on the first batch of its data; loads torch. Raises UsageError where they or K do not fit."""
    import torch

    from delock.nets import atoms, balance, measure

    data = load_data(config)
    parts = atoms(build_model(config, data))
    inputs, targets = next(iter(data.train.epoch(0)))
    loss, _ = goals(config)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        costs = measure(parts, inputs, targets, loss)
    finally:
        torch.set_num_threads(before)
    cuts = tuple(balance([cost.total_s for cost in costs], K, [cost.params for cost in costs]))
    stages = [costs[a:b] for a, b in itertools.pairwise([0, *cuts, len(parts)])]
    return Profile(
        model=known(config.network.model),
        samples=len(targets),
        cuts=cuts,
        layers=tuple(len(stage) for stage in stages),
        parameters=tuple(sum(cost.params for cost in stage) for stage in stages),
        forward=tuple(sum(cost.forward_s for cost in stage) for stage in stages),
        backward=tuple(sum(cost.backward_s for cost in stage) for stage in stages),
        messages=tuple(costs[cut - 1].out_bytes for cut in cuts),
        tokens=tokens(config),
    )
