"""A model measured for a prediction: what a batch costs each of its stages, cut evenly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path


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


def measure_model(
    model: str, K: int, *, data: str, data_dir: Path | None, image_size: int | None, batch_size: int, threads: int
) -> Profile:
    """Measure a model on the first batch of a data set; loads torch. Raises UsageError where model, data or K do not fit."""
    import torch
    from torch.nn.functional import cross_entropy

    from delock.data import load
    from delock.nets import atoms, balance, build, measure

    images = load(data, data_dir=data_dir, batch_size=batch_size, image_size=image_size)
    parts = atoms(build(model, classes=images.classes, in_channels=images.channels, image_size=images.image_size))
    inputs, targets = next(iter(images.train.epoch(0)))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        costs = measure(parts, inputs, targets, cross_entropy)
    finally:
        torch.set_num_threads(before)
    cuts = tuple(balance([cost.total_s for cost in costs], K, [cost.params for cost in costs]))
    stages = [costs[a:b] for a, b in itertools.pairwise([0, *cuts, len(parts)])]
    return Profile(
        model=model,
        samples=len(targets),
        cuts=cuts,
        layers=tuple(len(stage) for stage in stages),
        parameters=tuple(sum(cost.params for cost in stage) for stage in stages),
        forward=tuple(sum(cost.forward_s for cost in stage) for stage in stages),
        backward=tuple(sum(cost.backward_s for cost in stage) for stage in stages),
        messages=tuple(costs[cut - 1].out_bytes for cut in cuts),
    )
