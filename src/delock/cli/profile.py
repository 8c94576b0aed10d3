"""Measures a model for a prediction: the cost of a batch in each of its stages, cut evenly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from delock.cli.config import TrainConfig, resolved, tokens
from delock.cli.workload import build_model, goals, load_data, recipe
from delock.methods import Method
from delock.options import Placement

if TYPE_CHECKING:
    from delock.run.request import Request


@dataclass(frozen=True)
class Profile:
    """Holds the cuts of a model, and the cost of a batch in each stage."""

    model: str
    samples: int  # in the batch
    cuts: tuple[int | str, ...]  # as train takes them
    layers: tuple[int, ...]
    parameters: tuple[int, ...]
    forward: tuple[float, ...]  # seconds
    backward: tuple[float, ...]  # seconds
    messages: tuple[int, ...]  # bytes of an activation on each link
    memory: tuple[int | None, ...]  # bytes that each stage's process will grow by
    tokens: int | None  # in a sample of text
    tied: tuple[dict[str, int], ...]  # on each link: weights that stages on both sides of it use, and their bytes, which the message holds


def request_of(config: TrainConfig, method: Method, K: int, placement: Placement) -> Request:
    """Returns the request of a resolved config for K stages; loads torch. Raises UsageError if model and data do not fit."""
    from delock.run.request import Request

    data = load_data(config)
    loss, _ = goals(config, data)
    epoch = len(data.train)
    optimizer, _ = recipe(config, method, epoch, epoch)
    return Request(build_model(config, data), data.train, None, loss, method, optimizer, stages=K, epochs=1, placement=placement)


def measure_model(config: TrainConfig, method: Method, K: int, placement: Placement) -> Profile:
    """Measures a resolved config's model on the first batch of its data; loads torch. Raises UsageError if they or K do not fit."""
    from delock.run.prepare import prepare

    prepared = prepare(request_of(config, method, K, placement))
    stages = [prepared.costs[a:b] for a, b in prepared.bounds()]
    return Profile(
        model=resolved(config.network.model),
        samples=prepared.batch.rows,
        cuts=prepared.places,
        layers=tuple(len(stage) for stage in stages),
        parameters=tuple(sum(cost.params for cost in stage) for stage in stages),
        forward=tuple(sum(cost.forward_s for cost in stage) for stage in stages),
        backward=tuple(sum(cost.backward_s for cost in stage) for stage in stages),
        messages=tuple(prepared.costs[cut - 1].out_bytes for cut in prepared.cuts),
        memory=tuple(held.resident if held else None for held in prepared.memory()),
        tokens=tokens(config),
        tied=tuple(dict(prepared.layers[cut].ties) for cut in prepared.cuts),
    )
