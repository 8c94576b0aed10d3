"""Fills in defaults that depend on other options, and refuses contradictions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from delock.cli.config.kinds import resolved, settle
from delock.cli.config.options import AlgorithmOptions, NetworkOptions, TrainConfig, TrainingOptions
from delock.codecs import spelled
from delock.errors import UsageError
from delock.methods import Method, make, options
from delock.options import Compression

LEARNING_RATES = MappingProxyType({"sgd": 0.1, "adam": 0.001, "adamw": 0.001})


def resolve(config: TrainConfig, ranks: int | None = None) -> TrainConfig:
    """Returns the config with every default that needs neither data nor model; each of torchrun's ranks is a stage.

    Raises UsageError for contradictions and values out of range.
    """
    _check(config)
    config = settle(config)
    method, network = make_method(config.algorithm), _network(config.network, ranks or 2)
    method.fits(network.stages or 1)
    config.simulation.straggler(network.stages or 1, config.training.seed)  # raises UsageError for a stage that is not there
    if config.network.head is not None and not method.local_losses:
        raise UsageError(f"head is {config.network.head}, but {method.name} has no local losses: leave it out")
    batch = resolved(config.dataset.batch_size)
    if method.micro_batches > batch:
        raise UsageError(
            f"{method.name} splits every batch into {method.micro_batches} parts, but batch-size is {batch}: "
            "use fewer parts, or larger batches"
        )
    algorithm, training, compression = _algorithm(config.algorithm, method), _training(config.training), _spelled(config.compression)
    return replace(config, algorithm=algorithm, network=network, training=training, compression=compression)


def make_method(config: AlgorithmOptions) -> Method:
    """Returns the chosen method. Raises UsageError for an unknown method, and for an option that it does not have."""
    given = {name: getattr(config, name) for name in AlgorithmOptions.__dataclass_fields__ if name != "method"}
    lags = {name: value[0] for name in ("p", "q") if (value := given[name]) is not None and len(value) == 1}  # one for all links
    return make(config.method, **{name: value for name, value in (given | lags).items() if value is not None})


def _algorithm(config: AlgorithmOptions, chosen: Method) -> AlgorithmOptions:
    values = {name: getattr(chosen, name) for name in options(type(chosen))}
    lags = {name: (value,) for name in ("p", "q") if isinstance(value := values.get(name), int)}
    return AlgorithmOptions(chosen.name, **(values | lags))


def _network(config: NetworkOptions, usual: int) -> NetworkOptions:
    if config.cuts is None:
        return replace(config, stages=usual if config.stages is None else config.stages)
    stages = len(config.cuts) + 1
    if config.stages not in (None, stages):
        raise UsageError(f"{len(config.cuts)} cuts make {stages} stages, not {config.stages}: give --cuts or --stages")
    return replace(config, stages=stages)


def _spelled(compression: Compression) -> Compression:
    """Returns the codecs in their short spelling, without settings at their defaults."""
    return Compression(spelled(compression.activations), spelled(compression.errors))


def _training(config: TrainingOptions) -> TrainingOptions:
    if config.epochs is not None and config.batches is not None:
        raise UsageError("the length of the run is given twice: use --epochs or --batches")
    if config.optimizer != "sgd" and (config.momentum is not None or config.nesterov):
        raise UsageError(f"momentum and nesterov are options of sgd, and the optimizer is {config.optimizer}")
    if config.milestones and config.schedule != "steps":
        raise UsageError(f"milestones belong to the schedule steps, and the schedule is {config.schedule}")
    if config.schedule == "steps" and not config.milestones:
        raise UsageError("the schedule steps needs --milestones: the epochs at which the learning rate falls")
    momentum = 0.9 if config.optimizer == "sgd" and config.momentum is None else config.momentum
    if config.nesterov and not momentum:
        raise UsageError("nesterov needs a momentum above 0")
    lr = LEARNING_RATES[resolved(config.optimizer)] if config.lr is None else config.lr
    return replace(config, lr=lr, momentum=momentum)


def refuse_below(bounds: Mapping[str, tuple[float | None, float]]) -> None:
    """Raises UsageError if a value (name: value, least) is too small, infinite or NaN; None is not given."""
    for name, (value, least) in bounds.items():
        if value is not None and not least <= value < float("inf"):
            raise UsageError(f"{name} is {value:g}, but it must be at least {least:g}")


def _check(config: TrainConfig) -> None:
    """Refuses numbers out of range, by the names the user gave them."""
    network, data, language, training = config.network, config.dataset, config.language, config.training
    bounds: dict[str, tuple[float | None, float]] = {
        "stages": (network.stages, 1),
        "batch-size": (data.batch_size, 1),
        "test-batch-size": (data.test_batch_size, 1),
        "limit": (data.limit, 1),
        "image-size": (data.image_size, 1),
        "context": (language.context, 1),
        "depth": (language.depth, 1),
        "width": (language.width, 1),
        "attention-heads": (language.attention_heads, 1),
        "epochs": (training.epochs, 1),
        "batches": (training.batches, 1),
        "eval-every": (training.eval_every, 1),
        "lr": (training.lr, 0),
        "momentum": (training.momentum, 0),
        "weight-decay": (training.weight_decay, 0),
        "warmup": (training.warmup, 0),
        "gamma": (training.gamma, 0),
        "seed": (training.seed, 0),
    }
    refuse_below(bounds)
    if any(not 0 <= at < float("inf") for at in training.milestones):
        raise UsageError(f"milestones are {' '.join(f'{at:g}' for at in training.milestones)}, but every one must be at least 0")
    if not 0 <= network.dropout < 1:
        raise UsageError(f"dropout is {network.dropout}, but it must lie in [0, 1)")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", config.machine.device):
        raise UsageError(f"device is {config.machine.device!r}, but it must be cpu, cuda or cuda:N")
