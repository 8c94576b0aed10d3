"""Fills in defaults that depend on other options, and refuses contradictions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from delock.cli.config.defaults import IMAGES, TEXT, resolved
from delock.cli.config.flat import LONGEST, brief
from delock.cli.config.kinds import is_text, settle
from delock.cli.config.options import AlgorithmOptions, NetworkOptions, TrainConfig, TrainingOptions
from delock.cli.config.update import UpdateOptions, filled
from delock.codecs import spelled
from delock.errors import UsageError
from delock.keys import MOST_SEED
from delock.methods import METHODS, Method, make, options
from delock.methods.base import MOST, at_least
from delock.options import Compression

MOST_STAGES = 1000
MOST_FLOAT = 1e38  # float32 ends there


def resolve(config: TrainConfig, ranks: int | None = None) -> TrainConfig:
    """Returns the config with every default that needs neither data nor model; each of torchrun's ranks is a stage.

    Raises UsageError for contradictions and values out of range.
    """
    usual = ranks or 2
    config = chosen(config, usual)
    network = _network(config.network, usual)
    method = make_method(config.algorithm).fitted(network.stages or 1)
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
    _check_training(config.training)
    algorithm, compression = _algorithm(method), _spelled(config.compression)
    return replace(config, algorithm=algorithm, network=network, compression=compression)


def chosen(config: TrainConfig, usual: int = 2) -> TrainConfig:
    """Returns the config with the defaults of its kind of data and of its optimizer, and its corrections as what they stand for.

    usual: the number of stages where none is given. Raises UsageError for contradictions and values out of range.
    """
    _check(config)
    config = settle(replace(config, algorithm=_usual(config, usual)))
    return replace(config, algorithm=_ahead(config.algorithm, config.update), update=filled(config.update))


def _usual(config: TrainConfig, stages: int) -> AlgorithmOptions:
    """Returns the method's options, by default those of the kind of data: a batch of text goes in as many parts as there are stages."""
    if config.algorithm.method:
        return config.algorithm
    if not is_text(config):
        return replace(config.algorithm, method=IMAGES["method"])
    parts = min(config.dataset.batch_size or TEXT["batch_size"], resolved(_network(config.network, stages).stages))
    return replace(config.algorithm, method=TEXT["method"], micro_batches=config.algorithm.micro_batches or parts)


def make_method(config: AlgorithmOptions) -> Method:
    """Returns the chosen method. Raises UsageError for an unknown method, and for an option that it does not have."""
    given = {name: getattr(config, name) for name in AlgorithmOptions.__dataclass_fields__ if name != "method"}
    lags = {name: value[0] for name in ("p", "q") if (value := given[name]) is not None and len(value) == 1}  # one for all links
    return make(resolved(config.method), **{name: value for name, value in (given | lags).items() if value is not None})


def _algorithm(method: Method) -> AlgorithmOptions:
    values = {name: getattr(method, name) for name in options(type(method))}
    lags = {name: (value,) for name in ("p", "q") if isinstance(value := values.get(name), int)}
    return AlgorithmOptions(method.name, **(values | lags))


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


def _check_training(config: TrainingOptions) -> None:
    if config.epochs is not None and config.batches is not None:
        raise UsageError("the length of the run is given twice: use --epochs or --batches")
    if config.milestones and config.schedule != "steps":
        raise UsageError(f"milestones belong to the schedule steps, and the schedule is {config.schedule}")
    if config.floor and config.schedule != "cosine":
        raise UsageError(f"floor belongs to the schedule cosine, and the schedule is {config.schedule}")
    if config.gamma != TrainingOptions.gamma and config.schedule != "steps":
        raise UsageError(f"gamma belongs to the schedule steps, and the schedule is {config.schedule}")
    if config.schedule == "steps" and not config.milestones:
        raise UsageError("the schedule steps needs --milestones: the epochs at which the learning rate falls")


def can_be_ahead(method: str, *, behind: bool = False) -> bool:
    """Returns True if --correct ahead acts on a method: it is late, by itself or by --behind."""
    return "ahead" in options(METHODS[method]) and (behind or not METHODS[method].synchronous)


def _ahead(config: AlgorithmOptions, update: UpdateOptions) -> AlgorithmOptions:
    """Returns the method's options with `ahead`, if it is among the corrections."""
    if "ahead" not in update.correct or config.ahead == "part":
        return config
    if config.ahead:
        raise UsageError(f"--ahead is {config.ahead}, and ahead in --correct says part: give one of them")
    if config.method in METHODS and not can_be_ahead(resolved(config.method), behind=bool(config.behind)):
        raise UsageError(f"{config.method} is not late, so there is nothing to be ahead of: leave ahead out of --correct")
    return replace(config, ahead="part")


Range = tuple[float | None, float] | tuple[float | None, float, float]
"""A value, or None where it is not given, its least, and its largest unless that is MOST."""


def check_ranges(ranges: Mapping[str, Range]) -> None:
    """Raises UsageError if one of the values, by name, is out of its range, infinite or NaN."""
    for name, (value, least, *most) in ranges.items():
        if value is not None:
            at_least(name, value, least, *most)


def _check(config: TrainConfig) -> None:
    """Refuses numbers out of range, by the names the user gave them."""
    network, data, language, training, update = config.network, config.dataset, config.language, config.training, config.update
    ranges: dict[str, Range] = {
        "stages": (network.stages, 1, MOST_STAGES),
        "batch-size": (data.batch_size, 1),
        "test-batch-size": (data.test_batch_size, 1),
        "limit": (data.limit, 1),
        "image-size": (data.image_size, 1, 10_000),
        "context": (language.context, 1, 10**6),
        "depth": (language.depth, 1, 1000),
        "width": (language.width, 1, 10**5),
        "attention-heads": (language.attention_heads, 1, 10**5),
        "epochs": (training.epochs, 1),
        "batches": (training.batches, 1),
        "eval-every": (training.eval_every, 1),
        "horizon": (update.horizon, 0, MOST_FLOAT),
        "lr": (update.lr, 0, MOST_FLOAT),
        "weight-decay": (update.weight_decay, 0, MOST_FLOAT),
        "warmup": (training.warmup, 0),
        "gamma": (training.gamma, 0, MOST_FLOAT),
        "floor": (training.floor, 0, 1),
        "seed": (training.seed, 0, MOST_SEED),
    }
    check_ranges(ranges)
    if any(not 0 <= at <= MOST for at in training.milestones):
        raise UsageError(
            f"milestones are {' '.join(f'{at:g}' for at in training.milestones)}, but every one must be at least 0 and at most {MOST:,}"
        )
    shares = {"dropout": network.dropout, "momentum": update.momentum, "beta1": update.beta1, "beta2": update.beta2}
    for name, share in shares.items():
        if share is not None and not 0 <= share < 1:
            raise UsageError(f"{name} is {share}, but it must lie in [0, 1)")
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", config.machine.device):
        raise UsageError(f"device is {brief(config.machine.device)!r}, but it must be cpu, cuda or cuda:N")
    for cut in network.cuts or ():
        if len(str(cut)) > LONGEST:
            raise UsageError(f"no layer is called {brief(str(cut))!r}: cuts are numbers or names of layers")
